"""The rows of `accuracy.py` on sup-tickets: methods with and without cycles, single nets and an alternating run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accuracy_row import Row, options
from accuracy_runs import FINAL, SUPERPOSED, SUPERPOSED_RECALIBRATED

_SHOWN = (
    ("", FINAL, "the last ticket"),
    ("-avg", SUPERPOSED, "superposed, BatchNorm averaged"),
    ("-bn", SUPERPOSED_RECALIBRATED, "superposed, BatchNorm estimated anew"),
)


def rows_of_tickets() -> Iterator[Row]:
    """Yield, for each method, for single nets and for one alternating run: without cycles, and what these change.

    All are runs of one sitting, so that each pair is the same up to the first cycle: granet is named, by which its runs
    are others than those of the tables above.
    """
    for method in ("granet", "rigl", "set"):
        for alone, words in ((True, "single"), (False, "alternating")):
            name = f"{method}-{'1' if alone else '3'}"
            yield from _without_and_with(name, f"{method}, {words}", method, alone=alone)
    text = "granet, alternating, explore .5, rate .02 to .1"
    yield from _with("granet-3-tk.1", "granet-3", text, "granet", {}, lr=[0.02, 0.1])
    # Cycles are a share of the run, so in a longer one sub-nets have longer to recover from an exploration.
    yield from _without_and_with("granet-3-x5", "granet, alternating, five times as long", "granet", share=5.0)


def _without_and_with(name: str, text: str, method: str, **common: Any) -> Iterator[Row]:
    """Yield a run without cycles, and the same with them, with exploration and without."""
    yield Row(name=name, table="tickets", changes=options(method=method), text=text, tasks=("digits",), **common)
    yield from _with(f"{name}-tk", name, f"{text}, explore .5", method, common)
    yield from _with(f"{name}-tk0", name, f"{text}, explore 0", method, common, explore=0.0)


def _with(
    name: str, reference: str, text: str, method: str, common: Mapping[str, Any], **settings: Any
) -> Iterator[Row]:
    """Yield a run with cycles, measured in each way."""
    for ending, readout, what in _SHOWN:
        yield Row(
            name=f"{name}{ending}",
            table="ticket_gains",
            changes={**options(method=method), "mechanisms": {"sup_tickets": settings}},
            readout=readout,
            reference=reference,
            text=f"{text}: {what}",
            tasks=("digits",),
            **common,
        )
