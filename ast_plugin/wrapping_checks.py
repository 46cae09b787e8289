"""What `ast_plugin.wrap` refuses before anything touches model or optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ast_plugin.alternation import Alternation, trains_several
from ast_plugin.attachment import is_attached
from ast_plugin.distributed import note_buffers
from ast_plugin.errors import ConfigError, PluginError, SelectionError, WrapError
from ast_plugin.methods import Method
from ast_plugin.optimizers import refusal_of, trained_by
from ast_plugin.parameters import ParameterChoice
from ast_plugin.plugins import PluginRegistry
from ast_plugin.slots import bare_model


def check_kind(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse what cannot be wrapped at all.

    Raises:
        WrapError: If `model` is no module, or one of the two is of a kind that cannot be, or wrapped already.
    """
    if not isinstance(model, nn.Module):
        raise WrapError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; call wrap(optimizer, model, ...)"
        )
    reason = refusal_of(optimizer, model)
    if reason is not None:
        raise WrapError(reason)
    for name, thing in (("model", model), ("optimizer", optimizer)):
        if is_attached(thing):
            raise WrapError(
                f"the {name} is wrapped already; call detach() on its controller first, or go on using that one"
            )
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise WrapError(f"parameter {lazy[0]!r} has no shape yet; run one forward pass before wrapping the model")
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise WrapError(
            f"{scripted[0] or 'the model'} is a module of TorchScript, which takes none of the hooks that wrap "
            "needs; put the ordinary module in its place"
        )


@contextlib.contextmanager
def taken_over(method: Method, optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[None]:
    """Have a method take over model and optimizer (`Method.take_over`), and undo it if the block fails.

    Raises:
        PluginError: If it does not say how.
    """
    if method.take_over is None:
        yield
        return
    undo = method.take_over(optimizer, bare_model(model))
    if not callable(undo):
        raise PluginError(
            f"take_over of method {method.name!r} must return a function that undoes it, got {undo!r}; where there is "
            "nothing to undo, return lambda: None"
        )
    try:
        note_buffers(model)
        yield
    except BaseException:
        undo()
        note_buffers(model)
        raise


def check_outermost(outermost: object, model: nn.Module) -> None:
    """Refuse an outermost module that is none, or does not hold the model; None is fine.

    Raises:
        WrapError: If it is so.
    """
    if outermost is None:
        return
    if not isinstance(outermost, nn.Module):
        raise WrapError(f"outermost must be a torch.nn.Module around the model, got {type(outermost).__name__}")
    bare = bare_model(model)
    if not any(module is bare for module in outermost.modules()):
        raise WrapError(
            f"outermost, a {type(outermost).__name__}, does not hold the model, a {type(bare).__name__}; give the "
            "module that the training loop calls and that has this very model inside, or leave it out"
        )
    if is_attached(outermost):
        raise WrapError("outermost is wrapped already; call detach() on its controller first")


def check_correction(registry: PluginRegistry) -> None:
    """Refuse plugins that correct gradients of sharded parameters.

    Raises:
        WrapError: If there is one.
    """
    if registry.extends("ast_correct_gradients"):
        raise WrapError(
            "a plugin corrects gradients (ast_correct_gradients), and this model's are spread over the ranks, of which "
            "it would see one part; train without the plugin, or with DistributedDataParallel"
        )


def check_turns(alternation: Alternation, *, samples: str | None, sharded: bool) -> None:
    """Refuse to train several sub-nets in one step where that cannot work.

    Args:
        alternation: The order of the run.
        samples: Name of the method, if it draws masks at every step.
        sharded: Whether ranks hold parts of the parameters.

    Raises:
        ConfigError: With a method that draws masks at every step.
        WrapError: If parameters are sharded.
    """
    if not trains_several(alternation):
        return
    if samples is not None:
        raise ConfigError(
            f"method {samples!r} draws the masks of one sub-net at every step, and alternation {alternation.name!r} "
            "trains several in each; use alternation='alternating'"
        )
    if sharded:
        raise WrapError(
            f"alternation {alternation.name!r} trains several sub-nets in one step, and adds up gradients of which "
            "every rank holds a part here; train with DistributedDataParallel, or with alternation='alternating'"
        )


def check_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, prunable: Sequence[ParameterChoice]) -> None:
    """Refuse parameters to prune that the optimizer does not train.

    Raises:
        SelectionError: If there are any.
    """
    trained = trained_by(optimizer)
    parameters = dict(model.named_parameters())
    missing = [choice.name for choice in prunable if id(parameters[choice.name]) not in trained]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise SelectionError(
            f"the optimizer does not train {len(missing)} of {len(prunable)} prunable parameters: {shown}; construct "
            "the optimizer from this model's parameters (after moving or converting it), freeze them, or name them in "
            "exclude"
        )


def check_private_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, private: Sequence[str]) -> None:
    """Refuse trainable private BatchNorm parameters that the optimizer does not train.

    Raises:
        SelectionError: If there are any.
    """
    trained = trained_by(optimizer)
    for name in private:
        parameter = model.get_parameter(name)
        if parameter.requires_grad and id(parameter) not in trained:
            raise SelectionError(
                f"the optimizer does not train {name!r}, a BatchNorm parameter that every sub-net has its own of; "
                "train it with this optimizer, freeze it, or share BatchNorm with private_normalization=False"
            )


def check_first_momentum(optimizer: torch.optim.Optimizer, private: Sequence[str]) -> None:
    """Refuse the one optimizer whose first step differs from a step with zeroed state, which fused ones are given."""
    for group in optimizer.param_groups:
        if private and group.get("fused") and group.get("momentum") and group.get("dampening"):
            raise WrapError(
                f"{type(optimizer).__name__} with fused=True and dampening={group['dampening']:g} would damp the first "
                "step of every sub-net's BatchNorm parameters, which no optimizer damps; use fused=False, dampening=0, "
                "or private_normalization=False"
            )
