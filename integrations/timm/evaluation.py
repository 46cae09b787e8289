"""Metrics of every sub-net beside those that a timm script knows: names, merging, and which one is best."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ast_plugin.errors import ConfigError, near_names

_OWN = ("loss", "top1", "top5")  # what timm's validate returns


def metric_name(sub_net: str, name: str) -> str:
    """Return the name of a sub-net's metric; timm puts ``eval_`` before it in ``summary.csv``."""
    return f"{sub_net}_{name}"


def merged(default: str, by_sub_net: Mapping[str, Mapping[str, float]]) -> OrderedDict[str, float]:
    """Return one mapping: the default's metrics under the script's own names, then every sub-net's.

    Args:
        default: The sub-net that the script's own names stand for.
        by_sub_net: What ``validate`` returned for each.
    """
    metrics: OrderedDict[str, float] = OrderedDict(by_sub_net[default])
    for sub_net, figures in by_sub_net.items():
        for name, value in figures.items():
            metrics[metric_name(sub_net, name)] = value
    return metrics


def check_metric(metric: str, sub_nets: Sequence[str]) -> None:
    """Refuse an ``--eval-metric`` that is a metric of no sub-net of this run, before anything is trained.

    Names that are neither timm's nor of the form ``NAME_top1`` are left to the script.

    Raises:
        ConfigError: If there is no such sub-net.
    """
    sub_net, separator, name = metric.rpartition("_")
    known = [metric_name(sub_net, name) for sub_net in sub_nets for name in _OWN]
    if metric in (*_OWN, *known) or not separator or name not in _OWN:
        return
    raise ConfigError(f"--eval-metric {metric}: there is no sub-net {sub_net!r}; {near_names(metric, known)}")


def is_loss_of_a_sub_net(metric: str, sub_nets: Sequence[str]) -> bool:
    """Return whether lower is better, which scripts know of the name ``loss`` alone."""
    return any(metric == metric_name(sub_net, "loss") for sub_net in sub_nets)


def prefer_lower(saver: Any, scheduler: Any) -> None:
    """Make a checkpoint saver and a plateau scheduler take lower values of the metric for better.

    Args:
        saver: A `timm.utils.CheckpointSaver`, or None on ranks that save nothing.
        scheduler: A scheduler of timm, or None.

    Raises:
        ConfigError: If either cannot be told.
    """
    if saver is not None:
        if not (hasattr(saver, "decreasing") and hasattr(saver, "cmp")):
            raise ConfigError(
                f"--eval-metric: {type(saver).__name__} of this timm cannot be told that a lower loss is better; "
                "choose a sub-net's top1"
            )
        saver.decreasing = True
        saver.cmp = operator.lt
    plateau = getattr(scheduler, "lr_scheduler", None)  # torch's, inside timm's
    if getattr(plateau, "mode", "min") == "max":
        plateau.mode, plateau.mode_worse = "min", math.inf
        if plateau.best == -math.inf:  # nothing seen yet
            plateau.best = math.inf
