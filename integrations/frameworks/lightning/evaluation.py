"""Validation and test of every sub-net by Lightning's own loop: one run a sub-net, metrics by name.

The other sub-nets come first, the default one last. So callbacks that watch a metric, which are called in the last run
alone, find those of all sub-nets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ast_plugin.integrations.frameworks.lightning.host import is_a
from ast_plugin.training import AlternatingSparseTraining

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DATALOADER = "/dataloader_idx_"
_SEEN = "_seen_batches_per_dataloader"
_PROG_BAR = "prog_bar"


class Evaluations:
    """Runs Lightning's loops once for each sub-net.

    Args:
        trainer: The Trainer.
        ast: Its run.
    """

    def __init__(self, trainer: Trainer, ast: AlternatingSparseTraining) -> None:
        self._trainer = trainer
        self._ast = ast
        self._logged: set[str] | None = None
        self._step_as: str | None = None
        self._averages = [callback for callback in trainer.callbacks if is_a(callback, "WeightAveraging")]

    def run(self, loop: Any, run: Callable[[], Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
        """Run a loop for every sub-net.

        Args:
            loop: A loop over validation or test data.
            run: Its method.

        Returns:
            What the method returns, with the metrics of all sub-nets: a mapping for each set of data.
        """
        ast = self._ast
        ast.synchronize_normalization()
        outputs = []
        for name in ast.sub_nets:
            if name != ast.default_sub_net:
                seen = dict(getattr(loop, _SEEN, {}))
                with self._callbacks_held_back(), self._logging(name), self._sub_net(name):
                    outputs.append(run())
                    self.note(name)
                for dataloader, batches in seen.items() if hasattr(loop, _SEEN) else ():
                    getattr(loop, _SEEN)[dataloader] = batches
        with self._logging(None):
            outputs.append(run())
        return [{key: value for part in parts for key, value in part.items()} for parts in zip(*outputs, strict=True)]

    def step(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method for one batch, as the sub-net that is evaluated."""
        if self._step_as is None:
            return method(*args, **options)
        with self._ast.sub_net(self._step_as):
            return method(*args, **options)

    def sparsities(self) -> dict[str, float]:
        """Return how sparse every sub-net is now, by the name to log it under; empty in the run of a single one."""
        if self._logged is None:
            return {}
        return {f"sparsity_{name}": self._ast.masks.sparsity(name) for name in self._ast.sub_nets}

    def note(self, name: str | None = None) -> None:
        """Note the metrics of a sub-net for the report and the elastic file; None stands for the default one."""
        for metric in sorted(self._logged or ()):
            for key, value in self._trainer.callback_metrics.items():
                bare, _, dataloader = key.partition(_DATALOADER)
                if bare in (_named(metric, name), f"{_named(metric, name)}_epoch"):
                    place = f"{_DATALOADER}{dataloader}" if dataloader else ""
                    self._ast.add_report_metric(metric + place, float(value), sub_net=name or self._ast.default_sub_net)

    @contextlib.contextmanager
    def _sub_net(self, name: str) -> Iterator[None]:
        """Have a sub-net on; where a callback exchanges weights for averages in between, in the steps alone."""
        if not self._averages:
            with self._ast.sub_net(name):
                yield
            return
        self._step_as = name
        try:
            yield
        finally:
            self._step_as = None

    @contextlib.contextmanager
    def _callbacks_held_back(self) -> Iterator[None]:
        trainer = self._trainer
        callbacks = trainer.callbacks
        trainer.callbacks = [callback for callback in callbacks if is_a(callback, "ProgressBar")] + self._averages
        try:
            yield
        finally:
            trainer.callbacks = callbacks

    @contextlib.contextmanager
    def _logging(self, name: str | None) -> Iterator[None]:
        """Have the module log under the name of a sub-net; None stands for the default one, under both names."""
        module, default = self._trainer.lightning_module, self._ast.default_sub_net
        log = module.log
        logged: set[str] = set()

        def renamed(key: str, value: Any, *args: Any, **options: Any) -> None:
            logged.add(key)
            log(_named(key, name), value, *args, **options)
            if name is None:
                if args:  # the first is whether to show it in the progress bar
                    args = (False, *args[1:])
                else:
                    options[_PROG_BAR] = False
                log(_named(key, default), value, *args, **options)

        @torch.compiler.disable  # a compiled step would be compiled anew for each name
        def named(name: str, value: Tensor, *args: Any, **options: Any) -> None:
            renamed(name, value, *args, **options)

        self._logged = logged
        try:
            with logging_by(module, named):
                yield
        finally:
            self._logged = None


@contextlib.contextmanager
def logging_by(module: LightningModule, log: Callable[..., None]) -> Iterator[None]:
    """Have a LightningModule log by a function for the length of a block.

    Args:
        module: The module.
        log: Called as its ``log`` is.
    """
    before = vars(module).get("log")
    vars(module)["log"] = log
    try:
        yield
    finally:
        if before is None:
            del vars(module)["log"]
        else:
            vars(module)["log"] = before


def _named(metric: str, sub_net: str | None) -> str:
    return metric if sub_net is None else f"{metric}_{sub_net}"
