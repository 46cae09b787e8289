"""Mask updates of channel sub-nets: which units of each group are kept, nested from sub-net to sub-net.

A sub-net keeps the share of units that its sparsity asks for, counted over all groups, and by default in each of them.
The units of a sparser channel sub-net are always among those of every denser one: it chooses among theirs, and they
keep its own first. Where a denser one has to become sparser than another is at that moment, inside a ramp, the units
that it drops go from the other too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.channel_scores import ChannelScores, Units
from ast_plugin.channel_states import ChannelStates
from ast_plugin.channels import ChannelGroups
from ast_plugin.config import ASTConfig
from ast_plugin.distributions import Distribution, DistributionRequest, LayerRequest, global_magnitude, kept_units
from ast_plugin.errors import ConfigError
from ast_plugin.mask_forms import CutMask
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method, Score, chance, magnitude
from ast_plugin.plans import SubNetPlan
from ast_plugin.selection_kernels import count_kept, keep_largest
from ast_plugin.sharding import full


class ChannelUpdates:
    """Chooses the units of channel sub-nets by a method's scores.

    Args:
        config: The run's settings.
        plans: The plans of the channel sub-nets.
        method: The rule.
        distribution: How a sparsity is spread over the groups.
        masks: The store; read only.
        groups: The groups of the model.
        states: What the units lie in beside the masked weights, for methods that score whole units.

    Raises:
        ConfigError: If there is no group, or a target leaves a group without any unit.
    """

    def __init__(
        self,
        config: ASTConfig,
        plans: Sequence[SubNetPlan],
        *,
        method: Method,
        distribution: Distribution,
        masks: MaskStore,
        groups: ChannelGroups,
        states: ChannelStates | None = None,
    ) -> None:
        self.groups = groups
        self._config = config
        self._method = method
        self._distribution = distribution
        self._masks = masks
        self._order = sorted(plans, key=lambda plan: plan.target_sparsity)
        self._known: dict[str, tuple[int, Units]] = {}
        self._sizes = {group.name: group.units for group in groups.groups}
        self._targets: dict[str, dict[str, int]] = {}
        self._scores = ChannelScores(method, masks, groups, seed=config.seed, states=states)

    def kept(self, sub_net: str) -> Units:
        """Return which units a sub-net keeps now: by group name, bool (units,). For reading only."""
        known = self._known.get(sub_net)
        revision = self._masks.revision(sub_net)
        if known is None or known[0] != revision:
            noted = self._masks.units(sub_net)
            if noted is None:
                noted = self.groups.kept({name: full(mask) for name, mask in self._masks.of(sub_net).items()})
            known = self._known[sub_net] = revision, dict(noted)
        return known[1]

    def sparsity(self, sub_net: str) -> float:
        """Return the share of all units that a sub-net drops now, in [0, 1]."""
        return self.groups.share_dropped(self.kept(sub_net))

    def first(self, plan: SubNetPlan, sparsity: float, weights: Mapping[str, Tensor]) -> Units:
        """Return the units that a sub-net starts with: by score where the method reselects, else at random.

        Sub-nets have to be asked for in the order of their targets, the densest first.

        Args:
            plan: The sub-net's plan.
            sparsity: The share of units to drop, in [0, 1).
            weights: Dense weights by parameter name.

        Raises:
            ConfigError: If the target leaves a group without any unit, or asks for units that a denser sub-net drops.
        """
        counts = self._counts(plan, plan.target_sparsity, lambda: self._scored(plan, magnitude, -1, weights, None))
        self._check_nested(plan, counts)
        score = self._method.drop_score if self._method.reselect else chance
        if self._method.channel_score is not None and (sparsity <= 0 or score is chance):
            self._scored(plan, self._method.drop_score, -1, weights, None)  # what fails would do so much later
        return self._select(plan, sparsity, weights, None, -1, score, inner=None)

    def renewed(
        self,
        plan: SubNetPlan,
        sparsity: float,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float,
    ) -> Units:
        """Return the units that a sub-net keeps after its update.

        Args:
            plan: The sub-net's plan.
            sparsity: The share of units to drop now, in [0, 1).
            step: Optimizer step, from 0.
            weights: Dense weights by parameter name.
            gradients: Dense gradients by parameter name; None where the method needs none.
            drop_fraction: Share of the kept units of each group that is replaced, in [0, 1); 0 for none.
        """
        if self._method.reselect:
            inner = self._inner(plan)
            chosen = self._select(plan, sparsity, weights, gradients, step, self._method.drop_score, inner=inner)
        else:
            chosen = dict(self.kept(plan.name))
        if self._method.grow_score is None or drop_fraction <= 0:
            return chosen
        inner, allowed = self._inner(plan), self._allowed(plan)
        drop = self._scored(plan, self._method.drop_score, step, weights, gradients)
        grow = self._scored(plan, self._method.grow_score, step, weights, gradients)
        return {
            name: _regrown(flags, drop[name], grow[name], drop_fraction, inner=inner.get(name), allowed=allowed[name])
            for name, flags in chosen.items()
        }

    def by_score(self, plan: SubNetPlan, scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None) -> Units:
        """Return as many units as a sub-net keeps now, those with the highest mean scores in all groups.

        Args:
            plan: The sub-net's plan.
            scores: One a weight, by parameter name.
            within: Masks whose units go before all others; None for none.
        """
        made = self._scores.of_weights(scores)
        if within is not None:
            first = self.groups.kept(within)
            made = {name: units.masked_fill(~first[name].to(units.device), -math.inf) for name, units in made.items()}
        request = self._request(plan, self.sparsity(plan.name), lambda: made)
        counts = kept_units(request, global_magnitude(request), allow_empty_layers=False)
        return {name: keep_largest(made[name], count) for name, count in zip(self._sizes, counts, strict=True)}

    def trimmed(self, plan: SubNetPlan, units: Units) -> dict[str, Units]:
        """Return the units of sparser sub-nets that hold any which `units` of `plan` lack, without those."""
        found = {}
        for other in self._sparser(plan):
            present = self.kept(other.name)
            if any(bool((present[name].to(flags.device) & ~flags).any()) for name, flags in units.items()):
                found[other.name] = {name: present[name].to(flags.device) & flags for name, flags in units.items()}
        return found

    def masks(self, units: Mapping[str, Tensor]) -> dict[str, CutMask]:
        """Return units as masks of weights, by parameter name."""
        return self.groups.cut_masks(units, self._masks.shapes)

    def _check_nested(self, plan: SubNetPlan, counts: dict[str, int]) -> None:
        """Refuse targets that ask a sparser sub-net for more units of a group than a denser one keeps."""
        self._targets[plan.name] = counts
        if not isinstance(self._config.distribution, Mapping):
            return  # one rule for all: at most roundings differ
        for other in self._denser(plan):
            for name, count in counts.items():
                held = self._targets[other.name][name]
                if count > held + 1:
                    raise ConfigError(
                        f"distribution asks for {count} of {self._sizes[name]} units of channel group {name!r} in "
                        f"sub-net {plan.name!r}, and for {held} in {other.name!r}, which is denser and has to hold "
                        f"them all; give {plan.name!r} a higher sparsity there"
                    )

    def _denser(self, plan: SubNetPlan) -> list[SubNetPlan]:
        return self._order[: self._order.index(plan)]

    def _sparser(self, plan: SubNetPlan) -> list[SubNetPlan]:
        return self._order[self._order.index(plan) + 1 :]

    def _allowed(self, plan: SubNetPlan) -> dict[str, Tensor | None]:
        """Return the units that every denser sub-net keeps, None where there is no denser one."""
        allowed: dict[str, Tensor | None] = dict.fromkeys(self._sizes)
        for other in self._denser(plan):
            for name, flags in self.kept(other.name).items():
                before = allowed[name]
                allowed[name] = flags if before is None else before & flags
        return allowed

    def _inner(self, plan: SubNetPlan) -> Units:
        """Return the units that any sparser sub-net keeps; empty where there is no sparser one."""
        inner: Units = {}
        for other in self._sparser(plan):
            for name, flags in self.kept(other.name).items():
                inner[name] = inner[name] | flags if name in inner else flags
        return inner

    def _select(
        self,
        plan: SubNetPlan,
        sparsity: float,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        step: int,
        score: Score,
        *,
        inner: Units | None,
    ) -> Units:
        if sparsity <= 0:
            return {name: torch.ones(units, dtype=torch.bool) for name, units in self._sizes.items()}
        scores = self._scored(plan, score, step, weights, gradients)
        # Random first units take their counts from the magnitudes, as random weights do.
        compared = magnitude if score is chance else score
        counts = self._counts(
            plan, sparsity, lambda: scores if compared is score else self._scored(plan, compared, -1, weights, None)
        )
        allowed = self._allowed(plan)
        counts = _within(
            counts, {name: self._sizes[name] if f is None else count_kept(f) for name, f in allowed.items()}
        )
        return {
            name: _best(scores[name], count, inner=(inner or {}).get(name), allowed=allowed[name])
            for name, count in counts.items()
        }

    def _scored(
        self,
        plan: SubNetPlan,
        score: Score,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
    ) -> Units:
        return self._scores.of(plan.name, score, step, weights, gradients, self.kept(plan.name))

    def _counts(self, plan: SubNetPlan, sparsity: float, scores: Callable[[], Units]) -> dict[str, int]:
        """Return how many units each group keeps at `sparsity`, adding up exactly."""
        request = self._request(plan, sparsity, scores)
        shares = self._distribution(request)
        if self._config.distribution != "global":
            for group, share in zip(self.groups.groups, shares, strict=True):
                if (1 - share) * group.units < 0.5:
                    raise ConfigError(
                        f"sparsity {share:g} of sub-net {plan.name!r} leaves nothing of channel group {group.name!r}, "
                        f"which has {group.units} {group.kind}; lower the sparsity, give the group one of its own "
                        f"(distribution={{{group.name!r}: {1 - 1 / group.units:.3g}}}), or exclude its weights"
                    )
        held = request.kept_weights
        if held < len(self._sizes):
            raise ConfigError(
                f"sparsity {sparsity:g} of sub-net {plan.name!r} keeps {held} of {sum(self._sizes.values())} units, "
                f"which is not one in each of the {len(self._sizes)} channel groups; lower the sparsity, or exclude "
                "weights of the smallest groups"
            )
        counts = kept_units(request, shares, allow_empty_layers=False)
        return dict(zip(self._sizes, counts, strict=True))

    def _request(self, plan: SubNetPlan, sparsity: float, scores: Callable[[], Units]) -> DistributionRequest:
        return DistributionRequest(
            layers=tuple(LayerRequest(name=name, shape=(units,), units=units) for name, units in self._sizes.items()),
            sparsity=sparsity,
            target_sparsity=plan.target_sparsity,
            sub_net=plan.name,
            unit_scores=lambda: list(scores().values()),
        )


def _within(counts: Mapping[str, int], room: Mapping[str, int]) -> dict[str, int]:
    """Return counts that no group is too small for, with the same sum where there is room for it."""
    fitting = {name: min(count, room[name]) for name, count in counts.items()}
    missing = sum(counts.values()) - sum(fitting.values())
    while missing > 0:
        name = max(fitting, key=lambda name: room[name] - fitting[name])
        if fitting[name] == room[name]:
            break
        fitting[name] += 1
        missing -= 1
    return fitting


def _best(scores: Tensor, count: int, *, inner: Tensor | None, allowed: Tensor | None) -> Tensor:
    """Return the `count` best units among `allowed`, those in `inner` first; fewer if no more are allowed."""
    everything = torch.ones_like(scores, dtype=torch.bool)
    allowed = everything if allowed is None else allowed.to(scores.device)
    count = min(count, count_kept(allowed))
    if inner is None:
        return keep_largest(scores, count, among=allowed)
    first = inner.to(scores.device) & allowed
    held = count_kept(first)
    if held >= count:
        return keep_largest(scores, count, among=first)
    return first | keep_largest(scores, count - held, among=allowed & ~first)


def _regrown(
    kept: Tensor, drop: Tensor, grow: Tensor, fraction: float, *, inner: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """Return the units after a share of them was dropped and as many grown; `inner` ones are not dropped."""
    kept = kept.to(drop.device)
    allowed = torch.ones_like(kept) if allowed is None else allowed.to(drop.device)
    fixed = torch.zeros_like(kept) if inner is None else inner.to(drop.device) & kept
    loose = kept & ~fixed
    count = min(int(fraction * count_kept(kept)), count_kept(loose))
    if count <= 0 or not bool((allowed & ~kept).any()):
        return kept
    survivors = fixed | keep_largest(drop, count_kept(loose) - count, among=loose)
    return survivors | keep_largest(grow, count, among=allowed & ~survivors)
