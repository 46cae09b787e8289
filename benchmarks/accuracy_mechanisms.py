"""What `accuracy.py` tries beyond the settings of `ast_plugin`; each comes in through the public hooks."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction
from ast_plugin.hookspecs import AlternationRecord, hookimpl
from ast_plugin.training import AlternatingSparseTraining

if TYPE_CHECKING:
    from accuracy_runs import Settings


class LateAverage:
    """Sums the weights after each of the last steps, for plain means over several windows.

    Shared weights are summed at every step; private BatchNorm parameters after the steps of their own sub-net.

    Args:
        steps: Of the whole run.
        windows: Shares of the run, each counted from its end, in rising order.
    """

    def __init__(self, steps: int, windows: Sequence[float]) -> None:
        self._firsts = {window: round(steps * (1 - window)) for window in windows}
        # One sum for each stretch between two windows' beginnings; a window's sum is the sum of its stretches.
        self._sums: dict[float, dict[tuple[str, str], Tensor]] = {window: {} for window in windows}
        self._counts: dict[float, dict[tuple[str, str], int]] = {window: {} for window in windows}

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
        """Add the weights up, in the last steps."""
        stretch = next((window for window, first in self._firsts.items() if step >= first), None)
        if stretch is None:
            return
        private = training.private_state(sub_net)
        for name, parameter in training.model.named_parameters():
            if name not in private:
                self._add(stretch, ("", name), parameter.detach())
        for name, tensor in private.items():
            if tensor.is_floating_point():
                self._add(stretch, (sub_net, name), tensor)

    def _add(self, stretch: float, key: tuple[str, str], tensor: Tensor) -> None:
        sums, counts = self._sums[stretch], self._counts[stretch]
        if key in sums:
            sums[key].add_(tensor)
        else:
            sums[key] = tensor.clone()
        counts[key] = counts.get(key, 0) + 1

    def mean(self, window: float) -> dict[tuple[str, str], Tensor]:
        """Return the mean over a window by (sub-net or "", parameter)."""
        stretches = [w for w in self._sums if w <= window]
        keys = {key for w in stretches for key in self._sums[w]}
        return {
            key: torch.stack([self._sums[w][key] for w in stretches if key in self._sums[w]]).sum(0)
            / sum(self._counts[w].get(key, 0) for w in stretches)
            for key in keys
        }

    @torch.no_grad()
    def apply(self, training: AlternatingSparseTraining, window: float) -> None:
        """Put the mean over a window into the model; statistics of BatchNorm are then to be estimated anew."""
        means = self.mean(window)
        parameters = dict(training.model.named_parameters())
        for (sub_net, name), mean in means.items():
            if not sub_net:
                parameters[name].copy_(mean)
        for chosen in training.sub_nets:
            with training.sub_net(chosen):
                tensors = {**parameters, **dict(training.model.named_buffers())}
                for (sub_net, name), mean in means.items():
                    if sub_net == chosen:
                        tensors[name].copy_(mean)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """An order that repeats a list of sub-nets, from a step on perhaps another list.

    Attributes:
        stages: (first step, cycle of sub-net indices), the first from step 0.
    """

    stages: tuple[tuple[int, tuple[int, ...]], ...]
    name: str = "cycle"

    def _at(self, step: int) -> tuple[int, tuple[int, ...]]:
        return next((first, cycle) for first, cycle in reversed(self.stages) if step >= first)

    def sub_net_at(self, step: int) -> int:
        """Return the index of the sub-net that is trained at `step`."""
        first, cycle = self._at(step)
        return cycle[(step - first) % len(cycle)]

    def is_group_start(self, step: int) -> bool:
        """Return whether `step` begins the list anew."""
        first, cycle = self._at(step)
        return (step - first) % len(cycle) == 0


class CyclePlugin:
    """Offers `Cycle` as the alternation ``cycle``."""

    def __init__(self, stages: Sequence[tuple[float, Sequence[int]]], steps: int) -> None:
        self._order = Cycle(tuple((round(share * steps), tuple(cycle)) for share, cycle in stages))

    @hookimpl
    def ast_alternations(self) -> list[AlternationRecord]:
        """Offer the order."""
        return [
            AlternationRecord(name="cycle", description="a list of sub-nets, repeated", build=lambda **_: self._order)
        ]


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


class OwnerScaling:
    """Scales the gradient of a weight that few sub-nets keep, because fewer steps train it.

    A weight kept by k of N sub-nets has its gradient multiplied by (N / k) ** power.
    """

    def __init__(self, power: float = 1.0) -> None:
        self._power = power
        self._training: AlternatingSparseTraining | None = None
        self._factors: dict[str, Tensor] = {}

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
        if self._training is not None:
            for name, gradient in zip(names, gradients, strict=True):
                if name not in self._factors:
                    masks = torch.stack([self._training.masks.get(s, name) for s in self._training.sub_nets])
                    owners = masks.sum(0).clamp(min=1)
                    self._factors[name] = (len(masks) / owners) ** self._power
                gradient.mul_(self._factors[name])
        return Correction()


class SparsestOwns:
    """Late in the run, leaves every weight to the sparsest of the sub-nets that keep it.

    The others' gradients of that weight are multiplied by a factor. A sparse sub-net then converges undisturbed, and
    the denser ones adapt the weights that they have more.

    Args:
        first: The step from which on this holds.
        factor: 0 leaves nothing to the denser sub-nets, 1 changes nothing.
    """

    def __init__(self, first: int, factor: float = 0.0) -> None:
        self._first, self._factor = first, factor
        self._step = 0
        self._training: AlternatingSparseTraining | None = None
        self._factors: dict[tuple[str, str], Tensor] = {}

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
        """Count the steps."""
        self._training, self._step = training, step + 1

    @hookimpl
    def ast_masks_updated(self, training: AlternatingSparseTraining, sub_net: str, step: int) -> None:
        """Have the factors made anew."""
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
                    self._factors[sub_net, name] = self._scale(self._training, sub_net, name)
                gradient.mul_(self._factors[sub_net, name])
        return Correction()

    def _scale(self, training: AlternatingSparseTraining, sub_net: str, name: str) -> Tensor:
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


class PrivateParameters:
    """Gives every sub-net its own values and optimizer state of some parameters that are not pruned.

    At rest the model carries those of the sub-net that trains next; `put` brings in another's for evaluation.

    Args:
        globs: On parameter names.
        first: The step from which on they are private.
    """

    def __init__(self, globs: Sequence[str], first: int = 0) -> None:
        self._globs = tuple(globs)
        self._first = first
        self._banks: dict[str, dict[str, Tensor]] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._carried: str | None = None

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
        """Note whose values the model carries when they begin to be private."""
        if self._carried is None and step >= self._first:
            self._carried = sub_net

    @hookimpl
    def ast_sub_net_switched(self, training: AlternatingSparseTraining, sub_net: str) -> None:
        """Bring in the values of the sub-net that trains next."""
        self.put(training, sub_net)

    @torch.no_grad()
    def put(self, training: AlternatingSparseTraining, sub_net: str) -> None:
        """Bring in the values of a sub-net; one that comes for the first time starts from those present."""
        if self._carried is None or self._carried == sub_net:
            return
        state = training.optimizer.state
        for name, parameter in training.model.named_parameters():
            if not any(fnmatch.fnmatch(name, glob) for glob in self._globs):
                continue
            self._banks.setdefault(self._carried, {})[name] = parameter.detach().clone()
            left = state.pop(parameter, {})
            self._states.setdefault(self._carried, {})[name] = left
            if sub_net in self._banks:
                parameter.copy_(self._banks[sub_net][name])
                coming = self._states[sub_net][name]
            else:
                coming = copy.deepcopy(left)
            if coming:
                state[parameter] = coming
        self._carried = sub_net


class SubNetRates:
    """Multiplies the learning rate by a factor of the sub-net that trains next; the run's loop applies it.

    Args:
        factors: One a sub-net, in training order.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self._factors = tuple(factors)

    @hookimpl
    def ast_sub_net_switched(self, training: AlternatingSparseTraining, sub_net: str) -> None:
        """Set the factor of the sub-net that trains next."""
        factor = self._factors[training.sub_nets.index(sub_net)]
        for group in training.optimizer.param_groups:
            group["rate"] = factor


_BUILDERS: Mapping[str, Callable[[Any, Settings], object]] = {
    "cycle": lambda stages, settings: CyclePlugin(stages, settings.steps),
    "averaged_reference": lambda arguments, settings: AveragedReference(**arguments),
    "owner_scaling": lambda power, settings: OwnerScaling(power),
    "private_parameters": lambda globs, settings: PrivateParameters(globs),
    "shared_backward": lambda a, settings: SharedBackward(a[0], round(a[1] * settings.steps), *a[2:]),
    "split": lambda share, settings: PrivateParameters(["*"], round(share * settings.steps)),
    "sparsest_owns": lambda argument, settings: SparsestOwns(round(argument[0] * settings.steps), argument[1]),
    "rates": lambda factors, settings: SubNetRates(factors),
}


def build_mechanism(name: str, argument: Any, settings: Settings) -> object:
    """Return the plugin that a run's settings name."""
    return _BUILDERS[name](argument, settings)
