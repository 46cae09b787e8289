"""What hosts do with sup-tickets by themselves, because they have the training data: BatchNorm statistics anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from ast_plugin.integrations.family.sup_tickets import SupTickets
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.recalibration import Forward
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.versions import LAST

BATCHES = 100
"""For each sub-net, unless `SupTickets` says otherwise."""


def recompute_once(
    tickets: SupTickets | None,
    loader: Callable[[], Iterable[Any]],
    logger: logging.Logger,
    *,
    forward: Forward | None = None,
) -> None:
    """Estimate the BatchNorm statistics of superposed sub-nets, as soon as there are any; later calls do nothing.

    Where that fails they stay averages, with a warning in the log: hosts feed models in ways that are not known here.

    Args:
        tickets: Those of the run; None where it has none.
        loader: Returns the host's training data, re-iterable; not called where they are not needed.
        logger: The host's.
        forward: How to run the model on a batch; None as in `AlternatingSparseTraining.recalibrate`.
    """
    training = None if tickets is None else tickets.training
    if tickets is None or training is None or not tickets.available or tickets.recomputed:
        return
    if not batch_norm_modules(training.model):
        return
    try:
        tickets.recompute(loader(), forward=forward, max_batches=tickets.max_batches or BATCHES)
    except Exception as error:  # of the host's data, or of the model that was fed them
        logger.warning(
            "BatchNorm of the superposed sub-nets stays the average of the tickets: it could not be estimated from the "
            f"training data ({type(error).__name__}: {error})"
        )


def further_versions(ast: AlternatingSparseTraining) -> tuple[str, ...]:
    """Return the versions of a run's sub-nets, beside that which is trained, that there are now."""
    return tuple(version for version in ast.versions if version != LAST)
