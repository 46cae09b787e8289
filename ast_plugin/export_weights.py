"""Weights files of a saved model, rewritten with other values and nothing else changed.

A safetensors file is a header, which says of what type and shape every tensor is and where its bytes lie, and then the
bytes. A sub-net has the types and shapes of the dense network. So the header is copied byte by byte, with whatever
metadata and order its writer chose, and one tensor after the other is written behind it: a file of any size takes the
memory of its largest tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ast_plugin.errors import ElasticFileError

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# Of one size each, because NumPy, which knows the byte order of files, does not know all of torch's types.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """One tensor of a weights file.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A safetensors file without its values.

    Attributes:
        path: Where it is.
        header: All bytes in front of the values.
        entries: Its tensors, in the order of their bytes.
    """

    path: Path
    header: bytes
    entries: tuple[WeightsEntry, ...]


def find_weights(folder: Path) -> tuple[list[WeightsFile], Path | None]:
    """Return the weights files of a saved model as stock loading chooses them, and the index of several.

    Args:
        folder: Where the model was saved: ``model.safetensors``, or the shards that ``model.safetensors.index.json``
            lists.

    Raises:
        ElasticFileError: If there are none, or a file is missing, damaged, or of types that sub-nets do not have.
    """
    if (folder / MODEL).exists():
        return [read_weights_file(folder / MODEL)], None
    index = folder / INDEX
    if not index.exists():
        others = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
        if others:
            raise ElasticFileError(
                f"{str(folder)!r} holds its weights as {others[0]}, a pickle, which is not opened here; load the model "
                "and save it as safetensors: model.save_pretrained(folder)"
            )
        raise ElasticFileError(
            f"{str(folder)!r} holds no saved model beside the elastic file: neither {MODEL} nor {INDEX}; save the "
            "model there with model.save_pretrained(folder), or export a single file: --to NAME.safetensors"
        )
    names = _shards(index)
    files = [read_weights_file(folder / name) for name in sorted(set(names.values()))]
    wrong = {(entry.name, file.path.name) for file in files for entry in file.entries} ^ set(names.items())
    if wrong:
        shown = sorted({name for name, _ in wrong})[:3]
        raise ElasticFileError(
            f"{str(index)!r} and the files that it lists do not agree about {', '.join(shown)}; save the model again"
        )
    return files, index


def read_weights_file(path: Path) -> WeightsFile:
    """Read the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        ElasticFileError: If it is missing or damaged, or holds types that sub-nets do not have.
    """
    try:
        with safe_open(path, "pt"):  # checks lengths, types, and that the bytes follow each other without a gap
            pass
        with path.open("rb") as file:
            length = file.read(_LENGTH_BYTES)
            header = length + file.read(int.from_bytes(length, "little"))
    except OSError as error:
        raise ElasticFileError(f"cannot read {str(path)!r}: {error.strerror or error}; save the model again") from error
    except SafetensorError as error:
        raise ElasticFileError(f"{str(path)!r} is damaged: {error}; save the model again") from error
    layout: dict[str, Any] = json.loads(header[_LENGTH_BYTES:])
    layout.pop(_METADATA, None)
    for name, told in layout.items():
        if told["dtype"] not in _TYPES:
            raise ElasticFileError(
                f"{name!r} in {str(path)!r} is of type {told['dtype']}, as quantized models are, and weights of "
                "sub-nets are not; export from the model as it was before quantization"
            )
    return WeightsFile(
        path=path,
        header=header,
        entries=tuple(
            WeightsEntry(name=name, shape=tuple(told["shape"]), dtype=_TYPES[told["dtype"]])
            for name, told in sorted(layout.items(), key=lambda item: item[1]["data_offsets"])
        ),
    )


def write_weights_file(source: WeightsFile, target: Path, value: Callable[[str], Tensor]) -> None:
    """Write a file like `source` with other values.

    Args:
        source: The file that gives header, order, shapes and types.
        target: Where to.
        value: Called with each name once; returns a CPU tensor of its shape, of any floating-point type where the file
            has one, else of the file's type.

    Raises:
        ElasticFileError: If a value has another shape or kind of type.
    """
    with target.open("wb") as file:
        file.write(source.header)
        for entry in source.entries:
            tensor = value(entry.name)
            if tuple(tensor.shape) != entry.shape or not convertible(tensor.dtype, entry.dtype):
                raise ElasticFileError(
                    f"{entry.name!r} is {tuple(tensor.shape)} of {tensor.dtype}, and {str(source.path)!r} has it as "
                    f"{entry.shape} of {entry.dtype}"
                )
            file.write(_as_bytes(tensor.to(entry.dtype)))


def convertible(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Return whether values of one type may be written as the other: the same, or both of floating point."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of a CPU tensor as integers of the same size, one-dimensional."""
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def _as_bytes(tensor: Tensor) -> memoryview:
    array = as_integers(tensor).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).data


def _shards(index: Path) -> dict[str, str]:
    """Return the name of the file that each tensor is in."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not names or not all(Path(name).name == name for name in names.values()):
            raise ValueError("its weight_map lists no files of this folder")
    except OSError as error:
        raise ElasticFileError(f"cannot read {str(index)!r}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ElasticFileError(
            f"{str(index)!r} is damaged, or no index of weights: {error}; save the model again"
        ) from error
    return dict(names)
