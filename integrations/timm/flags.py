"""The ``--ast-...`` flags of a timm training script, and the settings that they give."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, near_names
from ast_plugin.flag_settings import CONFIG, CONFIG_HELP, FLAGS, NUMBERS, PREFIX, read_flags, read_number
from ast_plugin.integrations.family.sup_tickets import SupTickets
from ast_plugin.integrations.family.sup_tickets_flags import FLAG, HELP, METAVAR, SETTING, take_sup_tickets

TITLE = "Alternating sparse training"

_NO_REPORT = "ast_no_report"
_SEEDS = 1 << 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags ask for, checked as far as it can be without a model.

    Attributes:
        options: Settings of `ASTConfig` by name, all but the length of the run.
        report: Whether to write the report at the end.
        tickets: Settings of `SupTickets` by name; None for a run without.
    """

    options: Mapping[str, Any]
    report: bool = True
    tickets: Mapping[str, Any] | None = None

    def config(self, *, total_steps: int, steps_per_epoch: int) -> ASTConfig:
        """Return the settings of a run of that many optimizer steps.

        Raises:
            ConfigError: If they do not fit together.
        """
        return ASTConfig.from_dict({**self.options, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch})

    def sup_tickets(self) -> SupTickets | None:
        """Return new tickets for a run; None if none were asked for."""
        return None if self.tickets is None else SupTickets(**self.tickets)

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
    for flag in FLAGS:
        group.add_argument(
            _spelled(flag.name),
            nargs="+" if flag.several else None,
            type=read_number if flag.setting in NUMBERS else str,
            metavar=flag.metavar,
            help=flag.help,
        )
    group.add_argument(_spelled(FLAG), type=int, metavar=METAVAR, help=HELP)
    group.add_argument(_spelled(CONFIG), metavar="FILE", help=CONFIG_HELP)
    group.add_argument("--ast-no-report", action="store_true", default=False, help="write no report.html at the end")


def settings_of(args: argparse.Namespace) -> Settings | None:
    """Return what a parsed command line asks for; None if it asks for no alternating sparse training.

    Args:
        args: Parsed by a parser with the flags, possibly with defaults from timm's YAML file.

    Raises:
        ConfigError: If a value is out of range, an unknown setting stands in the file, or flags are given without
            ``--ast-sparsities``.
    """
    given = {name: value for name, value in vars(args).items() if name.startswith(PREFIX) and value is not None}
    flags = [*(flag.name for flag in FLAGS), FLAG]
    for name in given:
        if name not in (*flags, CONFIG, _NO_REPORT):
            raise ConfigError(f"{name} in the configuration file is no flag: {near_names(name, flags)}")
    if not isinstance(given.get(_NO_REPORT, False), bool):
        raise ConfigError(f"ast_no_report in the configuration file must be true or false, got {args.ast_no_report!r}")
    if given.get(_NO_REPORT) is False:
        del given[_NO_REPORT]
    if not given:
        return None
    options = read_flags(given, spelled=_spelled, extra="timm", further=(SETTING,))
    tickets = take_sup_tickets(options, given, spelled=_spelled)
    options.setdefault("seed", _seed(args))
    settings = Settings(options=options, report=_NO_REPORT not in given, tickets=tickets)
    settings.config(total_steps=1, steps_per_epoch=1)
    return settings


def without_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Return the namespace as the script's own parser would have made it."""
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if not name.startswith(PREFIX)})


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _seed(args: argparse.Namespace) -> int:
    seed = getattr(args, "seed", 0)
    return seed if isinstance(seed, int) and 0 <= seed < _SEEDS else 0
