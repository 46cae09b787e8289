"""Private BatchNorm state: every sub-net has affine parameters and running statistics of its own.

The model itself carries the state of one sub-net at a time, at rest the default's; the others wait in banks.
Sharing even three BatchNorms between sub-nets cost the sparsest one 15 points of accuracy in the reference
implementation of the method, so the stem's and the shortcuts' are private too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batch_norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm modules of `model` (any dimension, synchronised ones and subclasses too) by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


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
        self._parameters: dict[str, tuple[nn.Module, str]] = {}
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        if enabled and len(sub_nets) > 1:
            seen: set[int] = set()
            for path, module in batch_norm_modules(model).items():
                prefix = f"{path}." if path else ""
                for attribute in _AFFINE:
                    parameter = module._parameters.get(attribute)
                    if parameter is not None and id(parameter) not in seen:
                        seen.add(id(parameter))
                        self._parameters[prefix + attribute] = (module, attribute)
                for attribute in _STATISTICS:
                    buffer = module._buffers.get(attribute)
                    if buffer is not None and id(buffer) not in seen:
                        seen.add(id(buffer))
                        self._buffers[prefix + attribute] = (module, attribute)
        with torch.inference_mode(False), torch.no_grad():
            self._banks: dict[str, dict[str, Tensor]] = {
                name: {key: tensor.detach().clone() for key, tensor in self._present().items()}
                for name in sub_nets
                if name != default
            }
            self._banks[default] = {}
        self._optimizer_states: dict[str, dict[str, Any]] = {name: {} for name in sub_nets}

    @property
    def names(self) -> tuple[str, ...]:
        """State-dict names of all private tensors."""
        return (*self._parameters, *self._buffers)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the private parameters, a part of `names`."""
        return tuple(self._parameters)

    def _present(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, (module, attribute) in self._parameters.items():
            parameter = module._parameters[attribute]
            if parameter is not None:
                tensors[name] = parameter
        for name, (module, attribute) in self._buffers.items():
            buffer = module._buffers[attribute]
            if buffer is not None:
                tensors[name] = buffer
        return tensors

    def adopt_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every sub-net a copy of the state that the optimizer has for the private parameters already.

        Some optimizers make their state when they are constructed and fail where it is missing.
        """
        for name, (module, attribute) in self._parameters.items():
            parameter = module._parameters[attribute]
            if parameter is not None and parameter in optimizer.state:
                for sub_net, entries in self._optimizer_states.items():
                    if sub_net != self.carried:
                        entries[name] = _copied(optimizer.state[parameter])

    def carry(self, sub_net: str) -> None:
        """Put the state of `sub_net` into the model, and the one found there into its bank."""
        if sub_net == self.carried or not (self._parameters or self._buffers):
            self.carried = sub_net
            return
        with torch.inference_mode(False), torch.no_grad():
            present = self._present()
            leaving, coming = self._banks[self.carried], self._banks[sub_net]
            for name, tensor in present.items():
                kept = leaving.get(name)
                if kept is None or (kept.device, kept.dtype, kept.shape) != (tensor.device, tensor.dtype, tensor.shape):
                    leaving[name] = tensor.detach().clone()
                else:
                    kept.copy_(tensor)
                tensor.copy_(coming[name])
        self.carried = sub_net

    def state(self, sub_net: str) -> dict[str, Tensor]:
        """Return copies of the private tensors of `sub_net` by state-dict name, in the model's present dtypes."""
        present = self._present()
        source = present if sub_net == self.carried else self._banks[sub_net]
        return {name: source[name].detach().to(present[name], copy=True) for name in self.names}

    def load(self, sub_net: str, state: Mapping[str, Tensor]) -> None:
        """Set the private tensors of `sub_net` in place from `state`, which must hold all of `names`."""
        target = self._present() if sub_net == self.carried else self._banks[sub_net]
        with torch.inference_mode(False), torch.no_grad():
            for name in self.names:
                target[name].copy_(state[name])

    def carry_optimizer_state(self, optimizer: torch.optim.Optimizer, *, leaving: str, coming: str) -> None:
        """Exchange the optimizer state of the private parameters of two sub-nets, by reference.

        Args:
            optimizer: The optimizer, whose ``state`` holds the entries of `leaving`; entries may be missing.
            leaving: The sub-net whose entries go into its bank.
            coming: The sub-net whose entries come out of theirs.
        """
        if leaving == coming:
            return
        out, into = self._optimizer_states[leaving], self._optimizer_states[coming]
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for name, (module, attribute) in self._parameters.items():
            parameter = module._parameters[attribute]
            if parameter is None:
                continue
            if parameter in optimizer.state:
                out[name] = optimizer.state.pop(parameter)
            else:
                out.pop(name, None)
            entry = into.pop(name, None)
            if entry is None and fused:
                entry = self._fresh_entry(name)
            if entry is not None:
                optimizer.state[parameter] = entry

    def _fresh_entry(self, name: str) -> Any:
        """Return zeroed optimizer state in the form that other sub-nets have, None if none has any.

        Fused kernels refuse a step in which some parameters have momentum and others none yet.
        """
        for entries in self._optimizer_states.values():
            if name in entries:
                return {
                    key: torch.zeros_like(value) if isinstance(value, Tensor) else value
                    for key, value in entries[name].items()
                }
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the banks of all sub-nets but the carried one, with their optimizer state, as plain containers."""
        waiting = [name for name in self._banks if name != self.carried]
        return {
            "tensors": {name: self.state(name) for name in waiting},
            "optimizer": {name: _copied(self._optimizer_states[name]) for name in waiting},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the model itself must carry the state it carried then."""
        for name, tensors in state["tensors"].items():
            self.load(name, tensors)
        present = self._present()
        for name, entries in state["optimizer"].items():
            self._optimizer_states[name] = {
                key: _copied(entry, device=present[key].device) for key, entry in entries.items()
            }


def _copied(value: Any, device: torch.device | None = None) -> Any:
    """Return a copy of nested plain containers with every tensor cloned, tensors with axes moved to `device`."""
    if isinstance(value, Tensor):
        # Step counters (no axes) stay where the optimizer keeps them: on the CPU unless it is capturable.
        return value.detach().clone() if device is None or value.dim() == 0 else value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item, device) for item in value]
    return value
