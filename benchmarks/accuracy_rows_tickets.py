"""The rows of `accuracy.py` on sup-tickets: methods with and without cycles, single nets and an alternating run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accuracy_row import Row, options
from accuracy_runs import FINAL, SUPERPOSED, SUPERPOSED_RECALIBRATED


def _tickets(**settings: Any) -> dict[str, Any]:
    return {"mechanisms": {"sup_tickets": settings}}


def rows_of_tickets() -> Iterator[Row]:
    """Yield, for each method, for single nets and for one alternating run: without cycles, and what these change.

    All are runs of one sitting, so that each pair is the same up to the first cycle: granet is named, by which its runs
    are others than those of the tables above.
    """
    shown = (
        ("", FINAL, "the last ticket"),
        ("-avg", SUPERPOSED, "superposed, BatchNorm averaged"),
        ("-bn", SUPERPOSED_RECALIBRATED, "superposed, BatchNorm estimated anew"),
    )
    for method in ("granet", "rigl", "set"):
        for alone, words in ((True, "single"), (False, "alternating")):
            name, text = f"{method}-{'1' if alone else '3'}", f"{method}, {words}"
            method_changes = options(method=method)
            common: dict[str, Any] = {"alone": alone, "tasks": ("digits",)}
            yield Row(name=name, table="tickets", changes=method_changes, text=text, **common)
            for short, settings, cycles in (("tk", {}, "explore .5"), ("tk0", {"explore": 0.0}, "explore 0")):
                changes = {**method_changes, **_tickets(**settings)}
                for ending, readout, what in shown:
                    yield Row(
                        name=f"{name}-{short}{ending}",
                        table="ticket_gains",
                        changes=changes,
                        readout=readout,
                        reference=name,
                        text=f"{text}, {cycles}: {what}",
                        **common,
                    )
    for ending, readout, what in shown:
        yield Row(
            name=f"granet-3-tk.1{ending}",
            table="ticket_gains",
            changes={**options(method="granet"), **_tickets(lr=[0.02, 0.1])},
            readout=readout,
            reference="granet-3",
            tasks=("digits",),
            text=f"granet, alternating, explore .5, rate .02 to .1: {what}",
        )
    # Cycles are a share of the run, so in a longer one sub-nets have longer to recover from an exploration.
    text = "granet, alternating, five times as long"
    longer: dict[str, Any] = {"share": 5.0, "tasks": ("digits",)}
    yield Row(name="granet-3-x5", table="tickets", changes=options(method="granet"), text=text, **longer)
    for short, settings, cycles in (("tk", {}, "explore .5"), ("tk0", {"explore": 0.0}, "explore 0")):
        for ending, readout, what in shown:
            yield Row(
                name=f"granet-3-x5-{short}{ending}",
                table="ticket_gains",
                changes={**options(method="granet"), **_tickets(**settings)},
                readout=readout,
                reference="granet-3-x5",
                text=f"{text}, {cycles}: {what}",
                **longer,
            )
