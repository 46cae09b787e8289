"""The ten hooks of this package: what a plugin can add, choose and watch.

The loop of a run, with every hook where it is called::

    wrap(optimizer, model, sparsities=..., total_steps=...):
        ast_methods(), ast_patterns(), ast_distributions(), ast_alternations()     # what names stand for
        ast_select_parameters(model, include, exclude)                             # which weights are pruned
        ast_sub_net_switched(training, sub_net)             # the run begins: sub_net trains first

    for batch in loader:
        loss = criterion(model(inputs), targets)        # before the forward pass the scheduled sub-net is put on
        loss.backward()                                 # at its end it is taken off, and the gradients are masked
        optimizer.step()
            if the sub-net's mask update is due, or a rule of training.add_mask_updates asks for one:
                drop, grow, mask the gradient anew
                ast_masks_updated(training, sub_net, step)
            if the step is to be corrected:
                ast_correct_gradients(gradients, references, options, names, sub_net)
            ...                                         # the optimizer's own step
            keep inactive weights to their rule
            ast_step_finished(training, step, sub_net)
            schedule the next sub-net
            ast_sub_net_switched(training, sub_net)     # when it is another one
            if that was the last of total_steps:
                bring sub-nets that are short of their target to it, ast_masks_updated(training, sub_net, step)
                ast_training_finished(training)

A plugin is a module or an object with functions that `hookimpl` marks, named as the hooks are; a function takes those
of its hook's arguments that it wants, by name. A package offers one with an entry point in the group ``ast_plugin``::

    from ast_plugin.hookspecs import MethodRecord, hookimpl

    @hookimpl
    def ast_methods():
        return [MethodRecord.of(my_method)]

Collect hooks ask every plugin and put all records together; two plugins may not offer the same name. First-result
hooks ask the plugins in turn, the last registered first and the built-in last, and take the first answer that is not
None. Observers are all called; what they return is ignored. An exception ends the run with a
`ast_plugin.errors.PluginError` that names plugin and hook, on dense weights.

An object is passed to `ast_plugin.wrap` for one run, in ``plugins`` or by a keyword of its own, under whose name it
then takes part. What it has learned in the course of a run travels in the state of the run if it has these methods::

    def state_dict(self): ...               # tensors and plain containers, which are not changed later
    def load_state_dict(self, state): ...   # called before the run itself goes on from the state
    def check_state(self, state): ...       # may be left out; changes nothing, raises StateError for one that is wrong

A state that was saved without the plugin does not call it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import pluggy
from torch import Tensor, nn

from ast_plugin.alternation import Alternation
from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction
from ast_plugin.distributions import Distribution
from ast_plugin.methods import Method
from ast_plugin.parameters import ParameterChoice
from ast_plugin.patterns import Pattern

if TYPE_CHECKING:
    from ast_plugin.training import AlternatingSparseTraining

PROJECT = "ast_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook whose name it has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Something that users ask for by name.

    Attributes:
        name: The name that users write.
        description: One line for listings, with the source where there is one.
    """

    name: str
    description: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRecord(Record):
    """A method for mask updates.

    Attributes:
        build: Returns the method; its name must be the record's.
    """

    build: Callable[[], Method]

    @classmethod
    def of(cls, method: Method) -> MethodRecord:
        """Return the record of a method that needs no building."""
        return cls(name=method.name, description=method.description, build=lambda: method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternRecord(Record):
    """A pattern of masks, or a family of them such as ``N:M``.

    Attributes:
        parse: Returns the pattern that a text stands for, for example that of ``"2:4"``; None for a text that is not
            of this record's form. Raises `ast_plugin.errors.ConfigError` for one that is, but with illegal numbers.
    """

    parse: Callable[[str], Pattern | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionRecord(Record):
    """A distribution of a sparsity over the layers.

    Attributes:
        function: Returns the target sparsity of every layer of a `ast_plugin.distributions.DistributionRequest`.
    """

    function: Distribution


class AlternationBuilder(Protocol):
    """What makes an order of sub-nets for one run; it is given those of these arguments that its signature takes."""

    def __call__(
        self,
        *,
        count: int,
        seed: int,
        steps_per_epoch: int | None,
        argument: str | None,
        names: Sequence[str],
        default: str,
        sparsities: Sequence[float],
    ) -> Alternation:
        """Return the order.

        Args:
            count: Number of sub-nets.
            seed: The run's seed; the only legal source of chance.
            steps_per_epoch: Optimizer steps of an epoch, if the user told.
            argument: What stands after the colon: ``s95`` of ``"fixed:s95"``; None without a colon.
            names: The sub-nets' names, in order.
            default: Name of the default sub-net.
            sparsities: The sub-nets' target sparsities, in [0, 1), in order; of channel sub-nets the share of units.

        Raises:
            ConfigError: If something that this order needs is missing or wrong.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternationRecord(Record):
    """An order in which the sub-nets are trained.

    Attributes:
        build: Makes the order for one run, from those arguments of `AlternationBuilder` that it takes.
        takes_argument: Whether users may write ``"NAME:ARGUMENT"``.
    """

    build: Callable[..., Alternation]
    takes_argument: bool = False


@hookspec
def ast_methods() -> Sequence[MethodRecord]:  # type: ignore[empty-body]  # a specification has none
    """Collect: offer methods for mask updates.

    Called once a run, when the method is looked up.
    """


@hookspec
def ast_patterns() -> Sequence[PatternRecord]:  # type: ignore[empty-body]  # a specification has none
    """Collect: offer patterns of masks.

    Called once a run, when the first pattern is looked up.
    """


@hookspec
def ast_distributions() -> Sequence[DistributionRecord]:  # type: ignore[empty-body]  # a specification has none
    """Collect: offer distributions of a sparsity over the layers.

    Called once a run, when the distribution is looked up.
    """


@hookspec
def ast_alternations() -> Sequence[AlternationRecord]:  # type: ignore[empty-body]  # a specification has none
    """Collect: offer orders of sub-nets.

    Called once a run, when the order is looked up.
    """


@hookspec(firstresult=True)
def ast_select_parameters(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[ParameterChoice] | None:
    """First result: decide which parameters are pruned.

    Called once a run, before anything is changed. The built-in answer is `ast_plugin.parameters.select_parameters`; a
    plugin that knows some networks better calls it too, with `left_out`, and so keeps the user's globs in force.

    Args:
        model: The model, dense; not to be changed.
        include: The user's globs on parameter names that are to be pruned; empty for no restriction.
        exclude: The user's globs on parameter names that are not.

    Returns:
        One choice for every entry of `model.named_parameters()`, in that order; None to leave it to the next plugin.

    Raises:
        SelectionError: If the user's globs cannot be followed; it reaches the user as it is.
    """


@hookspec(firstresult=True)
def ast_correct_gradients(
    gradients: Sequence[Tensor],
    references: Sequence[Tensor],
    options: CorrectionOptions,
    names: Sequence[str],
    sub_net: str,
) -> Correction | None:
    """First result: keep the current sub-net's gradients from opposing the previous sub-net's.

    Called before the optimizer's step, once for all parameters, on steps that are to be corrected. The built-in answer
    is `ast_plugin.correction.correct`.

    Args:
        gradients: The current sub-net's gradients, zero outside its masks; to be changed in place, and to stay zero
            there.
        references: The previous sub-net's gradients before their own correction, zero outside the current masks;
            not to be changed.
        options: The user's choice.
        names: The parameters' names, one a gradient.
        sub_net: Name of the current sub-net.

    Returns:
        What was found and corrected, for the statistics; None, with nothing changed, to leave it to the next plugin.
    """


@hookspec
def ast_sub_net_switched(training: AlternatingSparseTraining, sub_net: str) -> None:
    """Observe: another sub-net is scheduled for the coming step.

    The first call, inside `ast_plugin.wrap`, says that the run begins: all is checked and built, `training.attached` is
    False, and no hook is in place yet. A plugin that needs to know the run before its first step, or to add rules,
    versions and clean-ups, does so then. A state that is loaded later brings no further call.

    Args:
        training: The controller that `ast_plugin.wrap` returns; the model is dense.
        sub_net: Name of the sub-net that trains next.

    Raises:
        ConfigError: In the first call alone, where the plugin finds that the run is not what it needs: it reaches the
            user as it is, and the model is as before `wrap`.
        WrapError: Likewise.
    """


@hookspec
def ast_masks_updated(training: AlternatingSparseTraining, sub_net: str, step: int) -> None:
    """Observe: a sub-net has new masks, `training.masks`.

    The step is not over yet: a checkpoint is to be written in `ast_step_finished`.

    Args:
        training: The controller that `ast_plugin.wrap` returned; the model is dense.
        sub_net: Name of the sub-net.
        step: The optimizer step in which it happened, from 0, before the optimizer's own arithmetic; `total_steps` for
            a sub-net that the last steps left short of its target and that is completed after them.
    """


@hookspec
def ast_step_finished(training: AlternatingSparseTraining, step: int, sub_net: str) -> None:
    """Observe: an optimizer step is over, and the inactive weights have been kept to their rule.

    Called every step, so it should be quick.

    Args:
        training: The controller that `ast_plugin.wrap` returned; the model is dense.
        step: The step, from 0.
        sub_net: Name of the sub-net that was trained.
    """


@hookspec
def ast_training_finished(training: AlternatingSparseTraining) -> None:
    """Observe: the last of `total_steps` is over, or the user called `AlternatingSparseTraining.finish`.

    Args:
        training: The controller that `ast_plugin.wrap` returned; the model is dense.
    """
