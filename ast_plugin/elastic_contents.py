"""What an elastic file holds, read and checked, and ordinary state dicts made from it without a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.mask_forms import unpack_bits
from ast_plugin.masks import MaskStore
from ast_plugin.sub_nets import check_sub_net

_KINDS = ("masked", "private", "whole", "alias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSubNet:
    """What the file says about one sub-net.

    Attributes:
        name: How it is addressed, for example ``s90``.
        target_sparsity: Fraction of zeros that was asked for, in [0, 1); None if the file does not say.
        sparsity: Fraction of zeros that its masks have, in [0, 1].
        kept: Number of prunable weights that it keeps.
        total: Number of prunable weights.
        pattern: Name of the pattern of its masks; None if the file does not say.
        metrics: Metric name -> value.
    """

    name: str
    target_sparsity: float | None
    sparsity: float
    kept: int
    total: int
    pattern: str | None
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One entry of the model's state dict and how the file stores it.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape.
        dtype: Its type, for example ``float32``.
        kind: ``masked`` (shared values and masks), ``private`` (one a sub-net), ``whole`` (once, as it is) or
            ``alias`` (the same tensor as another entry).
        same_as: The other entry, of an alias.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    same_as: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as the header holds it."""
        entry = {"name": self.name, "kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        return {**entry, "same_as": self.same_as} if self.same_as is not None else entry

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.name} has the unknown dtype {self.dtype!r}")
        return dtype


def tensor_key(part: str, name: str, sub_net: str | None = None) -> str:
    """Return the name under which the file stores a tensor, such as ``mask::s90::fc.weight``.

    Args:
        part: ``values``, ``mask``, ``private`` or ``whole``.
        name: The entry of the state dict.
        sub_net: The sub-net, whose name has no ``::``, for masks and private tensors.
    """
    return f"{part}::{name}" if sub_net is None else f"{part}::{sub_net}::{name}"


class ElasticContents:
    """The sub-nets of an elastic file; needs no model.

    Args:
        path: Where it was read from, for messages.
        header: The file's own header.
        tensors: The file's tensors by key.

    Raises:
        KeyError: If something is missing.
        ValueError: If header and tensors contradict each other.

    Attributes:
        path: Where it was read from.
        sub_nets: Names of the sub-nets.
        records: What the file says about each of them, by name.
        default_sub_net: The one to use when none is chosen.
        entries: The entries of the state dict, in its order, by name.
        header: What the writer was given as header: ``config``, ``metrics``, ``statistics``, ``history`` and so on.
    """

    def __init__(self, *, path: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        records = [StoredSubNet(**record) for record in header["sub_nets"]]
        self.sub_nets: tuple[str, ...] = tuple(record.name for record in records)
        self.records: dict[str, StoredSubNet] = {record.name: record for record in records}
        self.default_sub_net: str = header["default_sub_net"]
        entries = [StoredTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in header["tensors"]]
        self.entries: dict[str, StoredTensor] = {entry.name: entry for entry in entries}
        self.header: dict[str, Any] = dict(header["run"])
        self._tensors = tensors
        self._check()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the prunable parameters, in the order of the model."""
        return tuple(name for name, entry in self.entries.items() if entry.kind == "masked")

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings as `ASTConfig.to_dict` gave them; empty if the file does not say."""
        return dict(self.header.get("config") or {})

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Sub-net name -> metric name -> value."""
        return {name: dict(record.metrics) for name, record in self.records.items()}

    @property
    def statistics(self) -> dict[str, Any]:
        """The run's statistics; empty if the file does not say."""
        return dict(self.header.get("statistics") or {})

    @property
    def history(self) -> dict[str, Any]:
        """The run's history; empty if the file does not say."""
        return dict(self.header.get("history") or {})

    @functools.cached_property
    def masks(self) -> MaskStore:
        """The masks of all sub-nets."""
        store = MaskStore(self.sub_nets, {name: self.entries[name].shape for name in self.parameters})
        for sub_net in self.sub_nets:
            store.unpack(sub_net, {name: self._tensors[tensor_key("mask", name, sub_net)] for name in self.parameters})
        return store

    def mask(self, sub_net: str, parameter: str) -> Tensor:
        """Return the mask of one parameter, bool, of its shape, True = kept."""
        self.check_sub_net(sub_net)
        return unpack_bits(self._tensors[tensor_key("mask", parameter, sub_net)], self.entries[parameter].shape)

    def is_shared(self, name: str) -> bool:
        """Return whether an entry of the state dict is the same in all sub-nets.

        Private tensors count as different also while their values agree: using one sub-net may change its own.
        """
        entry = self.entries[name]
        if entry.kind == "alias" and entry.same_as is not None:
            return self.is_shared(entry.same_as)
        if entry.kind == "masked":
            first, *others = (self._tensors[tensor_key("mask", name, sub_net)] for sub_net in self.sub_nets)
            return all(torch.equal(first, other) for other in others)
        return entry.kind == "whole" or len(self.sub_nets) == 1

    def tensor(self, sub_net: str, name: str) -> Tensor:
        """Return one entry of a sub-net's state dict as a new CPU tensor.

        Raises:
            ConfigError: If there is no such sub-net or entry.
        """
        self.check_sub_net(sub_net)
        if name not in self.entries:
            raise ConfigError(f"{self.path!r} holds no tensor {name!r}; {near_names(name, self.entries)}")
        entry = self.entries[name]
        if entry.same_as is not None:
            return self.tensor(sub_net, entry.same_as)
        if entry.kind == "whole":
            return self._tensors[tensor_key("whole", name)].clone()
        if entry.kind == "private":
            return self._tensors[tensor_key("private", name, sub_net)].clone()
        mask = self.mask(sub_net, name).reshape(-1)
        values = self._tensors[tensor_key("values", name)]
        full = torch.zeros(mask.numel(), dtype=values.dtype).masked_scatter_(self._union(name), values)
        # Filled, never multiplied: a dropped infinity times zero would be NaN.
        return full.masked_fill_(mask.logical_not_(), 0).reshape(entry.shape)

    def dense_values(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return what the file knows of an entry as the dense model had it, with the default's normalization state.

        Args:
            name: The entry.

        Returns:
            The values, one-dimensional, and a bool tensor over all places in row-major order, True where they stand:
            where some sub-net keeps the weight. None instead of it if there is a value everywhere.

        Raises:
            ConfigError: If there is no such entry.
        """
        entry = self.entries.get(name)
        if entry is not None and entry.same_as is not None:
            return self.dense_values(entry.same_as)
        if entry is not None and entry.kind == "masked":
            return self._tensors[tensor_key("values", name)], self._union(name)
        return self.tensor(self.default_sub_net, name).reshape(-1), None

    def materialize(self, name: str) -> dict[str, Tensor]:
        """Return a sub-net as an ordinary state dict.

        Args:
            name: The sub-net.

        Returns:
            New CPU tensors in the order and with the names of the model's state dict: zeros at dropped weights, the
            sub-net's private normalisation state. Tied entries are one tensor.

        Raises:
            ConfigError: If there is no such sub-net; the message offers the near names.
        """
        self.check_sub_net(name)
        state = {key: self.tensor(name, key) for key, entry in self.entries.items() if entry.same_as is None}
        return {key: state[entry.same_as or key] for key, entry in self.entries.items()}

    def check_sub_net(self, name: str) -> None:
        """Raise a `ConfigError` that offers the near names unless the file holds a sub-net `name`."""
        check_sub_net(name, self.sub_nets, where=repr(self.path))

    def _union(self, name: str) -> Tensor:
        masks = [self._tensors[tensor_key("mask", name, sub_net)] for sub_net in self.sub_nets]
        union = functools.reduce(torch.bitwise_or, masks)
        return unpack_bits(union, self.entries[name].shape).reshape(-1)

    def _check(self) -> None:
        """Raise unless header and tensors agree, so that nothing can fail later, half-way through a load."""
        if not self.sub_nets or len(self.records) != len(self.sub_nets) or self.default_sub_net not in self.records:
            raise ValueError("the sub-nets are not told apart, or the default is none of them")
        used = 0
        for name, entry in self.entries.items():
            if entry.kind not in _KINDS or (entry.kind == "alias") != (entry.same_as is not None):
                raise ValueError(f"{name} has the unknown kind {entry.kind!r}")
            if entry.same_as is not None:
                if self.entries[entry.same_as].same_as is not None:
                    raise ValueError(f"{name} is the alias of an alias")
                continue
            if entry.kind == "masked":
                for sub_net in self.sub_nets:
                    self._check_tensor(tensor_key("mask", name, sub_net), (-(-_numel(entry) // 8),), torch.uint8)
                kept = int(self._union(name).sum())
                self._check_tensor(tensor_key("values", name), (kept,), entry.torch_dtype)
                used += 1 + len(self.sub_nets)
            elif entry.kind == "private":
                for sub_net in self.sub_nets:
                    self._check_tensor(tensor_key("private", name, sub_net), entry.shape, entry.torch_dtype)
                used += len(self.sub_nets)
            else:
                self._check_tensor(tensor_key("whole", name), entry.shape, entry.torch_dtype)
                used += 1
        if used != len(self._tensors):
            raise ValueError(f"{len(self._tensors)} tensors are stored, and {used} are listed")

    def _check_tensor(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = self._tensors[key]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{key} is {tuple(tensor.shape)} of {tensor.dtype}, listed as {shape} of {dtype}")


def _numel(entry: StoredTensor) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count
