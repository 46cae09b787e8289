"""What is read from Lightning: its version, how many steps a fit makes, and where its files go.

Lightning is installed under two names, ``lightning`` and ``pytorch_lightning``, whose classes are not each other's.
Things are known by the names of their classes, so that either may be used.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ast_plugin.channel_search import example_inputs_of
from ast_plugin.errors import ConfigError, MissingExtraError
from ast_plugin.random_state import RandomState
from ast_plugin.slots import bare_model

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lightning":
        raise
    import pytorch_lightning as pl

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

OLDEST = (2, 5)  # earlier ones do not tell callbacks of a checkpoint that is evaluated

_PACKAGES = ("lightning", "pytorch_lightning")
_GLOBAL_SEED = "PL_GLOBAL_SEED"  # what seed_everything leaves for other processes


def check_version(version: str) -> None:
    """Refuse versions of Lightning that are older than those that were tried.

    Args:
        version: Such as ``2.6.1``.

    Raises:
        MissingExtraError: If it is older.
    """
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingExtraError(
            f"ASTCallback needs Lightning {oldest} or newer, and {version} is installed; install a newer one with: "
            "pip install 'ast-plugin[lightning]'"
        )


check_version(pl.__version__)


def is_a(thing: object, kind: str) -> bool:
    """Tell whether an object is of one of Lightning's classes, of either package.

    Args:
        thing: Any object.
        kind: The name of the class.
    """
    return any(base.__name__ == kind and base.__module__.partition(".")[0] in _PACKAGES for base in type(thing).__mro__)


def gives_closures(trainer: Trainer) -> bool:
    """Return whether the optimizer's step is given a closure that computes all of the step's gradients."""
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # which has them computed before the step
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and not scaled and trainer.accumulate_grad_batches == 1


def global_seed() -> int | None:
    """Return what ``seed_everything`` was given, None if it was not called."""
    found = os.environ.get(_GLOBAL_SEED, "")
    return int(found) if found.isdigit() else None


def evaluation_loops(trainer: Trainer) -> Iterator[Any]:
    """Yield the loops over validation and test data, which have a method ``run``."""
    yield trainer.fit_loop.epoch_loop.val_loop
    yield trainer.validate_loop
    yield trainer.test_loop


def example_inputs(module: LightningModule, network: nn.Module) -> Any:
    """Return what the network can be called with: its own example inputs, or those of the LightningModule.

    Nothing is left of the call that tells what the network is called with: generators and modes are as before.

    Args:
        module: The LightningModule.
        network: It, or a module in it.

    Raises:
        ConfigError: If there are none.
    """
    own = example_inputs_of(bare_model(network))
    if own is not None:
        return own
    example = module.example_input_array
    if example is None:
        raise ConfigError(
            "channel sub-nets need an example of what the network is called with, to find out which channels belong "
            f"together; set example_input_array of {type(module).__name__}, as in Lightning's own summary of shapes"
        )
    example = module._apply_batch_transfer_handler(example)
    if network is module:
        return example
    found: list[Any] = []

    def note(called: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = list(inspect.signature(called.forward).parameters)
        found.append({**dict(zip(names, args, strict=False)), **options} if options else args)

    state = RandomState()
    before = state.state_dict()
    modes = [(part, part.training) for part in module.modules()]
    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        module.eval()
        with torch.no_grad():
            if isinstance(example, dict):
                module(**example)
            else:
                module(*example) if isinstance(example, tuple) else module(example)
    finally:
        handle.remove()
        state.load_state_dict(before)
        for part, training in modes:
            part.training = training
    if not found:
        raise ConfigError(
            f"forward() of {type(module).__name__} does not call its {type(network).__name__} on example_input_array; "
            "have it do so, or leave network out"
        )
    return found[0]
