"""Sup-tickets on the command lines and in the settings files of hosts: what these have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.flag_settings import CONFIG, read_number
from ast_plugin.integrations.family.sup_tickets import SupTickets

FLAG = "ast_sup_tickets"
SETTING = "sup_tickets"
METAVAR = "N"
HELP = "average the sub-nets at the ends of N cycles, which are the last tenth of the run (3 is usual)"

_IN_FILES = ("cycles", "share", "lr", "explore", "max_batches")


def sup_tickets_of(value: Any, place: str) -> SupTickets:
    """Return what a program asks a host for.

    Args:
        value: A `SupTickets`, which is returned as it is, a number of cycles, or a mapping of settings by name.
        place: Where it stands, for messages.

    Raises:
        ConfigError: If it is something else, or a setting is unknown or out of range; the message begins with `place`.
    """
    return value if isinstance(value, SupTickets) else SupTickets(**_checked(value, place))


def take_sup_tickets(
    options: dict[str, Any], given: Mapping[str, Any], *, spelled: Callable[[str], str]
) -> dict[str, Any] | None:
    """Return the settings of `SupTickets` that a command line asks for, checked; None if it asks for none.

    Args:
        options: What `ast_plugin.flag_settings.read_flags` returned with `SETTING` among the further ones; that is
            taken out.
        given: The flags that it was made from. The one of these settings is stronger than the file.
        spelled: How the name of a flag is spelled where it was given.

    Raises:
        ConfigError: If a setting is unknown or out of range; the message begins with its flag, or with the file that
            it stands in.
    """
    in_file, asked = options.pop(SETTING, None), given.get(FLAG)
    found = None if in_file is None else _checked(in_file, f"{spelled(CONFIG)} {given.get(CONFIG)}")
    return found if asked is None else {**(found or {}), **_checked(asked, spelled(FLAG))}


def _checked(value: Any, place: str) -> dict[str, Any]:
    settings = value if isinstance(value, Mapping) else {"cycles": value}
    for name in settings:
        if name not in _IN_FILES:
            raise ConfigError(f"{place}: unknown setting {name!r} of {SETTING}: {near_names(str(name), _IN_FILES)}")
    found = {name: _read(setting) for name, setting in settings.items()}
    try:
        SupTickets(**found)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return found


def _read(value: Any) -> Any:
    """Return a value with numbers that stand as text read as numbers."""
    return tuple(map(read_number, value)) if isinstance(value, (list, tuple)) else read_number(value)
