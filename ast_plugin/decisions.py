"""Masks that a method decides itself, all of a sub-net in one call: what it is asked, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import MaskDecision, MaskInputs, Method
from ast_plugin.plans import SubNetPlan
from ast_plugin.random_state import seeded_generator
from ast_plugin.selection_kernels import count_kept
from ast_plugin.sharding import full

FAR = 0.01  # how far the sparsity of decided masks may be from what is asked

Spread = Callable[[SubNetPlan, float, Mapping[str, Tensor]], Mapping[str, float]]
Decided = tuple[dict[str, Tensor], dict[str, Tensor] | None]
"""Masks by parameter name, and which of their weights begin anew: None for those that come back, as in any update."""


class MaskDecisions:
    """Asks a method for the masks of a sub-net, and checks the answer.

    Args:
        config: The run's settings.
        method: One with `Method.decide`.
        masks: The store; read only.
        spread: Returns the sparsity of every parameter, for a plan, a sparsity and the dense weights.

    Raises:
        ConfigError: If the method decides nothing.
    """

    def __init__(self, config: ASTConfig, *, method: Method, masks: MaskStore, spread: Spread) -> None:
        if method.decide is None:
            raise ConfigError(f"method {method.name!r} has no decide; it goes by its scores")
        self._config = config
        self._method = method
        self._decide = method.decide
        self._masks = masks
        self._spread = spread

    def first(self, plan: SubNetPlan, sparsity: float, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the masks that a sub-net starts with; None if the method leaves them to its scores.

        Args:
            plan: The sub-net's plan.
            sparsity: The sparsity to start with, in [0, 1).
            weights: Dense weights by parameter name.

        Raises:
            PluginError: If the answer does not fit.
        """
        self._spread(plan, plan.target_sparsity, weights)  # a target that cannot be reached would show much later
        decided = self._asked(plan, sparsity, -1, weights, None, drop_fraction=0.0, present=None)
        return None if decided is None else decided[0]

    def renewed(
        self,
        plan: SubNetPlan,
        sparsity: float,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float,
    ) -> Decided | None:
        """Return the masks of a sub-net after its update; None as in `first`.

        Args:
            plan: The sub-net's plan.
            sparsity: The sparsity that the schedule asks for now, in [0, 1).
            step: Optimizer step, from 0.
            weights: Dense weights by parameter name.
            gradients: Dense gradients by parameter name; None where the method needs none, or nothing is to regrow.
            drop_fraction: Share of the kept weights that the schedule would replace, in [0, 1).

        Raises:
            PluginError: If the answer does not fit.
        """
        present = {name: full(mask) for name, mask in self._masks.of(plan.name).items()}
        return self._asked(plan, sparsity, step, weights, gradients, drop_fraction=drop_fraction, present=present)

    def _asked(
        self,
        plan: SubNetPlan,
        sparsity: float,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        *,
        drop_fraction: float,
        present: Mapping[str, Tensor] | None,
    ) -> Decided | None:
        inputs = MaskInputs(
            sub_net=plan.name,
            step=step,
            sparsity=sparsity,
            layer_sparsities=self._spread(plan, sparsity, weights),
            drop_fraction=drop_fraction,
            weights={name: weights[name].detach() for name in self._masks.parameters},
            gradients=gradients,
            masks=present,
            generator=seeded_generator(self._config.seed, plan.name, step, self._method.name),
        )
        answer = self._decide(inputs)
        if answer is None:
            return None
        decided = answer if isinstance(answer, MaskDecision) else MaskDecision(masks=answer)
        masks = self._checked("masks", decided.masks, complete=True)
        self._check(plan, sparsity, masks)
        if decided.restarted is None:
            return masks, None
        began = self._checked("restarted", decided.restarted, complete=False)
        return masks, {name: mask & masks[name] for name, mask in began.items() if count_kept(mask & masks[name])}

    def _checked(self, what: str, answer: object, *, complete: bool) -> dict[str, Tensor]:
        """Return the masks of an answer, in the store's order."""
        who = f"method {self._method.name!r}"
        if not isinstance(answer, Mapping):
            raise PluginError(f"{who} must decide a mapping of parameter names to {what}, got {type(answer).__name__}")
        unknown = [name for name in answer if name not in self._masks.shapes]
        missing = [name for name in self._masks.parameters if name not in answer]
        if unknown or (complete and missing):
            found = f"names {unknown[0]!r}, which is not pruned" if unknown else f"has none for {missing[0]!r}"
            raise PluginError(f"{who} must decide {what} of the prunable parameters, and its answer {found}")
        for name, mask in answer.items():
            shape = self._masks.shapes[name]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise PluginError(
                    f"{who} decided {what} of {name!r} that are {found}; they must be torch.bool of the weight's "
                    f"shape {shape}"
                )
        return {name: answer[name].detach() for name in self._masks.parameters if name in answer}

    def _check(self, plan: SubNetPlan, sparsity: float, masks: Mapping[str, Tensor]) -> None:
        """Refuse masks that leave a layer empty, do not keep the pattern, or are not as sparse as asked."""
        who = f"method {self._method.name!r} decided masks of sub-net {plan.name!r}"
        kept = {name: count_kept(mask) for name, mask in masks.items()}
        empty = [name for name, count in kept.items() if not count]
        if empty and not self._config.allow_empty_layers:
            raise PluginError(
                f"{who} that keep nothing of {empty[0]!r}; lower the sparsity, leave the parameter out, or set "
                "allow_empty_layers=True"
            )
        for name, mask in masks.items():
            if not _holds(plan, mask):
                raise PluginError(
                    f"{who} that are not of its pattern {plan.pattern.name!r} in {name!r}; have it decide such masks, "
                    "or ask for unstructured ones"
                )
        total = self._masks.total()
        achieved = 1 - sum(kept.values()) / total
        # In the course of a ramp a sub-net may be ahead of it.
        wanted, last = (self._reachable(plan, asked) for asked in (sparsity, plan.target_sparsity))
        if not min(wanted, last) - FAR <= round(achieved, 9) <= max(wanted, last) + FAR:
            raise PluginError(
                f"{who} with a sparsity of {achieved:.4g}, and {wanted:.4g} was asked for; ask for a sparsity that it "
                "can reach"
            )

    def _reachable(self, plan: SubNetPlan, sparsity: float) -> float:
        if plan.pattern.fixed_sparsity is None:
            return sparsity
        kept = sum(plan.pattern.kept_units(shape, sparsity) for shape in self._masks.shapes.values())
        return 1 - kept / self._masks.total()


def _holds(plan: SubNetPlan, mask: Tensor) -> bool:
    """Return whether a mask is one that its pattern could have chosen."""
    shape = tuple(mask.shape)
    units = plan.pattern.reduce_mask(mask)
    scores = plan.pattern.unit_scores(mask.float())
    chosen = plan.pattern.expand(plan.pattern.keep_top(scores, count_kept(units), shape), shape)
    return bool(torch.equal(chosen, mask))
