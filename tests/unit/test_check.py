"""Checking a plan without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimbridge import zoo
from slimbridge.check import check
from slimbridge.discovery import get_backend, installed_backend
from slimbridge.plan import shipped_plans
from slimbridge.ports import Backend
from slimbridge.weights import save_weights

MODEL = {"name": "resnet18_small", "options": {"width": 8}}
PRUNE = {"kind": "prune", "pruning_ratio": 0.5}
FEATURE = {"loss": "l2_feature", "student": "layer4", "teacher": "layer4"}


def plan(*stages: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"stages": list(stages), "model": MODEL, "data": {"name": "digits"}, **rest}


def distill(*losses: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"kind": "distill", "losses": list(losses), "train": {"epochs": 1}, **rest}


@pytest.mark.parametrize("name", shipped_plans())
def test_a_shipped_plan_has_no_mistake(backend: Backend, name: str) -> None:
    assert check(name, backend.name) == []


def test_the_mistakes_of_a_plan_that_does_not_load() -> None:
    found = check({"stages": [], "sed": 1})
    assert len(found) == 2
    assert any("did you mean 'seed'" in line for line in found)


def test_mistakes_in_several_stages_come_at_once(backend: Backend) -> None:
    stages = (
        {**PRUNE, "ignored_layers": ["layer4.1.cnv2"]},
        distill({**FEATURE, "student": "layer5"}, {**FEATURE, "teacher": "lyer4"}),
        {"kind": "quantize", "ignored_layers": ["fcc"]},
    )
    first, second, third, fourth = check(plan(*stages), backend.name)
    assert first.startswith("stages[0]: ignored_layers: 'layer4.1.cnv2' matches none")
    assert "did you mean 'layer4.1.conv2'" in first
    assert second.startswith("stages[1].losses: student has no layer 'layer5' (did you mean 'layer")
    assert third == "stages[1].losses: teacher has no layer 'lyer4' (did you mean 'layer4'?)"
    assert fourth.startswith("stages[2]: ignored_layers: 'fcc' matches none")


def test_a_feature_whose_width_pruning_changes(torch_backend: Backend) -> None:
    """The student is pruned first; both shapes are named, and what to do."""
    (found,) = check(plan(PRUNE, distill(FEATURE)), "torch")
    assert found.startswith("stages[1]: distill: loss 'l2_feature'")
    assert "(32, 1, 1)" in found
    assert "(64, 1, 1)" in found
    assert check(plan({**PRUNE, "ignored_layers": ["layer4.1.conv2"]}, distill(FEATURE)), "torch") == []


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (
            {"model": {"name": "resnet81_small"}},
            "model: zoo model 'resnet81_small' is unknown (did you mean 'resnet18_small",
        ),
        ({"model": {**MODEL, "options": {"widht": 8}}}, "option 'widht' is unknown (did you mean 'width'?)"),
        ({"data": {"name": "digit"}}, "data: "),
        ({"data": {"name": "digits", "options": {"channels": 2}}}, "channels must be 1 or 3, found 2"),
        ({"data": {"name": "digits", "options": {"channels": 1}}}, "data does not fit the model: "),
    ],
)
def test_a_model_or_data_that_is_not_there(torch_backend: Backend, rest: dict[str, Any], words: str) -> None:
    found = check(plan(PRUNE, **rest), "torch")
    assert any(words in line for line in found), found
    assert all("\n" not in line for line in found)


def test_a_device_that_is_not_there(backend: Backend) -> None:
    devices = backend.capabilities().devices
    found = check(plan(PRUNE, device="gpu"), backend.name)
    if "gpu" in devices:
        assert found == []
    else:
        assert found == [f"device: 'gpu' is not there; {backend.name} has cpu"]


def test_a_backend_that_is_not_there() -> None:
    (found,) = check(plan(PRUNE), "pytorch")
    assert found == "backend: backend 'pytorch' is unknown (did you mean 'torch'?); registered: paddle, torch"


def test_weight_files_are_opened(torch_backend: Backend, tmp_path: Path) -> None:
    good, other, broken = tmp_path / "good", tmp_path / "other", tmp_path / "broken"
    save_weights(good, torch_backend.read(zoo.build("resnet18_small", torch_backend, width=8)))
    save_weights(other, {"w": np.zeros(3, np.float32)})
    broken.write_bytes(b"x")
    assert check(plan(PRUNE, baseline={"weights": str(good)}), "torch") == []
    for path in (other, broken, tmp_path / "none"):
        found = check(plan(PRUNE, baseline={"weights": str(path)}), "torch")
        assert len(found) == 1, found
        assert found[0].startswith("baseline.weights: ")
    teacher = {"model": MODEL, "weights": str(broken)}
    (line,) = check(plan(distill({"loss": "soft_labels"}, teacher=teacher)), "torch")
    assert line.startswith("stages[0].teacher.weights: ")


def test_a_check_writes_nothing(torch_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check("digits", "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_model_or_data_is_checked_as_far_as_it_goes(torch_backend: Backend) -> None:
    assert check({"stages": [PRUNE]}, "torch") == []
    assert check({"stages": [PRUNE], "model": MODEL}, "torch") == []


def test_without_a_name_the_first_installed_backend_is_taken() -> None:
    assert installed_backend() is get_backend("torch")
