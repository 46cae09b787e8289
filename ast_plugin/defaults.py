"""The built-ins as one plugin: methods, patterns, distributions, orders, selection and correction.

They come in through the same hooks that everybody's plugins use; the logic lies on the floors below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from ast_plugin.alternation import AlternatingOrder, FixedOrder, RandomOrder, SinglePathOrder
from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction, correct
from ast_plugin.distributions import erk, global_magnitude, uniform
from ast_plugin.errors import ConfigError, near_names
from ast_plugin.hookspecs import AlternationRecord, DistributionRecord, MethodRecord, PatternRecord, hookimpl
from ast_plugin.methods import BUILT_IN_METHODS
from ast_plugin.parameters import ParameterChoice, select_parameters
from ast_plugin.patterns import Pattern, parse_pattern
from ast_plugin.vr_pge_method import VR_PGE


@hookimpl
def ast_methods() -> Sequence[MethodRecord]:
    """Offer static, SET, RigL, GMP, GraNet and VR-PGE."""
    return [MethodRecord.of(method) for method in (*BUILT_IN_METHODS, VR_PGE)]


@hookimpl
def ast_patterns() -> Sequence[PatternRecord]:
    """Offer the patterns of `ast_plugin.patterns`."""
    return [
        _pattern("unstructured", "any weights, one by one", "unstructured"),
        _pattern("N:M", "N of every M weights along the input channels, such as 2:4", r"\d+:\d+"),
        _pattern("RxC", "blocks of R rows and C columns of the weight matrix, such as 4x4", r"\d+x\d+"),
        _pattern("channel", "whole output channels", "channel"),
    ]


@hookimpl
def ast_distributions() -> Sequence[DistributionRecord]:
    """Offer the distributions of `ast_plugin.distributions`."""
    return [
        DistributionRecord(name="uniform", description="the same sparsity in every layer", function=uniform),
        DistributionRecord(
            name="erk", description="Erdos-Renyi-Kernel: large layers are sparser (Evci et al. 2020)", function=erk
        ),
        DistributionRecord(
            name="global", description="one magnitude threshold over all layers", function=global_magnitude
        ),
    ]


@hookimpl
def ast_alternations() -> Sequence[AlternationRecord]:
    """Offer the orders of `ast_plugin.alternation`."""
    return [
        AlternationRecord(
            name="alternating",
            description="every step the next sub-net (Yang et al. 2022)",
            build=lambda *, count, **_: AlternatingOrder(count),
        ),
        AlternationRecord(
            name="random",
            description="every step a sub-net drawn at random",
            build=lambda *, count, seed, **_: RandomOrder(count, seed),
        ),
        AlternationRecord(name="single_path", description="every epoch the next sub-net", build=_single_path),
        AlternationRecord(
            name="fixed",
            description="one sub-net throughout: the default one, or NAME with fixed:NAME",
            build=_fixed,
            takes_argument=True,
        ),
    ]


@hookimpl
def ast_select_parameters(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[ParameterChoice] | None:
    """Select by layer type; see `ast_plugin.parameters.select_parameters`."""
    return select_parameters(model, include=include, exclude=exclude)


@hookimpl
def ast_correct_gradients(
    gradients: Sequence[Tensor], references: Sequence[Tensor], options: CorrectionOptions
) -> Correction | None:
    """Project opposed gradients; see `ast_plugin.correction.correct`."""
    if options.scope == "off":
        return Correction()
    return correct(gradients, references, scope=options.scope)


def _pattern(name: str, description: str, form: str) -> PatternRecord:
    def parse(text: str) -> Pattern | None:
        return parse_pattern(text) if re.fullmatch(form, text) else None

    return PatternRecord(name=name, description=description, parse=parse)


def _single_path(*, count: int, steps_per_epoch: int | None, **_: object) -> SinglePathOrder:
    if steps_per_epoch is None:
        raise ConfigError(
            "alternation 'single_path' trains one sub-net an epoch and needs to know how long an epoch is: "
            "give steps_per_epoch=len(loader)"
        )
    return SinglePathOrder(count, steps_per_epoch)


def _fixed(*, argument: str | None, names: Sequence[str], default: str, **_: object) -> FixedOrder:
    name = default if argument is None else argument
    if name not in names:
        raise ConfigError(f"alternation 'fixed:{name}' names no sub-net of this run: {near_names(name, names)}")
    return FixedOrder(list(names).index(name))
