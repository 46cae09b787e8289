"""What a fit with sub-nets refuses before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ast_plugin.errors import ConfigError, WrapError, near_names
from ast_plugin.integrations.frameworks.lightning.host import is_a
from ast_plugin.integrations.metric_names import check_metric
from ast_plugin.optimizers import innermost_optimizer, trained_by

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_STRATEGIES = {
    "DeepSpeedStrategy": "steps its own optimizer and keeps weights of its own, so sub-nets cannot be taken off in "
    "time",
    "FSDPStrategy": "flattens the weights, so masks cannot be put on them",
    "ModelParallelStrategy": "spreads the weights in a way that was not tried with Lightning",
}


def check_strategy(trainer: Trainer) -> None:
    """Refuse ways to train in which sub-nets cannot be switched.

    Raises:
        WrapError: If the strategy is one of them.
    """
    for kind, reason in _STRATEGIES.items():
        if is_a(trainer.strategy, kind):
            raise WrapError(f"{kind} {reason}; train with strategy='ddp', or on one device")


def check_callbacks(trainer: Trainer, sub_nets: Sequence[str], *, private: bool) -> None:
    """Refuse callbacks that watch a sub-net which does not exist, or average weights of networks with BatchNorm.

    Args:
        trainer: The Trainer.
        sub_nets: Names of the sub-nets.
        private: Whether every sub-net has BatchNorm state of its own.

    Raises:
        ConfigError: If there is one that watches such a sub-net.
        WrapError: If there is one that averages.
    """
    for callback in trainer.callbacks:
        kind = type(callback).__name__
        if is_a(callback, "Checkpoint") or is_a(callback, "EarlyStopping"):
            check_metric(f"{kind}(monitor)", getattr(callback, "monitor", None), sub_nets)
        averages = is_a(callback, "WeightAveraging") or is_a(callback, "StochasticWeightAveraging")
        if averages and private:
            raise WrapError(
                f"{kind} averages the BatchNorm of one sub-net alone, and every sub-net has its own; leave it out, "
                "share BatchNorm with private_normalization=False, or train in a loop of your own with ast.twin()"
            )


def network_of(module: LightningModule, name: str | None) -> nn.Module:
    """Return the module whose weights are pruned: the LightningModule, or a module in it.

    Args:
        module: The LightningModule.
        name: The attribute that holds the network; dots lead to modules inside modules.

    Raises:
        ConfigError: If there is no such module, or none is named where one has to be.
    """
    if name is None:
        if not module.automatic_optimization:
            raise ConfigError(
                f"{type(module).__name__} steps its optimizers itself, inside training_step, so the module that it "
                "calls there has to be named: ASTCallback(network=...), for example network='model'"
            )
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = [child for child, part in module.named_children() if any(True for _ in part.parameters())]
        raise ConfigError(
            f"network={name!r}: {type(module).__name__} has no such module; {near_names(name, known)}"
        ) from None


def check_mode(module: LightningModule, network: nn.Module) -> None:
    """Refuse a network that Lightning would train in evaluation mode, in which it leaves it.

    Raises:
        WrapError: If it is in evaluation mode.
    """
    if not network.training:
        raise WrapError(
            f"{type(network).__name__} of {type(module).__name__} is in evaluation mode, in which Lightning leaves it "
            "and sub-nets are not trained; call train() on it before fit()"
        )


def optimizer_of(trainer: Trainer, network: nn.Module) -> torch.optim.Optimizer:
    """Return the one optimizer that trains the network.

    Raises:
        WrapError: If there is none, or several train parts of it.
    """
    parameters = {id(parameter) for parameter in network.parameters()}
    found = [inner for inner in map(innermost_optimizer, trainer.strategy.optimizers) if parameters & trained_by(inner)]
    if len(found) == 1:
        return found[0]
    kind = type(network).__name__
    if not found:
        raise WrapError(f"no optimizer trains {kind}; return one for its parameters from configure_optimizers()")
    kinds = " and ".join(type(optimizer).__name__ for optimizer in found)
    raise WrapError(
        f"{len(found)} optimizers ({kinds}) train parts of {kind}, and sub-nets are trained by one; name the part that "
        "one of them trains: ASTCallback(network=...)"
    )
