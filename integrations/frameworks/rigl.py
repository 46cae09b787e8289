"""A run of rigl-torch in progress, continued: its masks become a sub-net, its schedule goes on where it is.

rigl-torch (``RigLScheduler``) masks gradients by hooks on the parameters, replaces the optimizer's ``step``, and drops
and grows weights when the training loop calls it, on every `delta`-th call, in place of that call's optimizer step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError, SelectionError, StateError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.frameworks.rigl_scheduler import RigLRun, running, saved
from ast_plugin.methods import MaskInputs, Method
from ast_plugin.parameters import ParameterChoice, select_parameters
from ast_plugin.selection_kernels import count_kept, keep_largest
from ast_plugin.sub_nets import SubNetSpec, sparsity_name

_NOT_INCLUDED = "not matched by include"


def take_over(
    scheduler: Any, *, model: nn.Module | None = None, sparser: Sequence[float | SubNetSpec] = ()
) -> dict[str, Any]:
    """Return the settings by which `ast_plugin.wrap` continues a run of rigl-torch.

    The first sub-net has rigl-torch's masks, exactly; the optimizer keeps its state, momentum too. Mask updates come
    at the same counts, by the same rule: of each layer, the share ``alpha / 2 * (1 + cos(pi * count / T_end))`` of the
    kept weights with the smallest magnitudes goes, and as many grow from zero where the dense gradient is largest.
    `ast_plugin.wrap` removes rigl-torch's hooks from the parameters and the optimizer's replaced ``step``, and puts
    them back if it fails. Calls of the scheduler that stay in a training loop then answer True and change nothing.

    What differs from here on: the optimizer steps on the step of a mask update, too, with the new masks; one gradient
    decides on growth, also where ``grad_accumulation_n`` was more than 1; in data-parallel runs it is the average whose
    magnitude counts, not the average of the ranks' magnitudes; weights of equal score go by their index.

    Args:
        scheduler: The ``RigLScheduler``, or what its ``state_dict()`` has returned, of a checkpoint.
        model: The model whose weights the saved state is of, as `RigLScheduler` got it; only with a saved state.
        sparser: More sub-nets, sparser than rigl-torch's: each starts with the weights of largest magnitude, as many in
            every layer, and is updated by the same rule.

    Returns:
        ``sparsities`` and ``method``, for ``wrap(optimizer, model, **take_over(scheduler), ...)``. The sparsity is
        that of the layers that rigl-torch has masks of; those that it keeps dense, such as the first one, stay dense.

    Raises:
        ConfigError: If it is no scheduler of rigl-torch or a state of one, if it has no masks, or an argument does not
            suit it.
        MissingExtraError: If rigl-torch is needed, for a saved state, and not installed, or has another version.
        StateError: If the saved masks do not fit the model.

    Example:
        >>> pruner = RigLScheduler(model, optimizer, dense_allocation=0.1, T_end=7500)
        >>> ...
        >>> ast = wrap(optimizer, model, **take_over(pruner, sparser=(0.95, 0.98)))
    """
    if isinstance(scheduler, Mapping):
        run = saved(scheduler, model)
    elif model is not None:
        raise ConfigError("model is for a saved state alone; a RigLScheduler knows its own, so leave it out")
    else:
        run = running(scheduler)
    method = RigLMethod.of(run)
    first = SubNetSpec(name=sparsity_name(run.asked), sparsity=method.sparsity)
    if not isinstance(sparser, Sequence) or isinstance(sparser, str):
        raise ConfigError(f"sparser must be a sequence of fractions of zeros, such as (0.95,), got {sparser!r}")
    for entry in sparser:
        wanted = entry.sparsity if isinstance(entry, SubNetSpec) else entry
        if not isinstance(wanted, (int, float)) or not method.sparsity < wanted < 1:
            raise ConfigError(
                f"sparser must hold fractions of zeros above that of rigl-torch's masks, {method.sparsity:.6g}, and "
                f"below 1, got {wanted!r}"
            )
    return {"sparsities": (first, *sparser), "method": method}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RigLMethod(Method):
    """The method of a run that goes on from rigl-torch; also a plugin, which selects the layers that have masks.

    Attributes:
        sparsity: Of the masks that were taken over, in [0, 1).
        course: How the masks change.
    """

    sparsity: float
    course: _Course = dataclasses.field(repr=False)

    @classmethod
    def of(cls, run: RigLRun) -> RigLMethod:
        """Return the method that continues a run."""
        course = _Course(run)
        return cls(
            name="rigl-torch",
            description="a run of rigl-torch, continued (Evci et al. 2020)",
            needs_gradient=course.updates,
            updates=course.updates,
            distribution="uniform",
            grow_initialization="zero",
            decide=course.decide,
            is_due=course.is_due,
            take_over=run.take_over,
            sparsity=course.sparsity,
            course=course,
        )

    @hookimpl
    def ast_select_parameters(
        self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]
    ) -> list[ParameterChoice]:
        """Select the weights that rigl-torch has masks of."""
        return self.course.select(model, include, exclude)

    def state_dict(self) -> dict[str, Any]:
        """Return where in rigl-torch's schedule this run began, and that schedule."""
        return self.course.settings()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a run that began elsewhere.

        Raises:
            StateError: If it is one.
        """
        for name, value in self.course.settings().items():
            if state.get(name) != value:
                raise StateError(
                    f"the saved run went on from rigl-torch with {name}={state.get(name)!r}, and this one has "
                    f"{value!r}; to resume, take over the state that the RigLScheduler had then"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the state fits; nothing changes in the course of a run."""
        self.check_state(state)


class _Course:
    """rigl-torch's rule and calendar, from the count at which it was taken over.

    Args:
        run: What was taken over.
    """

    def __init__(self, run: RigLRun) -> None:
        self._run = run
        self.updates = run.end is not None and run.count + 1 < run.end
        total = sum(mask.numel() for mask in run.masks.values())
        self.sparsity = 1 - sum(count_kept(mask) for mask in run.masks.values()) / total
        self._due_at: int | None = None
        self._begun = False

    def settings(self) -> dict[str, Any]:
        run = self._run
        return {"count": run.count, "delta": run.delta, "alpha": run.alpha, "T_end": run.end}

    def is_due(self, step: int, last_step: int | None) -> bool:
        """Return whether a multiple of `delta` calls was reached since the sub-net was trained last."""
        run = self._run
        if run.end is None:
            return False
        before = run.count if last_step is None else run.count + last_step + 1
        reached = min(run.count + step + 1, run.end - 1)
        due = reached // run.delta > before // run.delta
        self._due_at = step if due else self._due_at
        return due

    def decide(self, inputs: MaskInputs) -> dict[str, Tensor]:
        if inputs.masks is None:
            return self._first(inputs)
        own = inputs.step == self._due_at and self._run.end is not None
        fraction = self._share(self._run.count + inputs.step + 1) if own else inputs.drop_fraction
        gradients = inputs.gradients or {}
        return {
            name: _regrown(mask, inputs.weights[name], gradients.get(name), fraction)
            for name, mask in inputs.masks.items()
        }

    def select(self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[ParameterChoice]:
        if include or exclude:
            raise SelectionError(
                "include and exclude have no use in a run that goes on from rigl-torch: pruned are the weights that it "
                "has masks of; leave both out"
            )
        choices = select_parameters(model, include=tuple(self._run.masks))
        return [
            dataclasses.replace(choice, reason="rigl-torch has no mask of it")
            if choice.reason == _NOT_INCLUDED
            else choice
            for choice in choices
        ]

    def _share(self, count: int) -> float:
        end = self._run.end or 1
        return float(self._run.alpha / 2 * (1 + numpy.cos((count * numpy.pi) / end)))

    def _first(self, inputs: MaskInputs) -> dict[str, Tensor]:
        if abs(inputs.sparsity - self.sparsity) < 1e-9:
            self._begun = True
            return {name: mask.to(inputs.weights[name].device) for name, mask in self._run.masks.items()}
        if not self._begun:
            raise ConfigError(
                f"sub-net {inputs.sub_net!r} is the densest and has sparsity {inputs.sparsity:.6g}, and rigl-torch's "
                f"masks have {self.sparsity:.6g}; give wrap the sparsities that take_over returned, and sparser ones "
                "to take_over"
            )
        masks = {}
        for name, weight in inputs.weights.items():
            kept = weight.numel() - int(inputs.layer_sparsities[name] * weight.numel())
            masks[name] = keep_largest(weight.abs().flatten(), kept).view(weight.shape)
        return masks


def _regrown(mask: Tensor, weight: Tensor, gradient: Tensor | None, fraction: float) -> Tensor:
    """Return the mask after a share of its weights was dropped and as many were grown, some perhaps the same."""
    kept = mask.to(weight.device).flatten()
    total = count_kept(kept)
    count = int(total * fraction)
    survivors = keep_largest(weight.abs().flatten(), total - count, among=kept)
    scores = torch.zeros_like(weight) if gradient is None else gradient.abs().to(weight.device)
    grown = keep_largest(scores.flatten(), count, among=~survivors)
    return (survivors | grown).view(weight.shape)
