"""The correction within a step: whom the gradient is compared with, and what is kept of it for the next one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from ast_plugin.correction import Correction, correct
from ast_plugin.parts import RunParts
from ast_plugin.reference import ComparedGradients, correct_pairs, correct_whole
from ast_plugin.sharding import add_over_ranks
from ast_plugin.step_updates import UpdateRules


class StepCorrection:
    """Corrects the masked gradients of a step against the previous sub-net's, and keeps them as the next reference.

    Args:
        parts: The run's components.
        sub_net_at: Returns the sub-net that a step trains.
        rules: When masks are updated.
    """

    def __init__(self, parts: RunParts, sub_net_at: Callable[[int], str], rules: UpdateRules) -> None:
        self._parts = parts
        self._sub_net_at = sub_net_at
        self._rules = rules

    def correct(self, name: str, step: int, last_steps: Mapping[str, int | None]) -> Correction | None:
        """Correct the gradients in place.

        Args:
            name: The sub-net whose gradients they are.
            step: The step, from 0.
            last_steps: For each sub-net, the step at which it was last trained.

        Returns:
            What was found; None where there was nothing to compare with.
        """
        parts = self._parts
        options = parts.config.correction_options
        if options.scope == "off" or len(parts.names) == 1:
            return None
        alternation, reference = parts.alternation, parts.reference
        reference.take_back()
        pairs: list[ComparedGradients] = []
        if reference.serves(name) and (options.first_step or not alternation.is_group_start(step)):
            pairs = reference.pairs(name)
        ahead = options.first_step or not alternation.is_group_start(step + 1)
        reference.take(name if ahead else None, self._coming(step + 1, {**last_steps, name: step}) if ahead else None)
        if not pairs:
            return None
        if parts.sharded:
            return correct_pairs(pairs, self._correct_parts)
        by_hook = functools.partial(parts.registry.correct_gradients, options=options, sub_net=name)
        if not parts.registry.extends("ast_correct_gradients"):
            return correct_pairs(pairs, by_hook)
        found = correct_whole(pairs, by_hook)
        parts.gradients.mask(name)  # a plugin's correction may have left the mask
        return found

    def _correct_parts(
        self, gradients: Sequence[torch.Tensor], references: Sequence[torch.Tensor], names: Sequence[str]
    ) -> Correction | None:
        """Correct this rank's parts of the gradients by the inner products of the whole ones."""
        scope, layouts = self._parts.config.correction_options.scope, self._parts.layouts
        if scope == "off":
            return None

        def add_up(products: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
            # By name: packs are made of local parts, so the order may be another one on every rank.
            order = sorted(range(len(rows)), key=lambda i: names[rows[i]])
            added = add_over_ranks(products[order], [layouts[names[rows[i]]] for i in order])
            return torch.empty_like(products).index_copy_(0, torch.tensor(order, device=products.device), added)

        return correct(gradients, references, scope=scope, add_up=add_up)

    def _coming(self, step: int, last_steps: Mapping[str, int | None]) -> str | None:
        """Return the sub-net of the next step if it will be compared at the masks that it has now."""
        parts = self._parts
        if parts.registry.extends("ast_correct_gradients"):
            return None
        name = self._sub_net_at(step)
        return name if self._rules.drop_fraction(name, step, last_steps[name]) is None else None
