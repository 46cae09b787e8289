"""The elastic file: all sub-nets of a run in one safetensors file (docs/elastic-file.md describes it byte by byte).

A prunable weight is stored once, and only if some sub-net keeps it; what tells the sub-nets apart is one bit a weight.
Private normalisation state is stored per sub-net, everything else of the state dict once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ast_plugin.config import ASTConfig
from ast_plugin.elastic_contents import ElasticContents, StoredSubNet, StoredTensor, tensor_key
from ast_plugin.errors import ASTError, ConfigError, ElasticFileError, near_names
from ast_plugin.files import file_path
from ast_plugin.mask_forms import pack_bits
from ast_plugin.masks import MaskStore
from ast_plugin.sealed_file import read_sealed, write_sealed

ELASTIC = "elastic.safetensors"  # its name in a folder that holds other files of the model too

_SHOWN = 5  # names of a folder's contents that a message lists


def write_elastic(
    path: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor],
    masks: MaskStore,
    private: Mapping[str, Mapping[str, Tensor]],
    header: Mapping[str, Any],
) -> None:
    """Write all sub-nets of a model into one file, completely or not at all.

    Args:
        path: Where the file shall be; ``.safetensors`` is the customary suffix.
        state: The model's state dict at rest, with the dense weights. Nothing is changed in it. Entries that are the
            same tensor (tied parameters) are stored once.
        masks: The masks of all sub-nets; their parameters are entries of `state`.
        private: Sub-net name -> name in `state` -> that sub-net's own tensor, of the same shape and dtype.
        header: What else the file shall tell, in plain containers; readers get it back as it is. Used here:
            ``default_sub_net`` (None or absent: the densest), ``metrics`` (sub-net name -> metric -> value), and for
            targets and patterns ``sub_nets`` (a list of mappings with ``name``, ``target_sparsity`` and ``pattern``) or
            else ``config`` (what `ASTConfig.to_dict` returned).

    Raises:
        ConfigError: If the arguments contradict each other, or hold something that the file cannot.
        SaveError: If the file cannot be written; what stood at `path` is untouched.
    """
    same_as = _aliases(state, prefer={*masks.parameters, *(name for own in private.values() for name in own)})
    plain = {name: plain_tensor(name, value) for name, value in state.items() if name not in same_as}
    _check_private(private, masks, state)
    private = {
        sub_net: {
            name: plain_tensor(name, private[sub_net][name]) for name in private.get(sub_net, {}) if name not in same_as
        }
        for sub_net in masks.sub_nets
    }
    tensors: dict[str, Tensor] = {}
    table = []
    for name, value in state.items():
        entry = StoredTensor(name=name, shape=tuple(value.shape), dtype=_dtype_name(value.dtype), kind="whole")
        if name in same_as:
            entry = dataclasses.replace(entry, kind="alias", same_as=same_as[name])
        elif name in masks.parameters:
            entry = dataclasses.replace(entry, kind="masked")
            union = masks.union(name).cpu().reshape(-1)
            tensors[tensor_key("values", name)] = plain[name].reshape(-1)[union]
            for sub_net in masks.sub_nets:
                tensors[tensor_key("mask", name, sub_net)] = pack_bits(masks.get(sub_net, name)).cpu()
        else:
            owners = [sub_net for sub_net in masks.sub_nets if name in private[sub_net]]
            for sub_net in owners:
                tensors[tensor_key("private", name, sub_net)] = private[sub_net][name]
            if len(owners) == len(masks.sub_nets):
                entry = dataclasses.replace(entry, kind="private")
            elif owners:
                raise ConfigError(
                    f"private holds {name!r} for {', '.join(owners)} only; give it for every sub-net or for none"
                )
            else:
                tensors[tensor_key("whole", name)] = plain[name]
        table.append(entry.to_dict())
    sub_nets = _sub_net_records(masks, header)
    write_sealed(
        path,
        _unshared(tensors),
        {
            "default_sub_net": _default_sub_net(sub_nets, header),
            "sub_nets": [dataclasses.asdict(record) for record in sub_nets],
            "tensors": table,
            "run": header,
        },
    )


def elastic_path(path: str | os.PathLike[str]) -> Path:
    """Return where the elastic file is: `path` itself, or in the folder `path` the file ``elastic.safetensors``.

    Args:
        path: A file, which is not looked for, or a folder.

    Raises:
        ConfigError: If `path` is no path.
        ElasticFileError: If a folder has no such file; the message lists what it has.
    """
    found = file_path(path)
    if not found.is_dir():
        return found
    inside = found / ELASTIC
    if inside.exists():
        return inside
    try:
        there = sorted(found.iterdir())
    except OSError as error:
        raise ElasticFileError(f"cannot look into the folder {os.fspath(path)!r}: {error.strerror or error}") from error
    below = [entry.name for entry in there if (entry / ELASTIC).is_file()]
    names = [entry.name for entry in there]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    remedy = (
        f"give one of the folders in it that have one: {', '.join(below)}"
        if below
        else f"give the elastic file itself, or write one there with save({os.fspath(inside)!r})"
    )
    raise ElasticFileError(
        f"the folder {os.fspath(path)!r} holds no {ELASTIC}; it holds {shown or 'nothing'}; {remedy}"
    )


def read_elastic(path: str | os.PathLike[str]) -> ElasticContents:
    """Read an elastic file, without a model.

    Args:
        path: A file that `write_elastic` wrote, or a folder with one named ``elastic.safetensors``.

    Raises:
        ConfigError: If `path` is no path.
        ElasticFileError: If the file is missing, foreign, truncated, damaged, or of a newer format version; the message
            says which, and what to do.
    """
    path = elastic_path(path)
    header, tensors = read_sealed(path)
    try:
        return ElasticContents(path=os.fspath(path), header=header, tensors=tensors)
    except (ASTError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # Every byte is as it was written, so the writer did not follow the format.
        raise ElasticFileError(
            f"{os.fspath(path)!r} does not follow the elastic format: {type(error).__name__}: {error}; "
            "save it again with save() of this package"
        ) from error


def plain_tensor(name: str, value: Any) -> Tensor:
    """Return `value` as a contiguous CPU tensor in the layout that a file can hold, sharing memory where it can.

    Args:
        name: The entry of the state dict, for the error.
        value: What the state dict holds there.

    Raises:
        ConfigError: If it is no tensor, or a sparse, quantized or meta tensor, or one of double complex numbers.
    """
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"the state dict's entry {name!r} is a {type(value).__name__}, and an elastic file holds tensors only; "
            "remove the get_extra_state method that makes it, or let it return a tensor"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.dtype == torch.complex128:
        raise ConfigError(
            f"the state dict's entry {name!r} is a {value.layout} tensor of {value.dtype} on {value.device}, which an "
            "elastic file cannot hold; convert the model before saving"
        )
    return value.detach().cpu().contiguous()


def _aliases(state: Mapping[str, Any], prefer: set[str]) -> dict[str, str]:
    """Return the entries that are another entry's very tensor, each with the entry that stands for both.

    Args:
        state: A state dict.
        prefer: Names that shall stand for their group; otherwise the first one does.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel() and not value.is_meta:
            # Views of one memory that differ in place, shape or order are different tensors and are stored apart.
            identity = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            groups.setdefault(identity, []).append(name)
    same_as = {}
    for names in groups.values():
        first = next((name for name in names if name in prefer), names[0])
        same_as.update({name: first for name in names if name != first})
    return same_as


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those copied that overlap in memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _check_private(private: Mapping[str, Mapping[str, Tensor]], masks: MaskStore, state: Mapping[str, Tensor]) -> None:
    for name in masks.parameters:
        if name not in state:
            raise ConfigError(f"masks name {name!r}, which the state dict lacks; {near_names(name, state)}")
        if tuple(state[name].shape) != tuple(masks.shapes[name]):
            raise ConfigError(
                f"masks of {name!r} have shape {tuple(masks.shapes[name])}, and the state dict's tensor has "
                f"{tuple(state[name].shape)}; both must come from one model"
            )
    for sub_net, own in private.items():
        if sub_net not in masks.sub_nets:
            raise ConfigError(f"private names no sub-net of the masks: {near_names(sub_net, masks.sub_nets)}")
        for name, value in own.items():
            if name not in state or name in masks.parameters:
                raise ConfigError(
                    f"private[{sub_net!r}] holds {name!r}, which must be an entry of the state dict without masks"
                )
            if value.shape != state[name].shape or value.dtype != state[name].dtype:
                raise ConfigError(
                    f"private[{sub_net!r}][{name!r}] is {tuple(value.shape)} of {value.dtype}, and the state dict's "
                    f"entry is {tuple(state[name].shape)} of {state[name].dtype}; they must be alike"
                )


def _sub_net_records(masks: MaskStore, header: Mapping[str, Any]) -> list[StoredSubNet]:
    targets = _targets(header)
    metrics = header.get("metrics") or {}
    for name in metrics:
        if name not in masks.sub_nets:
            raise ConfigError(f"header['metrics'] names no sub-net: {name!r}; {near_names(name, masks.sub_nets)}")
    return [
        StoredSubNet(
            name=name,
            target_sparsity=targets.get(name, (None, None))[0],
            sparsity=masks.sparsity(name),
            kept=masks.kept(name),
            total=masks.total(),
            pattern=targets.get(name, (None, None))[1],
            metrics=dict(metrics.get(name) or {}),
        )
        for name in masks.sub_nets
    ]


def _targets(header: Mapping[str, Any]) -> dict[str, tuple[float | None, str | None]]:
    """Return target sparsity and pattern by sub-net, as far as the header tells them."""
    if header.get("sub_nets"):
        return {entry["name"]: (entry.get("target_sparsity"), entry.get("pattern")) for entry in header["sub_nets"]}
    if header.get("config"):
        return {spec.name: (spec.sparsity, spec.pattern) for spec in ASTConfig.from_dict(header["config"]).sub_nets}
    return {}


def _default_sub_net(sub_nets: Sequence[StoredSubNet], header: Mapping[str, Any]) -> str:
    name = header.get("default_sub_net")
    names = [record.name for record in sub_nets]
    if name is None:
        return max(sub_nets, key=lambda record: record.kept).name
    if name not in names:
        raise ConfigError(f"header['default_sub_net'] names no sub-net: {name!r}; {near_names(str(name), names)}")
    return str(name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
