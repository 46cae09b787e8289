"""Reads the records of a report out of a training or an elastic file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ASTError
from ast_plugin.report_flops import FlopCount
from ast_plugin.report_records import ConflictPoint, LayerRecord, SparsityPoint, SubNetRecord, finite, plain
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.version import __version__


class MasksView(Protocol):
    """What a report asks of the masks of a run; `MaskStore` answers."""

    @property
    def sub_nets(self) -> Sequence[str]:
        """Names of the sub-nets in training order."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every prunable parameter, in the order of the model."""

    def kept(self, sub_net: str, parameter: str | None = None) -> int:
        """Number of weights that a sub-net keeps, in one parameter or in all."""

    def total(self, parameter: str | None = None) -> int:
        """Number of weights, kept or not, of one parameter or of all."""

    def overlap(self, a: str, b: str) -> float:
        """Share of the weights of `a` that `b` keeps too."""


class TrainingView(Protocol):
    """What a report asks of a training; the controller that `wrap` returns answers."""

    @property
    def model(self) -> nn.Module:
        """The network, at rest."""

    @property
    def config(self) -> ASTConfig:
        """The run's settings."""

    @property
    def masks(self) -> MasksView:
        """The masks as they are now."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def history(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Points over time under ``sparsity`` and ``conflicts``."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Sub-net name -> metric name -> value."""

    def statistics(self) -> Mapping[str, Any]:
        """Counts, in all and under ``sub_nets`` for each sub-net."""


class ElasticView(Protocol):
    """What a report asks of the contents of an elastic file."""

    @property
    def header(self) -> Mapping[str, Any]:
        """The JSON header."""

    @property
    def masks(self) -> MasksView:
        """The masks in the file."""


def gather(
    *,
    masks: MasksView,
    config: Mapping[str, Any],
    statistics: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    flops: FlopCount | None = None,
    dense_parameters: int | None = None,
) -> dict[str, Any]:
    """Return the fields of a report that follow from the masks and the counts.

    Args:
        masks: Masks of all sub-nets.
        config: The settings as `ASTConfig.to_dict` gives them; empty if they are not known.
        statistics: Counts, in all and under ``sub_nets``; empty if they are not known.
        metrics: Sub-net name -> metric name -> value.
        history: Points over time under ``sparsity`` and ``conflicts``; empty if they are not known.
        flops: Operations of the dense network; None if they were not counted.
        dense_parameters: Number of parameters of the dense network; None if it is not at hand.
    """
    names, shapes = tuple(masks.sub_nets), {name: tuple(shape) for name, shape in masks.shapes.items()}
    # From counts of kept weights, not through a float: a sparsity shown is then exact to the last weight.
    sparsity = {
        name: {p: 1 - masks.kept(name, p) / masks.total(p) if masks.total(p) else 0.0 for p in shapes} for name in names
    }
    specs = _specs(config)
    total = masks.total()
    sub_nets = []
    for name in names:
        kept = masks.kept(name)
        achieved = 1 - kept / total if total else 0.0
        counts = (statistics.get("sub_nets") or {}).get(name) or {}
        spec = specs.get(name)
        sub_nets.append(
            SubNetRecord(
                name=name,
                pattern=(spec.pattern if spec else None) or "unstructured",
                target_sparsity=spec.sparsity if spec else achieved,
                achieved_sparsity=achieved,
                dropped_channels=finite(counts.get("dropped_channels")),
                kept_weights=kept,
                prunable_weights=total,
                parameters=None if dense_parameters is None else dense_parameters - total + kept,
                flops=None if flops is None else flops.at_sparsity(sparsity[name]),
                metrics={metric: finite(value) for metric, value in (metrics.get(name) or {}).items()},
                steps=int(counts.get("steps") or 0),
                checks=int(counts.get("checks") or 0),
                conflicts=int(counts.get("conflicts") or 0),
                mean_cosine=finite(counts.get("mean_cosine")),
            )
        )
    return {
        "sub_nets": tuple(sub_nets),
        "layers": tuple(
            LayerRecord(
                name=parameter,
                shape=shape,
                flops=None if flops is None else flops.layers[parameter],
                sparsity={name: sparsity[name][parameter] for name in names},
            )
            for parameter, shape in shapes.items()
        ),
        "overlap": tuple(tuple(finite(masks.overlap(a, b)) if masks.kept(a) else None for b in names) for a in names),
        "sparsity_history": tuple(
            SparsityPoint(
                step=int(point["step"]),
                sub_net=str(point["sub_net"]),
                target=finite(point.get("target")),
                achieved=finite(point.get("achieved")),
            )
            for point in history.get("sparsity", ())
        ),
        "conflict_history": tuple(
            ConflictPoint(
                step=int(point["step"]),
                sub_net=str(point["sub_net"]),
                checks=int(point["checks"]),
                conflicts=int(point["conflicts"]),
                mean_cosine=finite(point.get("mean_cosine")),
            )
            for point in history.get("conflicts", ())
        ),
        "settings": plain(config),
        "dense_parameters": dense_parameters,
        "dense_flops": None if flops is None else flops.total,
        "versions": {"ast_plugin": __version__, "torch": str(torch.__version__)},
    }


def _specs(config: Mapping[str, Any]) -> dict[str, SubNetSpec]:
    """Return the sub-nets that the settings ask for, by name; none if the settings cannot be read."""
    try:
        return {spec.name: spec for spec in ASTConfig.from_dict(config).sub_nets}
    except ASTError:
        return {}
