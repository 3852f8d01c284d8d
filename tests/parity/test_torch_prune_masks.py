"""Masks are those of torch.nn.utils.prune on equal weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from slimbridge.plan.pruning import SparsifyStage
from slimbridge.ports import Array, Backend
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.sparsifier import Sparsifier

AMOUNTS = (0.1, 0.25, 0.5, 0.73, 0.95)


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    body = (nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 10, 3, groups=1), nn.Flatten(), nn.Linear(40, 9))
    return nn.Sequential(*body)


def masks(backend: Backend, model: nn.Module, **stage: Any) -> dict[str, Array]:
    made = Sparsifier(SparsifyStage.model_validate(stage), 0)
    decision = made.decide(backend.layers(model), None, backend.read(model), Evidence())
    return {name: mask.array() for name, mask in decision.masks.items()}


def theirs(model: nn.Module, names: Any) -> dict[str, Array]:
    modules = dict(model.named_modules())
    return {name: modules[name.split(".")[0]].weight_mask.bool().numpy() for name in names}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_l1_unstructured(torch_backend: Backend, amount: float, seed: int) -> None:
    model = model_of(seed)
    found = masks(torch_backend, model, sparsity=amount)
    for module in (model[0], model[2], model[4]):
        torch_prune.l1_unstructured(module, "weight", amount)
    wanted = theirs(model, found)
    assert all(np.array_equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_global_unstructured(torch_backend: Backend, amount: float, seed: int) -> None:
    model = model_of(seed)
    found = masks(torch_backend, model, sparsity=amount, selection="global")
    pairs = [(module, "weight") for module in (model[0], model[2], model[4])]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=amount)
    wanted = theirs(model, found)
    assert all(np.array_equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", AMOUNTS)
def test_ln_structured(torch_backend: Backend, amount: float, seed: int, norm: int) -> None:
    model = model_of(seed)
    options = {"importance_options": {"p": float(norm)}}
    found = masks(torch_backend, model, sparsity=amount, pattern="filters", **options)
    for module in (model[0], model[2], model[4]):
        torch_prune.ln_structured(module, "weight", amount, n=norm, dim=0)
    wanted = theirs(model, found)
    assert all(np.array_equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_second_cut_goes_on_from_the_first(torch_backend: Backend, amount: float) -> None:
    """Their container prunes a share of what is left; ours counts what is held, and gets the same entries."""
    model, half = model_of(5), nn.Sequential(*model_of(5))
    first = masks(torch_backend, model, sparsity=0.5)
    torch_prune.l1_unstructured(half[4], "weight", 180)
    further = round(360 * (0.5 + amount / 2)) - 180
    torch_prune.l1_unstructured(half[4], "weight", further)
    stage = SparsifyStage(sparsity=0.5 + amount / 2)
    layers, weights = torch_backend.layers(model), torch_backend.read(model)
    found = Sparsifier(stage, 0).decide(layers, None, weights, Evidence(), held=first).masks["4.weight"].array()
    assert np.array_equal(found, half[4].weight_mask.bool().numpy())
