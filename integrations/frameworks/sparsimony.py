"""Sparsifiers of the package sparsimony: they have a schedule, a distribution and a growth rule of their own."""

from __future__ import annotations

import importlib.metadata
import inspect
import types
from collections.abc import Callable
from typing import Any, Literal

from ast_plugin.errors import ConfigError, MissingExtraError
from ast_plugin.integrations.frameworks.sparsifier_copies import SparsifierCopy
from ast_plugin.methods import MaskInputs, SparsitySchedule
from ast_plugin.schedules import constant_sparsity

TESTED = "0.1"
INSTALL = "pip install --no-deps --ignore-requires-python sparsimony==0.1.0"

_NEEDED = ("scheduler", "distribution", "sparsity", "grown_weights_init", "_step_count")


class StepRule:
    """Drives a sparsifier of sparsimony by its own ``step()``, at its own moments.

    The run's optimizer steps count as the calls of ``step()`` that the framework asks for after each of them, added to
    those that were made before the run.

    Args:
        sparsifier: The user's sparsifier, prepared.

    Raises:
        ConfigError: If it needs more than weights, masks and dense gradients, or starts regrown weights at another
            value than zero.
        MissingExtraError: If the package has another version than this was made for.
    """

    distribution = "uniform"
    initial_sparsity: float | None = None
    sparsity_schedule: SparsitySchedule = staticmethod(constant_sparsity)

    def __init__(self, sparsifier: Any) -> None:
        kind = type(sparsifier).__name__
        _check_version()
        missing = [name for name in _NEEDED if not hasattr(sparsifier, name)]
        lists = [group["module"].parametrizations[group["tensor_name"]] for group in sparsifier.groups]
        other = {name for one in lists for name in vars(one[0]) if name.endswith("_history")}
        if missing or other:
            what = f"has no {missing[0]!r}" if missing else "learns from a history of weights and gradients"
            raise ConfigError(
                f"{kind} {what}, which cannot be had here; sparsimony's RigL and SET can, and the run's own methods"
            )
        if sparsifier.grown_weights_init:
            raise ConfigError(
                f"{kind} starts regrown weights at grown_weights_init={sparsifier.grown_weights_init!r}; here they "
                "start at zero, so make it with grown_weights_init=0.0"
            )
        self._sparsifier = sparsifier
        self._offset = int(sparsifier._step_count)
        self._faulty = kind == "SET"
        self.needs_gradient = any(hasattr(one[0], "dense_grad") for one in lists)
        # 0.1.0's SET computes the regrown weights' start and leaves it at that.
        self.grow_initialization: Literal["keep", "zero"] = "keep" if self._faulty else "zero"

    def is_due(self, step: int, last_step: int | None) -> bool:
        """Return whether the sparsifier's own schedule has an update after `last_step`, up to `step`."""
        first = 0 if last_step is None else last_step + 1
        return any(self._ratio(count) is not None for count in range(step, first - 1, -1))

    def take_over(self) -> Callable[[], None]:
        """Take the sparsifier off its optimizer's ``step``, which it wraps to clear momentum."""
        optimizer = self._sparsifier.optimizer
        wrapper = vars(optimizer).get("step")
        if not isinstance(wrapper, types.FunctionType):
            return lambda: None
        enclosed = inspect.getclosurevars(wrapper).nonlocals
        inner = enclosed.get("_unwrapped_step")
        if inner is None or enclosed.get("self") is not self._sparsifier:
            return lambda: None
        if getattr(inner, "__func__", None) is type(optimizer).step:
            del optimizer.step  # as it was: no attribute of the object's own
        else:
            optimizer.step = inner

        def undo() -> None:
            optimizer.step = wrapper

        return undo

    def first(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Have the first masks made as ``prepare`` does."""
        sparsifier = work.sparsifier
        sparsifier.sparsity = inputs.sparsity
        work.load(inputs.weights, None, None)
        sparsifier._initialize_masks()

    def renew(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Have the sparsifier step: the latest of its updates that is not made yet, or one with another fraction."""
        sparsifier = work.sparsifier
        work.load(inputs.weights, inputs.masks, inputs.gradients)
        count = next((count for count in range(inputs.step, -1, -1) if self._ratio(count) is not None), None)
        made = sparsifier._step_count
        schedule = sparsifier.scheduler
        try:
            if count is not None and self._offset + count > made:
                made = self._offset + count
                sparsifier._step_count = made - 1  # `step` counts first
            else:
                sparsifier.scheduler = _Fraction(inputs.drop_fraction)
            if self._faulty:
                # 0.1.0's SET asserts that as many weights are kept as should be dropped.
                sparsifier._assert_sparsity_level = _no_assertion
            sparsifier.step()
        finally:
            sparsifier.scheduler, sparsifier._step_count = schedule, made
            vars(sparsifier).pop("_assert_sparsity_level", None)
            for group in work.groups.values():
                group.pop("dense_grads", None)

    def _ratio(self, count: int) -> float | None:
        """Return what the schedule says of a step of the run; the framework counts its first call as 1."""
        return self._sparsifier.scheduler(self._offset + count) if count > 0 else None


class _Fraction:
    """A schedule for one update that is not in the sparsifier's own."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def __call__(self, step: int) -> float:
        return self._fraction

    def next_step_update(self, last_step: int) -> bool:
        return False


def _no_assertion(mask: Any, sparsity_level: float) -> None:
    del mask, sparsity_level


def _check_version() -> None:
    try:
        version = importlib.metadata.version("sparsimony")
    except importlib.metadata.PackageNotFoundError:  # in the path, not installed
        return
    if not f"{version}.".startswith(f"{TESTED}."):
        raise MissingExtraError(
            f"sparsimony {version} is installed, and its sparsifiers are known here as those of {TESTED}; install that "
            f"with: {INSTALL}"
        )
