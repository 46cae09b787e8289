"""Everybody who takes part in `overhead.py`, and the check that each trains what the tables say."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable

from overhead_contenders import (
    CLIPPED,
    EIGHT,
    EIGHT_OFF,
    FREEZE,
    OFF,
    ONE,
    OURS,
    PLAIN,
    PLAIN_CLIPPED,
    SINGLE,
    SPARSITIES,
    Contender,
    alike,
    ours,
    plain,
)
from overhead_peers import JOINT, joint, parametrized, pruned, rigl_torch_static, sparsimony
from overhead_tasks import Task

# By the package that each needs.
PEERS: tuple[tuple[str, Callable[[Task], Contender]], ...] = (
    ("rigl-torch", rigl_torch_static),
    ("sparsimony (SET)", lambda task: sparsimony(task, "SET")),
    ("sparsimony (RigL)", lambda task: sparsimony(task, "RigL")),
)


def build_all(task: Task) -> tuple[list[Contender], list[str]]:
    """Return all contenders, ready to be measured, and notes on those that are missing."""
    contenders = [
        plain(task),
        plain(task, clip=True),
        ours(task, OURS, SPARSITIES),
        ours(task, OFF, SPARSITIES, correction="off"),
        ours(task, FREEZE, SPARSITIES, inactive="freeze"),
        ours(task, CLIPPED, SPARSITIES, clip=True),
        ours(task, SINGLE, (ONE,)),
        ours(task, EIGHT, alike(8)),
        ours(task, EIGHT_OFF, alike(8), correction="off"),
        pruned(task),
        parametrized(task),
        joint(task),
    ]
    found, notes = build_peers(task)
    contenders += found
    for contender in contenders:
        check_sparsity(contender)
    return contenders, notes


def build_peers(task: Task) -> tuple[list[Contender], list[str]]:
    """Return those of `PEERS` that work here, and notes on the others."""
    contenders, notes = [], []
    for package, build in PEERS:
        try:
            contenders.append(build(task))
        except ImportError as error:
            notes.append(f"{package} is left out: {error} (pip install --no-deps {package.split()[0]}).")
        except Exception as error:  # whatever another package does, the rest is still worth measuring
            notes.append(f"{package} is left out: {type(error).__name__}: {error}")
    return contenders, notes


def peer_versions() -> dict[str, str]:
    """Return the versions of the packages of others that are installed."""
    versions = {}
    for package in dict.fromkeys(name.split()[0] for name, _ in PEERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def check_sparsity(contender: Contender) -> None:
    """Make sure that a contender trains what it is said to: otherwise its time means nothing.

    Raises:
        RuntimeError: If it does not.
    """
    wanted = {PLAIN: [], PLAIN_CLIPPED: [], JOINT: list(SPARSITIES)}.get(contender.name)
    if contender.ast is not None:
        wanted = [plan.target_sparsity for plan in contender.ast._parts.updater.plans.values()]
    reached = contender.sparsities()
    wanted = [ONE] if wanted is None else wanted
    if len(reached) != len(wanted) or any(abs(r - w) > 0.005 for r, w in zip(reached, wanted, strict=True)):
        raise RuntimeError(f"{contender.name} has sparsities {reached}, not {wanted}, so its time means nothing")
