"""The controller of an alternating sparse training run: the order of events in a step.

1. Forward in training mode: the scheduled sub-net is put on.
2. Backward: at a mask update the dense gradients are kept aside.
3. End of backward: the sub-net is taken off, and the gradients are masked. At rest the model is dense.
4. Before the optimizer steps: a due mask update, then the correction against the previous sub-net's gradient.
5. The user's optimizer steps.
6. After: inactive weights follow their rule, the next sub-net is scheduled.

Source: Yang, Meng, Seo, Fan: "Get More at Once: Alternating Sparse Training with Gradient Correction", NeurIPS 2022.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ast_plugin.attachment import Attachment
from ast_plugin.channels import ChannelGroups
from ast_plugin.describe import Description, describe
from ast_plugin.distributed import average_over_ranks, ranks
from ast_plugin.errors import ConfigError, WrapError
from ast_plugin.events import RunEvents
from ast_plugin.optimizer_modes import OptimizerModes
from ast_plugin.parts import RunParts
from ast_plugin.recalibration import Forward, recalibrate_each
from ast_plugin.sharding import gathered
from ast_plugin.sliced_routes import way_of
from ast_plugin.step import TrainingStep
from ast_plugin.sub_nets import check_sub_net
from ast_plugin.training_state import RunState
from ast_plugin.training_versions import VersionedRun
from ast_plugin.twins import Twin
from ast_plugin.versions import LAST

_AVERAGED = ("running_mean", "running_var")


class AlternatingSparseTraining(VersionedRun):
    """One ordinary training run that yields several sparse sub-nets on shared weights.

    Made by `ast_plugin.wrap`; the training loop stays as it is. Everything here is safe to call between steps.

    Attributes:
        model: The user's model, dense at rest.
        optimizer: The torch optimizer that the hooks are attached to.
        config: The settings of the run.
        masks: The masks of every sub-net.
    """

    def __init__(self, parts: RunParts) -> None:
        self.model: nn.Module = parts.model
        self.optimizer: torch.optim.Optimizer = parts.optimizer
        self.config = parts.config
        self.masks = parts.masks
        figures: dict[str, dict[str, dict[str, float]]] = {LAST: {name: {} for name in parts.names}}
        step = TrainingStep(parts, self)
        state = RunState(parts, step, figures)
        super().__init__(parts, step, state, RunEvents(parts, step, state), figures)
        self._modes = OptimizerModes(parts, self._events.at_rest)
        self._attachment: Attachment | None = None

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return self._parts.names

    @property
    def default_sub_net(self) -> str:
        """The sub-net that evaluation uses when none is chosen: the densest, unless set otherwise."""
        return self._parts.default

    @property
    def groups(self) -> ChannelGroups | None:
        """Which channels belong together; None in a run without channel sub-nets."""
        return self._parts.groups

    def kept_channels(self, name: str) -> dict[str, Tensor]:
        """Return which channels, hidden units and heads a channel sub-net keeps.

        Args:
            name: One of `sub_nets`.

        Returns:
            By group name, bool (units,), True = kept. For reading only.

        Raises:
            ConfigError: If there is no such sub-net, or its pattern is another one.
        """
        check_sub_net(name, self.sub_nets)
        if not self._parts.updater.plans[name].pattern.by_groups:
            raise ConfigError(f"sub-net {name!r} is no channel sub-net; it drops single weights or blocks of them")
        return self._parts.updater.kept_units(name)

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place; False after `detach`."""
        return self._attachment is not None

    @property
    def history(self) -> dict[str, list[dict[str, Any]]]:
        """Points over time: ``sparsity`` (step, sub_net, target, achieved) and ``conflicts`` by windows of steps."""
        return self._parts.statistics.history()

    @contextlib.contextmanager
    def sub_net(self, name: str) -> Iterator[nn.Module]:
        """Put a sub-net on the model for the length of a ``with`` block, for evaluation or export.

        Blocks may be nested; the earlier sub-net is back on afterwards, also after an exception.

        Args:
            name: One of `sub_nets`.

        Yields:
            The model, computing as that sub-net.

        Raises:
            ConfigError: If there is no such sub-net.
            ActivationError: If the optimizer steps inside the block, or the model was wrapped anew after `detach`.
        """
        check_sub_net(name, self.sub_nets)
        with self._events.choose(name):
            yield self.model

    def describe(self) -> Description:
        """Return the table of all parameters, and of the channel groups: what sub-nets keep of them, or why all."""
        parts, updater = self._parts, self._parts.updater
        kept = {name: updater.kept_units(name) for name, plan in updater.plans.items() if plan.pattern.by_groups}
        compiled = parts.activation.compiled
        computed = way_of(self.config.slicing, parts.called, compiling=compiled, sharded=parts.sharded)
        return describe(parts.choices, self.masks, parts.groups, kept, computed)

    def statistics(self) -> dict[str, Any]:
        """Return counts as a plain mapping.

        Returns:
            ``steps``, ``checks``, ``conflicts``, ``mean_cosine`` of the whole run, and under ``sub_nets`` the same for
            each with its present ``sparsity``, and ``dropped_channels``, a share in [0, 1], of channel sub-nets.
        """
        summary = self._parts.statistics.summary()
        for name, figures in summary["sub_nets"].items():
            figures["sparsity"] = self.masks.sparsity(name)
            if self._parts.updater.plans[name].pattern.by_groups:
                figures["dropped_channels"] = self._parts.updater.achieved(name)
        return summary

    def private_state(self, sub_net: str) -> dict[str, Tensor]:
        """Return copies of a sub-net's private BatchNorm tensors by their names in the bare model's state dict.

        Empty where the model has no BatchNorm, or with ``private_normalization=False``.

        Args:
            sub_net: One of `sub_nets`.

        Returns:
            Affine parameters, running statistics and ``num_batches_tracked``, of the model's dtypes and on its devices;
            where parameters are sharded, the affine ones are DTensors.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        check_sub_net(sub_net, self.sub_nets)
        return self._parts.normalization.state(sub_net)

    def materialize(self, name: str) -> dict[str, Tensor]:
        """Return one sub-net as an ordinary state dict: zeros where it drops weights, its own BatchNorm state.

        Names are those of the bare model, inside wrappers for compilation and data-parallel use. Sharded parameters are
        gathered: a collective.

        Args:
            name: One of `sub_nets`.

        Returns:
            Copies of all entries of the bare model's state dict, of its shapes and dtypes and on its devices.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        with self.sub_net(name):
            return {key: gathered(value).detach().clone() for key, value in self._parts.bare.state_dict().items()}

    def recalibrate(
        self,
        loader: Iterable[Any],
        *,
        sub_nets: Iterable[str] | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
    ) -> None:
        """Estimate the BatchNorm statistics of the sub-nets anew from data; nothing else changes.

        Args:
            loader: Batches; iterated once a sub-net, so it must be re-iterable.
            sub_nets: Which ones, or the name of one; None takes all.
            forward: How to run the model on a batch; None feeds a tensor, the first item of a tuple or list, or the
                items of a mapping as keyword arguments.
            max_batches: How many batches to use for each; None takes all.

        Raises:
            ConfigError: If there is no such sub-net, the loader gives no batch, or several sub-nets share statistics.
        """
        recalibrate_each(
            self.model,
            loader,
            sub_nets=sub_nets,
            known=self.sub_nets,
            put_on=self.sub_net,
            private=self.config.private_normalization,
            forward=forward,
            max_batches=max_batches,
        )

    def twin(self, model: nn.Module) -> Twin:
        """Return what makes another model of the same architecture compute as the sub-nets of this run.

        For averages and copies of the model: `torch.optim.swa_utils.AveragedModel`, exponential moving averages that
        hold the network as ``module``, a ``copy.deepcopy``. Their BatchNorm starts from the run's present one.

        Args:
            model: The other model, on any device.

        Raises:
            WrapError: If it is no module, the parameters to prune are not in it, or a run is training it.
            ConfigError: If the parameters of this run are sharded.

        Example:
            >>> average = ast.twin(torch.optim.swa_utils.AveragedModel(model))
            >>> with average.sub_net("s90") as network:
            ...     evaluate(network)
        """
        if self._parts.sharded:
            raise ConfigError(
                "twin() puts whole masks on a model, and every rank holds a part of them here; save() the run and load "
                "the file beside the other model"
            )
        return Twin(model, self, self._parts.normalization)

    def synchronize_normalization(self) -> None:
        """Average the running BatchNorm statistics of every sub-net over all ranks.

        Every rank estimates them from its own data, and keeps them to itself. Call this on all ranks before they
        evaluate, or before rank 0 saves; it is a collective. Does nothing in a single process.
        """
        if ranks(self.model) == 1:
            return
        with self._events.at_rest(own=False):
            for name in self.sub_nets:
                state = self.private_state(name)
                statistics = {key: tensor for key, tensor in state.items() if key.endswith(_AVERAGED)}
                average_over_ranks(statistics, like=dict(statistics), model=self.model)
                self._parts.normalization.load(name, {**state, **statistics})

    def finish(self) -> None:
        """Say that the run is over, where it was given no `total_steps` that tells.

        Sub-nets that were not trained again after the end of the mask schedule are brought to their target, as happens
        by itself when `total_steps` is reached; then plugins are told. Weights stay as they are.

        Raises:
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
        """
        self._refuse_in_block("finish()")
        if self.step != self.config.total_steps or self._state.cut_short:
            self._step.end()

    def refuse_training(self, reason: str | None) -> None:
        """Have forward passes in training mode raise, between two trainings of a host that goes on with this run.

        A loop that knows nothing of the run would train one sub-net alone, without a sign of it.

        Args:
            reason: What the `ActivationError` says; None lets them run again.
        """
        self._events.refused = reason

    def detach(self) -> nn.Module:
        """Remove every hook and return the model, an ordinary dense model with the default's BatchNorm state.

        Nothing trains sub-nets any more. `sub_net`, `materialize` and `save` still apply the masks to the weights that
        the model has then, until it is wrapped anew.

        Raises:
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
        """
        self._refuse_in_block("detach()")
        self._step.settle()
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            self._events.released = True
        self._modes.detach()
        self._parts.gradients.detach()
        self._parts.activation.release()
        self._clean_up()
        return self.model

    def __reduce__(self) -> NoReturn:
        raise WrapError(
            "a controller has hooks on one model and one optimizer and can be neither copied nor pickled: copy those "
            "two together, copy.deepcopy((model, optimizer)), wrap the copies, and load this controller's state_dict()"
        )

    def attach(self) -> None:
        """Tell plugins that the run begins, and register the hooks; called once, by `wrap`."""
        try:
            self._step.announce()
            self._modes.attach()
            called, bare = self._parts.called, self._parts.bare
            self._attachment = Attachment(called, self.model, bare, self.optimizer, self._events)
        except BaseException:
            self._modes.detach()
            self._clean_up()
            raise
