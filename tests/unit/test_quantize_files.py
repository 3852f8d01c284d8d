"""Weight files that hold integers: every kind of grid reads back equal, and damage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from slimbridge.decisions import QuantizeDecision, decision_to_json, load_decision
from slimbridge.errors import RunError
from slimbridge.parity import differing
from slimbridge.plan.registries import Scheme
from slimbridge.ports import Array
from slimbridge.quantize import grid_of, integer_weights, limits_of, real_weights
from slimbridge.weights import load_stored, load_weights, save_weights

GRIDS: dict[str, tuple[int | None, int | None, bool, int]] = {
    "channel": (0, None, True, 8),
    "tensor": (None, None, True, 8),
    "group": (0, 6, True, 8),
    "channel, asymmetric": (0, None, False, 8),
    "tensor, asymmetric": (None, None, False, 8),
    "group, asymmetric": (0, 3, False, 4),
    "channel, 2 bits": (0, None, True, 2),
}


def decided(weight: Array, axis: int | None, group: int | None, symmetric: bool, bits: int) -> QuantizeDecision:
    grid = grid_of(*limits_of(weight, axis, group), Scheme(bits, symmetric, weight=True), axis, group)
    return QuantizeDecision(observer="absmax", mode="weight_only", weights={"w": grid})


def stored(path: Path, weight: Array, decision: QuantizeDecision) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a file of the weight and a bias reads back as, and what was put in."""
    put = {"b": np.ones(2, np.float32), **real_weights(decision, integer_weights(decision, {"w": weight}))}
    save_weights(path, put, decision)
    return load_weights(path), put


@pytest.mark.parametrize("name", GRIDS)
def test_it_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(0.1, 1, (4, 2, 3, 3)).astype(np.float32)
    decision = decided(weight, *GRIDS[name])
    back, put = stored(tmp_path / "w", weight, decision)
    assert differing(back, put) == 0
    raw = load_stored(tmp_path / "w")
    assert raw["w"].dtype == np.int8
    assert np.array_equal(raw["w"], integer_weights(decision, {"w": weight})["w"])
    assert np.array_equal(raw["w:step"], np.float32(decision.weights["w"].step))
    assert ("w:zero_point" in raw) == ("asymmetric" in name)


@given(st.integers(0, 10**6), st.sampled_from(sorted(GRIDS)), st.floats(2.0**-40, 2.0**40))
def test_it_reads_back_whatever_the_weights(tmp_path_factory: Any, seed: int, name: str, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(rng.normal(), 1, (2, 6)) * scale).astype(np.float32)
    weight[0] *= rng.integers(0, 2)
    path = tmp_path_factory.getbasetemp() / "any"
    assert differing(*stored(path, weight, decided(weight, *GRIDS[name]))) == 0


def test_it_is_about_a_quarter(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    save_weights(tmp_path / "int8", {"w": weight}, decided(weight, *GRIDS["channel"]))
    save_weights(tmp_path / "float", {"w": weight})
    sizes = [(tmp_path / name).stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.3 * sizes[1]


def test_the_decision_reads_back_equal(tmp_path: Path) -> None:
    decision = decided(np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32), *GRIDS["group"])
    (tmp_path / "d.json").write_text(decision_to_json(decision))
    assert load_decision(tmp_path / "d.json") == decision


INTEGERS = np.ones((4, 6), np.int8)
STEPS, ZEROS = np.ones(4, np.float32), np.ones(4, np.int8)
DAMAGED: list[tuple[dict[str, Array], str]] = [
    ({"w:step": STEPS}, "'w:step' belongs to no weight"),
    ({"w": INTEGERS, "v:step": STEPS}, "'v:step' belongs to no weight"),
    ({"w": INTEGERS, "w:zero_point": ZEROS}, "'w:zero_point' belongs to no weight"),
    ({"w": INTEGERS, "w:step": np.ones(5, np.float32)}, "the steps of 'w' do not fit its shape (4, 6)"),
    ({"w": INTEGERS, "w:step": np.ones(0, np.float32)}, "the steps of 'w' do not fit"),
    ({"w": INTEGERS, "w:step": np.ones((4, 1), np.float32)}, "the steps of 'w' do not fit"),
    ({"w": INTEGERS, "w:step": STEPS, "w:zero_point": np.ones(3, np.int8)}, "'w' has 4 steps and 3 zero points"),
    ({"w": INTEGERS, "w:step": STEPS, "w:zero_point": np.ones((1, 4), np.int8)}, "do not fit"),
]


@pytest.mark.parametrize(("arrays", "words"), DAMAGED)
def test_damaged_files(arrays: dict[str, Array], words: str, tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "w")
    with pytest.raises(RunError) as caught:
        load_weights(tmp_path / "w")
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'w'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    weight = np.ones((4, 6), np.float32)
    save_weights(tmp_path / "w", {"w": weight}, decided(weight, *GRIDS["channel"]))
    content = (tmp_path / "w").read_bytes()
    for length in (0, 7, 20, len(content) - 1):
        (tmp_path / "w").write_bytes(content[:length])
        with pytest.raises(RunError, match=r"not a weight file"):
            load_weights(tmp_path / "w")
