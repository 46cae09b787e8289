"""BatchNorm statistics estimated anew from data, as in ``torch.optim.swa_utils.update_bn``, restored on any error."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError
from ast_plugin.norm_layers import batch_norm_modules, is_batch_norm

Forward = Callable[[nn.Module, Any], Any]


def recalibrate_each(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    sub_nets: Iterable[str] | str | None,
    known: Sequence[str],
    put_on: Callable[[str], contextlib.AbstractContextManager[Any]],
    private: bool,
    forward: Forward | None = None,
    max_batches: int | None = None,
) -> None:
    """Recalibrate a model as each of several sub-nets.

    Args:
        model: The model.
        loader: Batches; iterated once a sub-net.
        sub_nets: Which ones, or the name of one; None takes all.
        known: All of them.
        put_on: Makes the model a sub-net for the length of a ``with`` block.
        private: Whether each has BatchNorm statistics of its own.
        forward: As in `recalibrate`.
        max_batches: As in `recalibrate`.

    Raises:
        ConfigError: If several sub-nets share statistics, or the loader is used up before the last.
    """
    chosen = (sub_nets,) if isinstance(sub_nets, str) else tuple(known if sub_nets is None else sub_nets)
    if len(chosen) > 1 and not private and batch_norm_modules(model):
        raise ConfigError(
            f"sub_nets={chosen} share one set of BatchNorm statistics, because private_normalization is "
            "False; recalibrate for one sub-net at a time, right before it is used"
        )
    if len(chosen) > 1 and iter(loader) is loader:
        raise ConfigError(
            f"loader must be iterable once for each of {len(chosen)} sub-nets, and a {type(loader).__name__} is "
            "used up after one; pass a DataLoader or a list"
        )
    for name in chosen:
        with put_on(name):
            recalibrate(model, loader, forward=forward, max_batches=max_batches)


def recalibrate(
    model: nn.Module, loader: Iterable[Any], *, forward: Forward | None = None, max_batches: int | None = None
) -> None:
    """Replace the running statistics of all BatchNorms by plain means over the batches of `loader`.

    Norms of other libraries take part if they have a `momentum`. Everything but the statistics stays: weights, modes,
    momenta, and after an exception the statistics too.

    Args:
        model: The model as it is to be measured; it is run in eval mode but for its BatchNorms.
        loader: Batches.
        forward: How to run the model on a batch; None feeds a tensor, the first item of a tuple or list, or the items
            of a mapping as keyword arguments, moved to the model's device.
        max_batches: How many batches to use; None takes all.

    Raises:
        ConfigError: If the loader gives no batch.
    """
    norms = [module for module in batch_norm_modules(model).values() if _can_average(module)]
    others = [module for module in norms if not is_batch_norm(module)]
    if not norms:
        return
    run = forward or default_forward
    modes = {module: module.training for module in model.modules()}
    momenta = [module.momentum for module in norms]
    before = [{key: b.clone() for key, b in module._buffers.items() if b is not None} for module in norms]
    batches = 0
    complete = False
    try:
        model.eval()
        for module in norms:
            module.training = True  # not train(), which would wake a dropout that lies inside
            if is_batch_norm(module):
                module.reset_running_stats()  # type: ignore[operator]  # a BatchNorm method
                module.momentum = None  # type: ignore[assignment]  # None: cumulative mean
        with torch.no_grad():
            for batch in itertools.islice(iter(loader), max_batches):
                for module in others:
                    module.momentum = 1 / (batches + 1)  # type: ignore[assignment]  # the same mean, batch by batch
                run(model, batch)
                batches += 1
        if not batches:
            raise ConfigError("loader gave no batch to recalibrate from; pass a re-iterable with at least one batch")
        complete = True
    finally:
        for module, momentum, buffers in zip(norms, momenta, before, strict=True):
            module.momentum = momentum
            if not complete:
                for key, value in buffers.items():
                    buffer = module._buffers[key]
                    if buffer is not None:
                        buffer.copy_(value)
        for module, training in modes.items():
            module.training = training


def _can_average(module: nn.Module) -> bool:
    tracked = any(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))
    return tracked and hasattr(module, "momentum")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run `model` on a batch as most loaders give it: a tensor, (inputs, ...), or a mapping of keyword arguments."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(inputs.to(device))
