"""The pruner: what it decides and removes, and its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from slimbridge.decisions import PruneDecision, decision_to_json, load_decision
from slimbridge.errors import ModelError
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend
from slimbridge.prune import Pruner, remove_count

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)


def decide(backend: Backend, model: Any, ratio: float = 0.5, **rest: Any) -> PruneDecision:
    stage = PruneStage(pruning_ratio=ratio, **rest)
    return Pruner(stage).decide(backend.trace(model, [X]), backend.read(model))


def plain(seed: int = 0, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.Flatten(), nn.Linear(16, 2))


# The channels that go


@pytest.mark.parametrize(("importance", "n"), [("l1_norm", 1), ("l2_norm", 2)])
@pytest.mark.parametrize("seed", range(5))
def test_the_channels_that_torch_would_zero(torch_backend: Backend, importance: str, n: int, seed: int) -> None:
    model = plain(seed, width=8)
    decision = decide(torch_backend, model, 0.5, importance=importance)
    removed = next(group.removed for group in decision.groups if group.layers == ("0",))
    layer = nn.Conv2d(3, 8, 3)
    layer.load_state_dict(model[0].state_dict())
    masked = torch_prune.ln_structured(layer, "weight", 0.5, n=n, dim=0).weight
    assert removed == tuple(torch.nonzero(masked.abs().sum((1, 2, 3)) == 0).ravel().tolist())


def test_equal_filters_go_by_index(torch_backend: Backend) -> None:
    model = plain(width=6)
    nn.init.ones_(model[0].weight)
    decision = decide(torch_backend, model)
    assert decision.groups[0].removed == (0, 1, 2)


# The pruner


class Joined(nn.Module):
    """Two layers joined, and their sum with a third: one group, of which each of the two holds a part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.fc((torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).mean((2, 3)))


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.95])
def test_no_layer_loses_all_its_channels(torch_backend: Backend, ratio: float) -> None:
    """Even where the whole of one layer matters less than any channel of the others."""
    model = Joined()
    with torch.no_grad():
        for layer in (model.a, model.c):
            layer.weight.mul_(1e-3)
        model.c.weight[:4].mul_(1e-3)
    pruned, decision = Pruner(PruneStage(pruning_ratio=ratio)).prune(torch_backend, model, [X])
    (choice,) = decision.groups
    assert choice.channels == 8
    assert len(choice.removed) == min(remove_count(8, ratio), 6)
    widths = {name: len(decision.kept.get(f"{name}.weight", {}).get(0, range(4))) for name in "ab"}
    assert min(widths.values()) == 1
    weight = np.abs(model.a.weight.detach().numpy()).mean((1, 2, 3)) + np.abs(model.c.weight.detach().numpy()[:4]).mean(
        (1, 2, 3)
    )
    assert decision.kept["a.weight"] == {0: (int(weight.argmax()),)}, "the most important one stays"
    assert torch_backend.forward(pruned, [X]).output.shape == (2, 2)


def test_what_is_kept_is_written_for_each_parameter(torch_backend: Backend) -> None:
    decision = decide(torch_backend, plain(), 0.5)
    gone = set(decision.groups[0].removed)
    assert decision.groups[0].channels == 6
    stays = tuple(index for index in range(6) if index not in gone)
    assert decision.kept["0.weight"] == {0: stays}
    assert decision.kept["2.weight"][1] == stays
    assert decision.sizes["0.weight"] == (6, 3, 3, 3)
    assert [skipped.layer for skipped in decision.skipped] == ["4"]


def test_a_decision_is_a_file(torch_backend: Backend, tmp_path: Any) -> None:
    decision = decide(torch_backend, plain())
    (tmp_path / "d.json").write_text(decision_to_json(decision))
    loaded = load_decision(tmp_path / "d.json")
    assert loaded == decision
    assert loaded.digest() == decision.digest()
    assert decide(torch_backend, plain(), 0.34).digest() != decision.digest()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(torch_backend: Backend, bad: float) -> None:
    model = plain()
    graph, weights = torch_backend.trace(model, [X]), torch_backend.read(model)
    weights["2.weight"][0, :2] = bad
    with pytest.raises(ModelError, match=r"layer '2': 2 of 24 entries of its weight are not finite"):
        Pruner(PruneStage(pruning_ratio=0.5)).decide(graph, weights)


def test_a_wrong_layer_name_gets_the_nearest(torch_backend: Backend) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shortcut, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return self.fc(self.shortcut(self.stem(x)).mean((2, 3)))

    with pytest.raises(ModelError) as caught:
        decide(torch_backend, Named(), ignored_layers=("shortcot",))
    assert str(caught.value).splitlines() == [
        "ignored_layers: 'shortcot' matches none of the 3 convolution and linear layers (did you mean 'shortcut'?); "
        "they are: stem, shortcut, fc"
    ]
    decision = decide(torch_backend, Named(), ignored_layers=("short*",))
    assert [group.layers for group in decision.groups] == [("stem",)]
    assert {item.layer: item.reason for item in decision.skipped}["shortcut"] == "ignored_layers names it"


def test_layers_tied_to_an_ignored_one_stay_and_say_so(torch_backend: Backend) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.c, self.fc = nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Any) -> Any:
            return self.fc(self.c(self.a(x) + self.b(x)).mean((2, 3)))

    decision = decide(torch_backend, Sum(), ignored_layers=("a",))
    assert [group.layers for group in decision.groups] == [("c",)]
    reasons = {item.layer: item.reason for item in decision.skipped}
    assert reasons["b"] == "its channels are tied to 'a': ignored_layers names it"


def test_a_ratio_that_removes_nothing_is_an_error(torch_backend: Backend) -> None:
    with pytest.raises(ModelError, match=r"pruning_ratio 0.05 removes no channel: the widest of 2 .* has 6 channels"):
        decide(torch_backend, plain(), 0.05)


def test_everything_ignored_is_an_error(torch_backend: Backend) -> None:
    with pytest.raises(ModelError, match=r"no channel of any layer may be removed"):
        decide(torch_backend, plain(), ignored_layers=("*",))


class Written(nn.Module):
    """A width written into the code: eight channels, whatever the layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        x = self.conv(self.stem(x)).mean((2, 3), keepdim=True)
        return self.fc(x.reshape(-1, 8))


class WrittenSplit(nn.Module):
    """Two halves of four channels each, written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Any) -> Any:
        left, right = torch.split(self.stem(x), [4, 4], dim=1)
        return self.fc(self.conv(left + right).mean((2, 3)))


@pytest.mark.parametrize(("model", "frozen", "free"), [(Written(), "conv", "stem"), (WrittenSplit(), "stem", "conv")])
def test_a_written_width_freezes_what_it_names(
    torch_backend: Backend, model: nn.Module, frozen: str, free: str
) -> None:
    """The first pruned copy does not run, or is wrong; the second plan leaves that layer and says why."""
    before = torch_backend.read(model)
    pruned, decision = Pruner(PruneStage(pruning_ratio=0.5)).prune(torch_backend, model, [X])
    assert [group.layers for group in decision.groups] == [(free,)]
    reasons = {item.layer: item.reason for item in decision.skipped}
    assert "written" in reasons[frozen]
    after = torch_backend.read(pruned)
    assert after[f"{frozen}.weight"].shape[0] == before[f"{frozen}.weight"].shape[0]
    assert after[f"{free}.weight"].shape[0] == before[f"{free}.weight"].shape[0] // 2
    assert torch_backend.forward(pruned, [X]).output.shape == (2, 2)
    assert all(np.array_equal(array, torch_backend.read(model)[name]) for name, array in before.items())


def test_a_model_that_runs_in_neither_way_is_an_error(torch_backend: Backend) -> None:
    class Stubborn(nn.Module):
        """A multiplication by the width that it was built with, hidden from the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Any) -> Any:
            x = self.conv(x)
            if x.shape[1] != 8:
                raise RuntimeError(f"expected 8 channels, got {x.shape[1]}")
            return self.fc(x.mean((2, 3)))

    with pytest.raises(ModelError, match=r"does not run.*expected 8 channels, got 4"):
        Pruner(PruneStage(pruning_ratio=0.5)).prune(torch_backend, Stubborn(), [X])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_the_open_interval_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"pruning_ratio"):
        PruneStage(pruning_ratio=ratio)


def test_importances_read_weights_alone(backend: Backend) -> None:
    """Equal weights on either framework, equal channels; a layer's bias has no say."""
    layers = backend.nn
    model = layers.Sequential(layers.Conv2d(3, 6, 3), layers.ReLU(), layers.Conv2d(6, 4, 1))
    weights: dict[str, Array] = {
        name: np.random.default_rng(8).standard_normal(array.shape).astype(np.float32)
        for name, array in backend.read(model).items()
    }
    first = decide(backend, backend.write(model, weights))
    weights["0.bias"] = np.full(6, 100.0, np.float32)
    assert decide(backend, backend.write(model, weights)).digest() == first.digest()
    order = np.argsort(np.abs(weights["0.weight"].astype(np.float64)).reshape(6, -1).mean(1), kind="stable")
    assert first.groups[0].removed == tuple(sorted(order[:3].tolist()))
