"""What several ranks must agree on: the first masks, averaged scores, the same masks after every update.

Ranks train one model together: those of the process group of `DistributedDataParallel`, or all there are. Without a
process group nothing here does anything. Everything that talks to other ranks must be called on all of them; that is
`wrap`, the first step and those that update masks, and `synchronize_normalization`. Sharded models talk more often:
see docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ast_plugin.errors import ActivationError, StateError

_T = TypeVar("_T")

BUCKET_BYTES = 32 * 2**20


def ranks(model: nn.Module | None = None) -> int:
    """Return the number of processes that train `model` together, 1 without a process group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return int(distributed.get_world_size(_group(model)))


def note_buffers(model: nn.Module) -> None:
    """Have data-parallel modules around a model note its buffers anew: those that are gone cannot be broadcast."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model._assign_modules_buffers()
            inner = model.module
        if not isinstance(inner, nn.Module):
            return
        model = inner


def average_over_ranks(tensors: dict[str, Tensor], like: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
    """Replace every tensor by its mean over all ranks, in place; does nothing in a single process.

    What a rank has no tensor of counts as zero there (a parameter that its data did not reach), so that all ranks
    make the same few collectives, over flat buckets of about `BUCKET_BYTES`.

    Args:
        tensors: By name, a part of `like`'s names, which may be another one on every rank. Completed by the rest.
        like: Names, shapes and dtypes, the same on every rank.
        model: The model that the ranks train.

    Raises:
        StateError: If `tensors` holds a name that `like` does not.
    """
    count = ranks(model)
    if count == 1:
        return
    unknown = [name for name in tensors if name not in like]
    if unknown:
        raise StateError(f"{unknown[0]!r} cannot be averaged over the ranks: the model has no such parameter")
    for names in _buckets(like):
        bucket = torch.cat([_flat(tensors.get(name), like[name]) for name in names])
        torch.distributed.all_reduce(bucket, group=_group(model))
        bucket.div_(count)
        for name, mean in zip(names, bucket.split([like[name].numel() for name in names]), strict=True):
            if name in tensors:
                tensors[name].copy_(mean.view(like[name].shape))
            else:
                tensors[name] = mean.view(like[name].shape).to(like[name].dtype)


def check_same_on_all_ranks(
    what: str, checksum: Callable[..., str], *arguments: Any, model: nn.Module | None = None
) -> None:
    """Compare a checksum over all ranks; it is computed only when there are several.

    Args:
        what: What is compared, for the message.
        checksum: Called with `arguments`; returns a hexadecimal string.
        *arguments: What to compute the checksum of.
        model: The model that the ranks train.

    Raises:
        StateError: If the ranks differ; the same error is raised on every rank.
    """
    count = ranks(model)
    if count == 1:
        return
    present = checksum(*arguments)
    everyone: list[str | None] = [None] * count
    torch.distributed.all_gather_object(everyone, present, group=_group(model))
    if any(other != present for other in everyone):
        raise StateError(
            f"{what} differ between ranks: {everyone}; every rank must be given the same weights, settings and seed, "
            "and the process group must exist before wrap() is called"
        )


def from_first_rank(value: Callable[[], _T], model: nn.Module | None = None) -> _T | None:
    """Return what the first rank computed, on every rank; None in a single process, where nothing is computed.

    Args:
        value: Called on the first rank; returns plain containers and tensors on the CPU.
        model: The model that the ranks train.
    """
    if ranks(model) == 1:
        return None
    group = _group(model)
    first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
    shared = [value() if torch.distributed.get_rank() == first else None]
    torch.distributed.broadcast_object_list(shared, src=first, group=group)
    return shared[0]


def is_first_rank(model: nn.Module | None = None) -> bool:
    """Return whether this is the first of the processes that train `model` together."""
    return ranks(model) == 1 or torch.distributed.get_rank(_group(model)) == 0


def check_every_rank_goes_on(model: nn.Module) -> None:
    """Refuse a training forward of `model` in which the ranks around it are not those that mask updates talk to.

    Inside ``DistributedDataParallel.join``, a rank that has run out of data answers DDP's own collectives, but takes
    no part in mask updates. And where `model` is inside a DDP module, the group of that module is not known from it.

    Raises:
        ActivationError: If such a forward is about to run; on every rank alike.
    """
    given = _data_parallel(model)
    around = given or getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if around is None:
        return
    if given is None and torch.distributed.get_world_size(around.process_group) != ranks():
        raise ActivationError(
            "the model is trained by a part of all ranks (DistributedDataParallel with a process_group of its own); "
            "give the DistributedDataParallel module to wrap(), so that masks are agreed on in that group"
        )
    joining = getattr(around, "_join_config", None)
    if joining is not None and joining.enable and not joining.throw_on_early_termination:
        raise ActivationError(
            "model.join() lets a rank that has no more data drop out, but every rank must take part in mask updates; "
            "use model.join(throw_on_early_termination=True), or give that rank batches of size 0"
        )


def _data_parallel(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """Return the DDP module that `model` is, inside ``torch.compile``'s wrapper; None if it is none."""
    while model is not None and not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    return model


def _group(model: nn.Module | None) -> Any:
    """Return the process group of the ranks that train `model`, None for the default one."""
    around = _data_parallel(model)
    return None if around is None else around.process_group


def _buckets(like: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of `like` in order, as many at a time as fill a bucket; one device and one dtype in each."""
    names: list[str] = []
    size, kind = 0, None
    for name, tensor in like.items():
        dtype = _reduced_dtype(tensor)
        if names and (size + tensor.numel() * dtype.itemsize > BUCKET_BYTES or kind != (tensor.device, dtype)):
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.numel() * dtype.itemsize
        kind = (tensor.device, dtype)
    if names:
        yield names


def _reduced_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)  # sums in bfloat16 would round at every rank


def _flat(tensor: Tensor | None, like: Tensor) -> Tensor:
    dtype = _reduced_dtype(like)
    if tensor is None:
        return torch.zeros(like.numel(), dtype=dtype, device=like.device)
    return tensor.detach().reshape(-1).to(dtype)
