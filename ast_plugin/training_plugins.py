"""The state of plugins that have one, as a part of the state of a run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ast_plugin.errors import PluginError, StateError

KEY = "plugins"

_PLAIN = (bool, int, float, str, bytes, type(None))


class PluginStates:
    """Collects and restores what plugins with ``state_dict()`` and ``load_state_dict(state)`` keep.

    Args:
        plugins: These plugins by name.
    """

    def __init__(self, plugins: Mapping[str, Any]) -> None:
        self._plugins = plugins

    def collect(self, *, copied: bool = False) -> dict[str, Any]:
        """Return an entry for the state of the run; an empty mapping where no plugin has a state.

        Args:
            copied: Whether to copy it.

        Raises:
            PluginError: If a plugin fails, or returns something else than tensors and plain containers.
        """
        if not self._plugins:
            return {}
        states = {name: self._state_of(name, plugin) for name, plugin in self._plugins.items()}
        return {KEY: copy.deepcopy(states) if copied else states}

    def check(self, state: Mapping[str, Any]) -> list[str]:
        """Refuse a saved state of the run that does not fit a plugin; nothing is changed.

        Args:
            state: With or without an entry that `collect` returned.

        Returns:
            Names of the plugins whose state is in it, and that this run is without.

        Raises:
            StateError: If the entry is damaged, or a plugin refuses its state in ``check_state``.
            PluginError: If a plugin fails.
        """
        saved = _saved(state)
        for name, plugin in self._plugins.items():
            check = getattr(plugin, "check_state", None)
            if name in saved and callable(check):
                try:
                    check(saved[name])
                except StateError:
                    raise
                except Exception as error:
                    raise _failed(name, "check_state", error) from error
        return [name for name in saved if name not in self._plugins]

    def load(self, state: Mapping[str, Any]) -> None:
        """Let every plugin go on from its state, all of them or none; one without an entry is not called.

        Args:
            state: What `check` was given.

        Raises:
            StateError: If a plugin refuses its state; the others go on from what they had before.
            PluginError: If a plugin fails; likewise.
        """
        saved = _saved(state)
        concerned = {name: plugin for name, plugin in self._plugins.items() if name in saved}
        before = {name: self._state_of(name, plugin) for name, plugin in concerned.items()}
        begun: list[str] = []
        try:
            for name, plugin in concerned.items():
                begun.append(name)
                plugin.load_state_dict(saved[name])
        except BaseException as error:
            for name in reversed(begun):
                concerned[name].load_state_dict(before[name])
            if isinstance(error, StateError) or not isinstance(error, Exception):
                raise
            raise _failed(begun[-1], "load_state_dict", error) from error

    def _state_of(self, name: str, plugin: Any) -> Any:
        try:
            state = plugin.state_dict()
        except Exception as error:
            raise _failed(name, "state_dict", error) from error
        odd = _first_odd(state, "")
        if odd is not None:
            raise PluginError(
                f"plugin {name!r} must return tensors and plain containers from state_dict, so that a checkpoint can "
                f"be loaded with weights_only=True; {odd}"
            )
        return state


def warn_of_left_out(names: list[str]) -> None:
    """Warn of plugins whose state is not loaded, because this run is without them.

    Warns:
        UserWarning: If there are any.
    """
    for name in names:
        warnings.warn(
            f"the saved state has a state of plugin {name!r}, which takes no part in this run, so it is left out; wrap "
            f"with {name}=... or plugins=[...] as in the run that was saved to go on with it",
            stacklevel=2,
        )


def _saved(state: Mapping[str, Any]) -> Mapping[str, Any]:
    saved = state.get(KEY, {})
    if not isinstance(saved, Mapping):
        raise StateError(
            f"the saved state has {type(saved).__name__} under {KEY!r}, and needs a mapping; it is damaged, load "
            "another checkpoint"
        )
    return saved


def _failed(name: str, method: str, error: Exception) -> PluginError:
    return PluginError(f"plugin {name!r} failed in {method}: {type(error).__name__}: {error}")


def _first_odd(value: Any, where: str) -> str | None:
    """Return a sentence on the first part of `value` that is neither tensor nor plain, None if there is none."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return None
    if isinstance(value, Mapping):
        if keys := [key for key in value if type(key) not in (str, int)]:
            return f"the key {keys[0]!r} at {where or 'the top'} is a {type(keys[0]).__name__}"
        parts = ((f"{where}[{key!r}]", item) for key, item in value.items())
    elif type(value) in (list, tuple):
        parts = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    else:
        return f"there is a {type(value).__name__} at {where or 'the top'}"
    return next((odd for place, item in parts if (odd := _first_odd(item, place)) is not None), None)
