"""What a Trainer does otherwise while a run is bound to it: its own methods, called from functions around them.

Lightning calls ``training_step``, which is no forward of any module. Here it is: of a module around the
LightningModule, whatever the step calls in it. So the run sees the beginning of a step and the graph that comes of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ast_plugin.integrations.around import Around
from ast_plugin.integrations.frameworks.lightning.evaluation import Evaluations, logging_by
from ast_plugin.integrations.frameworks.lightning.files import elastic_beside, local_path
from ast_plugin.integrations.frameworks.lightning.host import evaluation_loops, is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from ast_plugin.integrations.frameworks.lightning.callback import ASTCallback
    from ast_plugin.training import AlternatingSparseTraining

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class StepModule(nn.Module):
    """A module around what a strategy trains, whose forward is a step of the strategy.

    Args:
        module: The LightningModule, possibly inside a data-parallel module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what the step returns."""
        return step(*args, **options)


class Binding:
    """Functions around the methods of one Trainer, its strategy, loops and callbacks.

    Args:
        trainer: The Trainer.
        callback: Whose run it is.

    Attributes:
        trainer: The Trainer.
        evaluations: Those that are going on; None otherwise.
    """

    def __init__(self, trainer: Trainer, callback: ASTCallback) -> None:
        self.trainer = trainer
        self.evaluations: Evaluations | None = None
        self._callback = callback
        self._around = Around()
        for name in _STEPS:
            self._around.put(trainer.strategy, name, self._step)
        self._around.put(trainer.strategy, "on_train_end", self._train_end)
        self._around.put(trainer.strategy, "remove_checkpoint", self._remove_checkpoint)
        self._around.put(trainer, "save_checkpoint", self._save_checkpoint)
        for loop in evaluation_loops(trainer):
            self._around.put(loop, "run", functools.partial(self._evaluate, loop))
        for other in trainer.callbacks:
            if is_a(other, "EarlyStopping"):
                self._around.put(other, "on_validation_end", self._at_target)
                self._around.put(other, "on_train_epoch_end", self._at_target)
            if is_a(other, "ModelCheckpoint") and other.monitor is not None:
                self._around.put(other, "check_monitor_top_k", self._at_target)

    def remove(self) -> None:
        """Give everything its own methods back."""
        self._around.remove()

    def explore(self, batch: Any, batch_idx: int) -> None:
        """Have the losses of the networks that the method has drawn for this step, where it draws any.

        What the step logs meanwhile is left out.

        Args:
            batch: A training batch.
            batch_idx: Its place in the epoch.
        """
        ast, module = self._run(), self.trainer.lightning_module
        if ast is None or ast.sampler is None:
            return
        takes_place = "batch_idx" in inspect.signature(module.training_step).parameters
        args = (batch, batch_idx) if takes_place else (batch,)

        def loss() -> Any:
            found = self.trainer.strategy.training_step(*args)
            return found["loss"] if isinstance(found, Mapping) else found

        with logging_by(module, torch.compiler.disable(_unheard)):
            ast.explore(loss)

    def _run(self) -> AlternatingSparseTraining | None:
        """Return the run of the module that the Trainer has now: after a fit it may have been given another one."""
        ast, module = self._callback.ast, self.trainer.lightning_module
        return ast if ast is not None and any(ast.model is part for part in module.modules()) else None

    def _step(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.evaluations is not None:
            method = functools.partial(self.evaluations.step, method)
        called = self._callback.step_module if self._run() is not None else None
        return method(*args, **options) if called is None else called(method, *args, **options)

    def _evaluate(self, loop: Any, method: Callable[..., Any]) -> Any:
        ast = self._run()
        if ast is None or ast.chosen is not None or self.trainer.sanity_checking:
            return method()
        self.evaluations = Evaluations(self.trainer, ast)
        try:
            return self.evaluations.run(loop, method)
        finally:
            self.evaluations = None

    def _at_target(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Pass over evaluations from before all sub-nets are as sparse as they are to become."""
        ast = self._run()
        return method(*args, **options) if ast is None or ast.at_target else False

    def _train_end(self, method: Callable[..., Any]) -> Any:
        result = method()  # after all callbacks, of which one may have put averaged weights in place
        self._callback.end(self.trainer)
        return result

    def _save_checkpoint(self, method: Callable[..., Any], filepath: Any, *args: Any, **options: Any) -> Any:
        ast = self._run()
        if ast is None:
            return method(filepath, *args, **options)
        ast.synchronize_normalization()
        result = method(filepath, *args, **options)
        place = local_path(filepath)
        # Sub-nets that are still on their way are of use to a run that goes on, and to nobody else.
        if place is not None and self.trainer.is_global_zero and ast.at_target:
            ast.save(elastic_beside(place))
        self.trainer.strategy.barrier("elastic file")
        return result

    def _remove_checkpoint(self, method: Callable[..., Any], filepath: Any) -> Any:
        result = method(filepath)
        place = local_path(filepath)
        if place is not None and self.trainer.is_global_zero:
            elastic_beside(place).unlink(missing_ok=True)
        return result


def _unheard(*_: Any, **__: Any) -> None:
    """Log nothing."""
