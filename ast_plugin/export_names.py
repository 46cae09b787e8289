"""Which entry of an elastic file each tensor of a saved model is, told by its name and by its values.

Names alone would not do. Some libraries write files with the names that an older version of the model had, or with
rows in an older order, and undo that when they load. The elastic file has the values of the dense model, as far as some
sub-net keeps them; where those are found, in their order, a sub-net's values belong.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ast_plugin.elastic_contents import ElasticContents, StoredTensor
from ast_plugin.elastic_fit import file_names, listing
from ast_plugin.export_weights import WeightsEntry, WeightsFile, as_integers, convertible
from ast_plugin.slots import plain_name

_LOOKED_AT = 64  # values that must agree before all of them are compared


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """An entry that is still to be found: where it has its first values, and which these are."""

    entry: StoredTensor
    places: Tensor
    values: Tensor


def find_entries(contents: ElasticContents, sub_net: str, files: Sequence[WeightsFile]) -> dict[str, str]:
    """Return the entry of the elastic file that each tensor of a saved model is, as far as that can be told.

    Args:
        contents: The elastic file.
        sub_net: The sub-net that is wanted. Entries whose values agree in the dense model and in this sub-net are told
            apart by nothing that matters.
        files: The saved model, also of another floating-point type.

    Returns:
        Name in `files` -> name in `contents`.
    """
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(safe_open(file.path, "pt")) for file in files]
        saved = [(entry, reader) for file, reader in zip(files, readers, strict=True) for entry in file.entries]
        return _found(contents, sub_net, saved)


def differences(contents: ElasticContents, files: Sequence[WeightsFile], found: Mapping[str, str]) -> list[str]:
    """Return in what a saved model differs from the one of an elastic file; empty if all is there.

    Args:
        contents: The elastic file.
        files: The saved model.
        found: What `find_entries` returned.
    """
    known = file_names(contents)
    unknown, shapes, types, values = [], [], [], []
    named = list(found.values())
    for entry in (entry for file in files for entry in file.entries if entry.name not in found):
        own = contents.entries.get(known.get(plain_name(entry.name), ""))
        if own is None:
            unknown.append(entry.name)
            continue
        named.append(own.name)
        if own.shape != entry.shape:
            shapes.append(f"{entry.name} is {own.shape} in the elastic file and {entry.shape} in the model")
        elif not convertible(own.torch_dtype, entry.dtype):
            types.append(f"{entry.name} is {own.dtype} in the elastic file and {str(entry.dtype)[6:]} in the model")
        else:
            values.append(entry.name)
    lines = (
        listing("the elastic file lacks", unknown),
        # Of tied tensors one is saved, under any of their names. What is tied in the saved model alone is here too.
        listing("the saved model lacks", [own.name for own in _absent(contents, named)]),
        listing("other shape:", shapes),
        listing("other type:", types),
        listing("other values:", values),
    )
    return [line for line in lines if line]


def _found(contents: ElasticContents, sub_net: str, saved: Iterable[tuple[WeightsEntry, Any]]) -> dict[str, str]:
    known = file_names(contents)
    found: dict[str, str] = {}
    others: list[tuple[WeightsEntry, Any]] = []
    for entry, reader in saved:
        own = contents.entries.get(known.get(plain_name(entry.name), ""))
        if own is not None and _is_what_its_name_says(contents, own, entry, reader):
            found[entry.name] = own.name
        else:
            others.append((entry, reader))
    candidates = [_candidate(contents, own) for own in _absent(contents, found.values())] if others else []
    for entry, reader in others:
        alike = [candidate for candidate in candidates if _alike(candidate.entry, entry)]
        if not alike:
            continue
        values = reader.get_tensor(entry.name).reshape(-1)
        alike = [c for c in alike if _same(c.values, values[c.places]) and _has_values(contents, c.entry, values)]
        if alike and _agree(contents, sub_net, [candidate.entry for candidate in alike]):
            found[entry.name] = alike[0].entry.name
            candidates.remove(alike[0])
    return found


def _absent(contents: ElasticContents, names: Iterable[str]) -> list[StoredTensor]:
    """Return the entries that none of `names` stands for, of tied ones the one with the values."""
    there = {contents.entries[name].same_as or name for name in names}
    return [own for own in contents.entries.values() if own.same_as is None and own.name not in there]


def _candidate(contents: ElasticContents, own: StoredTensor) -> _Candidate:
    values, kept = contents.dense_values(own.name)
    places = torch.arange(min(len(values), _LOOKED_AT)) if kept is None else kept.nonzero().reshape(-1)
    return _Candidate(own, places[:_LOOKED_AT].clone(), values[:_LOOKED_AT].clone())


def _is_what_its_name_says(contents: ElasticContents, own: StoredTensor, entry: WeightsEntry, reader: Any) -> bool:
    if not _alike(own, entry):
        return False
    # Normalization state has no order that could differ, and may have been estimated anew since the model was saved.
    private = contents.entries[own.same_as or own.name].kind == "private"
    return private or _has_values(contents, own, reader.get_tensor(entry.name).reshape(-1))


def _alike(own: StoredTensor, entry: WeightsEntry) -> bool:
    return own.shape == entry.shape and convertible(own.torch_dtype, entry.dtype)


def _has_values(contents: ElasticContents, own: StoredTensor, saved: Tensor) -> bool:
    """Return whether the dense model had these values in an entry, as far as the file knows them."""
    values, kept = contents.dense_values(own.name)
    return _same(values, saved if kept is None else saved[kept])


def _same(values: Tensor, saved: Tensor) -> bool:
    return torch.equal(as_integers(values.to(saved.dtype)), as_integers(saved))  # NaN is no other than itself


def _agree(contents: ElasticContents, sub_net: str, entries: Sequence[StoredTensor]) -> bool:
    """Return whether a sub-net has the same values in all these entries."""
    first = contents.tensor(sub_net, entries[0].name)
    return all(torch.equal(first, contents.tensor(sub_net, own.name)) for own in entries[1:])
