"""The Paddle tracer on attention, transposed convolutions and matrix products in their many spellings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.graph import Graph  # noqa: E402
from slimbridge_paddle.capture import Program  # noqa: E402
from slimbridge_paddle.refs import Active  # noqa: E402
from slimbridge_paddle.trace import Builder  # noqa: E402
from slimbridge_paddle.trace_ops import Call, translate  # noqa: E402

nn = paddle.nn
F = paddle.nn.functional
BACKEND = slimbridge_paddle.create()
SEQUENCE = np.zeros((2, 5, 8), np.float32)
HEADS = np.zeros((2, 5, 2, 4), np.float32)
IMAGE = np.zeros((2, 4, 6, 6), np.float32)
FUSED = ["transpose", "transpose", "transpose", "elementwise", "transpose", "matmul", "softmax", "matmul", "transpose"]


def traced(forward: Any, *inputs: Any, **layers: Any) -> Graph:
    """The graph of a model with these layers."""

    class Net(nn.Layer):
        def forward(self, *inputs: Any) -> Any:
            return forward(self, *inputs)

    model = Net()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return BACKEND.trace(model, inputs)


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes if node.kind not in ("input", "constant")]


def run(graph: Graph, inputs: Any, values: Any = None) -> Any:
    """A graph of moves and products, computed by NumPy."""
    found = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes[len(inputs) :]:
        args = [found[tensor] for tensor in node.inputs]
        shape = graph.shapes[node.outputs[0]]
        if node.kind == "constant":
            made = values[node.params["value"]]
        elif node.kind == "transpose":
            made = args[0].transpose(node.attrs["perm"])
        elif node.kind == "reshape":
            made = args[0].reshape(shape)
        elif node.kind == "matmul":
            made = args[0] @ args[1]
        elif node.kind == "linear":
            made = args[0] @ values[node.params["weight"]].T
        elif node.kind == "concat":
            made = np.concatenate(args, node.attrs["axis"])
        else:
            assert node.kind == "slice"
            cut = [slice(None)] * args[0].ndim
            cut[node.attrs["axis"]] = slice(node.attrs["start"], node.attrs["stop"], node.attrs["step"])
            made = args[0][tuple(cut)]
        assert made.shape == shape
        found[node.outputs[0]] = made
    return found[graph.outputs[0]]


def integers(*shape: int) -> Any:
    """Small whole numbers, so that products are exact."""
    return np.random.default_rng(0).integers(-4, 5, shape).astype(np.float32)


def test_fused_qkv_written_by_hand() -> None:
    def forward(m: Any, x: Any) -> Any:
        q, k, v = m.qkv(x).reshape([2, 5, 3, 2, 4]).transpose([2, 0, 3, 1, 4]).unbind(0)
        weights = F.softmax(paddle.matmul(q, k, transpose_y=True) * 0.5, -1)
        return m.proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([2, 5, 8]))

    graph = traced(forward, SEQUENCE, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8))
    assert not graph.unknown_ops()
    assert kinds(graph) == [
        "linear", "reshape", "transpose", "split", "reshape", "reshape", "reshape",
        "transpose", "matmul", "elementwise", "softmax", "matmul", "transpose", "reshape", "linear",
    ]  # fmt: skip
    assert graph.nodes[1].attrs == {} and dict(graph.nodes[1].params) == {"weight": "qkv.weight", "bias": "qkv.bias"}


def test_scaled_dot_product_attention() -> None:
    graph = traced(lambda m, q: F.scaled_dot_product_attention(q, q, q), HEADS)
    assert kinds(graph) == FUSED
    mask = np.zeros((2, 1, 5, 5), np.float32)
    masked = traced(lambda m, q, a: F.scaled_dot_product_attention(q, q, q, a), HEADS, mask)
    assert kinds(masked) == [*FUSED[:6], "binary", *FUSED[6:]]
    causal = traced(lambda m, q: F.scaled_dot_product_attention(q, q, q, is_causal=True), HEADS)
    assert kinds(causal) == kinds(masked)


@pytest.mark.parametrize(("name", "masked"), [("flash_attn", True), ("memory_efficient_attention", False)])
def test_attention_that_a_gpu_fuses_is_taken_apart(name: str, masked: bool) -> None:
    """The operations exist on GPUs only, so that the call is made up."""
    builder = Builder({}, Program(None, (), (), {}, {}))
    tensors = [Active(builder.one("input", (), HEADS.shape)) for _ in range(3)]
    mask = Active(builder.one("input", (), (2, 1, 5, 5)))
    vector = SimpleNamespace(as_vec_type=lambda: None)
    result = SimpleNamespace(shape=list(HEADS.shape), type=lambda: vector)
    operation = SimpleNamespace(attrs=lambda: {}, num_regions=lambda: 0)
    extra = [None, mask] if masked else []
    (made,) = translate(builder, Call(name, operation, [*tensors, *extra], [result]))
    expected = [*FUSED[:6], "binary", *FUSED[6:]] if masked else FUSED
    assert [node.kind for node in builder.nodes[4:]] == expected
    assert isinstance(made, Active) and builder.shapes[made.tensor] == HEADS.shape


def test_multi_head_attention_and_a_transformer_layer() -> None:
    graph = traced(lambda m, x: m.layer(x), SEQUENCE, layer=nn.TransformerEncoderLayer(8, 2, 16))
    assert not graph.unknown_ops()
    assert [node.kind for node in graph.layer_nodes()] == ["linear"] * 6
    assert kinds(graph).count("layer_norm") == 2 and kinds(graph).count("matmul") == 2


def test_class_token_and_positions() -> None:
    def forward(m: Any, x: Any) -> Any:
        x = paddle.concat([m.token.expand([2, 1, 8]), x], axis=1) + m.positions
        return m.norm(x)[:, 0]

    graph = traced(
        forward, SEQUENCE, norm=nn.LayerNorm(8),
        token=BACKEND.nn.parameter(np.zeros((1, 1, 8))), positions=BACKEND.nn.parameter(np.zeros((1, 6, 8))),
    )  # fmt: skip
    assert kinds(graph) == ["expand", "concat", "binary", "layer_norm", "slice", "reshape"]
    constants = [dict(node.params) for node in graph.nodes if node.kind == "constant"]
    assert constants == [{"value": "token"}, {"value": "positions"}]
    assert graph.nodes[-3].attrs["axes"] == (2,)


@pytest.mark.parametrize(
    "equation",
    ["bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd", "bnhd,bmhd->hbmn", "bnhd,bnhe->de", "bnhd,hdk->bnk", "bnhd,ke->kb"],
)
def test_einsum_of_two(equation: str) -> None:
    first, second = equation.partition("->")[0].split(",")
    sizes = {"b": 2, "n": 5, "m": 3, "h": 2, "d": 4, "k": 6, "e": 7}
    a, b = (integers(*(sizes[letter] for letter in term)) for term in (first, second))
    graph = traced(lambda m, x, y: paddle.einsum(equation, x, y), a, b)
    if equation.endswith("kb"):
        assert graph.unknown_ops() == ("einsum in ''",)
    else:
        assert not graph.unknown_ops()
        assert np.array_equal(run(graph, [a, b]), np.einsum(equation, a, b))


@pytest.mark.parametrize(("equation", "known"), [("bnhd->hbdn", True), ("bnhd->bd", False)])
def test_einsum_of_one(equation: str, known: bool) -> None:
    x = integers(*HEADS.shape)
    graph = traced(lambda m, x: paddle.einsum(equation, x), x)
    assert bool(graph.unknown_ops()) != known
    assert not known or np.array_equal(run(graph, [x]), np.einsum(equation, x))


def test_roll_and_pixel_unshuffle_move_the_same_entries() -> None:
    x = integers(*IMAGE.shape)
    graph = traced(lambda m, x: paddle.roll(x, [1, -2, 6], [2, -1, 2]), x)
    assert set(kinds(graph)) == {"slice", "concat"}
    assert np.array_equal(run(graph, [x]), np.roll(x, (1, -2, 6), (2, 3, 2)))
    graph = traced(lambda m, x: F.pixel_unshuffle(x, 2), x)
    assert kinds(graph) == ["reshape", "transpose", "reshape"]
    assert np.array_equal(run(graph, [x]), F.pixel_unshuffle(paddle.to_tensor(x), 2).numpy())
    assert traced(lambda m, x: paddle.roll(x, 1), x).unknown_ops() == ("roll in ''",)


def test_weights_outside_layers_and_transposed_ones() -> None:
    """A parameter is a linear layer's weight where it is (out, in) in the canonical layout, else a constant."""
    x, square, wide = integers(2, 4), integers(4, 4), integers(3, 4)
    parts = {"square": BACKEND.nn.parameter(square), "wide": BACKEND.nn.parameter(wide), "fc": nn.Linear(4, 3)}
    parts["fc"].weight.set_value(paddle.to_tensor(wide.T))
    values = {"square": square, "wide": wide, "fc.weight": wide}
    spellings = {
        "linear": [
            (lambda m, x: F.linear(x, m.fc.weight), wide),
            (lambda m, x: paddle.matmul(x, m.wide, transpose_y=True), wide),
            (lambda m, x: paddle.matmul(x, m.wide.transpose([1, 0])), wide),
            (lambda m, x: paddle.matmul(x, m.fc.weight.t().t()), wide),
        ],
        "matmul": [(lambda m, x: F.linear(x, m.square), square.T),
                   (lambda m, x: paddle.matmul(m.fc(x), m.fc.weight, transpose_y=True), None)],
    }  # fmt: skip
    for kind, cases in spellings.items():
        for forward, matrix in cases:
            graph = traced(forward, x, **parts)
            assert kinds(graph)[-1] == kind, kinds(graph)
            if matrix is not None:
                assert np.array_equal(run(graph, [x], values), x @ matrix.T)


def test_products_with_a_sum() -> None:
    square = np.zeros((4, 4), np.float32)
    graph = traced(lambda m, x: paddle.addmm(x, x, x, beta=0.5, alpha=2.0), square)
    assert kinds(graph) == ["matmul", "elementwise", "elementwise", "binary"]
    graph = traced(lambda m, x: paddle.addmm(x, x, m.fc.weight), square, fc=nn.Linear(4, 4))
    assert kinds(graph) == ["linear", "binary"]


def test_masks_and_pieces() -> None:
    graph = traced(lambda m, x, y: paddle.masked_fill(x, y > 0, -1.0), IMAGE, IMAGE)
    assert kinds(graph) == ["elementwise", "elementwise", "binary"] and graph.nodes[-1].attrs["op"] == "where"
    graph = traced(lambda m, x: paddle.unstack(x, axis=1), IMAGE)
    assert kinds(graph) == ["split", *["reshape"] * 4]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolution(groups: int) -> None:
    layer = nn.Conv2DTranspose(4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups)
    graph = traced(lambda m, x: m.up(x), IMAGE, up=layer)
    (node,) = graph.layer_nodes()
    assert (node.kind, node.name) == ("conv", "up")
    assert dict(node.params) == {"weight": "up.weight", "bias": "up.bias"}
    assert dict(node.attrs) == {
        "groups": groups, "transposed": True, "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1),
        "output_padding": (1, 1),
    }  # fmt: skip
    assert graph.parameters["up.weight"] == (4, 8 // groups, 3, 3)
    assert BACKEND.layers(nn.Sequential(layer))[0].kind == "conv_transpose"


def test_transposed_convolutions_of_other_kinds() -> None:
    def node(layer: Any, shape: tuple[int, ...], **options: Any) -> Any:
        graph = traced(lambda m, x: m.up(x, **options), np.zeros(shape, np.float32), up=layer)
        (found,) = graph.layer_nodes()
        return found.attrs

    image = (2, 4, 6, 6)
    assert node(nn.Conv3DTranspose(4, 2, 3), (1, 4, 3, 3, 3))["stride"] == (1, 1, 1)
    assert node(nn.Conv1DTranspose(4, 2, 3), (1, 4, 6))["transposed"]
    assert "output_padding" not in node(nn.Conv2DTranspose(4, 2, 3), image)
    sized = nn.Conv2DTranspose(4, 2, 3, stride=2, padding=1)
    assert node(sized, image, output_size=[11, 12])["output_padding"] == (0, 1)
    same = node(nn.Conv2DTranspose(4, 2, 4, stride=2, padding="SAME"), image)
    assert same["padding"] == (1, 1) and "output_padding" not in same


FAMILIES = {
    "LeNet": (1, 28), "alexnet": (3, 224), "densenet121": (3, 32), "googlenet": (3, 224), "inception_v3": (3, 80),
    "mobilenet_v1": (3, 32), "mobilenet_v3_small": (3, 32), "resnext50_32x4d": (3, 32), "shufflenet_v2_x0_25": (3, 32),
    "squeezenet1_1": (3, 32), "vgg11": (3, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_vision_models(name: str) -> None:
    channels, size = FAMILIES[name]
    model = getattr(paddle.vision.models, name)(num_classes=3)
    graph = BACKEND.trace(model, [np.zeros((1, channels, size, size), np.float32)])
    assert not graph.unknown_ops()
    layers = [layer for layer in BACKEND.layers(model) if layer.kind in ("conv", "linear")]
    assert len(graph.layer_nodes()) <= len(layers)
