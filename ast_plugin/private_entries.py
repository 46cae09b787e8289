"""What optimizers remember of private BatchNorm parameters: entries by parameter name, apart from the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_COUNTER = "step"  # what torch's optimizers call it


def copied(value: Any, device: torch.device | None = None) -> Any:
    """Return a copy of nested plain containers with every tensor cloned, tensors with axes moved to `device`."""
    if isinstance(value, Tensor):
        # Step counters (no axes) are placed when the optimizer gets them: where it wants them depends on its options.
        return value.detach().clone() if device is None or value.dim() == 0 else value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item, device) for item in value]
    return value


def place_counters(
    optimizer: torch.optim.Optimizer, entries: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> None:
    """Move step counters from a file to where the optimizer keeps its own, as its ``load_state_dict`` does.

    Not when they are loaded: an optimizer takes over its saved options, ``fused`` among them, only afterwards.

    Args:
        optimizer: The optimizer.
        entries: Its entries of the parameters; changed in place.
        parameters: The parameters by name, as the optimizer has them.
    """
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in parameters.items():
        entry = entries.get(name)
        if not isinstance(entry, dict) or not on_device.get(id(parameter)):
            continue
        counter = entry.get(_COUNTER)
        if isinstance(counter, Tensor):
            entry[_COUNTER] = counter.to(device=parameter.device, dtype=torch.float32)


def fresh_entry(known: Iterable[Mapping[str, Any]], name: str) -> Any:
    """Return a zeroed entry in the form of the first that is known, None if none is.

    Fused kernels refuse a step in which some parameters have momentum and others none yet.

    Args:
        known: Entries by parameter name, of several sub-nets.
        name: The parameter.
    """
    for entries in known:
        if name in entries:
            return {
                key: torch.zeros_like(value) if isinstance(value, Tensor) else value
                for key, value in entries[name].items()
            }
    return None
