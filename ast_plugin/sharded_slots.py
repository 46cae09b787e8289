"""Sharded parameters addressed by name: as the optimizer has them, and the parts of them that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from ast_plugin.sharding import LastSharded, is_sharded, local_part
from ast_plugin.slots import ParameterSlots


class ShardedSlots(ParameterSlots):
    """Parameters by name, DTensors at any time where they are sharded.

    Args:
        model: The model, showing its sharded parameters now.
        names: The parameters to address.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__(model, names)
        self._last = LastSharded()
        for name in self:
            self[name]

    def __getitem__(self, name: str) -> nn.Parameter:
        """Return the parameter of that name."""
        return cast("nn.Parameter", self._last.of(name, super().__getitem__(name)))

    def of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the parameters of these names."""
        return [self[name] for name in names]


class LocalSlots(ParameterSlots):
    """The parts of parameters that this rank holds, by name, with their part of the gradient in ``grad``.

    Args:
        model: The model, showing its sharded parameters now.
        names: The parameters to address.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__(model, names)
        self._sharded = ShardedSlots(model, self)

    def __getitem__(self, name: str) -> Tensor:  # type: ignore[override]  # the part of a parameter is a plain tensor
        """Return a tensor that shares the memory of the parameter of that name."""
        parameter = self._sharded[name]
        if not is_sharded(parameter):
            return parameter
        part = local_part(parameter).detach()  # a tensor of its own, or the parameter would hold on to the gradient
        part.grad = None if parameter.grad is None else local_part(parameter.grad)
        return part

    def of(self, names: Iterable[str]) -> list[Tensor]:  # type: ignore[override]
        """Return the parts of these names."""
        return [self[name] for name in names]
