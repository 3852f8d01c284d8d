"""Mistakes in plans that prune: a plain line or two, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge.errors import PlanError
from slimbridge.ports import Backend
from slimbridge.tasks import Data, Split
from tests.integration.small_nets import DATA, TRAIN, Attention, NoNorm, Part, Plain, UpAndGroups, net

HALF = {"pruning_ratio": 0.5}
TARGET = {"target": {"of": "macs", "remove": 0.5}}
CURVES = {"sensitivity": {"max_loss": 0.1}}
NATIVE = {"engine": "native", "native": {"pruner": "torch_pruning.magnitude"}}
GMP = {"gmp": {"train": TRAIN}}


def prepared(method: str, **more: Any) -> dict[str, Any]:
    return {"preparation": {"method": method, "train": TRAIN, **more}}


PRUNE: list[tuple[dict[str, Any], str]] = [
    ({**HALF, **TARGET}, "pruning_ratio and target exclude each other"),
    ({}, "says not how much: pruning_ratio, layer_ratios, target or sensitivity is needed"),
    ({"pruning_ratio": 0.0}, "stages[0].pruning_ratio: found 0"),
    ({"pruning_ratio": 1.0}, "stages[0].pruning_ratio: found 1"),
    ({"layer_ratios": {"a": 1.0}}, "stages[0].layer_ratios"),
    ({**HALF, "steps": 3}, "steps need 'finetune', the training after each of them"),
    ({**HALF, "steps": 31, "finetune": TRAIN}, "stages[0].steps: found 31"),
    ({**HALF, **CURVES}, "sensitivity chooses the ratios: leave pruning_ratio and layer_ratios out"),
    ({"layer_ratios": {"a": 0.5}, **CURVES}, "sensitivity chooses the ratios"),
    ({"sensitivity": {}}, "sensitivity needs one of the two: max_loss, or the stage's target"),
    ({**CURVES, **TARGET}, "sensitivity needs one of the two"),
    ({"sensitivity": {}, "target": {"of": "latency", "remove": 0.5}}, "sensitivity reaches a target of parameters or"),
    ({**CURVES, "selection": "global"}, "selection must be local, and steps 1"),
    ({**CURVES, "steps": 2, "finetune": TRAIN}, "selection must be local, and steps 1"),
    ({"sensitivity": {"max_loss": 0.1, "ratios": [0.5, 0.2]}}, "ratios must be ascending"),
    ({**CURVES, **prepared("soft")}, "preparation soft and growing know beforehand what goes"),
    ({**HALF, "engine": "native"}, "engine native and the section 'native' need each other"),
    ({**HALF, "native": NATIVE["native"]}, "engine native and the section 'native' need each other"),
    (
        {**HALF, **NATIVE, "importance": "fpgm", "selection": "global"},
        "engine native chooses by itself: importance, selection would do nothing",
    ),
    ({**TARGET, **NATIVE}, "engine native takes pruning_ratio and layer_ratios"),
    ({**HALF, **NATIVE, **prepared("soft")}, "engine native takes pruning_ratio and layer_ratios"),
    ({"target": {"of": "size", "remove": 0.5}}, "stages[0].target.of: found 'size'"),
    ({"target": {"of": "macs", "remove": 1.5}}, "stages[0].target.remove: found 1.5"),
    ({**HALF, "relative_to": 1}, "relative_to 1 is no earlier stage; 0 (the baseline) to 0 are"),
    ({**HALF, "importance": "l1_nrom"}, "did you mean 'l1_norm'?"),
    ({**HALF, **prepared("weight_decay")}, "stages[0].preparation.method: found 'weight_decay'"),
    ({**HALF, **prepared("growing", strength=0)}, "stages[0].preparation.strength: found 0"),
    ({**HALF, "ignored_kinds": ["convolution"]}, "stages[0].ignored_kinds[0]: found 'convolution'"),
]
SPARSIFY: list[tuple[dict[str, Any], str]] = [
    ({}, "says not how much: sparsity or layer_sparsity is needed"),
    ({"pattern": "n_m", "sparsity": 0.5}, "pattern n_m has its sparsity from n_m"),
    ({"pattern": "n_m", **GMP}, "pattern n_m has its sparsity from n_m"),
    ({"pattern": "n_m", "n_m": [4, 4]}, "n_m: fewer must stay than there are, found 4 of 4"),
    ({"sparsity": 0.5, "steps": 2}, "steps need 'finetune', and neither gmp nor engine native"),
    ({"sparsity": 0.5, "steps": 2, "finetune": TRAIN, **GMP}, "steps need 'finetune', and neither gmp"),
    ({"sparsity": 0.5, "layer_sparsity": {"a": 0.2}, **GMP}, "gmp needs 'sparsity' alone"),
    ({"sparsity": 0.5, "importance": "taylor", **GMP}, "gmp needs 'sparsity' alone, and importance magnitude"),
    ({"sparsity": 0.5, "gmp": {"train": TRAIN, "start_epoch": 2}}, "must hold: start_epoch < end_epoch <= epochs"),
    ({"sparsity": 0.5, "gmp": {"train": TRAIN, "end_epoch": 3}}, "must hold: start_epoch < end_epoch <= epochs"),
    ({"sparsity": 0.5, "gmp": {"train": TRAIN, "initial_sparsity": 0.7}}, "initial_sparsity 0.7 is above sparsity 0.5"),
    ({"sparsity": 0.5, "gmp": {"train": TRAIN, "frequncy": 3}}, "frequency"),
    ({"sparsity": 0.5, "gmp": {}}, "stages[0].gmp.train"),
    (
        {"sparsity": 0.5, "engine": "native", "native": {"pruner": "torch.ln_structured"}, "pattern": "filters"},
        "engine native chooses by itself: pattern would do nothing",
    ),
    ({"sparsity": 0.5, "engine": "native"}, "engine native and the section 'native' need each other"),
    ({"sparsity": 0.5, "importance": "l1_norm"}, "stages[0].importance"),
]
CASES = [("prune", *case) for case in PRUNE] + [("sparsify", *case) for case in SPARSIFY]


@pytest.mark.parametrize(("kind", "stage", "words"), CASES)
def test_what_a_plan_may_not_say(kind: str, stage: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        sb.load_plan({"stages": [{"kind": kind, **stage}]})
    (line,) = caught.value.findings
    assert words in line
    assert line.startswith("plan: ")
    assert "stage" in line


def test_a_later_stage_is_no_start() -> None:
    stages = [{"kind": "prune", **HALF}, {"kind": "prune", **HALF, "relative_to": 3}]
    with pytest.raises(PlanError, match=r"stage 2: relative_to 3 is no earlier stage; 0 \(the baseline\) to 1 are"):
        sb.load_plan({"stages": stages})


def refused(backend: Backend, stages: list[dict[str, Any]], path: Path, part: type[Part] = Plain, **more: Any) -> str:
    """The error of a run that must have written nothing."""
    model = more.pop("model", None) or net(backend, part)
    plan = {"baseline": {"train": TRAIN}, "stages": stages}
    with pytest.raises(sb.SlimbridgeError) as caught:
        sb.compress(model, plan, data=more.pop("data", DATA), run_dir=path / "run", **more)
    assert not (path / "run").exists(), "the run had begun"
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert "Traceback" not in text
    return text


FOUND_BEFORE: list[tuple[dict[str, Any], type[Part], str]] = [
    ({"kind": "prune", "layer_ratios": {"conv*": 0.5}}, Plain, "layer_ratios: 'conv*' matches none of the 3"),
    ({"kind": "prune", **HALF, "ignored_layers": ["lst"]}, Plain, "did you mean 'last'?"),
    ({"kind": "prune", **HALF, "importance_options": {"q": 1}}, Plain, "'q' is no option of importance 'l1_norm'"),
    ({"kind": "prune", **HALF, "importance": "bn_scale"}, NoNorm, "importance 'bn_scale' finds nothing to rate"),
    ({"kind": "prune", **HALF, **prepared("bn_slimming")}, NoNorm, "no BatchNorm scale"),
    ({"kind": "prune", **HALF, "granularity": "heads"}, Plain, "head"),
    ({"kind": "prune", "pruning_ratio": 0.01}, Plain, "removes no channel"),
    ({"kind": "prune", **HALF, "round_to": 16}, Plain, "round_to"),
    ({"kind": "prune", **HALF, "ignored_kinds": ["conv"]}, Plain, "no channel of any layer may be removed"),
    ({"kind": "prune", **HALF, "importance": "activation_apoz", "rated": "coupled"}, Plain, "'producers' only"),
    ({"kind": "sparsify", "layer_sparsity": {"conv*": 0.5}}, Plain, "layer_sparsity: 'conv*' matches none of the 3"),
    ({"kind": "sparsify", "sparsity": 0.5, "importance_options": {"q": 1}}, Plain, "has no option 'q'"),
    ({"kind": "sparsify", "sparsity": 0.5, "importance_options": {"p": 0}}, Plain, "p must be above 0"),
    ({"kind": "sparsify", "sparsity": 0.0001}, Plain, "0 of 3 layers changed"),
    ({"kind": "sparsify", "pattern": "n_m", "n_m": [1, 7]}, Plain, "no multiple of 7"),
    ({"kind": "sparsify", "sparsity": 0.5, "ignored_kinds": ["conv", "linear"]}, Plain, "no layer may be masked"),
]


@pytest.mark.parametrize(("stage", "part", "words"), FOUND_BEFORE)
def test_what_does_not_fit_the_model(
    backend: Backend, stage: dict[str, Any], part: type[Part], words: str, tmp_path: Path
) -> None:
    assert words in refused(backend, [stage], tmp_path, part)


class Added(Part):
    """Two convolutions whose outputs are added: one channel group."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.act, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(4, 4), nn.Linear(32, 2)

    def forward(self, x: Any) -> Any:
        return self.last(self.nn.flatten(self.pool(self.act(self.a(x) + self.b(x))), 1))


def test_unlike_ratios_in_one_group(backend: Backend, tmp_path: Path) -> None:
    stage = {"kind": "prune", "layer_ratios": {"a": 0.5, "b": 0.25}}
    text = refused(backend, [stage], tmp_path, Added)
    assert "these layers share their channels but have unlike ratios: 'a' 0.5, 'b' 0.25" in text


@pytest.mark.parametrize("stage", [{"kind": "prune", **HALF}, {"kind": "sparsify", "sparsity": 0.5}])
def test_weights_that_are_not_finite(backend: Backend, stage: dict[str, Any], tmp_path: Path) -> None:
    model = net(backend)
    weight = backend.read(model)["b.weight"]
    weight[1, 2, 0, 0] = np.nan
    backend.write(model, {"b.weight": weight}, partial=True)
    assert "not finite" in refused(backend, [stage], tmp_path, model=model)


def test_masks_that_add_nothing_to_earlier_ones(backend: Backend, tmp_path: Path) -> None:
    first = {"kind": "sparsify", "sparsity": 0.5, "finetune": TRAIN}
    text = refused(backend, [first, {"kind": "prune", **HALF}, {**first, "sparsity": 0.3}], tmp_path)
    assert "as before: ask for a higher sparsity" in text


def test_more_rounds_than_channels(backend: Backend, tmp_path: Path) -> None:
    """Each round that would train for nothing is named."""
    stage = {"kind": "prune", **HALF, "steps": 8, "finetune": TRAIN}
    with pytest.raises(PlanError) as caught:
        sb.compress(net(backend, NoNorm), {"stages": [stage]}, data=DATA, run_dir=tmp_path / "run")
    assert caught.value.findings[0].startswith("plan 'plan': stages[0]: pruning_ratio 0.0625 removes no channel")
    assert all("removes no channel" in line for line in caught.value.findings)
    assert not (tmp_path / "run").exists()


def test_labels_are_looked_at_for_evidence(backend: Backend, tmp_path: Path) -> None:
    """Labels that are no classes of the model are found though only the importance looks at them."""
    wrong = Split(DATA.train.inputs, DATA.train.targets + 5)
    stage = {"kind": "prune", **HALF, "importance": "taylor"}
    data = Data(wrong, DATA.test)
    with pytest.raises(sb.SlimbridgeError, match=r"label") as caught:
        sb.compress(net(backend), {"stages": [stage]}, data=data, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(str(caught.value).splitlines()) == 1


def test_two_mistakes_of_two_stages_are_told_together(backend: Backend, tmp_path: Path) -> None:
    stages = [{"kind": "prune", **HALF, "ignored_layers": ["x"]}, {"kind": "sparsify", "layer_sparsity": {"y": 0.5}}]
    with pytest.raises(PlanError) as caught:
        sb.compress(net(backend), {"stages": stages}, data=DATA, run_dir=tmp_path / "run")
    assert [line.split(":")[1].strip() for line in caught.value.findings] == ["stages[0]", "stages[1]"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", [Attention, UpAndGroups])
def test_other_patterns_name_what_stays(backend: Backend, part: type[Part], tmp_path: Path) -> None:
    stage = {"kind": "prune", **HALF, "ignored_layers": ["*"]}
    assert "no channel of any layer may be removed" in refused(backend, [stage], tmp_path, part)
