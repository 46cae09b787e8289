"""Sparsifiers of ``torch.ao.pruning``: how they are told a sparsity, and how their schedulers ramp it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.frameworks.sparsifier_copies import SparsifierCopy
from ast_plugin.methods import MaskInputs, SparsitySchedule
from ast_plugin.schedules import constant_sparsity

LEVEL = "sparsity_level"

SetSparsity = Callable[[MutableMapping[str, Any], float], None]


class LevelRule:
    """Drives a sparsifier that is told a sparsity for each layer and chooses masks whenever it is stepped.

    Args:
        sparsifier: The user's sparsifier.
        set_sparsity: Writes a layer's sparsity, in [0, 1], into its config group; None: as torch's own take it.
        see: ``kept``: it sees the weights under the present masks, as in its framework, so what is dropped stays
            dropped; ``all``: it sees all dense weights, so weights may come back.
        schedule: Sparsity as a function of the step; None: the target from the start.

    Raises:
        ConfigError: If it is not known how this sparsifier is told a sparsity.
    """

    needs_gradient = False
    grow_initialization: Literal["keep", "zero"] = "keep"
    distribution = "uniform"
    is_due: Callable[[int, int | None], bool] | None = None

    def __init__(
        self,
        sparsifier: Any,
        *,
        set_sparsity: SetSparsity | None = None,
        see: Literal["kept", "all"] = "kept",
        schedule: SparsitySchedule | None = None,
    ) -> None:
        if see not in ("kept", "all"):
            raise ConfigError(f"see must be one of kept, all, got {see!r}")
        self._set_sparsity = set_sparsity or _setting_of(sparsifier)
        levels = {group[LEVEL] for group in sparsifier.groups if LEVEL in group}
        if set_sparsity is None and len(levels) > 1:
            warnings.warn(
                f"layers of {type(sparsifier).__name__} were prepared with a {LEVEL} of their own "
                f"({min(levels):g} to {max(levels):g}); each sub-net's sparsity takes the place of all of them, spread "
                "over the layers by distribution=",
                stacklevel=3,
            )
        self._see_all = see == "all"
        self.initial_sparsity = None if schedule is None else 0.0
        self.sparsity_schedule = schedule or constant_sparsity

    def take_over(self) -> Callable[[], None]:
        """Do nothing: nothing of such a sparsifier is outside the model."""
        return lambda: None

    def first(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Have the first masks chosen from all dense weights."""
        self._step(work, inputs, masks=None)

    def renew(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Have the masks of an update chosen."""
        self._step(work, inputs, masks=None if self._see_all else inputs.masks)

    def _step(self, work: SparsifierCopy, inputs: MaskInputs, masks: Mapping[str, Any] | None) -> None:
        work.load(inputs.weights, masks, None)
        for name, group in work.groups.items():
            group["shape"] = tuple(inputs.weights[name].shape)
            self._set_sparsity(group, inputs.layer_sparsities[name])
        work.sparsifier.step()


def schedule_of(scheduler: Any, *, interval: int) -> SparsitySchedule:
    """Return the ramp of a scheduler of ``torch.ao.pruning``, for sub-nets of any sparsity.

    Args:
        scheduler: The scheduler; not changed. Its last sparsity is replaced by each sub-net's own.
        interval: Optimizer steps of one ``scheduler.step()``, positive.

    Returns:
        A schedule that gives what the scheduler would, and the sub-net's sparsity once the mask schedule has ended.

    Raises:
        ConfigError: If it is no such scheduler, `interval` is not positive, or layers have schedules of their own.
    """
    from torch.ao.pruning.scheduler.base_scheduler import BaseScheduler

    if not isinstance(scheduler, BaseScheduler):
        raise ConfigError(f"scheduler must be one of torch.ao.pruning, got {type(scheduler).__name__}")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ConfigError(f"scheduler_interval must be a positive number of optimizer steps, got {interval!r}")
    work = copy.copy(scheduler)
    work._get_sl_called_within_step = True

    def sparsity(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
        if step >= end:
            return final
        work.base_sl = [final] * len(scheduler.base_sl)
        work.last_epoch = step // interval
        levels = [float(level) for level in work.get_sl()]
        if max(levels) - min(levels) > 1e-9:
            raise ConfigError(
                f"{type(scheduler).__name__} has another schedule for each layer ({min(levels):g} to {max(levels):g} "
                f"at step {step}); give all of them the same, and spread the sparsity with distribution="
            )
        return min(max(levels[0], 0.0), final)

    sparsity(0, begin=0, end=1, initial=0.0, final=0.5)
    return sparsity


def _setting_of(sparsifier: Any) -> SetSparsity:
    keys = set.intersection(*(set(group) for group in sparsifier.groups))
    if {LEVEL, "zeros_per_block", "sparse_block_shape"} <= keys:
        return _set_block_level
    if LEVEL in keys:
        return _set_level
    if "nearliness" in keys:
        return _set_nearliness
    raise ConfigError(
        f"{type(sparsifier).__name__} has no {LEVEL!r} in its config groups, so it is not known how it is told a "
        "sparsity; give from_sparsifier(..., set_sparsity=lambda group, sparsity: ...) that writes it into a group"
    )


def _set_level(group: MutableMapping[str, Any], sparsity: float) -> None:
    group[LEVEL] = sparsity


def _set_block_level(group: MutableMapping[str, Any], sparsity: float) -> None:
    """Set the share of blocks, of each of which only some weights may become zeros."""
    share = group["zeros_per_block"] / math.prod(group["sparse_block_shape"])
    if sparsity > share + 1e-9:
        raise ConfigError(
            f"zeros_per_block={group['zeros_per_block']} in blocks of {tuple(group['sparse_block_shape'])} allows a "
            f"sparsity of at most {share:g}, and {group['tensor_fqn']} is to have {sparsity:g}; ask for no more, or "
            "prepare the sparsifier with more zeros_per_block"
        )
    group[LEVEL] = min(sparsity / share, 1.0)


def _set_nearliness(group: MutableMapping[str, Any], sparsity: float) -> None:
    """Set the odd number of diagonals with which the sparsity is nearest."""
    rows, columns = group["shape"]

    def kept(distance: int) -> int:
        ends = ((max(0, row - distance), min(columns, row + distance + 1)) for row in range(rows))
        return sum(max(0, high - low) for low, high in ends)

    wanted = (1 - sparsity) * rows * columns
    distances = range(min(rows, columns))
    # The number of kept weights grows with the distance, so the first that does not come nearer ends the search.
    best = 0
    for distance in distances[1:]:
        if abs(kept(distance) - wanted) >= abs(kept(best) - wanted):
            break
        best = distance
    group["nearliness"] = 2 * best + 1
