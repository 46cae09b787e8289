"""The components of one run, built and checked by `ast_plugin.wrap` before anything touches the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ast_plugin.alternation import Alternation
from ast_plugin.channels import ChannelGroups
from ast_plugin.config import ASTConfig
from ast_plugin.gradients import GradientMasks
from ast_plugin.inactive import FrozenInactive
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.parameters import ParameterChoice
from ast_plugin.plugins import PluginRegistry
from ast_plugin.reference import GradientReference
from ast_plugin.rewinding import RewindableActivation
from ast_plugin.sampling import SampledMasks
from ast_plugin.sharding import Layout
from ast_plugin.slots import ParameterSlots
from ast_plugin.statistics import Statistics
from ast_plugin.updates import MaskUpdater


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run is made of.

    Attributes:
        config: The settings.
        names: Names of the sub-nets, in training order.
        default: The sub-net that evaluation uses when none is chosen.
        model: The network, as it was given: inside wrappers or not.
        called: The outermost module that the training loop calls: `model` or one around it.
        bare: The module inside wrappers for compilation and data-parallel use, which names the parameters.
        optimizer: The torch optimizer whose step really runs.
        registry: Plugins, the built-ins among them.
        choices: All parameters, prunable or not, with the reason.
        groups: Which channels belong together; None in a run without channel sub-nets.
        parameters: The prunable parameters.
        local: The parts of them that this rank holds; the same where none is sharded.
        layouts: How they lie on the ranks; None where a rank has all of one.
        method: The rule for mask updates.
        alternation: Which sub-net trains at a step.
        masks: The masks of every sub-net.
        local_masks: The parts of them that this rank holds; the same where nothing is sharded.
        updater: Makes the mask updates.
        sampled: Masks that are drawn at every step, of a method that does so.
        normalization: Private BatchNorm state.
        activation: Puts a sub-net on the model.
        gradients: Masks gradients when backward has ended.
        reference: The previous sub-net's gradient.
        inactive: Freezes inactive weights; None lets them coast.
        grow_initialization: Where regrown weights start: ``keep`` or ``zero``.
        statistics: Counters.
    """

    config: ASTConfig
    names: tuple[str, ...]
    default: str
    model: nn.Module
    called: nn.Module
    bare: nn.Module
    optimizer: torch.optim.Optimizer
    registry: PluginRegistry
    choices: tuple[ParameterChoice, ...]
    groups: ChannelGroups | None
    parameters: ParameterSlots
    local: ParameterSlots
    layouts: Mapping[str, Layout | None]
    method: Method
    alternation: Alternation
    masks: MaskStore
    local_masks: MaskStore
    updater: MaskUpdater
    sampled: SampledMasks
    normalization: PrivateNormalization
    activation: RewindableActivation
    gradients: GradientMasks
    reference: GradientReference
    inactive: FrozenInactive | None
    grow_initialization: Literal["keep", "zero"]
    statistics: Statistics

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the prunable parameters."""
        return any(layout is not None for layout in self.layouts.values())

    @property
    def sharded_gradients(self) -> dict[str, Tensor]:
        """Sharded parameters that a reference gradient is remembered of in the course of the run, by name."""
        if self.config.correction_options.scope == "off" or len(self.names) == 1:
            return {}
        return {name: self.parameters[name] for name, layout in self.layouts.items() if layout is not None}
