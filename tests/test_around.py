from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ast_plugin.integrations.around import Around


class Host:
    def __init__(self) -> None:
        self.called: list[Any] = []

    def work(self, value: int) -> int:
        """Do the work."""
        self.called.append(value)
        return value + 1


def doubled(method: Callable[[int], int], value: int) -> int:
    return 2 * method(value)


def test_calls_go_through_the_function_which_may_call_the_method() -> None:
    host, other = Host(), Host()
    around = Around()
    around.put(host, "work", doubled)
    assert host.work(3) == 8
    assert host.called == [3]
    assert host.work.__doc__ == "Do the work."
    assert other.work(3) == 4


def test_functions_around_one_method_are_taken_away_together() -> None:
    host = Host()
    around = Around()
    around.put(host, "work", doubled)
    around.put(host, "work", doubled)
    assert host.work(3) == 16
    around.remove()
    assert host.work(3) == 4
    assert "work" not in vars(host)


def test_a_method_of_the_objects_own_comes_back() -> None:
    host = Host()
    host.work = own = lambda value: value + 5  # type: ignore[method-assign]
    around = Around()
    around.put(host, "work", doubled)
    assert host.work(1) == 12
    around.remove()
    assert vars(host)["work"] is own
