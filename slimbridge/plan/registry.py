"""Named choices that a plan may make. A module registers its functions; a plan names them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Generic, TypeVar

from slimbridge.errors import SlimbridgeError, listed, nearest

T = TypeVar("T")


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
        return tuple(sorted(self._entries))

    def get(self, name: str) -> T:
        """The thing called `name`; SlimbridgeError with the nearest name otherwise."""
        if name not in self.names():
            raise SlimbridgeError(self.unknown(name))
        return self._entries[name]

    def unknown(self, name: str) -> str:
        """The message for a name that is not there."""
        return f"unknown {self.sort} '{name}'{nearest(name, self.names())}; allowed: {listed(self.names())}"
