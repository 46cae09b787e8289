"""Time and compare forms of one network on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ASTError, ConfigError

_MOST_ROUNDS = 100
_LEAST_ROUNDS = 3
_TOLERANCE = 1e-3  # of the largest output: sums in another order, through many layers


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run a model on example inputs.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    raise ConfigError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, got "
        f"{type(example_inputs).__name__}"
    )


def first_call(model: nn.Module, example_inputs: Any) -> Any:
    """Run a model on example inputs that nothing has been tried on yet.

    Args:
        model: The model.
        example_inputs: As in `call`.

    Raises:
        ConfigError: If they are something else, or the model cannot be run on them; its own error is chained.
    """
    try:
        return call(model, example_inputs)
    except ASTError:
        raise
    except Exception as error:
        raise ConfigError(
            f"example_inputs ({describe_inputs(example_inputs)}) cannot be run through the model: "
            f"{type(error).__name__}: {error}; give what the model accepts, on its device"
        ) from error


def describe_inputs(example_inputs: Any) -> str:
    """Return the shapes of an example input, such as ``1 x 3 x 32 x 32`` or ``input_ids: 1 x 128``."""
    if isinstance(example_inputs, Tensor):
        return " x ".join(str(size) for size in example_inputs.shape) or "one number"
    if isinstance(example_inputs, Mapping):
        return ", ".join(f"{name}: {describe_inputs(value)}" for name, value in example_inputs.items()) or "no input"
    if isinstance(example_inputs, (tuple, list)):
        return ", ".join(describe_inputs(value) for value in example_inputs) or "no input"
    return type(example_inputs).__name__


def interleaved(functions: Mapping[str, Callable[[], Any]], *, seconds: float) -> dict[str, float]:
    """Return the median time of each function in ms, called in turn.

    Each is called once to warm up. Then come rounds until the time is over: at least 3, at most 100. Where one thread
    computes everything, its processor time is taken, which other programs on the machine disturb less.

    Args:
        functions: By name; on CUDA they need not wait for the device.
        seconds: How long to measure, at least 0.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    clock = time.perf_counter if torch.get_num_threads() > 1 or torch.cuda.is_initialized() else time.thread_time
    began = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name, function in functions.items():
            _wait()
            started = clock()
            function()
            _wait()
            times[name].append(clock() - started)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def same_outputs(one: Any, other: Any) -> bool:
    """Return whether two outputs of a model have the same structure, and tensors that agree to float tolerance."""
    pairs = list(zip(output_tensors(one), output_tensors(other), strict=False))
    if len(list(output_tensors(one))) != len(list(output_tensors(other))):
        return False
    return all(_close(left, right) for left, right in pairs)


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    if not left.is_floating_point() or not left.numel():
        return True  # such as the number of the largest logit, which a last digit may decide
    left, right = left.double(), right.double()
    scale = left.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-12)
    return torch.allclose(left / scale, right / scale, rtol=0, atol=_TOLERANCE, equal_nan=True)


def output_tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns or is given: tensors, mappings, tuples and lists of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from output_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from output_tensors(value)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
