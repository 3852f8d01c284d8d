"""Both shipped backends conform: one test for each case, so that a failure names the case."""

from __future__ import annotations

import pytest

# The modules register their cases when they are imported.
from slimbridge.conformance import (
    CASES,
    layers,
    masks,
    models,
    observation,
    operations,
    quantization,
    removals,
    run_conformance,
    surgery,
    tracing,
    training,
)
from slimbridge.conformance.suite import Bench, case
from slimbridge.ports import Backend, Device

MODULES = (layers, masks, models, observation, operations, quantization, removals, surgery, tracing, training)


@pytest.mark.parametrize("name", list(CASES))
def test_backend_conforms(backend: Backend, device: Device, name: str) -> None:
    CASES[name](Bench(backend, device))


def test_every_module_of_cases_is_run() -> None:
    assert {function.__module__ for function in CASES.values()} == {module.__name__ for module in MODULES}
    assert all(function.__doc__ for function in CASES.values())


def test_a_case_name_stands_once() -> None:
    name = next(iter(CASES))
    with pytest.raises(ValueError, match=r"exists already"):
        case(name)(CASES[name])


def test_a_backend_that_raises_anything_fails_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dict(list(CASES.items())[:3])
    monkeypatch.setattr("slimbridge.conformance.suite.CASES", kept)

    class Empty:
        """Has nothing of the port."""

    outcomes = list(run_conformance(Empty()))  # type: ignore[arg-type]
    assert [outcome.case for outcome in outcomes] == list(kept)
    assert all(not outcome.passed and "raised AttributeError" in outcome.message for outcome in outcomes)
