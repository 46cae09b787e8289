"""The running mean of tickets: one averaged copy of the shared weights, and how often each sub-net kept each of them.

With M the mean, W the weights at a cycle's end and u the union of the sub-nets' masks, ticket k makes it
``M + (W u - M) / k`` over all positions: a weight that a ticket does not keep counts as zero there. A sub-net that kept
weight i in n_i of those u_i tickets in which some sub-net did has its own mean there, about ``M_i n_i / u_i``, and is
made of its largest. For one sub-net that is ``M_i``.

Source: Yin et al.: "Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training",
UAI 2022, section 3.2, equation 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import StateError

Tensors = Mapping[str, Tensor]

_KEYS = {"tickets", "weights", "kept", "kept_by_any", "private"}


class TicketAverage:
    """The tickets so far, as their mean. What it holds is never changed in place, so states may share it.

    Attributes:
        tickets: How many have been taken.
        weights: Their mean by name, float32 or wider, of all shared parameters and buffers; the last value of integers.
        kept: By sub-net and name of a prunable parameter, uint8: how many tickets kept each weight.
        kept_by_any: By name of a prunable parameter, uint8: in how many tickets some sub-net kept each weight.
        private: By sub-net and name, the mean of its own BatchNorm tensors; the last value of integer ones.
    """

    def __init__(self) -> None:
        self.tickets = 0
        self.weights: dict[str, Tensor] = {}
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.kept_by_any: dict[str, Tensor] = {}
        self.private: dict[str, dict[str, Tensor]] = {}

    def add(self, weights: Tensors, masks: Mapping[str, Tensors], private: Mapping[str, Tensors]) -> None:
        """Take one more ticket.

        Args:
            weights: All shared parameters and buffers, dense; not changed.
            masks: By sub-net and name, bool, of the prunable ones among them.
            private: By sub-net, its own BatchNorm tensors.
        """
        self.tickets = count = self.tickets + 1
        for name, weight in weights.items():
            if not weight.is_floating_point():
                self.weights[name] = weight.clone()
                continue
            value = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            of_sub_nets = [tensors[name].to(value.device) for tensors in masks.values() if name in tensors]
            if of_sub_nets:
                kept_by_any = functools.reduce(torch.logical_or, of_sub_nets)
                value = value.masked_fill(~kept_by_any, 0)
                self.kept_by_any[name] = _counted(self.kept_by_any.get(name), kept_by_any)
            self.weights[name] = _mean(self.weights.get(name), value, count)
        for sub_net, tensors in masks.items():
            kept = self.kept.setdefault(sub_net, {})
            for name, mask in tensors.items():
                kept[name] = _counted(kept.get(name), mask.to(weights[name].device))
        for sub_net, tensors in private.items():
            before = self.private.get(sub_net, {})
            self.private[sub_net] = {
                name: _mean(before.get(name), tensor.detach(), count) if tensor.is_floating_point() else tensor.clone()
                for name, tensor in tensors.items()
            }

    def scores(self, sub_net: str) -> dict[str, Tensor]:
        """Return how large each prunable weight is in a sub-net's own mean, by parameter name; at least 0."""
        return {
            name: self.weights[name].abs() * kept / self.kept_by_any[name].clamp(min=1)
            for name, kept in self.kept[sub_net].items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain containers."""
        return {
            "tickets": self.tickets,
            "weights": dict(self.weights),
            "kept": {name: dict(tensors) for name, tensors in self.kept.items()},
            "kept_by_any": dict(self.kept_by_any),
            "private": {name: dict(tensors) for name, tensors in self.private.items()},
        }

    @classmethod
    def from_state(cls, state: Any, weights: Tensors, masks: Mapping[str, Tensors], private: Any) -> TicketAverage:
        """Return what `state_dict` described, on the devices of a run.

        Args:
            state: What it returned.
            weights: All shared parameters and buffers of the run.
            masks: By sub-net and name, its masks.
            private: By sub-net, its own BatchNorm tensors.

        Raises:
            StateError: If it is damaged or of another run.
        """
        found = cls()
        try:
            found.tickets = int(state["tickets"])
            if set(state) != _KEYS or not 0 <= found.tickets <= torch.iinfo(torch.uint8).max:
                raise KeyError(", ".join(map(str, state)))
            if found.tickets == 0:
                return found
            devices = {name: tensor.device for name, tensor in weights.items()}
            found.weights = _placed("weights", state["weights"], weights, devices)
            some = next(iter(masks.values()))
            found.kept_by_any = _placed("kept_by_any", state["kept_by_any"], some, devices)
            for sub_net, tensors in masks.items():
                found.kept[sub_net] = _placed(f"kept of {sub_net!r}", state["kept"][sub_net], tensors, devices)
            for sub_net, tensors in private.items():
                places = {name: tensor.device for name, tensor in tensors.items()}
                what = f"BatchNorm tensors of {sub_net!r}"
                found.private[sub_net] = _placed(what, state["private"][sub_net], tensors, places)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"the saved state of sup_tickets is damaged: {type(error).__name__}: {error}; load another checkpoint"
            ) from error
        return found


def _mean(before: Tensor | None, value: Tensor, count: int) -> Tensor:
    return value.clone() if before is None else before + (value - before) / count


def _counted(before: Tensor | None, mask: Tensor) -> Tensor:
    return mask.to(torch.uint8) if before is None else before + mask.to(torch.uint8)


def _placed(what: str, saved: Tensors, present: Tensors, devices: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return saved tensors where they belong, having compared names and shapes with those of the run."""
    differing = [
        name
        for name in sorted({*saved, *present})
        if name not in saved or name not in present or saved[name].shape != present[name].shape
    ]
    if differing:
        raise StateError(
            f"the saved state of sup_tickets has other {what} than this run ({len(differing)} differ, the first is "
            f"{differing[0]!r}); load a checkpoint of the same model and sub-nets"
        )
    return {name: saved[name].to(devices[name]) for name in present}
