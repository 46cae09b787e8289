"""What an evaluation of an ensemble found, as records and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from ast_plugin.report_format import ABSENT, clean, decimal, decimals, grouped, percent
from ast_plugin.report_text import TextTable, render_tables

_MEANING = (
    "ECE: expected calibration error, 15 bins. NLL: negative log-likelihood, nats. Errors found: AUROC of a low "
    "confidence as a detector of errors. Time: of the forward passes, with the switches between sub-nets, on this "
    "machine. Weights kept: of all passes together."
)
_MEANING_OF_NUMBERS = (
    "RMSE: root mean squared error. Time: of the forward passes, with the switches between sub-nets, on this machine. "
    "Weights kept: of all passes together."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleRecord:
    """One member, or the ensemble.

    Attributes:
        name: The sub-net; ``ensemble`` for all of them.
        forward_passes: Forward passes for a prediction.
        seconds: Time of the forward passes over the data, with the switches between sub-nets and, of the ensemble, the
            averaging.
        kept_weights: Prunable weights that the passes use, those of all passes together; None if it is not known.
        accuracy: Share of right answers, in [0, 1]; None in regression.
        ece: Expected calibration error, in [0, 1]; None in regression.
        nll: Mean negative log-likelihood, in nats; None in regression.
        error_detection: Chance that the confidence, the probability of the answer, is lower where it is wrong than
            where it is right (AUROC), in [0, 1]; None in regression, or if all are right or all wrong.
        rmse: Root mean squared error; None in classification.
    """

    name: str
    forward_passes: int
    seconds: float
    kept_weights: int | None
    accuracy: float | None = None
    ece: float | None = None
    nll: float | None = None
    error_detection: float | None = None
    rmse: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleReport:
    """What `Ensemble.evaluate` found.

    Attributes:
        records: One for every member, in order, and the ensemble's at the end.
        predictions: How many predictions were counted.
        disagreement: Mean disagreement: mutual information in nats, in regression the standard deviation over the
            members.
        disagreement_right: Mean disagreement where the ensemble is right; None in regression, or if it never is.
        disagreement_wrong: Mean disagreement where it is wrong; None in regression, or if it never is.
        error_detection: Chance that the disagreement is higher where the ensemble is wrong than where it is right
            (AUROC), in [0, 1]; None in regression, or if all are right or all wrong.
    """

    records: tuple[EnsembleRecord, ...]
    predictions: int
    disagreement: float
    disagreement_right: float | None = None
    disagreement_wrong: float | None = None
    error_detection: float | None = None

    @property
    def members(self) -> tuple[EnsembleRecord, ...]:
        """The records of the members."""
        return self.records[:-1]

    @property
    def ensemble(self) -> EnsembleRecord:
        """The record of the ensemble."""
        return self.records[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain containers, for JSON."""
        values = dataclasses.asdict(self)
        return {**values, "records": list(values["records"])}

    def render(self, *, width: int | None = None, color: bool | None = None) -> str:
        """Return the report as lines of text, without a line break at the end.

        Args:
            width: Columns to use; None takes the terminal's.
            color: Whether to use colours; None uses them where standard output is a terminal.
        """
        head = [f"An ensemble of {len(self.members)}", f"{grouped(self.predictions)} predictions"]
        numbers = self.ensemble.accuracy is None
        notes = [self._disagreement(), _MEANING_OF_NUMBERS if numbers else _MEANING]
        return render_tables(head, [self._table()], notes, width=width, color=color)

    def __str__(self) -> str:
        return self.render()

    def _table(self) -> TextTable:
        records = self.records
        columns = {"sub-net": [clean(record.name) for record in records]}
        if any(record.accuracy is not None for record in records):
            columns["accuracy"] = [percent(record.accuracy) for record in records]
            columns["ECE"] = [percent(record.ece) for record in records]
            columns["NLL"] = decimals([record.nll for record in records])
            found = [record.error_detection for record in records]
            columns["errors found"] = [ABSENT if share is None else f"{share:.3f}" for share in found]
        else:
            columns["RMSE"] = decimals([record.rmse for record in records])
        columns["passes"] = [grouped(record.forward_passes) for record in records]
        columns["time, ms"] = decimals([1000 * record.seconds for record in records])
        if any(record.kept_weights is not None for record in records):
            columns["weights kept"] = [grouped(record.kept_weights) for record in records]
        return TextTable(
            title="Members and ensemble", columns=tuple(columns), rows=tuple(zip(*columns.values(), strict=True))
        )

    def _disagreement(self) -> str:
        if self.ensemble.accuracy is None:
            return f"Standard deviation over the members: {decimal(self.disagreement)} in the mean"
        text = (
            f"Disagreement (mutual information of member and class, nats): {decimal(self.disagreement)} in the mean, "
            f"{decimal(self.disagreement_right)} on right answers, {decimal(self.disagreement_wrong)} on wrong ones"
        )
        if self.error_detection is None:
            return text
        return f"{text}; as a detector of errors it has an AUROC of {self.error_detection:.3f}"
