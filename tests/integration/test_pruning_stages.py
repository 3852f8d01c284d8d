"""What goes on inside stages that prune: training that prepares, sensitivity curves, other toolkits' pruners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge import prune_stages
from slimbridge.decisions import PruneDecision
from slimbridge.ports import Array, Backend
from slimbridge.prune import Pruner, remove_count
from slimbridge.prune.sensitivity import ratios_for_loss
from slimbridge.prune.soft import SoftPruning
from slimbridge.prune.target import CLOSE
from slimbridge.runfolder import RunFolder
from slimbridge.tasks import Data
from tests.integration.small_nets import DATA, TRAIN, Attention, Plain, net, other, outputs, steady_latency

LONG = {**TRAIN, "epochs": 6, "schedule": "constant"}
Seen = tuple[dict[str, Array], PruneDecision]


def compress(backend: Backend, stages: list[dict[str, Any]], **more: Any) -> sb.Result:
    return sb.compress(more.pop("model", None) or net(backend), {"stages": stages}, data=DATA, **more)


# Training that prepares


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The weights that a stage decided on, and the decision."""
    found: list[Seen] = []

    class Watched(Pruner):
        def prune(self, backend: Any, model: Any, example: Any) -> Any:
            pruned, decision = super().prune(backend, model, example)
            found.append((backend.read(model), decision))
            return pruned, decision

    monkeypatch.setattr(prune_stages, "Pruner", Watched)
    return found


def share_of_those_that_go(seen: Seen, layer: str, norm: str = "") -> float:
    """Mean norm of the filters (or normalisation scales) that go, as a share of that of the others."""
    weights, decision = seen
    (group,) = [group for group in decision.groups if group.layers == (layer,)]
    rows = weights[f"{norm or layer}.weight"].reshape(group.channels, -1).astype(np.float64)
    sizes = np.linalg.norm(rows, axis=1)
    goes = np.isin(np.arange(group.channels), group.removed)
    return float(sizes[goes].mean() / sizes[~goes].mean())


PREPARED = [
    ("growing", 0.3, {}, ""),
    ("group_lasso", 0.02, {}, ""),
    ("bn_slimming", 0.05, {"importance": "bn_scale"}, "n"),
]


@pytest.mark.parametrize(("method", "strength", "more", "norm"), PREPARED)
def test_what_goes_was_made_small(
    backend: Backend, seen: list[Seen], method: str, strength: float, more: dict[str, Any], norm: str
) -> None:
    """Against the same training with a penalty of next to nothing."""
    for factor in (strength, 1e-9):
        preparation = {"method": method, "strength": factor, "train": LONG}
        stage = {"kind": "prune", "pruning_ratio": 0.5, "preparation": preparation, **more}
        record = compress(backend, [stage]).report.stages[1]
        assert [set(epoch.terms) for epoch in record.epochs] == [{"hard_labels", "penalty"}] * LONG["epochs"]
    with_penalty, without = seen
    for layer in ("a", "b"):
        found, plain = (share_of_those_that_go(s, layer, norm and norm + layer) for s in (with_penalty, without))
        assert found < plain, layer


def test_soft_pruning_zeroes_and_lets_grow_again(
    backend: Backend, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroed: list[list[int]] = []

    class Watched(SoftPruning):
        def __call__(self, model: Any, optimizer: Any, step: int, steps: int) -> None:
            super().__call__(model, optimizer, step, steps)
            if step % steps == 0:
                rows = backend.read(model)["b.weight"].reshape(10, -1)
                zeroed.append(np.flatnonzero(~rows.any(axis=1)).tolist())

    monkeypatch.setattr(prune_stages, "SoftPruning", Watched)
    preparation = {"method": "soft", "train": LONG}
    compress(backend, [{"kind": "prune", "pruning_ratio": 0.5, "preparation": preparation}])
    assert [len(rows) for rows in zeroed] == [5] * LONG["epochs"]
    weights, decision = seen[0]
    rows = weights["b.weight"].reshape(10, -1)
    assert rows[zeroed[-1]].any(), "what was zeroed has grown again, but for filters behind a ReLU that is silent"
    assert len(decision.groups[1].removed) == 5


MEASURED: list[dict[str, Any]] = [
    {"target": {"of": "latency", "remove": 0.2}},
    {"sensitivity": {"ratios": (0.3, 0.6), "max_loss": 0.9}},
]
KNOWN: list[dict[str, Any]] = [
    {"target": {"of": "macs", "remove": 0.4}},
    {"pruning_ratio": 0.5, "importance": "taylor"},
    {"pruning_ratio": 0.5, "steps": 2, "finetune": TRAIN},
]


@pytest.mark.parametrize(
    ("method", "amount"),
    [(method, amount) for method in ("soft", "growing") for amount in KNOWN]
    + [(method, amount) for method in ("group_lasso", "bn_slimming") for amount in MEASURED],
)
def test_preparation_goes_with_every_amount(
    backend: Backend, method: str, amount: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_stages, "measure_latency", steady_latency)
    preparation = {"method": method, "strength": 0.1, "train": TRAIN}
    result = compress(backend, [{"kind": "prune", "preparation": preparation, **amount}])
    assert result.report.stages[-1].parameters < result.report.stages[0].parameters
    trained = [len(record.epochs) for record in result.report.stages[1:]]
    assert trained == ([2, 1] if "steps" in amount else [1]), "only the first round is prepared"


def test_ignored_layers_are_not_made_small(backend: Backend, seen: list[Seen]) -> None:
    preparation = {"method": "bn_slimming", "strength": 0.5, "train": LONG}
    for ignored in (["a"], []):
        stage = {"kind": "prune", "pruning_ratio": 0.5, "preparation": preparation, "ignored_layers": ignored}
        compress(backend, [stage])
    scales = [np.abs(weights["na.weight"]).mean() for weights, _ in seen]
    assert scales[0] > scales[1]


@pytest.mark.parametrize("method", ["soft", "growing", "group_lasso"])
def test_heads_are_prepared(backend: Backend, method: str) -> None:
    preparation = {"method": method, "strength": 0.1, "train": TRAIN}
    stage = {"kind": "prune", "pruning_ratio": 0.5, "granularity": "heads", "preparation": preparation}
    result = compress(backend, [stage], model=net(backend, Attention))
    assert backend.read(result.model)["proj.weight"].shape == (16, 8)


@pytest.mark.parametrize("method", ["soft", "growing"])
@pytest.mark.parametrize("amount", MEASURED)
def test_what_must_be_known_beforehand_cannot_be_measured_afterwards(method: str, amount: dict[str, Any]) -> None:
    stage = {"kind": "prune", "preparation": {"method": method, "train": TRAIN}, **amount}
    with pytest.raises(sb.SlimbridgeError, match=r"know beforehand what goes"):
        sb.load_plan({"stages": [stage]})


# Sensitivity curves


class Counting:
    """Accuracy that knows how often it was asked, and may be killed."""

    __qualname__ = "Counting"

    def __init__(self, dies_at: int = 0) -> None:
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, outputs: Array, targets: Array) -> float:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return float((outputs.argmax(1) == targets).mean())


RATIOS = (0.2, 0.5, 0.8)
SENSITIVE = {"kind": "prune", "sensitivity": {"ratios": RATIOS, "max_loss": 0.15}}


def test_ratios_come_from_the_curves(backend: Backend, tmp_path: Path) -> None:
    result = compress(backend, [SENSITIVE], run_dir=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    found = folder.record("01-prune").sensitivity
    assert found is not None
    assert found == result.report.stages[1].sensitivity
    assert found.metric == folder.record("00-baseline").metric
    assert [(curve.layers, curve.channels, tuple(curve.points)) for curve in found.curves] == [
        (("a",), 12, RATIOS),
        (("b",), 10, RATIOS),
    ]
    ratios = ratios_for_loss(found, 0.15)
    decision = folder.decision("01-prune")
    assert isinstance(decision, PruneDecision)
    for group in decision.groups:
        assert len(group.removed) == remove_count(group.channels, ratios[group.layers[0]])
    assert not (tmp_path / "run/under-way").exists()
    stored = json.loads((tmp_path / "run/report.json").read_text())
    assert stored["stages"][1]["sensitivity"]["curves"][0]["points"]


def test_points_are_what_pruning_that_group_alone_gives(backend: Backend) -> None:
    """Checked by pruning each layer by itself, in runs of their own."""
    curves = compress(backend, [SENSITIVE]).report.stages[1].sensitivity.curves
    for curve in curves:
        for ratio, metric in curve.points.items():
            alone = compress(backend, [{"kind": "prune", "layer_ratios": {curve.layers[0]: ratio}}])
            assert alone.report.stages[1].metric == metric


def test_a_target_by_sensitivity(backend: Backend) -> None:
    stage = {"kind": "prune", "sensitivity": {"ratios": (0.4, 0.8)}, "target": {"of": "parameters", "remove": 0.5}}
    result = compress(backend, [stage], model=net(backend, Plain, 40, 30))
    before, after = (record.parameters for record in result.report.stages)
    assert abs(1 - after / before - 0.5) <= CLOSE


def test_a_target_by_sensitivity_against_the_initial_model(backend: Backend) -> None:
    curves = {"sensitivity": {"ratios": (0.4, 0.9)}, "target": {"of": "macs", "remove": 0.6}}
    stages = [{"kind": "prune", "pruning_ratio": 0.3}, {"kind": "prune", "relative_to": "initial", **curves}]
    result = compress(backend, stages, model=net(backend, Plain, 40, 30))
    macs = [record.macs for record in result.report.stages]
    assert abs(1 - macs[2] / macs[0] - 0.6) <= CLOSE


@pytest.mark.parametrize("loader", [False, True])
def test_only_some_samples_are_measured(backend: Backend, loader: bool) -> None:
    sizes = set[int]()

    def metric(outputs: Array, targets: Array) -> float:
        sizes.add(len(targets))
        return float((outputs.argmax(1) == targets).mean())

    test = DATA.test
    parts = [(test.inputs[start : start + 8], test.targets[start : start + 8]) for start in range(0, 32, 8)]
    data = Data(DATA.train, parts if loader else test)
    stage = {"kind": "prune", "sensitivity": {"ratios": (0.5,), "max_loss": 0.9, "samples": 12}}
    result = sb.compress(net(backend), {"stages": [stage]}, data=data, metric=metric)
    assert sizes == {32, 12}
    assert result.report.stages[1].sensitivity.samples == 12


def test_killed_while_measuring_no_point_is_measured_twice(backend: Backend, tmp_path: Path) -> None:
    whole = Counting()
    unbroken = compress(backend, [SENSITIVE], metric=whole)
    # The baseline's record, the unpruned metric, six points, the stage's record.
    assert whole.calls == 9
    first = Counting(dies_at=6)
    with pytest.raises(KeyboardInterrupt):
        compress(backend, [SENSITIVE], metric=first, run_dir=tmp_path / "run")
    (kept,) = (tmp_path / "run/under-way").iterdir()
    assert sum(len(curve["points"]) for curve in json.loads(kept.read_text())["curves"]) == 3
    second = Counting()
    resumed = compress(backend, [SENSITIVE], metric=second, run_dir=tmp_path / "run", resume=True)
    assert first.calls - 1 + second.calls == whole.calls
    assert resumed.report.stages[1].sensitivity == unbroken.report.stages[1].sensitivity
    assert resumed.report.stages[1].weights_digest == unbroken.report.stages[1].weights_digest


@pytest.mark.parametrize("trained", [False, True])
def test_another_plan_in_the_middle_of_measuring(backend: Backend, tmp_path: Path, trained: bool) -> None:
    """Refused where a training would be lost; otherwise the run begins anew, without the old curves."""
    baseline = {"train": TRAIN} if trained else {}
    plan = {"baseline": baseline, "stages": [SENSITIVE]}
    with pytest.raises(KeyboardInterrupt):
        sb.compress(net(backend), plan, data=DATA, metric=Counting(dies_at=5), run_dir=tmp_path / "run")
    mended = {"baseline": baseline, "stages": [{**SENSITIVE, "importance": "l2_norm"}]}
    again: dict[str, Any] = {"data": DATA, "metric": Counting(), "run_dir": tmp_path / "run", "resume": True}
    if trained:
        with pytest.raises(sb.SlimbridgeError, match=r"its plan differs in stages"):
            sb.compress(net(backend), mended, **again)
        return
    result = sb.compress(net(backend), mended, **again)
    assert result.report.stages[1].sensitivity.importance == "l2_norm"
    assert again["metric"].calls == 9


# Other toolkits


NATIVE = [
    ("torch", "prune", "torch_pruning.magnitude"),
    ("torch", "sparsify", "torch.l1_unstructured"),
    ("paddle", "prune", "paddleslim.L1NormFilterPruner"),
    ("paddle", "sparsify", "paddleslim.UnstructuredPruner"),
]
AMOUNTS = {"prune": "pruning_ratio", "sparsify": "sparsity"}


@pytest.mark.parametrize(("name", "kind", "pruner"), NATIVE)
def test_another_toolkits_pruner_is_a_stage(name: str, kind: str, pruner: str, tmp_path: Path) -> None:
    backend = sb.get_backend(name)
    native = {"kind": kind, "engine": "native", "native": {"pruner": pruner}, AMOUNTS[kind]: 0.5, "finetune": TRAIN}
    result = compress(backend, [native, {"kind": "finetune", "train": TRAIN}], run_dir=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    decision = folder.decision(f"01-{kind}")
    assert decision.importance == pruner
    weights = folder.weights("02-finetune")
    if isinstance(decision, PruneDecision):
        assert (weights["a.weight"].shape[0], weights["b.weight"].shape[0]) == (6, 5)
    else:
        for key, mask in decision.masks.items():
            assert np.array_equal(weights[key] == 0, ~mask.array()), key
    there = other(backend)
    again = there.read(sb.restore(net(there), tmp_path / "run"))
    assert all(np.array_equal(array, again[key]) for key, array in backend.read(result.model).items())
    assert outputs(sb.restore(net(backend), tmp_path / "run")).tolist() == outputs(result.model).tolist()


@pytest.mark.parametrize(
    ("name", "kind", "pruner", "words"),
    [
        ("torch", "prune", "torch_pruning.magnitud", "torch_pruning.magnitude"),
        ("torch", "prune", "paddleslim.L1NormFilterPruner", "torch_pruning.magnitude"),
        ("paddle", "sparsify", "torch.l1_unstructured", "paddleslim.UnstructuredPruner"),
        ("torch", "prune", "torch.l1_unstructured", "use kind: sparsify"),
        ("torch", "sparsify", "torch_pruning.magnitude", "use kind: prune"),
        ("paddle", "sparsify", "paddleslim.L1NormFilterPruner", "use kind: prune"),
    ],
)
def test_a_wrong_pruner_gets_the_list(name: str, kind: str, pruner: str, words: str, tmp_path: Path) -> None:
    stage = {"kind": kind, "engine": "native", "native": {"pruner": pruner}, AMOUNTS[kind]: 0.5}
    with pytest.raises(sb.SlimbridgeError) as caught:
        compress(sb.get_backend(name), [stage], run_dir=tmp_path / "run")
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()
