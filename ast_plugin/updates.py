"""Mask updates: from the weights (and the dense gradient) of a moment to the next masks of one sub-net."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.channel_states import ChannelStates
from ast_plugin.channel_updates import ChannelUpdates
from ast_plugin.channels import ChannelGroups
from ast_plugin.config import ASTConfig
from ast_plugin.decisions import Decided, MaskDecisions
from ast_plugin.distributions import Distribution, uniform
from ast_plugin.errors import ConfigError
from ast_plugin.mask_forms import as_mask
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method
from ast_plugin.plans import SubNetPlan
from ast_plugin.schedules import constant_drop_fraction, cosine_drop_fraction
from ast_plugin.selection_kernels import count_kept
from ast_plugin.sharding import full
from ast_plugin.weight_updates import WeightUpdates


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskUpdate:
    """The outcome of one mask update.

    Attributes:
        sub_net: Whose masks changed.
        target: Sparsity that the schedule asks for at this step, in [0, 1].
        achieved: Sparsity reached, in [0, 1].
        grown: By parameter name, bool masks of the weights that came back, or of those that the method decided to begin
            anew; parameters without any are left out, and so are channel sub-nets, whose units go on from their
            shared values.
        trimmed: Sparser channel sub-nets that lost units which this one dropped.
    """

    sub_net: str
    target: float
    achieved: float
    grown: dict[str, Tensor]
    trimmed: tuple[str, ...] = ()


class MaskUpdater:
    """Writes new masks into a `MaskStore` by a method, within patterns, along a schedule.

    Args:
        config: The run's settings: drop fraction, initial sparsity, seed, empty layers.
        plans: One plan a sub-net.
        method: The rule.
        distribution: How a sparsity is spread over the layers.
        masks: The store; changed in place.
        groups: The channel groups, where a plan has a pattern that goes by them.
        group_distribution: How the sparsity of channel sub-nets is spread over the groups.
        states: What units lie in beside the masked weights, for methods that score whole units.

    Raises:
        ConfigError: If an initial sparsity is asked of a method that has no ramp, groups are missing, a method that
            decides masks itself is to decide those of channels, or no sub-net has what the method is for.
    """

    def __init__(
        self,
        config: ASTConfig,
        plans: Sequence[SubNetPlan],
        *,
        method: Method,
        distribution: Distribution,
        masks: MaskStore,
        groups: ChannelGroups | None = None,
        group_distribution: Distribution = uniform,
        states: ChannelStates | None = None,
    ) -> None:
        if config.initial_sparsity is not None and method.initial_sparsity is None:
            raise ConfigError(
                f"initial_sparsity={config.initial_sparsity:g} has no meaning for method {method.name!r}, which starts "
                "at the target sparsity; leave it out, or choose a method with a ramp such as 'granet'"
            )
        if method.needs_channels and not any(plan.pattern.by_groups for plan in plans):
            raise ConfigError(
                f"method {method.name!r} scores whole channels, and no sub-net drops any: their patterns are "
                f"{', '.join(sorted({plan.pattern.name for plan in plans}))}; add pattern='channel', or choose "
                "another method"
            )
        self.config = config
        self.method = method
        self.plans = {plan.name: plan for plan in plans}
        self.masks = masks
        self._weights = WeightUpdates(config, method=method, distribution=distribution, masks=masks)
        self._channels: ChannelUpdates | None = None
        by_groups = [plan for plan in plans if plan.pattern.by_groups]
        self._decisions: MaskDecisions | None = None
        if method.decide is not None:
            if by_groups:
                raise ConfigError(
                    f"sub-net {by_groups[0].name!r} has pattern {by_groups[0].pattern.name!r}, and method "
                    f"{method.name!r} decides masks weight by weight; choose another of the two"
                )
            self._decisions = MaskDecisions(config, method=method, masks=masks, spread=self._weights.layer_sparsities)
        if groups is not None and len(groups) and by_groups:
            self._channels = ChannelUpdates(
                config,
                by_groups,
                method=method,
                distribution=group_distribution,
                masks=masks,
                groups=groups,
                states=states,
            )
        elif by_groups:
            raise ConfigError(
                f"sub-net {by_groups[0].name!r} has pattern {by_groups[0].pattern.name!r}, and there is no channel "
                "group; give groups, or choose another pattern"
            )

    def is_due(self, sub_net: str, step: int, last_step: int | None) -> bool:
        """Return whether `sub_net`, trained at `step` and before that at `last_step`, has an update to make now."""
        is_due = self.method.is_due or self.plans[sub_net].calendar.is_due
        return self.method.updates and is_due(step, last_step)

    def sparsity_at(self, sub_net: str, step: int) -> float:
        """Return the sparsity that the schedule asks of `sub_net` at `step`, in [0, 1]."""
        plan = self.plans[sub_net]
        start = self._initial_sparsity(plan)
        return self.method.sparsity_schedule(
            step, begin=plan.calendar.begin, end=plan.calendar.end, initial=start, final=plan.target_sparsity
        )

    def drop_fraction_at(self, sub_net: str, step: int) -> float:
        """Return the fraction of kept weights that `sub_net` replaces at `step`, in [0, 1)."""
        calendar = self.plans[sub_net].calendar
        fraction = cosine_drop_fraction if self.config.drop_schedule == "cosine" else constant_drop_fraction
        return fraction(
            step,
            begin=calendar.begin,
            end=calendar.end,
            initial=self.config.drop_fraction,
            final=self.config.drop_fraction_end,
        )

    def achieved(self, sub_net: str) -> float:
        """Return the sparsity that `sub_net` has now, in [0, 1], in the measure of its target.

        That is the share of zeros among the prunable weights, and for a channel sub-net the share of units dropped.
        """
        if self._channels is not None and self.plans[sub_net].pattern.by_groups:
            return self._channels.sparsity(sub_net)
        return self.masks.sparsity(sub_net)

    def reachable(self, sub_net: str) -> float:
        """Return the sparsity that `sub_net` can reach, in [0, 1]: of an N:M pattern, less where groups do not fit."""
        plan = self.plans[sub_net]
        if plan.pattern.fixed_sparsity is None:
            return plan.target_sparsity
        kept = sum(plan.pattern.kept_units(shape, plan.target_sparsity) for shape in self.masks.shapes.values())
        return 1 - kept / self.masks.total()

    def kept_units(self, sub_net: str) -> dict[str, Tensor]:
        """Return which units of the channel groups the masks of `sub_net` keep: by group name, bool (units,).

        Raises:
            ConfigError: If the run has no channel groups.
        """
        if self._channels is None:
            raise ConfigError('this run has no channel groups; they come with pattern="channel"')
        return self._channels.kept(sub_net)

    def initialize(self, weights: Mapping[str, Tensor]) -> None:
        """Write the first masks of every sub-net: as the method decides, by magnitude if it reselects, else at random.

        Args:
            weights: Dense weights by parameter name; not changed.

        Raises:
            ConfigError: If the distribution cannot reach a target on these layers, which would show much later.
            PluginError: If the method decides masks that do not fit.
        """
        for plan in sorted(self.plans.values(), key=lambda plan: plan.target_sparsity):  # nested ones, densest first
            sparsity = self._initial_sparsity(plan)
            decided = None if self._decisions is None else self._decisions.first(plan, sparsity, weights)
            if decided is not None:
                self.masks.replace(plan.name, decided)
            elif self._channels is not None and plan.pattern.by_groups:
                self.masks.replace(plan.name, self._channels.masks(self._channels.first(plan, sparsity, weights)))
            else:
                self.masks.replace(plan.name, self._weights.first(plan, sparsity, weights))

    def update(
        self,
        sub_net: str,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float | None = None,
    ) -> MaskUpdate:
        """Make an update of `sub_net` at `step`.

        Args:
            sub_net: Whose masks to renew.
            step: Optimizer step, from 0.
            weights: Dense weights by parameter name; not changed.
            gradients: Dense gradients by parameter name; parameters without one regrow by score 0. None: no method
                that needs gradients is in use.
            drop_fraction: Share of the kept weights or units of each layer to replace, in [0, 1); None: that of the
                schedule.
        """
        plan = self.plans[sub_net]
        sparsity = self.sparsity_at(sub_net, step)
        fraction = self.drop_fraction_at(sub_net, step) if drop_fraction is None else drop_fraction
        with torch.no_grad():
            if self._channels is not None and plan.pattern.by_groups:
                units = self._channels.renewed(plan, sparsity, step, weights, gradients, drop_fraction=fraction)
                return self._replace_units(self._channels, plan, units, sparsity)
            decided = self._decided(plan, sparsity, step, weights, gradients, drop_fraction=fraction)
            if decided is None:
                decided = self._weights.renewed(plan, sparsity, step, weights, gradients, drop_fraction=fraction), None
            masks, restarted = decided
            grown = self._grown(sub_net, masks) if restarted is None else restarted
            self.masks.replace(sub_net, masks)  # at once: an interrupt must not leave some to be renewed twice
            return MaskUpdate(sub_net=sub_net, target=sparsity, achieved=self.achieved(sub_net), grown=grown)

    def finalize(self, sub_net: str, step: int, weights: Mapping[str, Tensor]) -> MaskUpdate:
        """Bring `sub_net` to its target without regrowth: the run ended before it was trained once more.

        Args:
            sub_net: Whose masks to complete.
            step: Steps that the run has made.
            weights: Dense weights by parameter name; not changed.
        """
        plan = self.plans[sub_net]
        target = plan.target_sparsity
        ramped = self._initial_sparsity(plan) < target  # otherwise the last update was for the target, too
        decided = self._decided(plan, target, step, weights, None, drop_fraction=0.0) if ramped else None
        if decided is not None:
            self.masks.replace(sub_net, decided[0])
        elif self.method.reselect:
            if self._channels is not None and plan.pattern.by_groups:
                units = self._channels.renewed(plan, target, step, weights, None, drop_fraction=0)
                return self._replace_units(self._channels, plan, units, target)
            self.masks.replace(sub_net, self._weights.selected(plan, target, step, weights))
        return MaskUpdate(sub_net=sub_net, target=target, achieved=self.achieved(sub_net), grown={})

    def _decided(
        self,
        plan: SubNetPlan,
        sparsity: float,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float,
    ) -> Decided | None:
        """Return the masks that the method decides; None if it leaves them to scores."""
        if self._decisions is None:
            return None
        return self._decisions.renewed(plan, sparsity, step, weights, gradients, drop_fraction=drop_fraction)

    def _grown(self, sub_net: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `masks` keep and the present ones do not, where there is any."""
        present = ((name, full(self.masks.get(sub_net, name))) for name in masks)
        new = {name: masks[name] & ~mask.to(masks[name].device) for name, mask in present}
        return {name: mask for name, mask in new.items() if count_kept(mask)}

    def by_score(
        self, sub_net: str, scores: Mapping[str, Tensor], *, within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return masks of as many weights (or units) as `sub_net` keeps now, by the highest scores; nothing changes.

        One threshold goes for all parameters, as far as the pattern leaves the choice.

        Args:
            sub_net: Whose number and pattern.
            scores: One a weight, of any floating dtype, by parameter name.
            within: Masks of weights that go before all others; None for none.

        Returns:
            By parameter name, bool masks of the weights.
        """
        plan = self.plans[sub_net]
        with torch.no_grad():
            if self._channels is None or not plan.pattern.by_groups:
                return self._weights.by_score(plan, scores, within)
            masks = self._channels.masks(self._channels.by_score(plan, scores, within))
            return {name: as_mask(mask).to(scores[name].device) for name, mask in masks.items()}

    def _replace_units(
        self, channels: ChannelUpdates, plan: SubNetPlan, units: dict[str, Tensor], target: float
    ) -> MaskUpdate:
        trimmed = channels.trimmed(plan, units)
        for other, fewer in trimmed.items():  # before: sparser sub-nets are inside the denser ones at every moment
            self.masks.replace(other, channels.masks(fewer))
        self.masks.replace(plan.name, channels.masks(units))
        return MaskUpdate(
            sub_net=plan.name, target=target, achieved=self.achieved(plan.name), grown={}, trimmed=tuple(trimmed)
        )

    def _initial_sparsity(self, plan: SubNetPlan) -> float:
        start = self.method.initial_sparsity if self.config.initial_sparsity is None else self.config.initial_sparsity
        return plan.target_sparsity if start is None else min(start, plan.target_sparsity)
