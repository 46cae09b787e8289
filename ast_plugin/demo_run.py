"""One demo run: the training loop of an ordinary PyTorch script, its state, and the way back into it.

The loop itself knows nothing of sub-nets. `ast_plugin.wrap` is the one line that it has more than a dense run.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.checkpoint import save_archive
from ast_plugin.demo_data import Digits
from ast_plugin.demo_model import DigitsResNet
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.errors import ASTError, StateError
from ast_plugin.files import atomic_write
from ast_plugin.wrapping import wrap

METRIC = "test accuracy (%)"
MOMENTUM = 0.9

_FORMAT = "ast-plugin demo"
_FORMAT_VERSION = 1
_EVALUATION_BATCH = 797


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        step: Its number, from 0.
        sub_net: The sub-net that was trained.
        loss: Mean cross-entropy of its batch; a tensor without gradient, so that nobody waits who does not look.
    """

    step: int
    sub_net: str
    loss: Tensor


class DemoRun:
    """A network, its optimizer, the controller of its sub-nets, and how far they have come.

    Args:
        settings: What to compute.
        digits: The data.

    Attributes:
        settings: As given.
        model: The network.
        optimizer: SGD with momentum.
        ast: The controller that `wrap` returned.
        step: Steps done.
        elapsed_seconds: Time spent in them, over all sittings; the caller keeps it.
    """

    def __init__(self, settings: DemoSettings, digits: Digits) -> None:
        self.settings = settings
        self.digits = digits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = DigitsResNet(settings.width)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.learning_rate,
            momentum=MOMENTUM,
            weight_decay=settings.weight_decay,
        )
        self.ast = wrap(self.optimizer, self.model, config=settings.ast_config())
        self.step = 0
        self.elapsed_seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.settings.steps

    def train_step(self) -> StepResult:
        """Do one optimizer step; the controller decides which sub-net it trains."""
        images, labels = self.digits.batch(self.step, seed=self.settings.seed, batch_size=self.settings.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        sub_net = self.ast.active
        self.model.train()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        result = StepResult(step=self.step, sub_net=sub_net, loss=loss.detach())
        self.step += 1
        return result

    def evaluate(self) -> dict[str, float]:
        """Return the test accuracy in percent of every sub-net, and hand it to the report."""
        accuracies = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for name in self.ast.sub_nets:
                with self.ast.sub_net(name):
                    accuracies[name] = 100 * accuracy(self.model, self.digits.test_images, self.digits.test_labels)
                self.ast.add_report_metric(METRIC, accuracies[name], sub_net=name)
        finally:
            self.model.train(was_training)
        return accuracies

    def save(self, path: Path) -> None:
        """Write everything that a bit-identical continuation needs, completely or not at all.

        Raises:
            SaveError: If the file cannot be written; the one that stood there is untouched.
        """
        state = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "settings": self.settings.to_dict(),
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        atomic_write(path, lambda temporary: save_archive(state, temporary))

    @classmethod
    def resume(cls, path: Path, digits: Callable[[], Digits]) -> DemoRun:
        """Return the run that `save` wrote, as it stood.

        Args:
            path: The file.
            digits: Gives the data; called when the file turned out to be sound.

        Raises:
            StateError: If the file is missing, damaged or no state of a demo run.
        """
        state = read_state(path)
        try:
            run = cls(DemoSettings.from_dict(state["settings"]), digits())
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.step = int(state["step"])
            run.elapsed_seconds = float(state["elapsed_seconds"])
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, ASTError) and not isinstance(error, StateError):
                raise
            raise StateError(
                f"the state in {str(path)!r} does not fit this version of the demo: {error}; start anew without "
                "--resume"
            ) from error
        return run


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images that the model classifies rightly, in [0, 1].

    Args:
        model: In eval mode; nothing of it changes.
        images: Shape (count, 1, height, width).
        labels: Shape (count,), int64.
    """
    right = 0
    with torch.no_grad():
        for chunk, wanted in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
            right += int((model(chunk).argmax(dim=1) == wanted).sum())
    return right / len(labels)


def read_state(path: Path) -> dict[str, Any]:
    """Return what `DemoRun.save` wrote, as plain containers and tensors; nothing in the file is executed.

    Raises:
        StateError: If the file is missing, damaged or no state of a demo run.
    """
    if not path.is_file():
        raise StateError(
            f"nothing to resume: {str(path)!r} does not exist; start without --resume, or name the folder of the run "
            "with --output"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
        # torch's own words advise to execute what is in the file.
        raise StateError(
            f"{str(path)!r} cannot be read: it is damaged, or no state of a demo run; start anew without --resume"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise StateError(f"{str(path)!r} is no state of a demo run; start anew without --resume")
    if state.get("version") != _FORMAT_VERSION:
        raise StateError(
            f"the state in {str(path)!r} has version {state.get('version')!r}, and this version of the package reads "
            f"{_FORMAT_VERSION}; finish the run with the version that began it, or start anew without --resume"
        )
    return state
