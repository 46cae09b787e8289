"""Runs checks in several processes that talk over gloo; `checks in one launch` because a launch costs seconds.

A check is a generator function: what stands before its only ``yield`` runs before the process group exists (the
single-process reference), what comes after runs in the group. A check that hangs fails: collectives have a timeout,
and so has the launch.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

Check = Callable[[Path], Iterator[None]]

_COLLECTIVE_SECONDS = 40


def run_checks(module: str, folder: Path, *, ranks: int = 2, timeout: int = 300) -> dict[str, str]:
    """Run all of ``module.CHECKS`` on every rank; returns ``ok`` or what went wrong by the check's name."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "ranks.py"), module, str(folder), str(ranks), str(timeout)]
    errors = [(folder / f"stderr{rank}").open("w+") for rank in range(ranks)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=errors[rank]) for rank in range(ranks)]
    end = time.monotonic() + timeout + 20
    try:
        for process in processes:
            process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, str] = {}
    for rank in range(ranks):
        errors[rank].seek(0)
        output = errors[rank].read()
        errors[rank].close()
        path = folder / f"results{rank}.json"
        for name, result in json.loads(path.read_text() if path.exists() else "{}").items():
            if found.get(name, "ok") == "ok":
                found[name] = result if result == "ok" else f"rank {rank}: {result}"
        if processes[rank].returncode:
            found.setdefault("launch", f"rank {rank} ended with {processes[rank].returncode}:\n{output[-4000:]}")
    return found


def launched(command: list[str], errors: Path, *, timeout: int = 300) -> None:
    """Run a launcher of ranks to its end; what it and they say goes to the file `errors`."""
    with errors.open("w") as file:
        # A group of its own: a launch that hangs is ended with the ranks that it has started.
        folder = Path(__file__).parent.parent
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, start_new_session=True)
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code == 0, errors.read_text()[-6000:]


def main(module: str, folder: str, ranks: int, timeout: int, rank: int) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    checks: dict[str, Check] = importlib.import_module(module).CHECKS
    results = dict.fromkeys(checks, "not run: an earlier check failed")
    path = Path(folder) / f"results{rank}.json"
    failed = False
    started: dict[str, Iterator[None]] = {}

    def attempt(name: str, action: Callable[[], object]) -> None:
        nonlocal failed
        try:
            action()
        except BaseException:  # what pytest.raises fails with is no Exception
            results[name] = traceback.format_exc()
            failed = True

    for name, check in checks.items():
        started[name] = check(Path(folder))
        attempt(name, lambda name=name: next(started[name]))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", ranks),  # no port that somebody could take before it is used
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
    )
    for name in checks:
        if failed:
            break
        began = time.monotonic()
        attempt(name, lambda name=name: next(started[name], None))
        if not failed:
            results[name] = "ok"
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        path.write_text(json.dumps(results))
    path.write_text(json.dumps(results))
    if not failed:
        dist.barrier()  # older versions of torch may hang where one process leaves while the other still talks
        dist.destroy_process_group()
    sys.stderr.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3], *(int(argument) for argument in sys.argv[3:]))
