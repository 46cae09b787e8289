"""What happens to weights outside the active mask when the optimizer steps.

``coast`` needs no code: momentum and weight decay move them, as in the reference implementation. ``freeze`` is this
module: inactive weights and their optimizer state are put back to what they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ast_plugin.masking import put_back_outside_
from ast_plugin.sharding import local_part

_CODES = (torch.uint8, torch.int8)  # of 8-bit optimizers: zero is not the code of zero, and many share a scale
_STEP = 0.1  # relative; one step of weight decay, or of an average that starts at its initial value, stays below


class FrozenInactive:
    """Remembers weights and optimizer state before a step and puts the inactive part back afterwards.

    State is covered where it has the shape of the weight (momentum, second moments ...). State of another shape
    (step counters, Adafactor's rows and columns) belongs to the tensor as a whole and moves on, and so do 8-bit codes.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._states: dict[str, dict[str, Tensor]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing is remembered."""
        return not self._weights

    def remember(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Copy weights and state of `parameters` (by name) before the optimizer steps."""
        self._states = {
            name: {key: value.detach().clone() for key, value in _elementwise_state(parameter, optimizer).items()}
            for name, parameter in parameters.items()
        }
        # The last thing, and at once: after an interrupt either everything is remembered or nothing.
        self._weights = {name: local_part(parameter).detach().clone() for name, parameter in parameters.items()}

    def restore(
        self, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Put inactive weights and state back, in place, and forget the copies.

        State that the optimizer created during this step had no earlier value. It is left alone where it is nearly the
        same number at every inactive position (the optimizer's own initial value). Where it is nearly the weights (a
        second sequence of weights, as of MADGRAD or schedule-free methods) it becomes the weights, else zero.

        Args:
            parameters: Parameters by name.
            masks: Bool masks of the sub-net that stepped, by parameter name; True = active. Of sharded parameters the
                part that this rank holds.
            optimizer: The optimizer that stepped.
        """
        with torch.no_grad():
            for name, parameter in parameters.items():
                before = self._weights.get(name)
                if before is None:
                    continue
                part = local_part(parameter)
                mask = masks[name].to(part.device)
                for key, value in _elementwise_state(parameter, optimizer).items():
                    old = self._states[name].get(key)
                    if old is not None and value.is_floating_point() and old.dtype == value.dtype:
                        put_back_outside_(value, old, mask)
                    elif old is not None:
                        value.copy_(torch.where(mask, value, old))
                    elif not _near(value[~mask], value[~mask][:1]):
                        copied = _near(value[~mask], before[~mask].to(value.dtype))
                        value.copy_(torch.where(mask, value, before.to(value.dtype)) if copied else value * mask)
                put_back_outside_(part, before, mask)
        self.forget()

    def forget(self) -> None:
        """Drop the copies without restoring anything."""
        self._weights = {}
        self._states = {}


def clear_state_at(parameter: Tensor, where: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer state of `parameter` at the positions `where` (bool, shape of its local part), in place."""
    with torch.no_grad():
        for value in _elementwise_state(parameter, optimizer).values():
            value.masked_fill_(where, 0)


def _elementwise_state(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state tensors of `parameter` that hold one number a weight, not codes that a scale gives a meaning."""
    state = optimizer.state.get(parameter, {})
    return {
        key: local_part(value)
        for key, value in state.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape == parameter.shape
        and value.dtype not in _CODES
    }


def _near(values: Tensor, others: Tensor) -> bool:
    """Tell whether each value is another one, but for what a step's weight decay or averaging does to new state."""
    return bool(((values - others).abs() <= _STEP * others.abs()).all())
