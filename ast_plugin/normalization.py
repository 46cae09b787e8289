"""Private BatchNorm state: every sub-net has affine parameters and running statistics of its own.

The model itself carries the state of one sub-net at a time, at rest the default's; the others wait in banks.
Sharing even three BatchNorms between sub-nets cost the sparsest one 15 points of accuracy in the reference
implementation of the method, so the stem's and the shortcuts' are private too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ActivationError
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.private_entries import copied, fresh_entry, place_counters
from ast_plugin.sharding import LastSharded, full, is_sharded, layout_of, local_part

_Place = tuple[nn.Module, str]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PrivateNormalization:
    """Keeps one BatchNorm state a sub-net and puts the one asked for into the model.

    Tensors are resolved by module and attribute at every use, so parameters may be replaced meanwhile, and are
    changed in place, so that optimizers, compiled graphs and hooks keep seeing the same ones.

    Args:
        model: The model, carrying the state that every sub-net starts from.
        sub_nets: Names of the sub-nets.
        default: The one whose state the model carries at rest.
        enabled: False leaves BatchNorm shared: no names, nothing is ever swapped.
    """

    def __init__(self, model: nn.Module, sub_nets: Sequence[str], default: str, *, enabled: bool = True) -> None:
        self.default = default
        self.carried = default
        self.handed_over: str | None = None
        self._arriving: _Arrival | None = None
        parameters: dict[str, _Place] = {}
        buffers: dict[str, _Place] = {}
        if enabled and len(sub_nets) > 1:
            seen: set[int] = set()
            for path, module in batch_norm_modules(model).items():
                prefix = f"{path}." if path else ""
                for attribute, parameter in module._parameters.items():
                    if parameter is not None and parameter.ndim <= 1 and id(parameter) not in seen:
                        seen.add(id(parameter))
                        parameters[prefix + attribute] = (module, attribute)
                for attribute in _STATISTICS:
                    buffer = module._buffers.get(attribute)
                    if buffer is not None and id(buffer) not in seen:
                        seen.add(id(buffer))
                        buffers[prefix + attribute] = (module, attribute)
        # There are hundreds of these tensors: everything done at every step goes through lists in this order.
        self.names: tuple[str, ...] = (*parameters, *buffers)
        self.parameter_names: tuple[str, ...] = tuple(parameters)
        self._parameters = tuple(parameters.values())
        self._buffers = tuple(buffers.values())
        self._last = LastSharded()
        found = _present([module._parameters[name] for module, name in self._parameters])
        layouts = {
            name: layout_of(name, parameter) for name, parameter in zip(self.parameter_names, found, strict=True)
        }
        self._layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        self._owners()  # the sharded ones are seen, whatever FSDP shows later
        with torch.inference_mode(False), torch.no_grad():
            self._banks: dict[str, list[Tensor]] = {
                name: [] if name == default else [tensor.detach().clone() for tensor in self.tensors()]
                for name in sub_nets
            }
        self._optimizer_states: dict[str, dict[str, Any]] = {name: {} for name in sub_nets}
        self._loaded: set[str] = set()

    def tensors(self) -> list[Tensor]:
        """Return the model's own private tensors, of sharded ones this rank's parts, in the order of `names`."""
        return [*self._present_parameters(), *_present([module._buffers[name] for module, name in self._buffers])]

    def _present_parameters(self) -> list[Tensor]:
        owners = self._owners()
        return [local_part(owner) for owner in owners] if self._layouts else owners

    def owners(self) -> dict[str, Tensor]:
        """Return the private parameters as the optimizer has them, by name."""
        return dict(zip(self.parameter_names, self._owners(), strict=True))

    def _owners(self) -> list[Tensor]:
        """Return the private parameters as the optimizer has them."""
        present = _present([module._parameters[name] for module, name in self._parameters])
        if not self._layouts:
            return present
        return [self._last.of(name, tensor) for name, tensor in zip(self.parameter_names, present, strict=True)]

    def adopt_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every sub-net a copy of the state that the optimizer has for the private parameters already.

        Some optimizers make their state when they are constructed and fail where it is missing.
        """
        for name, parameter in zip(self.parameter_names, self._owners(), strict=True):
            if parameter in optimizer.state:
                for sub_net, entries in self._optimizer_states.items():
                    if sub_net != self.carried:
                        entries[name] = copied(optimizer.state[parameter])

    def carry(self, sub_net: str) -> None:
        """Put the state of `sub_net` into the model, and the one found there into its bank."""
        self._finish()
        if sub_net == self.carried or not self.names:
            self.carried = sub_net
            return
        self._leave(self.carried, self.tensors())
        self._arriving = _Arrival(sub_net, None, handed_over=None, carried=sub_net)
        self._finish()

    def _leave(self, sub_net: str, tensors: list[Tensor]) -> None:
        """Copy the model's first tensors into a bank; may be repeated."""
        bank, count = self._banks[sub_net], len(tensors)
        with torch.inference_mode(False), torch.no_grad():
            if not bank:
                bank += [torch.empty_like(tensor, requires_grad=False) for tensor in self.tensors()]
            elif (bank[0].device, bank[0].dtype) != (tensors[0].device, tensors[0].dtype):  # the model was converted
                bank[:count] = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
            # A call for each of hundreds of tiny tensors would take longer than the copying.
            torch._foreach_copy_(bank[:count], tensors)

    def _finish(self) -> None:
        """Bring in what is on its way; again from the start where an interrupt had cut it off.

        Nothing that is read here is written to, so that it may be repeated, and it is repeated before anything else
        is done. Otherwise one sub-net's state would end in another one's bank.
        """
        arriving = self._arriving
        if arriving is None:
            return
        tensors = self.tensors() if arriving.optimizer is None else self._present_parameters()
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(tensors, self._banks[arriving.sub_net][: len(tensors)])
        if arriving.optimizer is not None:
            self._bring_in_state(arriving.optimizer, arriving.sub_net)
        self.carried, self.handed_over = arriving.carried, arriving.handed_over
        self._arriving = None

    def _bring_in_state(self, optimizer: torch.optim.Optimizer, sub_net: str) -> None:
        entries = self._entries(optimizer, sub_net)
        for name, parameter in zip(self.parameter_names, self._owners(), strict=True):
            if entries.get(name) is not None:
                optimizer.state[parameter] = entries[name]
            else:
                optimizer.state.pop(parameter, None)

    def _entries(self, optimizer: torch.optim.Optimizer, sub_net: str) -> dict[str, Any]:
        """Return the optimizer state of a sub-net that waits, fit to be given to the optimizer."""
        entries = self._optimizer_states[sub_net]
        if sub_net in self._loaded:
            place_counters(optimizer, entries, self.owners())
            self._loaded.discard(sub_net)
        if not any(group.get("fused") for group in optimizer.param_groups):
            return entries
        present = {n: optimizer.state[p] for n, p in self.owners().items() if p in optimizer.state}
        known = [*self._optimizer_states.values(), present]
        return {n: entries[n] if n in entries else fresh_entry(known, n) for n in self.parameter_names}

    def waiting(self, optimizer: torch.optim.Optimizer, sub_net: str) -> dict[str, tuple[Tensor, Any]]:
        """Return the parameters of a sub-net that are neither in the model nor in the optimizer.

        Args:
            optimizer: The optimizer that is to have them.
            sub_net: Whose parameters.

        Returns:
            By name the tensor in the bank, and its optimizer state, None where there is none yet.
        """
        self._finish()
        entries = self._entries(optimizer, sub_net)
        return {
            name: (tensor, entries.get(name))
            for name, tensor in zip(self.parameter_names, self._banks[sub_net][: len(self._parameters)], strict=True)
        }

    def note_entries(self, sub_net: str, entries: Mapping[str, Any]) -> None:
        """Keep optimizer state of a sub-net that waits."""
        self._optimizer_states[sub_net] = {**self._optimizer_states[sub_net], **entries}

    def state(self, sub_net: str) -> dict[str, Tensor]:
        """Return copies of the private tensors of `sub_net` by state-dict name, in the model's present dtypes.

        Where the model has DTensors, so has the state.
        """
        present = self.tensors()
        named = zip(self.names, self.held(sub_net), present, strict=True)
        copies = {name: tensor.detach().to(like, copy=True) for name, tensor, like in named}
        for name, layout in self._layouts.items():
            copies[name] = layout.join(copies[name])
        return copies

    def held(self, sub_net: str) -> list[Tensor]:
        """Return where the tensors of `sub_net` are now; its parameters are apart while any are handed over."""
        present, bank, count = self.tensors(), self._banks[sub_net], len(self._parameters)
        parameters = present if sub_net == (self.handed_over or self.carried) else bank
        return parameters[:count] + (present if sub_net == self.carried else bank)[count:]

    def move_towards(self, other: PrivateNormalization, sub_net: str, share: float) -> None:
        """Move a sub-net's tensors towards those that it has elsewhere: ``own + share * (other - own)``, in place.

        Args:
            other: Of the same network, on any device and in any dtype, whole as this one.
            sub_net: Whose tensors.
            share: In [0, 1]. Counts are taken over.
        """
        other._finish()
        own, others = self.held(sub_net), other.held(sub_net)
        with torch.inference_mode(False), torch.no_grad():
            others = [theirs.to(mine.device, mine.dtype) for mine, theirs in zip(own, others, strict=True)]
            averaged = [tensor.is_floating_point() for tensor in own]
            for floating in (True, False):
                mine, theirs = ([t for t, f in zip(ts, averaged, strict=True) if f == floating] for ts in (own, others))
                if mine and floating:
                    torch._foreach_lerp_(mine, theirs, share)
                elif mine:
                    torch._foreach_copy_(mine, theirs)

    def load(self, sub_net: str, state: Mapping[str, Tensor]) -> None:
        """Set the private tensors of `sub_net` in place from `state`, which must hold all of `names`."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in zip(self.names, self.held(sub_net), strict=True):
                tensor.copy_(self._part(name, state[name]))

    def _part(self, name: str, value: Tensor) -> Tensor:
        """Return what of a private tensor this rank holds."""
        if name in self._layouts and not is_sharded(value):
            return self._layouts[name].part_of(value)
        return local_part(value) if name in self._layouts else full(value)

    def hand_over(self, optimizer: torch.optim.Optimizer, sub_net: str) -> None:
        """Give the optimizer the private parameters of `sub_net` for its step, with their optimizer state.

        Running statistics stay: optimizers do not touch them.

        Args:
            optimizer: The optimizer; state entries are exchanged by reference, and may be missing.
            sub_net: Whose parameters.
        """
        self._finish()
        if self.handed_over is None:
            self._swap_parameters(optimizer, leaving=self.carried, coming=sub_net, handed_over=sub_net)

    def take_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo `hand_over`, keeping what the optimizer changed; does nothing when nothing is handed over."""
        self._finish()
        if self.handed_over is not None:
            self._swap_parameters(optimizer, leaving=self.handed_over, coming=self.carried, handed_over=None)

    def _swap_parameters(
        self, optimizer: torch.optim.Optimizer, *, leaving: str, coming: str, handed_over: str | None
    ) -> None:
        if leaving == coming or not self._parameters:
            self.handed_over = handed_over
            return
        self._leave(leaving, self._present_parameters())
        named = zip(self.parameter_names, self._owners(), strict=True)
        self._optimizer_states[leaving] = {n: optimizer.state[p] for n, p in named if p in optimizer.state}
        self._arriving = _Arrival(coming, optimizer, handed_over=handed_over, carried=self.carried)
        self._finish()

    def start_from_present(self) -> None:
        """Give every sub-net the tensors that the model carries."""
        if self.names:
            state = self.state(self.carried)
            for name in self._banks:
                if name != self.carried:
                    self.load(name, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the banks of all sub-nets but the carried one, with their optimizer state, as plain containers."""
        waiting = [name for name in self._banks if name != self.carried]
        return {
            "tensors": {name: self.state(name) for name in waiting},
            "optimizer": {name: copied(self._optimizer_states[name]) for name in waiting},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the model itself must carry the state it carried then."""
        for name, tensors in state["tensors"].items():
            self.load(name, tensors)
        devices = dict(zip(self.parameter_names, [p.device for p in self._present_parameters()], strict=True))
        for name, entries in state["optimizer"].items():
            self._optimizer_states[name] = {
                key: self._placed(key, copied(entry, device=devices[key])) for key, entry in entries.items()
            }
            self._loaded.add(name)

    def _placed(self, name: str, entry: Any) -> Any:
        """Return optimizer state of a private parameter, whole tensors divided among the ranks as the parameter is."""
        layout = self._layouts.get(name)
        if layout is None or not isinstance(entry, dict):
            return entry
        return {
            key: layout.join(layout.part_of(value))
            if isinstance(value, Tensor) and not is_sharded(value) and tuple(value.shape) == layout.shape
            else value
            for key, value in entry.items()
        }


@dataclasses.dataclass(frozen=True)
class _Arrival:
    """A state on its way into the model.

    Attributes:
        sub_net: Whose state.
        optimizer: Where its optimizer state belongs; None where only the tensors come, statistics among them.
        handed_over: What is handed over to the optimizer once it is there.
        carried: What the model carries once it is there.
    """

    sub_net: str
    optimizer: torch.optim.Optimizer | None
    handed_over: str | None
    carried: str


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        raise ActivationError(
            "a BatchNorm parameter or statistic is gone: it was private to each sub-net when the model was wrapped, "
            "and is None now; call detach() before taking it away"
        )
    return present
