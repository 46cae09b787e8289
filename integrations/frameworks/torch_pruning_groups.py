"""Channel groups as torch-pruning's groups: layers that stand in for those of the model, and which indices go together.

An importance of torch-pruning reads the weights of live layers through a group of dependencies. Such a group is put
together from a `ChannelGroup`: the layers are hollow copies of the model's whose tensors are the run's own dense ones,
without a copy of any, and the dependencies are of torch-pruning's own classes. No graph is traced.

Order matters where rounding does, and for importances that take the first or the last layer alone, so it is that of
torch-pruning: from the layer that makes the channels to the one that reads them; for attention heads from the layer
that reads them back to values, keys and queries.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.channel_search_copy import is_transposed_linear
from ast_plugin.channels import ChannelGroup, GroupAxis
from ast_plugin.errors import ConfigError, missing_extra
from ast_plugin.methods import ChannelScoreInputs

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NEEDED = {
    "_helpers": ("GroupItem",),
    "dependency": ("Dependency", "Group", "Node"),
    "ops": ("OPTYPE", "module2type"),
    "pruner.function": ("PrunerBox",),
    "pruner.importance": ("GroupMagnitudeImportance", "GroupTaylorImportance"),
}


def torch_pruning() -> ModuleType:
    """Return the package.

    Raises:
        MissingExtraError: If it is not installed.
        ConfigError: If its version lacks what is needed here.
    """
    try:
        package = importlib.import_module("torch_pruning")
    except ImportError:
        raise missing_extra("An importance of torch-pruning", "torch-pruning", "channels") from None
    missing = []
    for path, names in _NEEDED.items():
        try:
            module = importlib.import_module(f"torch_pruning.{path}")
        except ImportError:
            missing.append(path)
        else:
            missing += [f"{path}.{name}" for name in names if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"torch-pruning {getattr(package, '__version__', 'of unknown version')} has no {', '.join(missing)}; "
            "install torch-pruning>=1.5.3 (tested: 1.5.3 and 1.6.1)"
        )
    return package


@dataclasses.dataclass(frozen=True)
class StandInGroup:
    """A channel group in torch-pruning's form.

    Attributes:
        group: Of class ``torch_pruning.dependency.Group``.
        places: Where the units lie in what an importance returns of it: int64 (units, indices of a unit).
        layers: Paths of the layers, for messages.
    """

    group: Any
    places: Tensor
    layers: tuple[str, ...]


def stand_in_group(inputs: ChannelScoreInputs, *, with_gradients: bool) -> StandInGroup:
    """Return the group that an importance can be called with.

    Args:
        inputs: What a channel score is given; its weights and states are used as they are, not copied.
        with_gradients: Whether every parameter of the layers gets a gradient, zeros where there is none.

    Raises:
        ConfigError: If there is no model to take the kinds of layers from.
    """
    if inputs.model is None:
        raise ConfigError("an importance of torch-pruning needs the model, which a run gives; call wrap(...)")
    return _Builder(inputs, inputs.model, with_gradients).built()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One item of a group: a layer, one side of it, and where the units lie there."""

    path: str
    target: Any
    pruner: Any
    side: str
    axis: GroupAxis


class _Builder:
    def __init__(self, inputs: ChannelScoreInputs, model: nn.Module, with_gradients: bool) -> None:
        package = torch_pruning()
        self._dependency, self._ops = package.dependency, package.ops
        self._pruners = package.pruner.function.PrunerBox
        self._group: ChannelGroup = inputs.group
        self._model = model
        self._tensors: Mapping[str, Tensor] = {**inputs.states, **inputs.weights}
        self._gradients: Mapping[str, Tensor] = inputs.gradients or {}
        self._with_gradients = with_gradients
        self._layers: dict[str, nn.Module] = {}

    def built(self) -> StandInGroup:
        entries = list(self._entries())
        makers = [entry for entry in entries if entry.side == "out" and entry.axis.role == "out"]
        backwards = self._group.kind == "heads" or len(makers[0].axis.parts) > 1
        readers = [entry for entry in entries if entry.side == "in"]
        between = [entry for entry in entries if entry.axis.role == "state"]
        if backwards:
            entries = [*readers, *between, *reversed(makers)]
        elif self._group.kind == "channels":  # those after the first are gates, beside the way to the readers
            entries = [makers[0], *between, *readers, *makers[1:]]
        root = entries[0]
        per_unit = sum(block for _, block in root.axis.parts)
        places = _positions(root.axis, self._group.units)
        group = self._dependency.Group()
        node = self._dependency.Node(root.target, None, root.path)
        trigger = self._handler(root)
        for entry in entries:
            target = node if entry is root else self._dependency.Node(entry.target, None, entry.path)
            handler = self._handler(entry)
            own, of_root = self._indices(entry.axis, places, per_unit, backwards=self._group.kind == "heads")
            group.add_dep(self._dependency.Dependency(trigger, handler, node, target), own)
            group[len(group) - 1].root_idxs = of_root
        return StandInGroup(group, places, tuple(dict.fromkeys(entry.path for entry in entries)))

    def _handler(self, entry: _Entry) -> Any:
        return entry.pruner.prune_in_channels if entry.side == "in" else entry.pruner.prune_out_channels

    def _entries(self) -> Iterator[_Entry]:
        kinds = self._ops.OPTYPE
        seen: set[tuple[str, str]] = set()
        for axis in self._group.axes:
            path, _, attribute = axis.tensor.rpartition(".")
            side = "in" if axis.role == "in" else "out"
            if (path, side) in seen:
                continue  # a bias, or a second tensor of a norm: the layer brings it
            layer = self._layer(path)
            kind = self._ops.module2type(layer)
            if kind in self._pruners and kind != kinds.PARAMETER:
                seen.add((path, side))
                yield _Entry(path, layer, self._pruners[kind], side, axis)
            elif isinstance(layer._parameters.get(attribute), nn.Parameter):
                yield _Entry(axis.tensor, layer._parameters[attribute], self._pruners[kinds.PARAMETER], side, axis)

    def _layer(self, path: str) -> nn.Module:
        if path not in self._layers:
            module = self._model.get_submodule(path)
            self._layers[path] = self._stand_in(path, module)
        return self._layers[path]

    def _stand_in(self, path: str, module: nn.Module) -> nn.Module:
        """Return a module of the same class and attributes, of which only the tensors are others."""
        transposed = is_transposed_linear(module)
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in module._parameters.items():
            tensor = self._tensors.get(f"{path}.{name}" if path else name, parameter)
            if tensor is None:
                parameters[name] = None
                continue
            gradient = self._gradients.get(f"{path}.{name}" if path else name)
            if transposed and name == "weight":
                tensor, gradient = tensor.t(), None if gradient is None else gradient.t()
            parameters[name] = stand_in = nn.Parameter(tensor.detach(), requires_grad=False)
            if self._with_gradients:
                stand_in.grad = torch.zeros_like(stand_in) if gradient is None else gradient.detach()
        if transposed:  # torch-pruning knows no layer whose weight is (in, out)
            inward, outward = self._tensors[f"{path}.weight" if path else "weight"].shape
            linear = nn.Linear(inward, outward, bias=False, device="meta")
            linear._parameters.update(parameters)
            return linear
        twin = object.__new__(type(module))
        buffers = {n: self._tensors.get(f"{path}.{n}" if path else n, b) for n, b in module._buffers.items()}
        vars(twin).update(vars(module) | {"_parameters": parameters, "_buffers": buffers})
        vars(twin).update({name: type(vars(module)[name])() for name in _HOOKS if name in vars(module)})
        return twin

    def _indices(
        self, axis: GroupAxis, places: Tensor, per_unit: int, *, backwards: bool
    ) -> tuple[list[int], list[int | None]]:
        """Return the indices along an axis and, for each, the index along the root that goes with it.

        Where several indices of the root share one, as the query heads of a group share rows of keys and values, there
        is none, and importances leave the layer out.
        """
        units = self._group.units
        own: list[int] = []
        of_root: list[int | None] = []
        parts = [part for part in axis.parts if part[1] % per_unit == 0]
        for offset, block in reversed(parts) if backwards else parts:
            steps = torch.arange(block)
            own += (offset + torch.arange(units)[:, None] * block + steps).reshape(-1).tolist()
            of_root += places[:, steps // (block // per_unit)].reshape(-1).tolist()
        if not parts:
            own = axis.indices(torch.arange(units)).tolist()
            of_root = [None] * len(own)
        return own, of_root


def _positions(axis: GroupAxis, units: int) -> Tensor:
    """Return where units lie along an axis, int64 (units, indices of a unit)."""
    numbers = torch.arange(units)[:, None]
    return torch.cat([offset + numbers * block + torch.arange(block) for offset, block in axis.parts], dim=1)
