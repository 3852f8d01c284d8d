"""Programs of Paddle Inference: int8 against NumPy and against the simulation, float, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import DynamicGrid, Fold, QuantizeDecision, QuantParams, Site  # noqa: E402
from slimbridge.errors import BackendError, ModelError, RunError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.parity.measure import relative  # noqa: E402
from slimbridge.ports import Array  # noqa: E402
from slimbridge.quantize.fake import Static  # noqa: E402
from slimbridge_paddle import inference, qdq  # noqa: E402

nn = paddle.nn
BACKEND = slimbridge_paddle.create()
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
INT8, FLOAT = "paddle_int8", "paddle_float"


class Small(nn.Layer):
    """A residual block whose ReLU runs twice, a depthwise convolution, pools, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, padding=1, bias_attr=False)
        self.bn = nn.BatchNorm2D(8)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2D(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2D(2)
        self.dw = nn.Conv2D(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.inner(x))
        return self.fc(self.dw(self.pool(x)).mean([2, 3]))


LAYERS = ("stem", "inner", "dw", "fc")
LAYER_SITES = tuple(map(Site, LAYERS))
FULL_SITES = (
    *(Site("stem"), Site("relu", "output", 0, 0), Site("inner", "output"), Site("relu", "output", 0, 1)),
    *(Site("dw"), Site("fc")),
)
FOLD = Fold(
    weight="stem.weight",
    scale="bn.weight",
    shift="bn.bias",
    mean="bn.running_mean",
    variance="bn.running_var",
    eps=1e-5,
)


def grid(step: float | Array, low: int = -127, high: int = 127, **options: Any) -> QuantParams:
    return QuantParams(step=tuple(np.float32(step).reshape(-1).tolist()), low=low, high=high, **options)


def small(seed: int = 0) -> Any:
    """With its BatchNorm folded."""
    paddle.seed(seed)
    model = Small()
    arrays = BACKEND.read(model)
    shift = np.linspace(-0.2, 0.3, 8)
    ones = np.ones(8)
    folded = {"bn.weight": ones, "bn.bias": shift, "bn.running_mean": 0 * ones, "bn.running_var": ones - FOLD.eps}
    return BACKEND.write(model, {**arrays, **folded})


def on_grid(model: Any, paths: tuple[str, ...] = LAYERS) -> dict[str, QuantParams]:
    """Write the weights' grid values; their grids."""
    arrays, grids = BACKEND.read(model), {}
    for path in paths:
        weight = arrays[f"{path}.weight"]
        steps = np.float32(np.abs(weight).reshape(len(weight), -1).max(1) / 127)
        shaped = steps.reshape((-1,) + (1,) * (weight.ndim - 1))
        arrays[f"{path}.weight"] = np.rint(weight / shaped) * shaped
        grids[f"{path}.weight"] = grid(steps, axis=0)
    BACKEND.write(model, arrays)
    return grids


def decided(model: Any, sites: tuple[Site, ...], unsigned: bool = False) -> QuantizeDecision:
    """The model's weights are put on their grid, its activations are observed."""
    weights = on_grid(model)
    activations = {}
    for site, seen in BACKEND.reduce(model, [IMAGES], sites).items():
        positive = unsigned and seen.min >= 0
        activations[str(site)] = grid(seen.max / 255, 0, 255) if positive else grid(seen.absmax / 127)
    return QuantizeDecision(observer="absmax", weights=weights, activations=activations, folds=(FOLD,))


def simulated(model: Any, decision: QuantizeDecision) -> Array:
    quants = {Site.parse(key): Static.of(found, key) for key, found in decision.activations.items()}
    output: Array = BACKEND.forward(BACKEND.insert_quant(BACKEND.clone(model), quants), [IMAGES]).output.numpy()
    return output


@pytest.mark.parametrize("sites", [LAYER_SITES, FULL_SITES], ids=["layer", "full"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_the_int8_program_gives_what_the_simulation_gives(
    sites: tuple[Site, ...], unsigned: bool, tmp_path: Path, capfd: Any
) -> None:
    model = small()
    decision = decided(model, sites, unsigned)
    expected = simulated(model, decision)
    before = BACKEND.read(model)
    BACKEND.export(model, [IMAGES], tmp_path, INT8, decision)
    run = BACKEND.load_exported(tmp_path, INT8, 1)
    found = run([IMAGES])
    assert len(found) == 1 and relative(found[0], expected) < tolerance("forward_quantized").value
    assert np.array_equal(run([IMAGES[:1]])[0].argmax(1), expected[:1].argmax(1))
    after = BACKEND.read(model)
    assert all(np.array_equal(before[name], after[name]) for name in before) and model.training
    assert capfd.readouterr() == ("", "") and paddle.in_dynamic_mode()
    assert {path.name for path in tmp_path.iterdir()} == {"model.pdmodel", "model.pdiparams"}


def test_layers_without_a_grid_in_front_stay_right(tmp_path: Path) -> None:
    model = small()
    whole = decided(model, LAYER_SITES)
    for number, sites in enumerate(((), ("inner",), ("stem", "fc"))):
        some = {key: whole.activations[key] for key in sites}
        for folds in ((), (FOLD,)):
            folder = tmp_path / f"{number}{len(folds)}"
            folder.mkdir()
            decision = whole.model_copy(update={"activations": some, "folds": folds})
            BACKEND.export(model, [IMAGES], folder, INT8, decision)
            found = BACKEND.load_exported(folder, INT8, 1)([IMAGES])[0]
            assert relative(found, simulated(model, decision)) < tolerance("forward_quantized").value


class One(nn.Layer):
    """One layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.only = layer

    def forward(self, x: Any) -> Any:
        return self.only(x)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_layer_is_exact_integer_arithmetic(kind: str, per_channel: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    model = One(nn.Linear(6, 16) if kind == "linear" else nn.Conv2D(6, 16, 1))
    steps = np.float32(rng.uniform(0.01, 0.1, 16) if per_channel else np.full(16, 0.03))
    integers = rng.integers(-127, 128, (16, 6)).astype(np.float32)
    integers[:, 0] = 127  # the runtime's own steps come from the largest weight of each channel
    bias = np.float32(rng.normal(size=16))
    shape = (16, 6) if kind == "linear" else (16, 6, 1, 1)
    BACKEND.write(model, {"only.weight": (integers * steps[:, None]).reshape(shape), "only.bias": bias})
    inputs = rng.integers(-127, 128, (4, 6)).astype(np.float32)
    images = inputs * np.float32(0.25)
    decision = QuantizeDecision(
        observer="absmax",
        weights={"only.weight": grid(steps, axis=0) if per_channel else grid(steps[0])},
        activations={"only": grid(0.25)},
    )
    given = images if kind == "linear" else images[:, :, None, None]
    BACKEND.export(model, [given], tmp_path, INT8, decision)
    found = BACKEND.load_exported(tmp_path, INT8, 1)([given])[0].reshape(4, 16)
    expected = (inputs @ integers.T).astype(np.float64) * steps * 0.25 + bias
    assert relative(found, expected) < tolerance("operation").value


def test_weights_are_stored_in_one_byte(tmp_path: Path) -> None:
    paddle.seed(0)
    model = One(nn.Linear(128, 128))
    given = np.ones((1, 128), np.float32)
    weight = BACKEND.read(model)["only.weight"]
    step = np.float32(np.abs(weight).max() / 127)
    BACKEND.write(model, {"only.weight": np.rint(weight / step) * step}, partial=True)
    decision = QuantizeDecision(observer="", weights={"only.weight": grid(step)}, activations={"only": grid(0.1)})
    sizes = {}
    for form in (INT8, FLOAT):
        (tmp_path / form).mkdir()
        BACKEND.export(model, [given], tmp_path / form, form, decision)
        sizes[form] = (tmp_path / form / "model.pdiparams").stat().st_size
    assert sizes[FLOAT] > 4 * 128 * 128 > 2 * sizes[INT8] > 2 * 128 * 128


class Several(nn.Layer):
    """Two inputs, one of whole numbers, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.table = nn.Embedding(5, 3)

    def forward(self, x: Any, index: Any) -> Any:
        made = self.fc(x)
        return {"sum": made + self.table(index), "rest": [made]}


PAIR = [np.linspace(-1, 1, 8).reshape(2, 4), np.array([0, 4], np.int32)]


def test_float_programs_with_several_inputs_and_outputs(tmp_path: Path, capfd: Any) -> None:
    model = BACKEND.place(Several(), "cpu", "float64")
    BACKEND.export(model, PAIR, tmp_path, FLOAT)
    run = BACKEND.load_exported(tmp_path, FLOAT, 1)
    expected = BACKEND.forward(model, PAIR).output
    for _ in range(2):
        found = run(PAIR)
        assert relative(found[0], expected["sum"].numpy()) < tolerance("forward").value
        assert relative(found[1], expected["rest"][0].numpy()) < tolerance("forward").value
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ModelError, match=r"1 arrays were given, the exported model also needs input_1"):
        run(PAIR[:1])
    with pytest.raises(ModelError, match=r"^input: the exported model cannot run on it: .*\S"):
        run([PAIR[0][:, :3], PAIR[1]])


def refused() -> Iterator[tuple[Mapping[str, Any], str]]:
    """Changes of a decision, and what is said of them."""
    weight, site = "only.weight", "only"
    yield {"weights": {weight: grid([0.1] * 8, axis=0, group=2)}}, "a step for each output channel, or one for all"
    yield {"weights": {weight: grid([0.1] * 4, axis=1)}}, "a step for each output channel, or one for all"
    yield (
        {"weights": {weight: grid(0.1, -7, 7)}},
        r"integers -7..7; .* allows -128..127 or -127..127 \(8 bits\)",
    )
    yield {"weights": {weight: grid(0.1, 0, 255)}}, r"integers 0..255; paddle_int8 allows -128..127 or -127..127"
    yield {"activations": {site: grid(0.1, -128, 127, zero_point=(3,))}}, r"'only': zero point 3; .*no zero point"
    yield {"activations": {site: grid(0.1, 0, 15)}}, r"integers 0..15; .*or 0..255 \(8 bits\)"
    yield {"activations": {site: grid([0.1] * 4, axis=1)}}, "one step for each activation, found 4"
    yield {"mode": "dynamic", "dynamic": {site: DynamicGrid(low=-127, high=127, symmetric=True)}}, "mode static"
    yield {"mode": "weight_only"}, "mode static, found weight_only"


@pytest.mark.parametrize(("changes", "message"), list(refused()))
def test_what_the_program_cannot_express(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    decision = QuantizeDecision(observer="absmax", weights={}, activations={"only": grid(0.1)})
    with pytest.raises(BackendError, match=message):
        BACKEND.export(
            One(nn.Linear(4, 4)), [np.ones((1, 4))], tmp_path, INT8, decision.model_copy(update=dict(changes))
        )
    assert not list(tmp_path.iterdir())


def test_without_a_decision_and_other_layers(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="paddle_int8 is made from a quantize decision, found NoneType"):
        BACKEND.export(One(nn.Linear(4, 4)), [np.ones((1, 4))], tmp_path, INT8)
    model = One(nn.Conv1D(4, 4, 1))
    decision = QuantizeDecision(observer="", weights={"only.weight": grid(0.1)})
    with pytest.raises(BackendError, match=r"'only.weight' is a Conv1D's; paddle_int8 takes Conv2D and Linear"):
        BACKEND.export(model, [np.ones((1, 4, 2))], tmp_path, INT8, decision)


def test_a_decision_that_is_not_the_models(tmp_path: Path) -> None:
    model = small()
    decision = decided(model, LAYER_SITES)
    BACKEND.write(model, {"fc.weight": BACKEND.read(model)["fc.weight"] * 1.3}, partial=True)
    with pytest.raises(ModelError, match=r"'fc.weight': \d+ of 40 entries are not on the decision's grid"):
        BACKEND.export(model, [IMAGES], tmp_path, INT8, decision)
    model = small()
    decision = decided(model, LAYER_SITES)
    for key, message in (
        ("relu:output#2", "no pass reaches relu:output#2"),
        ("dw:output.1", "no pass reaches dw:output.1"),
        ("head", "the model has no layer 'head'"),
    ):
        wrong = decision.model_copy(update={"activations": {**decision.activations, key: grid(0.1)}})
        with pytest.raises(ModelError, match=message):
            BACKEND.export(model, [IMAGES], tmp_path, INT8, wrong)
    wrong = decision.model_copy(update={"weights": {**decision.weights, "head.weight": grid(0.1)}})
    with pytest.raises(ModelError, match=r"the model has no weight head.weight"):
        BACKEND.export(model, [IMAGES], tmp_path, INT8, wrong)


def test_a_fold_that_training_went_on_with(tmp_path: Path) -> None:
    """The scale of a BatchNorm that is no longer 1 goes into the steps."""
    model = small()
    BACKEND.write(model, {"bn.weight": np.linspace(0.5, 2, 8), "bn.running_mean": np.ones(8)}, partial=True)
    decision = decided(model, LAYER_SITES)
    BACKEND.export(model, [IMAGES], tmp_path, INT8, decision)
    found = BACKEND.load_exported(tmp_path, INT8, 1)([IMAGES])[0]
    assert relative(found, simulated(model, decision)) < tolerance("forward_quantized").value
    BACKEND.write(model, {"bn.weight": -np.ones(8)}, partial=True)
    with pytest.raises(ModelError, match=r"'bn.weight' is not folded: it has negative scales"):
        BACKEND.export(model, [IMAGES], tmp_path, INT8, decision)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no model.pdmodel with model.pdiparams"):
        BACKEND.load_exported(tmp_path, FLOAT, 1)
    with pytest.raises(BackendError, match=r"does not run 'onnx_float'; it runs paddle_float, paddle_int8"):
        BACKEND.load_exported(tmp_path, "onnx_float", 1)


def test_silencing_compiled_code_is_still_needed(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    model = small()
    BACKEND.export(model, [IMAGES], tmp_path, INT8, decided(model, LAYER_SITES))
    monkeypatch.setattr(inference, "quiet_descriptors", nullcontext)
    BACKEND.load_exported(tmp_path, INT8, 1)
    printed = "".join(capfd.readouterr())
    assert "quantized" in printed


class Product(nn.Layer):
    """A linear layer with an int8 weight, as Paddle's own conversion writes it."""

    def __init__(self, integers: Array, steps: Array, step: float) -> None:
        super().__init__()
        self.integers = qdq._Weight(np.int8(integers.T), np.float32(steps * 127))
        self.input = qdq._Snap(np.float32([step * 127]), lambda: None, {})
        self.bias = self.create_parameter([len(integers)], is_bias=True)

    def forward(self, x: Any) -> Any:
        weight = qdq._operation("dequantize_linear", self.integers.integers, self.integers, 1)
        return paddle.nn.functional.linear(self.input(x), weight, self.bias)


def test_linear_layers_as_convolutions_are_still_needed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    integers, steps = rng.integers(-127, 128, (16, 6)), rng.uniform(0.01, 0.1, 16)
    integers[:, 0] = 127
    inputs = rng.integers(-127, 128, (4, 6))
    images = np.float32(inputs * 0.25)
    inference.save(Product(integers, steps, 0.25), tmp_path / "model", inference.specs([images], free=True), old=True)
    found = BACKEND.load_exported(tmp_path, INT8, 1)([images])[0]
    assert relative(found, inputs @ integers.T * steps * 0.25) > tolerance("forward_quantized").value


def test_linear_layers_on_sequences(tmp_path: Path) -> None:
    """Their input may have any number of axes."""
    rng = np.random.default_rng(1)
    model = One(nn.Linear(6, 4))
    integers = rng.integers(-126, 127, (4, 6))
    integers[:, 2] = -127
    inputs = rng.integers(-127, 128, (2, 5, 3, 6))
    BACKEND.write(model, {"only.weight": integers * 0.5, "only.bias": np.zeros(4)})
    decision = QuantizeDecision(observer="", weights={"only.weight": grid(0.5)}, activations={"only": grid(0.25)})
    given = np.float32(inputs * 0.25)
    BACKEND.export(model, [given], tmp_path, INT8, decision)
    run = BACKEND.load_exported(tmp_path, INT8, 1)
    for size in (2, 1):
        found = run([given[:size]])[0]
        expected = inputs[:size] @ integers.T * 0.125
        assert found.shape == expected.shape and relative(found, expected) < tolerance("operation").value


class Clipped(nn.Layer):
    """Convolutions with ReLU6 between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2D(3, 8, 3)
        self.clip = nn.ReLU6()
        self.second = nn.Conv2D(8, 4, 3)

    def forward(self, x: Any) -> Any:
        return self.second(paddle.nn.functional.max_pool2d(self.clip(self.first(x)), 2))


def test_unsigned_integers_behind_relu6_and_pools(tmp_path: Path) -> None:
    """They are as fine as the decision says, where a signed grid over the same range would be twice as coarse."""
    paddle.seed(2)
    model = Clipped()
    BACKEND.write(model, {"first.weight": BACKEND.read(model)["first.weight"] * 8}, partial=True)
    weights = on_grid(model, ("first", "second"))
    step = np.float32(np.abs(IMAGES).max() / 127)
    activations = {"first": grid(step), "clip:output": grid(6 / 255, 0, 255)}
    decision = QuantizeDecision(observer="", weights=weights, activations=activations)
    BACKEND.export(model, [IMAGES], tmp_path, INT8, decision)
    expected = simulated(model, decision)
    found = relative(BACKEND.load_exported(tmp_path, INT8, 1)([IMAGES])[0], expected)
    coarse = decision.model_copy(update={"activations": {**activations, "clip:output": grid(6 / 127)}})
    assert found < tolerance("forward_quantized").value and found < relative(simulated(model, coarse), expected) / 2
