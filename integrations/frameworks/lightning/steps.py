"""How many optimizer steps a fit makes: Lightning's own count, where it has one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.frameworks.lightning.host import is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DEV_RUN = 1000  # steps that a run is planned for of which Lightning makes a few, to see that everything works


def steps_left(trainer: Trainer, module: LightningModule, wanted: int | None, *, resumed: bool) -> int:
    """Return the steps to plan a run for.

    Args:
        trainer: The Trainer.
        module: What it trains.
        wanted: `total_steps` of the settings.
        resumed: Whether the run began where the fit did, so that earlier steps are its own.

    Raises:
        ConfigError: If `wanted` is not what Lightning makes, nobody knows, or no step is left.
    """
    planned = planned_steps(trainer) if module.automatic_optimization else None
    if wanted is not None and planned is not None and wanted != planned:
        raise ConfigError(f"total_steps={wanted}, and the fit makes {planned}; leave it out, Lightning knows")
    total = wanted if planned is None else planned
    if total is None:
        why = "its optimizers are stepped by hand"
        if module.automatic_optimization:
            why = "the data have no length and there is no max_steps, or accumulation changes with the epochs"
        raise ConfigError(f"Lightning cannot know how many steps this fit makes: {why}; give total_steps")
    left = total if resumed else total - trainer.global_step
    if trainer.fast_dev_run:
        return max(left, _DEV_RUN)
    if left < 1:
        raise ConfigError(
            f"no step is left to train sub-nets in: {trainer.global_step} of {total} are made; raise max_epochs or "
            "max_steps"
        )
    return left


def planned_steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps of a whole fit, from its very beginning; None where Lightning cannot know them."""
    for callback in trainer.callbacks:
        if is_a(callback, "GradientAccumulationScheduler") and len(set(callback.scheduling.values())) > 1:
            return None  # of which Lightning's estimate knows nothing
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Return the optimizer steps of an epoch, None if the data have no length."""
    batches = trainer.num_training_batches
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1) if batches < math.inf else None
