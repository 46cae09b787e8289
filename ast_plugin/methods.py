"""Rules for mask updates: each is a drop score, a grow score and a schedule, or decides the masks itself.

A method says *which* weights are worth keeping and *when* the sparsity changes; how a score becomes a mask
is the pattern's business, and how the sparsity is spread over the layers the distribution's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroup
from ast_plugin.errors import PluginError
from ast_plugin.samplers import Sampler, SamplerInputs
from ast_plugin.schedules import constant_sparsity, cubic_sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """What a score may look at, for one parameter.

    Attributes:
        weight: Dense weights, any shape, floating point; not to be changed.
        gradient: Dense gradient of the same shape, summed over the micro-batches of the step; None unless the
            method asks for it.
        mask: The sub-net's present mask, bool, same shape, True = kept.
        generator: CPU generator seeded for this sub-net, step and parameter; the only legal source of chance.
    """

    weight: Tensor
    gradient: Tensor | None
    mask: Tensor
    generator: torch.Generator


Score = Callable[[ScoreInputs], Tensor]


def magnitude(inputs: ScoreInputs) -> Tensor:
    """Return ``|w|``: same shape as the weight, never negative."""
    return inputs.weight.detach().abs()


def gradient_magnitude(inputs: ScoreInputs) -> Tensor:
    """Return ``|dL/dw|`` of the dense gradient (Evci et al. 2020, algorithm 1); without a gradient, zeros."""
    if inputs.gradient is None:
        return torch.zeros_like(inputs.weight)
    return inputs.gradient.detach().abs()


def chance(inputs: ScoreInputs) -> Tensor:
    """Return uniform random numbers in [0, 1), the same on every device and in every process."""
    numbers = torch.rand(inputs.weight.shape, generator=inputs.generator)
    return numbers.to(inputs.weight.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelScoreInputs:
    """What a score of whole units may look at, for one channel group.

    Attributes:
        group: The group.
        weights: The prunable weights that its units lie in, dense, by parameter name; not to be changed.
        gradients: Their dense gradients, where there are any; None unless the method asks for them.
        kept: The units that the sub-net keeps now, bool (units,).
        generator: CPU generator seeded for this sub-net, step and group; the only legal source of chance.
        states: The other tensors that its units lie in (biases, normalization), by name, with the values that they
            have in the sub-net; not to be changed.
        model: The network, for what tensors do not tell: kinds of layers, how many groups a convolution has. Its
            tensors may be those of another sub-net. None outside of a run.
    """

    group: ChannelGroup
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None
    kept: Tensor
    generator: torch.Generator
    states: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    model: nn.Module | None = None


ChannelScore = Callable[[ChannelScoreInputs], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskInputs:
    """What a method that decides masks itself may look at, for one sub-net at one moment.

    Attributes:
        sub_net: The sub-net's name.
        step: The optimizer step, from 0; -1 for the first masks, before the first step.
        sparsity: What is asked of the sub-net now, in [0, 1).
        layer_sparsities: The same, spread over the parameters by the run's distribution: in [0, 1] by parameter name.
        drop_fraction: Share of the kept weights that the schedule would replace now, in [0, 1); 0 for the first masks
            and where nothing is to regrow.
        weights: Dense weights by parameter name, any floating dtype; not to be changed.
        gradients: Their dense gradients, where there are any; None unless the method asks for them.
        masks: The sub-net's present masks by parameter name, bool; None for the first ones. Not to be changed.
        generator: CPU generator seeded for this sub-net and step; the only legal source of chance.
    """

    sub_net: str
    step: int
    sparsity: float
    layer_sparsities: Mapping[str, float]
    drop_fraction: float
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None
    masks: Mapping[str, Tensor] | None
    generator: torch.Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskDecision:
    """What a method decided for one sub-net.

    Attributes:
        masks: One bool mask a parameter, of its shape, by parameter name.
        restarted: Weights that begin anew where the run lets regrown weights start at zero: bool masks by parameter
            name, inside `masks`; parameters without any may be left out. None: those that were not kept before.
    """

    masks: Mapping[str, Tensor]
    restarted: Mapping[str, Tensor] | None = None


class SparsitySchedule(Protocol):
    """A sparsity as a pure function of the step."""

    def __call__(self, step: int, *, begin: int, end: int, initial: float, final: float) -> float:
        """Return the sparsity at `step`, in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A rule for mask updates.

    Attributes:
        name: How users ask for it.
        description: One line for listings, with the source.
        drop_score: Score by which weights are kept: the lowest are dropped first.
        grow_score: Score by which dropped weights come back: the highest first. None: nothing regrows.
        needs_gradient: Whether `grow_score`, `drop_score` or `decide` read the dense gradient.
        sparsity_schedule: The sparsity as a function of the step.
        reselect: True: every update picks the mask anew from all weights by `drop_score` (GMP, GraNet).
            False: masks start at random and change by drop and regrow alone (SET, RigL).
        updates: False: the first mask is the last (static).
        initial_sparsity: Sparsity at the start of the ramp; None: the target from the start.
        distribution: The distribution that the source prescribes.
        grow_initialization: ``keep``: regrown weights go on from their shared value; ``zero``: from zero. Units of
            channel sub-nets always go on from theirs: rows and columns of zeros would get no gradient.
        channel_score: One score a unit, (units,), in place of `drop_score` in channel sub-nets; None: the mean of
            `drop_score` over the weights of the unit. It is asked once for each group before the first step, also
            where nothing is dropped yet, so that what it cannot score is known then; there is no gradient at that time.
        needs_channels: Whether it makes sense for channel sub-nets alone; a run without any is refused.
        sampler: Makes what draws new masks at every step of a run and learns from their losses, in place of mask
            updates, whose scores then only make the masks before the first step. None: nothing does.
        decide: Decides all masks of a sub-net in one call, in place of the scores: the first ones and those of every
            update. It answers with a decision or with the masks alone, which are checked, and taken as they are; or
            with None to leave these masks to the scores.
        is_due: Whether a sub-net, trained at a step (from 0) and before that at another (None: never), has an update
            to make now; a pure function. None: the run's own calendar says so, with `update_interval`, `begin_step` and
            `end_step`, which have no meaning otherwise.
        take_over: Called first by `ast_plugin.wrap` with the optimizer and the model, inside wrappers: has both as
            they are in ordinary training, each prunable weight a parameter of its own. What it returns is called
            without arguments to undo it, if wrap fails then. None: nothing is to be done.

    A method that also has functions which `ast_plugin.hookimpl` marks takes part in its run as a plugin, too.
    """

    name: str
    description: str
    drop_score: Score = magnitude
    grow_score: Score | None = None
    needs_gradient: bool = False
    sparsity_schedule: SparsitySchedule = constant_sparsity
    reselect: bool = False
    updates: bool = True
    initial_sparsity: float | None = None
    distribution: str = "erk"
    grow_initialization: Literal["keep", "zero"] = "keep"
    channel_score: ChannelScore | None = None
    needs_channels: bool = False
    sampler: Callable[[SamplerInputs], Sampler] | None = None
    decide: Callable[[MaskInputs], MaskDecision | Mapping[str, Tensor] | None] | None = None
    is_due: Callable[[int, int | None], bool] | None = None
    take_over: Callable[[torch.optim.Optimizer, nn.Module], Callable[[], None]] | None = None


def scores_of(method: Method, score: Score, inputs: ScoreInputs) -> Tensor:
    """Return what a score of a method says of one parameter.

    Raises:
        PluginError: If it returns something else than a floating-point tensor of the weight's shape, on its device.
    """
    scores = score(inputs)
    if (
        not isinstance(scores, Tensor)
        or scores.shape != inputs.weight.shape
        or not scores.is_floating_point()
        or scores.device != inputs.weight.device
    ):
        found = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise PluginError(
            f"a score of method {method.name!r} returned {found}; it must return a floating-point tensor of "
            f"the weight's shape {tuple(inputs.weight.shape)} on {inputs.weight.device}"
        )
    return scores


STATIC = Method(
    name="static",
    description="random masks by distribution, fixed for the whole run",
    drop_score=chance,
    updates=False,
)

SET = Method(
    name="set",
    description="drop the smallest magnitudes, grow at random (Mocanu et al. 2018)",
    drop_score=magnitude,
    grow_score=chance,
    grow_initialization="zero",
)

RIGL = Method(
    name="rigl",
    description="drop the smallest magnitudes, grow where the dense gradient is largest (Evci et al. 2020)",
    drop_score=magnitude,
    grow_score=gradient_magnitude,
    needs_gradient=True,
    grow_initialization="zero",
)

GMP = Method(
    name="gmp",
    description="cubic ramp of the sparsity, smallest magnitudes go (Zhu and Gupta 2017)",
    drop_score=magnitude,
    sparsity_schedule=cubic_sparsity,
    reselect=True,
    initial_sparsity=0.0,
    distribution="global",
)

GRANET = Method(
    name="granet",
    description="GMP's ramp with drop and gradient regrowth at each update (Liu et al. 2021); the AST paper's",
    drop_score=magnitude,
    grow_score=gradient_magnitude,
    needs_gradient=True,
    sparsity_schedule=cubic_sparsity,
    reselect=True,
    initial_sparsity=0.0,
    distribution="global",
)

BUILT_IN_METHODS: tuple[Method, ...] = (STATIC, SET, RIGL, GMP, GRANET)
