"""A training script that goes on from whatever is on disk, and dies where it is told to.

``crash_run.py FOLDER [OPTIONS AS JSON]`` runs once; ``crash_run.py --serve`` imports everything, then forks one child
for each line of options on standard input and prints how it ended. So thirty deaths cost one import of torch.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from networks import OPTIMIZERS, ConvNet, image_batch
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin import sealed_file
from ast_plugin.masks import MaskStore

STEPS = 300
POINTS = (
    *("forward", "backward", "masks", "arithmetic", "stepped"),
    *("checkpoint", "flush", "rename", "renamed", "elastic", "seal", "load"),
)


class DropoutNet(ConvNet):
    """The convolutional network with dropout, which draws from torch's global generator."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.dropout(images, 0.1, self.training))


class Run:
    """Model, optimizer, scheduler and controller, in the order in which every script makes them."""

    def __init__(self, options: dict[str, Any]) -> None:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        self.steps = options.get("steps", STEPS)
        self.model: nn.Module = DropoutNet()
        self.optimizer = OPTIMIZERS[options.get("optimizer", "sgd")](self.model)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=self.steps)
        self.ast = ast_plugin.wrap(
            self.optimizer,
            self.model,
            sparsities=(0.5, 0.8, 0.9),
            total_steps=self.steps,
            update_interval=6,
            end_step=0.95,
            inactive=options.get("inactive", "coast"),
        )


def train(folder: Path, options: dict[str, Any]) -> None:
    """Train to the end, saving at the intervals that `options` gives, and at the end in any case."""
    run = Run(options)
    checkpoint, elastic = folder / "checkpoint.pt", folder / "elastic.safetensors"
    if options.get("point"):
        arm(run, options["point"], options["count"])
    if checkpoint.exists():
        seen = run.ast.load_checkpoint(checkpoint, scheduler=run.scheduler)["seen"]
        assert seen == run.ast.step * 16
    while run.ast.step < run.steps:
        images, labels = image_batch(run.ast.step)
        images = images + random.gauss(0, 0.1) + numpy.random.normal(0, 0.1)  # augmentation, as many write it
        run.model.train()
        run.optimizer.zero_grad()
        functional.cross_entropy(run.model(images), labels).backward()
        run.optimizer.step()
        run.scheduler.step()
        ended = run.ast.step == run.steps
        if ended or (options.get("elastic_every") and run.ast.step % options["elastic_every"] == 0):
            for name in run.ast.sub_nets:  # a pure function of the step, whoever computes it
                run.ast.add_report_metric("step", run.ast.step, sub_net=name)
            save_elastic(run, elastic)
        if ended or (options.get("save_every") and run.ast.step % options["save_every"] == 0):
            run.ast.save_checkpoint(checkpoint, scheduler=run.scheduler, seen=run.ast.step * 16)


def save_elastic(run: Run, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # far from the target: the masks are still on their way
        run.ast.save(path)


def arm(run: Run, point: str, count: int) -> None:
    """Have this process killed at the `count`-th time that it comes to `point`."""
    die = Fuse(count)
    if point == "forward":
        run.model.conv2.register_forward_pre_hook(lambda *_: die())
    elif point == "backward":
        run.model.conv1.weight.register_hook(lambda _: die())
    elif point == "masks":
        before(MaskStore, "_check_mask", die)
    elif point == "arithmetic":
        before(torch.Tensor, "add_", die)  # single-tensor kernels of SGD: half of the parameters have moved
        before(torch.Tensor, "lerp_", die)  # AdamW's
        run.optimizer.defaults["foreach"] = False
        for group in run.optimizer.param_groups:
            group["foreach"] = False
    elif point == "stepped":
        run.optimizer.register_step_post_hook(lambda *_: die())
    elif point == "checkpoint":
        cut_off_torch_save(die)
    elif point == "flush":
        before(os, "fsync", die)
    elif point == "rename":
        before(os, "replace", die)
    elif point == "renamed":
        after(os, "replace", die)
    elif point == "elastic":
        cut_off_safetensors(die)
    elif point == "seal":
        before(sealed_file, "_seal", die)
    elif point == "load":
        before(nn.Module, "load_state_dict", die)
        before(torch.optim.Optimizer, "load_state_dict", die)
        before(torch, "set_rng_state", die)
    else:
        raise ValueError(point)


class Fuse:
    """Kills the process at the `count`-th call."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal is on its way


def before(owner: Any, name: str, die: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        die()
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def after(owner: Any, name: str, die: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        die()
        return result

    setattr(owner, name, dying)


class CutOffFile:
    """A file whose bytes are on disk as soon as they are written, until the process dies between two of them."""

    def __init__(self, file: io.FileIO, die: Callable[[], None]) -> None:
        self.file = file
        self.die = die

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self.file.write(data[:half])
        self.die()
        self.file.write(data[half:])
        return len(data)

    def flush(self) -> None:
        pass


def cut_off_torch_save(die: Callable[[], None]) -> None:
    real = torch.save

    def save(contents: Any, target: io.BufferedWriter) -> None:
        real(contents, CutOffFile(target.raw, die))

    torch.save = save


def cut_off_safetensors(die: Callable[[], None]) -> None:
    def save(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
        data = safetensors.torch.save(tensors, metadata=metadata)
        with target.open("wb", buffering=0) as opened:
            file = CutOffFile(opened, die)
            for begin in range(0, len(data), 4096):
                file.write(data[begin : begin + 4096])

    sealed_file.save_file = save


def warm_up() -> None:
    """Import what torch imports at first use only, for all children at once."""
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            run = Run({"optimizer": name})
            functional.cross_entropy(run.model(image_batch(0)[0]), image_batch(0)[1]).backward()
            run.optimizer.step()
            run.ast.save_checkpoint(Path(folder, "checkpoint.pt"))
            run.ast.load_checkpoint(Path(folder, "checkpoint.pt"))
            save_elastic(run, Path(folder, "elastic.safetensors"))


def serve() -> None:
    """Fork one child for each line of options; print its exit status, negative for the signal that ended it."""
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(Path(options["folder"]), options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if options.get("seconds") is not None:
            time.sleep(options["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--serve":
        serve()
    else:
        train(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
