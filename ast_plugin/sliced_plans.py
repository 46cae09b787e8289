"""What of every tensor a channel sub-net leaves, and where in the model it stands: made anew when masks change."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroups, Slice, attribute_values, slices
from ast_plugin.errors import ActivationError
from ast_plugin.masks import MaskStore


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of the model stands.

    Attributes:
        name: Its name.
        held: The module's own dict of parameters or buffers that holds it.
        attribute: Its name there.
        shadows: For each module that holds it, one as a rule, more where it is tied: the module's ``__dict__``, where a
            tensor takes precedence, and the name.
        is_parameter: Whether it is no buffer.
    """

    name: str
    held: dict[str, Any]
    attribute: str
    shadows: tuple[tuple[dict[str, Any], str], ...]
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that the model holds right now, of full size; `ActivationError` if it is gone."""
        tensor: Tensor | None = self.held.get(self.attribute)
        if tensor is None:
            raise ActivationError(
                f"{self.name!r} is gone: it was a part of a channel group when the model was wrapped; call detach() "
                "before taking tensors away"
            )
        return tensor


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is left of one tensor.

    Attributes:
        name: Its name.
        place: Where it stands.
        dims: Dimension and kept indices along it, on its device.
    """

    name: str
    place: Place
    dims: tuple[tuple[int, Tensor], ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """The columns of one weight that read dropped units.

    Attributes:
        place: Where it stands.
        dim: The dimension.
        indices: The dropped ones along it, on its device.
    """

    place: Place
    dim: int
    indices: Tensor


@dataclasses.dataclass(frozen=True)
class SlicePlan:
    """All that is smaller in one sub-net.

    Attributes:
        parameters: The parameters of which something is dropped.
        buffers: The same for buffers.
        attributes: Module, attribute and number of units for it.
        columns: What reads dropped units.
    """

    parameters: tuple[Cut, ...]
    buffers: tuple[Cut, ...]
    attributes: tuple[tuple[nn.Module, str, int], ...]
    columns: tuple[Dropped, ...]


class SlicePlans:
    """The plan of every channel sub-net.

    Args:
        model: The bare model, which the groups name the tensors of.
        groups: The groups.
        masks: The masks, read at every change.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, masks: MaskStore) -> None:
        self._groups = groups
        self._masks = masks
        self._places = _places(model, groups)
        self._modules = {a.module: model.get_submodule(a.module) for g in groups.groups for a in g.attributes}
        self._known: dict[str, tuple[int, tuple[torch.device, ...], SlicePlan | None]] = {}

    def of(self, sub_net: str) -> SlicePlan | None:
        """Return the plan of a sub-net, None where its masks keep something else than whole units.

        Masks may come from a file or a plugin; what is computed with smaller weights is then another network.
        """
        revision = self._masks.revision(sub_net)
        devices = tuple(place.tensor.device for place in self._places.values())
        known = self._known.get(sub_net)
        if known is None or known[:2] != (revision, devices):
            known = self._known[sub_net] = revision, devices, self._make(sub_net)
        return known[2]

    def _make(self, sub_net: str) -> SlicePlan | None:
        kept = self._units(sub_net)
        if kept is None:
            return None
        cuts = []
        for name, left in slices(self._groups.groups, kept).items():
            place = self._places[name]
            device = place.tensor.device
            cuts.append(Cut(name, place, tuple((dim, indices.to(device)) for dim, indices in left.dims)))
        values = attribute_values(self._groups.groups, kept)
        return SlicePlan(
            parameters=tuple(cut for cut in cuts if cut.place.is_parameter),
            buffers=tuple(cut for cut in cuts if not cut.place.is_parameter),
            attributes=tuple((self._modules[module], name, value) for (module, name), value in values.items()),
            columns=tuple(self._columns(kept)),
        )

    def _units(self, sub_net: str) -> dict[str, Tensor] | None:
        """Return which units are kept; None where the masks are of something else than whole units."""
        known = self._masks.units(sub_net)
        if known is not None:
            return {name: flags.cpu() for name, flags in known.items()}
        masks = self._masks.of(sub_net)
        kept: dict[str, Tensor] = {}
        for group in self._groups.groups:
            for axis in group.axes_of("in"):  # if they are of whole units, a single row tells
                units = axis.flags(_line(masks[axis.tensor], axis.dim)).cpu()
                kept[group.name] = kept[group.name] | units if group.name in kept else units
        found = slices(self._groups.groups, kept)
        for name, mask in masks.items():
            count = self._masks.kept(sub_net, name)
            if not (_is_of(mask, count, found[name]) if name in found else count == mask.numel()):
                return None
        return kept

    def _columns(self, kept: dict[str, Tensor]) -> list[Dropped]:
        found = []
        for group in self._groups.groups:
            numbers = (~kept[group.name]).nonzero().reshape(-1)
            for axis in group.axes_of("in") if len(numbers) else ():
                place = self._places[axis.tensor]
                found.append(Dropped(place, axis.dim, axis.indices(numbers).to(place.tensor.device)))
        return found


def _line(mask: Tensor, dim: int) -> Tensor:
    """Return the elements along a dimension that lie in line with the first one that is kept."""
    first = int(mask.numpy().argmax() if mask.device.type == "cpu" else mask.flatten().byte().argmax())
    places: list[Any] = list(np.unravel_index(first, tuple(mask.shape)))
    places[dim] = slice(None)
    return mask[tuple(places)]


def _is_of(mask: Tensor, count: int, left: Slice) -> bool:
    """Return whether a mask with `count` kept weights keeps all that is left, and so nothing else."""
    part = mask
    for dim, indices in left.dims:
        part = part.index_select(dim, indices.to(mask.device))
    return part.numel() == count and bool(part.all())


def _places(model: nn.Module, groups: ChannelGroups) -> dict[str, Place]:
    shadows: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                shadows.setdefault(id(tensor), []).append((module.__dict__, attribute))
    places = {}
    for name in groups.tensors:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = attribute in module._parameters
        held: dict[str, Any] = module._parameters if is_parameter else module._buffers
        places[name] = Place(name, held, attribute, tuple(shadows[id(held[attribute])]), is_parameter)
    return places
