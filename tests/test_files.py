"""Files are written completely or not at all, and a failure keeps what stood there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ast_plugin.errors import ConfigError, SaveError
from ast_plugin.files import atomic_folder, atomic_write, atomic_write_bytes, atomic_write_text


def test_writes_a_new_file_and_leaves_no_temporary_behind(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a.bin", b"abc")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_text_is_utf8_with_line_ends_untouched(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "ä\r\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4\r\nb\n"


def test_makes_missing_folders(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "runs" / "one" / "a.txt", "x")
    assert (tmp_path / "runs" / "one" / "a.txt").read_text() == "x"


def test_accepts_a_plain_string_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_write_text("a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_replacing_keeps_the_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    atomic_write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    atomic_write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    atomic_write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_long_name_still_fits_under_its_temporary_name(tmp_path: Path) -> None:
    name = "n" * 250
    atomic_write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


def _half_then(error: BaseException) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half a fi")
        raise error

    return write


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "not read-only"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "give another path"),
    ],
)
def test_a_failing_writer_keeps_the_old_file_and_says_why(tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(SaveError) as caught:
        atomic_write(path, _half_then(OSError(number, os.strerror(number))))
    message = str(caught.value)
    assert str(path) in message
    assert os.strerror(number) in message
    assert words in message
    assert "unchanged" in message
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert isinstance(caught.value.__cause__, OSError)


def test_a_failing_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveError, match="No space left on device"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_device_is_reported_by_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some file systems report a full disk only when the data is flushed.
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="free some space"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def test_errors_that_are_no_oserror_become_save_errors_with_their_text(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="the writer gave up"):
        atomic_write(tmp_path / "a.bin", _half_then(RuntimeError("the writer gave up")))
    assert list(tmp_path.iterdir()) == []


def test_errors_of_this_package_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two settings"):
        atomic_write(tmp_path / "a.bin", _half_then(ConfigError("two settings")))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_passes_through_after_cleaning(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, _half_then(KeyboardInterrupt()))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="a part of the path is a file"):
        atomic_write_text(tmp_path / "file" / "a.txt", "y")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="add a file name"):
        atomic_write_text(tmp_path, "y")


def test_a_writer_that_makes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file"):
        atomic_write(tmp_path / "a.bin", lambda _: None)


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(SaveError, match="it is no regular file; give the path of a file"):
        atomic_write_text(pipe, "text")
    assert pipe.is_fifo()


def test_a_new_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    def private(temporary: Path) -> None:
        temporary.touch(mode=0o600)

    (tmp_path / "ordinary").touch()
    atomic_write(tmp_path / "made", private)
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def while_handling(first: Exception, second: Exception) -> Exception:
    """Return `second` as it is when it was raised while `first` was handled."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 232320 vs 232216"), 0),
        (while_handling(OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos 232320 vs 232216")), 10**12),
        (ValueError("I/O error: No space left on device (os error 28)"), 10**12),
    ],
    ids=["torch", "torch-through-python", "safetensors"],
)
def test_a_full_disk_is_recognised_whoever_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(SaveError, match="No space left on device; free some space, or give another path; the file"):
        atomic_write(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def leftover_of(path: Path, process: int) -> Path:
    """Make what `process` leaves behind when it is killed while it writes `path`."""
    seen: list[str] = []

    def write(temporary: Path) -> None:
        seen.append(temporary.name)
        raise ConfigError("far enough")

    with pytest.raises(ConfigError):
        atomic_write(path, write)
    leftover = path.with_name(seen[0].replace(f"-{os.getpid()}-", f"-{process}-"))
    leftover.write_bytes(b"half a fi")
    return leftover


@pytest.fixture(scope="module")
def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


posix = pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can ask whether a process runs")


@posix
def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path, dead_process: int) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    leftover = leftover_of(path, dead_process)
    atomic_write_bytes(tmp_path / "b.bin", b"other")
    assert leftover.exists()  # of another file: not ours to judge
    atomic_write_bytes(path, b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "b.bin"]
    assert path.read_bytes() == b"new"


@posix
def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_process: int
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    dead = leftover_of(path, dead_process)
    # In a container every training process may be number 1: what carries our own number is no other's.
    own = dead.with_name(dead.name.replace(f"-{dead_process}-", f"-{os.getpid()}-"))
    alive = dead.with_name(dead.name.replace(f"-{dead_process}-", f"-{os.getppid()}-"))
    similar = dead.with_name(dead.name.replace("a.bin.", "a.bin.mine."))
    for file in (own, alive, similar):
        file.write_bytes(b"x")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    atomic_write_bytes(path, b"new")
    assert all(file.exists() for file in (dead, own, alive, similar))
    monkeypatch.undo()
    atomic_write_bytes(path, b"new")
    assert [file.exists() for file in (dead, own, alive, similar)] == [False, False, True, True]


def test_two_writers_in_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def write(temporary: Path) -> None:
        atomic_write_bytes(path, b"inner")  # as another thread would, meanwhile
        temporary.write_bytes(b"outer")

    def early(temporary: Path) -> None:
        temporary.write_bytes(b"outer")
        atomic_write_bytes(path, b"inner")

    for writer in (write, early):
        atomic_write(path, writer)
        assert path.read_bytes() == b"outer"
        assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("nothing", [None, 3, ""])
def test_what_is_no_path_is_refused(nothing: Any) -> None:
    with pytest.raises(ConfigError, match=f"path must be the path of a file, got {nothing!r}"):
        atomic_write_bytes(nothing, b"x")


# -------------------------------------------------------------------------------------------------- folders


def _fill(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "below").mkdir()
    (folder / "below" / "b.txt").write_text("b")


def test_a_folder_appears_complete_and_leaves_no_temporary_behind(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    seen: list[bool] = []

    def fill(folder: Path) -> None:
        _fill(folder)
        seen.append(target.exists())

    atomic_folder(target, fill)
    assert seen == [False]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == sorted(
        ["runs", "runs/one", "runs/one/a.txt", "runs/one/below", "runs/one/below/b.txt"]
    )


def test_a_new_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    atomic_folder(tmp_path / "ours", _fill)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no folder can be renamed over another")
def test_an_empty_folder_is_filled_and_a_link_to_one_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_folder(tmp_path / "link", _fill)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "a"


def test_a_folder_with_files_and_a_file_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SaveError, match="it is there and holds files; give another one, or remove it"):
        atomic_folder(tmp_path / "full", lambda _: pytest.fail("was called"))
    with pytest.raises(SaveError, match="a file has that name; give another one"):
        atomic_folder(tmp_path / "full" / "mine.txt", lambda _: pytest.fail("was called"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/mine.txt"]


def test_a_folder_that_another_process_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fill(folder: Path) -> None:
        _fill(folder)
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")

    with pytest.raises(SaveError, match="it is there and holds files"):
        atomic_folder(target, fill)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/theirs.txt"]


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (OSError(errno.ENOSPC, "full"), SaveError, "No space left on device; free some space, or give another path$"),
        (ValueError("odd"), SaveError, "odd; check the folder and the space left"),
        (ConfigError("ours"), ConfigError, "^ours$"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "^Ctrl-C$"),
    ],
)
def test_a_folder_that_fails_half_way_is_removed(
    tmp_path: Path, raised: BaseException, expected: type[BaseException], words: str
) -> None:
    (tmp_path / "out").mkdir()

    def fill(folder: Path) -> None:
        _fill(folder)
        raise raised

    with pytest.raises(expected, match=words):
        atomic_folder(tmp_path / "out", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


@posix
def test_the_folder_of_a_killed_writer_is_removed_by_the_next_one(tmp_path: Path, dead_process: int) -> None:
    seen: list[str] = []

    def look(folder: Path) -> None:
        seen.append(folder.name)

    atomic_folder(tmp_path / "out", look)
    (tmp_path / "out").rmdir()
    dead = tmp_path / seen[0].replace(f"-{os.getpid()}-", f"-{dead_process}-")
    dead.mkdir()
    _fill(dead)
    atomic_folder(tmp_path / "out", _fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
