"""PaddleSlim's pruners as engines: they choose on a copy of the model, and what they chose is read back.

Two kinds. The filter pruners trace the model themselves, remove output channels of groups of convolutions, and leave
a smaller model, whose outputs are read too. The unstructured pruners make masks of weights.

What PaddleSlim 2.6.0 does not see: channels behind a mean over space, so that the pruned model does not run
(ModelError); channels that a concat joins, which stay without a word.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import paddle

from slimbridge.errors import FAILURES, BackendError, ModelError, first_line, listed
from slimbridge.ports import Array, NativeRequest, NativeResult, tensors_in
from slimbridge_paddle import _compat, run
from slimbridge_paddle.names import CONVS, TRANSPOSED_CONVS, Entry, entries, find_layers, walk
from slimbridge_paddle.quant import remove_quant
from slimbridge_paddle.tensors import copied, model_place, move

_GMP = {
    "stable_iterations": 0,
    "pruning_iterations": 100,
    "tunning_iterations": 0,
    "resume_iteration": 0,
    "pruning_steps": 4,
    "initial_ratio": 0.0,
}
"""GMP's schedule: at the end of it fixed weights are masked alike, however it runs."""

_MASKING = ("prune_params_type", "local_sparsity", "sparse_block")
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "L1NormFilterPruner": ("skip_leaves", "prune_type", "num_head"),
    "L2NormFilterPruner": ("skip_leaves", "prune_type", "num_head"),
    "FPGMFilterPruner": ("skip_leaves",),
    "UnstructuredPruner": ("mode", "threshold", *_MASKING),
    "GMPUnstructuredPruner": ("configs", *_MASKING),
}
ENGINES = tuple(f"paddleslim.{name}" for name in _OPTIONS)


def engines() -> tuple[str, ...]:
    """The names of the pruners, none where PaddleSlim is not installed; it is not imported."""
    return ENGINES if find_spec("paddleslim") is not None else ()


def choose(model: Any, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
    """Let PaddleSlim prune `model`, a copy that is used up, and read back what it chose.

    PaddleSlim computes in float32. Options, by its own names:

    * filter pruners: `skip_leaves` (leave the last convolutions alone, its default), and for L1 and L2 `prune_type`
      ("conv" or "fc": which weights lead a group) and `num_head` (prune square linear layers by whole heads);
    * unstructured pruners: `prune_params_type` (None, or "conv1x1_only"), `local_sparsity` (each layer at the ratio;
      else one threshold for all), `sparse_block` ([m, n]), and `mode` ("ratio", or "threshold" with `threshold`)
      or `configs`, GMP's schedule, which is run to its end on fixed weights.

    Raises:
        BackendError, ModelError: see `slimbridge.ports.Backend.native`.
    """
    if request.pruner not in ENGINES:
        raise BackendError(f"native: unknown pruner '{request.pruner}'; allowed: {listed(engines())}")
    name = request.pruner.partition(".")[2]
    unknown = [option for option in request.options if option not in _OPTIONS[name]]
    if unknown:
        raise BackendError(f"native: {name} has no option {listed(unknown)}; it has {listed(_OPTIONS[name])}")
    find_layers(model, (*request.ignored, *request.layer_ratios), "native")
    _prepare(model)
    if name.endswith("FilterPruner"):
        return _filters(model, name, request, inputs)
    if request.layer_ratios:
        raise BackendError(f"native: {name} takes one ratio for all layers, {len(request.layer_ratios)} were given")
    return _masks(model, name, request)


def _prepare(model: Any) -> None:
    remove_quant(model)
    model.eval()
    move(model, "gpu" if model_place(model).is_gpu_place() else "cpu", "float32")


@contextmanager
def _toolkit(name: str) -> Iterator[Any]:
    """PaddleSlim's module of pruners; what fails inside is a ModelError."""
    try:
        with _compat.paddleslim_pruning() as pruning:
            yield pruning
    except ModuleNotFoundError as error:
        raise BackendError(f"native: '{error.name}' is not installed: pip install 'slimbridge[paddle]'") from error
    except FAILURES as error:
        raise ModelError(f"native: PaddleSlim's {name} failed: {first_line(error)}") from error


def _weights(model: Any) -> dict[str, tuple[Entry, int]]:
    """Paddle's name of each convolution's and linear layer's weight -> its entry, and the stored axis of outputs."""
    layers = dict(walk(model))
    found = {}
    for entry in entries(model):
        layer = layers[entry.path]
        if entry.role == "weight" and isinstance(layer, (*CONVS, *TRANSPOSED_CONVS, paddle.nn.Linear)):
            found[entry.tensor.name] = entry, 0 if type(layer) not in _OUTPUTS_SECOND else 1
    return found


_OUTPUTS_SECOND = (*TRANSPOSED_CONVS, paddle.nn.Linear)


def _members(collection: Any, weights: Mapping[str, tuple[Entry, int]]) -> list[str]:
    """Paths of the layers whose outputs a group of PaddleSlim cuts."""
    details = [(item.name, item.axis) for item in collection.all_pruning_details()]
    return [weights[name][0].path for name, axis in details if name in weights and weights[name][1] == axis]


def _filters(model: Any, name: str, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
    weights = _weights(model)
    with _toolkit(name) as pruning:
        pruner = getattr(pruning, name)(model, _examples(inputs), **request.options)
        ratios = _ratios(pruner, weights, request)
        plan = pruner.prune_vars(ratios, 1 if request.options.get("prune_type") == "fc" else 0)
    kept = {}
    for key, masks in plan.masks.items():
        for mask in masks:
            if key in weights and mask.dims == weights[key][1] and not np.all(mask.mask):
                kept[weights[key][0].name] = tuple(np.flatnonzero(mask.mask).tolist())
    if not kept:
        raise ModelError(f"native: PaddleSlim's {name} removed nothing; it took {len(ratios)} of the model's layers")
    try:
        output = run.forward(model, inputs, ()).output
    except FAILURES as error:
        raise ModelError(f"native: the model that {name} pruned does not run: {first_line(error)}") from error
    return NativeResult(kept, {}, tuple(copied(tensor) for tensor in tensors_in(output)))


def _examples(inputs: Sequence[Array]) -> list[Array]:
    arrays = [np.asarray(array) for array in inputs]
    return [array.astype(np.float32 if array.dtype.kind == "f" else np.int64) for array in arrays]


def _ratios(pruner: Any, weights: Mapping[str, tuple[Entry, int]], request: NativeRequest) -> dict[str, float]:
    """Ratio of each group that is to be pruned, by its master; of several that its layers ask for, the first."""
    ratios = {}
    for collection in pruner.collections:
        paths = _members(collection, weights)
        if collection.master_name in pruner.skip_vars or any(path in request.ignored for path in paths):
            continue
        if not request.layer_ratios:
            ratios[collection.master_name] = request.ratio
        asked = [request.layer_ratios[path] for path in paths if path in request.layer_ratios]
        if asked:
            ratios[collection.master_name] = asked[0]
    return ratios


def _masks(model: Any, name: str, request: NativeRequest) -> NativeResult:
    options = dict(request.options)
    small = options.pop("prune_params_type", None)
    if small not in (None, "conv1x1_only"):
        raise BackendError(f"native: prune_params_type must be None or 'conv1x1_only', found {small!r}")
    weights = {
        key: entry
        for key, (entry, _) in _weights(model).items()
        if entry.path not in request.ignored and (small is None or entry.shape[2:] == (1, 1))
    }

    def skipped(layer: Any) -> set[str]:
        return {tensor.name for tensor in layer.parameters() if tensor.name not in weights}

    with _toolkit(name) as pruning:
        if name == "UnstructuredPruner":
            mode = options.pop("mode", "ratio")
            made = pruning.UnstructuredPruner(model, mode, ratio=request.ratio, skip_params_func=skipped, **options)
            made.step()
        else:
            configs = {**_GMP, **options.pop("configs", {})}
            made = pruning.GMPUnstructuredPruner(
                model, request.ratio, skip_params_func=skipped, configs=configs, **options
            )
            for _ in range((len(made.ratios_stack) + 2) * made.ratio_increment_period):
                made.step()
    masks = {entry.name: entry.canonical(copied(made.masks[key]).astype(bool)) for key, entry in weights.items()}
    if all(mask.all() for mask in masks.values()):
        raise ModelError(f"native: PaddleSlim's {name} masked nothing in {len(masks)} weights")
    return NativeResult({}, masks)


def native_sensitivity(
    model: Any,
    inputs: Sequence[Array],
    evaluate: Callable[[Any], float],
    ratios: Sequence[float],
    layers: Sequence[str],
) -> dict[str, dict[float, float]]:
    """PaddleSlim's sensitivities of a model: what pruning one group by L1 norm costs.

    Args:
        model: a copy; it is pruned and restored again and again.
        inputs: examples, for PaddleSlim's trace.
        evaluate: metric of a model, higher is better.
        ratios: of 0.1, 0.2, ... 0.9, the ones that PaddleSlim 2.6.0 knows.
        layers: paths of convolutions; only those that lead a group of PaddleSlim are in the result.

    Returns:
        path -> ratio -> (baseline - metric) / (baseline + 1e-3), PaddleSlim's relative loss.
    """
    known = [round(0.1 * tenth, 2) for tenth in range(1, 10)]
    unknown = [ratio for ratio in ratios if ratio not in known]
    if unknown:
        raise BackendError(
            f"native: PaddleSlim measures at {listed(map(str, known))}, not at {listed(map(str, unknown))}"
        )
    find_layers(model, layers, "native")
    _prepare(model)
    targets = {key: entry.path for key, (entry, _) in _weights(model).items() if entry.path in layers}
    with _toolkit("L1NormFilterPruner") as pruning, tempfile.NamedTemporaryFile() as status:
        pruner = pruning.L1NormFilterPruner(model, _examples(inputs))
        done = pruner._status.sensitivies
        for key in targets:  # what is there is not measured again
            done[key] = dict.fromkeys((ratio for ratio in known if ratio not in ratios), None)
        pruner._cal_sensitive(model, lambda: evaluate(model), status.name, list(targets), list(pruner.skip_vars))
    return {
        path: {ratio: float(done[key][ratio]) for ratio in ratios}
        for key, path in targets.items()
        if all(ratio in done[key] for ratio in ratios)
    }
