"""Where plugins come from, and which of them take part: installed entry points, passed objects, two variables."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ast_plugin.errors import ConfigError, PluginError, near_names

BUILT_IN = "built-in"
ENTRY_POINT_GROUP = "ast_plugin"
AUTOLOAD_VARIABLE = "AST_PLUGIN_DISABLE_AUTOLOAD"
BLOCK_VARIABLE = "AST_PLUGIN_BLOCK"

_PREFIX = "ast_"  # of every hook
_MARK = "ast_plugin_impl"  # what hookimpl leaves on a function


def autoload_wanted() -> bool:
    """Return whether installed plugins are to be loaded: unless ``AST_PLUGIN_DISABLE_AUTOLOAD`` is 1 or true.

    Raises:
        ConfigError: If the variable has a value that is neither yes nor no.
    """
    value = os.environ.get(AUTOLOAD_VARIABLE, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return False
    if value in ("", "0", "false", "no", "off"):
        return True
    raise ConfigError(f"environment variable {AUTOLOAD_VARIABLE} must be 1 or 0, got {value!r}")


def installed_plugins() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return the entry points of the group ``ast_plugin`` by plugin name, sorted; nothing is imported."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return dict(sorted(found.items()))


def import_plugin(name: str, entry_points: Sequence[importlib.metadata.EntryPoint]) -> tuple[object, str, str]:
    """Import an installed plugin.

    Args:
        name: Name of the plugin.
        entry_points: All entry points of that name.

    Returns:
        The plugin, its origin, and the version of its distribution.

    Raises:
        PluginError: If two distributions offer the name, or the import fails; the message says how to block it.
    """
    sources = [f"{e.dist.name} {e.dist.version}" if e.dist else e.value for e in entry_points]
    remedy = f"leave it out with {BLOCK_VARIABLE}={name}"
    if len(entry_points) > 1:
        raise PluginError(f"plugin {name!r} is offered by {' and by '.join(sources)}; uninstall one, or {remedy}")
    entry_point = entry_points[0]
    try:
        plugin = entry_point.load()
    except Exception as error:
        raise PluginError(
            f"plugin {name!r} of {sources[0]} could not be imported from {entry_point.value!r}: "
            f"{type(error).__name__}: {error}; repair or uninstall it, or {remedy}"
        ) from error
    if entry_point.dist is None:
        return plugin, located(entry_point.value, plugin), ""
    return plugin, located(entry_point.dist.name, plugin), entry_point.dist.version


def plugin_keywords(options: Mapping[str, object], known: Container[str]) -> tuple[dict[str, Any], dict[str, object]]:
    """Separate the plugin objects among keywords from the settings.

    Args:
        options: By keyword, what a caller gave.
        known: Names of settings; nothing under them is taken for a plugin.

    Returns:
        The options without plugins, and the plugins: everything that has a function named as a hook, or a marked one.
    """
    plugins = {name: value for name, value in options.items() if name not in known and _has_hooks(value)}
    return {name: value for name, value in options.items() if name not in plugins}, plugins


def _has_hooks(value: object) -> bool:
    # Functions that somebody forgot to mark are found too: registering says what is wrong with them.
    return any(name.startswith(_PREFIX) or hasattr(getattr(value, name, None), _MARK) for name in dir(value))


def named_plugins(
    plugins: Sequence[object], *, taken: Iterable[str], keywords: Mapping[str, object] = MappingProxyType({})
) -> dict[str, object]:
    """Give every passed plugin a name: its keyword, its module's or its class's, numbered where that is taken.

    Args:
        plugins: Modules and objects; the same object twice counts once.
        taken: Names that are in use.
        keywords: Further plugins by keyword; one that is among `plugins` too counts once, under its keyword.

    Raises:
        ConfigError: If `plugins` is no list or tuple.
    """
    if not isinstance(plugins, (list, tuple)):
        raise ConfigError(f"plugins must be a list or tuple of modules and objects, got {plugins!r}")
    used = set(taken)

    def free(base: str) -> str:
        name, number = base, 2
        while name in used:
            name, number = f"{base}-{number}", number + 1
        used.add(name)
        return name

    named = dict[str, object]()
    given = {free(name): plugin for name, plugin in keywords.items()}
    for plugin in plugins:
        if not any(plugin is known for known in (*given.values(), *named.values())):
            named[free(str(getattr(plugin, "__name__", None) or type(plugin).__name__))] = plugin
    return {**named, **given}


def blocked_names(block: Sequence[str], *, known: Iterable[str]) -> frozenset[str]:
    """Return the names of plugins to leave out: those of `block` and of ``AST_PLUGIN_BLOCK``.

    An unknown name in the variable only warns, because one setting may serve several environments.

    Args:
        block: Names that the caller gave.
        known: Names of the plugins that could be blocked.

    Raises:
        ConfigError: If `block` names an unknown plugin, or either names the built-in.
    """
    if isinstance(block, str):
        raise ConfigError(f"block must be a list of plugin names, got {block!r}; write [{block!r}]")
    known = set(known)
    from_variable = [name for name in (n.strip() for n in os.environ.get(BLOCK_VARIABLE, "").split(",")) if name]
    for name in (*block, *from_variable):
        if name == BUILT_IN:
            raise ConfigError(f"plugin {BUILT_IN!r} cannot be blocked: it answers where no other plugin does")
    for name in block:
        if name not in known:
            raise ConfigError(f"block names the unknown plugin {name!r}: {near_names(name, known)}")
    for name in from_variable:
        if name not in known:
            warnings.warn(
                f"{BLOCK_VARIABLE} names the unknown plugin {name!r}: {near_names(name, known)}", stacklevel=3
            )
    return frozenset((*block, *from_variable))


def located(source: str, plugin: object) -> str:
    """Return `source` with the file in which the code of `plugin` lies, where there is one."""
    module = plugin if isinstance(plugin, types.ModuleType) else sys.modules.get(type(plugin).__module__)
    path = getattr(module, "__file__", None)
    return f"{source}, {path}" if path else source
