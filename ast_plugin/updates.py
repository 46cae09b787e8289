"""Mask updates: from the weights (and the dense gradient) of a moment to the next masks of one sub-net."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.config import ASTConfig
from ast_plugin.distributions import Distribution, DistributionRequest, LayerRequest, kept_units
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method, Score, ScoreInputs, chance, magnitude
from ast_plugin.patterns import level, nearest_count, weights_in
from ast_plugin.plans import SubNetPlan
from ast_plugin.schedules import constant_drop_fraction, cosine_drop_fraction
from ast_plugin.selection_kernels import count_kept
from ast_plugin.sharding import full


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskUpdate:
    """The outcome of one mask update.

    Attributes:
        sub_net: Whose masks changed.
        target: Sparsity that the schedule asks for at this step, in [0, 1].
        achieved: Sparsity reached, in [0, 1].
        grown: By parameter name, bool masks of the weights that came back; parameters without any are left out.
    """

    sub_net: str
    target: float
    achieved: float
    grown: dict[str, Tensor]


class MaskUpdater:
    """Writes new masks into a `MaskStore` by a method, within patterns, along a schedule.

    Args:
        config: The run's settings: drop fraction, initial sparsity, seed, empty layers.
        plans: One plan a sub-net.
        method: The rule.
        distribution: How a sparsity is spread over the layers.
        masks: The store; changed in place.

    Raises:
        ConfigError: If an initial sparsity is asked of a method that has no ramp.
    """

    def __init__(
        self,
        config: ASTConfig,
        plans: Sequence[SubNetPlan],
        *,
        method: Method,
        distribution: Distribution,
        masks: MaskStore,
    ) -> None:
        if config.initial_sparsity is not None and method.initial_sparsity is None:
            raise ConfigError(
                f"initial_sparsity={config.initial_sparsity:g} has no meaning for method {method.name!r}, which starts "
                "at the target sparsity; leave it out, or choose a method with a ramp such as 'granet'"
            )
        self.config = config
        self.method = method
        self.plans = {plan.name: plan for plan in plans}
        self.distribution = distribution
        self.masks = masks

    def is_due(self, sub_net: str, step: int, last_step: int | None) -> bool:
        """Return whether `sub_net`, trained at `step` and before that at `last_step`, has an update to make now."""
        return self.method.updates and self.plans[sub_net].calendar.is_due(step, last_step)

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

    def initialize(self, weights: Mapping[str, Tensor]) -> None:
        """Write the first masks of every sub-net: by magnitude for methods that reselect, else at random.

        Args:
            weights: Dense weights by parameter name; not changed.

        Raises:
            ConfigError: If the distribution cannot reach a target on these layers, which would show much later.
        """
        for name, plan in self.plans.items():
            self._counts(
                plan,
                plan.target_sparsity,
                weights,
                lambda: self._distribution_scores(plan, {}, weights, chance),  # noqa: B023  # called at once
            )
            sparsity = self._initial_sparsity(plan)
            first = chance if not self.method.reselect else self.method.drop_score
            selected = self._select(plan, sparsity, weights, None, step=-1, scores=first)
            self.masks.replace(name, self._expanded(plan, selected))

    def update(
        self, sub_net: str, step: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
    ) -> MaskUpdate:
        """Make the update of `sub_net` that is due at `step`.

        Args:
            sub_net: Whose masks to renew.
            step: Optimizer step, from 0.
            weights: Dense weights by parameter name; not changed.
            gradients: Dense gradients by parameter name; parameters without one regrow by score 0. None: no method
                that needs gradients is in use.
        """
        with torch.no_grad():
            return self._update(self.plans[sub_net], step, weights, gradients)

    def _update(
        self, plan: SubNetPlan, step: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
    ) -> MaskUpdate:
        sub_net = plan.name
        sparsity = self.sparsity_at(sub_net, step)
        drop_scores: dict[str, Tensor] = {}
        if self.method.reselect:
            selected = self._select(
                plan, sparsity, weights, gradients, step=step, scores=self.method.drop_score, unit_scores=drop_scores
            )
        else:
            present = ((name, full(self.masks.get(sub_net, name))) for name in self.masks.parameters)
            selected = {name: plan.pattern.reduce_mask(mask) for name, mask in present}
        grown: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        owed = self._owed(plan, sparsity, selected, weights)
        for name, kept in selected.items():
            if self.method.grow_score is not None:
                scores = drop_scores.pop(name, None)
                kept, owed = self._regrow(plan, name, kept, scores, weights, gradients, step, owed)
            before = full(self.masks.get(sub_net, name)).to(kept.device)
            after = plan.pattern.expand(kept, self.masks.shapes[name])
            new = after & ~before
            if count_kept(new):
                grown[name] = new
            masks[name] = after
        self.masks.replace(sub_net, masks)  # at once: an interrupt must not leave some to be renewed twice
        return MaskUpdate(sub_net=sub_net, target=sparsity, achieved=self.masks.sparsity(sub_net), grown=grown)

    def finalize(self, sub_net: str, step: int, weights: Mapping[str, Tensor]) -> MaskUpdate:
        """Bring `sub_net` to its target without regrowth: the run ended before it was trained once more.

        Args:
            sub_net: Whose masks to complete.
            step: Steps that the run has made.
            weights: Dense weights by parameter name; not changed.
        """
        plan = self.plans[sub_net]
        if self.method.reselect:
            chosen = self._select(plan, plan.target_sparsity, weights, None, step=step, scores=self.method.drop_score)
            self.masks.replace(sub_net, self._expanded(plan, chosen))
        return MaskUpdate(sub_net=sub_net, target=plan.target_sparsity, achieved=self.masks.sparsity(sub_net), grown={})

    def _expanded(self, plan: SubNetPlan, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return unit masks as masks of weights."""
        return {name: plan.pattern.expand(kept, self.masks.shapes[name]) for name, kept in units.items()}

    def _initial_sparsity(self, plan: SubNetPlan) -> float:
        start = self.method.initial_sparsity if self.config.initial_sparsity is None else self.config.initial_sparsity
        return plan.target_sparsity if start is None else min(start, plan.target_sparsity)

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
        counts = self._counts(plan, sparsity, weights, lambda: self._distribution_scores(plan, made, weights, scores))
        chosen = {}
        owed = 0.0
        for name, count in zip(names, counts, strict=True):
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
        self, plan: SubNetPlan, sparsity: float, weights: Mapping[str, Tensor], unit_scores: Callable[[], list[Tensor]]
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
        return kept_units(request, self.distribution(request), allow_empty_layers=self.config.allow_empty_layers)

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
    ) -> tuple[Tensor, float]:
        """Return the units after drop and regrowth, and how many weights later layers have to make up."""
        grow_score = self.method.grow_score
        total = count_kept(kept)
        count = int(self.drop_fraction_at(plan.name, step) * total)
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
        scores = score(inputs)
        if (
            not isinstance(scores, Tensor)
            or scores.shape != inputs.weight.shape
            or not scores.is_floating_point()
            or scores.device != inputs.weight.device
        ):
            found = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise PluginError(
                f"a score of method {self.method.name!r} returned {found}; it must return a floating-point tensor of "
                f"the weight's shape {tuple(inputs.weight.shape)} on {inputs.weight.device}"
            )
        return plan.pattern.unit_scores(scores)


def seeded_generator(seed: int, sub_net: str, step: int, parameter: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments, so that no generator state need be saved."""
    digest = hashlib.blake2b(f"{seed}/{sub_net}/{step}/{parameter}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    return generator
