"""What `overhead.py` counts as extra memory: real tensors, between steps and at the peak within a step.

*Between steps*: the bytes of every tensor and numpy array that is alive after a step of alternating training, less
those after a plain step of the same model. Memory that several share counts once. Model, gradients and optimizer state
are in both and drop out; masks, kept dense weights, buffers, private BatchNorm state and the reference gradient remain.
The largest figure over one turn of all sub-nets counts.

*At the peak*: that, and what the controller allocates and has not yet freed at the worst moment inside a step, as
torch's profiler records every allocation. Only allocations inside the controller's own hooks count, and their release
wherever it happens; activations are the model's.

*At a mask update* numpy works too, which torch does not see: the two peaks are added, an upper bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function

import ast_plugin
from ast_plugin import AlternatingSparseTraining
from overhead_contenders import SPARSITIES, settled
from overhead_tasks import Task, train_step
from overhead_timing import on_hooks

Run = tuple[nn.Module, torch.optim.Optimizer, AlternatingSparseTraining | None]

FINAL = "final masks"

_MARK = "of the controller: "
_FAR = 10**9


@contextlib.contextmanager
def only_new() -> Iterator[None]:
    """Have `live_bytes` count only what is made inside the block."""
    gc.collect()
    gc.freeze()  # the collector lists no object that was frozen
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Return the bytes of all tensors and numpy arrays that are alive, each piece of memory once."""
    gc.collect()
    found: dict[int, int] = {}
    things = gc.get_objects()
    # numpy arrays are unknown to the collector, but not what holds them.
    for array in gc.get_referents(*things):
        if type(array) is np.ndarray and array.flags.owndata:
            found[array.ctypes.data] = array.nbytes
    for thing in things:
        if type(thing) in (Tensor, nn.Parameter):
            _count(thing, found)
    return sum(found.values())


def _count(tensor: Tensor, found: dict[int, int]) -> None:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return
    storage = tensor.untyped_storage()
    found[storage.data_ptr()] = storage.nbytes()
    if tensor.is_leaf and tensor.grad is not None:  # may have no Python object of its own
        gradient = tensor.grad.untyped_storage()
        found[gradient.data_ptr()] = gradient.nbytes()


def held_after_steps(run: Run, task: Task, *, count: int) -> list[int]:
    """Make steps and return the bytes that are alive after each; inside `only_new`, those of the run."""
    model, optimizer, _ = run
    figures = []
    for _ in range(count):
        train_step(model, optimizer, task.small_batch)
        figures.append(live_bytes())
    return figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One event of the allocator.

    Attributes:
        address: Of the memory.
        change: Its bytes; negative where it is freed.
        inside: Whether it happened in a hook of the controller.
    """

    address: int
    change: int
    inside: bool


def own_peak(allocations: Iterable[Allocation]) -> int:
    """Return the most bytes that the controller held over what it held at the beginning.

    Its own is what was allocated inside its hooks, and what is freed there without having been seen before.
    """
    mine: set[int] = set()
    held = peak = 0
    for event in allocations:
        if event.change > 0 and event.inside:
            mine.add(event.address)
            held += event.change
        elif event.change < 0 and (event.address in mine or event.inside):
            mine.discard(event.address)
            held += event.change
        elif event.change > 0:
            mine.discard(event.address)
        peak = max(peak, held)
    return peak


def mark_hooks(ast: AlternatingSparseTraining) -> None:
    """Have the profiler tell allocations of the controller from those of the training."""

    def marked(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + event):
                return function(*args, **kwargs)

        return call

    on_hooks(ast, marked)


def recorded(action: Callable[[], object]) -> list[Allocation]:
    """Return the allocations that an action makes, in the order of time."""
    with profile(use_cpu=True, profile_memory=True) as found:
        action()
    results = found.kineto_results
    if results is None:
        raise RuntimeError("torch's profiler recorded nothing")

    def walk(nodes: Iterable[Any], inside: bool) -> Iterator[tuple[int, Allocation]]:
        for node in nodes:
            fields = node.extra_fields
            if hasattr(fields, "alloc_size"):
                event = Allocation(address=fields.ptr, change=fields.alloc_size, inside=inside)
                yield node.start_time_ns, event
            yield from walk(node.children, inside or node.name.startswith(_MARK))

    return [event for _, event in sorted(walk(results.experimental_event_tree(), False), key=lambda pair: pair[0])]


def extra_memory(start: Callable[[], Run], task: Task, plain_bytes: int, *, updates: bool = False) -> dict[str, float]:
    """Return the extra bytes a prunable parameter, ``between`` steps and at the ``peak`` within one.

    Args:
        start: Builds the training, in the state that is asked for.
        task: Where the batch comes from.
        plain_bytes: What plain training holds after a step.
        updates: Whether masks are updated, which takes memory that torch does not see.
    """
    turn = len(SPARSITIES)
    with only_new():
        model, optimizer, ast = start()
        if ast is None:
            raise ValueError("start must build a training with a controller")
        steps = functools.partial(_steps, model, optimizer, task, turn)
        steps()
        held = held_after_steps((model, optimizer, ast), task, count=turn)
        mark_hooks(ast)
        peak = held[-1] + own_peak(recorded(steps))
        if updates:
            peak += numpy_peak(steps)
        weights = ast.masks.total()
    return {"between": (max(held) - plain_bytes) / weights, "peak": (peak - plain_bytes) / weights}


def numpy_peak(action: Callable[[], object]) -> int:
    """Return the most bytes that Python and numpy, but not torch, hold during an action over what they held before."""
    tracemalloc.start()
    try:
        action()  # what it replaces in the second call is known then
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, count: int) -> None:
    for _ in range(count):
        train_step(model, optimizer, task.small_batch)


def _ramping(task: Task, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, AlternatingSparseTraining]:
    model = task.model()
    optimizer = task.optimizer_of(model)
    return model, optimizer, ast_plugin.wrap(optimizer, model, sparsities=SPARSITIES, total_steps=_FAR, **options)


def measure_memory(task: Task) -> dict[str, dict[str, float]]:
    """Return by state of the training the extra bytes a prunable parameter, between steps and at the peak."""
    with only_new():
        model = task.model()
        plain_bytes = held_after_steps((model, task.optimizer_of(model), None), task, count=2)[-1]
        del model
    ramp: dict[str, Any] = {"begin_step": _FAR // 4, "update_interval": 1000, "end_step": _FAR // 2}
    updating: dict[str, Any] = {"begin_step": 0, "update_interval": 1, "end_step": 1000}
    states: dict[str, Callable[[], Run]] = {
        FINAL: lambda: settled(task, SPARSITIES),
        "final masks, correction off": lambda: settled(task, SPARSITIES, correction="off"),
        "final masks, freeze": lambda: settled(task, SPARSITIES, inactive="freeze"),
        "start of a ramp, everything kept": lambda: _ramping(task, **ramp),
        "within a ramp, half kept": lambda: _ramping(task, initial_sparsity=0.5, **ramp),
    }
    found = {name: extra_memory(start, task, plain_bytes) for name, start in states.items()}
    found["mask update, half kept (at most)"] = extra_memory(
        lambda: _ramping(task, initial_sparsity=0.5, **updating), task, plain_bytes, updates=True
    )
    return found
