"""Settings of a run as one more dataclass for `transformers.HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ast_plugin.errors import ConfigError
from ast_plugin.flag_settings import CONFIG, CONFIG_HELP, FLAGS, check_settings, read_flags, read_value
from ast_plugin.integrations.family.sup_tickets_flags import FLAG, HELP, METAVAR, SETTING, take_sup_tickets

if TYPE_CHECKING:
    from ast_plugin.integrations.transformers.callback import ASTCallback

    _Sparsity = float | str
else:
    _Sparsity = str  # the parser calls it on each word of a command line

_FLAGS = {flag.name: flag for flag in FLAGS}
_RESUME_PLAIN = "ast_resume_plain"


def _texts(metavar: str, text: str) -> dict[str, str]:
    # The parser's help appends "(default: None)" to a text without this format.
    return {"metavar": metavar, "help": f"{text}%(default).0s"}


_TEXTS = {flag.name: _texts(flag.metavar, flag.help) for flag in FLAGS} | {
    FLAG: _texts(METAVAR, HELP),
    CONFIG: _texts("FILE", CONFIG_HELP),
}


@dataclass
class ASTArguments:
    """What a script's command line, dict or file asks of alternating sparse training; without sparsities, nothing.

    Numbers may be given as text, and one value for a list; both are read when the object is made. Settings are checked
    then, and again by `callback`, so they may be changed in between.

    Attributes:
        ast_sparsities: A sub-net each: zeros in [0, 1), or ``"N:M"``.
        ast_method: Rule for mask updates: ``granet`` unless given.
        ast_pattern: Masks allowed: ``unstructured`` unless given, ``"N:M"``, ``"RxC"``, ``channel``.
        ast_distribution: How zeros are spread over the layers; the method's unless given.
        ast_update_interval: Time between two mask updates of one sub-net: optimizer steps (100), or a fraction of the
            run (0.02, which is the default).
        ast_drop_fraction: Fraction of the kept weights that the first update replaces, in [0, 1).
        ast_correction: Gradient correction: ``layer`` unless given, ``global``, ``off``.
        ast_inactive: What the optimizer does to weights outside the active sub-net: ``coast`` unless given, ``freeze``.
        ast_include: Globs on parameter names: prune those that match alone.
        ast_exclude: Globs on parameter names: never prune those.
        ast_eval_sub_net: Sub-net whose metrics have plain names, such as ``eval_loss``; the densest unless given.
        ast_sup_tickets: Average the sub-nets at the ends of this many cycles, the last tenth of the run; see
            `ast_plugin.integrations.family.SupTickets`.
        ast_config: YAML or JSON file with settings of `ASTConfig`, and of `SupTickets` under ``sup_tickets``; the
            arguments above are stronger.
        ast_resume_plain: Whether a checkpoint without sub-nets may be resumed.

    Raises:
        ConfigError: If a setting is out of range, the file cannot be read or has an unknown setting, or there are
            settings without sparsities; the message begins with the argument, as in ``--ast_update_interval``.
        MissingExtraError: If the file is not JSON, and the package that reads YAML is not installed.

    Example:
        >>> parser = HfArgumentParser((TrainingArguments, ASTArguments))
        >>> training_args, ast_args = parser.parse_args_into_dataclasses()
        >>> trainer = Trainer(model, training_args, ..., callbacks=[*ast_args.callbacks()])
    """

    _argument_group_name: ClassVar[str] = "Alternating sparse training"

    # `str` stands second where several types are possible: the parser takes that one.
    ast_sparsities: list[_Sparsity] | None = field(default=None, metadata=_TEXTS["ast_sparsities"])
    ast_method: str | None = field(default=None, metadata=_TEXTS["ast_method"])
    ast_pattern: str | None = field(default=None, metadata=_TEXTS["ast_pattern"])
    ast_distribution: str | None = field(default=None, metadata=_TEXTS["ast_distribution"])
    ast_update_interval: float | str | None = field(default=None, metadata=_TEXTS["ast_update_interval"])
    ast_drop_fraction: float | str | None = field(default=None, metadata=_TEXTS["ast_drop_fraction"])
    ast_correction: str | None = field(default=None, metadata=_TEXTS["ast_correction"])
    ast_inactive: str | None = field(default=None, metadata=_TEXTS["ast_inactive"])
    ast_include: list[str] | None = field(default=None, metadata=_TEXTS["ast_include"])
    ast_exclude: list[str] | None = field(default=None, metadata=_TEXTS["ast_exclude"])
    ast_eval_sub_net: str | None = field(default=None, metadata=_TEXTS["ast_eval_sub_net"])
    ast_sup_tickets: int | str | None = field(default=None, metadata=_TEXTS["ast_sup_tickets"])
    ast_config: str | None = field(default=None, metadata=_TEXTS["ast_config"])
    ast_resume_plain: bool = field(
        default=False, metadata={"help": "resume a checkpoint without sub-nets: they start from its weights"}
    )

    def __post_init__(self) -> None:
        # Where a class has both this and TrainingArguments as bases.
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()
        for name, flag in _FLAGS.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, read_value(flag, value, _spelled))
        self._options()

    def callback(self) -> ASTCallback | None:
        """Return a new callback for a Trainer; None if no alternating sparse training was asked for.

        Raises:
            ConfigError: As when this object is made, if it was changed since.
        """
        options = self._options()
        if options is None:
            return None
        from ast_plugin.integrations.transformers.callback import ASTCallback

        return ASTCallback(resume_plain=self.ast_resume_plain, **options)

    def callbacks(self) -> list[ASTCallback]:
        """Return what to add to a Trainer's ``callbacks``: the new callback, or nothing.

        Raises:
            ConfigError: As when this object is made, if it was changed since.
        """
        callback = self.callback()
        return [] if callback is None else [callback]

    def _options(self) -> dict[str, Any] | None:
        """Return the settings by the names of `ASTConfig`, and ``sup_tickets``, checked; None without any."""
        if not isinstance(self.ast_resume_plain, bool):
            raise ConfigError(f"{_spelled(_RESUME_PLAIN)} must be true or false, got {self.ast_resume_plain!r}")
        values = {name: getattr(self, name) for name in (*_FLAGS, FLAG, CONFIG)}
        given = {name: value for name, value in values.items() if value is not None}
        if self.ast_resume_plain:
            given[_RESUME_PLAIN] = True
        if not given:
            return None
        options = read_flags(given, spelled=_spelled, extra="hf", further=(SETTING,))
        tickets = take_sup_tickets(options, given, spelled=_spelled)
        check_settings(options, given, spelled=_spelled)
        return options if tickets is None else {**options, SETTING: tickets}


def _spelled(name: str) -> str:
    return f"--{name}"
