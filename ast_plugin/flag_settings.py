"""Settings of a run from the flags and files of a training script: what the hosts' command lines have in common.

A host says how a flag is spelled there; names, meaning and checks are the same everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, missing_extra, near_names

PREFIX = "ast_"
CONFIG = "ast_config"
CONFIG_HELP = "more settings, as YAML or JSON; flags are stronger"

# Settings that are numbers, or may be.
NUMBERS = (
    "sparsities",
    "update_interval",
    "drop_fraction",
    "drop_fraction_end",
    "initial_sparsity",
    "begin_step",
    "end_step",
)
# The training script decides how long a run is.
_OF_THE_SCRIPT = ("total_steps", "steps_per_epoch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    Attributes:
        name: Its name in a namespace, such as ``ast_update_interval``.
        setting: The setting of `ASTConfig` that it stands for.
        metavar: What the help calls its value.
        help: What it does, with the default.
        several: Whether it takes several values.
    """

    name: str
    setting: str
    metavar: str
    help: str
    several: bool = False


FLAGS = (
    Flag(
        name="ast_sparsities",
        setting="sparsities",
        metavar="S",
        help="zeros of each sub-net: 0.9 0.95, 2:4",
        several=True,
    ),
    Flag(name="ast_method", setting="method", metavar="NAME", help="rule for mask updates (default: granet)"),
    Flag(
        name="ast_pattern",
        setting="pattern",
        metavar="NAME",
        help="masks allowed: unstructured, 2:4, 4x4 ... (default: the first)",
    ),
    Flag(
        name="ast_distribution",
        setting="distribution",
        metavar="NAME",
        help="how zeros are spread over the layers (default: the method's)",
    ),
    Flag(
        name="ast_update_interval",
        setting="update_interval",
        metavar="T",
        help="between mask updates of a sub-net: steps (100), or a fraction of the run (0.02, the default)",
    ),
    Flag(
        name="ast_drop_fraction",
        setting="drop_fraction",
        metavar="F",
        help="kept weights replaced at an update: 0.1",
    ),
    Flag(
        name="ast_correction",
        setting="correction",
        metavar="SCOPE",
        help="gradient correction: layer, global or off (default: layer)",
    ),
    Flag(
        name="ast_inactive",
        setting="inactive",
        metavar="RULE",
        help="weights outside the active sub-net: coast or freeze (default: coast)",
    ),
    Flag(
        name="ast_include",
        setting="include",
        metavar="GLOB",
        help="prune only parameters whose names match",
        several=True,
    ),
    Flag(
        name="ast_exclude",
        setting="exclude",
        metavar="GLOB",
        help="never prune parameters whose names match",
        several=True,
    ),
    Flag(
        name="ast_eval_sub_net",
        setting="default_sub_net",
        metavar="NAME",
        help="whose metrics have the script's own names (default: the densest)",
    ),
)


def read_number(value: Any) -> Any:
    """Return a number that stands as text (YAML reads 1e-2 as one) as a number, and anything else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def read_value(flag: Flag, value: Any, spelled: Callable[[str], str]) -> Any:
    """Return the value of a flag as its setting takes it.

    Args:
        flag: The flag.
        value: From a command line, a file or a program: numbers may be text, one value may stand for a list.
        spelled: How the name of a flag is spelled where it was given.

    Raises:
        ConfigError: If YAML has read an ``N:M`` as a number.
    """
    value = _read(flag.setting, value, spelled(flag.name))
    return [value] if flag.several and not isinstance(value, (list, tuple)) else value


def read_flags(
    given: Mapping[str, Any], *, spelled: Callable[[str], str], extra: str, further: Collection[str] = ()
) -> dict[str, Any]:
    """Return the settings that flags ask for, by the names of `ASTConfig`; not yet checked.

    Args:
        given: The flags that have a value, by name, also those that only the host knows. Flags are stronger than the
            file that ``ast_config`` names, which is YAML or JSON.
        spelled: How the name of a flag is spelled where it was given.
        extra: The extra that brings a reader of YAML.
        further: Names of settings of the host's own that the file may hold, too; they are returned as they stand there.

    Raises:
        ConfigError: If there are flags but no sparsities, or the file cannot be read or has an unknown setting.
        MissingExtraError: If the file is not JSON, and the package that reads YAML is not installed.
    """
    options = _from_file(given[CONFIG], spelled(CONFIG), extra, further) if CONFIG in given else {}
    for flag in FLAGS:
        if flag.name in given:
            options[flag.setting] = read_value(flag, given[flag.name], spelled)
    if "sparsities" not in options:
        sparsities = spelled("ast_sparsities")
        raise ConfigError(
            f"{', '.join(spelled(name) for name in given)}: no effect without {sparsities}; add it, for example: "
            f"{sparsities} 0.9 0.95"
        )
    return options


def check_settings(options: Mapping[str, Any], given: Mapping[str, Any], *, spelled: Callable[[str], str]) -> None:
    """Refuse settings that are out of range or do not fit together, by the name of the flag that each comes from.

    Args:
        options: What `read_flags` returned.
        given: The flags that it was made from.
        spelled: How the name of a flag is spelled where it was given.

    Raises:
        ConfigError: If a setting is wrong, by itself or beside those before it; the message begins with its flag, or
            with the file that it stands in.
    """
    flags = {flag.setting: spelled(flag.name) for flag in FLAGS if flag.name in given}
    # What others refer to comes first, what refers to others last.
    order = sorted(options, key=lambda setting: (setting != "sparsities", setting == "default_sub_net"))
    checked: dict[str, Any] = {}
    for setting in order:
        checked[setting] = options[setting]
        try:
            ASTConfig.from_dict(checked)
        except ConfigError as error:
            place = flags.get(setting) or f"{spelled(CONFIG)} {given[CONFIG]}"
            raise ConfigError(f"{place}: {error}") from error


def _read(setting: str, value: Any, place: str) -> Any:
    """Return a setting as it was meant, where YAML or a command line made something else of it."""
    if setting == "correction" and value is False:
        return "off"
    _check_colon(place, setting, value)
    if setting not in NUMBERS:
        return value
    return [read_number(item) for item in value] if isinstance(value, (list, tuple)) else read_number(value)


def _check_colon(place: str, setting: str, value: Any) -> None:
    """Refuse an N:M that YAML has read as a number to the base 60."""
    values = value if setting == "sparsities" and isinstance(value, (list, tuple)) else [value]
    least = {"pattern": 60, "sparsities": 101}.get(setting)  # smaller ones may be meant as percentages
    for number in values:
        if least is not None and isinstance(number, int) and number >= least:
            raise ConfigError(
                f"{place}: got {number}; YAML reads {number // 60}:{number % 60} as this number, so write N:M in quotes"
            )


def _from_file(path: Any, flag: str, extra: str, further: Collection[str]) -> dict[str, Any]:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{flag} must be the path of a file, got {path!r}")
    place = f"{flag} {os.fspath(path)}"
    values = _parsed(Path(path), place, extra)
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: must hold settings by name, such as 'sparsities: [0.9, 0.95]'")
    known = {*(field.name for field in dataclasses.fields(ASTConfig)), *further}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{place}: unknown setting {name!r}: {near_names(str(name), known)}")
        if name not in _OF_THE_SCRIPT and value is not None:
            found[name] = _read(name, value, f"{place}: {name}")
    return found


def _parsed(path: Path, place: str, extra: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: neither YAML nor JSON: {error}") from error
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        import yaml
    except ImportError as error:
        raise missing_extra(f"{place}, which is not JSON,", "PyYAML", extra) from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter from a date that there is not
        raise ConfigError(f"{place}: neither YAML nor JSON: {' '.join(str(error).split())}") from error
