"""What a run produced, as one record: sub-nets, layers, overlap of the masks, history and settings.

A report is built from a training that is going on or has ended, or from an elastic file, and then shown: as text in
the terminal, as JSON for programs, as one self-contained HTML page with pictures for people.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.compile_timing import describe_inputs
from ast_plugin.errors import StateError
from ast_plugin.files import atomic_write_text
from ast_plugin.report_flops import count_flops
from ast_plugin.report_gather import ElasticView, TrainingView, gather
from ast_plugin.report_records import (
    ConflictPoint,
    LayerRecord,
    SparsityPoint,
    SubNetRecord,
    finite,
    from_plain,
    plain,
)
from ast_plugin.slots import bare_model
from ast_plugin.version import __version__

FORMAT = "ast-plugin report"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that can be said about the sub-nets of one run.

    Attributes:
        title: Heading.
        sub_nets: The sub-nets in training order.
        layers: The prunable parameters in the order of the model.
        overlap: Row per sub-net, column per sub-net: share of the row's kept weights that the column keeps too, in
            [0, 1]; None in the row of a sub-net that keeps nothing.
        sparsity_history: Target and achieved sparsity at mask updates.
        conflict_history: Gradient checks over time.
        settings: The run's settings as plain containers (see `ASTConfig.to_dict`).
        steps: Optimizer steps done.
        elapsed_seconds: How long the training took; None if nobody told.
        dense_parameters: Number of parameters of the whole dense network; None if the network was not at hand.
        dense_flops: Operations of the dense network on the example input; None without one.
        example_input: Shape of the example input, such as ``1 x 3 x 32 x 32``; None without one.
        versions: Package name -> version that made the report.
    """

    title: str
    sub_nets: tuple[SubNetRecord, ...]
    layers: tuple[LayerRecord, ...] = ()
    overlap: tuple[tuple[float | None, ...], ...] = ()
    sparsity_history: tuple[SparsityPoint, ...] = ()
    conflict_history: tuple[ConflictPoint, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    elapsed_seconds: float | None = None
    dense_parameters: int | None = None
    dense_flops: int | None = None
    example_input: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_training(
        cls,
        ast: TrainingView,
        *,
        title: str = "Alternating sparse training",
        example_inputs: Any = None,
        elapsed_seconds: float | None = None,
    ) -> Report:
        """Describe a training as it stands now; nothing of it changes.

        Args:
            ast: The controller that `ast_plugin.wrap` returned.
            title: Heading of the report.
            example_inputs: What the model takes, for counting operations: a tensor, a tuple of positional arguments or
                a mapping of keyword arguments. The model runs once on it, in eval mode. None leaves operations out.
            elapsed_seconds: How long the training took, if it is known.

        Raises:
            ConfigError: If the model cannot be run on the example.
        """
        flops = None
        if example_inputs is not None:
            # Inside its wrappers: a data-parallel one would wait for the other ranks.
            flops = count_flops(bare_model(ast.model), tuple(ast.masks.shapes), example_inputs)
        return cls(
            title=title,
            steps=ast.step,
            elapsed_seconds=finite(elapsed_seconds),
            example_input=None if flops is None else describe_inputs(example_inputs),
            **gather(
                masks=ast.masks,
                config=ast.config.to_dict(),
                statistics=ast.statistics(),
                metrics=ast.metrics,
                history=ast.history,
                flops=flops,
                dense_parameters=sum(parameter.numel() for parameter in ast.model.parameters()),
            ),
        )

    @classmethod
    def from_elastic(cls, contents: ElasticView, *, title: str | None = None) -> Report:
        """Describe the sub-nets of an elastic file.

        The file's header brings the report of the run that wrote it, under ``report``. A file without one is described
        from its masks and whatever else its header tells.

        Args:
            contents: What `ast_plugin.elastic.read_elastic` returned.
            title: Heading; None takes the one in the file.

        Raises:
            StateError: If the report in the header is damaged.
        """
        header = contents.header
        if header.get("report") is not None:
            report = cls.from_dict(header["report"])
            return report if title is None else dataclasses.replace(report, title=title)
        statistics = header.get("statistics") or {}
        return cls(
            title="Elastic file" if title is None else title,
            steps=int(statistics.get("steps") or 0),
            **gather(
                masks=contents.masks,
                config=header.get("config") or {},
                statistics=statistics,
                metrics=header.get("metrics") or {},
                history=header.get("history") or {},
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain containers that JSON keeps as they are."""
        values: dict[str, Any] = plain({"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)})
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Build a report from what `to_dict` returned, also after a way through JSON.

        Args:
            values: The plain containers.

        Raises:
            StateError: If they are no report, one of a newer format, or damaged; the message names the field.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise StateError(
                f"this is no report of ast-plugin: 'format' must be {FORMAT!r}, got "
                f"{values.get('format') if isinstance(values, Mapping) else type(values).__name__!r}"
            )
        version = values.get("version")
        if version != FORMAT_VERSION:
            raise StateError(
                f"version of the report is {version!r}, but ast-plugin {__version__} reads version {FORMAT_VERSION}; "
                "update ast-plugin, or write the report again"
            )
        given = {name: value for name, value in values.items() if name not in ("format", "version")}
        report: Report = from_plain(cls, given, where="report")
        count = len(report.sub_nets)
        if report.overlap and {len(report.overlap), *map(len, report.overlap)} != {count}:
            raise StateError(
                f"report.overlap must have {count} rows and columns, one a sub-net; use a report that ast-plugin "
                "wrote, unchanged"
            )
        return report

    def render_terminal(self, *, layers: bool = False, width: int | None = None, color: bool | None = None) -> str:
        """Return the report as text for a terminal; print it to show it.

        Args:
            layers: Whether to add the sparsity of every layer.
            width: Columns to use; None takes the terminal's.
            color: Whether to use colours; None uses them where standard output is a terminal.
        """
        from ast_plugin.report_text import render_text

        return render_text(self, layers=layers, width=width, color=color)

    def render_html(self) -> str:
        """Return one self-contained HTML page with pictures.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        from ast_plugin.report_html import render_page

        return render_page(self)

    def write_json(self, path: str | Path) -> None:
        """Write the report as JSON, completely or not at all.

        Args:
            path: File to write; what stood there stays if writing fails.

        Raises:
            SaveError: If the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=True, allow_nan=False)
        atomic_write_text(Path(path), text + "\n")

    def write_html(self, path: str | Path) -> None:
        """Write the page of `render_html`, completely or not at all.

        Args:
            path: File to write; what stood there stays if writing fails.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            SaveError: If the file cannot be written.
        """
        atomic_write_text(Path(path), self.render_html())
