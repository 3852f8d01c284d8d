"""Runs the conformance cases on a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slimbridge.errors import SlimbridgeError
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Backend, Device


@dataclass(frozen=True)
class Bench:
    """What a case works on: the backend, and the device its models go to."""

    backend: Backend
    device: Device


Case = Callable[[Bench], None]
"""Raises ConformanceError, or anything else, when the backend does not conform."""


class ConformanceError(Exception):
    """A backend does not do what the port says; the message has the figure."""


@dataclass(frozen=True)
class Outcome:
    """One case's name, whether it passed, and why not."""

    case: str
    passed: bool
    message: str = ""


CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Decorator: add a case to the suite."""

    def add(function: Case) -> Case:
        if name in CASES:
            raise ValueError(f"conformance case '{name}' exists already")
        CASES[name] = function
        return function

    return add


def within(what: str, figure: float, row: str) -> None:
    """Fail unless the figure is at most the tolerance of that row of the table."""
    allowed = tolerance(row)
    if not figure <= allowed.value:
        raise ConformanceError(f"{what}: {allowed.unit} {figure:.3g}, allowed {allowed.value:.3g}")


def require(condition: object, message: str) -> None:
    """Fail with the message unless the condition holds."""
    if not condition:
        raise ConformanceError(message)


def refuses(what: str, work: Callable[[], object]) -> None:
    """Fail unless the work raises a SlimbridgeError of one or two lines."""
    try:
        work()
    except SlimbridgeError as error:
        require(len(str(error).splitlines()) <= 2, f"{what}: the message is longer than two lines")
        return
    raise ConformanceError(f"{what}: was accepted, a SlimbridgeError was expected")


def run_conformance(backend: Backend, device: Device = "cpu") -> Iterator[Outcome]:
    """Run every case, one outcome each; a case that raises anything has failed.

    Args:
        backend: the backend to test.
        device: "cpu" or "gpu".
    """
    # The modules register their cases when they are imported.
    from slimbridge.conformance import (  # noqa: F401
        layers,
        masks,
        models,
        observation,
        operations,
        quantization,
        removals,
        surgery,
        tracing,
        training,
    )

    for name, function in CASES.items():
        try:
            function(Bench(backend, device))
        except ConformanceError as failure:
            yield Outcome(name, False, str(failure))
        except Exception as error:  # a backend under test may raise anything, and that is a failed case
            text = (str(error).strip() or "no message").splitlines()[0]
            yield Outcome(name, False, f"raised {type(error).__name__}: {text}")
        else:
            yield Outcome(name, True)
