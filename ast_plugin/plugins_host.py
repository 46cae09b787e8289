"""Holds the plugins of a run, calls their hooks, and names the one to blame when a call fails."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
import types
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import pluggy

from ast_plugin import hookspecs
from ast_plugin.errors import PluginError, near_names
from ast_plugin.hookspecs import Record
from ast_plugin.plugins_discovery import BLOCK_VARIABLE, BUILT_IN

COLLECT_HOOKS = ("ast_methods", "ast_patterns", "ast_distributions", "ast_alternations")
CHOICE_HOOKS = ("ast_select_parameters", "ast_correct_gradients")
OBSERVER_HOOKS = ("ast_sub_net_switched", "ast_masks_updated", "ast_step_finished", "ast_training_finished")
HOOKS = (*COLLECT_HOOKS, *CHOICE_HOOKS, *OBSERVER_HOOKS)

STATE_METHODS = ("state_dict", "load_state_dict")

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedPlugin:
    """A plugin that takes part.

    Attributes:
        name: The name by which it is blocked and blamed.
        origin: The distribution, or that it was passed in, and where its code lies.
        version: Version of the distribution or of the module; empty if there is none.
        hooks: Names of the hooks that it implements, sorted.
    """

    name: str
    origin: str
    version: str
    hooks: tuple[str, ...]


class PluginHost:
    """The plugins that take part, in pluggy's manager, and the calls to them.

    Attributes:
        loaded: What `register` accepted, in that order.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.loaded: list[LoadedPlugin] = []
        self._records: dict[str, dict[str, tuple[str, Record]]] = {}

    def register(self, name: str, plugin: object, origin: str, version: str) -> None:
        """Add a plugin; it is asked before those that are there already.

        Args:
            name: Name by which it is blamed.
            plugin: Module or object with functions that `hookimpl` marks.
            origin: Where it comes from, for listings.
            version: Its version, or "".

        Raises:
            PluginError: If it has no marked function, an unknown hook, or arguments that its hook does not have.
        """
        who = f"plugin {name!r} ({origin})"
        if inspect.isclass(plugin):
            raise PluginError(f"{who} is the class {plugin.__name__}: give an object of it, {plugin.__name__}()")
        try:
            self._manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{who} does not fit its hook: {' '.join(str(error).split())}") from error
        except ValueError as error:
            raise PluginError(f"{who} cannot be registered: {error}") from error
        callers = self._manager.get_hookcallers(plugin) or []
        for caller in callers:
            impls = [impl for impl in caller.get_hookimpls() if impl.plugin is plugin]
            if not caller.has_spec() and not all(impl.optionalhook for impl in impls):
                raise PluginError(
                    f"{who} implements the unknown hook {caller.name!r}: {near_names(caller.name, HOOKS)}"
                )
            if caller.name in COLLECT_HOOKS and any(impl.wrapper or impl.hookwrapper for impl in impls):
                raise PluginError(f"{who} wraps the collect hook {caller.name!r}; only the other hooks can be wrapped")
        hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
        unmarked = [hook for hook in HOOKS if hook not in hooks and hasattr(plugin, hook)]
        unmarked = [hook for hook in unmarked if not hasattr(getattr(plugin, hook), f"{hookspecs.PROJECT}_spec")]
        if unmarked or not hooks:
            found = f"has an unmarked function {unmarked[0]!r}" if unmarked else "implements no hook"
            raise PluginError(f"{who} {found}: mark every hook function with @ast_plugin.hookspecs.hookimpl")
        self.loaded.append(LoadedPlugin(name=name, origin=origin, version=version, hooks=hooks))

    def stateful(self) -> dict[str, Any]:
        """Return by name the plugins that have ``state_dict`` and ``load_state_dict``."""
        return {
            name: plugin
            for name, plugin in self._manager.list_name_plugin()
            if plugin is not None and all(callable(getattr(plugin, method, None)) for method in STATE_METHODS)
        }

    def holds(self, plugin: object) -> bool:
        """Return whether this very object is registered, under whatever name."""
        return any(plugin is known for _, known in self._manager.list_name_plugin())

    def implementers(self, hook: str) -> list[str]:
        """Return the names of the plugins that implement a hook, in the order in which they were registered."""
        return [impl.plugin_name for impl in self._caller(hook).get_hookimpls()]

    def collect(self, hook: str, kind: type[AnyRecord]) -> dict[str, tuple[str, AnyRecord]]:
        """Return the records of all plugins by name, each with the name of its plugin; asked once, then remembered.

        Args:
            hook: One of `COLLECT_HOOKS`.
            kind: The records' class.

        Raises:
            PluginError: If a plugin fails, returns something else, or two plugins offer one name.
        """
        if hook not in self._records:
            found: dict[str, tuple[str, Record]] = {}
            # Not through pluggy's call, which does not tell whose result is whose.
            for impl in self._caller(hook).get_hookimpls():
                try:
                    records = tuple(cast(Iterable[object], impl.function()))
                except Exception as error:
                    raise failure(impl.plugin_name, hook, error) from error
                for record in records:
                    if not isinstance(record, kind):
                        raise PluginError(
                            f"plugin {impl.plugin_name!r} must return a list of {kind.__name__} from {hook}, "
                            f"got {record!r} in it"
                        )
                    if record.name in found:
                        raise PluginError(
                            f"{record.name!r} is offered by plugin {found[record.name][0]!r} and by plugin "
                            f"{impl.plugin_name!r} ({hook}); rename it in one of them, or leave one plugin out with "
                            f"{BLOCK_VARIABLE}={impl.plugin_name}"
                        )
                    found[record.name] = (impl.plugin_name, record)
            self._records[hook] = found
        return cast("dict[str, tuple[str, AnyRecord]]", self._records[hook])

    def call(self, hook: str, passing: tuple[type[Exception], ...] = (), /, **arguments: object) -> Any:
        """Call a first-result or observer hook.

        Args:
            hook: Its name.
            passing: Errors that are a plugin's word to the user, and pass as they are.
            **arguments: What the hook takes.

        Raises:
            PluginError: If a plugin fails in any other way; it names plugin and hook.
        """
        caller = self._caller(hook)
        try:
            return caller(**arguments)
        except Exception as error:
            culprit = _culprit(caller, error)
            if culprit is None or culprit == BUILT_IN or isinstance(error, passing):
                raise
            raise failure(culprit, hook, error) from error

    def _caller(self, hook: str) -> pluggy.HookCaller:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller


def failure(plugin: str, where: str, error: Exception) -> PluginError:
    """Return the error that names the plugin and where in it something went wrong."""
    return PluginError(f"plugin {plugin!r} failed in {where}: {type(error).__name__}: {error}")


def _culprit(caller: pluggy.HookCaller, error: Exception) -> str | None:
    """Return the plugin whose implementation raised `error`: the innermost one on the traceback, None if none is."""
    culprit = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for impl in caller.get_hookimpls():
            function: Any = impl.function
            if function.__code__ is not frame.f_code:
                continue
            # Two objects of one class share their code; the frame's first argument tells them apart.
            bound = isinstance(function, types.MethodType)
            if not bound or frame.f_locals.get(function.__code__.co_varnames[0]) is function.__self__:
                culprit = impl.plugin_name
    return culprit
