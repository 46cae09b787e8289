"""Metrics of every sub-net beside those that a timm script knows, and the one that chooses the best checkpoint."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.training import AlternatingSparseTraining

OWN = ("loss", "top1", "top5")  # what timm's validate returns


def metric_name(sub_net: str, name: str) -> str:
    """Return the name of a sub-net's metric; timm puts ``eval_`` before it in ``summary.csv``."""
    return f"{sub_net}_{name}"


def split_metric(metric: str, sub_nets: Sequence[str]) -> tuple[str | None, str]:
    """Return the sub-net that ``--eval-metric`` names, None if it names none, and the metric without it.

    Args:
        metric: Such as ``top1`` or ``s95_loss``.
        sub_nets: Names of the sub-nets.

    Raises:
        ConfigError: If it is one of timm's metrics of a sub-net that is not there.
    """
    for sub_net in sub_nets:
        if metric.startswith(metric_name(sub_net, "")):
            return sub_net, metric.removeprefix(metric_name(sub_net, ""))
    sub_net, _, name = metric.rpartition("_")
    if sub_net and name in OWN:
        known = [metric_name(known, name) for known in sub_nets]
        raise ConfigError(f"--eval-metric {metric}: there is no sub-net {sub_net!r}; {near_names(metric, known)}")
    return None, metric


def check_metric(metric: str, measured: Collection[str]) -> None:
    """Refuse a metric that the script does not measure, which it would look for at the end of an epoch.

    Args:
        metric: What ``--eval-metric`` names, without a sub-net.
        measured: Names of what validation measures.

    Raises:
        ConfigError: If it is not among them.
    """
    if metric not in measured:
        raise ConfigError(f"--eval-metric: validation measures no {metric!r}; {near_names(metric, measured)}")


def count_from_target(saver: Any, reached: Callable[[], bool]) -> None:
    """Have a checkpoint saver of timm rank checkpoints last that were made before the sub-nets were as sparse as asked.

    On its way there one is less sparse and mostly better than at the end, and would be the best checkpoint ever after.

    Args:
        saver: `timm.utils.CheckpointSaver`; only this object changes.
        reached: Returns whether the sub-nets are as sparse as they are to become.
    """
    save = saver.save_checkpoint

    def save_checkpoint(epoch: int, metric: float | None = None) -> Any:
        if metric is not None and not reached():
            metric = math.inf if saver.decreasing else -math.inf
        return save(epoch, metric=metric)

    saver.save_checkpoint = save_checkpoint


def merged(headline: str, by_sub_net: Mapping[str, Mapping[str, float]]) -> OrderedDict[str, float]:
    """Return one mapping: one sub-net's metrics under the script's own names, then every sub-net's.

    The names and their order are the same at every evaluation, as ``summary.csv`` needs them.

    Args:
        headline: The sub-net that the script's own names stand for.
        by_sub_net: What ``validate`` returned for each.
    """
    metrics: OrderedDict[str, float] = OrderedDict(by_sub_net[headline])
    for sub_net, figures in by_sub_net.items():
        for name, value in figures.items():
            metrics[metric_name(sub_net, name)] = value
    return metrics


def note(ast: AlternatingSparseTraining, by_sub_net: Mapping[str, Mapping[str, float]]) -> None:
    """Keep metrics for the report and the files.

    Args:
        ast: The run.
        by_sub_net: What ``validate`` returned for each.
    """
    for sub_net, figures in by_sub_net.items():
        for name, value in figures.items():
            ast.add_report_metric(name, value, sub_net=sub_net)
