"""Other toolkits' pruners on PyTorch, held to those toolkits themselves and to NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn.utils import prune

from slimbridge.conformance.topologies import TOPOLOGIES
from slimbridge.decisions import PruneDecision
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import NativeRequest, NativeResult
from slimbridge.prune import zeroed
from slimbridge_torch import create, native

BACKEND = create()
IMAGE = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
REMOVERS = tuple(name for name in native.engines() if name.startswith("torch_pruning."))
MASKERS = tuple(name for name in native.engines() if name.startswith("torch."))


def topology(name: str) -> Any:
    return next(item for item in TOPOLOGIES if item.name == name).build(BACKEND)


def ask(model: Any, pruner: str, ratio: float = 0.5, **more: Any) -> NativeResult:
    return BACKEND.native(model, NativeRequest(pruner, ratio, **more), [IMAGE])


def plain() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


def test_the_engines_are_listed_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKEND.capabilities().native_engines == (*REMOVERS, *MASKERS)
    assert len(REMOVERS) == 6
    assert len(MASKERS) == 4
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    assert BACKEND.capabilities().native_engines == MASKERS
    with pytest.raises(BackendError, match=r"needs the package torch-pruning, which is not installed"):
        ask(plain(), "torch_pruning.magnitude")


@pytest.mark.parametrize("name", ["residual", "channel shuffle", "concat and sum", "shared layer"])
@pytest.mark.parametrize("pruner", ["torch_pruning.magnitude", "torch_pruning.random"])
def test_what_stays_is_read_back_as_the_toolkit_left_it(name: str, pruner: str) -> None:
    """The kept filters' weights, looked up in the model, are those that the toolkit's own run leaves."""
    model = topology(name)
    before = BACKEND.read(model)
    BACKEND.seed(3)
    result = ask(model, pruner)
    copy = BACKEND.clone(model)
    BACKEND.seed(3)
    ignored = [module for path, module in copy.named_modules() if path == "fc"]
    importances = {"magnitude": "GroupMagnitudeImportance", "random": "RandomImportance"}
    importance = getattr(torch_pruning.importance, importances[pruner.split(".")[1]])()
    torch_pruning.pruner.MagnitudePruner(
        copy, torch.tensor(IMAGE), importance, pruning_ratio=0.5, ignored_layers=ignored,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    ).step()  # fmt: skip
    left = BACKEND.read(copy)
    for key, kept in result.kept.items():
        assert list(kept) == sorted(set(kept))
        assert len(kept) < before[key].shape[0]
        bias = key.replace("weight", "bias")
        if bias in before:
            assert np.array_equal(left[bias], before[bias][list(kept)])
    untouched = {key for key in before if key.endswith(".weight") and before[key].ndim > 1} - set(result.kept)
    assert all(left[key].shape[0] == before[key].shape[0] for key in untouched)
    copy.eval()
    expected = BACKEND.ops.numpy(BACKEND.forward(copy, [IMAGE]).output)
    assert result.output is not None
    assert np.array_equal(result.output[0], expected)
    after = BACKEND.read(model)
    assert all(np.array_equal(after[key], before[key]) for key in before)


def test_outputs_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    kept = ask(model, "torch_pruning.magnitude").kept
    assert {key: len(indices) for key, indices in kept.items()} == {"0.weight": 4, "1.weight": 3}


def test_a_removal_in_several_steps_is_put_together() -> None:
    model = plain()
    options = {"iterative_steps": 3, "p": 1}
    result = ask(model, "torch_pruning.magnitude", 0.75, options=options)
    assert {key: len(kept) for key, kept in result.kept.items()} == {"0.weight": 2, "2.weight": 3}
    silent = {
        "0.weight": {0: result.kept["0.weight"]}, "0.bias": {0: result.kept["0.weight"]},
        "2.weight": {0: result.kept["2.weight"]}, "2.bias": {0: result.kept["2.weight"]},
    }  # fmt: skip
    sizes = {name: BACKEND.read(model)[name].shape for name in silent}
    decision = PruneDecision(importance="x", pruning_ratio=0.75, groups=(), kept=silent, sizes=sizes)
    zeros = BACKEND.write(BACKEND.clone(model), zeroed(BACKEND.read(model), decision))
    expected = BACKEND.ops.numpy(BACKEND.forward(zeros, [IMAGE]).output)
    assert result.output is not None
    assert relative(result.output[0], expected) <= tolerance("removal").value


def test_magnitude_removes_the_filters_of_the_smallest_norm() -> None:
    """One convolution, rated alone: by hand from its weight, Torch-Pruning's L2 sum of squares."""
    model = plain()
    weight = BACKEND.read(model)["0.weight"].astype(np.float64)
    following = BACKEND.read(model)["2.weight"].astype(np.float64)
    rated = (np.square(weight).sum((1, 2, 3)) + np.square(following).sum((0, 2, 3))) / 2
    result = ask(model, "torch_pruning.magnitude", ignored=("2",))
    assert set(result.kept) == {"0.weight"}
    assert result.kept["0.weight"] == tuple(sorted(np.argsort(rated)[4:].tolist()))


def test_ratios_of_layers_and_ignored_layers() -> None:
    result = ask(plain(), "torch_pruning.magnitude", 0.5, layer_ratios={"2": 0.25})
    assert {key: len(kept) for key, kept in result.kept.items()} == {"0.weight": 4, "2.weight": 9}
    result = ask(plain(), "torch_pruning.magnitude", 0.5, ignored=("0",), options={"round_to": 4})
    assert {key: len(kept) for key, kept in result.kept.items()} == {"2.weight": 4}
    with pytest.raises(ModelError, match=r"native: the model has no layer '3x'"):
        ask(plain(), "torch_pruning.magnitude", ignored=("3x",))


def test_a_frozen_model_is_pruned_too() -> None:
    model = plain().requires_grad_(False)
    assert set(ask(model, "torch_pruning.magnitude").kept) == {"0.weight", "2.weight"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("pruner", native.engines())
def test_unknown_options_and_nothing_to_do(pruner: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=rf"{pruner} has no option 'colour'.*allowed: \w+"):
        ask(plain(), pruner, options={"colour": 1})
    with pytest.raises(ModelError, match=rf"{pruner} (removed no channel|masked no entry) at ratio 0.0"):
        ask(plain(), pruner, 0.0)
    assert capfd.readouterr() == ("", "")


def test_errors_of_the_toolkit_have_one_line() -> None:
    with pytest.raises(BackendError, match=r"unknown pruner 'torch_pruning.magnitud' \(did you mean .*; torch has: "):
        ask(plain(), "torch_pruning.magnitud")
    with pytest.raises(ModelError, match=r"^native: torch_pruning.magnitude failed: [^\n]+$"):
        ask(plain(), "torch_pruning.magnitude", options={"normalizer": "nothing"})
    with pytest.raises(ModelError, match=r"^native: torch_pruning.magnitude left a model that does not run: [^\n]+$"):
        ask(topology("equal split"), "torch_pruning.magnitude")


@pytest.mark.parametrize(
    ("pruner", "method"),
    [
        ("torch.l1_unstructured", prune.L1Unstructured(0.3)),
        ("torch.ln_structured", prune.LnStructured(0.3, 2, 0)),
    ],
)
def test_masks_are_those_of_the_toolkit(pruner: str, method: Any) -> None:
    model = plain()
    result = ask(model, pruner, 0.3)
    weights = BACKEND.read(model)
    assert set(result.masks) == {"0.weight", "2.weight", "5.weight"}
    for name, mask in result.masks.items():
        weight = torch.tensor(weights[name])
        expected = method.compute_mask(weight, torch.ones_like(weight)).numpy().astype(bool)
        assert mask.dtype == bool
        assert np.array_equal(mask, expected)
    assert result.kept == {}
    assert result.output is None
    assert not hasattr(model[0], "weight_mask")


def test_global_and_random_masks() -> None:
    model = plain()
    weights = BACKEND.read(model)
    masks = ask(model, "torch.global_unstructured", 0.4).masks
    sizes = np.concatenate([np.abs(weights[name]).ravel() for name in masks])
    gone = np.concatenate([~mask.ravel() for mask in masks.values()])
    assert gone.sum() == round(0.4 * sizes.size)
    assert sizes[gone].max() <= sizes[~gone].min()
    with pytest.raises(BackendError, match=r"takes one ratio for all layers"):
        ask(model, "torch.global_unstructured", layer_ratios={"0": 0.1})
    found = ask(model, "torch.random_unstructured", 0.5, layer_ratios={"2": 0.25}, ignored=("5",)).masks
    assert {name: int((~mask).sum()) / mask.size for name, mask in found.items()} == {"0.weight": 0.5, "2.weight": 0.25}


def test_structured_masks_of_a_transposed_convolution_take_whole_outputs() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1))
    masks = ask(model, "torch.ln_structured", options={"n": 1}).masks
    by_output = masks["0.weight"].swapaxes(0, 1).reshape(4, -1)
    assert sorted((by_output.all(1).sum(), (~by_output).all(1).sum())) == [2, 2]
    assert ask(model, "torch.ln_structured", options={"dim": 0}).masks["0.weight"].all((1, 2, 3)).any()


def test_tied_weights_are_masked_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    assert set(ask(model, "torch.l1_unstructured").masks) == {"0.weight"}
