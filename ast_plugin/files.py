"""Writing files so that a failure leaves what stood there before.

A file is written under a temporary name in its own folder, flushed to the disk and then renamed: a reader
sees the old file or the new one, never a part. Whole folders are made in the same way. Renaming is atomic within one
file system only, which is why nothing temporary lives in the system's temporary folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from ast_plugin.errors import ASTError, ConfigError, SaveError

_REMEDIES = {
    errno.ENOSPC: "free some space, or give another path",
    errno.EDQUOT: "free some of your quota, or give another path",
    errno.EACCES: "give a path in a folder that you may write to",
    errno.EPERM: "give a path in a folder that you may write to",
    errno.EROFS: "give a path on a file system that is not read-only",
    errno.ENOTDIR: "a part of the path is a file; give a path whose folders are folders",
    errno.EEXIST: "a part of the path is a file; give a path whose folders are folders",
    errno.EISDIR: "the path is a folder; add a file name",
    errno.ENAMETOOLONG: "give a shorter name",
}

# After the prefix: the number of the process that writes, and something random.
_TEMPORARY = re.compile(r"(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp")
# Names of the temporary files that this process is writing now; all others that carry its number are leftovers of an
# earlier process, for in a container the training process may have the same number every time.
_being_written: set[str] = set()

_FULL = 1 << 20  # bytes: a disk with less room than this is taken for full when a writer fails


def file_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a `Path`.

    Raises:
        ConfigError: If it is no path at all.
    """
    if not isinstance(path, (str, os.PathLike)) or not path:
        raise ConfigError(f"path must be the path of a file, got {path!r}")
    return Path(path)


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` make a file, and put it at `path` only when it is complete.

    Missing folders are made. A file that is replaced passes on its permissions; a symbolic link stays, and
    the file that it points to is replaced. What writers of this file left behind under temporary names when they were
    killed is removed.

    Args:
        path: Where the file shall be.
        write: Called once with the temporary path; must create a file there.

    Raises:
        SaveError: If anything fails; the file that stood at `path` is untouched and the temporary file is gone.
            Errors of this package raised by `write` pass through as they are, and so do interrupts.
    """
    # The real path, because a rename would replace a symbolic link instead of the file behind it.
    target = Path(os.path.realpath(file_path(path)))
    if target.is_dir():
        raise SaveError(f"cannot write {os.fspath(path)!r}: {_REMEDIES[errno.EISDIR]}")
    if target.exists() and not target.is_file():
        # Renaming over a device or a pipe would replace it by a file for every program of the machine.
        raise SaveError(f"cannot write {os.fspath(path)!r}: it is no regular file; give the path of a file")
    temporary = target.with_name(f"{_temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _being_written.add(temporary.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        mode = _mode_of(target, temporary)
        write(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, ASTError) or not isinstance(error, Exception):
            raise
        raise SaveError(_explain(path, error, target)) from error
    finally:
        _being_written.discard(temporary.name)
    _flush_folder(target.parent)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, completely or not at all.

    Raises:
        SaveError: If it fails; the file that stood at `path` is untouched.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    atomic_write(path, write)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with its line ends as they are, completely or not at all.

    Raises:
        SaveError: If it fails; the file that stood at `path` is untouched.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_folder(path: str | os.PathLike[str], fill: Callable[[Path], None]) -> None:
    """Let `fill` put files into a new folder, which is at `path` only when it is complete.

    Missing folders above it are made. What writers of this folder left behind under temporary names when they were
    killed is removed.

    Args:
        path: Where the folder shall be: nothing is there yet, or an empty folder.
        fill: Called once with a temporary, empty folder to put files and folders into.

    Raises:
        ConfigError: If `path` is no path.
        SaveError: If something is at `path`, or anything fails; the temporary folder is gone then. Errors of this
            package raised by `fill` pass through as they are, and so do interrupts.
    """
    target = Path(os.path.realpath(file_path(path)))
    if target.exists() and not target.is_dir():
        raise SaveError(f"cannot write the folder {os.fspath(path)!r}: a file has that name; give another one")
    _check_empty(path, target)
    temporary = target.with_name(f"{_temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _being_written.add(temporary.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary.mkdir()
        fill(temporary)
        for entry in (*temporary.rglob("*"), temporary):
            if entry.is_dir():
                _flush_folder(entry)
            else:
                _flush(entry)
        os.replace(temporary, target)  # an empty folder may be replaced, no other
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, ASTError) or not isinstance(error, Exception):
            raise
        _check_empty(path, target)  # no longer, if another process was faster
        raise SaveError(_explain(path, error, target)) from error
    finally:
        _being_written.discard(temporary.name)
    _flush_folder(target.parent)


def _check_empty(path: str | os.PathLike[str], target: Path) -> None:
    if target.is_dir() and next(target.iterdir(), None) is not None:
        raise SaveError(
            f"cannot write the folder {os.fspath(path)!r}: it is there and holds files; give another one, or remove it"
        )


def _temporary_prefix(target: Path) -> str:
    # The machine is part of the name, because process numbers mean nothing on another one that shares the folder.
    machine = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
    return f".{target.name[:100]}.{machine}-"


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders of `target` whose writers are gone: each is as large as the file itself."""
    prefix = _temporary_prefix(target)
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name.removeprefix(prefix)) if entry.name.startswith(prefix) else None
            if match and entry.name not in _being_written and not _runs_elsewhere(int(match["process"])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _runs_elsewhere(process: int) -> bool:
    """Return whether another process than this one has the number; where that cannot be asked, say so too."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True  # there, asking with signal 0 ends the process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _mode_of(target: Path, temporary: Path) -> int:
    """Return the permissions that the file shall have: the old file's, or those of any new file in that folder."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    # Writers such as safetensors make private files; only making one tells what the user's own would get.
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode & 0o7777
    temporary.unlink()
    return mode


def _flush(path: Path) -> None:
    # Without this a crash of the machine shortly after the rename can leave an empty file under the final name.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # The rename itself survives a crash only when the folder is on the disk. The file is in place already, and some
    # systems cannot open folders, so a failure here is no failure of the save.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explain(path: str | os.PathLike[str], error: Exception, target: Path) -> str:
    reason = str(error) or type(error).__name__
    remedy = "check the folder and the space left, or give another path"
    number = _errno_of(error, target)
    if number is not None:
        reason = os.strerror(number)
        remedy = _REMEDIES.get(number, remedy)
    with contextlib.suppress(OSError):
        if target.is_file():
            remedy += "; the file that stood there before is unchanged"
    return f"cannot write {os.fspath(path)!r}: {reason}; {remedy}"


def _errno_of(error: Exception, target: Path) -> int | None:
    """Return the system's error number, also where a writer in another language hides it in a text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    if told:
        return int(told[1])
    if isinstance(error.__context__, OSError):
        return error.__context__.errno  # what torch's writer met with, before it complained about the place it was at
    with contextlib.suppress(OSError):
        # Writing by itself, it tells only that it got stuck somewhere.
        if isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free < _FULL:
            return errno.ENOSPC
    return None
