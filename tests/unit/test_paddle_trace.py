"""The Paddle tracer: each topology gives the nodes that the neutral vocabulary has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.errors import ModelError  # noqa: E402
from slimbridge.graph import Graph  # noqa: E402

nn = paddle.nn
F = paddle.nn.functional
IMAGE = np.zeros((2, 4, 6, 6), np.float32)


@pytest.fixture(scope="module")
def backend() -> Any:
    return slimbridge_paddle.create()


def net(forward: Any, **layers: Any) -> Any:
    """A model with the given layers and forward(model, *inputs)."""

    class Net(nn.Layer):
        def forward(self, *inputs: Any) -> Any:
            return forward(self, *inputs)

    model = Net()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes]


def of(graph: Graph, kind: str) -> Any:
    """The only node of a kind."""
    (node,) = [node for node in graph.nodes if node.kind == kind]
    return node


def test_residual(backend: Any) -> None:
    model = net(lambda m, x: F.relu(m.bn(m.conv(x)) + x), conv=nn.Conv2D(4, 4, 3, padding=1), bn=nn.BatchNorm2D(4))
    graph = backend.trace(model, [IMAGE])
    assert kinds(graph) == ["input", "conv", "batch_norm", "binary", "elementwise"]
    conv, norm, add = graph.nodes[1:4]
    assert dict(conv.params) == {"weight": "conv.weight", "bias": "conv.bias"}
    assert dict(conv.attrs) == {
        "groups": 1, "transposed": False, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
    }  # fmt: skip
    assert dict(norm.params) == {role: f"bn.{role}" for role in ("weight", "bias", "running_mean", "running_var")}
    assert (conv.name, norm.name, add.name) == ("conv", "bn", "")
    assert add.inputs == (norm.outputs[0], graph.inputs[0])
    assert graph.shapes[graph.outputs[0]] == (2, 4, 6, 6)


def test_parameters_are_those_of_read(backend: Any) -> None:
    model = net(lambda m, x: m.fc(x.mean([2, 3])), fc=nn.Linear(4, 3), unused=nn.BatchNorm2D(5))
    expected = {name: array.shape for name, array in backend.read(model).items()}
    assert dict(backend.trace(model, [IMAGE]).parameters) == expected
    assert expected["fc.weight"] == (3, 4)


def test_concat(backend: Any) -> None:
    model = net(lambda m, x: paddle.concat([m.a(x), m.b(x)], axis=1), a=nn.Conv2D(4, 2, 1), b=nn.Conv2D(4, 3, 1))
    node = of(backend.trace(model, [IMAGE]), "concat")
    assert node.attrs["axis"] == 1 and len(node.inputs) == 2


@pytest.mark.parametrize(("groups", "outputs"), [(4, 4), (4, 8), (2, 6)])
def test_depthwise_and_grouped(backend: Any, groups: int, outputs: int) -> None:
    model = net(lambda m, x: m.conv(x), conv=nn.Conv2D(4, outputs, 3, stride=2, groups=groups, bias_attr=False))
    node = of(backend.trace(model, [IMAGE]), "conv")
    assert (node.attrs["groups"], node.attrs["stride"]) == (groups, (2, 2))
    assert dict(node.params) == {"weight": "conv.weight"}


def test_shuffle(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        return x.reshape([2, 2, 2, 6, 6]).transpose([0, 2, 1, 3, 4]).reshape([2, 4, 6, 6])

    graph = backend.trace(net(forward), [IMAGE])
    assert kinds(graph) == ["input", "reshape", "transpose", "reshape"]
    assert graph.nodes[2].attrs["perm"] == (0, 2, 1, 3, 4)
    assert kinds(backend.trace(net(lambda m, x: F.channel_shuffle(x, 2)), [IMAGE])) == kinds(graph)


def test_shared_layer_and_tied_weight(backend: Any) -> None:
    shared = nn.Conv2D(4, 4, 1)
    other = nn.Conv2D(4, 4, 1, bias_attr=False)
    other.weight = shared.weight
    model = net(lambda m, x: m.c(m.b(m.a(x))), a=shared, b=shared, c=other)
    graph = backend.trace(model, [IMAGE])
    assert [node.params["weight"] for node in graph.layer_nodes()] == ["a.weight"] * 3
    assert [node.name for node in graph.layer_nodes()] == ["a", "a", "c"]
    assert set(graph.parameters) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_linear_takes_its_bias(backend: Any, shape: tuple[int, ...]) -> None:
    model = net(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    graph = backend.trace(model, [np.zeros(shape, np.float32)])
    assert kinds(graph) == ["input", "linear"]
    assert dict(graph.nodes[1].params) == {"weight": "fc.weight", "bias": "fc.bias"}
    assert graph.shapes[graph.outputs[0]] == (*shape[:-1], 3)


def test_bias_stays_apart_when_the_sum_is_not_the_only_reader(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = paddle.matmul(x, m.fc.weight)
        return y + m.fc.bias, y

    graph = backend.trace(net(forward, fc=nn.Linear(4, 3)), [np.zeros((2, 4), np.float32)])
    assert kinds(graph) == ["input", "linear", "constant", "binary"]
    assert "bias" not in graph.nodes[1].params


def test_attention(backend: Any) -> None:
    model = net(lambda m, x: m.attention(x), attention=nn.MultiHeadAttention(4, 2))
    graph = backend.trace(model, [np.zeros((2, 3, 4), np.float32)])
    assert kinds(graph).count("linear") == 4 and kinds(graph).count("matmul") == 2
    assert not graph.unknown_ops()
    assert graph.layer_nodes()[0].name == "attention.q_proj"


def test_split_slice_pad_pool_resize_expand(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        a, b = paddle.split(x, [1, 3], axis=1)
        b = F.interpolate(F.pad(F.max_pool2d(b, 2), [1, 0, 2, 0]), scale_factor=2)[:, 0:3:2]
        return b, a.expand([2, 5, 6, 6]), F.softmax(x.sum([2, 3], keepdim=True), axis=1)

    graph = backend.trace(net(forward), [IMAGE])
    assert not graph.unknown_ops()
    assert of(graph, "split").attrs == {"axis": 1, "sizes": (1, 3)}
    assert of(graph, "slice").attrs == {"axis": 1, "start": 0, "stop": 3, "step": 2}
    assert of(graph, "pad").attrs["pads"][-2:] == ((2, 0), (1, 0))
    assert of(graph, "pool").attrs["op"] == "max"
    assert of(graph, "reduce").attrs == {"op": "sum", "axes": (2, 3), "keepdims": True}
    assert of(graph, "softmax").attrs["axis"] == 1
    assert [graph.shapes[output] for output in graph.outputs] == [(2, 2, 10, 8), (2, 5, 6, 6), (2, 4, 1, 1)]


def test_normalisations(backend: Any) -> None:
    model = net(lambda m, x: m.layer(m.group(x)), group=nn.GroupNorm(2, 4), layer=nn.LayerNorm([6, 6]))
    graph = backend.trace(model, [IMAGE])
    assert kinds(graph) == ["input", "group_norm", "layer_norm"]
    assert graph.nodes[1].attrs["groups"] == 2 and graph.nodes[2].attrs["axes"] == (2, 3)


def test_parameters_outside_layers_are_constants(backend: Any) -> None:
    model = net(lambda m, x: x * m.scale + m.shift)
    model.scale = model.create_parameter([4, 1, 1])
    model.register_buffer("shift", paddle.ones([4, 1, 1]))
    graph = backend.trace(model, [IMAGE])
    assert kinds(graph) == ["input", "constant", "binary", "constant", "binary"]
    assert [dict(node.params) for node in graph.nodes if node.kind == "constant"] == [
        {"value": "scale"}, {"value": "shift"},
    ]  # fmt: skip


class Warp(nn.Layer):
    """A convolution that reads its input at places that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.create_parameter([1, 4, 1, 1])

    def forward(self, x: Any) -> Any:
        """Reads each place itself."""
        return paddle.vision.ops.deform_conv2d(x, paddle.zeros([2, 2, 6, 6]), self.weight)


def test_unknown_operations_list_all_they_touch(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.flow(x) + paddle.cumsum(x, axis=1)[:, :1]

    graph = backend.trace(net(forward, flow=Warp()), [IMAGE])
    assert graph.unknown_ops() == ("deformable_conv in 'flow'", "cumsum in ''")
    first = next(node for node in graph.nodes if node.kind == "unknown")
    assert graph.inputs[0] in first.inputs and len(first.inputs) == 2  # the input and the weight


def test_channels_last_is_unknown(backend: Any) -> None:
    model = net(lambda m, x: m.conv(x), conv=nn.Conv2D(6, 2, 1, data_format="NHWC"))
    assert backend.trace(model, [IMAGE]).unknown_ops() == ("conv2d (NHWC) in 'conv'",)


def test_control_flow_freezes_what_it_captures(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return paddle.static.nn.cond(x.mean() > 0, lambda: y * 2, lambda: y + 1)

    graph = backend.trace(net(forward, conv=nn.Conv2D(4, 2, 1)), [IMAGE])
    conv, branch = of(graph, "conv"), of(graph, "unknown")
    assert branch.attrs["op"] == "if" and conv.outputs[0] in branch.inputs


class Branching(nn.Layer):
    """Python that depends on data: only the translation of the source can capture it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(4, 2, 1)

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        if y.mean() > 0:
            y = y * 2
        return y


def test_data_dependent_python_falls_back(backend: Any) -> None:
    graph = backend.trace(Branching(), [IMAGE])
    assert of(graph, "conv").outputs[0] in of(graph, "unknown").inputs
    assert of(graph, "conv").name == "conv"
    assert paddle.in_dynamic_mode()


def test_the_model_is_left_as_it_was(backend: Any) -> None:
    def forward(m: Any, x: Any) -> Any:
        m.last = m.conv(x)
        m.seen.append(m.last)
        return F.dropout(m.last, 0.5, training=m.training)

    model = net(forward, conv=nn.Conv2D(4, 2, 1))
    model.seen, model.last = [], None
    model.train()
    model.conv.eval()
    before = backend.read(model)
    backend.trace(model, [IMAGE])
    assert model.last is None and model.seen == []
    assert model.training and not model.conv.training
    assert not model.conv._forward_pre_hooks and not model.conv._forward_post_hooks
    after = backend.read(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_forward_that_fails_is_named_and_dynamic_mode_stays(backend: Any) -> None:
    model = net(lambda m, x: m.fc(x), fc=nn.Linear(5, 2))
    with pytest.raises(ModelError, match="trace: the forward pass cannot be captured"):
        backend.trace(model, [IMAGE])
    assert paddle.in_dynamic_mode()
    model = net(lambda m, x: m.conv(x), conv=nn.Conv2D(3, 2, 1))
    with pytest.raises(ModelError, match="'conv' takes 3 channels, its input has 4"):
        backend.trace(model, [IMAGE])
    with pytest.raises(ModelError, match="at least one example input"):
        backend.trace(model, [])


def test_nested_outputs_and_several_inputs(backend: Any) -> None:
    model = net(lambda m, x, y: {"sum": x + y, "parts": [x * 2, (y,)]})
    graph = backend.trace(model, [IMAGE, IMAGE])
    assert len(graph.inputs) == 2 and len(graph.outputs) == 3
    assert graph.outputs[2] == graph.inputs[1]


@dataclass
class Answer:
    """An output whose tensors nothing can find."""

    logits: Any


def test_an_output_of_another_type_is_named(backend: Any) -> None:
    model = net(lambda m, x: {"main": x * 2, "more": Answer(m.conv(x))}, conv=nn.Conv2D(4, 2, 1))
    for call in (backend.trace, backend.forward):
        with pytest.raises(ModelError, match="the model returns a Answer; allowed: tensors in lists, tuples and dicts"):
            call(model, [IMAGE])
    with pytest.raises(ModelError, match="the model returns no tensor"):
        backend.trace(net(lambda m, x: {"width": x.shape[1], "name": "n", "nothing": None}), [IMAGE])


def test_channels_last_normalisation_has_known_shapes(backend: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2D(6, 3, 1, data_format="NHWC"),
                bn=nn.BatchNorm2D(3, data_format="NHWC"))  # fmt: skip
    graph = backend.trace(model, [IMAGE])
    assert graph.unknown_ops() == ("conv2d (NHWC) in 'conv'", "batch_norm (NHWC) in 'bn'")
    assert all(size >= 0 for shape in graph.shapes.values() for size in shape)
    assert graph.shapes[graph.outputs[0]] == (2, 4, 6, 3)


def test_shapes_that_are_not_known_are_refused(backend: Any) -> None:
    for kernel, found in ((5, "0, 0"), (6, "-1, -1")):
        model = net(lambda m, x: m.second(m.first(x)), first=nn.Conv2D(4, 4, 3), second=nn.Conv2D(4, 4, kernel))
        with pytest.raises(ModelError, match=rf"'conv2d' in layer 'second' gives the shape \(2, 4, {found}\)"):
            backend.trace(model, [IMAGE])
    with pytest.raises(ModelError, match=r"'nonzero' in layer '' gives the shape \(-1, 4\)"):
        backend.trace(net(lambda m, x: paddle.nonzero(m.conv(x)), conv=nn.Conv2D(4, 2, 1)), [IMAGE])


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_says_its_mode(backend: Any, mode: str) -> None:
    graph = backend.trace(net(lambda m, x: F.pad(x, [1, 2, 0, 3], mode=mode)), [IMAGE])
    pad = of(graph, "pad")
    assert pad.attrs["mode"] == mode
    assert graph.shapes[graph.outputs[0]] == (2, 4, 9, 9)
    assert pad.attrs["pads"][-2:] == ((0, 3), (1, 2))


def test_padding_of_all_axes_is_constant(backend: Any) -> None:
    pad = of(backend.trace(net(lambda m, x: F.pad(x, [0, 0, 1, 2, 0, 0, 0, 0])), [IMAGE]), "pad")
    assert dict(pad.attrs) == {"pads": ((0, 0), (1, 2), (0, 0), (0, 0)), "mode": "constant"}


def test_repetition_is_a_concat_or_a_broadcast(backend: Any) -> None:
    graph = backend.trace(net(lambda m, x: paddle.tile(x[:, :, :1], [1, 3, 6, 1])), [IMAGE])
    assert kinds(graph) == ["input", "slice", "concat", "expand"]
    concat = of(graph, "concat")
    assert concat.attrs["axis"] == 1 and concat.inputs == (graph.nodes[1].outputs[0],) * 3
    assert graph.shapes[graph.outputs[0]] == (2, 12, 6, 6)


def test_where_meets_all_three(backend: Any) -> None:
    graph = backend.trace(net(lambda m, x: paddle.where(x > 0, x * 2, x)), [IMAGE])
    assert kinds(graph) == ["input", "elementwise", "elementwise", "binary", "binary"]
    first, second = graph.nodes[3:]
    assert first.inputs == (graph.nodes[1].outputs[0], graph.nodes[2].outputs[0])
    assert second.inputs == (first.outputs[0], graph.inputs[0])


def test_log_softmax_is_a_softmax(backend: Any) -> None:
    assert of(backend.trace(net(lambda m, x: F.log_softmax(x, -3)), [IMAGE]), "softmax").attrs["axis"] == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"conv": 20, "linear": 1, "batch_norm": 20, "binary": 8, "pool": 2}),
        ("mobilenet_v2", {"conv": 52, "linear": 1, "batch_norm": 52, "binary": 10, "pool": 1}),
    ],
)
def test_vision_models(backend: Any, name: str, expected: dict[str, int]) -> None:
    model = getattr(paddle.vision.models, name)(num_classes=3)
    graph = backend.trace(model, [np.zeros((1, 3, 32, 32), np.float32)])
    assert not graph.unknown_ops()
    assert {kind: kinds(graph).count(kind) for kind in expected} == expected
    known = {layer.path: layer for layer in backend.layers(model)}
    assert all(node.params["weight"] == known[node.name].params["weight"] for node in graph.layer_nodes())
