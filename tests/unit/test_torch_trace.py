"""The PyTorch tracer: what a module becomes in the neutral graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Node
from slimbridge_torch import create

BACKEND = create()


class Net(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def graph_of(model: nn.Module, *shapes: tuple[int, ...]) -> Graph:
    graph = BACKEND.trace(model, [np.zeros(shape, np.float32) for shape in shapes])
    made: set[int] = set()
    for node in graph.nodes:
        assert made.issuperset(node.inputs), f"{node} reads what no earlier node made"
        made.update(node.outputs)
    assert made.issuperset(graph.outputs)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes]


def one(graph: Graph, kind: str) -> Node:
    found = [node for node in graph.nodes if node.kind == kind]
    assert len(found) == 1, kinds(graph)
    return found[0]


IMAGE = (2, 4, 8, 8)


def test_a_residual_block_with_in_place_operations() -> None:
    def run(m: Any, x: Any) -> Any:
        y = m.act(m.bn(m.conv(x)))
        y += x
        return m.fc(m.act(y).mean((2, 3)))

    model = Net(run, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4), act=nn.ReLU(True), fc=nn.Linear(4, 3))
    graph = graph_of(model, IMAGE)
    assert kinds(graph) == ["input", "conv", "batch_norm", "elementwise", "binary", "elementwise", "reduce", "linear"]
    entry, conv, norm, act, add, act2, mean, fc = graph.nodes
    assert conv.params == {"weight": "conv.weight", "bias": "conv.bias"}
    assert conv.attrs == {
        "groups": 1, "transposed": False, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)
    }  # fmt: skip
    assert norm.params == {role: f"bn.{role}" for role in ("weight", "bias", "running_mean", "running_var")}
    assert (act.attrs["op"], add.attrs["op"], act2.attrs["op"]) == ("relu", "add", "relu")
    assert [node.name for node in (conv, norm, act, add, fc)] == ["conv", "bn", "act", "", "fc"]
    assert set(add.inputs) == {*entry.outputs, *act.outputs}
    assert mean.attrs == {"op": "mean", "axes": (2, 3), "keepdims": False}
    assert fc.params == {"weight": "fc.weight", "bias": "fc.bias"}
    assert graph.outputs == fc.outputs
    assert graph.shapes[fc.outputs[0]] == (2, 3)
    assert graph.parameters == {name: array.shape for name, array in BACKEND.read(model).items()}


def test_concatenation_and_splitting() -> None:
    def run(m: Any, x: Any) -> Any:
        left, right = m.a(x).split([1, 3], dim=1)
        return torch.cat([right, m.b(x), left], dim=-3)

    graph = graph_of(Net(run, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1)), IMAGE)
    assert one(graph, "split").attrs == {"axis": 1, "sizes": (1, 3)}
    assert one(graph, "concat").attrs == {"axis": 1}
    left, right = one(graph, "split").outputs
    assert one(graph, "concat").inputs[0] == right
    assert one(graph, "concat").inputs[2] == left


def test_depthwise_grouped_and_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ConvTranspose2d(6, 2, 2)
    )
    graph = graph_of(model, IMAGE)
    depthwise, grouped, transposed = graph.layer_nodes()
    assert (depthwise.attrs["groups"], grouped.attrs["groups"]) == (4, 2)
    assert grouped.attrs["stride"] == (2, 2)
    assert [node.attrs["transposed"] for node in graph.layer_nodes()] == [False, False, True]
    assert "output_padding" not in transposed.attrs


def test_a_transposed_convolution_with_output_padding() -> None:
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    graph = graph_of(model, IMAGE)
    assert one(graph, "conv").attrs == {
        "groups": 2, "transposed": True, "stride": (2, 2), "padding": (1, 1), "dilation": (2, 2),
        "output_padding": (1, 1),
    }  # fmt: skip
    assert graph.parameters["weight"] == (4, 3, 3, 3)
    assert graph.unknown_ops() == ()


def shuffle_by_views(m: Any, x: Any) -> Any:
    return m.conv(x.view(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8))


def shuffle_by_operation(m: Any, x: Any) -> Any:
    return m.conv(functional.channel_shuffle(x, 2))


@pytest.mark.parametrize("run", [shuffle_by_views, shuffle_by_operation])
def test_channel_shuffle(run: Callable[..., Any]) -> None:
    graph = graph_of(Net(run, conv=nn.Conv2d(4, 4, 1)), IMAGE)
    assert kinds(graph) == ["input", "reshape", "transpose", "reshape", "conv"]
    assert one(graph, "transpose").attrs["perm"][:3] == (0, 2, 1)


def replay(graph: Graph, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run a graph that only moves data, in NumPy."""
    values = {graph.inputs[0]: x}
    for node in graph.nodes[1:]:
        source = values[node.inputs[0]] if node.inputs else None
        shape = graph.shapes[node.outputs[0]]
        attrs = node.attrs
        if node.kind == "split":
            cuts = np.cumsum(attrs["sizes"])[:-1]
            for value, piece in zip(node.outputs, np.split(source, cuts, attrs["axis"]), strict=True):
                values[value] = piece
            continue
        index = [slice(None)] * len(shape)
        if node.kind == "slice":
            index[attrs["axis"]] = slice(attrs["start"], attrs["stop"], attrs["step"])
        values[node.outputs[0]] = {
            "reshape": lambda s=source, z=shape: s.reshape(z),
            "transpose": lambda s=source, a=attrs: s.transpose(a["perm"]),
            "expand": lambda s=source, z=shape: np.broadcast_to(s, z),
            "slice": lambda s=source, i=index: s[tuple(i)],
            "concat": lambda n=node: np.concatenate([values[i] for i in n.inputs], n.attrs["axis"]),
            "pad": lambda s=source, a=attrs: np.pad(s, a["pads"]),
        }[node.kind]()
        assert values[node.outputs[0]].shape == shape
    return values[graph.outputs[0]]


def overwrite_channels(x: Any) -> Any:
    y = x.clone()
    y[:, 1:3] = x[:, :2]
    y[:, 0] = x[:, 3]
    return y


MOVES = {
    "pixel_shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: functional.channel_shuffle(x, 2),
    "roll": lambda x: torch.roll(x, (1, -2), (2, -1)),
    "stack": lambda x: torch.stack([x, x], -1),
    "unbind": lambda x: torch.cat(x.unbind(1), 1),
    "select": lambda x: x[:, -1],
    "slice": lambda x: x[:, -3:, 1::2],
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "repeat": lambda x: x.repeat(2, 1, 1, 3),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "pad": lambda x: functional.pad(x, (1, 0, 2, 3)),
    "circular": lambda x: functional.pad(x, (1, 2, 0, 1), mode="circular"),
    "flatten": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).mT,
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1)[None],
    "overwrite": overwrite_channels,
}


@pytest.mark.parametrize("name", MOVES)
def test_data_movement_means_the_same_in_numpy(name: str) -> None:
    """The recorded nodes, run in NumPy on distinct numbers, put each number where torch puts it."""
    x = np.arange(256, dtype=np.float32).reshape(2, 4, 4, 8)
    move = MOVES[name]
    graph = BACKEND.trace(Net(lambda m, y: move(y)), [x])
    np.testing.assert_array_equal(replay(graph, x), move(torch.tensor(x)).numpy())


def test_shared_layers_and_tied_weights_have_one_name() -> None:
    def run(m: Any, x: Any) -> Any:
        return m.head(m.body(m.body(x)))

    model = Net(run, body=nn.Linear(4, 4), head=nn.Linear(4, 4, bias=False))
    model.head.weight = model.body.weight
    graph = graph_of(model, (2, 4))
    first, second, head = graph.layer_nodes()
    assert first.params == second.params == {"weight": "body.weight", "bias": "body.bias"}
    assert head.params == {"weight": "body.weight"}
    assert list(graph.parameters) == ["body.weight", "body.bias"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_a_linear_layer_on_three_axes_is_one_node(bias: bool, swap: bool) -> None:
    model = Net(lambda m, x: m.fc(x.transpose(1, 2) if swap else x), fc=nn.Linear(4, 5, bias=bias))
    graph = graph_of(model, (2, 4, 3) if swap else (2, 3, 4))
    linear = one(graph, "linear")
    assert kinds(graph) == ["input", *(["transpose"] if swap else []), "linear"]
    assert dict(linear.params) == {"weight": "fc.weight", **({"bias": "fc.bias"} if bias else {})}
    assert graph.shapes[linear.outputs[0]] == (2, 3, 5)


def test_attention_is_made_of_known_operations() -> None:
    graph = graph_of(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8))
    assert graph.unknown_ops() == ()
    assert kinds(graph).count("matmul") == 2
    assert [node.params["weight"] for node in graph.layer_nodes()] == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    ]  # fmt: skip


def test_normalisation_pooling_and_resizing() -> None:
    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.Softmax(1),
        nn.LayerNorm([4, 4]), nn.Hardtanh(0, 6), nn.PReLU(4), nn.AdaptiveMaxPool2d(2), nn.Dropout(), nn.ZeroPad2d(1),
    )  # fmt: skip
    graph = graph_of(model, IMAGE)
    assert kinds(graph) == [
        "input", "group_norm", "pool", "pool", "resize", "softmax", "layer_norm", "elementwise", "constant", "reshape",
        "binary", "pool", "pad",
    ]  # fmt: skip
    assert graph.nodes[1].attrs["groups"] == 2
    assert one(graph, "layer_norm").attrs["axes"] == (2, 3)
    assert one(graph, "elementwise").attrs["op"] == "relu6"
    assert one(graph, "constant").params == {"value": "7.weight"}
    assert one(graph, "pad").attrs["pads"] == ((0, 0), (0, 0), (1, 1), (1, 1))


def test_an_unknown_operation_lists_all_its_tensors() -> None:
    def run(m: Any, x: Any) -> Any:
        return m.conv(torch.cumsum(x, 1)), functional.max_pool2d(x, 2, return_indices=True)[1]

    graph = graph_of(Net(run, conv=nn.Conv2d(4, 4, 1)), IMAGE)
    assert graph.unknown_ops() == ("cumsum in ''", "max_pool2d_with_indices (further output) in ''")
    unknown = next(node for node in graph.nodes if node.kind == "unknown")
    assert unknown.inputs == graph.inputs


def test_buffers_attributes_and_literals_become_constants() -> None:
    def run(m: Any, x: Any) -> Any:
        return (x + m.table) * m.plain + torch.arange(8)

    model = Net(run)
    model.register_buffer("table", torch.ones(4, 1, 1))
    model.plain = torch.ones(8)
    graph = graph_of(model, IMAGE)
    constants = [node.params for node in graph.nodes if node.kind == "constant"]
    assert constants == [{"value": "table"}, {}, {}]


def test_a_computed_weight_is_unknown_not_wrong() -> None:
    model = Net(lambda m, x: functional.conv2d(x, m.conv.weight * 2), conv=nn.Conv2d(4, 4, 1))
    assert graph_of(model, IMAGE).unknown_ops() == ("convolution in ''",)


def write_through_a_view(m: Any, x: Any) -> Any:
    y = m.conv(x)
    y[:, :2] = 0
    return m.fc(y.relu_().mean((2, 3)))


def test_a_write_through_a_view_is_followed_by_export() -> None:
    model = Net(write_through_a_view, conv=nn.Conv2d(4, 4, 1), fc=nn.Linear(4, 2))
    graph = graph_of(model, IMAGE)
    assert kinds(graph) == [
        "input", "conv", "slice", "constant", "slice", "concat", "elementwise", "reduce", "linear"
    ]  # fmt: skip
    assert [node.name for node in graph.layer_nodes()] == ["conv", "fc"]


def test_a_view_whose_base_is_not_read_again_needs_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.export, "export")
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.ReLU(True), nn.Linear(256, 2))
    assert kinds(graph_of(model, IMAGE)) == ["input", "conv", "reshape", "elementwise", "linear"]


def test_export_and_dispatch_agree() -> None:
    def run(m: Any, x: Any, spoil: bool) -> Any:
        y = m.body(x)
        if spoil:
            mask = torch.zeros_like(x)
            mask[:, :1] = 1
        return m.head(torch.cat([y, x], 1).flatten(1))

    body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardswish(), nn.MaxPool2d(1))
    graphs = [
        graph_of(Net(lambda m, x, spoil=spoil: run(m, x, spoil), body=body, head=nn.Linear(640, 2)), IMAGE)
        for spoil in (False, True)
    ]
    described = [[(n.kind, n.name, dict(n.params), dict(n.attrs)) for n in graph.nodes] for graph in graphs]
    assert described[0] == described[1]


@pytest.mark.parametrize("as_dict", [True, False])
def test_several_inputs_and_nested_outputs(as_dict: bool) -> None:
    def run(m: Any, x: Any, y: Any) -> Any:
        both = m.fc(x) + y
        return {"sum": both, "parts": [x, {"y": y}], "note": "text"} if as_dict else (both, (x, y), None)

    graph = graph_of(Net(run, fc=nn.Linear(4, 4)), (2, 4), (2, 4))
    assert graph.outputs == (one(graph, "binary").outputs[0], *graph.inputs)


def test_the_model_is_left_as_it_was() -> None:
    def run(m: Any, x: Any) -> Any:
        m.last = m.drop(m.bn(x))
        m.calls += 1
        return m.last

    model = Net(run, bn=nn.BatchNorm2d(4), drop=nn.Dropout())
    model.calls = torch.zeros(())
    model.drop.eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    graph_of(model, IMAGE)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is not None and id(after[name]) == key for name, (key, _) in before.items())
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())
    assert (model.training, model.bn.training, model.drop.training) == (True, True, False)
    assert not hasattr(model, "last")
    assert model.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_data_dependent_control_flow_is_refused_with_the_layer() -> None:
    inner = Net(lambda m, x: x if x.sum() > 0 else -x)
    with pytest.raises(ModelError, match="layer 'gate' looks at the data"):
        graph_of(Net(lambda m, x: m.gate(x), gate=inner), IMAGE)


def test_a_failing_forward_names_the_layer_and_restores() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1))
    with pytest.raises(ModelError, match=r"failed in layer '1': RuntimeError: ."):
        graph_of(model, IMAGE)
    assert model.training
    assert model[1].weight.device.type == "cpu"
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_an_output_that_cannot_hold_tensors_is_refused() -> None:
    with pytest.raises(ModelError, match="returns a object"):
        graph_of(Net(lambda m, x: object()), IMAGE)


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases call it deprecated
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ModelError, match="TorchScript"):
        graph_of(scripted, (1, 2))


# What a trace must leave alone


def test_a_torchscript_layer_is_refused_and_the_model_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), scripted, nn.Flatten(), nn.Linear(256, 2))
    x = torch.ones(1, 4, 8, 8)
    expected = model(x).detach()
    with pytest.raises(ModelError, match="layer '1' is a TorchScript module"):
        graph_of(model, IMAGE)
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    assert all(module.training for module in model.modules())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("fails", [KeyboardInterrupt, ZeroDivisionError, OSError, None])
def test_the_model_is_kept_whatever_the_forward_does_to_it(fails: type[BaseException] | None) -> None:
    def run(m: Any, x: Any) -> Any:
        y = m.conv(x)
        m.cache["y"] = y
        m.seen.append(y)
        m.extra = nn.Linear(2, 2)
        m.conv.weight = nn.Parameter(torch.zeros(4, 4, 1, 1))
        m.register_buffer("late", y)
        m.conv.register_forward_hook(lambda *_: None)
        if fails is not None:
            raise fails
        return y

    model = Net(run, conv=nn.Conv2d(4, 4, 1))
    model.cache, model.seen, first = {}, [], model.conv.weight
    if fails is None:
        graph_of(model, IMAGE)
    else:
        with pytest.raises(KeyboardInterrupt if fails is KeyboardInterrupt else ModelError):
            graph_of(model, IMAGE)
    assert (model.cache, model.seen) == ({}, [])
    assert model.conv.weight is first
    assert list(dict(model.named_modules())) == ["", "conv"]
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]
    assert not model.conv._forward_hooks
    assert model.training


@pytest.mark.parametrize("lazy", [True, False])
def test_a_model_without_data_is_refused(lazy: bool) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1) if lazy else nn.Conv2d(4, 4, 1, device="meta"))
    with pytest.raises(ModelError, match=r"^trace: '0.weight' (has no shape yet|is on the meta device)[^\n]*$"):
        graph_of(model, IMAGE)


# Written widths, padding, one-dimensional models


@pytest.mark.parametrize("shape", [(-1, 4), (2, 4)])
@pytest.mark.parametrize("back", [True, False])
def test_a_reshape_that_changes_nothing_is_recorded(shape: tuple[int, int], back: bool) -> None:
    def run(m: Any, x: Any) -> Any:
        y = m.fc(x.mean((2, 3)).view(shape))
        return y.reshape(-1, 5) if back else y

    graph = graph_of(Net(run, fc=nn.Linear(4, 5)), IMAGE)
    assert kinds(graph) == ["input", "reduce", "reshape", "linear", *(["reshape"] if back else [])]


def test_reshapes_around_a_linear_layer_are_the_models_own() -> None:
    model = Net(lambda m, x: m.fc(x.view(-1, 4)).view(2, 3, 5), fc=nn.Linear(4, 5))
    assert kinds(graph_of(model, (2, 3, 4))) == ["input", "reshape", "linear", "reshape"]


def test_matmul_records_no_reshape_that_the_model_does_not_have() -> None:
    graph = graph_of(Net(lambda m, x: x @ x.transpose(1, 2)), (2, 3, 4))
    assert kinds(graph) == ["input", "transpose", "matmul"]


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("pads", [(1, 2), (1, 2, 0, 1)])
def test_a_pad_tells_its_mode(mode: str, pads: tuple[int, ...]) -> None:
    shape = IMAGE if len(pads) == 4 else IMAGE[:3]
    graph = graph_of(Net(lambda m, x: functional.pad(x, pads, mode=mode)), shape)
    expected = ((0, 0), (0, 0), *((pads[2:], pads[:2]) if len(pads) == 4 else (pads,)))
    assert one(graph, "pad").attrs == {"pads": expected, "mode": mode}


def test_the_padding_of_a_convolution_tells_its_mode() -> None:
    graph = graph_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE)
    assert one(graph, "pad").attrs == {"pads": ((0, 0), (0, 0), (1, 1), (1, 1)), "mode": "reflect"}


@pytest.mark.parametrize(
    ("layer", "op"),
    [(nn.MaxPool1d(2), "max"), (nn.AdaptiveMaxPool1d(4), "max"), (nn.AvgPool1d(2), "avg")],
)
def test_pooling_over_one_axis_is_a_pool(layer: nn.Module, op: str) -> None:
    graph = graph_of(nn.Sequential(nn.Conv1d(4, 6, 1), layer, nn.Conv1d(6, 2, 1)), (2, 4, 8))
    assert kinds(graph) == ["input", "conv", "reshape", "pool", "reshape", "conv"]
    pool = one(graph, "pool")
    assert pool.attrs == {"op": op}
    assert graph.shapes[pool.outputs[0]] == (2, 6, 1, 4)


def test_a_further_output_is_recorded_when_it_meets_data() -> None:
    def run(m: Any, x: Any) -> Any:
        _, indices = functional.max_pool1d(x, 2, return_indices=True)
        return x[..., :4] * indices.squeeze()

    graph = graph_of(Net(run), (2, 4, 8))
    assert graph.unknown_ops() == ("max_pool2d_with_indices (further output) in ''",)
