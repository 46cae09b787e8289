"""The callback: an alternating sparse run from the beginning of a Trainer's training to its end.

What happens at each event is little, because the run's own hooks on model and optimizer do the work in every step.
What no event offers (evaluation of every sub-net, the files of a checkpoint) is done by a `Binding` to the Trainer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ast_plugin.attachment import is_attached
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ActivationError, ConfigError, StateError, WrapError
from ast_plugin.integrations.callback_settings import CallbackSettings
from ast_plugin.integrations.family.sup_tickets import SupTickets
from ast_plugin.integrations.family.sup_tickets_flags import SETTING, sup_tickets_of
from ast_plugin.integrations.family.sup_tickets_hosts import further_versions
from ast_plugin.integrations.metric_names import check_metric
from ast_plugin.integrations.transformers.binding import Binding, calling_trainer, check_trainer
from ast_plugin.integrations.transformers.examples import example_inputs
from ast_plugin.integrations.transformers.selection import TransformersSelection
from ast_plugin.integrations.transformers.state import STATE, read_state
from ast_plugin.integrations.transformers.weights import ensure_weights
from ast_plugin.optimizers import innermost_optimizer
from ast_plugin.preview import check_run
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.wrapping import ASTOptions, wrap

_logger = logging.getLogger("ast_plugin.transformers")


class ASTCallback(TrainerCallback):
    """Trains sub-nets in a Hugging Face Trainer, evaluates each of them, saves and resumes them.

    A second ``train()`` of the same Trainer goes on with the masks that the first ended with. One that was broken off,
    or is another trial of a search, starts anew.

    Args:
        config: All settings as one object, instead of `options`; without `total_steps`, which the Trainer knows.
        resume_plain: Whether a checkpoint without sub-nets may be resumed: they start from its weights, and have the
            steps that are left.
        plugins: Plugin objects for this run, asked before the choice of weights for Hugging Face's models.
        sup_tickets: Tickets at the end of the run, or how many; a mapping of their settings by name will do as well.
        **options: The settings of `ASTConfig` by name, and plugin objects by other names, as in `ast_plugin.wrap`.
            ``seed`` is the Trainer's unless given.

    Attributes:
        ast: The controller of the run; None until training begins.
        sup_tickets: Its tickets, if it has any.

    Raises:
        ConfigError: If a setting is out of range or unknown.

    Example:
        >>> trainer = Trainer(..., callbacks=[ASTCallback(sparsities=(0.9, 0.95, 0.98))])
    """

    def __init__(
        self,
        config: ASTConfig | None = None,
        *,
        resume_plain: bool = False,
        plugins: Sequence[object] = (),
        sup_tickets: SupTickets | Mapping[str, Any] | int | None = None,
        **options: Unpack[ASTOptions],
    ) -> None:
        if not isinstance(resume_plain, bool):
            raise ConfigError(f"resume_plain must be True or False, got {resume_plain!r}")
        self.ast: AlternatingSparseTraining | None = None
        self.sup_tickets = None if sup_tickets is None else sup_tickets_of(sup_tickets, SETTING)
        self._settings = CallbackSettings(config, options)
        if self.sup_tickets is not None:
            self._settings.plugins[SETTING] = self.sup_tickets
        self._resume_plain = resume_plain
        self._plugins = [TransformersSelection(), *plugins]  # the last is asked first
        self._binding: Binding | None = None
        self._finished = False

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return self._settings.sub_nets

    def sub_net(self, name: str) -> contextlib.AbstractContextManager[nn.Module]:
        """Put a sub-net on the model for the length of a ``with`` block: for ``predict``, ``generate`` and so on.

        Args:
            name: One of `sub_nets`.

        Raises:
            ActivationError: If training has not begun.
            ConfigError: If there is no such sub-net.
        """
        if self.ast is None:
            raise ActivationError(
                f"there is no sub-net {name!r} yet: they are made when training begins; call trainer.train() first, or "
                "ast_plugin.load(folder, model) for those of an earlier run"
            )
        return self.ast.sub_net(name)

    def bind(self, trainer: Trainer) -> ASTCallback:
        """Tie this callback to a Trainer, as its constructor does where it is among ``callbacks``.

        Args:
            trainer: A Trainer of any subclass that has not trained yet. The callback is added to it, as the first.

        Returns:
            The callback.

        Raises:
            ConfigError: If it has such a callback already, or ``metric_for_best_model`` names no sub-net of this run.
            WrapError: If it cannot train sub-nets, has trained already, or this callback belongs to another one.
            SelectionError: If no parameter of its model can be pruned as asked.
        """
        check_trainer(trainer)
        if self._binding is None:
            _check_untrained(trainer)
        self._bind(trainer)
        return self

    def unbind(self) -> None:
        """Give the Trainer back as it was, with a dense model; the controller can still `save` and switch sub-nets."""
        if self._binding is not None:
            self._binding.remove()
            self._binding = None
        if self.ast is not None:
            self.ast.detach()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tie the callback to the Trainer that is being made, and refuse what cannot work."""
        trainer = calling_trainer(self)
        if trainer is not None:
            check_trainer(trainer)
            self._bind(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the run: model and optimizer are as they will stay, and checkpoints have been loaded.

        Raises:
            StateError: If the checkpoint that training resumes from has no sub-nets, others, or cannot be found.
            WrapError: If the Trainer has trained without sub-nets before, or cannot train any, and as `wrap`.
            ConfigError: If `total_steps` is not the Trainer's, and as `wrap`.
            SelectionError: As `wrap`.
        """
        trainer = calling_trainer(self)
        if trainer is None:
            raise WrapError(
                "ASTCallback runs in a transformers.Trainer alone; in a loop of your own call ast_plugin.wrap"
            )
        late = self._binding is None
        if late:
            check_trainer(trainer)
            if state.global_step == 0:
                _check_untrained(trainer)
        binding = self._bind(trainer)
        folder = binding.take_resumed()
        if late and state.global_step > 0:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            if not os.path.isdir(folder):
                raise StateError(
                    f"training resumes at step {state.global_step} from a folder that is not {folder!r}, and the "
                    "callback was added too late to see it; give it to Trainer(callbacks=[...]), or use attach(trainer)"
                )
        self._begin(trainer, state, folder, kwargs.get("train_dataloader"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run; where the Trainer has loaded the best checkpoint's weights, load its sub-nets too.

        Raises:
            StateError: If that checkpoint has none, or they do not belong to its weights.
        """
        if self.ast is None:
            return
        if self._binding is not None:
            self._binding.recompute()
        superposed = bool(further_versions(self.ast))
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            found = read_state(state.best_model_checkpoint)
            if found is None:
                raise StateError(
                    f"the best model is that of {state.best_model_checkpoint!r}, which has no {STATE}, so its sub-nets "
                    "are not known; load_best_model_at_end=False keeps the last ones"
                )
            ensure_weights(self.ast.model, state.best_model_checkpoint, found.weights)
            self.ast.load_state_dict(found.run)
            if superposed and not further_versions(self.ast):
                _logger.warning(
                    f"The best checkpoint, {state.best_model_checkpoint}, is from before the end, and so are its "
                    "sub-nets: those that sup_tickets made are gone; load_best_model_at_end=False keeps them"
                )
        self.ast.finish()
        self._finished = True
        self.ast.refuse_training(
            "the model carries the sub-nets of a Trainer whose training has ended, and other training would move one "
            "alone; call unbind() on its ASTCallback first, or train() of that Trainer to go on"
        )

    def _bind(self, trainer: Trainer) -> Binding:
        if self._binding is not None and self._binding.trainer is not trainer:
            raise WrapError("this ASTCallback belongs to another Trainer; make one for each")
        handler = trainer.callback_handler
        others = [other for other in handler.callbacks if isinstance(other, ASTCallback) and other is not self]
        if others:
            raise ConfigError("a Trainer takes one ASTCallback, and this one has two; give all sparsities to one")
        if self in handler.callbacks:
            handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)  # before those that save, or stop training by a sub-net's metric
        if self._binding is None:
            config = self._config(trainer, total_steps=1, steps_per_epoch=1)
            check_metric("metric_for_best_model", trainer.args.metric_for_best_model, self.sub_nets)
            if trainer.model is not None:
                if is_attached(trainer.model):
                    raise WrapError(
                        "the model still has the sub-nets of an earlier run; call unbind() on the ASTCallback of its "
                        "Trainer first, or detach() on the controller where there is none"
                    )
                optimizer = trainer.optimizer
                check_run(
                    config,
                    trainer.model,
                    optimizer=optimizer,
                    plugins=self._plugins,
                    keywords=self._settings.plugins,
                    method=self._settings.method,
                    closure=False,
                )
            self._binding = Binding(trainer, self)
        return self._binding

    def _config(self, trainer: Trainer, *, total_steps: int, steps_per_epoch: int | None) -> ASTConfig:
        seed = trainer.args.seed
        return self._settings.config(seed=seed, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def _begin(self, trainer: Trainer, state: TrainerState, folder: str | None, loader: Any) -> None:
        """Make the controller, or keep the one of an earlier ``train()``."""
        optimizer = innermost_optimizer(trainer.optimizer)
        model, called = trainer.model, trainer.model_wrapped
        if self.ast is not None:
            same = self.ast.model is model and self.ast.optimizer is optimizer and self._called is called
            if same and self._finished and folder is None:
                self.ast.refuse_training(None)
                return
            self.ast.detach()
            self.ast = None
        self._finished = False
        found = None if folder is None else read_state(folder)
        if folder is not None and found is None and not self._resume_plain:
            raise StateError(
                f"{folder!r} has no {STATE}: it is a checkpoint without sub-nets; pass resume_plain=True to have them "
                "start from its weights, or resume from another one"
            )
        # A checkpoint has an ordinary model's weights, and one that a method takes over is none before.
        late = self._settings.method is not None and self._settings.method.take_over is not None
        if folder is not None and found is not None and not late:
            ensure_weights(model, folder, found.weights)
        left = state.max_steps if found is not None else state.max_steps - state.global_step
        if left < 1:
            raise ConfigError(
                f"no step is left to train sub-nets in: {state.global_step} of {state.max_steps} are made; raise "
                "num_train_epochs or max_steps"
            )
        wanted = self._settings.given.total_steps
        if wanted not in (None, state.max_steps):
            raise ConfigError(
                f"total_steps={wanted}, and the Trainer makes {state.max_steps}; leave it out, the Trainer knows"
            )
        config = self._config(trainer, total_steps=left, steps_per_epoch=_updates(loader, trainer.args))
        options = self._settings.options(config)
        self._called = called
        example = functools.partial(example_inputs, trainer)
        ast = wrap(optimizer, model, outermost=called, plugins=self._plugins, example_inputs=example, **options)
        try:
            if folder is not None and found is not None:
                if late:
                    ensure_weights(model, folder, found.weights)
                ast.load_state_dict(found.run)
            elif folder is not None:  # what was best had no sub-nets
                state.best_metric = state.best_model_checkpoint = None
        except StateError as error:
            ast.detach()
            raise StateError(f"{str(Path(str(folder)) / STATE)!r}: {error}") from error
        ast.keep_state_elsewhere()
        self.ast = ast
        _logger.info(f"Alternating sparse training: {', '.join(ast.sub_nets)} by {config.method} in turn, {left} steps")


def _check_untrained(trainer: Trainer) -> None:
    """Refuse a Trainer that has trained the model as a whole.

    Raises:
        WrapError: If it has.
    """
    optimizer = trainer.optimizer
    if trainer.state.global_step > 0 or (getattr(optimizer, "_is_accelerate_prepared", False) and optimizer.state):
        raise WrapError(
            "the Trainer has trained without sub-nets before, and its optimizer's state belongs to that training; make "
            "a new one, Trainer(model=trainer.model, ..., callbacks=[ASTCallback(...)])"
        )


def _updates(loader: Any, args: TrainingArguments) -> int | None:
    """Return the optimizer steps of an epoch, None if the data have no length."""
    try:
        batches = len(loader)
    except TypeError:
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)
