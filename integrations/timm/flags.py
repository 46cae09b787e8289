"""The ``--ast-...`` flags of a timm training script, and the settings that they give."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, near_names

TITLE = "Alternating sparse training"

_PREFIX = "ast_"
# Names in the namespace and the settings of `ASTConfig` that they stand for.
_OPTIONS = {
    "ast_sparsities": "sparsities",
    "ast_method": "method",
    "ast_pattern": "pattern",
    "ast_distribution": "distribution",
    "ast_update_interval": "update_interval",
    "ast_drop_fraction": "drop_fraction",
    "ast_correction": "correction",
    "ast_inactive": "inactive",
    "ast_include": "include",
    "ast_exclude": "exclude",
    "ast_eval_sub_net": "default_sub_net",
}
_NUMBERS = ("sparsities", "update_interval", "drop_fraction")
_LISTS = ("sparsities", "include", "exclude")
# The training script decides how long a run is.
_OF_THE_SCRIPT = ("total_steps", "steps_per_epoch")
_SEEDS = 1 << 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags ask for, checked as far as it can be without a model.

    Attributes:
        options: Settings of `ASTConfig` by name, all but the length of the run.
        report: Whether to write the report at the end.
    """

    options: Mapping[str, Any]
    report: bool = True

    def config(self, *, total_steps: int, steps_per_epoch: int) -> ASTConfig:
        """Return the settings of a run of that many optimizer steps.

        Raises:
            ConfigError: If they do not fit together.
        """
        return ASTConfig.from_dict({**self.options, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch})

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return tuple(spec.name for spec in self.config(total_steps=1, steps_per_epoch=1).sub_nets)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, in a group of their own; none is required, and none has an effect by itself."""
    group = parser.add_argument_group(
        TITLE,
        "One run yields a sparse sub-net for each of --ast-sparsities; without it the script runs as it is.",
    )

    def add(flag: str, **options: Any) -> None:
        group.add_argument(flag, default=None, **options)

    add("--ast-sparsities", nargs="+", type=_number_or_text, metavar="S", help="zeros of each sub-net: 0.9 0.95, 2:4")
    add("--ast-method", metavar="NAME", help="rule for mask updates (default: granet)")
    add("--ast-pattern", metavar="NAME", help="masks allowed: unstructured, 2:4, 4x4 ... (default: the first)")
    add("--ast-distribution", metavar="NAME", help="how zeros are spread over the layers (default: the method's)")
    add(
        "--ast-update-interval",
        type=_number_or_text,
        metavar="T",
        help="between mask updates of a sub-net: steps (100), or a fraction of the run (0.02, the default)",
    )
    add(
        "--ast-drop-fraction",
        type=_number_or_text,
        metavar="F",
        help="kept weights replaced at an update: 0.1",
    )
    add("--ast-correction", metavar="SCOPE", help="gradient correction: layer, global or off (default: layer)")
    add("--ast-inactive", metavar="RULE", help="weights outside the active sub-net: coast or freeze (default: coast)")
    add("--ast-include", nargs="+", metavar="GLOB", help="prune only parameters whose names match")
    add("--ast-exclude", nargs="+", metavar="GLOB", help="never prune parameters whose names match")
    add("--ast-eval-sub-net", metavar="NAME", help="whose metrics have the script's own names (default: the densest)")
    add("--ast-config", metavar="FILE", help="more settings, as YAML or JSON; flags are stronger")
    group.add_argument("--ast-no-report", action="store_true", default=False, help="write no report.html at the end")


def settings_of(args: argparse.Namespace) -> Settings | None:
    """Return what a parsed command line asks for; None if it asks for no alternating sparse training.

    Args:
        args: Parsed by a parser with the flags, possibly with defaults from timm's YAML file.

    Raises:
        ConfigError: If a value is out of range, an unknown setting stands in the file, or flags are given without
            ``--ast-sparsities``.
    """
    given = {name: value for name, value in vars(args).items() if name.startswith(_PREFIX) and value is not None}
    for name in given:
        if name not in (*_OPTIONS, "ast_config", "ast_no_report"):
            raise ConfigError(f"{name} in the configuration file is no flag: {near_names(name, _OPTIONS)}")
    if not isinstance(given.get("ast_no_report", False), bool):
        raise ConfigError(f"ast_no_report in the configuration file must be true or false, got {args.ast_no_report!r}")
    if given.get("ast_no_report") is False:
        del given["ast_no_report"]
    if not given:
        return None
    options = _from_file(given["ast_config"]) if "ast_config" in given else {}
    for name, option in _OPTIONS.items():
        if name in given:
            value = _read_word(given[name]) if option == "correction" else given[name]
            _check_colon(_flag(name), option, value)
            options[option] = [value] if option in _LISTS and not isinstance(value, (list, tuple)) else value
    if "sparsities" not in options:
        raise ConfigError(
            f"{', '.join(_flag(name) for name in given)}: no effect without --ast-sparsities; add it, for example: "
            "--ast-sparsities 0.9 0.95"
        )
    options.setdefault("seed", _seed(args))
    for option in _NUMBERS:
        if option in options:
            options[option] = _read_number(options[option])
    settings = Settings(options=options, report="ast_no_report" not in given)
    settings.config(total_steps=1, steps_per_epoch=1)
    return settings


def without_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Return the namespace as the script's own parser would have made it."""
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if not name.startswith(_PREFIX)})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_number(value: Any) -> Any:
    """Return numbers that a YAML file holds as text (YAML reads 1e-2 as one) as numbers."""
    if isinstance(value, (list, tuple)):
        return [_read_number(item) for item in value]
    return _number_or_text(value) if isinstance(value, str) else value


def _read_word(value: Any) -> Any:
    """Return the word ``off``, which YAML reads as false."""
    return "off" if value is False else value


def _check_colon(place: str, option: str, value: Any) -> None:
    """Refuse an N:M that YAML has read as a number to the base 60."""
    values = value if option == "sparsities" and isinstance(value, (list, tuple)) else [value]
    least = {"pattern": 60, "sparsities": 101}.get(option)  # smaller ones may be meant as percentages
    for number in values:
        if least is not None and isinstance(number, int) and number >= least:
            raise ConfigError(
                f"{place}: got {number}; YAML reads {number // 60}:{number % 60} as this number, so write N:M in quotes"
            )


def _seed(args: argparse.Namespace) -> int:
    seed = getattr(args, "seed", 0)
    return seed if isinstance(seed, int) and 0 <= seed < _SEEDS else 0


def _from_file(path: str) -> dict[str, Any]:
    import yaml  # timm itself needs it

    if not isinstance(path, str):
        raise ConfigError(f"--ast-config must be the path of a file, got {path!r}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ast-config {path}: cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ast-config {path}: neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--ast-config {path}: must hold settings by name, such as 'sparsities: [0.9, 0.95]'")
    known = {field.name for field in dataclasses.fields(ASTConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"--ast-config {path}: unknown setting {name!r}: {near_names(str(name), known)}")
        _check_colon(f"--ast-config {path}: {name}", name, values[name])
    if "correction" in values:
        values["correction"] = _read_word(values["correction"])
    return {name: value for name, value in values.items() if name not in _OF_THE_SCRIPT and value is not None}
