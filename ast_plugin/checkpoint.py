"""Checkpoints: one file that a crash cannot spoil, read without executing anything in it.

The file is what ``torch.save`` writes, a mapping of tensors and plain containers, so that ``torch.load(path,
weights_only=True)`` reads it where this package is not installed. ``torch.save`` straight onto the last checkpoint
loses both when it is cut off; here the file takes its place only when it is complete and was found to be readable.
``torch.load`` does not notice changed bytes in tensors, so the checksums that the file has anyway are compared first.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch
from torch import Tensor

from ast_plugin.errors import ASTError, ConfigError, StateError
from ast_plugin.files import atomic_write, file_path
from ast_plugin.random_state import RandomState
from ast_plugin.sharding import is_sharded

_FOLDER = 0x10  # among the attributes of an archive's entry
FORMAT = "ast_plugin.checkpoint"
VERSION = 1

_RANDOM_STATE = "random_state"

# What zipfile and torch raise on bytes that are no archive, or no longer one.
_UNREADABLE = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, AssertionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, MemoryError),
)
# What torch raises on objects that it cannot write, or would not load again.
_UNPLAIN = (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError)


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint can bring back by itself: schedulers, scalers, averages, samplers, models, optimizers."""

    def state_dict(self) -> Any:
        """Return the state as tensors and plain containers."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from what `state_dict` returned."""


def save_objects(
    path: str | os.PathLike[str], own: Mapping[str, Any], extra: Mapping[str, Any], *, random_state: bool
) -> None:
    """Write what belongs to every checkpoint and what a user gives beside it; see `write_checkpoint`.

    Args:
        path: Where the file shall be.
        own: What belongs to every checkpoint, by name.
        extra: What was given, by name.
        random_state: Whether to add the global random generators.

    Raises:
        ConfigError: If `extra` takes a name of `own`, and as `write_checkpoint`.
        SaveError: As `write_checkpoint`.
    """
    _check_names(own, extra)
    write_checkpoint(path, {**own, **extra, **({_RANDOM_STATE: RandomState()} if random_state else {})})


def load_objects(
    path: str | os.PathLike[str], own: Mapping[str, Stateful], extra: Mapping[str, Stateful], *, random_state: bool
) -> dict[str, Any]:
    """Load what `save_objects` wrote into the same objects, all of them or none, and return the values.

    Args:
        path: A checkpoint.
        own: What belongs to every checkpoint, by name.
        extra: The objects that were saved beside it, by name.
        random_state: Whether to restore the global random generators, where the file has them.

    Raises:
        ConfigError: If `extra` takes a name of `own`, or holds something that cannot load a state.
        StateError: As `read_checkpoint` and `load_together`.
    """
    _check_names(own, extra)
    for name, entry in extra.items():
        if not isinstance(entry, Stateful):
            raise ConfigError(
                f"{name} must have state_dict() and load_state_dict(), got {type(entry).__name__}; values are "
                "returned, they need not be passed"
            )
    states, values = read_checkpoint(path)
    targets = {**own, **extra}
    if _RANDOM_STATE in states:
        if random_state:
            targets[_RANDOM_STATE] = RandomState()
        else:
            del states[_RANDOM_STATE]
    load_together(path, targets, states)
    return values


def write_checkpoint(path: str | os.PathLike[str], entries: Mapping[str, Any]) -> None:
    """Write a checkpoint, completely or not at all.

    Args:
        path: Where the file shall be; an older one is replaced only when the new one is complete.
        entries: By name, objects whose ``state_dict()`` is saved, and values: tensors, numbers, strings and
            containers of them.

    Raises:
        ConfigError: If an entry holds something that ``weights_only=True`` would not load, or a part of a sharded
            tensor.
        SaveError: If the file cannot be written; the one that stood there is untouched in both cases.
    """
    states = {name: entry.state_dict() for name, entry in entries.items() if isinstance(entry, Stateful)}
    values = {name: entry for name, entry in entries.items() if name not in states}
    for name, entry in {**states, **values}.items():
        if _any_tensor(entry, is_sharded):
            raise ConfigError(
                f"{name!r} holds tensors of which this process has a part only; save sharded models with "
                "torch.distributed.checkpoint"
            )
    contents = {"format": FORMAT, "version": VERSION, "states": states, "values": values}

    def write(temporary: Path) -> None:
        try:
            save_archive(contents, temporary)
            torch.load(temporary, map_location="cpu", mmap=True, weights_only=True)  # maps tensors, reads none
        except _UNPLAIN as error:
            raise _not_plain({**states, **values}) or error from error

    atomic_write(path, write)


def save_archive(contents: Any, path: Path) -> None:
    """Write what `torch.save` writes, without the name of the file in it: two equal runs write equal bytes.

    A resumed run writes equal values, not equal bytes: pickle also keeps which of its strings are one object.
    Checksums are written also where they were switched off for the sake of speed.

    Args:
        contents: What to write.
        path: The file.
    """
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        # Given a path, torch takes its last part for the folder in the archive that everything lies in.
        with path.open("wb") as file:
            torch.save(contents, file)
    finally:
        torch.serialization.set_crc32_options(computed)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_checkpoint` wrote, after checking every byte of it.

    Args:
        path: A checkpoint.

    Returns:
        The states of objects by name, and the values by name; tensors are on the CPU.

    Raises:
        StateError: If the file is missing, damaged, foreign, or of a newer version.
    """
    found = file_path(path)
    name = os.fspath(path)
    if not found.is_file():
        what = "is no regular file" if found.exists() else "does not exist"
        raise StateError(f"there is no checkpoint {name!r}: it {what}; check the path, or start a new run")
    try:
        with found.open("rb") as file:
            _check_sums(name, file)
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except ASTError:
        raise
    except OSError as error:
        raise StateError(f"cannot read {name!r}: {error.strerror or error}; check the path") from error
    except _UNREADABLE as error:
        # torch's own words advise to execute what is in the file.
        raise _damaged(name, "it holds no tensors and plain containers that can be read") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise StateError(
            f"{name!r} is no checkpoint that save_checkpoint() wrote; load it with torch.load(path, weights_only=True)"
        )
    if contents.get("version") != VERSION:
        raise StateError(
            f"{name!r} has checkpoint version {contents.get('version')!r}, and this version of ast-plugin reads "
            f"{VERSION}; resume with the version that wrote it"
        )
    return contents["states"], contents["values"]


def load_together(path: str | os.PathLike[str], objects: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Load a state into each of several objects, or into none of them.

    Args:
        path: Where the states come from, for the error.
        objects: By name, in the order of loading.
        states: One for each of `objects`.

    Raises:
        StateError: If names differ, or a state does not fit its object. What had been loaded by then is put back.
    """
    name = os.fspath(path)
    if missing := [key for key in objects if key not in states]:
        raise StateError(
            f"{name!r} holds no state of {', '.join(map(repr, missing))}; it has {', '.join(map(repr, states))}"
        )
    if left := [key for key in states if key not in objects]:
        raise StateError(
            f"{name!r} also holds the state of {', '.join(map(repr, left))}; pass the objects under these names, as "
            "when it was saved"
        )
    before = {key: _kept(entry.state_dict()) for key, entry in objects.items()}
    touched: list[str] = []
    try:
        for key, entry in objects.items():
            touched.append(key)
            entry.load_state_dict(states[key])
    except BaseException as error:
        stuck = []
        for key in reversed(touched):
            try:
                objects[key].load_state_dict(before[key])
            except Exception:
                stuck.append(key)
        if not isinstance(error, Exception) or (isinstance(error, ASTError) and not isinstance(error, StateError)):
            raise
        outcome = f", except {', '.join(map(repr, stuck))}, which refused its own state" if stuck else ""
        raise StateError(
            f"the state of {touched[-1]!r} in {name!r} does not fit: {error}; everything is as it was before{outcome}"
        ) from error


def _check_names(own: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    for name in extra:
        if name in own:
            raise ConfigError(f"{name!r} is in every checkpoint already; leave it out, or give another name")


def _check_sums(name: str, file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            # Nobody splits checkpoints over disks or has folders in them; torch would read other bytes without a word.
            odd = (entry.filename for entry in archive.infolist() if entry.volume or entry.external_attr & _FOLDER)
            bad = next(odd, None) or archive.testzip()
    except OSError:
        raise
    except (*_UNREADABLE, NotImplementedError) as error:
        raise _damaged(name, str(error) or type(error).__name__) from error
    if bad is not None:
        raise _damaged(name, f"the checksum of its part {bad!r} is wrong")


def _damaged(name: str, reason: str) -> StateError:
    return StateError(f"{name!r} is damaged, or no checkpoint: {reason}; go on from another one")


def _not_plain(entries: Mapping[str, Any]) -> ConfigError | None:
    """Return the error that names the entry which cannot be loaded with ``weights_only=True``, None if all can."""
    for name, entry in entries.items():
        buffer = io.BytesIO()
        try:
            torch.save(entry, buffer)
            buffer.seek(0)
            torch.load(buffer, map_location="cpu", weights_only=True)
        except _UNPLAIN as error:
            found = next((line for line in str(error).splitlines() if "GLOBAL" in line or "pickle" in line), "")
            return ConfigError(
                f"{name!r} holds something else than tensors, numbers, strings and containers of them, which no "
                f"checkpoint brings back without executing it: {found.strip() or error}; convert it, or leave it out"
            )
    return None


def _kept(value: Any) -> Any:
    """Return a copy of nested containers that later changes do not reach, its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a module's state dict has an attribute beside its entries
        copied.update({key: _kept(item) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(_kept(item) for item in value)
    return value


def _any_tensor(value: Any, condition: Callable[[Tensor], bool]) -> bool:
    if isinstance(value, Tensor):
        return condition(value)
    if isinstance(value, Mapping):
        return any(_any_tensor(item, condition) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_any_tensor(item, condition) for item in value)
