"""Which optimizer really steps, and which cannot train alternating sub-nets, with the reason.

Known by what can be seen from outside (attributes, protocols, hooks on parameters), so that optimizers of other
packages are recognised too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ast_plugin.errors import WrapError

_DEPTH = 3  # of containers within containers in which an optimizer is looked for


def innermost_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer whose step really runs, inside wrappers that hold it.

    Raises:
        WrapError: If there is none.
    """
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = next(
            (
                candidate
                for attribute in ("_base_optimizer", "optimizer")
                if isinstance(candidate := getattr(optimizer, attribute, None), torch.optim.Optimizer)
            ),
            None,
        )
        if inner is None:
            break
        optimizer = inner
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    kind = type(optimizer).__name__
    if callable(getattr(optimizer, "step", None)):
        for attribute, inner in _held_optimizers(optimizer):
            raise WrapError(
                f"{kind} is no torch.optim.Optimizer; it steps a {type(inner).__name__} (its attribute {attribute!r}) "
                "and may move weights before and after, out of reach of optimizer hooks; use an optimizer that does "
                "the same in its own step"
            )
    raise WrapError(f"optimizer must be a torch.optim.Optimizer, got {kind}; call wrap(optimizer, model, ...)")


def trained_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of all parameters that the optimizer trains."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def refusal_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> str | None:
    """Return why this optimizer cannot train alternating sub-nets of `model`, None if it can.

    Args:
        optimizer: The torch optimizer whose step really runs.
        model: What it trains.

    Returns:
        One sentence with the reason and what to do instead.
    """
    kind = type(optimizer).__name__
    for thing in (optimizer, model):
        if type(thing).__module__.partition(".")[0] == "deepspeed":
            return (
                f"{type(thing).__name__} is DeepSpeed's: its engine steps inside backward, out of reach of optimizer "
                "hooks; train with DDP or FSDP2 instead"
            )
    if getattr(optimizer, "is_second_order", False):
        return (
            f"{kind} needs second derivatives, which masks taken off after backward would falsify; use a first-order "
            "optimizer"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        return (
            f"{kind} takes sparse gradients alone, and those of prunable weights are dense tensors; use Adam, and "
            f"{kind} as a second optimizer for the embeddings"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return (
            f"{kind} was made with differentiable=True: its step becomes part of a graph, and masks put on and off in "
            "place do not; use differentiable=False"
        )
    if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
        return (
            f"{kind} trains in two half-steps (first_step, second_step) with a backward pass each, and hooks on its "
            "step see neither; use its base optimizer alone"
        )
    return (
        _refusal_of_hidden_state(optimizer)
        or _refusal_of_unseen_modes(optimizer)
        or _refusal_of_steps_in_backward(optimizer, model)
    )


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether all learning rates are zero; one on an accelerator would have to be waited for."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate == 0 for rate in rates if not isinstance(rate, torch.Tensor) or rate.device.type == "cpu")


def switches_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether ``optimizer.train()`` and ``optimizer.eval()`` exchange two sequences of weights."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _refusal_of_hidden_state(optimizer: torch.optim.Optimizer) -> str | None:
    trained = trained_by(optimizer)
    for attribute, inner in _held_optimizers(optimizer):
        if inner is not optimizer and trained & trained_by(inner):
            return (
                f"{type(optimizer).__name__} leaves the arithmetic to a {type(inner).__name__} (its attribute "
                f"{attribute!r}) and keeps no state itself, so it could be neither frozen nor kept per sub-net; give "
                "wrap() an optimizer that holds its own state"
            )
    return None


def _refusal_of_unseen_modes(optimizer: torch.optim.Optimizer) -> str | None:
    if switches_modes(optimizer) and not all("train_mode" in group for group in optimizer.param_groups):
        return (
            f"{type(optimizer).__name__} has train() and eval(), but no 'train_mode' in its parameter groups, by which "
            "the present mode can be known; use one that keeps it there, as those of the package schedulefree do"
        )
    return None


def _refusal_of_steps_in_backward(optimizer: torch.optim.Optimizer, model: nn.Module) -> str | None:
    where = "which is before a mask update, the correction and the count of steps can happen"
    remedy = "use the plain optimizer, stepped after backward"
    if callable(getattr(optimizer, "fused_backward", None)):
        return f"{type(optimizer).__name__} steps inside backward (fused_backward), {where}; {remedy}"
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None):
            return f"an optimizer is fused into the backward of parameter {name!r}, {where}; {remedy}"
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(parameter, attribute, None) or {}).values():
                if _steps_an_optimizer(hook):
                    return f"a hook on parameter {name!r} steps an optimizer inside backward, {where}; {remedy}"
    return None


def _steps_an_optimizer(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook calls something named ``step`` and has an optimizer within reach."""
    while isinstance(hook, functools.partial):
        if any(_reaches_optimizer(value) for value in (*hook.args, *hook.keywords.values())):
            return True
        hook = hook.func
    code = getattr(hook, "__code__", None)
    if code is None or "step" not in code.co_names:
        return False
    return _reaches_optimizer(getattr(hook, "__self__", None)) or any(
        _reaches_optimizer(value) for value in _enclosed_by(hook)
    )


def _enclosed_by(function: Callable[..., Any]) -> Iterator[Any]:
    """Yield what a function has in its closure and in its defaults."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from getattr(function, "__defaults__", None) or ()


def _reaches_optimizer(value: Any) -> bool:
    attributes = getattr(value, "__dict__", {})
    return any(True for held in (value, *attributes.values()) for _ in _optimizers_in(held))


def _held_optimizers(holder: object) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield attribute and optimizer for each optimizer that an object holds, also in containers."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if name not in ("param_groups", "state"):
            for inner in _optimizers_in(value):
                yield name, inner


def _optimizers_in(value: Any, depth: int = _DEPTH) -> Iterator[torch.optim.Optimizer]:
    if isinstance(value, torch.optim.Optimizer):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _optimizers_in(item, depth - 1)
