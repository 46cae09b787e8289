"""What a run reads and writes: its state, checkpoints, the elastic file."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ast_plugin.checkpoint import Stateful, load_objects, save_objects
from ast_plugin.distributed import is_first_rank, ranks
from ast_plugin.elastic_file import write_elastic
from ast_plugin.errors import ConfigError
from ast_plugin.events import RunEvents
from ast_plugin.parts import RunParts
from ast_plugin.sharded_masks import ShardedMasks
from ast_plugin.sharding import gathered
from ast_plugin.step import TrainingStep
from ast_plugin.sub_nets import check_sub_net
from ast_plugin.training_exchange import with_fixed_entries, with_plain_entries
from ast_plugin.training_state import RunState
from ast_plugin.twins import Twin
from ast_plugin.versions import LAST

_FAR_FROM_TARGET = 0.01  # in sparsity: more than patterns with large units leave over


class SavedRun(abc.ABC):
    """The part of a controller that saves and loads.

    Args:
        parts: The run's components.
        step: Its optimizer steps.
        state: What travels in the optimizer's state dict.
        events: What happens at each event of the training loop.

    """

    def __init__(self, parts: RunParts, step: TrainingStep, state: RunState, events: RunEvents) -> None:
        self._parts = parts
        self._step = step
        self._state = state
        self._events = events

    @property
    @abc.abstractmethod
    def metrics(self) -> dict[str, dict[str, float]]:
        """Measured figures by sub-net, by name."""

    @abc.abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Return counts as a plain mapping."""

    @abc.abstractmethod
    def private_state(self, sub_net: str) -> dict[str, Tensor]:
        """Return copies of a sub-net's private BatchNorm tensors by their names in the bare model's state dict."""

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Return the state of the run as tensors and plain containers, readable with ``weights_only=True``.

        It travels in ``optimizer.state_dict()`` by itself; call this to keep it elsewhere, or hand the controller to
        what calls it: `torch.distributed.checkpoint`, a library's ``register_for_checkpointing``. Where parameters are
        sharded, this is a collective, and masks and reference gradient are DTensors.

        Args:
            full: Whether to gather DTensors, so that the state can be loaded where nothing is sharded.
        """
        with self._events.at_rest():
            if full:
                return with_fixed_entries(self._state.collect(whole=True))
            return with_fixed_entries(self._state.collect(), self._parts.sharded_gradients)

    def keep_state_elsewhere(self) -> None:
        """Leave the optimizer's state dict as it is without a run, for hosts with a place of their own for the state.

        A state that an optimizer's state dict holds is still taken when it is loaded.
        """
        self._events.state_in_optimizer = False

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Model and optimizer bring their own state back themselves.

        What an optimizer's state dict holds under ``ast_plugin`` is taken as well.

        Args:
            state: The state; it is not changed.

        Raises:
            StateError: If it is no state, is damaged, or belongs to other sub-nets or parameters; nothing has been
                changed then.
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
        """
        self._events.before_load()
        self._state.restore(with_plain_entries(state))

    @property
    def at_target(self) -> bool:
        """Whether every sub-net that has been trained is as sparse as it is to become: all ramps are over."""
        step, updater = self._step, self._parts.updater
        trained = [name for name, last in step.last_steps.items() if last is not None] or self._parts.names
        return self._parts.sampled.is_final and all(
            updater.sparsity_at(name, step.last_steps[name] or 0) >= updater.plans[name].target_sparsity
            for name in trained
        )

    def is_near_target(self, sub_net: str) -> bool:
        """Return whether a sub-net is as sparse as it is to become, to a hundredth, by masks that are not drawn anew.

        Args:
            sub_net: Its name.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        check_sub_net(sub_net, self._parts.names)
        updater = self._parts.updater
        missing = abs(updater.reachable(sub_net) - updater.achieved(sub_net))
        return self._parts.sampled.is_final and missing <= _FAR_FROM_TARGET

    def save(
        self,
        path: str | Path,
        *,
        report: Mapping[str, Any] | None = None,
        twin: Twin | None = None,
        version: str | None = None,
    ) -> None:
        """Write all sub-nets into one elastic file, readable by `ast_plugin.load` and by any safetensors reader.

        Call it on one rank; where parameters are sharded, on all: they are gathered, and the first rank writes.

        Args:
            path: The file; an older one is replaced only when the new one is complete.
            report: A report as plain containers to keep in the file's header.
            twin: What `AlternatingSparseTraining.twin` returned: its weights and BatchNorm are written instead of the
                model's, without `metrics`, which were measured on the model.
            version: Which of `versions` to write, with the metrics of that one; None: the one that is on, inside
                ``with version(...)``, otherwise `preferred_version`, or with a twin the last one.

        Raises:
            SaveError: If the file cannot be written; an older file is still there then.
            ConfigError: If `twin` is something else, there is no such version, a twin is to be written as another
                version than the last, or something in `report` cannot be stored.
            ActivationError: If the twin is a sub-net now, inside its ``with sub_net(...)``, or tensors of the sub-nets
                are no longer in the model.

        Warns:
            UserWarning: If a sub-net is far from its target, because its mask schedule has not ended.
        """
        if twin is not None and not isinstance(twin, Twin):
            raise ConfigError(
                f"twin must be what twin() of this controller returned, got {type(twin).__name__}; pass "
                "twin=ast.twin(model)"
            )
        versions = self._events.versions
        written = version
        if written is None:
            written = versions.open or (versions.preferred if twin is None else LAST)
        versions.check(written)
        if twin is not None and (written != LAST or versions.on != LAST):
            raise ConfigError(
                f"a twin has the masks of the last version, and version {written!r} was asked for; leave out twin or "
                "version, and the block of another version"
            )
        with contextlib.nullcontext() if written == versions.on else self._events.version(written):
            self._write(Path(path), report, twin)

    def _write(self, path: Path, report: Mapping[str, Any] | None, twin: Twin | None) -> None:
        now = self._step.number
        for name, plan in self._parts.updater.plans.items():
            if not self.is_near_target(name):
                warnings.warn(
                    f"sub-net {name!r} is saved with sparsity {self._parts.updater.achieved(name):.3f}; its target is "
                    f"{plan.target_sparsity:.3f}, which the masks reach at step {plan.calendar.end} (now {now})"
                    + ("; call finish() when the run is over" if now >= plan.calendar.end else ""),
                    stacklevel=3,
                )
        header: dict[str, Any] = {
            "config": self._parts.config.to_dict(),
            "default_sub_net": self._parts.default,
            "sub_nets": [
                {"name": plan.name, "target_sparsity": plan.target_sparsity, "pattern": plan.pattern.name}
                for plan in self._parts.updater.plans.values()
            ],
            "metrics": self.metrics if twin is None else {},
            "statistics": self.statistics(),
            "history": self._parts.statistics.history(),
            "step": self._step.number,
        }
        if self._events.versions.on != LAST:
            header["version"] = self._events.versions.on
        if self._parts.groups is not None:
            header["channel_groups"] = [group.to_dict() for group in self._parts.groups.groups]
        if report is not None:
            header["report"] = dict(report)
        if twin is None:
            self._parts.activation.check_tensors()
        with self._events.at_rest(own=False):
            state = self._parts.bare.state_dict() if twin is None else twin.dense_state()
            masks, private = self._parts.masks, {name: (twin or self).private_state(name) for name in self._parts.names}
            if isinstance(masks, ShardedMasks):
                state, private, masks = gathered(state), gathered(private), masks.gathered()
            if masks is self._parts.masks or is_first_rank(self._parts.model):
                write_elastic(path, state=state, masks=masks, private=private, header=header)

    def save_checkpoint(self, path: str | Path, *, random_state: bool = True, **extra: Any) -> None:
        """Write everything that goes on from here: model, optimizer with the state of the run, and what else is given.

        The file takes the place of an older one only when it is complete; a process that is killed leaves one or the
        other. ``torch.load(path, weights_only=True)`` reads it too. Call it between two steps, and on one rank only.

        Args:
            path: The file.
            random_state: Whether to save the global random generators of Python, NumPy and torch as well. In a run of
                several processes, each of which has its own, they are left out.
            **extra: By name, objects with ``state_dict()`` and ``load_state_dict()`` such as schedulers and gradient
                scalers, and values: tensors, numbers, strings and containers of them.

        Raises:
            ConfigError: If something cannot be loaded with ``weights_only=True``, a name is taken, or parameters are
                sharded: `torch.distributed.checkpoint` saves those.
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
            SaveError: If the file cannot be written; an older file is still there then.
        """
        self._refuse_in_block("save_checkpoint()")
        self._step.settle()
        save_objects(path, self._checkpointed(), extra, random_state=random_state and ranks() == 1)

    def load_checkpoint(self, path: str | Path, *, random_state: bool = True, **objects: Stateful) -> dict[str, Any]:
        """Go on from what `save_checkpoint` wrote.

        Everything is loaded or nothing: after an error all objects are as they were.

        Args:
            path: The file.
            random_state: Whether to restore the global random generators, where the file has them.
            **objects: The objects that were saved beside model and optimizer, under the same names.

        Returns:
            The values that were saved, by name.

        Raises:
            StateError: If the file is missing or damaged, holds other objects, or does not fit this run.
            ConfigError: If a name is taken, something given cannot load a state, or parameters are sharded.
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
        """
        self._refuse_in_block("load_checkpoint()")
        return load_objects(path, self._checkpointed(), objects, random_state=random_state)

    def _refuse_in_block(self, call: str) -> None:
        self._events.refuse(call)

    def _checkpointed(self) -> dict[str, Any]:
        if self._parts.sharded:
            raise ConfigError(
                "save_checkpoint() and load_checkpoint() know one file, and every rank holds a part of this model; use "
                'torch.distributed.checkpoint: dcp.save({"app": ..., "ast": ast}, checkpoint_id=...)'
            )
        return {"model": self._parts.bare, "optimizer": self._parts.optimizer}
