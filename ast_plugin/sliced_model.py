"""A network made physically smaller: what remains of it when the dropped units of a channel sub-net are cut out.

Parameters and buffers are replaced by smaller ones, and the numbers that modules keep beside them (channels, features,
heads) follow, so that the network runs, prints and exports as one that was built with these widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis, Slice, attribute_values, slices
from ast_plugin.errors import ActivationError, ConfigError, ElasticFileError
from ast_plugin.slots import plain_name

# What modules call the sizes of a weight, by the role of its dimension: torch's layers, and Hugging Face's Conv1D.
_NUMBERS = {"out": ("out_features", "out_channels", "nf"), "in": ("in_features", "in_channels", "nx")}
_NUMBERS_OF_VECTORS = ("num_features", "num_channels", "num_parameters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleSizes:
    """What is smaller in one module.

    Attributes:
        tensors: Name of a parameter or buffer of the module -> its shape.
        numbers: Attribute -> its value. Those that the module does not have are not its own: which of two names it
            uses for a size cannot be told without it.
    """

    tensors: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain containers, for files."""
        return {
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "numbers": dict(self.numbers),
        }


def rounded_up(groups: ChannelGroups, kept: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Return which units to leave in a network so that their numbers suit kernels that compute 8 or 16 at a time.

    What is added are dropped units. Their weights are zero, so the outputs stay as they are.

    Args:
        groups: The groups. Attention heads are wide enough, and not added to.
        kept: By group name, bool (units,), True = kept.
        multiple: What the numbers shall be multiples of, where a group has as many units; 1 adds none.

    Raises:
        ConfigError: If `multiple` is no whole number of at least 1.
    """
    check_multiple(multiple)
    found = {}
    for group in groups.groups:
        flags = kept[group.name].clone()
        lacking = -int(flags.sum()) % multiple
        if group.kind != "heads":
            flags[flags.logical_not().nonzero().reshape(-1)[:lacking]] = True
        found[group.name] = flags
    return found


def check_multiple(multiple: int, form: str = "sliced") -> None:
    """Make sure that a multiple is one, and that the form has a use for it.

    Args:
        multiple: What numbers of channels and hidden units are to be multiples of.
        form: How the sub-net is computed or written.

    Raises:
        ConfigError: If it is no whole number of at least 1, or more than 1 in a form that cuts nothing out.
    """
    if type(multiple) is not int or multiple < 1:
        raise ConfigError(f"multiple must be a whole number of at least 1, such as 8 or 16, got {multiple!r}")
    if multiple > 1 and form not in ("sliced", "auto"):
        raise ConfigError(
            f"multiple={multiple} says how many channels are left where dropped ones are cut out, and form {form!r} "
            "cuts out none; give form='sliced', or leave multiple out"
        )


def check_dropped(name: str, groups: ChannelGroups, kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Make sure that nothing reads the dropped units of a sub-net, so that cutting them out changes no output.

    Args:
        name: The sub-net, for the message.
        groups: The groups.
        kept: By group name, bool (units,), True = kept.
        state: Its tensors by name; those that are missing are not looked at.

    Raises:
        ActivationError: If a weight that reads a dropped unit is not zero.
    """
    for group in groups.groups:
        dropped = (~kept[group.name]).nonzero().reshape(-1)
        for axis in group.axes_of("in") if len(dropped) else ():
            weight = state.get(axis.tensor)
            if weight is None:
                continue
            axis.check(group.units, weight.shape)
            if weight.detach().index_select(axis.dim, axis.indices(dropped).to(weight.device)).any():
                raise ActivationError(
                    f"sub-net {name!r} cannot be sliced: {axis.tensor!r} reads dropped units of channel group "
                    f"{group.name!r}, so it was changed since it was loaded, and cutting them out would change the "
                    "outputs; use form='dense', or load the elastic file again"
                )


def sliced_sizes(
    groups: ChannelGroups, kept: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, ModuleSizes]:
    """Return what is smaller in each module of a network of which only some units are left.

    Args:
        groups: The groups.
        kept: By group name, bool (units,), True = kept.
        shapes: The shapes of all tensors of the groups in the whole network, by name.

    Returns:
        By path of the module, empty for the model itself. Modules that stay whole are left out.

    Raises:
        KeyError: If a shape is missing.
    """
    cuts = slices(groups.groups, kept)
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, cut in cuts.items():
        path, _, attribute = name.rpartition(".")
        tensors.setdefault(path, {})[attribute] = cut.shape(shapes[name])
    numbers: dict[str, dict[str, int]] = {path: {} for path in tensors}
    thinned = [group for group in groups.groups if not bool(kept[group.name].all())]
    for (path, number), value in attribute_values(thinned, kept).items():
        numbers.setdefault(path, {})[number] = value
    for group in thinned:
        for axis in group.axes:
            path, _, attribute = axis.tensor.rpartition(".")
            if attribute == "weight":
                found = _numbers(axis, tensors[path][attribute], numbers[path].get("groups", 1))
                numbers[path] = {**found, **numbers[path]}
    return {path: ModuleSizes(tensors=tensors.get(path, {}), numbers=own) for path, own in numbers.items()}


def slice_model(model: nn.Module, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> dict[str, ModuleSizes]:
    """Cut the dropped units out of a model, in place.

    The remaining network computes what the whole one computes with zeros in the rows and columns of the dropped units,
    to float tolerance.

    Args:
        model: The bare network with the sub-net's values. New parameters take the place of those that are cut.
        groups: The groups, as they were found in a network of the same architecture.
        kept: By group name, bool (units,), True = kept.

    Returns:
        What became smaller, by path of the module.

    Raises:
        ElasticFileError: If the model has no such tensors or numbers, or ties them, or the units do not fill a tensor;
            it is unchanged then.
    """
    modules = {plain_name(path): module for path, module in model.named_modules()}  # of compiled parts the inner one
    cuts = slices(groups.groups, kept)
    places = _places(modules)
    _check(groups.groups, cuts, modules, places)
    shapes = {name: tuple(places[name][0][places[name][1]].shape) for name in cuts}
    sizes = sliced_sizes(groups, kept, shapes)
    with torch.inference_mode(False), torch.no_grad():
        for name, cut in cuts.items():
            slot, attribute = places[name]
            slot[attribute] = _smaller(slot[attribute], cut)
    for path, own in sizes.items():
        for number, value in own.numbers.items():
            if hasattr(modules[path], number):
                setattr(modules[path], number, value)
    return sizes


def _places(modules: Mapping[str, nn.Module]) -> dict[str, tuple[dict[str, Any], str]]:
    return {
        f"{path}.{attribute}" if path else attribute: (slots, attribute)
        for path, module in modules.items()
        for slots in (module._parameters, module._buffers)
        for attribute, tensor in slots.items()
        if tensor is not None
    }


def _check(
    groups: Sequence[ChannelGroup],
    cuts: Mapping[str, Slice],
    modules: Mapping[str, nn.Module],
    places: Mapping[str, tuple[dict[str, Any], str]],
) -> None:
    remedy = "build the model as it was when its channel groups were found"
    names: dict[int, list[str]] = {}
    for name, (slots, attribute) in places.items():
        names.setdefault(id(slots[attribute]), []).append(name)
    shapes = {name: slots[attribute].shape for name, (slots, attribute) in places.items()}
    for group in groups:
        wrong = group.misfit(shapes, modules)
        if wrong is not None:
            raise ElasticFileError(f"channel group {group.name!r} {wrong}; {remedy}")
        for axis in group.axes:
            slots, attribute = places[axis.tensor]
            others = [name for name in names[id(slots[attribute])] if name != axis.tensor]
            if axis.tensor in cuts and others:
                raise ElasticFileError(
                    f"channel group {group.name!r} concerns {axis.tensor!r}, which is {others[0]!r} at the same time: "
                    f"tied weights cannot be sliced; {remedy}"
                )


def _numbers(axis: GroupAxis, shape: Sequence[int], convolution_groups: int) -> dict[str, int]:
    """Return what a module may call the size of a weight along a dimension."""
    size = shape[axis.dim]
    if axis.role == "state":
        if len(shape) == 1:
            return dict.fromkeys(_NUMBERS_OF_VECTORS, size)
        return {"out_channels": size, "in_channels": convolution_groups}  # depthwise
    found = dict.fromkeys(_NUMBERS[axis.role], size)
    if axis.role == "in":
        found["in_channels"] *= convolution_groups
    return found


def _smaller(whole: Tensor, cut: Slice) -> Tensor:
    places = [(dim, indices.to(whole.device)) for dim, indices in cut.dims]
    part = Slice(cut.tensor, tuple(places)).take(whole.detach())
    if whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous():
        part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else part
