"""Mistakes in plans that quantize: a plain line or two, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge.errors import PlanError, SlimbridgeError
from slimbridge.plan import PruneStage, QuantizeStage
from slimbridge.ports import Backend
from slimbridge.tasks import Data, Split
from tests.integration.small_nets import DATA, TRAIN, Attention, NoNorm, Part, Plain, UpAndGroups, net

QAT = {"qat": {"train": TRAIN}}
NATIVE = {"engine": "native", "native": {"quantizer": "torchao.pt2e"}}


def qat(**more: Any) -> dict[str, Any]:
    return {"qat": {"train": TRAIN, **more}}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"engine": "native"}, "engine native and a section 'native' go together"),
    ({"native": NATIVE["native"]}, "engine native and a section 'native' go together"),
    ({**NATIVE, "mode": "dynamic"}, "engine native is for mode static"),
    ({**NATIVE, "placement": "layer", "observer": "absmax"}, "decides by its own rules: leave out placement, observer"),
    ({**NATIVE, **QAT}, "engine native decides by its own rules: leave out qat"),
    ({"weight_granularity": "group"}, "weight_granularity group and group_size go together"),
    ({"group_size": 8}, "weight_granularity group and group_size go together"),
    (
        {"weight_granularity": "group", "group_size": 4, **qat(weight_ranges="lsq")},
        "weight_granularity group is trained with weight_ranges absmax only",
    ),
    ({**QAT, "mode": "dynamic"}, "qat is for mode static, found dynamic"),
    ({**QAT, "mode": "weight_only"}, "qat is for mode static, found weight_only"),
    ({"definition": "paddle", "weight_scheme": "asymmetric"}, "definition paddle is symmetric only"),
    ({"definition": "paddle", "activation_scheme": "asymmetric"}, "definition paddle is symmetric only"),
    ({**QAT, "definition": "paddle"}, "qat trains under definition own"),
    ({**QAT, "definition": "torch"}, "qat trains under definition own"),
    ({**QAT, "weight_scheme": "asymmetric"}, "qat trains symmetric weights"),
    ({**qat(activation_ranges="lsq"), "activation_scheme": "asymmetric"}, "lsq and pact are symmetric; allowed with"),
    ({**qat(activation_ranges="pact"), "activation_scheme": "asymmetric"}, "lsq and pact are symmetric; allowed with"),
    (qat(activation_ranges="lsq_plus"), "lsq_plus learns an offset: it needs activation_scheme asymmetric"),
    ({"weight_bits": 1}, "stages[0].weight_bits: found 1"),
    ({"activation_bits": 9}, "stages[0].activation_bits: found 9"),
    ({"mode": "dynamics"}, "stages[0].mode: found 'dynamics'"),
    ({"placement": "all"}, "stages[0].placement: found 'all'"),
    ({"first_layer": "int8"}, "stages[0].first_layer: found 'int8'"),
    ({"weight_granularity": "channels"}, "stages[0].weight_granularity"),
    ({"weight_granularity": "group", "group_size": 0}, "stages[0].group_size: found 0"),
    ({"observer": "absmx"}, "did you mean 'absmax'?"),
    ({"calibration_batches": 0}, "stages[0].calibration_batches: found 0"),
    ({"qat": {}}, "stages[0].qat.train"),
    (qat(rate=1.0), "stages[0].qat.rate: found 1"),
    (qat(batch_norm="folded"), "stages[0].qat.batch_norm: found 'folded'"),
    (qat(freeze_ranges_after=2), "stages[0].qat.freeze_ranges_after: found 2"),
    (qat(activation_range="lsq"), "activation_ranges"),
    ({**qat(batch_norm="fold"), "fold_batch_norm": False}, "contradict each other"),
    ({"mode": "weight_only", "activation_bits": 4}, "mode weight_only does not look at activation_bits: leave it out"),
    ({"mode": "dynamic", "observer": "mse"}, "mode dynamic does not look at observer: leave it out"),
]


@pytest.mark.parametrize(("stage", "words"), MISTAKES)
def test_what_a_plan_may_not_say(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        sb.load_plan({"stages": [{"kind": "quantize", **stage}]})
    (line,) = caught.value.findings
    assert words in line
    assert line.startswith("plan: ")
    assert "stage" in line


@pytest.mark.parametrize(
    "late", [{"kind": "finetune", "train": TRAIN}, {"kind": "prune", "pruning_ratio": 0.5}, {"kind": "quantize"}]
)
def test_quantize_comes_last(late: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        sb.load_plan({"stages": [{"kind": "quantize"}, late]})
    (line,) = caught.value.findings
    assert f"stage 2 of 2: '{late['kind']}' after 'quantize' would change the quantized weights" in line


def refused(backend: Backend, stages: list[dict[str, Any]], path: Path, part: type[Part] = Plain, **more: Any) -> str:
    """The error of a run that must have written nothing."""
    model = more.pop("model", None) or net(backend, part)
    with pytest.raises(sb.SlimbridgeError) as caught:
        sb.compress(model, {"stages": stages}, data=more.pop("data", DATA), run_dir=path / "run", **more)
    assert not (path / "run").exists(), "the run had begun"
    text = str(caught.value)
    assert len(text.splitlines()) <= 2, text
    assert "Traceback" not in text
    return text


FOUND_BEFORE: list[tuple[dict[str, Any], type[Part], str]] = [
    ({"ignored_layers": ["lst"]}, Plain, "did you mean 'last'?"),
    ({"ignored_layers": ["*"]}, Plain, "nothing to quantize: 0 of 3 convolution and linear layers are left"),
    ({"first_layer": "float", "ignored_layers": ["b", "last"]}, Plain, "nothing to quantize: 0 of 3"),
    ({"mode": "dynamic", "ignored_layers": ["last"]}, NoNorm, "mode dynamic is for linear layers"),
    ({"observer_options": {"rat": 0.5}}, Plain, "has no option 'rat' (did you mean 'rate'?)"),
    ({"observer_options": {"rate": 2}}, Plain, "rate must be"),
    ({"weight_granularity": "group", "group_size": 7}, Plain, "group_size 7 does not divide the 9 weights"),
    ({"weight_granularity": "group", "group_size": 7, **QAT}, Attention, "group_size 7 does not divide the 8 weights"),
]


@pytest.mark.parametrize(("stage", "part", "words"), FOUND_BEFORE)
def test_what_does_not_fit_the_model(
    backend: Backend, stage: dict[str, Any], part: type[Part], words: str, tmp_path: Path
) -> None:
    assert words in refused(backend, [{"kind": "quantize", **stage}], tmp_path, part)


NATIVES = {"torch": "torchao.pt2e", "paddle": "paddle.ptq"}
"""A quantizer of each backend's other toolkits."""


def test_another_toolkits_quantizer_on_the_wrong_backend(backend: Backend, tmp_path: Path) -> None:
    own = backend.capabilities().native_quantizers
    assert own
    wrong = NATIVES["torch" if backend.name == "paddle" else "paddle"]
    stage = {"kind": "quantize", "engine": "native", "native": {"quantizer": wrong}}
    text = refused(backend, [stage], tmp_path)
    assert f"native.quantizer '{wrong}' is not there on {backend.name}" in text
    assert all(name in text for name in own[:12])


def test_weights_that_are_not_finite(backend: Backend, tmp_path: Path) -> None:
    """Also where only the norm makes them so, and nothing is calibrated."""
    model = net(backend)
    weight = backend.read(model)["b.weight"]
    weight[1, 2, 0, 0] = np.nan
    backend.write(model, {"b.weight": weight}, partial=True)
    for mode in ("static", "weight_only"):
        text = refused(backend, [{"kind": "quantize", "mode": mode}], tmp_path, model=model)
        assert "layer 'b': 1 of 1080 entries of its weight are not finite" in text
    model = net(backend)
    variance = backend.read(model)["na.running_var"]
    backend.write(model, {"na.running_var": np.full_like(variance, -1)}, partial=True)
    text = refused(backend, [{"kind": "quantize", "mode": "weight_only"}], tmp_path, model=model)
    assert "layer 'a': 108 of 108 entries of its weight with the BatchNorm folded in are not finite" in text


def test_labels_are_looked_at_before_a_quantization_aware_training(backend: Backend, tmp_path: Path) -> None:
    wrong = Data(Split(DATA.train.inputs, DATA.train.targets + 5), DATA.test)
    text = refused(backend, [{"kind": "quantize", **QAT}], tmp_path, data=wrong)
    assert "label" in text


def test_mistakes_of_two_stages_are_told_together(backend: Backend, tmp_path: Path) -> None:
    stages = [
        {"kind": "prune", "pruning_ratio": 0.5, "ignored_layers": ["x"]},
        {"kind": "quantize", "ignored_layers": ["y"]},
    ]
    lines = refused(backend, stages, tmp_path).splitlines()
    assert ["stages[0]" in lines[0], "stages[1]" in lines[1]] == [True, True]


def test_a_transposed_convolution_is_told_in_the_notes(backend: Backend, tmp_path: Path) -> None:
    stage = {"kind": "quantize", "calibration_batches": 1}
    result = sb.compress(net(backend, UpAndGroups), {"stages": [stage]}, data=DATA, run_dir=tmp_path / "run")
    notes = result.report.stages[1].notes
    assert notes[0].startswith("3 of 4 convolution and linear layers quantized, ")
    assert any(note.startswith("left alone: up: a transposed convolution stays in float") for note in notes)


def test_stages_are_what_their_kind_says() -> None:
    plan = sb.load_plan({"stages": [{"kind": "prune", "pruning_ratio": 0.5}, {"kind": "quantize"}]})
    assert [type(stage) for stage in plan.stages] == [PruneStage, QuantizeStage]


def test_half_precision_is_refused_before_the_run(tmp_path: Path) -> None:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).to(dtype)
        x, y = np.zeros((8, 3, 2, 2), np.float32), np.zeros(8, np.int64)
        with pytest.raises(SlimbridgeError, match="float32 and float64 are supported"):
            sb.compress(model, {"stages": [{"kind": "quantize"}]}, data=((x, y), (x, y)), run_dir=tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
