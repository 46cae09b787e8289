"""Which way a channel sub-net can be computed in the present setup, and why not another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from ast_plugin.errors import ActivationError

Slicing = Literal["auto", "leaves", "gather", "off"]
Route = Literal["leaves", "gather", "off"]


def route_for(slicing: Slicing, called: nn.Module, compiling: bool = False, *, sharded: bool = False) -> Route:
    """Return the route to take now.

    Args:
        slicing: The setting.
        called: The outermost module that the training loop calls.
        compiling: Whether the forward is being traced or compiled, or runs within compiled code.
        sharded: Whether ranks hold parts of the parameters.

    Raises:
        ActivationError: If the setting asks for a route that would compute something else.
    """
    if slicing == "off":
        return "off"
    reason = _no_slices(called, compiling=compiling, sharded=sharded)
    if reason is not None:
        if slicing != "auto":
            raise ActivationError(f'slicing="{slicing}" {reason}; use slicing="auto" or "off"')
        return "off"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if slicing == "leaves" and distributed:
        raise ActivationError(
            'slicing="leaves" gives gradients to tensors that data-parallel modules do not know, so ranks would drift '
            'apart; use slicing="auto" or "gather" with several processes'
        )
    if slicing == "auto":
        return "gather" if distributed else "leaves"
    return slicing


def way_of(slicing: Slicing, called: nn.Module, *, compiling: bool = False, sharded: bool = False) -> str:
    """Return how channel sub-nets are computed now, for people to read; arguments as for `route_for`."""
    reason = _no_slices(called, compiling=compiling, sharded=sharded)
    if slicing == "off" or reason is not None:
        return "with masked weights" + (f", because smaller ones {reason}" if slicing != "off" else "")
    gathered = slicing == "gather" or (slicing == "auto" and route_for(slicing, called) == "gather")
    return "with smaller weights" + (", gathered by autograd" if gathered else "")


def _no_slices(called: nn.Module, *, compiling: bool, sharded: bool) -> str | None:
    if sharded:
        return "cannot cut weights of which every rank holds a part"
    for module in called.modules():
        if compiling or _is_compiled(module):
            return (
                "cannot be used in compiled or traced code, which does not notice that smaller weights stand in for "
                "the model's own"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            return "cannot be used with DataParallel over several devices, which copies the weights of full size"
    return None


def _is_compiled(module: nn.Module) -> bool:
    held = module.__dict__
    if held.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules:
        return True
    return "forward" in held and hasattr(held["forward"], "_torchdynamo_orig_callable")


def check_not_traced() -> None:
    """Refuse to put a sub-net on where the code at hand is recorded: what puts it on would be recorded too.

    Raises:
        ActivationError: If ``torch.export`` or ``torch.jit.trace`` records it.
    """
    if is_tracing():
        raise ActivationError(
            "a wrapped model cannot be exported or traced as it is: what puts a sub-net on would become a part of the "
            "program; write one with ast_plugin.export_graph.export_program(ast, name, model, example_inputs, path) or "
            "export_onnx(...), or trace inside `with ast.sub_net(name):`, and use and save the program there, because "
            "it shares the model's tensors"
        )


def is_tracing() -> bool:
    """Return whether the code at hand is recorded, by ``torch.export`` or ``torch.jit.trace``."""
    exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 and later
    return torch._C._is_tracing() or exporting()
