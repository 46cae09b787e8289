"""Functions around the methods of one object of a host, which is as before when they are taken away again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Around:
    """Puts functions around methods of single objects; classes and other objects are left alone."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, thing: Any, name: str, around: Callable[..., Any]) -> None:
        """Have calls of a method go to `around`, whose first argument is the method.

        Args:
            thing: The object.
            name: The method.
            around: Called with the method and then with what the method is called with.
        """
        method = getattr(thing, name)
        self._before.append((thing, name, vars(thing).get(name)))
        setattr(thing, name, functools.wraps(method)(functools.partial(around, method)))

    def remove(self) -> None:
        """Give all objects their own methods back, the last first."""
        while self._before:
            thing, name, before = self._before.pop()
            if before is None:
                delattr(thing, name)
            else:
                setattr(thing, name, before)
