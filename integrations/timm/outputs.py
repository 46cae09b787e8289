"""The files that a run leaves beside timm's checkpoints."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import torch

from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import MissingExtraError
from ast_plugin.files import atomic_write_text
from ast_plugin.integrations.family.sup_tickets_hosts import further_versions
from ast_plugin.integrations.timm.networks import picture_for
from ast_plugin.report import Report
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.twins import Twin
from ast_plugin.version import __version__

AVERAGE = "elastic_ema.safetensors"
LAST = "elastic_last.safetensors"
PAGE = "report.html"
SUMMARY = "ast.json"

_logger = logging.getLogger("ast_plugin.timm")


def write_outputs(
    ast: AlternatingSparseTraining,
    folder: Path,
    *,
    twin: Twin | None,
    report: bool,
    args: argparse.Namespace,
    seconds: float | None = None,
) -> list[Path]:
    """Write the sub-nets, the report and a summary for programs.

    Where the run has superposed sub-nets, report and summary are of those, and the last ones have a file of their own.

    Args:
        ast: The run, at its end.
        folder: Where to; it exists.
        twin: Of the script's moving average, whose sub-nets are written too.
        report: Whether to write the page.
        args: The script's settings, of which the model's name and input size are used.
        seconds: How long training took.

    Returns:
        The files written.

    Raises:
        SaveError: If one cannot be written.
    """
    name = str(getattr(args, "model", type(bare_model(ast.model)).__name__))
    files = [folder / ELASTIC]
    with ast.version(ast.preferred_version):
        page = Report.from_training(
            ast, title=f"Sub-nets of {name}", example_inputs=_example(ast, args), elapsed_seconds=seconds
        )
        sub_nets = _described(ast)
    ast.save(files[0], report=page.to_dict())
    summary: dict[str, Any] = {
        "model": name,
        "config": ast.config.to_dict(),
        "steps": ast.step,
        "default_sub_net": ast.default_sub_net,
        "sub_nets": sub_nets,
    }
    if further_versions(ast):
        files.append(folder / LAST)
        ast.save(files[-1], version="last")
        summary["last_sub_nets"] = _described(ast)
    if twin is not None:
        files.append(folder / AVERAGE)
        ast.save(files[-1], twin=twin)
    if report:
        try:
            page.write_html(folder / PAGE)
            files.append(folder / PAGE)
        except MissingExtraError as error:
            _logger.warning(f"No {PAGE}: {error}")
    summary["files"] = [file.name for file in files]
    summary["versions"] = {"ast-plugin": __version__, "timm": _version("timm"), "torch": torch.__version__}
    atomic_write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return [*files, folder / SUMMARY]


def _described(ast: AlternatingSparseTraining) -> dict[str, Any]:
    return {s: {"sparsity": ast.masks.sparsity(s), "metrics": dict(ast.metrics[s])} for s in ast.sub_nets}


def _example(ast: AlternatingSparseTraining, args: argparse.Namespace) -> Any:
    """Return a picture of the size that was trained on, to count operations on; None if the model takes no pictures."""
    network = bare_model(ast.model)
    picture = picture_for(network, args)
    try:
        with torch.no_grad(), ast.sub_net(ast.default_sub_net):
            network.eval()(picture)
    except Exception as error:  # models for other input (NaFlex patches) have no picture to be counted on
        _logger.warning(f"Operations are not counted: {type(network).__name__} cannot be run on a picture ({error}).")
        return None
    return picture


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        import timm

        return str(timm.__version__)
