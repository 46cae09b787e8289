"""Which layers normalise by running statistics, and so need a state of their own for every sub-net."""

from __future__ import annotations

from torch import nn


def batch_norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of `model` that every sub-net has its own of, by name.

    They are the BatchNorms, of any dimension, synchronised ones and subclasses too, and whatever else learns and keeps
    running statistics of its own: instance norms that track them, batch norms of other libraries that derive from no
    class of torch. A frozen one that has statistics but nothing to learn is not among them.
    """
    modules = model.named_modules()
    return {name: module for name, module in modules if is_batch_norm(module) or _keeps_statistics(module)}


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is one of torch's BatchNorms, or of a class derived from them."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _keeps_statistics(module: nn.Module) -> bool:
    if all(module._buffers.get(name) is None for name in ("running_mean", "running_var")):
        return False
    learnt = [parameter for parameter in module._parameters.values() if parameter is not None]
    in_torch = isinstance(module, nn.modules.batchnorm._NormBase)
    return in_torch or (bool(learnt) and all(parameter.ndim <= 1 for parameter in learnt))
