"""The functions of a timm training script that a run has to come between, found by name and wrapped.

Names and first arguments are the same in every train.py from timm 1.0.3 on, and in legacy_train.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ast_plugin.errors import ASTError
from ast_plugin.integrations.timm.flags import add_flags, settings_of, without_flags
from ast_plugin.integrations.timm.run import TimmRun
from ast_plugin.integrations.timm.state import explained

_FUNCTIONS = ("_parse_args", "create_optimizer_v2", "train_one_epoch", "validate", "main")
_NEEDED = ("epoch", "model", "loader", "optimizer", "num_updates_total")  # arguments of train_one_epoch
# Where a script may resume; one of them is enough.
_RESUMING = ("resume_task_checkpoint", "resume_checkpoint", "load_task_ema_checkpoint")


class SeamError(ASTError, RuntimeError):
    """A training script lacks a function that sub-nets need, or calls it in another way."""


class Script:
    """A training script of timm, imported as a module and wrapped; nothing of its text is changed.

    Args:
        module: The imported script.

    Attributes:
        run: The run, once the command line asked for one.

    Raises:
        SeamError: If a function is missing.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.run: TimmRun | None = None
        for name in _FUNCTIONS:
            if not callable(getattr(module, name, None)):
                raise SeamError(self._explain(f"has no function {name}()"))
        if not isinstance(getattr(module, "parser", None), argparse.ArgumentParser):
            raise SeamError(self._explain("has no argparse.ArgumentParser named parser"))
        add_flags(module.parser)
        self._wrap("_parse_args", self._parse)
        self._wrap("create_optimizer_v2", self._create_optimizer)
        self._wrap("train_one_epoch", self._train_one_epoch)
        self._wrap("validate", self._validate)
        for name in _RESUMING:
            if callable(getattr(module, name, None)):
                self._wrap(name, self._resume)

    def main(self) -> None:
        """Run the script, then write the sub-nets."""
        self._module.main()
        if self.run is not None:
            self.run.finish()

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        original = getattr(self._module, name)
        setattr(self._module, name, functools.wraps(original)(functools.partial(around, original)))

    def _parse(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        import yaml

        parsed = original(*args, **options)
        if not (isinstance(parsed, tuple) and len(parsed) == 2 and isinstance(parsed[0], argparse.Namespace)):
            raise SeamError(self._explain("has a _parse_args() that does not return arguments and their text"))
        namespace, text = parsed
        settings = settings_of(namespace)
        if settings is None:
            # Not a trace of the flags is left: the run, its args.yaml too, is the plain script's.
            plain = without_flags(namespace)
            return plain, yaml.safe_dump(plain.__dict__, default_flow_style=False)
        self.run = TimmRun(settings, namespace)
        return namespace, text

    def _create_optimizer(self, original: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Any:
        optimizer = original(model, *args, **options)
        if self.run is not None:
            if not isinstance(model, nn.Module):
                raise SeamError(self._explain("gives create_optimizer_v2() something else than the model"))
            self.run.check(optimizer, model)
        return optimizer

    def _train_one_epoch(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        run = self.run
        if run is None:
            return original(*args, **options)
        if run.ast is None:
            given = inspect.signature(original).bind(*args, **options).arguments
            missing = [name for name in _NEEDED if name not in given]
            if missing:
                raise SeamError(self._explain(f"calls train_one_epoch() without {', '.join(missing)}"))
            accumulated = max(1, int(getattr(run.args, "grad_accum_steps", 1)))
            task = given.get("task")
            average = given.get("model_ema")
            run.begin(
                given["model"],
                given["optimizer"],
                total_steps=int(given["num_updates_total"]),
                steps_per_epoch=(len(given["loader"]) + accumulated - 1) // accumulated,
                epoch=int(given["epoch"]),
                task=task,
                average=_average_of(task) if average is None else average,
                saver=given.get("saver"),
                output_dir=given.get("output_dir"),
            )
        return run.train(original, *args, **options)

    def _validate(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return original(*args, **options) if self.run is None else self.run.validate(original, *args, **options)

    def _resume(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.run is None:
            return original(*args, **options)
        with explained(str(getattr(self.run.args, "resume", "")), self.run.args):
            return original(*args, **options)

    def _explain(self, what: str) -> str:
        return (
            f"{self._module.__file__} {what}, so sub-nets cannot be trained with it (timm {timm_version()}); give "
            "ast-timm a train.py of timm 1.0.15 or newer, or call ast_plugin.integrations.timm.wrap in your own loop"
        )


def _average_of(task: Any) -> nn.Module | None:
    if not callable(getattr(task, "has_ema", None)) or not task.has_ema():
        return None
    average: nn.Module | None = task.get_trainable_module(ema=True)
    return average


def timm_version() -> str:
    """Return the version of timm: of the installed one, or of that beside the script."""
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get("timm"), "__version__", "not installed"))
