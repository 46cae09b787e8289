"""The callback: an alternating sparse run from the beginning of a Trainer's fit to its end.

What happens at each event is little, because the run's own hooks on model and optimizer do the work in every step.
What no event offers (steps, validation of every sub-net, files beside checkpoints) is done by a `Binding`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from ast_plugin.attachment import is_attached
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ActivationError, ConfigError, StateError, WrapError
from ast_plugin.integrations.callback_settings import CallbackSettings
from ast_plugin.integrations.frameworks.lightning.binding import Binding, StepModule
from ast_plugin.integrations.frameworks.lightning.checks import (
    check_callbacks,
    check_mode,
    check_strategy,
    network_of,
    optimizer_of,
)
from ast_plugin.integrations.frameworks.lightning.files import load_best, write_end
from ast_plugin.integrations.frameworks.lightning.host import example_inputs, gives_closures, global_seed, pl
from ast_plugin.integrations.frameworks.lightning.steps import steps_left, steps_per_epoch
from ast_plugin.integrations.timm.selection import TimmSelection
from ast_plugin.integrations.transformers.selection import TransformersSelection
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.preview import check_run
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.wrapping import ASTOptions, wrap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_logger = logging.getLogger("ast_plugin.lightning")

_RUN = "run"


class ASTCallback(pl.Callback):
    """Trains sub-nets in a Lightning Trainer, validates and tests each of them, saves and resumes them.

    A second ``fit()`` with the same model goes on with the masks that the first ended with. One that was broken off
    starts anew.

    Args:
        config: All settings as one object, instead of `options`; `total_steps` only where Lightning cannot know it.
        network: The attribute of the LightningModule that holds the network, for example ``"model"``: its weights are
            pruned, and have the names that they have in it. None: those of the LightningModule. Needed with manual
            optimization.
        folder: Where ``elastic.safetensors`` and ``ast_config.json`` are written at the end of a fit. None: Lightning's
            folder for logs, or ``default_root_dir``, unless ``Trainer(enable_checkpointing=False)``.
        load_best: Whether to load weights and sub-nets of the best checkpoint at the end of a fit.
        resume_plain: Whether a checkpoint without sub-nets may be resumed: they start from its weights, and have the
            steps that are left.
        plugins: Plugin objects for this run, asked before the choices of weights for timm's and Hugging Face's models.
        **options: The settings of `ASTConfig` by name. ``seed`` is that of ``seed_everything`` unless given.

    Attributes:
        ast: The controller of the run; None until training begins.

    Raises:
        ConfigError: If a setting is out of range or unknown.

    Example:
        >>> trainer = Trainer(..., callbacks=[ASTCallback(sparsities=(0.9, 0.95, 0.98))])
    """

    def __init__(
        self,
        config: ASTConfig | None = None,
        *,
        network: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        load_best: bool = False,
        resume_plain: bool = False,
        plugins: Sequence[object] = (),
        **options: Unpack[ASTOptions],
    ) -> None:
        for name, value in (("load_best", load_best), ("resume_plain", resume_plain)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        if network is not None and not (isinstance(network, str) and network):
            raise ConfigError(f"network must be the name of an attribute, such as 'model', got {network!r}")
        self.ast: AlternatingSparseTraining | None = None
        self.step_module: StepModule | None = None
        self._settings = CallbackSettings(config, options)
        self._network = network
        self._folder = folder
        self._load_best = load_best
        self._resume_plain = resume_plain
        self._plugins = [TimmSelection(), TransformersSelection(), *plugins]  # the last is asked first
        self._binding: Binding | None = None
        self._stage = ""
        self._loaded: Any = None
        self._begun = False
        self._finished = False

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return self._settings.sub_nets

    def sub_net(self, name: str) -> contextlib.AbstractContextManager[nn.Module]:
        """Put a sub-net on the model for the length of a ``with`` block: for ``test``, ``predict`` and so on.

        Args:
            name: One of `sub_nets`.

        Raises:
            ActivationError: If training has not begun.
            ConfigError: If there is no such sub-net.
        """
        if self.ast is None:
            raise ActivationError(
                f"there is no sub-net {name!r} yet: they are made when training begins; call trainer.fit() first, or "
                "ast_plugin.load(file, model) for those of an earlier run or of other processes"
            )
        return self.ast.sub_net(name)

    def unbind(self) -> None:
        """Give Trainer and model back as they were, dense; the controller can still `save` and switch sub-nets."""
        if self._binding is not None:
            self._binding.remove()
            self._binding = None
        if self.ast is not None:
            self.ast.detach()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bind the callback to the Trainer.

        Raises:
            ConfigError: If the Trainer has two such callbacks.
            WrapError: If its strategy cannot train sub-nets.
        """
        if [type(other).__name__ for other in trainer.callbacks].count(type(self).__name__) > 1:
            raise ConfigError("a Trainer takes one ASTCallback, and this one has two; give all sparsities to one")
        if stage == "fit":
            check_strategy(trainer)
        if self._binding is not None:
            self._binding.remove()
        trainer.callbacks.remove(self)
        trainer.callbacks.insert(0, self)  # before those that save, or stop training by a sub-net's metric
        self._binding = Binding(trainer, self)
        self._stage, self._loaded, self._begun = stage, None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before training begins.

        Raises:
            ConfigError: If a setting does not fit the Trainer or the model.
            SelectionError: If no parameter can be pruned as asked.
            StateError: If the checkpoint that training resumes from has no sub-nets.
            WrapError: If the model cannot be trained so.
        """
        network = network_of(pl_module, self._network)
        if is_attached(network) and not (self.ast is not None and self.ast.model is network):
            raise WrapError(
                "the model still has the sub-nets of an earlier run; call unbind() on its ASTCallback first, or "
                "detach() on the controller where there is none"
            )
        private = (
            self._settings.given.private_normalization and len(self.sub_nets) > 1 and bool(batch_norm_modules(network))
        )
        check_callbacks(trainer, self.sub_nets, private=private)
        check_run(
            self._config(total_steps=1, steps_per_epoch=1),
            network,
            optimizer=optimizer_of(trainer, network),
            plugins=self._plugins,
            keywords=self._settings.plugins,
            method=self._settings.method,
            closure=gives_closures(trainer),
        )
        if trainer.ckpt_path is not None and self._loaded is None and not self._resume_plain:
            raise StateError(
                f"{str(trainer.ckpt_path)!r} is a checkpoint without sub-nets; pass resume_plain=True to have them "
                "start from its weights, or resume from another one"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the run, as `on_train_start` does, which comes later."""
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the run: model and optimizer are as they will stay, and checkpoints have been loaded.

        Raises:
            ConfigError: If `total_steps` is not Lightning's, and as `wrap`.
            SelectionError: As `wrap`.
            StateError: If the checkpoint that training resumes from has other sub-nets.
            WrapError: As `wrap`.
        """
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compute the losses that a method which draws masks at every step learns from."""
        if self._binding is not None:
            self._binding.explore(batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how sparse every sub-net is."""
        evaluations = None if self._binding is None else self._binding.evaluations
        for name, sparsity in ({} if evaluations is None else evaluations.sparsities()).items():
            self.log(name, sparsity, sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how sparse every sub-net is."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics of the default sub-net, before a checkpoint is written."""
        if self._binding is not None and self._binding.evaluations is not None:
            self._binding.evaluations.note()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics of the default sub-net."""
        self.on_validation_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to evaluate weights of a checkpoint that has no sub-nets.

        Raises:
            StateError: If it is one.
        """
        if self._stage != "fit" and trainer.ckpt_path is not None and self.ast is not None and self._loaded is None:
            raise StateError(
                f"{str(trainer.ckpt_path)!r} is a checkpoint without sub-nets, and those of the last fit do not belong "
                "to its weights; call unbind() and leave this callback out, or take another checkpoint"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self.on_validation_start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the model dense: after Ctrl-C in a forward pass a sub-net would stay on."""
        if self.ast is not None and self.ast.attached:
            self.ast.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint; empty before it has begun."""
        return {} if self.ast is None else {_RUN: self.ast.state_dict(full=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a run from a checkpoint: at once for an evaluation, when training begins otherwise.

        Raises:
            StateError: If it belongs to other sub-nets, or there is no run that it could be loaded into.
        """
        if self._stage == "fit":
            self._loaded = state_dict
        elif self.ast is not None:
            self.ast.load_state_dict(state_dict[_RUN])
            self._loaded = state_dict
        else:
            raise StateError(
                "the checkpoint has sub-nets, which are made in fit(), and there was none; evaluate those of the "
                "elastic file beside it: with ast_plugin.load(file, model).sub_net(name), and leave this callback out"
            )

    def end(self, trainer: Trainer) -> None:
        """End the run: load the best checkpoint where that was asked for, and write the files.

        Args:
            trainer: The Trainer, all of whose other callbacks have ended.

        Raises:
            StateError: If the best checkpoint cannot be loaded.
            SaveError: If a file cannot be written.
        """
        ast = self.ast
        if ast is None:
            return
        best = load_best(trainer, self.state_key) if self._load_best else None
        if best is not None:
            ast.load_state_dict(best[_RUN])
        ast.finish()
        ast.synchronize_normalization()
        self._finished = True
        ast.refuse_training(
            "the model carries the sub-nets of a Trainer whose fit has ended, and other training would move one "
            "alone; call unbind() on its ASTCallback first, or fit() with that callback to go on"
        )
        write_end(trainer, ast, self._folder)

    def _config(self, *, total_steps: int | None, steps_per_epoch: int | None) -> ASTConfig:
        seed = global_seed() or 0
        return self._settings.config(seed=seed, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the controller, from the state of a checkpoint or of an earlier fit where there is one."""
        if self._begun:
            return
        network = network_of(module, self._network)
        check_mode(module, network)
        left = steps_left(trainer, module, self._settings.given.total_steps, resumed=self._loaded is not None)
        config = self._config(total_steps=left, steps_per_epoch=steps_per_epoch(trainer))
        state = None if self._loaded is None else self._loaded[_RUN]
        if self.ast is not None:
            if self._finished and self.ast.model is network and trainer.ckpt_path is None:
                config, state = self.ast.config, self.ast.state_dict()
            self.ast.detach()
            self.ast = None
        called = StepModule(trainer.strategy.model) if module.automatic_optimization else None
        ast = wrap(
            optimizer_of(trainer, network),
            network,
            outermost=called,
            plugins=self._plugins,
            example_inputs=functools.partial(example_inputs, module, network),
            **self._settings.options(config),
        )
        try:
            if state is not None:
                ast.load_state_dict(state)
        except StateError as error:
            ast.detach()
            raise StateError(f"{str(trainer.ckpt_path)!r}: {error}") from error
        ast.keep_state_elsewhere()
        self.ast, self.step_module = ast, called
        self._begun, self._finished, self._loaded = True, False, None
        _logger.info(f"Alternating sparse training: {', '.join(ast.sub_nets)} by {config.method} in turn")
