"""What `accuracy.py` tries beyond the settings of `ast_plugin`, through its public hooks; gradients apart."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accuracy_gradients import AveragedReference, OwnerScaling, SharedBackward, SparsestOwns
from ast_plugin.hookspecs import AlternationRecord, hookimpl
from ast_plugin.integrations.family import SupTickets
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
    "sup_tickets": lambda arguments, settings: SupTickets(**arguments),
}


def build_mechanism(name: str, argument: Any, settings: Settings) -> object:
    """Return the plugin that a run's settings name."""
    return _BUILDERS[name](argument, settings)
