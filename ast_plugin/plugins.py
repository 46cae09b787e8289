"""Finds plugins, asks their hooks, and says which one is to blame when something goes wrong.

Plugins come from three places: the built-ins (`ast_plugin.defaults`), installed distributions with an entry point in
the group ``ast_plugin``, and objects that the caller passes. ``AST_PLUGIN_DISABLE_AUTOLOAD=1`` leaves the installed
ones out, ``AST_PLUGIN_BLOCK=name1,name2`` those it names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ast_plugin import defaults
from ast_plugin.alternation import Alternation
from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction
from ast_plugin.distributions import Distribution
from ast_plugin.errors import ConfigError, PluginError, SelectionError, WrapError, near_names
from ast_plugin.hookspecs import AlternationRecord, DistributionRecord, MethodRecord, PatternRecord
from ast_plugin.methods import Method
from ast_plugin.parameters import ParameterChoice
from ast_plugin.patterns import Pattern
from ast_plugin.plugins_discovery import (
    BUILT_IN,
    autoload_wanted,
    blocked_names,
    import_plugin,
    installed_plugins,
    located,
    named_plugins,
)
from ast_plugin.plugins_host import OBSERVER_HOOKS, LoadedPlugin, PluginHost, failure
from ast_plugin.version import __version__

Answer = TypeVar("Answer")
Function = TypeVar("Function", bound=Callable[..., Any])


class PluginRegistry:
    """All plugins of one run.

    Args:
        plugins: Modules and objects to use beside the installed plugins; later ones are asked first.
        block: Names of plugins to leave out, beside those in ``AST_PLUGIN_BLOCK``.
        autoload: Whether installed plugins are loaded; None: unless ``AST_PLUGIN_DISABLE_AUTOLOAD`` is set.
        keywords: Further plugins by the name that they take part under; they are asked before `plugins`.

    Raises:
        ConfigError: If `block` names no plugin that there is.
        PluginError: If a plugin cannot be imported, or its functions do not fit the hooks.
    """

    def __init__(
        self,
        plugins: Sequence[object] = (),
        *,
        block: Sequence[str] = (),
        autoload: bool | None = None,
        keywords: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._host = PluginHost()
        installed = installed_plugins()
        passed = named_plugins(plugins, taken=(BUILT_IN, *installed), keywords=keywords)
        blocked = blocked_names(block, known=(*installed, *passed))
        self._host.register(BUILT_IN, defaults, located("ast-plugin", defaults), __version__)
        if autoload_wanted() if autoload is None else autoload:
            for name, entry_points in installed.items():
                if name not in blocked:
                    self._host.register(name, *import_plugin(name, entry_points))
        for name, plugin in passed.items():
            # A plugin that is installed and passed as well takes part once.
            if name not in blocked and not self._host.holds(plugin):
                version = str(getattr(plugin, "__version__", ""))
                self._host.register(name, plugin, located("passed in", plugin), version)
        self._listened = {hook: bool(self._host.implementers(hook)) for hook in OBSERVER_HOOKS}

    def loaded(self) -> list[LoadedPlugin]:
        """Return the plugins that take part, the built-in first, then as they were loaded."""
        return list(self._host.loaded)

    def methods(self) -> dict[str, MethodRecord]:
        """Return all methods by name, those of the built-in first."""
        return _records(self._host.collect("ast_methods", MethodRecord))

    def patterns(self) -> dict[str, PatternRecord]:
        """Return all patterns, and families of them, by name, those of the built-in first."""
        return _records(self._host.collect("ast_patterns", PatternRecord))

    def distributions(self) -> dict[str, DistributionRecord]:
        """Return all distributions by name, those of the built-in first."""
        return _records(self._host.collect("ast_distributions", DistributionRecord))

    def alternations(self) -> dict[str, AlternationRecord]:
        """Return all orders of sub-nets by name, those of the built-in first."""
        return _records(self._host.collect("ast_alternations", AlternationRecord))

    def method(self, name: str) -> Method:
        """Return a method by its name.

        Raises:
            ConfigError: If no plugin offers it; the message has the near names.
            PluginError: If two plugins offer it, or it cannot be built.
        """
        plugin, record = _look_up("method", name, self._host.collect("ast_methods", MethodRecord))
        where = f"method {name!r}"
        built = _guarded(record.build, plugin, where)()
        if not isinstance(built, Method) or built.name != name:
            raise PluginError(f"plugin {plugin!r} must build the Method named {name!r}, got {built!r}")
        if plugin == BUILT_IN:
            return built
        grow_score = built.grow_score and _guarded(built.grow_score, plugin, f"the grow score of {where}")
        return dataclasses.replace(
            built,
            drop_score=_guarded(built.drop_score, plugin, f"the drop score of {where}"),
            grow_score=grow_score,
            sparsity_schedule=_guarded(built.sparsity_schedule, plugin, f"the sparsity schedule of {where}"),
            channel_score=built.channel_score
            and _guarded(built.channel_score, plugin, f"the channel score of {where}"),
            decide=built.decide and _guarded(built.decide, plugin, f"the decision of {where}"),
            is_due=built.is_due and _guarded(built.is_due, plugin, f"the calendar of {where}"),
        )

    def pattern(self, text: str) -> Pattern:
        """Return the pattern that `text` stands for, such as ``unstructured`` or ``2:4``.

        Raises:
            ConfigError: If no plugin knows it, or its numbers are illegal; the message has the near names.
            PluginError: If two plugins know it, or parsing fails.
        """
        records = self._host.collect("ast_patterns", PatternRecord)
        found: list[tuple[str, Pattern]] = []
        for plugin, record in records.values():
            pattern = _guarded(record.parse, plugin, f"pattern {record.name!r}")(text)
            if isinstance(pattern, Pattern):
                found.append(
                    (plugin, pattern if plugin == BUILT_IN else _watched(pattern, plugin, f"pattern {text!r}"))
                )
            elif pattern is not None:
                raise PluginError(f"plugin {plugin!r} must parse {text!r} to a Pattern or None, got {pattern!r}")
        if not found:
            raise ConfigError(f"unknown pattern {text!r}: {near_names(text, records)}")
        if len(found) > 1:
            owners = " and by plugin ".join(repr(plugin) for plugin, _ in found)
            raise PluginError(f"pattern {text!r} is offered by plugin {owners}; leave one of them out")
        return found[0][1]

    def distribution(self, name: str) -> Distribution:
        """Return a distribution by its name.

        Raises:
            ConfigError: If no plugin offers it; the message has the near names.
            PluginError: If two plugins offer it.
        """
        plugin, record = _look_up("distribution", name, self._host.collect("ast_distributions", DistributionRecord))
        if plugin == BUILT_IN:
            return record.function
        return _guarded(record.function, plugin, f"distribution {name!r}")

    def alternation(
        self,
        spec: str,
        *,
        count: int,
        seed: int,
        steps_per_epoch: int | None,
        names: Sequence[str],
        default: str,
        sparsities: Sequence[float],
    ) -> Alternation:
        """Return the order of sub-nets that `spec` stands for.

        Args:
            spec: A name, or ``"NAME:ARGUMENT"`` such as ``"fixed:s95"``.
            count: Number of sub-nets.
            seed: The run's seed.
            steps_per_epoch: Optimizer steps of an epoch, if known.
            names: The sub-nets' names, in order.
            default: Name of the default sub-net.
            sparsities: Their target sparsities, in order.

        Raises:
            ConfigError: If no plugin offers it, or it lacks something or cannot use it.
            PluginError: If two plugins offer it, or it cannot be built.
        """
        name, colon, argument = spec.partition(":")
        plugin, record = _look_up("alternation", name, self._host.collect("ast_alternations", AlternationRecord))
        if colon and not record.takes_argument:
            raise ConfigError(f"alternation {name!r} takes no argument, got {spec!r}; write {name!r}")
        offered: dict[str, Any] = {
            "count": count,
            "seed": seed,
            "steps_per_epoch": steps_per_epoch,
            "argument": argument if colon else None,
            "names": tuple(names),
            "default": default,
            "sparsities": tuple(sparsities),
        }
        order = _guarded(_call_with_taken, plugin, f"alternation {name!r}")(record.build, offered)
        if not all(hasattr(order, member) for member in ("name", "sub_net_at", "is_group_start")):
            raise PluginError(f"plugin {plugin!r} must build an Alternation for {spec!r}, got {order!r}")
        return order if plugin == BUILT_IN else _watched(order, plugin, f"alternation {spec!r}")

    def select_parameters(
        self, model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> list[ParameterChoice]:
        """Return the verdict on every parameter of `model`: the first plugin's that has one.

        Raises:
            SelectionError: If the globs cannot be followed, or nothing is prunable.
            PluginError: If a plugin fails, or its answer does not fit the model.
        """
        hook = "ast_select_parameters"
        impossible = (ConfigError, SelectionError)
        choices = self._host.call(hook, impossible, model=model, include=tuple(include), exclude=tuple(exclude))
        expected = [name for name, _ in model.named_parameters()]
        fits = isinstance(choices, list) and all(isinstance(choice, ParameterChoice) for choice in choices)
        if not fits or [choice.name for choice in choices] != expected:
            raise self._bad_answer(hook, "one ParameterChoice for every entry of model.named_parameters(), in order")
        if not any(choice.prunable for choice in choices):
            raise self._bad_answer(hook, "at least one prunable parameter")
        return list(choices)

    def correct_gradients(
        self,
        gradients: Sequence[Tensor],
        references: Sequence[Tensor],
        options: CorrectionOptions,
        names: Sequence[str],
        sub_net: str,
    ) -> Correction:
        """Correct `gradients` in place, by the first plugin that does; see `hookspecs.ast_correct_gradients`.

        Raises:
            PluginError: If a plugin fails or returns something else than a Correction.
        """
        hook = "ast_correct_gradients"
        found = self._host.call(
            hook, gradients=gradients, references=references, options=options, names=names, sub_net=sub_net
        )
        if not isinstance(found, Correction):
            raise self._bad_answer(hook, f"a Correction or None, not {found!r}")
        if not 0 <= found.conflicts <= found.checks == len(found.cosines) or not all(
            -1.001 <= cosine <= 1.001 for cosine in found.cosines
        ):
            raise self._bad_answer(hook, f"no more conflicts than checks, and a cosine in [-1, 1] a check, not {found}")
        return found

    def extends(self, hook: str) -> bool:
        """Return whether a plugin beside the built-in one has this hook."""
        return any(name != BUILT_IN for name in self._host.implementers(hook))

    def notify(self, hook: str, **arguments: object) -> None:
        """Call an observer hook in every plugin that has it; next to free where none has.

        Raises:
            PluginError: If a plugin fails; it names plugin and hook.
        """
        if self._listened[hook]:
            self._host.call(hook, **arguments)

    def begin(self, **arguments: object) -> None:
        """Tell the plugins that a run begins: `hookspecs.ast_sub_net_switched` for its first step.

        Raises:
            ConfigError: If a plugin finds that the run is not what it needs.
            WrapError: Likewise.
            PluginError: If a plugin fails in any other way; it names plugin and hook.
        """
        self._host.call("ast_sub_net_switched", (ConfigError, WrapError), **arguments)

    def stateful(self) -> dict[str, Any]:
        """Return by name the plugins with a state of their own: with ``state_dict`` and ``load_state_dict``."""
        return self._host.stateful()

    def _bad_answer(self, hook: str, expected: str) -> PluginError:
        # pluggy does not tell whose answer it was; with one third-party plugin, the usual case, it is plain.
        names = [name for name in self._host.implementers(hook) if name != BUILT_IN]
        return PluginError(f"plugin {' or '.join(map(repr, names))} must return {expected}, from {hook}")


def _records(owned: Mapping[str, tuple[str, Answer]]) -> dict[str, Answer]:
    return {name: record for name, (_, record) in owned.items()}


def _look_up(kind: str, name: str, owned: Mapping[str, tuple[str, Answer]]) -> tuple[str, Answer]:
    try:
        return owned[name]
    except KeyError:
        raise ConfigError(f"unknown {kind} {name!r}: {near_names(name, owned)}") from None


def _call_with_taken(function: Callable[..., Answer], offered: Mapping[str, Any]) -> Answer:
    """Call a function with those of the offered keyword arguments that it takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return function(**{name: value for name, value in offered.items() if takes_all or name in parameters})


class _Watched:
    """Stands for an object of a plugin and names the plugin when one of its methods fails."""

    def __init__(self, target: object, plugin: str, where: str) -> None:
        self._target, self._plugin, self._where = target, plugin, where

    def __getattr__(self, name: str) -> Any:
        where = f"{name} of {self._where}"
        try:
            value = getattr(self._target, name)
        except AttributeError as error:
            if name in dir(self._target):
                raise failure(self._plugin, where, error) from error
            raise
        except ConfigError:
            raise
        except Exception as error:
            raise failure(self._plugin, where, error) from error
        return _guarded(value, self._plugin, where) if callable(value) else value


def _watched(target: Answer, plugin: str, where: str) -> Answer:
    return cast(Answer, _Watched(target, plugin, where))


def _guarded(function: Function, plugin: str, where: str) -> Function:
    """Return `function` with its exceptions turned into ones that name the plugin.

    A ConfigError is a plugin's word to the user, and passes as it is.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConfigError:
            raise
        except Exception as error:
            raise failure(plugin, where, error) from error

    return cast(Function, guarded)
