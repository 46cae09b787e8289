"""Functions that installed packages add to `ast_plugin.Elastic`: ``elastic.NAME(...)``.

A package offers one with an entry point in the group ``ast_plugin.elastic``; its name is the attribute, its value a
function that takes the `Elastic` first::

    [project.entry-points."ast_plugin.elastic"]
    summary = "my_package.summaries:summary"      # elastic.summary(...) calls summary(elastic, ...)

They are looked up when an attribute is asked for that `Elastic` does not have itself, and imported only then.
"""

from __future__ import annotations

import importlib.metadata
import types

from ast_plugin.errors import PluginError, near_names

ENTRY_POINT_GROUP = "ast_plugin.elastic"


def accessor_names() -> tuple[str, ...]:
    """Return the names of the functions that installed packages add, sorted; nothing is imported."""
    found = {entry_point.name for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return tuple(sorted(name for name in found if not name.startswith("_")))


def accessor(owner: object, name: str) -> types.MethodType:
    """Return the function that an installed package adds under a name, bound to its owner.

    Args:
        owner: What the function gets as its first argument.
        name: The attribute that was asked for.

    Raises:
        AttributeError: If no package offers one; the message has the near names.
        PluginError: If two distributions offer the name, the import fails, or what is imported cannot be called.
    """
    kind = type(owner).__name__
    found = [] if name.startswith("_") else list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not found:
        # Private names are asked for by copy, pickle and notebooks, and not for the sake of a message.
        hint = "" if name.startswith("_") else f"; {near_names(name, [n for n in dir(owner) if not n.startswith('_')])}"
        raise AttributeError(f"{kind!r} object has no attribute {name!r}{hint}", name=name, obj=owner)
    what = f"{kind}.{name}"
    sources = [f"{e.dist.name} {e.dist.version}" if e.dist else e.value for e in found]
    if len(found) > 1:
        raise PluginError(f"{what} is offered by {' and by '.join(sources)}; uninstall one of them")
    try:
        function = found[0].load()
    except Exception as error:
        raise PluginError(
            f"{what} of {sources[0]} could not be imported from {found[0].value!r}: {type(error).__name__}: {error}; "
            "repair or uninstall it"
        ) from error
    if not callable(function):
        raise PluginError(
            f"{what} of {sources[0]} is a {type(function).__name__}, no function; {found[0].value!r} must name one "
            f"that takes the {kind} first"
        )
    return types.MethodType(function, owner)
