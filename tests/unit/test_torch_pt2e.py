"""Int8 programs on PyTorch, held to the simulated model, and torchao's quantizer, held to torchao itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from slimbridge.decisions import QuantizeDecision, QuantParams
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.plan.registries import Scheme
from slimbridge.ports import QuantRequest
from slimbridge.quantize import grid_of, integer_weights, limits_of
from slimbridge.quantize.fold import find_folds, fold_weights
from slimbridge.quantize.quantizer import apply
from slimbridge_torch import create, native_quant

BACKEND = create()
BATCH = np.random.default_rng(1).standard_normal((4, 3, 10, 10)).astype(np.float32)
WEIGHTS = ("stem.weight", "conv.weight", "fc.weight")
KNOWN = torch.ops.quantized_decomposed
CONV, LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default


class Net(nn.Module):
    """A convolution with BatchNorm, a residual addition whose ReLU runs twice, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.relu(self.bn(self.stem(x)))
        return self.fc(self.relu(self.conv(x) + x).mean((2, 3)))


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.uniform_(0.5, 2)
    return model.eval()


def decision(model: Any, bits: int = 8, share: float = 1.0) -> QuantizeDecision:
    """Grids over a share of each range, so that less than 1 clips."""
    folds = find_folds(BACKEND.trace(model, [BATCH]), WEIGHTS)
    weights = {**BACKEND.read(model), **fold_weights(BACKEND.read(model), folds)}
    plain = BACKEND.forward(model, [BATCH], ["bn", "relu"]).features
    first, last = torch.relu(plain["bn"]).numpy(), plain["relu"].numpy()
    seen = {"stem": BATCH, "conv": first, "relu:output#0": first, "relu:output#1": last, "fc": last.mean((2, 3))}
    scheme = Scheme(bits, symmetric=False)
    return QuantizeDecision(
        observer="test",
        weights={name: grid_of(*limits_of(weights[name], 0), Scheme(8, True, True), 0) for name in WEIGHTS},
        activations={key: grid_of(share * x.min(), share * x.max(), scheme) for key, x in seen.items()},
        folds=folds,
    )


def simulated(model: Any, grids: QuantizeDecision) -> Any:
    return apply(BACKEND, BACKEND.clone(model), grids)


def outputs(model: Any, x: Any) -> Any:
    return BACKEND.ops.numpy(BACKEND.forward(model, [x]).output)


def exported(model: Any, grids: QuantizeDecision, folder: Path) -> Any:
    """The program, before it is compiled."""
    BACKEND.export(model, [BATCH[:1]], folder, "pt2e", grids)
    return torch.export.load(folder / "program.pt2")


def targets(graph: Any) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_the_program_holds_the_decisions_int8_weights_and_no_others(tmp_path: Path) -> None:
    model = net()
    grids = decision(model)
    expected = integer_weights(grids, {**BACKEND.read(model), **fold_weights(BACKEND.read(model), grids.folds)})
    program = exported(simulated(model, grids), grids, tmp_path)
    held = {name: tensor.numpy() for name, tensor in program.state_dict.items() if tensor.dtype == torch.int8}
    assert len(held) == len(WEIGHTS)
    for name, integers in expected.items():
        own = held[f"{name.removesuffix('.weight')}.parametrizations.weight.original"]
        assert own.dtype == np.int8
        assert np.array_equal(own, integers)
    assert all(t.ndim < 2 for t in program.state_dict.values() if t.dtype == torch.float32)


def test_the_program_computes_what_the_simulated_model_computes(tmp_path: Path) -> None:
    model = net()
    grids = decision(model)
    ours = simulated(model, grids)
    program = exported(ours, grids, tmp_path)
    for x in (BATCH, BATCH[:1]):
        with torch.no_grad():
            found = program.module()(torch.from_numpy(x)).numpy()
        assert relative(found, outputs(ours, x)) <= tolerance("forward_quantized").value


def test_the_program_is_what_int8_kernels_are_found_in(tmp_path: Path) -> None:
    model = net()
    grids = decision(model)
    graph = exported(simulated(model, grids), grids, tmp_path).graph
    assert torch.ops.aten.batch_norm.default not in targets(graph)
    # The input of "conv" is the first output of "relu", on the same grid: four tensors are quantized, not five.
    assert targets(graph).count(KNOWN.quantize_per_tensor.default) == len(grids.activations) - 1
    for node in graph.nodes:
        if node.target in (CONV, LINEAR):
            data, weight = node.args[:2]
            assert data.target is KNOWN.dequantize_per_tensor.default
            assert weight.target is KNOWN.dequantize_per_channel.default


def test_compiled_it_computes_the_same_where_narrow_grids_clip(tmp_path: Path) -> None:
    # Int8 kernels drop limits narrower than 8 bits.
    model = net()
    grids, narrow = decision(model), decision(model, bits=4, share=0.4)
    mixed = {key: narrow.activations[key] for key in ("relu:output#0", "conv", "fc")}
    grids = changed(grids, activations={**grids.activations, **mixed})
    ours = simulated(model, grids)
    BACKEND.export(ours, [BATCH], tmp_path, "pt2e", grids)
    run = BACKEND.load_exported(tmp_path, "pt2e", 1)
    threads = torch.get_num_threads()
    (found,) = run([BATCH])
    assert relative(found, outputs(ours, BATCH)) <= tolerance("forward_quantized").value
    assert torch.get_num_threads() == threads


def changed(grids: QuantizeDecision, **values: Any) -> QuantizeDecision:
    return grids.model_copy(update=values)


def test_what_the_form_cannot_express_is_refused(tmp_path: Path) -> None:
    model = net()
    grids = decision(model)
    ours = simulated(model, grids)
    steps, wide = grids.weights["fc.weight"].step, QuantParams(step=(0.1,), low=-1000, high=1000)
    activations: dict[str, Any] = {
        "one step for a tensor, 'fc' has 8": QuantParams(step=(0.1,) * 8, low=0, high=255, axis=1),
        "8-bit integers, 'fc' has -1000..1000": wide,
    }
    weights: dict[str, Any] = {
        "'fc.weight' has one for 4 entries": QuantParams(step=steps * 2, low=-127, high=127, axis=0, group=4),
        "'fc.weight' has -127..127 and a zero point that is not 0": QuantParams(
            step=steps, zero_point=(1,) * 5, low=-127, high=127, axis=0
        ),
        "'fc.weight' has -1000..1000": wide,
    }
    cases = {why: changed(grids, activations={"fc": grid}) for why, grid in activations.items()}
    cases |= {why: changed(grids, weights={"fc.weight": grid}) for why, grid in weights.items()}
    cases |= {"found mode 'dynamic'": changed(grids, mode="dynamic")}
    for why, bad in cases.items():
        with pytest.raises(BackendError, match=why):
            BACKEND.export(ours, [BATCH], tmp_path, "pt2e", bad)
    with pytest.raises(BackendError, match="static quantization, found none"):
        BACKEND.export(ours, [BATCH], tmp_path, "pt2e")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_on_its_grid_is_refused(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(ModelError, match=r"'stem\.weight' is not on its grid; the decision must be applied first"):
        BACKEND.export(model, [BATCH], tmp_path, "pt2e", decision(model))


def ask(model: Any, **more: Any) -> QuantizeDecision:
    return BACKEND.native_quantize(model, QuantRequest("torchao.pt2e", **more), [[BATCH], [BATCH[:2]]])


def by_torchao(model: Any) -> Any:
    """Torchao's own flow over a model that calls no module twice."""
    program = torch.export.export(model, (torch.from_numpy(BATCH[:2]),)).module()
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(program, x86.X86InductorQuantizer().set_global(config))
    for x in (BATCH[:2], BATCH[2:]):
        prepared(torch.from_numpy(x))
    return convert_pt2e(prepared)


def straight() -> Any:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(0.5, 2)
    return model


def test_the_integers_and_activation_grids_read_back_are_torchaos_own() -> None:
    model = straight()
    request = QuantRequest("torchao.pt2e")
    grids = BACKEND.native_quantize(model, request, [[BATCH[:2]], [BATCH[2:]]])
    ours = integer_weights(grids, {**BACKEND.read(model), **fold_weights(BACKEND.read(model), grids.folds)})
    converted = by_torchao(straight())
    layers = [node for node in converted.graph.nodes if node.target in (CONV, LINEAR)]
    assert list(grids.weights) == ["0.weight", "3.weight", "7.weight"]
    assert [fold.scale for fold in grids.folds] == ["1.weight"]
    for node, (name, integers) in zip(layers, ours.items(), strict=True):
        data, weight = node.args[:2]
        assert np.array_equal(integers, getattr(converted, weight.args[0].target).numpy())
        grid = grids.activations[name.removesuffix(".weight")]
        assert (grid.zero_point[0], grid.low, grid.high) == data.args[2:5]
        assert abs(grid.step[0] / data.args[1] - 1) <= tolerance("activation_step").value


def test_the_simulated_decision_computes_what_torchao_computes() -> None:
    model = straight()
    grids = BACKEND.native_quantize(model, QuantRequest("torchao.pt2e"), [[BATCH[:2]], [BATCH[2:]]])
    theirs = by_torchao(model)(torch.from_numpy(BATCH[:2])).detach().numpy()
    found = outputs(simulated(model, grids), BATCH[:2])
    assert relative(found, theirs) <= tolerance("forward_quantized").value


def test_a_relu_that_runs_twice_is_split_and_its_outputs_are_sites() -> None:
    model = net()
    before = BACKEND.read(model)
    grids = ask(model)
    assert grids.observer == "torchao.pt2e"
    assert set(grids.weights) == set(WEIGHTS)
    assert set(grids.activations) == {"stem", "conv", "fc", "relu:output#0"}
    assert grids.activations["conv"] == grids.activations["relu:output#0"]
    assert type(model.relu) is nn.ReLU
    assert all(np.array_equal(array, before[name]) for name, array in BACKEND.read(model).items())


def test_a_native_decision_becomes_a_program(tmp_path: Path) -> None:
    model = net()
    grids = ask(model)
    ours = simulated(model, grids)
    program = exported(ours, grids, tmp_path)
    with torch.no_grad():
        found = program.module()(torch.from_numpy(BATCH)).numpy()
    assert relative(found, outputs(ours, BATCH)) <= tolerance("forward_quantized").value


def test_ignored_layers_stay_in_float_and_the_option_is_torchaos() -> None:
    grids = ask(net(), ignored=("conv",), options={"reduce_range": True})
    assert "conv.weight" not in grids.weights and "conv" not in grids.activations
    assert [item.layer for item in grids.skipped if item.reason == "ignored"] == ["conv"]
    assert {grid.high for grid in grids.activations.values()} == {127}


def test_what_torchao_is_not_asked_for_rightly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    with pytest.raises(BackendError, match=r"no option 'reduce'.*reduce_range.*allowed: reduce_range"):
        ask(model, options={"reduce": True})
    with pytest.raises(BackendError, match="8 bits for weights and activations, found 4 and 8"):
        ask(model, weight_bits=4)
    with pytest.raises(BackendError, match=r"unknown quantizer 'torchao\.x'.*torch has: torchao\.pt2e"):
        BACKEND.native_quantize(model, QuantRequest("torchao.x"), [[BATCH]])
    with pytest.raises(ModelError, match="no layer 'convv'"):
        ask(model, ignored=("convv",))
    with pytest.raises(ModelError, match="at least one batch"):
        BACKEND.native_quantize(model, QuantRequest("torchao.pt2e"), [])
    with pytest.raises(ModelError, match="quantized 0 of 3 convolution and linear layers"):
        ask(model, ignored=("stem", "conv", "fc"))
    assert BACKEND.capabilities().native_quantizers == ("torchao.pt2e",)
    monkeypatch.setattr(native_quant, "find_spec", lambda name: None)
    assert BACKEND.capabilities().native_quantizers == ()
    with pytest.raises(BackendError, match=r"needs torchao.*pip install 'slimbridge\[torchao\]'"):
        ask(model)


def test_steps_are_moved_to_where_a_division_gives_torchaos_integers() -> None:
    # -127.5 steps: the reciprocal of this step rounds such that the product is above the half, the quotient is on it.
    step = np.float32(0.3)
    weight = np.array([[-127.5, 127.5, 3.2]], np.float64) * np.float64(step)
    rows = weight.astype(np.float32)
    for lowest in (-127, -128):
        wanted = np.array([[lowest, 127, 3]], np.int8)
        found = native_quant.matched(rows, wanted, np.array([step]), (-128, 127))
        assert found is not None
        assert np.array_equal(np.clip(np.rint(rows / found[:, None]), -128, 127), wanted)
    assert native_quant.matched(rows, np.array([[-127, 127, 4]], np.int8), np.array([step]), (-128, 127)) is None
