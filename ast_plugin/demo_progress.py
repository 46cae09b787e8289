"""How the demo shows where it is: a live display in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN_LINES = 10
# Reading the loss waits for nothing on a CPU, but formatting it for every step would cost more than it tells.
_REFRESH_SECONDS = 0.1
_WITHIN = 1e-3


class Progress(AbstractContextManager["Progress"]):
    """Plain lines: ten over the run, each with the step, its loss, and the sub-nets with their sparsities.

    The sub-net that the step trained is marked: ``>s95``.

    Args:
        out: Where to print.
        steps: Steps of the whole run.
        done: Steps done before this sitting.
        targets: Sub-net name -> target sparsity.
    """

    def __init__(self, out: TextIO, *, steps: int, done: int, targets: Mapping[str, float]) -> None:
        self._out = out
        self._steps = steps
        self._done = done
        self._targets = targets
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is left to close."""

    def update(self, step: int, *, sub_net: str, loss: Tensor, sparsities: Mapping[str, float]) -> None:
        """Show that a step was done.

        Args:
            step: Steps done, this one included.
            sub_net: The sub-net that it trained.
            loss: Its loss.
            sparsities: Sub-net name -> sparsity of its masks now.
        """
        if step < self._steps and not self._is_due(step):
            return
        width = len(str(self._steps))
        shown = "  ".join(
            f"{'>' if name == sub_net else ''}{name} {100 * share:.1f} %" for name, share in sparsities.items()
        )
        line = f"step {step:>{width}}/{self._steps}  loss {float(loss):.3f}  zeros: {shown}"
        left = seconds_left(self._left(step))
        print(f"{line}  {left}" if left else line, file=self._out, flush=True)

    def _is_due(self, step: int) -> bool:
        sub_nets = len(self._targets)
        # Sub-nets take turns, and a tenth of the steps may be a whole number of turns: the points move on by one each,
        # so that not every line shows the same sub-net.
        turn = sub_nets if self._steps >= 2 * _PLAIN_LINES * sub_nets else 1
        return any(
            step == -(-self._steps * line // _PLAIN_LINES) + (line - 1) % turn for line in range(1, _PLAIN_LINES)
        )

    def _left(self, step: int) -> float:
        sitting = step - self._done
        return (time.monotonic() - self._started) / sitting * (self._steps - step) if sitting > 0 else 0.0


class LiveProgress(Progress):
    """A bar for the run, and below it one a sub-net: the one being trained is marked, each shows its sparsity.

    Args:
        out: A terminal.
        steps: Steps of the whole run.
        done: Steps done before this sitting.
        targets: Sub-net name -> target sparsity.

    Raises:
        ImportError: If rich is not installed.
    """

    def __init__(self, out: TextIO, *, steps: int, done: int, targets: Mapping[str, float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        super().__init__(out, steps=steps, done=done, targets=targets)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=Console(file=out),
            auto_refresh=False,
        )
        self._run = self._bars.add_task("training", total=steps, completed=done, status=f"{done}/{steps} steps")
        self._rows = {
            name: self._bars.add_task(f"  {name}", total=_share(target), status="") for name, target in targets.items()
        }
        self._shown = 0.0
        self._counts = dict.fromkeys(targets, 0)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, step: int, *, sub_net: str, loss: Tensor, sparsities: Mapping[str, float]) -> None:
        """Show that a step was done; at most ten times a second, and the last step always."""
        now = time.monotonic()
        if step < self._steps and now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        status = f"{step}/{self._steps} steps  loss {float(loss):.3f}  {seconds_left(self._left(step))}"
        self._bars.update(self._run, completed=step, status=status)
        for name, row in self._rows.items():
            active = name == sub_net and step < self._steps
            # Whole weights seldom make exactly the target: the bar shall be full all the same when it is reached.
            reached = sparsities[name] >= self._targets[name] - _WITHIN
            self._bars.update(
                row,
                description=f"[bold cyan]> {name}[/]" if active else f"  {name}",
                completed=_share(self._targets[name] if reached else sparsities[name]),
                status=f"{100 * sparsities[name]:.1f} % of {100 * self._targets[name]:g} % zeros"
                + ("  training now" if active else ""),
            )
        self._bars.refresh()


def progress(out: TextIO, *, steps: int, done: int, targets: Mapping[str, float]) -> Progress:
    """Return the live display if `out` is a terminal and rich is installed, else plain lines."""
    if out.isatty():
        try:
            return LiveProgress(out, steps=steps, done=done, targets=targets)
        except ImportError:
            pass
    return Progress(out, steps=steps, done=done, targets=targets)


def _share(sparsity: float) -> float:
    """Return a sparsity as a length of a bar, which must not be zero."""
    return max(sparsity, 1e-9)


def seconds_left(seconds: float) -> str:
    """Return a remaining time in words: ``42 s left``, ``2 min 5 s left``; nothing for less than half a second."""
    whole = round(seconds)
    if whole <= 0:
        return ""
    return f"{whole // 60} min {whole % 60} s left" if whole >= 60 else f"{whole} s left"
