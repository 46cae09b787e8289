"""What `accuracy.py` tries on gradients beyond the correction of `ast_plugin`, through its public hooks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction
from ast_plugin.hookspecs import hookimpl
from ast_plugin.training import AlternatingSparseTraining


class AveragedReference:
    """Corrects against running means of the other sub-nets' gradients instead of the previous one's last.

    Args:
        decay: Of the running means, in [0, 1).
        others: ``previous`` compares with the sub-net trained before, ``all`` with the mean of all others.
        threshold: Corrects only where the cosine is below it, at most 0.
    """

    def __init__(self, decay: float = 0.9, others: str = "previous", threshold: float = 0.0) -> None:
        self._decay, self._others, self._threshold = decay, others, threshold
        self._means: dict[str, list[Tensor]] = {}
        self._last: str | None = None

    @hookimpl
    def ast_correct_gradients(
        self,
        gradients: Sequence[Tensor],
        references: Sequence[Tensor],
        options: CorrectionOptions,
        names: Sequence[str],
        sub_net: str,
    ) -> Correction:
        """Project, then add the gradient as it came to its sub-net's mean."""
        raw = [gradient.clone() for gradient in gradients]
        if self._others == "previous":
            sources = [self._last] if self._last is not None and self._last != sub_net else []
        else:
            sources = [name for name in self._means if name != sub_net]
        found = Correction()
        for i, gradient in enumerate(gradients):
            for source in sources:
                reference = self._means[source][i] * (gradient != 0)
                self._project(gradient, reference, found)
        means = self._means.get(sub_net)
        if means is None:
            self._means[sub_net] = raw
        else:
            for mean, gradient in zip(means, raw, strict=True):
                mean.mul_(self._decay).add_(gradient, alpha=1 - self._decay)
        self._last = sub_net
        return found

    def _project(self, gradient: Tensor, reference: Tensor, found: Correction) -> None:
        inner, square = float((gradient * reference).sum()), float(reference.square().sum())
        norm = (square * float(gradient.square().sum())) ** 0.5
        if norm == 0:
            return
        found.checks += 1
        found.cosines.append(max(-1.0, min(1.0, inner / norm)))
        if inner / norm < self._threshold:
            found.conflicts += 1
            gradient.sub_(reference, alpha=inner / square)


class ScaledGradients(abc.ABC):
    """Scales the gradients of single weights, by factors that depend on which sub-nets keep them.

    Args:
        first: The step from which on this holds.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._step = 0
        self._training: AlternatingSparseTraining | None = None
        self._factors: dict[tuple[str, str], Tensor] = {}

    @abc.abstractmethod
    def factor(self, training: AlternatingSparseTraining, sub_net: str, name: str) -> Tensor:
        """Return what the gradient of a parameter is multiplied by in a step of `sub_net`."""

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
        """Count the steps."""
        self._training, self._step = training, step + 1

    @hookimpl
    def ast_masks_updated(self, training: AlternatingSparseTraining, sub_net: str, step: int) -> None:
        """Have the factors made anew."""
        self._training = training
        self._factors.clear()

    @hookimpl
    def ast_correct_gradients(
        self,
        gradients: Sequence[Tensor],
        references: Sequence[Tensor],
        options: CorrectionOptions,
        names: Sequence[str],
        sub_net: str,
    ) -> Correction:
        """Scale; nothing is corrected."""
        if self._training is not None and self._step >= self._first:
            for name, gradient in zip(names, gradients, strict=True):
                if (sub_net, name) not in self._factors:
                    self._factors[sub_net, name] = self.factor(self._training, sub_net, name)
                gradient.mul_(self._factors[sub_net, name])
        return Correction()


class OwnerScaling(ScaledGradients):
    """Scales the gradient of a weight that few sub-nets keep, because fewer steps train it.

    A weight kept by k of N sub-nets has its gradient multiplied by (N / k) ** power.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__(first=0)
        self._power = power

    def factor(self, training: AlternatingSparseTraining, sub_net: str, name: str) -> Tensor:
        """Return the factors, the same in the steps of all sub-nets."""
        masks = torch.stack([training.masks.get(s, name) for s in training.sub_nets])
        owners = masks.sum(0).clamp(min=1)
        return (len(masks) / owners) ** self._power


class SparsestOwns(ScaledGradients):
    """Late in the run, leaves every weight to the sparsest of the sub-nets that keep it.

    The others' gradients of that weight are multiplied by a factor. A sparse sub-net then converges undisturbed, and
    the denser ones adapt the weights that they have more.

    Args:
        first: The step from which on this holds.
        factor: 0 leaves nothing to the denser sub-nets, 1 changes nothing.
    """

    def __init__(self, first: int, factor: float = 0.0) -> None:
        super().__init__(first)
        self._factor = factor

    def factor(self, training: AlternatingSparseTraining, sub_net: str, name: str) -> Tensor:
        """Return 1, and the factor where a sparser sub-net keeps the weight too."""
        masks = training.masks
        scale = torch.ones(masks.get(sub_net, name).shape)
        for other in training.sub_nets:
            if masks.sparsity(other) > masks.sparsity(sub_net):
                scale[masks.get(other, name)] = self._factor
        return scale


class SharedBackward:
    """Lets a step move weights that its sub-net drops and another one keeps, along the dense gradient.

    The gradient of a dropped weight, taken where the weight is zero, is known anyway and otherwise thrown away. Weights
    that only a dense sub-net keeps are so trained in every step (Jayakumar et al. 2020, "Top-KAST", for one network;
    Lin et al. 2020, "Dynamic model pruning with feedback", for all weights).

    No hook of `ast_plugin` lets a plugin reach beyond the mask, so this one stands around it: `before_wrap` and
    `after_wrap` register torch's hooks on either side.

    Args:
        factor: By what these gradients are multiplied.
        until: The step from which on gradients are masked as always.
        dense: Whether weights that no sub-net keeps move, too.
    """

    def __init__(self, factor: float, until: int, dense: bool = False) -> None:
        self._factor, self._until, self._dense = factor, until, dense
        self._step = 0
        self._kept: dict[str, Tensor] = {}
        self._extra: dict[tuple[str, str], Tensor] = {}

    def before_wrap(self, model: nn.Module) -> None:
        """Keep dense gradients aside, before they are masked."""

        def keeper(name: str) -> Callable[[Tensor], None]:
            def keep(parameter: Tensor) -> None:
                if self._step < self._until and parameter.grad is not None:
                    self._kept[name] = parameter.grad.clone()

            return keep

        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(keeper(name))

    def after_wrap(self, training: AlternatingSparseTraining) -> None:
        """Add them where they are wanted, after the gradients were masked."""

        def add(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if self._step >= self._until:
                return
            sub_net, masks = training.active, training.masks
            for name in masks.parameters:
                if (sub_net, name) not in self._extra:
                    union = torch.stack([masks.get(s, name) for s in training.sub_nets]).any(0) | self._dense
                    self._extra[sub_net, name] = (union & ~masks.get(sub_net, name)) * self._factor
                gradient = training.model.get_parameter(name).grad
                if gradient is not None:
                    gradient.addcmul_(self._kept[name], self._extra[sub_net, name])

        training.optimizer.register_step_pre_hook(add)

    @hookimpl
    def ast_masks_updated(self, training: AlternatingSparseTraining, sub_net: str, step: int) -> None:
        """Have the factors made anew."""
        self._extra.clear()

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
        """Count the steps."""
        self._step = step + 1
