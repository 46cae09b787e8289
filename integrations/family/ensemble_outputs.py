"""What of a network's output is averaged, and the average in the place where it stood."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ast_plugin.errors import ConfigError

Pick = Callable[[Any], Tensor]

_ROUNDING = 1e-5  # how far from 1 the sum of probabilities may lie


def picked(output: Any, pick: Pick | None) -> Tensor:
    """Return the tensor of a network's output that is averaged.

    Args:
        output: A floating-point tensor, an object or mapping that holds one as ``logits``, a tuple or list of one
            item; with `pick` anything.
        pick: Returns the tensor; None for the forms above.

    Raises:
        ConfigError: If there is no such tensor.
    """
    found = output if pick is None else pick(output)
    if pick is None and not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            found = output.get("logits")
        elif isinstance(output, (tuple, list)):
            found = output[0] if len(output) == 1 else None
        else:
            found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        what = f"the network returns {_described(output)}" if pick is None else f"pick returned {_described(found)}"
        raise ConfigError(
            f"{what}, which cannot be averaged; give pick=..., a function that takes what the network returns to one "
            "tensor of logits, or of numbers with task='regression'"
        )
    if not found.is_floating_point():
        raise ConfigError(
            f"the network's output is of {found.dtype}, and averages are made of logits or numbers; give pick=..., a "
            "function that takes what the network returns to one floating-point tensor"
        )
    return found


def placed(average: Tensor, output: Any, pick: Pick | None) -> Any:
    """Return an average in the place where `picked` found what it was made of; whatever stood beside it is left out.

    Args:
        average: The average.
        output: A member's output.
        pick: As for `picked`; with it the average comes back as a tensor.
    """
    if pick is not None or isinstance(output, Tensor):
        return average
    if isinstance(output, (tuple, list)):
        return (average,)
    try:
        return type(output)(logits=average)  # also what is a plain dict
    except Exception:  # a class of anybody's: what its constructor makes of this is not known
        return types.SimpleNamespace(logits=average)


def class_place(scores: Tensor, class_dim: int | None, output: Any) -> int:
    """Return which dimension of a tensor of logits counts the classes, from 0.

    Args:
        scores: The logits.
        class_dim: What the caller says; None: the last one of (examples, classes), and of (examples, tokens, classes)
            where a Hugging Face model returns it.
        output: What the network returned.

    Raises:
        ConfigError: If it cannot be told, is out of range, or there are fewer than two classes.
    """
    shape = tuple(scores.shape)
    if class_dim is None:
        if scores.dim() != 2 and not (scores.dim() == 3 and not isinstance(output, Tensor)):
            raise ConfigError(
                f"the network's output has shape {shape}, and which dimension counts the classes is not clear; give "
                "class_dim, such as class_dim=1 for segmentation, or task='regression' if there are none"
            )
        class_dim = -1
    if not -scores.dim() <= class_dim < scores.dim():
        raise ConfigError(f"class_dim={class_dim} is no dimension of the network's output, which has shape {shape}")
    if scores.shape[class_dim] < 2:
        raise ConfigError(
            f"the network's output has shape {shape}, and a single class is always right; for the logit of a yes give "
            "pick=lambda z: torch.cat([torch.zeros_like(z), z], 1), for a number task='regression'"
        )
    return class_dim % scores.dim()


def warn_of_probabilities(scores: Tensor, dim: int) -> None:
    """Warn if what was taken for logits looks like probabilities, whose softmax would be averaged then.

    Args:
        scores: The tensor.
        dim: Its dimension of classes.
    """
    if scores.numel() and bool((scores >= 0).all()) and bool(((scores.sum(dim) - 1).abs() < _ROUNDING).all()):
        warnings.warn(
            "the network seems to return probabilities, and logits are expected: if they are, give "
            "pick=lambda output: output.log()",
            UserWarning,
            stacklevel=2,
        )


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
