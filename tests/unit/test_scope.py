"""How many units a group had before, by the shapes that the model had then."""

from __future__ import annotations

import numpy as np
import pytest

from slimbridge.graph import find_units
from slimbridge.plan import PruneStage
from slimbridge.ports import Backend
from slimbridge.prune import Pruner
from slimbridge.prune.scope import units_before

IMAGE = np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", ["Conv2d", "ConvTranspose2d"])
def test_units_before_a_removal(torch_backend: Backend, layer: str, groups: int) -> None:
    nn = torch_backend.nn
    middle = getattr(nn, layer)(8, 12, 3, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(12, 2, 1))
    shapes = {name: array.shape for name, array in torch_backend.read(model).items()}
    whole = find_units(torch_backend.trace(model, [IMAGE]))
    sizes = [group.units.size for group in whole.groups()]
    pruned, _ = Pruner(PruneStage(pruning_ratio=0.5)).prune(torch_backend, model, [IMAGE])
    units = find_units(torch_backend.trace(pruned, [IMAGE]))
    assert [group.units.size for group in units.groups()] == [size // 2 for size in sizes]
    assert [units_before(units, group, shapes) for group in units.groups()] == sizes
    assert [units_before(units, group, {}) for group in units.groups()] == [size // 2 for size in sizes]
