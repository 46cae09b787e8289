"""Mask updates weight by weight, within the pattern of each parameter: what is kept, dropped and grown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.config import ASTConfig
from ast_plugin.distributions import Distribution, DistributionRequest, LayerRequest, global_magnitude, kept_units
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method, Score, ScoreInputs, chance, magnitude, scores_of
from ast_plugin.patterns import level, nearest_count, weights_in
from ast_plugin.plans import SubNetPlan
from ast_plugin.random_state import seeded_generator
from ast_plugin.selection_kernels import count_kept
from ast_plugin.sharding import full


class WeightUpdates:
    """Chooses the masks of sub-nets whose pattern looks at one parameter at a time.

    Args:
        config: The run's settings.
        method: The rule.
        distribution: How a sparsity is spread over the layers.
        masks: The store; read only.
    """

    def __init__(self, config: ASTConfig, *, method: Method, distribution: Distribution, masks: MaskStore) -> None:
        self.config = config
        self.method = method
        self.distribution = distribution
        self.masks = masks

    def first(self, plan: SubNetPlan, sparsity: float, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks that a sub-net starts with: by score where the method reselects, else at random.

        Args:
            plan: The sub-net's plan.
            sparsity: The sparsity to start with, in [0, 1).
            weights: Dense weights by parameter name.

        Raises:
            ConfigError: If the distribution cannot reach the target on these layers, which would show much later.
        """
        self._counts(plan, plan.target_sparsity, lambda: self._distribution_scores(plan, {}, weights, chance))
        first = chance if not self.method.reselect else self.method.drop_score
        return self._expanded(plan, self._select(plan, sparsity, weights, None, step=-1, scores=first))

    def layer_sparsities(self, plan: SubNetPlan, sparsity: float, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sparsity of every parameter, in [0, 1], as the distribution spreads `sparsity` over them.

        Raises:
            ConfigError: If the distribution cannot reach it on these layers.
        """
        counts = self._counts(plan, sparsity, lambda: self._distribution_scores(plan, {}, weights, chance))
        units = (plan.pattern.unit_count(self.masks.shapes[name]) for name in self.masks.parameters)
        shares = (1 - count / total for count, total in zip(counts, units, strict=True))
        return dict(zip(self.masks.parameters, shares, strict=True))

    def selected(
        self, plan: SubNetPlan, sparsity: float, step: int, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return masks that are chosen anew from all weights by the drop score, without regrowth."""
        return self._expanded(
            plan, self._select(plan, sparsity, weights, None, step=step, scores=self.method.drop_score)
        )

    def renewed(
        self,
        plan: SubNetPlan,
        sparsity: float,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float,
    ) -> dict[str, Tensor]:
        """Return the masks of a sub-net after its update.

        Args:
            plan: The sub-net's plan.
            sparsity: The sparsity that the schedule asks for now, in [0, 1).
            step: Optimizer step, from 0.
            weights: Dense weights by parameter name.
            gradients: Dense gradients by parameter name; None where the method needs none.
            drop_fraction: Share of the kept units of each layer that is replaced, in [0, 1).
        """
        drop_scores: dict[str, Tensor] = {}
        if self.method.reselect:
            selected = self._select(
                plan, sparsity, weights, gradients, step=step, scores=self.method.drop_score, unit_scores=drop_scores
            )
        else:
            present = ((name, full(self.masks.get(plan.name, name))) for name in self.masks.parameters)
            selected = {name: plan.pattern.reduce_mask(mask) for name, mask in present}
        masks: dict[str, Tensor] = {}
        owed = self._owed(plan, sparsity, selected, weights)
        for name, kept in selected.items():
            if self.method.grow_score is not None:
                scores = drop_scores.pop(name, None)
                kept, owed = self._regrow(plan, name, kept, scores, weights, gradients, step, owed, drop_fraction)
            masks[name] = plan.pattern.expand(kept, self.masks.shapes[name])
        return masks

    def by_score(
        self, plan: SubNetPlan, scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return masks of as many weights as a sub-net keeps now, those with the highest scores in all parameters.

        Args:
            plan: The sub-net's plan.
            scores: One a weight, by parameter name.
            within: Masks whose units go before all others; None for none.
        """
        total = self.masks.total()
        sparsity = (total - self.masks.kept(plan.name)) / total
        made: dict[str, Tensor] = {}
        for name in self.masks.parameters:
            units = plan.pattern.unit_scores(scores[name])
            if within is not None:
                units = units.masked_fill(~plan.pattern.reduce_mask(within[name].to(units.device)), -math.inf)
            made[name] = units
        if sparsity <= 0:
            return {name: torch.ones_like(scores[name], dtype=torch.bool) for name in made}
        counts = self._counts(plan, sparsity, lambda: list(made.values()), global_magnitude)
        return self._expanded(plan, self._best(plan, counts, made))

    def _expanded(self, plan: SubNetPlan, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return unit masks as masks of weights."""
        return {name: plan.pattern.expand(kept, self.masks.shapes[name]) for name, kept in units.items()}

    def _inputs(
        self,
        plan: SubNetPlan,
        name: str,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        step: int,
    ) -> ScoreInputs:
        return ScoreInputs(
            weight=weights[name].detach(),
            gradient=None if gradients is None else gradients.get(name),
            mask=full(self.masks.get(plan.name, name)),
            generator=seeded_generator(self.config.seed, plan.name, step, name),
        )

    def _select(
        self,
        plan: SubNetPlan,
        sparsity: float,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        step: int,
        scores: Score,
        unit_scores: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return unit masks with the exact counts that the distribution gives for `sparsity`.

        `unit_scores` is filled with the scores it made, for use by the regrowth.
        """
        names = self.masks.parameters
        pattern = plan.pattern
        if sparsity <= 0:
            units = {name: pattern.unit_count(self.masks.shapes[name]) for name in names}
            return {n: torch.ones(count, dtype=torch.bool, device=weights[n].device) for n, count in units.items()}
        made: dict[str, Tensor] = {} if unit_scores is None else unit_scores
        for name in names:
            made[name] = self._unit_scores(plan, scores, self._inputs(plan, name, weights, gradients, step))
        counts = self._counts(plan, sparsity, lambda: self._distribution_scores(plan, made, weights, scores))
        return self._best(plan, counts, made)

    def _best(self, plan: SubNetPlan, counts: Sequence[int], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return unit masks of the best units, as many in each parameter as `counts` says, by the scores in `made`."""
        pattern = plan.pattern
        chosen = {}
        owed = 0.0
        for name, count in zip(self.masks.parameters, counts, strict=True):
            shape = self.masks.shapes[name]
            kept = pattern.keep_top(made[name], count, shape)
            sizes = pattern.unit_sizes(shape)
            if sizes is not None:
                # Blocks cut off at an edge hold fewer weights than the average. The next layer makes up the rest.
                wanted = count * math.prod(shape) / sizes.numel() + owed
                kept = level(kept, sizes, made[name], wanted)
                owed = wanted - weights_in(kept, sizes)
            chosen[name] = kept
        return chosen

    def _counts(
        self,
        plan: SubNetPlan,
        sparsity: float,
        unit_scores: Callable[[], list[Tensor]],
        distribution: Distribution | None = None,
    ) -> list[int]:
        """Return how many units each parameter keeps at `sparsity`, adding up exactly."""
        pattern = plan.pattern
        shapes = {name: self.masks.shapes[name] for name in self.masks.parameters}
        if pattern.fixed_sparsity is not None:
            return [pattern.kept_units(shape, sparsity) for shape in shapes.values()]
        request = DistributionRequest(
            layers=tuple(
                LayerRequest(name=name, shape=shape, units=pattern.unit_count(shape)) for name, shape in shapes.items()
            ),
            sparsity=sparsity,
            target_sparsity=plan.target_sparsity,
            sub_net=plan.name,
            unit_scores=unit_scores,
        )
        shares = (distribution or self.distribution)(request)
        return kept_units(request, shares, allow_empty_layers=self.config.allow_empty_layers)

    def _distribution_scores(
        self,
        plan: SubNetPlan,
        made: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        scores: Score,
    ) -> list[Tensor]:
        """Return what a global threshold compares: random first masks take their counts from the magnitudes."""
        if scores is not chance:
            return [made[name] for name in self.masks.parameters]
        return [
            self._unit_scores(plan, magnitude, self._inputs(plan, name, weights, None, -1))
            for name in self.masks.parameters
        ]

    def _regrow(
        self,
        plan: SubNetPlan,
        name: str,
        kept: Tensor,
        drop_scores: Tensor | None,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        step: int,
        owed: float,
        drop_fraction: float,
    ) -> tuple[Tensor, float]:
        """Return the units after drop and regrowth, and how many weights later layers have to make up."""
        grow_score = self.method.grow_score
        total = count_kept(kept)
        count = int(drop_fraction * total)
        if grow_score is None or count == 0 or total == kept.numel():
            return kept, owed
        inputs = self._inputs(plan, name, weights, gradients, step)
        if drop_scores is None:
            drop_scores = self._unit_scores(plan, self.method.drop_score, inputs)
        grow_scores = self._unit_scores(plan, grow_score, inputs)
        after = plan.pattern.regrow(kept, drop_scores, grow_scores, count, self.masks.shapes[name])
        sizes = plan.pattern.unit_sizes(self.masks.shapes[name])
        if sizes is None:
            return after, owed
        wanted = weights_in(kept, sizes) + owed
        after = level(after, sizes, drop_scores, wanted)
        return after, wanted - weights_in(after, sizes)

    def _owed(
        self, plan: SubNetPlan, sparsity: float, selected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> float:
        """Return how many weights too few the chosen units hold, which only units of unequal size can make up."""
        sizes = {name: plan.pattern.unit_sizes(self.masks.shapes[name]) for name in selected}
        if all(unequal is None for unequal in sizes.values()):
            return 0.0
        held = 0.0
        for name, kept in selected.items():
            unequal = sizes[name]
            if unequal is None:
                held += count_kept(kept) * self.masks.total(name) / kept.numel()
            else:
                held += weights_in(kept, unequal)
        return nearest_count(self.masks.total(), sparsity) - held

    def _unit_scores(self, plan: SubNetPlan, score: Score, inputs: ScoreInputs) -> Tensor:
        return plan.pattern.unit_scores(scores_of(self.method, score, inputs))
