"""Extra forward passes of a training step: the losses of several masks on its data, without a trace of them.

The user's own code computes the loss: a function of no arguments, or the closure of ``optimizer.step(closure)``, which
also clears gradients and runs backward. Here it runs without gradients, ``backward`` does nothing, and what it leaves
behind is undone: gradients, random generators, buffers such as running statistics. So the training forward that follows
draws the dropout of all the extra passes, and everything but the masks is as if they had never been.

Early releases of torch let ``loss.backward()`` be passed over, but not the function ``torch.autograd.backward``, which
raises there, because nothing has gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ast_plugin.errors import ConfigError
from ast_plugin.random_state import RandomState

Loss = Callable[[], Any]

_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


def losses_of(
    loss: Loss,
    count: int,
    put_on: Callable[[int], contextlib.AbstractContextManager[object]],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Return the loss of each of `count` masks, tried from the last to the first.

    Args:
        loss: Computes it; may clear gradients and call ``backward``, but must give the same when it is called again.
        count: How many masks.
        put_on: Returns a context in which the model computes with the mask of that index.
        module: What holds all modules that `loss` may run.
        optimizer: What it may clear the gradients of.

    Returns:
        float64 (count,), on the CPU.

    Raises:
        ConfigError: If it returns something else than a number.
    """
    found = torch.zeros(count, dtype=torch.float64)
    trained = (p for group in optimizer.param_groups for p in group["params"])
    with _gradients_aside((*module.parameters(), *trained)), torch.no_grad():
        for index in reversed(range(count)):
            with _untouched(module), put_on(index):  # smaller buffers are written back when it is taken off
                with _WithoutBackward():
                    value = loss()
                found[index] = _number(value)
    return found


class _WithoutBackward(TorchFunctionMode):
    """Has backward do nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return None if func in _BACKWARD else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take gradients away for the length of a block: clearing them in place must not reach them."""
    held = [(parameter, parameter.grad) for parameter in dict.fromkeys(parameters)]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Leave random generators and buffers as they were."""
    chance = RandomState()
    state = chance.state_dict()
    slots = [(part._buffers, name) for part in module.modules() for name in part._buffers]
    held = [(buffers, name, tensor, tensor.clone()) for buffers, name in slots if (tensor := buffers[name]) is not None]
    try:
        yield
    finally:
        chance.load_state_dict(state)
        for buffers, name, tensor, values in held:
            buffers[name] = tensor.copy_(values)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the loss of an extra forward pass must be one number, got {found}; have the closure of optimizer.step(), "
            "or the function given to explore(), return the loss"
        ) from None
