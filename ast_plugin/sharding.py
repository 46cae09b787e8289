"""Parameters of which every rank holds a part (DTensors, as FSDP2's ``fully_shard`` makes them).

What is done to every element by itself is done to the local parts, which share
memory with the parameter; the rest either gathers whole tensors or adds up over the ranks, and must be called on all
of them.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import WrapError


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor."""
    # Without this import nobody has made one; with it, it is there already.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharding_module(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on this module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Have FSDP modules free the whole parameters that they have gathered, and show their shards again.

    After a forward without backward the outermost one goes on showing whole parameters, which would not see what is
    done to the shards, and be used by the next forward.
    """
    for module in model.modules():
        if is_sharding_module(module):
            module.reshard()  # type: ignore[operator]  # FSDPModule's, which cannot be imported everywhere


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; a tensor that is not sharded is returned as it is."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part.detach() if part.requires_grad else part


def full(tensor: Any) -> Tensor:
    """Return the whole of a tensor: gathered from all ranks, a collective, where it is sharded."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    with torch.no_grad():
        gathered: Tensor = tensor.detach().full_tensor()
    return gathered


def gathered(value: Any) -> Any:
    """Return nested plain containers with every sharded tensor in them gathered; a collective for each."""
    if isinstance(value, Tensor):
        return full(value)
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [gathered(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter lies on the ranks.

    Attributes:
        shape: Shape of the whole.
        mesh: The device mesh.
        placements: One placement a dimension of the mesh.
    """

    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor that every rank holds whole: a copy, without communication."""
        part = whole.detach()
        device = torch.device(self.mesh.device_type)
        if part.device.type != device.type:
            part = part.to(device)
        for axis, placement in enumerate(self.placements):
            if placement.is_shard():
                chunks = part.chunk(self.mesh.size(axis), dim=placement.dim)
                rank = self.mesh.get_local_rank(axis)
                part = chunks[rank] if rank < len(chunks) else part.narrow(placement.dim, 0, 0)
        return part.clone(memory_format=torch.contiguous_format)

    def join(self, part: Tensor) -> Tensor:
        """Return the sharded tensor of which every rank gives its part."""
        from torch.distributed.tensor import DTensor

        strides = torch.empty(self.shape, device="meta").stride()
        joined: Tensor = DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )
        return joined

    @property
    def groups(self) -> tuple[Any, ...]:
        """The process groups over which elements are spread; replicas are not among them."""
        return tuple(self.mesh.get_group(i) for i, place in enumerate(self.placements) if place.is_shard())


def layout_of(name: str, parameter: Tensor) -> Layout | None:
    """Return how a parameter lies on the ranks, None where every rank has all of it.

    Raises:
        WrapError: If it lies in another way than FSDP2 makes: partial sums, tensor parallelism on top.
    """
    if not is_sharded(parameter):
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, tuple(parameter.placements)  # type: ignore[attr-defined]
    if any(type(placement) not in (Replicate, Shard) for placement in placements):
        raise WrapError(
            f"parameter {name!r} is placed as {placements}; only what fully_shard makes by itself (Shard and "
            "Replicate) is supported, so train without tensor parallelism"
        )
    return Layout(shape=tuple(parameter.shape), mesh=mesh, placements=placements)


def add_over_ranks(values: Tensor, layouts: Iterable[Layout | None]) -> Tensor:
    """Add up rows of numbers over the ranks, in place, one collective for all rows that lie alike.

    Args:
        values: Shape (rows, columns): what every rank has found on its own part. Any device.
        layouts: One a row; None for rows that every rank has found on the whole, which stay as they are.

    Returns:
        `values`.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, layout in enumerate(layouts):
        if layout is not None:
            rows.setdefault(layout.groups, []).append(row)
    for groups, chosen in rows.items():
        total = values[chosen].contiguous()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        values[chosen] = total
    return values


def any_on_a_rank(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout | None]) -> bool:
    """Return whether anything but zero is in one of the tensors, of sharded ones on any rank.

    Args:
        tensors: This rank's parts by name.
        layouts: How they lie on the ranks, by name; None where a rank has all of one.
    """
    if all(layout is None for layout in layouts.values()):
        return any(bool(tensor.any()) for tensor in tensors.values())
    found = torch.stack([tensor.any() for tensor in tensors.values()])[:, None].float()
    return bool(add_over_ranks(found, [layouts[name] for name in tensors]).any())


class LastSharded:
    """Sharded parameters, also while an FSDP module shows gathered ones in their place.

    Between forward and backward it does, and after a forward without backward; the sharded ones are still those that
    the optimizer trains, and nobody else may be told to show them then.
    """

    def __init__(self) -> None:
        self._seen: dict[str, weakref.ref[Tensor]] = {}

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """Return `parameter`, or the sharded one that was seen under its name before."""
        if is_sharded(parameter):
            self._seen[name] = weakref.ref(parameter)
            return parameter
        seen = self._seen.get(name)
        earlier = None if seen is None else seen()
        return parameter if earlier is None else earlier


class Gathered(Mapping[str, Tensor]):
    """Whole tensors by name, gathered when they are asked for, one at a time: a collective each.

    Args:
        tensors: The tensors, sharded or not.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return the whole tensor of that name."""
        return full(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)
