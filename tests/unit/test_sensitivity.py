"""Sensitivity curves: measured once, kept, and turned into ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.curves import GroupCurve, Sensitivity
from slimbridge.errors import ModelError, RunError
from slimbridge.parity.tolerances import tolerance
from slimbridge.prune.sensitivity import (
    SensitivityJob,
    loss_for_target,
    measure,
    ratios_for_loss,
    ratios_for_target,
    read_sensitivity,
)

RATIOS = (0.1, 0.2, 0.5)
EXACT = tolerance("operation_float64").value


def group(layer: str, channels: int) -> Any:
    """What is read of a channel group."""
    return SimpleNamespace(layers=(layer,), units=np.arange(channels))


@dataclass
class Bench:
    """A metric that falls with the sum of the removed positions, and a count of how often it was asked for."""

    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    unpruned: float = 0.8
    dies_after: int = 10**6

    def job(self, **changes: Any) -> SensitivityJob:
        job = SensitivityJob(
            groups=(group("conv1", 10), group("conv2", 4)),
            ratios=RATIOS,
            importance="l1_norm",
            samples=32,
            weights_digest="ab",
            definition="cd",
            choose=self.choose,
            metric_of=self.metric,
            baseline=lambda: self.unpruned,
        )
        return replace(job, **changes)

    def choose(self, index: int, ratio: float) -> Sequence[int]:
        return range(round((10, 4)[index] * ratio))

    def metric(self, index: int, ratio: float) -> float:
        positions = self.choose(index, ratio)
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append((index, tuple(positions)))
        return self.unpruned - 0.01 * sum(positions)


def curves(*points: Mapping[float, float], metric: float = 1.0) -> Sensitivity:
    found = (GroupCurve(layers=(f"layer{i}",), channels=64, points=dict(p)) for i, p in enumerate(points))
    return Sensitivity(
        importance="l1_norm", metric=metric, samples=1, weights_digest="", definition="", curves=tuple(found)
    )


# Measuring


def test_each_set_of_channels_is_evaluated_once() -> None:
    """0.1 of four channels is none: the unpruned metric; 0.2 of them is one."""
    bench = Bench()
    found = measure(bench.job(), None)
    assert bench.asked == [(0, (0,)), (0, (0, 1)), (0, (0, 1, 2, 3, 4)), (1, (0,)), (1, (0, 1))]
    assert found.metric == 0.8
    assert [curve.layers for curve in found.curves] == [("conv1",), ("conv2",)]
    assert [curve.channels for curve in found.curves] == [10, 4]
    assert found.curves[0].points == {0.1: 0.8, 0.2: 0.8 - 0.01, 0.5: 0.8 - 0.1}
    assert found.curves[1].points == {0.1: 0.8, 0.2: 0.8, 0.5: 0.8 - 0.01}


@pytest.mark.parametrize("dies_after", range(5))
def test_a_killed_measurement_goes_on_where_it_was(tmp_path: Path, dies_after: int) -> None:
    path = tmp_path / "curves.json"
    whole = measure(Bench().job(), None)
    bench = Bench(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        measure(bench.job(), path)
    again = Bench()
    assert measure(again.job(), path) == whole
    assert len(bench.asked) + len(again.asked) == 5
    assert read_sensitivity(path) == whole
    assert list(tmp_path.iterdir()) == [path]
    third = Bench()
    assert measure(third.job(), path) == whole
    assert third.asked == []


def test_more_ratios_take_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    measure(Bench().job(), path)
    bench = Bench()
    found = measure(bench.job(ratios=(*RATIOS, 0.8)), path)
    assert bench.asked == [(0, tuple(range(8))), (1, (0, 1, 2))]
    assert list(found.curves[0].points) == [*RATIOS, 0.8]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weights_digest": "other"}, "weights_digest"),
        ({"definition": "other"}, "definition"),
        ({"importance": "fpgm"}, "importance"),
        ({"samples": 64}, "samples"),
        ({"groups": (group("conv1", 10),)}, "channel groups"),
        ({"ratios": (0.1,)}, "ratios"),
    ],
)
def test_points_of_something_else_are_not_lost(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = tmp_path / "curves.json"
    measure(Bench().job(), path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"curves\.json: holds other sensitivity curves: they differ in {word}"):
        measure(Bench().job(**changes), path)
    assert path.read_bytes() == before


def test_a_file_without_points_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    path.write_text(measure(Bench().job(ratios=()), None).model_dump_json())
    assert measure(Bench().job(weights_digest="other"), path).weights_digest == "other"


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"importance": "l1_norm"', b"\xff\xfe", b'{"metric": 1}'])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "curves.json"
    path.write_bytes(damage)
    with pytest.raises(RunError, match=r"curves\.json: not sensitivity curves, or damaged"):
        measure(Bench().job(), path)
    assert path.read_bytes() == damage


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    measure(Bench().job(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"curves\.json"):
        measure(Bench().job(), path)


@pytest.mark.parametrize("metric", [0.0, -1.0, float("nan"), float("inf")])
def test_a_metric_without_shares(metric: float) -> None:
    with pytest.raises(ModelError, match="share of the unpruned model's metric, and that is"):
        measure(Bench(unpruned=metric).job(), None)


def test_each_point_is_told() -> None:
    told: list[tuple[int, int]] = []
    measure(Bench().job(progress=lambda *counts: told.append(counts)), None)
    assert told == [(done, 6) for done in range(1, 7)]


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    measure(Bench().job(), tmp_path / "curves.json")
    values = json.loads((tmp_path / "curves.json").read_text())
    assert values["curves"][1] == {"layers": ["conv2"], "channels": 4, "points": {"0.1": 0.8, "0.2": 0.8, "0.5": 0.79}}


# From curves to ratios

SHARES = st.floats(0.0, 1.0)
LOSSES = st.lists(st.floats(-0.2, 1.0), min_size=1, max_size=6)


def with_losses(*lines: Sequence[float], metric: float = 1.0) -> Sensitivity:
    """Losses at ratios 0.1, 0.2, ..."""
    return curves(
        *({(i + 1) / 10: metric * (1 - loss) for i, loss in enumerate(line)} for line in lines), metric=metric
    )


@given(lines=st.lists(LOSSES, min_size=1, max_size=3), loss=SHARES)
def test_between_tried_ratios_losses_lie_on_straight_lines(lines: list[list[float]], loss: float) -> None:
    """Against NumPy's interpolation of the curve that never falls."""
    found = with_losses(*lines)
    for curve, ratio in zip(found.curves, ratios_for_loss(found, loss).values(), strict=True):
        tried = np.array([0.0, *curve.points])
        line = np.maximum.accumulate([0.0, *(1.0 - value for value in curve.points.values())])
        assert 0 <= ratio <= tried[-1]
        assert np.interp(ratio, tried, line) <= loss + EXACT
        further = np.linspace(ratio, tried[-1], 7)[1:]
        if ratio < tried[-1]:
            assert np.all(np.interp(further, tried, line) > loss - EXACT)


@given(lines=st.lists(LOSSES, min_size=1, max_size=3), one=SHARES, other=SHARES)
def test_a_larger_loss_never_gives_a_smaller_ratio(lines: list[list[float]], one: float, other: float) -> None:
    found = with_losses(*lines)
    less, more = (ratios_for_loss(found, loss) for loss in sorted((one, other)))
    assert all(less[layer] <= more[layer] for layer in less)


@pytest.mark.parametrize(
    ("line", "loss", "ratio"),
    [
        ([0.0, 0.5, 1.0], 0.25, 0.15),
        ([0.25, 0.5], 0.125, 0.05),  # from loss 0 at ratio 0
        ([0.25, 0.0, 0.0], 0.125, 0.05),  # the dip behind the first crossing is not trusted
        ([-0.5, -0.25, 0.5], 0.0, 0.2),  # a gain is no loss
        ([0.25, 0.25, 0.75], 0.25, 0.2),
        ([0.0, 0.0, 0.0], 0.0, 0.3),
        ([0.5], 1.0, 0.1),
    ],
)
def test_known_ratios(line: list[float], loss: float, ratio: float) -> None:
    assert ratios_for_loss(with_losses(line), loss)["layer0"] == pytest.approx(ratio, rel=EXACT)


@given(line=LOSSES, metric=st.floats(0.01, 100), loss=SHARES)
def test_the_loss_is_a_share_whatever_the_metric_counts(line: list[float], metric: float, loss: float) -> None:
    """Powers of two, so that scaling the metric rounds nothing."""
    scale = 2.0 ** np.round(np.log2(metric))
    one, scaled = with_losses(line), with_losses(line, metric=float(scale))
    assert ratios_for_loss(one, loss)["layer0"] == ratios_for_loss(scaled, loss)["layer0"]


# The search for a target

SIZES = (400.0, 100.0, 1300.0)


def cost(ratios: Mapping[str, float]) -> float:
    """Share of 64 whole channels a layer, as a model has them; neither smooth nor linear."""
    kept = [1 - round(64 * ratio) / 64 for ratio in ratios.values()]
    whole = sum(SIZES[: len(kept)])
    return 1 - sum(size * share**2 for size, share in zip(SIZES, kept, strict=False)) / whole


@given(lines=st.lists(LOSSES, min_size=1, max_size=3), wanted=st.floats(0.0, 0.6))
def test_the_target_is_reached_as_near_as_any_loss_comes(lines: list[list[float]], wanted: float) -> None:
    found = with_losses(*lines)
    if cost({curve.layers[0]: max(curve.points) for curve in found.curves}) < wanted:
        with pytest.raises(ModelError, match="the largest ratios that were tried remove"):
            loss_for_target(found, cost, wanted)
        return
    reached = abs(cost(ratios_for_loss(found, loss_for_target(found, cost, wanted))) - wanted)
    others = [abs(cost(ratios_for_loss(found, loss)) - wanted) for loss in np.linspace(0, 1, 200)]
    assert reached <= min(others) + EXACT


def test_a_loss_that_is_met_exactly_is_found() -> None:
    found = with_losses([0.1, 0.2, 0.3, 0.4])
    loss = loss_for_target(found, lambda ratios: ratios["layer0"], 0.25)
    assert ratios_for_loss(found, loss)["layer0"] == pytest.approx(0.25, rel=tolerance("operation").value)


def test_ratios_that_lose_nothing_are_lowered_to_the_target() -> None:
    found = with_losses([0.0, 0.0, 0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.5])
    assert loss_for_target(found, cost, 0.1) == 0.0
    ratios = ratios_for_target(found, cost, 0.1)
    assert ratios["layer0"] / ratios["layer1"] == pytest.approx(0.5 / 0.2, rel=EXACT)
    one_channel = 2 * 400 / 500 / 64
    assert abs(cost(ratios) - 0.1) < one_channel
    assert cost(ratios_for_loss(found, 0.0)) > 0.1 + one_channel


def test_the_error_says_what_can_be_had() -> None:
    with pytest.raises(ModelError, match=r"0\.9 is to be removed, the largest ratios that were tried remove 0\.1;"):
        loss_for_target(with_losses([0.1]), lambda ratios: ratios["layer0"], 0.9)
