"""An alternating sparse run inside a timm training script: what happens at each of the script's own turning points.

The launcher calls this from the functions of a script that it has wrapped, our own script calls it by itself. A run
begins late, when the first epoch does: then the model is as it will stay (moved, compiled, data-parallel), the
averaged copy has been made of a model without hooks, and the number of updates is known.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ast_plugin.errors import ActivationError, ConfigError, StateError
from ast_plugin.integrations.family.sup_tickets_flags import SETTING
from ast_plugin.integrations.family.sup_tickets_hosts import further_versions, recompute_once
from ast_plugin.integrations.timm.average import RunAverage
from ast_plugin.integrations.timm.evaluation import check_metric, count_from_target, merged, note, split_metric
from ast_plugin.integrations.timm.exploring import explore_with
from ast_plugin.integrations.timm.flags import Settings
from ast_plugin.integrations.timm.networks import network_in, picture_for
from ast_plugin.integrations.timm.outputs import write_outputs
from ast_plugin.integrations.timm.selection import TimmSelection
from ast_plugin.integrations.timm.state import (
    AVERAGE_KEY,
    keep_average_in_optimizer,
    keep_in_task,
    read_checkpoint,
    state_in,
)
from ast_plugin.optimizers import innermost_optimizer
from ast_plugin.preview import check_run
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.training_exchange import with_plain_entries, without_optimizer_state
from ast_plugin.training_state import KEY
from ast_plugin.wrapping import wrap

_logger = logging.getLogger("ast_plugin.timm")

Validate = Callable[..., Mapping[str, float]]


class TimmRun:
    """One training run of a timm script.

    Args:
        settings: What the flags ask for.
        args: The script's own settings: ``seed``, ``device``, ``resume``, ``eval_metric`` and so on.

    Attributes:
        ast: The controller; None until `begin`.

    Raises:
        ConfigError: If the settings do not fit each other or this machine.
    """

    def __init__(self, settings: Settings, args: argparse.Namespace) -> None:
        self.settings = settings
        self.args = args
        self.ast: AlternatingSparseTraining | None = None
        self._tickets = settings.sup_tickets()
        self._network: nn.Module | None = None
        self._average: RunAverage | None = None
        self._output_dir: Path | None = None
        self._seconds = 0.0
        self._epochs_left = 0
        check_device(str(getattr(args, "device", "cpu")))
        if getattr(args, "torchscript", False):
            raise ConfigError(
                "--torchscript: hooks do not run inside a scripted model; leave it out, or use --torchcompile"
            )
        # Scripts know timm's own metrics alone, and of those which are better lower. So a sub-net that is named goes
        # under these names.
        self._headline: str | None = None
        if getattr(args, "eval_metric", None):
            self._headline, args.eval_metric = split_metric(str(args.eval_metric), settings.sub_nets)

    def check(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Notice what cannot work as soon as model and optimizer are there, before data are read.

        Args:
            optimizer: As the script has made it.
            model: What it trains.

        Raises:
            ConfigError: If a name in the settings is unknown.
            SelectionError: If no parameter can be pruned as asked.
            WrapError: If this optimizer cannot train sub-nets.
        """
        network = network_in(model)
        config = self.settings.config(total_steps=1, steps_per_epoch=1)
        choices = check_run(config, network, optimizer=optimizer, closure=False, plugins=[TimmSelection()])
        prunable = [choice for choice in choices if choice.prunable]
        weights = sum(torch.Size(choice.shape).numel() for choice in prunable)
        _logger.info(
            f"Sub-nets {', '.join(self.settings.sub_nets)} of {type(network).__name__}: {len(prunable)} of "
            f"{len(choices)} parameters are pruned, {weights:,} weights."
        )

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        steps_per_epoch: int,
        epoch: int = 0,
        task: nn.Module | None = None,
        average: nn.Module | None = None,
        saver: Any = None,
        output_dir: str | Path | None = None,
    ) -> AlternatingSparseTraining:
        """Attach the run to a model that is ready to be trained; called once, before the first epoch.

        Args:
            model: What the script trains, inside its wrappers.
            optimizer: Its optimizer, with the state of a checkpoint already loaded.
            total_steps: Optimizer steps from epoch 0 to the end.
            steps_per_epoch: Optimizer steps of an epoch.
            epoch: The first one, counted from 0; later than that after a resume.
            task: The module that the script calls, where it is one around the model.
            average: The script's moving average of the model (`timm.utils.ModelEmaV3`), if it keeps one.
            saver: Its checkpoint saver, None on ranks that save nothing.
            output_dir: Where checkpoints are written, None on ranks that write nothing.

        Returns:
            The controller.

        Raises:
            StateError: If the checkpoint that the script has resumed from is of another run.
            ASTError: As `ast_plugin.wrap`.
        """
        resume = getattr(self.args, "resume", "")
        state = state_in(read_checkpoint(resume)) if resume else {}
        remaining = max(total_steps - epoch * steps_per_epoch, 1)
        steps = _length(state[KEY], remaining, steps_per_epoch) if state else remaining
        if resume and not state:
            _logger.info(
                f"{resume} is a checkpoint without sub-nets: they start from its weights, at epoch {epoch}, and train "
                f"for {steps} steps."
            )
        config = self.settings.config(total_steps=steps, steps_per_epoch=steps_per_epoch)
        self._network = network = network_in(model)
        # Inside its wrappers, where they do nothing but compile and distribute: hooks stay out of compiled graphs.
        given = model if bare_model(model) is network else network
        called = model if task is None else task
        picture = functools.partial(picture_for, network, self.args)
        options: dict[str, Any] = {} if self._tickets is None else {SETTING: self._tickets}
        self.ast = ast = wrap(
            optimizer, given, config, outermost=called, plugins=[TimmSelection()], example_inputs=picture, **options
        )
        if state:
            try:
                fresh = getattr(self.args, "no_resume_opt", False)
                ast.load_state_dict(without_optimizer_state(state[KEY]) if fresh else state[KEY])
            except StateError as error:
                raise StateError(f"--resume {resume}: {error}") from error
            _logger.info(f"Sub-nets go on from {resume} at step {ast.step} of {steps}.")
        if average is not None:
            self._average = RunAverage(ast, average, state.get(AVERAGE_KEY))
        explore_with(task, ast)
        inner = innermost_optimizer(optimizer)
        # Scripts of older timm have tasks too, which their savers do not know.
        known = getattr(saver, "task", None) is task
        in_task = task is not None and known and keep_in_task(task, self.state)
        if in_task:
            ast.keep_state_elsewhere()
        elif self._average is not None:
            keep_average_in_optimizer(inner, self._average.state_dict)
        if saver is not None:
            count_from_target(saver, lambda: ast.at_target)
        self._epochs_left = -(-remaining // steps_per_epoch)
        self._output_dir = Path(output_dir) if output_dir else None
        _logger.info(
            f"Alternating sparse training: {', '.join(ast.sub_nets)} by {config.method} in turn, {steps} steps; "
            f"evaluation without a name is {ast.default_sub_net}."
        )
        return ast

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold, by key."""
        if self.ast is None:
            return {}
        state: dict[str, Any] = {KEY: self.ast.state_dict()}
        if self._average is not None:
            state[AVERAGE_KEY] = self._average.state_dict()
        return state

    def train(self, train_one_epoch: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run the script's own function for one epoch, then bring BatchNorm statistics of all ranks together.

        The script does that for the sub-net that its model carries (``--dist-bn``), this for the others. Those of
        superposed sub-nets are estimated from the data that the function was given.
        """
        began = time.monotonic()
        metrics = train_one_epoch(*args, **options)
        self._seconds += time.monotonic() - began
        self._epochs_left -= 1
        if self.ast is not None and getattr(self.args, "dist_bn", "") in ("reduce", "broadcast"):
            self.ast.synchronize_normalization()
            if self._average is not None:
                self._average.synchronize()
        loader = inspect.signature(train_one_epoch).bind(*args, **options).arguments.get("loader")
        if loader is not None:
            recompute_once(self._tickets, lambda: loader, _logger)
        return metrics

    def validate(self, validate: Validate, model: nn.Module, *args: Any, **options: Any) -> Mapping[str, float]:
        """Evaluate every sub-net with the script's own function.

        Args:
            validate: The script's function; returns metrics by name.
            model: What the script evaluates: the model it trains, or the moving average of it.
            *args: Handed on.
            **options: Handed on.

        Returns:
            The metrics of one sub-net under the script's names, of that which ``--eval-metric`` names or else of the
            default, then ``s90_top1`` and so on for each. Those of other versions, superposed sub-nets for example, go
            into the log, the report and the files alone, because every line of ``summary.csv`` has the same columns.

        Raises:
            ActivationError: If the model is neither, or no metrics come back.
            ConfigError: If what ``--eval-metric`` names of a sub-net is not among them.
        """
        if self.ast is None:
            return validate(model, *args, **options)
        given = network_in(model)
        if given is self._network:
            chosen: Any = self.ast
        elif self._average is not None and given is self._average.network:
            chosen = self._average
        else:
            raise ActivationError(
                f"validate() was given a {type(given).__name__} that is neither the model of this run nor its moving "
                "average, so its sub-nets are not known; evaluate it without --ast flags"
            )
        suffix = str(options.pop("log_suffix", ""))
        found = self._measured(chosen, validate, suffix, model, *args, **options)
        if chosen is self.ast:
            note(self.ast, found)
            for version in further_versions(self.ast):
                with self.ast.version(version):
                    note(self.ast, self._measured(chosen, validate, f"{suffix} {version}", model, *args, **options))
        return merged(self._headline or self.ast.default_sub_net, found)

    def _measured(
        self, chosen: Any, validate: Validate, suffix: str, model: nn.Module, *args: Any, **options: Any
    ) -> dict[str, Mapping[str, float]]:
        """Return the metrics of every sub-net of `chosen`, and log them."""
        found: dict[str, Mapping[str, float]] = {}
        for name in self.settings.sub_nets:
            if _takes(validate, "log_suffix"):
                options["log_suffix"] = f"{suffix} {name}"
            with chosen.sub_net(name):
                figures = validate(model, *args, **options)
            if not isinstance(figures, Mapping):
                raise ActivationError(
                    f"validate() of the training script returned {type(figures).__name__}, not metrics by name; this "
                    "script is of another kind than timm's"
                )
            found[name] = figures
            if self._headline is not None:  # without a sub-net it is the script's own affair
                check_metric(self.args.eval_metric, figures)
        _logger.info(_line(suffix, found))
        return found

    def finish(self) -> list[Path]:
        """Write the files that a run leaves beside its checkpoints; on ranks without output folder, nothing.

        Returns:
            The files.

        Raises:
            SaveError: If one cannot be written.
        """
        if self.ast is None:
            _logger.warning("No epoch was trained, so there are no sub-nets to write.")
            return []
        if self._epochs_left <= 0:  # not after Ctrl-C, which timm's script takes for the end
            self.ast.finish()
        if self._output_dir is None:
            return []
        twin = None if self._average is None else self._average.twin
        files = write_outputs(
            self.ast, self._output_dir, twin=twin, report=self.settings.report, args=self.args, seconds=self._seconds
        )
        _logger.info(f"Wrote {', '.join(file.name for file in files)} to {self._output_dir}.")
        return files


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Args:
        device: As torch writes it: ``cpu``, ``cuda:1``.

    Raises:
        ConfigError: If there is none.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: PyTorch knows no such device; pass cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this PyTorch sees no CUDA device; pass --device cpu")


def _length(state: Mapping[str, Any], remaining: int, steps_per_epoch: int) -> int:
    """Return the steps of a whole run that is resumed: those done, and those that its script has left.

    Steps that a gradient scaler skipped are missing from those done; the schedule stays as it was then.
    """
    try:
        plain = with_plain_entries(state)
        done, planned = int(plain["step"]), int(plain["config"]["total_steps"])
    except (StateError, KeyError, TypeError, ValueError):
        return remaining  # damaged, as loading it will say
    expected = done + remaining
    return planned if 0 <= planned - expected < steps_per_epoch else expected


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _line(suffix: str, found: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        f"{name} " + " ".join(f"{metric} {value:.4g}" for metric, value in figures.items())
        for name, figures in found.items()
    ]
    return f"Sub-nets{suffix}: {' | '.join(parts)}"
