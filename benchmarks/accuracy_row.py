"""What a row of `accuracy.py` is: which runs it makes, how they are measured, what they are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from accuracy_runs import FINAL, Settings, SubNet
from accuracy_tasks import TASKS

ALTERNATING = "alternating"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: How it is asked for.
        text: What it is, for the table.
        table: The table that it belongs to.
        changes: What differs from the task's reference run, by names of `Settings`; mappings are merged.
        alone: Whether every sub-net is trained in a run of its own.
        share: Which share of the reference run's steps each run makes; None: one in as many as there are sub-nets.
        readout: How its runs are measured.
        tasks: Where it makes sense.
        reference: The row that differences are taken from.
    """

    name: str
    text: str
    table: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False
    share: float | None = 1.0
    readout: str = FINAL
    tasks: tuple[str, ...] = tuple(TASKS)
    reference: str = ALTERNATING

    def runs(self, task: str, seed: int, *, steps: int | None = None) -> Iterator[Settings]:
        """Yield the settings of the row's runs for one seed.

        Args:
            task: Name of the task.
            seed: The seed.
            steps: Of the reference run; None takes the task's.
        """
        values: dict[str, Any] = dict(TASKS[task].defaults)
        for key, value in self.changes.items():
            if key == "learning_rate_times":
                values["learning_rate"] = values["learning_rate"] * value
            elif key == "weight_decay_times":
                values["weight_decay"] = values["weight_decay"] * value
            else:
                values[key] = {**values.get(key, {}), **value} if isinstance(value, Mapping) else value
        sparsities = values["sparsities"]
        share = self.share if self.share is not None else 1 / len(sparsities)
        values["steps"] = round((steps or values["steps"]) * share)
        for chosen in [(s,) for s in sparsities] if self.alone else [sparsities]:
            yield Settings(task=task, seed=seed, **{**values, "sparsities": chosen})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of rows.

    Attributes:
        title: With ``{measure}`` for the figure shown.
        absolute: Whether it shows the figures themselves, not differences from each row's reference.
        sparsities: Of the sub-nets that it shows; None: the task's.
    """

    title: str
    absolute: bool
    sparsities: tuple[SubNet, ...] | None = None


def options(**settings: Any) -> dict[str, Any]:
    """Return changes of the settings of `ASTConfig`."""
    return {"options": settings}
