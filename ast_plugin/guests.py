"""Private BatchNorm parameters of several sub-nets in one optimizer step.

The model has room for one sub-net's. Those of the others stand beside them as guests for the length of the step: in the
same parameter groups, with their own gradients and optimizer state, on the memory of their banks. So one step of the
user's optimizer moves all of them, and whatever it counts or measures over all parameters is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ast_plugin.normalization import PrivateNormalization

Gradients = Mapping[str, Mapping[str, Tensor]]


class Guests:
    """Gives an optimizer the private parameters of the sub-nets that a step trains, and takes them back.

    Args:
        normalization: The private state.
    """

    def __init__(self, normalization: PrivateNormalization) -> None:
        self._normalization = normalization
        self._guests: dict[str, dict[str, nn.Parameter]] = {}
        self._lists: list[tuple[list[Tensor], int]] = []  # of every parameter group, with their ordinary lengths

    def hand_over(self, optimizer: torch.optim.Optimizer, sub_net: str, gradients: Gradients) -> None:
        """Have the parameters of one sub-net in the model, and those of others beside them, in the optimizer.

        Args:
            optimizer: The optimizer.
            sub_net: Whose parameters are to be in the model.
            gradients: Gradients of private parameters by name, by sub-net; that of `sub_net` is passed over: its
                gradients are in the model.
        """
        self._normalization.hand_over(optimizer, sub_net)
        others = {name: found for name, found in gradients.items() if name != sub_net}
        if not others or self._lists:
            return
        owners = self._normalization.owners()
        beside: dict[int, list[nn.Parameter]] = {id(owner): [] for owner in owners.values()}
        self._lists = [(group["params"], len(group["params"])) for group in optimizer.param_groups]
        for name, found in others.items():
            waiting = self._normalization.waiting(optimizer, name)
            self._guests[name] = {key: nn.Parameter(tensor) for key, (tensor, _) in waiting.items() if key in found}
            for key, guest in self._guests[name].items():
                guest.grad = found[key]
                entry = waiting[key][1]
                if entry is not None:
                    optimizer.state[guest] = entry
                beside[id(owners[key])].append(guest)
        for parameters, _ in self._lists:  # in place: some optimizers keep the list
            parameters += [guest for parameter in parameters for guest in beside.get(id(parameter), ())]

    def take_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo `hand_over`, keeping what the optimizer changed; does nothing when nothing is handed over."""
        if self._lists:  # again from the start where an interrupt had cut it off
            for parameters, length in self._lists:
                del parameters[length:]
            for name, guests in self._guests.items():
                known = {key: optimizer.state[guest] for key, guest in guests.items() if guest in optimizer.state}
                self._normalization.note_entries(name, known)
            for guests in self._guests.values():
                for guest in guests.values():
                    optimizer.state.pop(guest, None)
            self._guests = {}
            self._lists = []
        self._normalization.take_back(optimizer)
