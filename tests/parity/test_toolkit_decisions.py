"""Under a preset our pruner takes the channels that PaddleSlim 2.6.0 and Torch-Pruning 1.6.1 take themselves.

Each toolkit traces, rates and cuts the model by itself (`Backend.native`); what it kept is compared with our decision
layer by layer. Where the two differ by intention a table or a test says how. Then: a toolkit's pruner as a stage of a
plan, and masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from torch.nn.utils import prune as torch_prune

from slimbridge.discovery import get_backend
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Backend, NativeRequest, NativeResult
from slimbridge.prune.pruner import Pruner
from slimbridge_paddle import _compat
from tests.parity.toolkit_models import (
    Joined,
    Kept,
    Net,
    native_mask,
    native_stage,
    of_paddle_vision,
    of_the_zoo,
    own_mask,
    prune,
    random_model,
    same_masks,
)

pytestmark = pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")

# PaddleSlim

L1, L2, FPGM = (f"paddleslim.{name}FilterPruner" for name in ("L1Norm", "L2Norm", "FPGM"))
IMPORTANCES = {L1: "l1_norm", L2: "l2_norm", FPGM: "fpgm"}

LAST_OF_MOBILENET_V2 = "its leaves: the mask that Dropout makes is read by nobody, so this counts as the last layer"
LINEAR = "prune_type 'conv': only weights with four axes lead a group"
LEFT: Mapping[str, Mapping[str, str]] = {
    "mobilenet_v2": {"features.18.0": LAST_OF_MOBILENET_V2},
    "vgg11": {"classifier.0": LINEAR, "classifier.3": LINEAR},
}
"""Model -> layers that we prune and PaddleSlim 2.6.0 leaves alone -> why it does. All other layers are compared."""


def assert_paddleslim_agrees(net: Net, name: str, pruner: str, ratio: float) -> None:
    theirs = net.theirs(pruner, ratio)
    left = LEFT.get(name, {})
    stage = {"preset": "paddleslim", "importance": IMPORTANCES[pruner], "pruning_ratio": ratio}
    assert set(net.ours(**stage)) - set(theirs) == {f"{layer}.weight" for layer in left}
    assert theirs == net.ours(**stage, ignored_layers=tuple(left))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_paddleslim_on_the_models_of_paddle_vision(name: str) -> None:
    assert_paddleslim_agrees(of_paddle_vision(name), name, L1, 0.4)


@pytest.mark.parametrize(("pruner", "ratio"), [(L1, 0.5), (L2, 0.4)])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "vgg11"])
def test_paddleslim_on_the_zoo(name: str, pruner: str, ratio: float) -> None:
    assert_paddleslim_agrees(of_the_zoo("paddle", name), name, pruner, ratio)


RESNETS = [("resnet18", L1, 0.5), ("resnet18", L2, 0.4), ("resnet18", FPGM, 0.4), ("resnet50", L1, 0.4)]


@pytest.mark.parametrize(("name", "pruner", "ratio"), RESNETS)
def test_paddleslim_where_layers_run_in_another_order_than_they_are_defined(
    name: str, pruner: str, ratio: float
) -> None:
    """The zoo's blocks run the shortcut's convolution first and define it last."""
    assert_paddleslim_agrees(of_the_zoo("paddle", name), name, pruner, ratio)


def masters(net: Net) -> dict[str, set[str]]:
    """PaddleSlim's groups: layer whose weight is rated -> layers that lose outputs with it."""
    copy = net.backend.clone(net.model)
    paths = {p.name: key.rpartition(".")[0] for key, p in copy.named_parameters() if p.ndim == 4}
    with _compat.paddleslim_pruning() as pruning:
        groups = list(pruning.L1NormFilterPruner(copy, [net.image]).collections)
    members = {paths[g.master_name]: [d for d in g.all_pruning_details() if d.axis == 0] for g in groups}
    return {master: {paths[d.name] for d in found if d.name in paths} for master, found in members.items()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_paddleslims_master_is_the_first_of_its_group_to_be_defined(name: str) -> None:
    net = of_the_zoo("paddle", name)
    order = [layer.path for layer in net.backend.layers(net.model)]
    found = masters(net)
    assert len(found) == len(net.units.groups()) - len(LEFT.get(name, {}))
    for master, members in found.items():
        assert master == min(members, key=order.index)


def test_paddleslim_prunes_the_last_convolution_where_no_dropout_follows_it() -> None:
    side = get_backend("paddle")
    net = Net.of(side, random_model(side, "mobilenet_v2", dropout=0.0), 32)
    assert net.theirs(L1, 0.4) == net.ours(preset="paddleslim", importance="l1_norm", pruning_ratio=0.4)


def test_paddleslim_does_not_prune_what_a_concat_joins() -> None:
    net = Net.of(get_backend("paddle"), Joined(), 8)
    stage = {"preset": "paddleslim", "pruning_ratio": 0.5}
    theirs = net.theirs(L1, 0.5)
    assert set(net.ours(**stage)) - set(theirs) == {"left.weight", "right.weight"}
    assert theirs == net.ours(**stage, ignored_layers=("left", "right"))


# Torch-Pruning

ZOO = ("resnet18_small", "resnet50_small", "mobilenet_v1_small", "mobilenet_v2_small", "vgg11_small")
ENGINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("magnitude", {"p": 1}, "l1_norm"),
    ("magnitude", {"p": 2}, "l2_norm"),
    ("fpgm", {}, "fpgm"),
    ("bn_scale", {}, "bn_scale"),
    ("lamp", {}, "lamp"),
    ("group_norm", {}, "l2_norm"),
)


@pytest.mark.parametrize(("selection", "ratio"), [("local", 0.4), ("global", 0.5)])
@pytest.mark.parametrize(("engine", "options", "importance"), ENGINES, ids=lambda item: str(item).strip("{}"))
@pytest.mark.parametrize("name", ZOO)
def test_torch_pruning(
    name: str, engine: str, options: dict[str, Any], importance: str, selection: str, ratio: float
) -> None:
    net = of_the_zoo("torch", name)
    theirs = net.theirs(f"torch_pruning.{engine}", ratio, **options, global_pruning=selection == "global")
    stage = {"preset": "torch_pruning", "importance": importance, "selection": selection, "pruning_ratio": ratio}
    assert theirs == net.ours(**stage)


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_torch_pruning_on_large_nets_and_through_a_flatten(name: str, selection: str) -> None:
    net = of_the_zoo("torch", name)
    theirs = net.theirs("torch_pruning.magnitude", 0.5, global_pruning=selection == "global")
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "selection": selection, "pruning_ratio": 0.5}
    assert theirs == net.ours(**stage)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"isomorphic": True, "global_pruning": True}, {"selection": "isomorphic"}),
        ({"group_reduction": "sum"}, {"group_reduction": "sum"}),
        ({"group_reduction": "max", "global_pruning": True}, {"group_reduction": "max", "selection": "global"}),
        ({"group_reduction": "first"}, {"group_reduction": "master"}),
        ({"normalizer": "gaussian", "global_pruning": True}, {"normalisation": "gaussian", "selection": "global"}),
    ],
    ids=lambda item: "-".join(map(str, item.values())),
)
def test_torch_prunings_options(options: dict[str, Any], words: dict[str, Any]) -> None:
    """On a residual net; elsewhere "first" may mean the norm of a depthwise convolution, by their trace."""
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, **options)
    assert theirs == net.ours(preset="torch_pruning", importance="l2_norm", pruning_ratio=0.5, **words)


def test_without_the_preset_the_choice_is_another() -> None:
    """So that the tests above say something."""
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, p=1)
    assert set(theirs) == set(net.ours(importance="l1_norm", pruning_ratio=0.5))
    assert theirs != net.ours(importance="l1_norm", pruning_ratio=0.5)


def test_multiples_are_rounded_down_by_torch_pruning_and_up_by_us() -> None:
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.3, round_to=4)
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "pruning_ratio": 0.3}
    plain, ours = net.ours(**stage), net.ours(**stage, round_to=4)
    widths = {name: net.weights[name].shape[0] for name in theirs}
    for name, width in widths.items():
        assert len(theirs[name]) == len(plain[name]) // 4 * 4
        assert len(ours.get(name, range(width))) == -(-len(plain[name]) // 4) * 4


def test_isomorphic_groups_of_torch_pruning_count_the_pools_between_layers() -> None:
    """Ours do not: a pool has no weights. By their classes the global choice of each class is again ours."""
    net = of_the_zoo("torch", "vgg11_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, isomorphic=True, global_pruning=True)
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "pruning_ratio": 0.5}
    assert theirs != net.ours(**stage, selection="isomorphic")
    paths = [f"features.{index}" for index in (0, 3, 7, 10, 14, 17, 21, 24)]
    for alike in (paths[0:7:2], paths[1:7:2], paths[7:]):
        others = tuple(path for path in paths if path not in alike)
        chosen = net.ours(**stage, selection="global", ignored_layers=others)
        assert chosen == {f"{path}.weight": theirs[f"{path}.weight"] for path in alike}


def test_a_group_that_would_lose_all_keeps_all_in_torch_pruning_and_one_with_us() -> None:
    """Without normalisation the narrow layers in front are the least important."""
    net = of_the_zoo("torch", "vgg11_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, normalizer=None, global_pruning=True)
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "normalisation": "none", "selection": "global"}
    ours = net.ours(**stage, pruning_ratio=0.5)
    assert "features.0.weight" not in theirs and len(ours["features.0.weight"]) == 1


# A toolkit's pruner as a stage of a plan


@pytest.mark.parametrize(
    ("backend", "name", "pruner", "words"),
    [
        ("paddle", "mobilenet_v1", L1, {"preset": "paddleslim"}),
        ("paddle", "mobilenet_v1", L2, {"preset": "paddleslim", "importance": "l2_norm"}),
        ("torch", "resnet18_small", "torch_pruning.magnitude", {"preset": "torch_pruning", "importance": "l2_norm"}),
        (
            "torch",
            "mobilenet_v2_small",
            "torch_pruning.bn_scale",
            {"preset": "torch_pruning", "importance": "bn_scale"},
        ),
    ],
)
def test_the_stage_gives_the_decision_of_the_preset_and_passes_the_proof(
    backend: str, name: str, pruner: str, words: dict[str, Any]
) -> None:
    net = of_the_zoo(backend, name)
    pruned, decision = prune(net, native_stage(pruner))
    own = net.decision(pruning_ratio=0.5, **words)
    assert decision.model_copy(update={"importance": own.importance}) == own
    assert decision.importance == pruner and decision.pruning_ratio == 0.5 and decision.exact
    after = net.backend.read(pruned)
    for key, axes in decision.kept.items():
        assert all(after[key].shape[axis] == len(kept) for axis, kept in axes.items())
    assert all(np.array_equal(array, net.weights[key]) for key, array in net.backend.read(net.model).items())
    result = net.backend.native(net.model, NativeRequest(pruner, 0.5), [net.image])
    output = net.backend.ops.numpy(net.backend.forward(pruned, [net.image]).output)
    assert result.output is not None and relative(result.output[0], output) <= tolerance("forward").value


def test_options_layer_ratios_and_ignored_layers_reach_the_toolkit() -> None:
    net = of_the_zoo("torch", "resnet18_small")
    own: dict[str, Any] = {"layer_ratios": {"layer3.?.conv1": 0.25}, "ignored_layers": ("layer4.*",)}
    stage = native_stage("torch_pruning.magnitude", options={"p": 1}, **own)
    _, decision = prune(net, stage)
    removed = {group.layers: len(group.removed) / group.channels for group in decision.groups}
    assert removed["layer3.0.conv1",] == removed["layer3.1.conv1",] == 0.25
    assert removed["layer4.0.conv1",] == 0 and removed["layer2.0.conv1",] == 0.5
    words = {"preset": "torch_pruning", "importance": "l1_norm", "pruning_ratio": 0.5}
    assert decision.kept == net.decision(**words, **own).kept


@pytest.mark.parametrize(
    ("backend", "name", "stage", "error", "text"),
    [
        ("paddle", "vgg11", native_stage("paddleslim.L3Norm"), BackendError, "unknown pruner 'paddleslim.L3Norm'"),
        ("torch", "vgg11_small", native_stage(L1), BackendError, f"unknown pruner '{L1}'; torch has: torch_pr"),
        ("torch", "vgg11_small", native_stage("torch_pruning.magnitud"), BackendError, "did you mean 'torch_pr"),
        ("torch", "vgg11_small", native_stage("torch.l1_unstructured"), ModelError, "masks entries, .* kind: sparsify"),
        ("paddle", "vgg11", native_stage("paddleslim.UnstructuredPruner"), ModelError, "masks entries, .* sparsify"),
        ("paddle", "vgg11", native_stage(L1, layer_ratios={"classifier.0": 0.5}), ModelError, "removed nothing"),
        ("torch", "vgg11_small", native_stage("torch_pruning.fpgm", ignored_layers=("*",)), ModelError, "removed no"),
        ("torch", "vgg11_small", native_stage("torch_pruning.fpgm", ignored_layers=("x*",)), ModelError, "'x\\*'"),
        (
            "torch", "vgg11_small", native_stage("torch_pruning.fpgm", options={"colour": 1}),
            BackendError, "has no option 'colour'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(backend: str, name: str, stage: PruneStage, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        prune(of_the_zoo(backend, name), stage)


def test_a_model_that_paddleslim_breaks_is_refused() -> None:
    with pytest.raises(ModelError, match="the model that L1NormFilterPruner pruned does not run"):
        prune(Net.of(get_backend("paddle"), Joined(mean=True), 8), native_stage(L1))


class Wrong:
    """A backend whose toolkit chooses what it is told to."""

    def __init__(self, backend: Backend, result: NativeResult) -> None:
        self.backend, self.result = backend, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def native(self, *_: Any) -> NativeResult:
        return self.result


@pytest.mark.parametrize(
    ("kept", "scale", "text"),
    [
        ({}, 1.0, "'torch_pruning.fpgm' removed nothing: 0 of 21 layers changed"),
        (
            {"conv1.weight": (0, 1)},
            1.0,
            "left layer 'layer1.0.conv2' with 8 channels, those tied to it have 2: ",
        ),
        ({"fc.weight": (0, 1)}, 1.0, "removed channels that must stay, of fc: its channels are an output of the model"),
        ({"layer1.0.conv1.weight": (0, 1)}, 2.0, "left a model that computes something else: relative difference"),
        ({"layer1.0.conv1.weight": (0, 1)}, None, "left a model whose outputs have other shapes"),
    ],
)
def test_a_choice_that_breaks_the_model_is_refused(kept: Kept, scale: float | None, text: str) -> None:
    net = of_the_zoo("torch", "resnet18_small")
    output = net.backend.ops.numpy(net.backend.forward(net.model, [net.image]).output)
    changed = (output[:, :3] if scale is None else scale * output,)
    wrong: Any = Wrong(net.backend, NativeResult(kept, {}, changed))
    with pytest.raises(ModelError, match=text):
        Pruner(native_stage("torch_pruning.fpgm")).prune(wrong, net.model, [net.image])


# Masks

UNSTRUCTURED = "paddleslim.UnstructuredPruner"
MASKED = ("resnet18_small", "mobilenet_v2_small")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    ("pruner", "arguments", "words"),
    [
        ("l1_unstructured", {}, {}),
        ("ln_structured", {"n": 2, "dim": 0}, {"pattern": "filters", "importance_options": {"p": 2}}),
        ("ln_structured", {"n": 1, "dim": 0}, {"pattern": "filters"}),
    ],
)
def test_torchs_masks(name: str, pruner: str, arguments: dict[str, Any], words: dict[str, Any]) -> None:
    net = of_the_zoo("torch", name)
    copy = net.backend.clone(net.model)
    found = native_mask(net, f"torch.{pruner}", 0.4, **arguments)
    modules = dict(copy.named_modules())
    for key in found:
        getattr(torch_prune, pruner)(modules[key.removesuffix(".weight")], "weight", amount=0.4, **arguments)
    expected = {key: modules[key.removesuffix(".weight")].weight_mask.numpy() == 1 for key in found}
    assert same_masks(found, expected)
    ours = own_mask(net, sparsity=0.4, **words)
    if "pattern" in words:  # torch masks classes too, as if they were filters
        last = list(expected)[-1]
        assert expected.keys() - ours.keys() == {last}
        del expected[last]
    assert same_masks(ours, expected)


def weight_sizes(net: Net) -> dict[str, int]:
    params = [layer.params["weight"] for layer in net.backend.layers(net.model) if layer.kind in ("conv", "linear")]
    return {name: net.weights[name].size for name in params}


@pytest.mark.parametrize("name", MASKED)
def test_paddleslims_masks_keep_one_entry_more(name: str) -> None:
    """Its threshold is the magnitude of the last of round(n * ratio) entries, and what equals it stays.

    With `local_sparsity` each layer is cut by itself, else all are together.
    """
    net = of_the_zoo("paddle", name)
    sizes = weight_sizes(net)
    every = sum(sizes.values())
    together = native_mask(net, UNSTRUCTURED, 0.4)
    assert sum(int((~mask).sum()) for mask in together.values()) == round(0.4 * every) - 1
    assert same_masks(together, own_mask(net, sparsity=(round(0.4 * every) - 1) / every, selection="global"))
    alone = native_mask(net, UNSTRUCTURED, 0.4, local_sparsity=True)
    shares = {name.removesuffix(".weight"): (round(0.4 * size) - 1) / size for name, size in sizes.items()}
    assert same_masks(alone, own_mask(net, layer_sparsity=shares))
    assert not same_masks(alone, own_mask(net, sparsity=0.4))


def test_paddleslims_blocks_cancel_where_ours_do_not() -> None:
    """Its importance of a block is the magnitude of the mean; a block spans the whole kernel, and axes as they lie."""
    net = Net.of(get_backend("paddle"), Joined(), 8)
    request = NativeRequest(UNSTRUCTURED, 0.5, options={"local_sparsity": True, "sparse_block": [2, 1]})
    found = net.backend.native(net.model, request, [net.image]).masks
    weight = net.weights["behind.weight"].astype(np.float64)
    blocks = np.abs(weight.reshape(4, 2, 10, 9).mean((1, 3)))
    entries = np.broadcast_to(np.repeat(blocks, 2, axis=0)[:, :, None, None], weight.shape)
    expected = entries >= np.sort(entries.ravel())[weight.size // 2 - 1]
    assert np.array_equal(found["behind.weight"], expected)
    assert not same_masks(found, own_mask(net, sparsity=0.5, pattern="block", block=(2, 9)))


def test_a_mask_stage_refuses_what_it_cannot_take() -> None:
    torch_net, paddle_net = of_the_zoo("torch", "vgg11_small"), of_the_zoo("paddle", "vgg11")
    with pytest.raises(ModelError, match="removes channels, it masks nothing; use kind: prune"):
        native_mask(torch_net, "torch_pruning.magnitude", 0.5)
    with pytest.raises(ModelError, match="masked no entry at ratio"):
        native_mask(torch_net, "torch.l1_unstructured", 1e-6)
    with pytest.raises(ModelError, match="masked nothing in"):
        native_mask(paddle_net, UNSTRUCTURED, 1e-9)
    with pytest.raises(BackendError, match=r"unknown pruner 'paddleslim.Unstructured'"):
        native_mask(paddle_net, "paddleslim.Unstructured", 0.5)
