"""How `overhead.py` takes time: interleaved steps, processor time, and timers around a controller's hooks."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ast_plugin import AlternatingSparseTraining
from overhead_tasks import Batch

EVENTS = (
    "before_forward",
    "after_forward",
    "backward_began",
    "accumulated",
    "after_backward",
    "before_step",
    "after_step",
)


class HookTimer:
    """Adds up, by event, the processor time that steps spend in functions that it was given.

    Attributes:
        parts: Seconds by event since the last `take`.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def timed(self, event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and counts its time for `event`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[event] = self.parts.get(event, 0.0) + time.thread_time() - started

        return call

    def attach(self, ast: AlternatingSparseTraining) -> None:
        """Time everything of a controller that runs during a step, where torch calls it."""
        on_hooks(ast, self.timed)

    def take(self) -> dict[str, float]:
        """Return the seconds by event, and begin anew."""
        parts, self.parts = self.parts, {}
        return parts


def on_hooks(ast: AlternatingSparseTraining, wrapper: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a wrapper around every entry by which torch reaches a controller during a step; none contains another.

    Args:
        ast: The controller.
        wrapper: Given the event and the function, returns what is called instead.
    """
    model, optimizer, events = ast.model, ast.optimizer, ast._events
    for event, hooks in (
        ("before_forward", model._forward_pre_hooks),
        ("after_forward", model._forward_hooks),
        ("before_step", optimizer._optimizer_step_pre_hooks),
        ("after_step", optimizer._optimizer_step_post_hooks),
    ):
        for key, function in list(hooks.items()):
            hooks[key] = wrapper(event, function)
    # These are looked up at the moment of the call, so an attribute of the object stands before the class's.
    attachment, gradients = ast._attachment, ast._parts.gradients
    for event, owner, name in (
        ("backward_began", attachment, "_backward_began"),
        ("after_backward", events, "after_backward"),
        ("accumulated", gradients, "accumulated"),
    ):
        setattr(owner, name, wrapper(event, getattr(owner, name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One step of one contender.

    Attributes:
        cpu: Processor time of the process, in seconds.
        wall: Time that passed, in seconds.
        phase: Which sub-net was trained; empty where there are none.
        hooks: Seconds by event inside `cpu`.
    """

    cpu: float
    wall: float
    phase: str = ""
    hooks: dict[str, float] = dataclasses.field(default_factory=dict)


class Steps(Protocol):
    """What can be measured."""

    name: str
    timer: HookTimer | None

    @property
    def phase(self) -> str:
        """Which sub-net the next step trains, empty where there are none."""

    def step(self, batch: Batch) -> None:
        """Make one training step."""


def measure(contenders: Sequence[Steps], batch: Batch, *, rounds: int, warmup: int = 2) -> dict[str, list[Sample]]:
    """Make steps in turn, the order rotated from round to round.

    Args:
        contenders: What to measure; names must differ.
        batch: What all of them train on.
        rounds: Steps of each that count.
        warmup: Steps of each before those.

    Returns:
        By name one sample a round.
    """
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.freeze()  # the more contenders there are, the longer every collection would take
    try:
        for number in range(warmup + rounds):
            first = number % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                sample = timed_step(contender, batch)
                if number >= warmup:
                    samples[contender.name].append(sample)
    finally:
        gc.unfreeze()
    return samples


def timed_step(contender: Steps, batch: Batch) -> Sample:
    """Make one step and return what it took."""
    phase = contender.phase
    if contender.timer is not None:
        contender.timer.take()
    wall, cpu = time.perf_counter(), time.process_time()
    contender.step(batch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Sample(cpu=cpu, wall=wall, phase=phase, hooks=contender.timer.take() if contender.timer else {})


def ratio(samples: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, float]:
    """Return median and quartiles of the step's cost by that of the reference, round by round.

    Returns:
        ``cpu`` and ``wall``: medians; ``low`` and ``high``: quartiles of the former.
    """
    cpu = [one.cpu / other.cpu for one, other in zip(samples, reference, strict=True)]
    wall = [one.wall / other.wall for one, other in zip(samples, reference, strict=True)]
    low, _, high = statistics.quantiles(cpu, n=4, method="inclusive") if len(cpu) > 1 else (cpu[0],) * 3
    return {"cpu": statistics.median(cpu), "wall": statistics.median(wall), "low": low, "high": high}


def hook_times(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the time in hooks by event and in ``all``, in seconds a step.

    Steps of different sub-nets do different work (the first of a group is not corrected), so medians are taken for
    each and averaged.
    """
    phases: dict[str, list[dict[str, float]]] = {}
    for sample in samples:
        phases.setdefault(sample.phase, []).append({**sample.hooks, "all": sum(sample.hooks.values())})
    return {
        event: statistics.mean(statistics.median(hooks.get(event, 0.0) for hooks in steps) for steps in phases.values())
        for event in (*EVENTS, "all")
        if any(event in hooks for steps in phases.values() for hooks in steps)
    }
