"""Rules that draw masks at every step and learn from their losses, instead of updating a mask now and then.

A `ast_plugin.methods.Method` with a `sampler` is one: that is a function which makes a `Sampler` for one sub-net of one
run. The run asks it for the masks of every step, trains the network with the first of them, has the loss of all of them
computed without backward on the step's data, and hands these losses back after the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ast_plugin.channels import ChannelGroups
from ast_plugin.mask_forms import CutMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The masks of one sub-net.

    Attributes:
        masks: By parameter name, bool, or what they keep along their dimensions.
        units: By group name, which units they keep, bool (units,), where they keep whole units and all other weights.
    """

    masks: Mapping[str, Tensor | CutMask]
    units: Mapping[str, Tensor] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerInputs:
    """What a sampler is made for.

    Attributes:
        sub_net: Name of the sub-net.
        sparsity: What the sub-net is to have in the end, in [0, 1): for channels, the share of units that is dropped.
        pattern: Name of its pattern.
        begin: First step at which something is to be learned.
        end: Step from which on its masks are final.
        groups: Groups of channels; None where the run has none.
        shapes: Shapes of the prunable parameters, by name.
        generator: Returns a CPU generator for a step, the same in every process; the only legal source of chance.
    """

    sub_net: str
    sparsity: float
    pattern: str
    begin: int
    end: int
    groups: ChannelGroups | None
    shapes: Mapping[str, tuple[int, ...]]
    generator: Callable[[int], torch.Generator]


class Sampler(Protocol):
    """Draws the masks of one sub-net and learns from their losses."""

    @property
    def is_final(self) -> bool:
        """Whether the masks change no more."""

    def samples(self, step: int) -> Sequence[Sample]:
        """Return the masks to try at a step; the same whenever it is asked for that step.

        The first are those that are trained. Of several, the losses are wanted; one is trained without any. None at
        all: the masks are final.
        """

    def learn(self, step: int, losses: Tensor | None) -> None:
        """Take the losses of a step's masks; called once, after the step.

        Args:
            step: The step.
            losses: float64 (samples,), averaged over micro-batches and processes, finite; None if there was one mask.
        """

    def complete(self) -> None:
        """Make the masks final without any more losses: the run ends."""

    def final(self) -> Sample:
        """Return the final masks.

        Raises:
            StateError: If they are not final.
        """

    def achieved(self) -> float:
        """Return the sparsity of the final masks, in [0, 1], measured as the one that was asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain containers."""

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Make sure that a saved state can be loaded; nothing is changed.

        Raises:
            StateError: If it does not fit or is damaged.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, which has been checked."""
