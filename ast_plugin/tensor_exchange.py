"""Tensors of a model that change places with others, one after the other and in place.

No second copy of the model is made: the others hold the model's values meanwhile. An interrupt at any moment loses
nothing: the exchange goes on, or back, from where it was cut off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from ast_plugin.named_tensors import checked_tensors
from ast_plugin.slots import tensor_slots


class TensorExchange:
    """Pairs of tensors that change places.

    Args:
        present: Returns those of the model, as they are now.
        others: The others, in the same order; written to. Their dtypes must hold the model's values exactly.
    """

    def __init__(self, present: Callable[[], Sequence[Tensor]], others: Sequence[Tensor]) -> None:
        self._present = present
        self._others = others
        self._exchanged = 0  # how many, from the first
        self._moving: _Move | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the model holds all of the others' values."""
        return self._moving is None and self._exchanged == len(self._others)

    def exchange(self, on: bool) -> None:
        """Have the model hold the others' values, or its own; goes on where an interrupt has come in between.

        Args:
            on: Whether the others'.
        """
        present = [tensor.detach() for tensor in self._present()]
        if self._moving is not None:
            self._complete(self._moving, present)
        while self._exchanged != (len(present) if on else 0):
            index = self._exchanged - (not on)
            self._moving = _Move(index, copied(present[index]), exchanged=index + on)
            self._complete(self._moving, present)

    def _complete(self, move: _Move, present: Sequence[Tensor]) -> None:
        """Write both tensors of a pair. Repeated after an interrupt, it does what is still to do."""
        other = self._others[move.index].detach()
        if not move.arrived:
            present[move.index].copy_(other)
            move.arrived = True
        other.copy_(move.value)
        self._exchanged = move.exchanged
        self._moving = None


class WeightExchange(TensorExchange):
    """Parameters and persistent buffers of a model, and others that change places with them.

    All buffers take part, those without another value with a copy of their own: they may be changed meanwhile.

    Args:
        model: The model; its tensors are resolved at every use.
        weights: Other values for some of them, by name. Tensors of the model's dtypes change places with the model's,
            of others a copy does.
        what: What they are, for messages.
        private: Names of tensors that are left alone.

    Raises:
        ConfigError: If the model has no such tensor, or one of another shape.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], what: str, *, private: Container[str]) -> None:
        buffers = {key: buffer for key, buffer in _persistent_buffers(model).items() if key not in private}
        shared = {key: tensor for key, tensor in model.named_parameters() if key not in private} | buffers
        shapes = {key: tuple(tensor.shape) for key, tensor in shared.items()}
        given = checked_tensors(what, weights, shapes, complete=False)
        others = {**_writable(given, shared), **{key: copied(buffers[key]) for key in buffers if key not in given}}
        slots = tensor_slots(model, others)
        super().__init__(lambda: [held[attribute] for held, attribute in slots], list(others.values()))
        self._places = {key: index for index, key in enumerate(others)}
        # What becomes of these on the model is lost unless it is asked for: they are in nobody else's hands.
        self._loose = {key: given.get(key) for key in buffers if others[key] is not given.get(key)}

    def changed(self) -> dict[str, Tensor]:
        """Return copies of the buffers that are in nobody else's hands and have changed since the exchange."""
        present, found = self._present(), {}
        for name, given in self._loose.items():
            now, before = present[self._places[name]], self._others[self._places[name]] if given is None else given
            if not torch.equal(now.to(before), before):
                found[name] = copied(now)
        return found


@dataclasses.dataclass
class _Move:
    """A pair of tensors that change places.

    Attributes:
        index: Which pair.
        value: What the model had before.
        exchanged: How many pairs have changed places when this is done.
        arrived: Whether the model has the other value.
    """

    index: int
    value: Tensor
    exchanged: int
    arrived: bool = False


def copied(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a copy without graph, of the dtype of `like` where that is given."""
    return tensor.detach().to(tensor.dtype if like is None else like.dtype, copy=True)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{key}" if path else key: buffer
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _writable(given: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, and copies of those that cannot hold a value of the model's exactly, and alone."""
    found: dict[str, Tensor] = {}
    taken = {tensor.data_ptr() for tensor in present.values()}
    for name, tensor in given.items():
        expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        alone = tensor.data_ptr() not in taken and not expanded and not tensor.is_inference()
        taken.add(tensor.data_ptr())
        found[name] = tensor if alone and tensor.dtype == present[name].dtype else copied(tensor, present[name])
    return found
