"""What a Trainer does otherwise while a run is bound to it: its own methods, called from functions around them.

Only this one object changes, so it may be of any subclass, and is as before when the binding is removed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from transformers import Trainer, TrainerCallback

from ast_plugin.config import ASTConfig
from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import ConfigError, WrapError
from ast_plugin.integrations.around import Around
from ast_plugin.integrations.family.sup_tickets import SupTickets
from ast_plugin.integrations.family.sup_tickets_hosts import recompute_once
from ast_plugin.integrations.transformers.card import write_card
from ast_plugin.integrations.transformers.evaluation import evaluate_each
from ast_plugin.integrations.transformers.saving import save_sub_nets
from ast_plugin.integrations.transformers.state import SavedState, write_state
from ast_plugin.integrations.transformers.weights import fingerprint
from ast_plugin.wrapping import ASTOptions

if TYPE_CHECKING:
    from ast_plugin.integrations.transformers.callback import ASTCallback
    from ast_plugin.training import AlternatingSparseTraining

_logger = logging.getLogger("ast_plugin.transformers")


def attach(
    trainer: Trainer,
    config: ASTConfig | None = None,
    *,
    sup_tickets: SupTickets | int | None = None,
    **options: Unpack[ASTOptions],
) -> ASTCallback:
    """Have a Trainer of any subclass train sub-nets, as with an `ASTCallback` among its callbacks.

    Args:
        trainer: The Trainer; it has not trained yet.
        config: All settings as one object, instead of `options`.
        sup_tickets: Tickets at the end of the run, or how many.
        **options: The settings of `ASTConfig` by name, for example ``sparsities=(0.9, 0.95)``.

    Returns:
        The callback, which has the controller once training has begun.

    Raises:
        ConfigError: If a setting is out of range, or the Trainer has such a callback already.
        WrapError: If it cannot train sub-nets, or has trained already.
        SelectionError: If no parameter of its model can be pruned as asked.

    Example:
        >>> callback = attach(trainer, sparsities=(0.9, 0.95, 0.98))
        >>> trainer.train()
        >>> with callback.sub_net("s95"):
        ...     trainer.predict(test_data)
    """
    from ast_plugin.integrations.transformers.callback import ASTCallback

    return ASTCallback(config, sup_tickets=sup_tickets, **options).bind(trainer)


class Binding:
    """Functions around the methods of one Trainer.

    Args:
        trainer: The Trainer.
        callback: Whose run it is.

    Attributes:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer, callback: ASTCallback) -> None:
        self.trainer = trainer
        self._callback = callback
        self._resumed: str | None = None
        self._in_checkpoint = False
        self._around = Around()
        for name, around in {
            "training_step": self._step,
            "compute_loss": self._compute_loss,
            "prediction_step": self._step,
            "_load_optimizer_and_scheduler": self._load,
            "evaluate": self._evaluate,
            "_determine_best_metric": self._determine_best,
            "_save_checkpoint": self._save_checkpoint,
            "save_model": self._save_model,
            "create_model_card": self._create_card,
        }.items():
            self._around.put(trainer, name, around)

    def remove(self) -> None:
        """Give the Trainer its own methods back, and take the callback out of it."""
        self._around.remove()
        self.trainer.remove_callback(self._callback)

    def take_resumed(self) -> str | None:
        """Return the checkpoint folder that training resumes from, None where it starts anew; asked once a training."""
        folder, self._resumed = self._resumed, None
        return folder

    def recompute(self) -> None:
        """Estimate the BatchNorm statistics of superposed sub-nets from the training data, once there are any."""
        recompute_once(self._callback.sup_tickets, lambda: _TrainingData(self.trainer), _logger)

    def _run(self) -> AlternatingSparseTraining | None:
        """Return the run of the model that the Trainer has now: after training it may have been given another one."""
        ast = self._callback.ast
        return ast if ast is not None and any(ast.model is part for part in self.trainer.model.modules()) else None

    def _load(self, method: Callable[..., Any], checkpoint: str | None, *args: Any, **options: Any) -> Any:
        self._resumed = checkpoint
        return method(checkpoint, *args, **options)

    def _step(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except BaseException:
            # torch tells hooks of ordinary exceptions alone: after Ctrl-C in a forward pass a sub-net would stay on.
            if self._callback.ast is not None:
                self._callback.ast.model.state_dict()
            raise

    def _compute_loss(self, method: Callable[..., Any], model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Have the loss of the networks that the method has drawn for this step, where it draws any."""
        ast = self._callback.ast
        if ast is not None and torch.is_grad_enabled() and ast.model.training:
            # A copy for each: label smoothing takes the labels out of what it is given.
            ast.explore(lambda: method(model, dict(inputs), *args, **options))
        return method(model, inputs, *args, **options)

    def _evaluate(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        ast = self._run()
        if ast is None:
            return method(*args, **options)
        self.recompute()
        return evaluate_each(self.trainer, ast, method, *args, **options)

    def _determine_best(self, method: Callable[..., bool], *args: Any, **options: Any) -> bool:
        """Pass over evaluations from before all sub-nets are as sparse as they are to become."""
        ast = self._run()
        return False if ast is not None and not ast.at_target else method(*args, **options)

    def _save_checkpoint(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._callback.ast is not None:
            self._callback.ast.synchronize_normalization()
            self.recompute()
        self._in_checkpoint = True
        try:
            return method(*args, **options)
        finally:
            self._in_checkpoint = False

    def _save_model(self, method: Callable[..., Any], output_dir: str | None = None, *args: Any, **options: Any) -> Any:
        result = method(output_dir, *args, **options)
        ast, trainer = self._run(), self.trainer
        folder = trainer.args.output_dir if output_dir is None else output_dir
        if ast is None:
            if trainer.args.should_save and (Path(folder) / ELASTIC).exists():
                _logger.warning(
                    f"{folder!r} holds {ELASTIC} of an earlier run, whose sub-nets are not those of the model that was "
                    "saved there now: it has none. Save into another folder, or remove that file"
                )
            return result
        if self._in_checkpoint:
            # Both are collectives where parameters are sharded.
            state = SavedState(run=ast.state_dict(full=True), weights=fingerprint(ast.model))
            if trainer.args.should_save:
                write_state(folder, state)
        if trainer.args.should_save or trainer.is_fsdp_enabled:  # of sharded parameters every rank has a part
            # Sub-nets that are still on their way are of use to a run that goes on, and to nobody else.
            save_sub_nets(ast, folder, elastic=not self._in_checkpoint or ast.at_target)
        if trainer.args.should_save and not self._in_checkpoint:
            write_card(ast, folder)
        return result

    def _create_card(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        ast = self._run()
        if ast is not None and self.trainer.args.should_save:
            write_card(ast, self.trainer.args.output_dir)
        return result


class _TrainingData:
    """The batches of a Trainer's training data, as often as they are asked for; from a loader of their own.

    The one of the training loop may be in the middle of an epoch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loader = trainer.get_train_dataloader()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._loader
        finally:
            end = getattr(self._loader, "end", None)  # accelerate's, which a loop that stops early would leave open
            if callable(end):
                end()


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that has called this callback, found among the callers: events do not name it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


def check_trainer(trainer: object) -> None:
    """Refuse what is no Trainer, and ways to train in which sub-nets cannot be switched.

    Raises:
        ConfigError: If it is no Trainer.
        WrapError: If it trains by DeepSpeed, or by the first version of FSDP.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if trainer.is_deepspeed_enabled:
        raise WrapError(
            "DeepSpeed steps its own optimizer inside backward and keeps weights of its own, so sub-nets cannot be "
            "taken off in time; train without --deepspeed, by torchrun or FSDP version 2"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise WrapError(
            "FSDP version 1 flattens the weights, so masks cannot be put on them; use version 2 "
            '(fsdp_config={"version": 2}; before transformers 5 FSDP_VERSION=2 in the environment), or torchrun '
            "without FSDP"
        )
