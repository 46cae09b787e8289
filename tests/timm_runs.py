"""Runs of timm training scripts on a small folder of pictures, made on the spot; each command line runs once."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import logging
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn

import ast_plugin
from ast_plugin.integrations.timm import launcher, train
from ast_plugin.training_exchange import with_plain_entries

HERE = Path(__file__).resolve().parent
NEWEST, OLDER = HERE / "timm_script.py", HERE / "timm_script_older.py"

TRAIN, VALIDATION, BATCH, EPOCHS = 80, 60, 20, 2
STEPS = EPOCHS * TRAIN // BATCH
MODEL = "test_resnet"
COMMON = (
    *("--model", MODEL, "--num-classes", "10", "--img-size", "32", "-b", str(BATCH), "-j", "0", "--device", "cpu"),
    *("--epochs", str(EPOCHS), "--warmup-epochs", "0", "--lr", "0.05", "--no-aug", "--log-interval", "100"),
)
SUB_NETS = ("s50", "s80")
SPARSE = ("--ast-sparsities", "0.5", "0.8", "--ast-no-report")
EMA = ("--model-ema", "--model-ema-decay", "0.5")

METRICS = ("loss", "top1", "top5")
COLUMNS = [
    "epoch",
    "train_loss",
    *(f"eval_{metric}" for metric in METRICS),
    *(f"eval_{sub_net}_{metric}" for sub_net in SUB_NETS for metric in METRICS),
    "lr",
]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind: its exit code, its output folder, what it printed."""

    code: object
    folder: Path
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "summary.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def columns(self) -> list[str]:
        return (self.folder / "summary.csv").read_text(encoding="utf-8").splitlines()[0].split(",")

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "ast.json").read_text(encoding="utf-8"))

    @property
    def arguments(self) -> str:
        return (self.folder / "args.yaml").read_text(encoding="utf-8")

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.folder / f"{name}.pth.tar", map_location="cpu", weights_only=True)

    def state(self, name: str = "last") -> dict[str, Any]:
        """Return the state of the run with sub-nets in a checkpoint."""
        checkpoint = self.checkpoint(name)
        holder = checkpoint if "task_state" not in checkpoint else {"optimizer": checkpoint["task_state"]}
        return dict(with_plain_entries(holder["optimizer"]["ast_plugin"]))


class Runs:
    """Runs in this process, and what they need.

    Args:
        folder: Where pictures and output go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pictures = _write_digits(folder / "digits")
        self._done: dict[tuple[object, ...], Run] = {}
        self._number = itertools.count()
        self._batches: list[tuple[Tensor, Tensor]] = []

    def own(self, *flags: str | Path) -> Run:
        """Run the package's own script with sub-nets; a second call with the same flags returns the first's run."""
        return self.once(train.main, *SPARSE, *flags)

    def launched(self, script: Path, *flags: str | Path) -> Run:
        """Run a script by the launcher with sub-nets, once."""
        return self.once(launcher.main, *SPARSE, *flags, script=script)

    def unmodified(self, script: Path, *flags: str | Path) -> Run:
        """Run a script as Python does, once; no part of this package takes part."""

        def call(arguments: list[str]) -> int:
            with mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", [str(HERE), *sys.path]):
                runpy.run_path(arguments[0], run_name="__main__")
            return 0

        return self.once(call, *flags, script=script)

    def attempt(self, main: Callable[[list[str]], object], *flags: str | Path, script: Path | None = None) -> Run:
        """Run a command line as it comes, whatever comes of it."""
        experiment = str(next(self._number))
        arguments = [str(script)] if script else []
        arguments += ["--data-dir", str(self.pictures), *COMMON, "--output", str(self._folder)]
        arguments += ["--experiment", experiment, *map(str, flags)]
        code, out, err = captured(lambda: main(arguments))
        return Run(code, self._folder / experiment, out, err)

    def network(self, name: str = MODEL) -> nn.Module:
        """Return a new network of the kind that is trained."""
        return timm.create_model(name, num_classes=10)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return loss and top-1 accuracy (%) on the validation pictures."""
        if not self._batches:
            self._batches = self._validation_batches()
        right, loss = 0, 0.0
        model.eval()
        with torch.no_grad():
            for pictures, labels in self._batches:
                output = model(pictures)
                right += int((output.argmax(1) == labels).sum())
                loss += nn.functional.cross_entropy(output, labels, reduction="sum").item()
        return {"loss": loss / VALIDATION, "top1": 100 * right / VALIDATION}

    def elastic_figures(self, path: Path) -> dict[str, dict[str, float]]:
        """Return loss and accuracy of every sub-net in an elastic file."""
        model = self.network()
        elastic = ast_plugin.load(path, model)
        figures = {}
        for name in elastic.sub_nets:
            with elastic.sub_net(name):
                figures[name] = self.evaluate(model)
        return figures

    def teacher(self, name: str = MODEL) -> str:
        """Return the name of a teacher for distillation, written to a folder as timm reads it offline."""
        folder = self._folder / f"teacher-{name}"
        if not folder.exists():
            torch.manual_seed(3)
            timm.models.save_for_hf(self.network(name), folder, safe_serialization=True)
        return f"local-dir:{folder}"

    def once(self, main: Callable[[list[str]], object], *flags: str | Path, script: Path | None = None) -> Run:
        """Run a command line that succeeds; a second call with the same one returns the first's run."""
        key = (main.__qualname__, script, *flags)
        if key not in self._done:
            run = self.attempt(main, *flags, script=script)
            assert run.code in (0, None), run.err[-3000:]
            self._done[key] = run
        return self._done[key]

    def _validation_batches(self) -> list[tuple[Tensor, Tensor]]:
        config = resolve_data_config({"img_size": 32}, model=self.network())
        loader = create_loader(
            create_dataset("", root=self.pictures, split="validation"),
            input_size=config["input_size"],
            batch_size=BATCH,
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        with _pictures_left_open():
            return [(pictures.clone(), labels.clone()) for pictures, labels in loader]


def captured(call: Callable[[], object]) -> tuple[object, str, str]:
    """Return exit code, standard output and standard error of a command line; logging is as it was before."""
    out, err = io.StringIO(), io.StringIO()
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _pictures_left_open():
            try:
                code = call()
            except SystemExit as exit:
                code = exit.code
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _pictures_left_open() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)  # timm leaves that to the collector
        yield


def figures_of(row: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return what a row of ``summary.csv`` says of every sub-net."""
    return {name: {metric: float(row[f"eval_{name}_{metric}"]) for metric in METRICS} for name in SUB_NETS}


def _write_digits(folder: Path) -> Path:
    pictures, labels = load_digits(return_X_y=True)
    order = numpy.random.RandomState(0).permutation(len(labels))
    for split, chosen in (("train", order[:TRAIN]), ("validation", order[TRAIN : TRAIN + VALIDATION])):
        for index in chosen:
            path = folder / split / str(labels[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = (pictures[index].reshape(8, 8) / 16 * 255).astype(numpy.uint8)
            Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").save(path)
    return folder
