"""Named choices that a plan may make. A module registers its functions; a plan names them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from slimbridge.errors import SlimbridgeError, listed, nearest

T = TypeVar("T")
PLUGINS = "slimbridge.plugins"
"""Entry point group of modules that register methods of their own."""


@cache
def load_plugins() -> None:
    """Import each module of the entry point group, once; SlimbridgeError names one that cannot be."""
    for entry in entry_points(group=PLUGINS):
        try:
            entry.load()
        except ImportError as error:
            raise SlimbridgeError(f"plugin '{entry.name}' ({entry.value}) cannot be imported: {error}") from error


class Registry(Generic[T]):
    """Names of one sort of thing; the module that defines the built-in ones is imported at first use."""

    def __init__(self, sort: str, home: str) -> None:
        self.sort = sort
        self._home = home
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the thing available under `name`; SlimbridgeError when the name is taken."""

        def add(thing: T) -> T:
            if name in self._entries:
                raise SlimbridgeError(f"{self.sort} '{name}' is registered already")
            self._entries[name] = thing
            return thing

        return add

    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        import_module(self._home)
        load_plugins()
        return tuple(sorted(self._entries))

    def get(self, name: str) -> T:
        """The thing called `name`; SlimbridgeError with the nearest name otherwise."""
        if name not in self.names():
            raise SlimbridgeError(self.unknown(name))
        return self._entries[name]

    def unknown(self, name: str) -> str:
        """The message for a name that is not there."""
        return f"unknown {self.sort} '{name}'{nearest(name, self.names())}; allowed: {listed(self.names())}"
