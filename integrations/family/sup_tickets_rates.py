"""A cyclic learning rate laid over the user's own for the length of the optimizer's arithmetic.

The user's rate is in the parameter groups at all other times, so schedulers that compute the next rate from the present
one, logs and checkpoints see what they would see without cycles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ast_plugin.errors import ConfigError, StateError

SHARES = (0.01, 0.05)
"""Of the highest rate of the run, low and high, where none are given: .001 and .005 for a run at .1 (the paper's)."""

TOO_HIGH = 0.2
"""A high rate above this share of the highest rate of the run is warned about."""

_HINTS = ("lr", "initial_lr", "max_lr")  # what schedulers of torch and timm leave in a group of its highest rate


class CyclicRates:
    """Sets the rates of one optimizer before each of its steps, and gives the user's back after it.

    Args:
        optimizer: The torch optimizer whose ``step`` really runs.
        height: Returns how high the rate of the coming step is between low (0) and high (1); None leaves it alone.
        lr: Low and high, of the group with the highest rate; others keep their proportion to it. None: `SHARES` of the
            highest rate that each group had.

    Raises:
        ConfigError: If a group of the optimizer has no rate.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        height: Callable[[], float | None],
        lr: tuple[float, float] | None,
    ) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if not isinstance(group.get("lr"), (int, float, Tensor)):
                raise ConfigError(
                    f"sup_tickets lays a cyclic rate over the optimizer's, and parameter group {index} of "
                    f"{type(optimizer).__name__} has lr={group.get('lr')!r}; give the optimizer a learning rate"
                )
        self._optimizer = optimizer
        self._height = height
        self._lr = lr
        self._highest: list[float | Tensor] = []
        self._laid: list[tuple[dict[str, Any], float | Tensor, float]] = []  # group, the user's rate, ours
        self._warned = False
        for group in optimizer.param_groups:
            self._highest.append(max(abs(float(group[hint])) for hint in _HINTS if _is_rate(group.get(hint))))
        self._warn(stacklevel=2)

    @property
    def highest(self) -> list[float]:
        """The highest rate of each parameter group so far."""
        return [float(rate) for rate in self._highest]

    def attach(self) -> Callable[[], None]:
        """Register the hooks; returns what removes them and gives the user's rates back."""
        optimizer = self._optimizer
        lifting = optimizer.register_step_post_hook(lambda *_: self.lift())
        # Before hooks that were there already: one of them may be a scheduler's step, which goes on from what it finds.
        optimizer._optimizer_step_post_hooks.move_to_end(lifting.id, last=False)
        handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(lambda *_: self.lay()),
            lifting,
            optimizer.register_state_dict_pre_hook(lambda *_: self._mend()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._mend()),
        ]

        def remove() -> None:
            self._mend()
            for handle in handles:
                handle.remove()

        return remove

    def rates(self, height: float) -> list[float]:
        """Return the rate of each parameter group at a height.

        Args:
            height: From 0, low, to 1, high.
        """
        highest = self.highest
        if self._lr is None:
            return [(SHARES[0] + (SHARES[1] - SHARES[0]) * height) * rate for rate in highest]
        value, top = self._lr[0] + (self._lr[1] - self._lr[0]) * height, max(highest)
        return [value * rate / top if top > 0 else value for rate in highest]

    def lay(self) -> None:
        """Put the cyclic rates in place, if there are any for the coming step; else note the user's."""
        self._mend()
        height = self._height()
        groups = self._optimizer.param_groups
        if height is None:
            self._note(groups)
            return
        if self._is_idle():
            return
        # As numbers from now on: those on an accelerator are waited for once.
        self._highest = [*self.highest, *(float(group["lr"]) for group in groups[len(self._highest) :])]
        self._warn(stacklevel=3)
        self._laid = [
            # All copies before the first is filled: groups may have one tensor between them.
            (group, group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"], ours)
            for group, ours in zip(groups, self.rates(height), strict=False)
        ]
        for group, theirs, ours in self._laid:
            if isinstance(theirs, Tensor):
                group["lr"].fill_(ours)
            else:
                group["lr"] = ours

    def lift(self) -> None:
        """Give the groups the user's rates back."""
        for group, theirs, _ in self._laid:
            if isinstance(theirs, Tensor):
                group["lr"].copy_(theirs)
            else:
                group["lr"] = theirs
        self._laid.clear()

    def check_state(self, state: Any) -> None:
        """Make sure that `load_state` can take what `highest` was.

        Raises:
            StateError: If it cannot.
        """
        groups = len(self._optimizer.param_groups)
        if not isinstance(state, list) or len(state) != groups or not all(_is_rate(rate) for rate in state):
            raise StateError(
                f"the saved state of sup_tickets has the highest rates {state!r}, and the optimizer has {groups} "
                "parameter groups; load a checkpoint of the same optimizer"
            )

    def load_state(self, state: Sequence[float]) -> None:
        """Take what `highest` was."""
        self._highest = [float(rate) for rate in state]

    def _note(self, groups: Sequence[dict[str, Any]]) -> None:
        for index, group in enumerate(groups):
            rate = _rate(group)
            if index == len(self._highest):
                self._highest.append(rate)
                continue
            known = self._highest[index]
            if isinstance(rate, Tensor):  # on an accelerator: nobody waits for it
                self._highest[index] = torch.maximum(torch.as_tensor(known, dtype=rate.dtype).to(rate.device), rate)
            elif not isinstance(known, Tensor):
                self._highest[index] = max(known, rate)
            else:
                self._highest[index] = max(float(known), rate)

    def _mend(self) -> None:
        """Give back what a step that raised has left, but where somebody has set another rate since."""
        self._laid = [entry for entry in self._laid if float(entry[0]["lr"]) == _stored(*entry[1:])]
        self.lift()

    def _is_idle(self) -> bool:
        """Return whether this is a step without any effect, which is made to have the optimizer's state created."""
        rates = [_rate(group) for group in self._optimizer.param_groups]
        if any(isinstance(rate, Tensor) or rate != 0 for rate in rates) or self._optimizer.state:
            return False
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        return not any(bool(gradient.any()) for gradient in gradients)

    def _warn(self, stacklevel: int) -> None:
        """Say once that the cycles destroy what was learned, if they are as high as that."""
        if self._warned or self._lr is None:
            return
        top = max(self.highest, default=0.0)
        if top <= 0 or self._lr[1] <= TOO_HIGH * top:
            return
        self._warned = True
        warnings.warn(
            f"sup_tickets begins each cycle again at up to lr={self._lr[1]:g}, more than {TOO_HIGH:g} of the run's "
            f"highest rate ({top:g}): such cycles leave what the run has found, and their average is no network any "
            "more. A restart at .1 in a run at .1 took the average from 77.87 to 10.37 % (CIFAR-100, Yin et al. 2022); "
            f"use lr=({SHARES[0] * top:g}, {SHARES[1] * top:g}), or leave lr out",
            stacklevel=stacklevel,
        )


def _rate(group: dict[str, Any]) -> float | Tensor:
    """Return the present rate of a group, as a tensor only where reading it would wait for an accelerator."""
    rate = group["lr"]
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return rate.detach().clone()
    return float(rate)


def _is_rate(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _stored(theirs: float | Tensor, ours: float) -> float:
    """Return our rate as a group holds it: rounded to the precision of its tensor."""
    return float(torch.as_tensor(ours, dtype=theirs.dtype)) if isinstance(theirs, Tensor) else ours
