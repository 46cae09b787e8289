"""Every optimizer of torch, timm and schedulefree, found by introspection: those of later versions are picked up."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from networks import image_batch, vector_batch
from torch import Tensor, nn
from torch.nn import functional

Batches = Callable[[int], tuple[Tensor, Tensor]]


class TinyNet(nn.Module):
    """A stem, a convolution and two linear layers with two private BatchNorms, for 1 x 8 x 8 images of 5 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm0(self.stem(images)))
        x = functional.relu(self.norm1(self.conv(x)))
        return self.head(functional.relu(self.hidden(x.mean(dim=(2, 3)))))


def tiny_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TinyNet(17)  # wide enough for Adafactor to factor its state


def narrow_net(seed: int = 0) -> nn.Module:
    """The same for optimizers that do much arithmetic a step."""
    torch.manual_seed(seed)
    return TinyNet(4)


def matrices(seed: int = 0) -> nn.Module:
    """Two-dimensional parameters alone, for optimizers that take nothing else: 12 -> 10 -> 6 -> 4."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 10, bias=False),
        nn.BatchNorm1d(10, affine=False),
        nn.ReLU(),
        nn.Linear(10, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 4, bias=False),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer with its options.

    Attributes:
        source: Where it comes from, a key of `CASES`.
        name: Class or registered name.
        options: What it is made with.
        make: Makes it for a model.
        network: Makes the model.
        batches: What the model is trained on.
        missing: The package that it needs and that is not installed, "" if it can be made.
        note: What a reader of the table should know.
        steps: How many steps are compared under `freeze`.
    """

    source: str
    name: str
    options: dict[str, Any]
    make: Callable[[nn.Module], torch.optim.Optimizer]
    network: Callable[[int], nn.Module] = tiny_net
    batches: Batches = image_batch
    missing: str = ""
    note: str = ""
    steps: int = 9

    @property
    def label(self) -> str:
        """Name and options, as a test's name."""
        return f"{self.name}({','.join(f'{key}={value}' for key, value in self.options.items())})"


# Options that make the state richer or take another path through the code; one row of the table each.
_TORCH_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"lr": 0.05, "t0": 4, "weight_decay": 0.01}, {"lr": 0.05, "foreach": True}],
    "Adadelta": [{"weight_decay": 0.01}, {"foreach": True}],
    "Adafactor": [{"weight_decay": 0.01}, {"foreach": True}],
    "Adagrad": [
        {"weight_decay": 0.01, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
        {"foreach": True},
        {"fused": True},
    ],
    "Adam": [
        {"weight_decay": 0.01},
        {"amsgrad": True},
        {"maximize": True},
        {"foreach": True},
        {"fused": True},
        {"fused": True, "amsgrad": True},
    ],
    "AdamW": [{"weight_decay": 0.05}, {"amsgrad": True}, {"foreach": True}, {"fused": True}],
    "Adamax": [{"weight_decay": 0.01}, {"foreach": True}],
    "LBFGS": [{"lr": 0.1, "max_iter": 3}, {"lr": 1, "max_iter": 3, "line_search_fn": "strong_wolfe"}],
    "Muon": [{"weight_decay": 0.05}, {"nesterov": False}],
    "NAdam": [{"weight_decay": 0.01}, {"decoupled_weight_decay": True, "weight_decay": 0.05}, {"foreach": True}],
    "RAdam": [{"weight_decay": 0.01}, {"decoupled_weight_decay": True, "weight_decay": 0.05}, {"foreach": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True, "weight_decay": 0.01}, {"foreach": True}],
    "Rprop": [{}, {"foreach": True}],
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "foreach": True},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "fused": True},
    ],
}
_NOTES = {
    "LBFGS": "only the first evaluation of a step is corrected; all sub-nets share one curvature history",
    "Muon": "takes two-dimensional parameters alone; the others need a second optimizer",
    "lookahead": "(b) between synchronisations; a synchronisation moves all weights towards the slow ones",
    "mars": "compares each gradient with the last one, which is the previous sub-net's",
}


def torch_cases() -> list[Case]:
    """Return every optimizer class of `torch.optim`, with the options that change its path through the code."""
    found = []
    for name, kind in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        flat = name == "Muon"
        for options in _TORCH_OPTIONS.get(name, [{}]):
            found.append(
                Case(
                    source="torch.optim",
                    name=name,
                    options=options,
                    make=lambda model, kind=kind, options=options: kind(model.parameters(), **options),
                    network=matrices if flat else tiny_net,
                    batches=vector_batch if flat else image_batch,
                    note=_NOTES.get(name, ""),
                )
            )
    return found


def timm_cases() -> list[Case]:
    """Return every name that timm's factory lists, and two with Lookahead, made as its training script makes them."""
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    options = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.9}
    found = []
    for name in [*list_optimizers(), "lookahead_adamw", "lookahead_sgd"]:
        ahead = name.startswith("lookahead_")
        kind = get_optimizer_info(name.removeprefix("lookahead_")).opt_class
        package = kind.partition(".")[0] if isinstance(kind, str) else ""
        note = _NOTES.get("lookahead" if ahead else name.removeprefix("c"), "")
        found.append(
            Case(
                source="timm",
                name=name,
                options=options,
                make=lambda model, name=name: create_optimizer_v2(model, opt=name, **options),
                network=narrow_net if name.startswith("kron") else tiny_net,
                missing=package if package and importlib.util.find_spec(package) is None else "",
                note=note,
                steps=5 if ahead else 9,  # the sixth step is Lookahead's own synchronisation
            )
        )
    return found


def schedule_free_cases() -> list[Case]:
    """Return every optimizer class of the package schedulefree, in training mode."""
    import schedulefree

    options = {"lr": 0.02, "weight_decay": 0.01}
    found = []
    for name, kind in sorted(vars(schedulefree).items()):
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
            found.append(
                Case(
                    source="schedulefree",
                    name=name,
                    options=options,
                    make=lambda model, kind=kind: _training(kind(model.parameters(), **options)),
                )
            )
    return found


def _training(optimizer: Any) -> torch.optim.Optimizer:
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


CASES: dict[str, Callable[[], list[Case]]] = {
    "torch.optim": torch_cases,
    "timm": timm_cases,
    "schedulefree": schedule_free_cases,
}
