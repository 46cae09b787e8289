"""The shell of an elastic file: safetensors whose JSON header seals every byte with a digest.

Nothing is unpickled. The digest is the SHA-256 of the whole file with the digest's own 64 hexadecimal
characters read as zeros, so a changed byte is noticed wherever it is: in the tensors, in either header, even
in the padding between them. It protects against accidents, not against forgery: who can change the file can
also compute a new digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file
from torch import Tensor

from ast_plugin.errors import ConfigError, ElasticFileError
from ast_plugin.files import atomic_write, file_path

FORMAT = "ast_plugin.elastic"
VERSION = 1

_DIGEST = "sha256:"
_EMPTY_DIGEST = _DIGEST + 64 * "0"
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the limit that safetensors itself sets
_FLOAT = "$float"
# What a file starts with, and what it then is.
_FOREIGN = (
    (b"PK\x03\x04", "a PyTorch or other zip archive", "load it with torch.load(path, weights_only=True)"),
    (b"\x80", "a pickle", "pickles can run code when they are loaded; this function never opens one"),
    (b"GGUF", "a GGUF file", "give a file that save() of this package wrote"),
    (b"\x89HDF", "an HDF5 file", "give a file that save() of this package wrote"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with: git lfs pull"),
)


def write_sealed(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to `path`, sealed with a digest, completely or not at all.

    Args:
        path: Where the file shall be.
        tensors: CPU tensors by name, contiguous, no two of them sharing memory.
        header: Plain containers, numbers and strings; non-finite numbers are allowed. The keys ``format``,
            ``version`` and ``digest`` are added.

    Raises:
        ConfigError: If the header holds something that JSON cannot say.
        SaveError: If the file cannot be written; what stood at `path` is untouched.
    """
    sealed = {"digest": _EMPTY_DIGEST, "format": FORMAT, "version": VERSION, **to_json("header", header)}
    # One metadata entry, because safetensors writes several in random order and equal runs shall give equal files.
    metadata = {FORMAT: json.dumps(sealed, allow_nan=False, separators=(",", ":"))}

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata=metadata)
        _seal(temporary)

    atomic_write(path, write)


def read_sealed(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_sealed` wrote, after checking every byte of it.

    Args:
        path: An elastic file.

    Returns:
        The header, and the tensors by name, on the CPU and independent of the file.

    Raises:
        ElasticFileError: If the file is missing, foreign, truncated, damaged, or of a newer format version.
    """
    found = file_path(path)
    name = os.fspath(path)
    if found.exists() and not (found.is_file() or found.is_dir()):
        # A device may go on for ever.
        raise ElasticFileError(f"cannot read {name!r}: it is no regular file; give the path of an elastic file")
    try:
        # All of it, instead of a memory map: a file that is replaced in place later must not change what was checked.
        data = found.read_bytes()
    except OSError as error:
        raise ElasticFileError(
            f"cannot read {name!r}: {error.strerror or error}; check the path and its permissions"
        ) from error
    layout, raw_header = _parse_shell(name, data)
    header = _parse_header(name, layout)
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ElasticFileError(
            f"{name!r} has format version {version}, and this version of ast-plugin reads up to {VERSION}; "
            "upgrade it with: pip install --upgrade ast-plugin"
        )
    if header.get("format") != FORMAT or version != VERSION:
        raise _damaged(name, f"its format is given as {header.get('format')!r}, version {version!r}")
    _check_length(name, data, layout, raw_header)
    _check_digest(name, data, raw_header, header.get("digest"))
    try:
        tensors = parse_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(name, f"its tensors cannot be read ({error})") from error
    return from_json(header), tensors


def to_json(where: str, value: Any) -> Any:
    """Return `value` in terms that strict JSON has, so that `from_json` gives it back.

    Non-finite numbers become ``{"$float": "nan"}``; tuples become lists; scalars of NumPy and torch become numbers.

    Args:
        where: How to name the value in an error.
        value: Plain containers, numbers and strings.

    Raises:
        ConfigError: If there is something else in it.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where} has a key that is no string: {key!r}; use strings as keys")
        return {key: to_json(f"{where}[{key!r}]", inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_json(f"{where}[{index}]", inner) for index, inner in enumerate(value)]
    if callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size == 1:
            return to_json(where, value.item())
    raise ConfigError(
        f"{where} cannot be stored: {type(value).__name__} is neither number, string, list nor mapping; "
        "convert it before saving"
    )


def from_json(value: Any) -> Any:
    """Return what `to_json` was given, with lists for tuples."""
    if isinstance(value, dict):
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [from_json(inner) for inner in value]
    return value


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        header_end = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        position = _digest_position(file.read(header_end - _LENGTH_BYTES), _EMPTY_DIGEST)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(position)
        file.write(digest.encode("ascii"))


def _digest_position(raw_header: bytes, digest: str) -> int:
    """Return where in the file the hexadecimal characters of `digest` stand, or -1."""
    # Our JSON is a string inside safetensors' JSON, hence the backslashes; the digest is its first entry. Whatever the
    # user's part of the header holds is nested or escaped deeper and cannot look like this.
    before = f'"{{\\"digest\\":\\"{_DIGEST}'.encode("ascii")
    start = raw_header.find(before + digest.removeprefix(_DIGEST).encode("ascii", errors="replace") + b'\\"')
    return -1 if start < 0 else _LENGTH_BYTES + start + len(before)


def _parse_shell(name: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return safetensors' own header, parsed and raw."""
    if not data:
        raise _damaged(name, "it is empty")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > _LARGEST_HEADER or data[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        # Only now: a header's length may begin with the very byte that every pickle begins with.
        for start, kind, remedy in _FOREIGN:
            if data.startswith(start):
                raise ElasticFileError(f"{name!r} is not an elastic file: it is {kind}; {remedy}")
        raise ElasticFileError(
            f"{name!r} is not an elastic file: it does not start like a safetensors file, or its first bytes are "
            "damaged; give a file that save() of this package wrote, or copy it from its source again"
        )
    if _LENGTH_BYTES + length > len(data):
        raise _damaged(name, f"it ends inside its header: {len(data)} of at least {_LENGTH_BYTES + length} bytes")
    raw_header = data[_LENGTH_BYTES : _LENGTH_BYTES + length]
    try:
        layout = json.loads(raw_header)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, "its header is no JSON") from error
    return layout, raw_header  # an object, since it begins with a brace


def _parse_header(name: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return this package's header out of safetensors' one."""
    metadata = layout.get("__metadata__")
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        tensors = [key for key in layout if key != "__metadata__"]
        raise ElasticFileError(
            f"{name!r} is not an elastic file: it is a safetensors file of another kind, with {len(tensors)} tensors"
            f"{f' such as {tensors[0]!r}' if tensors else ''}; load it with safetensors.torch.load_file and "
            "model.load_state_dict"
        )
    try:
        header = json.loads(metadata[FORMAT])
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(name, "its elastic header is no JSON") from error
    if not isinstance(header, dict):
        raise _damaged(name, "its elastic header is no JSON object")
    return header


def _check_length(name: str, data: bytes, layout: Mapping[str, Any], raw_header: bytes) -> None:
    """Tell a file that ends too early, the commonest damage, from one that was changed."""
    try:
        end = max((int(entry["data_offsets"][1]) for key, entry in layout.items() if key != "__metadata__"), default=0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _damaged(name, "its header does not say where its tensors are") from error
    expected = _LENGTH_BYTES + len(raw_header) + end
    if len(data) < expected:
        raise _damaged(name, f"it is truncated: {len(data)} of {expected} bytes")
    if len(data) > expected:
        raise _damaged(name, f"{len(data) - expected} bytes follow its end")


def _check_digest(name: str, data: bytes, raw_header: bytes, digest: Any) -> None:
    if not isinstance(digest, str) or not digest.startswith(_DIGEST) or len(digest) != len(_EMPTY_DIGEST):
        raise _damaged(name, "its digest is malformed")
    position = _digest_position(raw_header, digest)
    if position < 0:
        raise _damaged(name, "its digest is not where it belongs")
    view = memoryview(data)
    found = hashlib.sha256(view[:position])
    found.update(64 * b"0")
    found.update(view[position + 64 :])
    if _DIGEST + found.hexdigest() != digest:
        raise _damaged(name, "its content does not match its digest")


def _damaged(name: str, reason: str) -> ElasticFileError:
    return ElasticFileError(f"{name!r} is damaged: {reason}; copy it from its source again, or save it again")
