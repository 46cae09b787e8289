"""One run with sup-tickets: what is checked when it begins, what happens at each step, what travels in its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ast_plugin.distributed import average_over_ranks
from ast_plugin.errors import ConfigError, StateError
from ast_plugin.integrations.family.sup_tickets_average import TicketAverage
from ast_plugin.integrations.family.sup_tickets_calendar import TicketCalendar
from ast_plugin.integrations.family.sup_tickets_rates import CyclicRates
from ast_plugin.integrations.family.sup_tickets_settings import TicketSettings
from ast_plugin.optimizers import switches_modes
from ast_plugin.schedules import resolve_calendars
from ast_plugin.sharding import is_sharded
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.versions import Version

RECOVERY = 200
"""Own steps of a sub-net in a cycle below which an exploration of weights is warned about."""

_OWN = ("settings", "highest", "recomputed")
_OF_EACH_RANK = ("running_mean", "running_var")


class TicketRun:
    """The tickets of one run.

    Args:
        training: The controller, whose hooks are not in place yet.
        settings: What the user chose.

    Attributes:
        average: The tickets so far.
        calendar: When they are made.
        ended: Whether the run trains no more.
        recomputed: Whether BatchNorm statistics of the superposed sub-nets were estimated from data.

    Raises:
        ConfigError: If this run cannot have tickets.
    """

    def __init__(self, training: AlternatingSparseTraining, settings: TicketSettings) -> None:
        self.training = training
        self.settings = settings
        self.average = TicketAverage()
        self.ended = False
        self.recomputed = False
        self._version: Version | None = None
        self._spoilt = False
        _refuse(training)
        config = training.config
        self.calendar = TicketCalendar.of(config.total_steps, cycles=settings.cycles, share=settings.share)
        updates = training.updates_masks
        self.calendar.check(
            training.sub_nets,
            training.sub_nets_at,
            share=settings.share,
            schedule_end=resolve_calendars(config, len(training.sub_nets))[0].end if updates else None,
        )
        self._rates = CyclicRates(training.optimizer, self._height, settings.lr)
        if updates and settings.explore > 0:
            training.add_mask_updates(self.drop_fraction_at)
            self._warn_of_short_cycles()
        detach = self._rates.attach()

        def end() -> None:
            self.ended = True
            detach()

        training.add_cleanup(end)

    @property
    def is_complete(self) -> bool:
        """Whether the last cycle is over."""
        return self.average.tickets > 0 and self.training.step >= self.calendar.end

    @property
    def rate(self) -> float | None:
        """The rate of the coming step, of the parameter group with the highest; None outside of the cycles."""
        height = self._height()
        return None if height is None else max(self._rates.rates(height))

    def statistics(self) -> dict[str, Any]:
        """Return where the run stands."""
        cycle = self.calendar.cycle_at(self.training.step)
        return {
            "tickets": self.average.tickets,
            "cycles": self.calendar.cycles,
            "begin": self.calendar.begin,
            "steps_per_cycle": self.calendar.length,
            "cycle": None if cycle is None else cycle + 1,
            "rate": self.rate,
        }

    def drop_fraction_at(self, sub_net: str, step: int, last_step: int | None) -> float | None:
        """Return which fraction of its weights a sub-net exchanges at a step of its own, None if masks stay."""
        return self.settings.explore if self.calendar.explores(step, last_step) else None

    def step_finished(self, step: int) -> None:
        """Take a ticket if that was the last step of a cycle."""
        ticket = self.calendar.ticket_after(step)
        if ticket is None:
            return
        if ticket == 1:
            self.average = TicketAverage()  # those of a run that was shorter
        self._version, self._spoilt, self.recomputed = None, False, False
        training = self.training
        private = self._private()
        for tensors in private.values():
            own = {name: tensor for name, tensor in tensors.items() if name.endswith(_OF_EACH_RANK)}
            average_over_ranks(own, like=dict(own), model=training.model)
        masks = {name: training.masks.of(name) for name in training.sub_nets}
        self.average.add(self._weights(), masks, private)

    def version(self) -> Version | None:
        """Return the superposed sub-nets; None before the last cycle is over."""
        if not self.is_complete:
            return None
        if self._version is None and not self._spoilt:
            average, masks = self.average, self._masks()
            if masks is None:
                return None
            private = {name: dict(tensors) for name, tensors in average.private.items()}
            self._version = Version(weights=self._kept_apart(average.weights), masks=masks, private=private)
        return self._version

    def state_dict(self) -> dict[str, Any]:
        """Return what the run goes on from."""
        state = {
            "settings": self.settings.to_dict(),
            "highest": self._rates.highest,
            "recomputed": self.recomputed,
            **self.average.state_dict(),
        }
        if self._version is not None:  # its BatchNorm may have been estimated anew
            state["private"] = {name: dict(tensors) for name, tensors in self._version.private.items()}
            state["weights"] = self._kept_apart(self._version.weights)
        return state

    def read_state(self, state: Mapping[str, Any]) -> TicketAverage:
        """Return the average that a state holds.

        Raises:
            StateError: If the state is damaged, or of another run.
        """
        if not isinstance(state, Mapping) or not set(_OWN) <= set(state):
            raise StateError(
                f"the saved state of sup_tickets is damaged or none: {type(state).__name__}; load another checkpoint"
            )
        self._rates.check_state(state["highest"])
        masks = {name: self.training.masks.of(name) for name in self.training.sub_nets}
        rest = {key: value for key, value in state.items() if key not in _OWN}
        return TicketAverage.from_state(rest, self._weights(), masks, self._private())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: If it is damaged, or of another run; nothing is changed then.
        """
        average = self.read_state(state)
        here = self.settings.to_dict()
        if average.tickets and state["settings"] != here:
            warnings.warn(
                f"sup_tickets goes on with other settings ({here}) than it was saved with ({state['settings']})",
                stacklevel=2,
            )
        self._rates.load_state(state["highest"])
        self.average = average
        self._version, self._spoilt, self.recomputed = None, False, bool(state["recomputed"])

    def _warn_of_short_cycles(self) -> None:
        """Say that cycles end before what they exchange has been learned, where they do."""
        training = self.training
        counts = self.calendar.own_steps(0, training.sub_nets, training.sub_nets_at, enough=RECOVERY)
        own = min(counts.values())
        if own < RECOVERY:
            warnings.warn(
                f"sup_tickets exchanges {self.settings.explore:.0%} of the weights at the start of each cycle, and "
                f"leaves a sub-net {own} steps of its own to learn the new ones. With 20 such steps that cost three "
                "sub-nets of 90 to 98 % zeros 1.5 to 7 points of accuracy, with 100 steps .4 to 2.9 (digits, GraNet); "
                "the paper's cycles have thousands. Use explore=0, a longer run, a larger share or fewer cycles",
                stacklevel=2,
            )

    def _masks(self) -> dict[str, dict[str, Tensor]] | None:
        """Return the masks of the superposed sub-nets; None, with a warning, if the weights are no numbers any more."""
        training, average = self.training, self.average
        masks: dict[str, dict[str, Tensor]] = {}
        around = None
        for name in sorted(training.sub_nets, key=training.masks.kept, reverse=True):  # nested ones, densest first
            scores = average.scores(name)
            if any(bool(score.isnan().any()) for score in scores.values()):
                self._spoilt = True
                warnings.warn(
                    "sup_tickets: weights were NaN at the end of a cycle, so their average is no network; there are no "
                    "superposed sub-nets",
                    stacklevel=2,
                )
                return None
            nested = _is_nested(training, name)
            masks[name] = training.masks_by_score(name, scores, within=around if nested else None)
            around = masks[name] if nested else around
        return masks

    def _kept_apart(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return them with buffers copied: statistics that sub-nets share are estimated in place, in a version."""
        parameters = dict(bare_model(self.training.model).named_parameters())
        return {name: tensor if name in parameters else tensor.clone() for name, tensor in weights.items()}

    def _height(self) -> float | None:
        return self.calendar.height_at(self.training.step)

    def _private(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.training.private_state(name) for name in self.training.sub_nets}

    def _weights(self) -> dict[str, Tensor]:
        """Return the parameters and persistent buffers that all sub-nets share, dense."""
        bare = bare_model(self.training.model)
        private = self.training.private_state(self.training.default_sub_net)
        found = {name: parameter.detach() for name, parameter in bare.named_parameters()}
        for path, module in bare.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    found[f"{path}.{key}" if path else key] = buffer
        return {name: tensor for name, tensor in found.items() if name not in private}


def _is_nested(training: AlternatingSparseTraining, name: str) -> bool:
    """Return whether a sub-net lies inside the denser ones: those of channels do."""
    try:
        training.kept_channels(name)
    except ConfigError:
        return False
    return True


def _refuse(training: AlternatingSparseTraining) -> None:
    """Refuse runs whose tickets would be no sub-nets.

    Raises:
        ConfigError: If this is one.
    """
    config, optimizer = training.config, training.optimizer
    if training.sampler is not None:
        raise ConfigError(
            f"sup_tickets averages networks whose masks change at the start of a cycle alone, and method="
            f"{config.method!r} draws them at every step; use another method, such as 'granet'"
        )
    if any(is_sharded(parameter) for parameter in training.model.parameters()):
        raise ConfigError(
            "sup_tickets averages whole weights, and every rank holds a part of them here; train with "
            "DistributedDataParallel, or without sup_tickets"
        )
    if switches_modes(optimizer):
        raise ConfigError(
            f"sup_tickets averages the weights of the ends of cycles, and {type(optimizer).__name__} keeps an average "
            "over all steps itself, by rates that do not go up again; use another optimizer, such as SGD or AdamW"
        )
