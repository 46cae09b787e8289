"""Channel sub-nets of an elastic file: its groups, and the units that each sub-net keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ast_plugin.channels import ChannelGroup, ChannelGroups
from ast_plugin.elastic_contents import ElasticContents, StoredSubNet
from ast_plugin.errors import ConfigError, ElasticFileError, StateError

HEADER_KEY = "channel_groups"
CHANNEL = "channel"  # the pattern of sub-nets whose units can be cut out


def stored_groups(path: str, header: Mapping[str, Any]) -> ChannelGroups | None:
    """Return the groups that a file's header describes, None where it describes none.

    Args:
        path: The file, for messages.
        header: What the run that wrote it put in its header.

    Raises:
        ElasticFileError: If the description is damaged.
    """
    described = header.get(HEADER_KEY)
    if not described:
        return None
    try:
        groups = tuple(ChannelGroup.from_dict(group) for group in described)
        _check_apart(groups)
        return ChannelGroups(groups=groups)
    except (StateError, TypeError, AttributeError) as error:
        raise ElasticFileError(
            f"{path!r} does not follow the elastic format: {error}; save it again with save() of this package"
        ) from error


def _check_apart(groups: Sequence[ChannelGroup]) -> None:
    """Raise unless names are told apart and every dimension of a tensor belongs to one group."""
    names = Counter(repr(group.name) for group in groups)
    places = Counter(f"dimension {axis.dim} of {axis.tensor!r}" for group in groups for axis in group.axes)
    twice = [f"channel group {name}" for name, count in names.items() if count > 1]
    twice += [place for place, count in places.items() if count > 1]
    if twice:
        raise StateError(f"its channel groups have {twice[0]} twice")


def stored_units(contents: ElasticContents) -> dict[str, dict[str, Tensor]]:
    """Return the units that each channel sub-net of a file keeps.

    Args:
        contents: The file.

    Returns:
        By sub-net, those of another pattern left out, and group name: bool (units,), True = kept.

    Raises:
        ElasticFileError: If the groups are damaged, or do not fit the file's tensors.
    """
    groups = stored_groups(contents.path, contents.header)
    if groups is None:
        return {}
    try:
        for group in groups.groups:
            for axis in group.axes:
                axis.check(group.units, contents.entries[axis.tensor].shape)
        readers = {axis.tensor for group in groups.groups for axis in group.axes_of("in")}
        return {
            name: groups.kept({tensor: contents.mask(name, tensor) for tensor in readers})
            for name, record in contents.records.items()
            if record.pattern == CHANNEL
        }
    except (StateError, KeyError) as error:
        raise ElasticFileError(
            f"the channel groups of {contents.path!r} do not fit its tensors: {error}; save it again with save() of "
            "this package"
        ) from error


def check_channel(path: str, record: StoredSubNet, groups: ChannelGroups | None) -> None:
    """Raise unless a sub-net can be sliced.

    Args:
        path: The file, for the message.
        record: What it says about the sub-net.
        groups: Its groups.

    Raises:
        ConfigError: If the sub-net is of another pattern, or the file has no groups.
    """
    if record.pattern == CHANNEL and groups is not None:
        return
    reason = (
        f"{path!r} describes no channel groups" if record.pattern == CHANNEL else f"its pattern is {record.pattern!r}"
    )
    raise ConfigError(
        f"sub-net {record.name!r} cannot be sliced: {reason}; sub-nets that are trained with pattern='channel' can"
    )
