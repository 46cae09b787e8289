"""A channel sub-net without its dropped units, as something that needs this package no more.

Its state dict is smaller than that of the architecture, so a description goes with it: which tensors are smaller, and
which numbers modules keep beside them. `shrink` makes a freshly built model fit; it is plain torch and may be copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroups, slices
from ast_plugin.elastic_channels import check_channel, stored_groups, stored_units
from ast_plugin.elastic_contents import ElasticContents
from ast_plugin.errors import ConfigError, ElasticFileError, near_names
from ast_plugin.files import atomic_write_text
from ast_plugin.sliced_model import check_dropped, check_multiple, rounded_up, slice_model, sliced_sizes
from ast_plugin.slots import plain_name

FORMS = ("dense", "sliced")
FORMAT = "ast_plugin.sliced"
VERSION = 1


@runtime_checkable
class ChannelSource(Protocol):
    """What is asked of a source whose sub-nets can be sliced."""

    @property
    def groups(self) -> ChannelGroups | None:
        """The channel groups; None where there are none."""

    def kept_channels(self, name: str) -> Mapping[str, Tensor]:
        """Return by group which units a channel sub-net keeps."""


def shrink(model: nn.Module, sizes: dict[str, Any]) -> nn.Module:
    """Make a model as small as a sliced sub-net, in place, for ``model.load_state_dict`` of the sub-net.

    Args:
        model: A freshly built model of the architecture that was trained.
        sizes: What the JSON file beside the state dict holds.

    Returns:
        The model.
    """
    for path, smaller in sizes["modules"].items():
        module = model.get_submodule(path)
        for name, shape in smaller["tensors"].items():
            whole = getattr(module, name)
            part = whole.detach().new_zeros(shape)
            setattr(module, name, nn.Parameter(part) if isinstance(whole, nn.Parameter) else part)
        for name, number in smaller["numbers"].items():
            if hasattr(module, name):  # of the names that modules give a size, each has its own
                setattr(module, name, number)
    return model


def check_form(form: str, multiple: int = 1) -> None:
    """Make sure that a form is one of `FORMS`, and that a multiple goes with it.

    Args:
        form: How a sub-net is to be written.
        multiple: As in `ast_plugin.sliced_model.rounded_up`.

    Raises:
        ConfigError: If the form is another one, or has no use for the multiple; the message has the near names.
    """
    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}: {near_names(str(form), FORMS)}")
    check_multiple(multiple, form)


def channels_of(source: Any, name: str, multiple: int = 1) -> tuple[ChannelGroups, Mapping[str, Tensor]]:
    """Return the groups of a source and the units to leave of a sub-net, bool by group.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        multiple: As in `ast_plugin.sliced_model.rounded_up`.

    Raises:
        ConfigError: If there is no such sub-net, or it has no channels that could be cut out.
        ElasticFileError: If the file's groups are damaged.
    """
    if isinstance(source, ElasticContents):
        source.check_sub_net(name)
        groups = stored_groups(source.path, source.header)
        check_channel(source.path, source.records[name], groups)
        kept: Mapping[str, Tensor] = stored_units(source)[name]
    elif isinstance(source, ChannelSource):
        kept, groups = source.kept_channels(name), source.groups
    else:
        groups, kept = None, {}
    if groups is None:
        raise ConfigError(
            f"sub-net {name!r} cannot be sliced: a {type(source).__name__} knows no channel groups; give a training, "
            "what load() returned, or what read_elastic() returned"
        )
    return groups, rounded_up(groups, kept, multiple)


def sliced_copy(source: Any, name: str, plain: nn.Module, multiple: int) -> nn.Module:
    """Cut the dropped units of a sub-net out of a plain model that holds it, in place, and return the model.

    Raises:
        ConfigError: If it is no channel sub-net.
        ElasticFileError: If its groups do not fit the model.
        ActivationError: If its weights were changed since it was loaded, and read dropped units.
    """
    groups, kept = channels_of(source, name, multiple)
    check_dropped(name, groups, kept, {plain_name(key): part for key, part in plain.state_dict().items()})
    slice_model(plain, groups, kept)
    return plain


def sliced_state(
    source: Any, name: str, state: Mapping[str, Tensor], multiple: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict of a sub-net without its dropped units, and the description for `shrink`.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net, of the pattern ``channel``.
        state: Its whole state dict with the names of a model without compiled parts; it is not changed.
        multiple: As in `ast_plugin.sliced_model.rounded_up`.

    Returns:
        Tensors, those that stay whole as they are, and plain containers.

    Raises:
        ConfigError: If it is no channel sub-net.
        ElasticFileError: If its groups do not fit the state dict.
        ActivationError: If its weights were changed since it was loaded, and read dropped units.
    """
    groups, kept = channels_of(source, name, multiple)
    cuts = {plain_name(key): cut for key, cut in slices(groups.groups, kept).items()}
    lacking = [key for key in cuts if key not in state]
    if lacking:
        raise ElasticFileError(
            f"sub-net {name!r} has no tensor {lacking[0]!r}, which its channel groups concern; save it again with the "
            "model that its groups were found in"
        )
    cut = {state[key].data_ptr() for key in cuts}
    tied = [key for key, tensor in state.items() if key not in cuts and tensor.numel() and tensor.data_ptr() in cut]
    if tied:
        raise ElasticFileError(
            f"{tied[0]!r} is tied to a tensor of a channel group, and tied weights cannot be sliced; untie them in the "
            "model before it is trained"
        )
    check_dropped(name, groups, kept, state)
    with torch.no_grad():
        smaller = {key: cuts[key].take(tensor.cpu()) if key in cuts else tensor for key, tensor in state.items()}
    sizes = sliced_sizes(groups, kept, {key: tuple(tensor.shape) for key, tensor in state.items()})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "sub_net": name,
        "modules": {path: own.to_dict() for path, own in sizes.items()},
        "units": {group: flags.nonzero().reshape(-1).tolist() for group, flags in kept.items()},
    }
    return smaller, description


def sizes_path(path: str | os.PathLike[str]) -> Path:
    """Return where the description of a sliced state dict at `path` is: beside it, with the suffix ``.json``."""
    return Path(path).with_suffix(".json")


def write_sizes(path: Path, description: Mapping[str, Any]) -> None:
    """Write a description beside its state dict.

    Raises:
        ConfigError: If another kind of file has that name.
        SaveError: If it cannot be written.
    """
    if path.exists():
        try:
            ours = json.loads(path.read_bytes()).get("format") == FORMAT
        except (ValueError, AttributeError, OSError):
            ours = False
        if not ours:
            raise ConfigError(
                f"{os.fspath(path)!r}, where the sizes of a sliced sub-net would go, is a file of another kind; give "
                "the state dict another name"
            )
    atomic_write_text(path, json.dumps(description, indent=1) + "\n")


def check_trained(source: Any, name: str, allowed: bool) -> None:
    """Refuse a sub-net of which the source says that no step has trained it.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        allowed: Whether that is all right.

    Raises:
        ConfigError: If it was never trained, or the source is none.
    """
    if not callable(getattr(source, "materialize", None)):
        raise ConfigError(
            "source must be a training, what load() returned, or what read_elastic() returned, got "
            f"{type(source).__name__}"
        )
    if allowed:
        return
    header = getattr(source, "header", None)
    found = header.get("statistics") if isinstance(header, Mapping) else None
    if found is None and callable(getattr(source, "statistics", None)):
        found = source.statistics()
    counts = ((found or {}).get("sub_nets") or {}).get(name) or {}
    if counts.get("steps") == 0:
        raise ConfigError(
            f"sub-net {name!r} was never trained: its run made no step of it; train it first, or say that this is what "
            "you want: allow_untrained=True, on the command line --untrained"
        )
