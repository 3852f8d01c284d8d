"""Finds backends: by name, or from a model's type. A framework is imported only when it is asked for."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from slimbridge.errors import BackendError, listed, nearest
from slimbridge.ports import Backend

GROUP = "slimbridge.backends"


def backend_names() -> tuple[str, ...]:
    """Names of the registered backends, installed framework or not, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name; one object for the whole process.

    Raises:
        BackendError: the name is unknown, or its framework is not installed.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _load(entry)
    raise BackendError(
        f"backend '{name}' is unknown{nearest(name, backend_names())}; registered: {listed(backend_names())}"
    )


def installed_backend() -> Backend:
    """The first backend whose framework is installed; BackendError when there is none."""
    failures = []
    for name in sorted(backend_names(), reverse=True):
        try:
            return get_backend(name)
        except BackendError as error:
            failures.append(str(error))
    raise BackendError("no framework is installed: " + "; ".join(failures))


def _load(entry: EntryPoint) -> Backend:
    distribution = entry.dist.name if entry.dist else "slimbridge"
    try:
        created = entry.load()()
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend '{entry.name}' needs '{error.name}', which is not installed: "
            f"pip install '{distribution}[{entry.name}]'"
        ) from error
    if not isinstance(created, Backend):
        raise BackendError(f"backend '{entry.name}' ({entry.value}) does not implement slimbridge.ports.Backend")
    return created


def backend_of(model: object) -> Backend:
    """The backend that owns a model, found without importing a framework that the process has not loaded.

    Raises:
        BackendError: no backend owns an object of that type.
    """
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    names = sorted(backend_names(), key=lambda name: name not in packages)
    for name in names:
        if (name in packages or name in sys.modules) and get_backend(name).owns(model):
            return get_backend(name)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise BackendError(f"no backend owns a model of type {kind}; registered: {listed(backend_names())}")


def find_backend(model: object | None, name: str | None) -> Backend:
    """The backend of a model, or the one named, or the first installed; BackendError when they contradict."""
    if model is None:
        if name is None:
            return installed_backend()
        return get_backend(name)
    side = backend_of(model)
    if name is not None and name != side.name:
        raise BackendError(f"the model is a {side.name} model, the backend named is '{name}'")
    return side
