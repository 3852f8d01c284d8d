"""Attention on PyTorch: what it traces to, and what losing heads, groups and zeros does to layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from slimbridge.decisions import PruneDecision
from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Node
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import OptimizerSettings
from slimbridge.prune import zeroed
from slimbridge_torch import create

BACKEND = create()
TOKENS = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
WORDS = {"input", "constant", "linear", "reshape", "transpose", "split", "elementwise", "binary", "matmul", "softmax"}


class Run(nn.Module):
    """Runs a function on its layers and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes]


def of_kind(graph: Graph, kind: str) -> list[Node]:
    return [node for node in graph.nodes if node.kind == kind]


def test_multi_head_attention_is_linear_layers_products_and_a_softmax() -> None:
    for need_weights in (False, True):

        def forward(m: Any, x: Any, need_weights: bool = need_weights) -> Any:
            return m.att(x, x, x, need_weights=need_weights)[0]

        model = Run(forward, att=nn.MultiheadAttention(8, 2, batch_first=True))
        for train in (False, True):
            graph = BACKEND.trace(model.train(train), [TOKENS])
            assert graph.unknown_ops() == ()
            assert [dict(node.params) for node in of_kind(graph, "linear")] == [
                {"weight": "att.in_proj_weight", "bias": "att.in_proj_bias"},
                {"weight": "att.out_proj.weight", "bias": "att.out_proj.bias"},
            ]
            assert [node.attrs for node in of_kind(graph, "split")] == [{"axis": 0, "sizes": (1, 1, 1)}]
            assert [graph.shapes[node.outputs[0]][-2:] for node in of_kind(graph, "matmul")] == [(5, 5), (5, 4)]
            assert model.att.training is train


def test_an_encoder_layer_in_eval_mode_is_traced_by_its_parts() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    graph = BACKEND.trace(layer, [TOKENS])
    assert graph.unknown_ops() == ()
    assert [node.name for node in of_kind(graph, "linear")] == ["self_attn", "self_attn", "linear1", "linear2"]
    assert torch.backends.mha.get_fastpath_enabled() is before is True


def fused(m: Any, x: Any, **options: Any) -> Any:
    n, t, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return m.last(functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).reshape(n, t, -1))


def fused_model(forward: Callable[..., Any] = fused) -> Any:
    torch.manual_seed(0)
    return Run(forward, qkv=nn.Linear(8, 24), last=nn.Linear(8, 8), num_heads=2)


def written_views(m: Any, x: Any) -> Any:
    held = torch.zeros_like(x)
    held.view(-1)[:] = x.reshape(-1)  # only torch.export follows this
    return fused(m, held)


@pytest.mark.parametrize(
    "forward",
    [fused, lambda m, x: fused(m, x, is_causal=True), written_views,
     lambda m, x: fused(m, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.5)],
    ids=["plain", "causal", "through export", "masked"],
)  # fmt: skip
def test_fused_attention_is_products_with_the_heads_as_an_axis(forward: Any) -> None:
    graph = BACKEND.trace(fused_model(forward), [TOKENS])
    assert graph.unknown_ops() == ()
    products = [graph.shapes[node.outputs[0]] for node in of_kind(graph, "matmul")]
    assert products == [(2, 2, 5, 5), (2, 2, 5, 4)]
    assert [node.attrs["axis"] for node in of_kind(graph, "softmax")] == [3]


def test_window_attention_with_a_position_table_freezes_nothing_but_what_meets_it() -> None:
    def forward(m: Any, x: Any) -> Any:
        x = torch.roll(x, (-1, -1), (1, 2))
        x = x.view(1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        qkv = m.qkv(x).reshape(4, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * 0.5) @ k.transpose(-2, -1) + m.table[m.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        return m.last((logits.softmax(-1) @ v).transpose(1, 2).reshape(4, 4, 8))

    table, index = nn.Parameter(torch.zeros(9, 2)), torch.arange(16).view(4, 4) % 9
    model = Run(forward, qkv=nn.Linear(8, 24), last=nn.Linear(8, 8), table=table, index=index)
    graph = BACKEND.trace(model, [np.zeros((1, 4, 4, 8), np.float32)])
    assert graph.unknown_ops() == ("index in ''",)
    assert [node.attrs for node in of_kind(graph, "split")] == [{"axis": 0, "sizes": (1, 1, 1)}]
    assert [graph.shapes[node.inputs[0]] for node in of_kind(graph, "matmul")] == [(4, 2, 4, 4)] * 2
    (constant,) = [node for node in of_kind(graph, "constant") if node.params]
    assert constant.params == {"value": "table"}


def test_selecting_some_entries_stays_a_slice() -> None:
    graph = BACKEND.trace(Run(lambda m, x: m.a(x[:, 0] + x[:, 1]), a=nn.Linear(8, 2)), [TOKENS])
    assert len(of_kind(graph, "slice")) == 2
    assert "split" not in kinds(graph)
    graph = BACKEND.trace(Run(lambda m, x: m.a(x[:, 1] + x[:, 0] + x[:, 1]), a=nn.Linear(8, 2)), [TOKENS[:, :2]])
    assert "split" not in kinds(graph)  # an entry selected twice
    graph = BACKEND.trace(Run(lambda m, x: m.a(x[:, 1] - x[:, 0]), a=nn.Linear(8, 2)), [TOKENS[:, :2]])
    (split,) = of_kind(graph, "split")
    readers = [node.inputs[0] for node in of_kind(graph, "reshape")]
    assert readers == [split.outputs[1], split.outputs[0]]  # in the order of the axis, not of the reading


def test_slices_of_a_projection_are_not_taken_for_the_whole() -> None:
    """Queries of one tensor and keys of another cut the joint weight; that is no linear layer of the model."""
    model = Run(lambda m, x, y: m.att(x, y, y)[0], att=nn.MultiheadAttention(8, 2, batch_first=True))
    graph = BACKEND.trace(model, [TOKENS, TOKENS[:, :3]])
    assert graph.unknown_ops() == ()
    assert [node.params["weight"] for node in of_kind(graph, "linear")] == ["att.out_proj.weight"]
    assert {node.params["value"] for node in of_kind(graph, "constant")} == {"att.in_proj_weight", "att.in_proj_bias"}
    assert set(kinds(graph)) <= WORDS | {"expand", "reduce"}


def decision(model: Any, kept: dict[str, dict[int, tuple[int, ...]]], **more: Any) -> PruneDecision:
    sizes = {name: BACKEND.read(model)[name].shape for name in kept}
    return PruneDecision(importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes, **more)


def second_head(model: Any, **more: Any) -> PruneDecision:
    rows = tuple(block * 8 + row for block in range(3) for row in range(4, 8))
    kept = {"qkv.weight": {0: rows}, "qkv.bias": {0: rows}, "last.weight": {1: (4, 5, 6, 7)}}
    return decision(model, kept, **more)


def test_the_number_of_heads_follows_in_each_attribute_named_after_it() -> None:
    model = fused_model()
    model.head_dim, model.head_size, model.use_heads, model.blocks = 2, 2, True, 2
    model.n_head = model.head_width = model.channels_per_head = model.d_head = 2
    silent = BACKEND.write(BACKEND.clone(model), zeroed(BACKEND.read(model), second_head(model)))
    expected = BACKEND.ops.numpy(BACKEND.forward(silent, [TOKENS]).output)
    BACKEND.remove_channels(model, second_head(model, heads={"": (2, 1)}))
    assert (model.num_heads, model.n_head, model.head_dim, model.head_size, model.blocks) == (1, 1, 2, 2, 2)
    assert (model.use_heads, model.head_width, model.channels_per_head, model.d_head) == (True, 2, 2, 2)
    found = BACKEND.ops.numpy(BACKEND.forward(model, [TOKENS]).output)
    assert relative(found, expected) <= tolerance("removal").value


@pytest.mark.parametrize(
    ("heads", "message"),
    [({"": (3, 1)}, r"no attribute for its 3 attention heads.*found num_heads"), ({"x": (2, 1)}, r"no layer 'x'")],
)
def test_heads_that_no_attribute_counts_are_refused(heads: Any, message: str) -> None:
    model = fused_model()
    before = BACKEND.read(model)
    with pytest.raises(ModelError, match=message):
        BACKEND.remove_channels(model, second_head(model, heads=heads))
    assert all(np.array_equal(array, before[name]) for name, array in BACKEND.read(model).items())


@pytest.mark.parametrize("channels", [(0, 1, 2), (0,)])
def test_a_part_of_a_norms_group_is_refused(channels: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4))
    with pytest.raises(ModelError, match=r"'0' would keep \d channels, no whole number of its 2 groups of 2"):
        BACKEND.remove_channels(model, decision(model, {"0.weight": {0: channels}, "0.bias": {0: channels}}))
    assert (model[0].num_groups, model[0].num_channels) == (2, 4)


def test_attributes_of_norms_and_transposed_convolutions_follow() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ConvTranspose2d(4, 8, 2, groups=4), nn.GroupNorm(4, 8),
        nn.LayerNorm(8), nn.RMSNorm(8),
    )  # fmt: skip
    two = {0: (2, 3, 4, 5)}
    kept = {"0.weight": {0: (0, 1, 4, 5), 1: (1,)}, "0.bias": {0: (1, 3)}}
    kept |= {"1.weight": {0: (1, 2)}, "1.bias": two, "2.weight": two, "2.bias": two}
    kept |= {"3.weight": two, "3.bias": two, "4.weight": two}
    BACKEND.remove_channels(model, decision(model, kept))
    first, second, group, layer, rms = model
    assert (first.in_channels, first.out_channels, first.groups) == (4, 2, 2)
    assert (second.in_channels, second.out_channels, second.groups) == (2, 4, 2)
    assert (group.num_groups, group.num_channels) == (2, 4)
    assert (layer.normalized_shape, rms.normalized_shape) == ((4,), (4,))
    assert BACKEND.forward(model[:3], [np.zeros((1, 4, 3, 3), np.float32)]).output.shape == (1, 4, 5, 5)
    with pytest.raises(ModelError, match=r"'0' would keep 3 inputs in 2 groups"):
        BACKEND.remove_channels(model, decision(model, {"0.weight": {0: (0, 1, 2)}}))


def test_layers_name_the_kind_of_transposed_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1))
    assert [layer.kind for layer in BACKEND.layers(model)] == ["conv_transpose", "conv", "conv_transpose"]


def total(result: Any) -> Any:
    return {"sum": BACKEND.ops.sum(result.output)}


def test_held_zeros_are_zero_even_where_the_weight_is_not_finite() -> None:
    model = nn.Linear(3, 2)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    keep = np.array([[True, False, True], [False, True, True]])
    optimizer.hold_zeros({"weight": keep})
    keep[:] = True  # the caller's array is its own
    BACKEND.train_step(model, optimizer, [np.ones((4, 3), np.float32)], total)
    assert np.array_equal(BACKEND.read(model)["weight"] == 0, [[False, True, False], [True, False, False]])
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    model.zero_grad()
    optimizer.step()
    assert BACKEND.read(model)["weight"][0, 1] == 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"weigth": np.ones((2, 3), bool)}, r"'weigth' is no parameter \(did you mean 'weight'"),
        ({"weight": np.ones((3, 2), bool)}, r"'weight': bool of shape \(2, 3\) needed, found bool of shape \(3, 2\)"),
        ({"weight": np.ones((2, 3), int)}, r"found int64 of shape \(2, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_the_old_ones_stay(masks: Any, message: str) -> None:
    model = nn.Linear(3, 2)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    optimizer.hold_zeros({"weight": np.zeros((2, 3), bool)})
    with pytest.raises(ModelError, match=message):
        optimizer.hold_zeros(masks)
    BACKEND.train_step(model, optimizer, [np.ones((4, 3), np.float32)], total)
    assert not BACKEND.read(model)["weight"].any()
    optimizer.hold_zeros({"frozen": np.zeros(2, bool)})  # nothing steps it, so there is nothing to hold


def test_parameters_of_a_pass_are_those_of_the_model_tied_ones_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    found = BACKEND.forward(model, [np.zeros((2, 4), np.float32)]).parameters
    assert list(found) == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    assert len(found) == 5
    assert found["0.weight"] is model[1].weight
    assert "1.weight" not in found
