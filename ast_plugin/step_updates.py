"""When a step updates masks, and what share is replaced: by the method's calendar, and by further rules."""

from __future__ import annotations

from collections.abc import Callable

from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.sub_nets import is_number
from ast_plugin.updates import MaskUpdater

UpdateRule = Callable[[str, int, int | None], float | None]
"""From a sub-net's name, the step and the one at which it was trained before that (None: never) to the drop fraction of
the mask update to make then, in [0, 1); None for none. A pure function: it may be asked twice, and on every rank."""


class UpdateRules:
    """Decides for each step whether masks are updated.

    Args:
        updater: Knows the method's calendars.
    """

    def __init__(self, updater: MaskUpdater) -> None:
        self._updater = updater
        self._rules: list[UpdateRule] = []

    def add(self, rule: UpdateRule) -> None:
        """Have `rule` asked, too, from the next training forward on.

        Raises:
            ConfigError: If it cannot be called.
        """
        if not callable(rule):
            raise ConfigError(
                f"rule must be a function of (sub_net, step, last_step), got {rule!r}; it returns a drop fraction or "
                "None"
            )
        self._rules.append(rule)

    def drop_fraction(self, sub_net: str, step: int, last_step: int | None) -> float | None:
        """Return the share of kept weights to replace in the update of a step, in [0, 1); None: no update is due.

        Of several the largest counts. Where a method makes no updates, no rule is asked.

        Args:
            sub_net: The sub-net that is trained at `step`.
            step: Optimizer step, from 0.
            last_step: When it was trained before that; None for never.

        Raises:
            ConfigError: If a rule returns something else.
            PluginError: If it fails.
        """
        updater = self._updater
        if not updater.method.updates:
            return None
        due = updater.is_due(sub_net, step, last_step)
        fractions = [updater.drop_fraction_at(sub_net, step)] if due else []
        for rule in self._rules:
            fraction = _asked(rule, sub_net, step, last_step)
            if fraction is not None:
                fractions.append(fraction)
        return max(fractions, default=None)


def _asked(rule: UpdateRule, sub_net: str, step: int, last_step: int | None) -> float | None:
    name = getattr(rule, "__qualname__", type(rule).__qualname__)
    try:
        fraction = rule(sub_net, step, last_step)
    except ConfigError:
        raise
    except Exception as error:
        raise PluginError(
            f"the rule {name} of add_mask_updates() failed at step {step}: {type(error).__name__}: {error}"
        ) from error
    if fraction is None:
        return None
    if not is_number(fraction) or not 0 <= fraction < 1:
        raise ConfigError(
            f"the rule {name} of add_mask_updates() must return a drop fraction in [0, 1) or None, got {fraction!r} at "
            f"step {step}"
        )
    return float(fraction)
