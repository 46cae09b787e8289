"""What several ranks must agree on: averaged scores, identical masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ast_plugin.errors import StateError


def ranks() -> int:
    """Return the number of processes that train together, 1 without a process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def average_over_ranks(tensors: Mapping[str, Tensor]) -> None:
    """Replace every tensor by its mean over all ranks, in place; does nothing in a single process.

    Args:
        tensors: The same names and shapes on every rank.
    """
    count = ranks()
    if count == 1:
        return
    for name in sorted(tensors):
        torch.distributed.all_reduce(tensors[name])
        tensors[name].div_(count)


def check_same_on_all_ranks(what: str, checksum: Callable[[str], str], argument: str) -> None:
    """Compare a checksum over all ranks; it is computed only when there are several.

    Args:
        what: What is compared, for the message.
        checksum: Called with `argument`; returns a hexadecimal string.
        argument: What to compute the checksum of.

    Raises:
        StateError: If the ranks differ; the same error is raised on every rank.
    """
    count = ranks()
    if count == 1:
        return
    present = checksum(argument)
    everyone: list[str | None] = [None] * count
    torch.distributed.all_gather_object(everyone, present)
    if any(other != present for other in everyone):
        raise StateError(
            f"{what} differ between ranks: {everyone}; every rank must be given the same weights, settings and seed"
        )
