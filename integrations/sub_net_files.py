"""The files of a run in a host's folder: all sub-nets in one, and what programs want to know of them in another."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ast_plugin.distributed import is_first_rank
from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import ConfigError
from ast_plugin.files import atomic_write_text, file_path
from ast_plugin.integrations.family.sup_tickets_hosts import further_versions
from ast_plugin.report import Report
from ast_plugin.sealed_file import to_json
from ast_plugin.sharding import is_sharded
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.version import __version__

CONFIG = "ast_config.json"
LAST = "elastic_last.safetensors"

_FORMAT = "ast_plugin.config"
_VERSION = 1


def write_sub_nets(
    ast: AlternatingSparseTraining, folder: str | os.PathLike[str], *, host: str, elastic: bool = True
) -> list[Path]:
    """Write ``elastic.safetensors``, and ``ast_config.json`` for programs; where parameters are sharded, a collective.

    Of a run with superposed sub-nets (`ast_plugin.integrations.family.SupTickets`) the first holds those, and
    ``elastic_last.safetensors`` the last ones.

    Args:
        ast: The run.
        folder: Where to write them; made if it is missing.
        host: The package that trains, whose version is noted.
        elastic: Whether to write the elastic file. Without it, one of an earlier save there is removed.

    Returns:
        The files written.

    Raises:
        ConfigError: If `ast` is no controller, or `folder` no path.
        SaveError: If a file cannot be written; the older one is still there then.

    Warns:
        UserWarning: With `elastic`, if a sub-net is far from its target, because its mask schedule has not ended.
    """
    if not isinstance(ast, AlternatingSparseTraining):
        raise ConfigError(
            f"ast must be the controller of a run, got {type(ast).__name__}; give what wrap() returned, or the "
            "callback's ast once training has begun"
        )
    place = file_path(folder)
    name = class_name(ast.model)
    files = []
    if elastic:
        files.append(place / ELASTIC)
        with ast.version(ast.preferred_version):
            page = Report.from_training(ast, title=f"Sub-nets of {name}")
        ast.save(files[0], report=page.to_dict())
        if further_versions(ast):
            files.append(place / LAST)
            ast.save(files[-1], version="last")
    if any_sharded(ast.model) and not is_first_rank(ast.model):
        return files
    with ast.version(ast.preferred_version) if elastic else contextlib.nullcontext():
        summary = json.dumps(to_json(CONFIG, _summary(ast, name, files, host)), indent=2, allow_nan=False)
    atomic_write_text(place / CONFIG, summary + "\n")
    for left_over in {ELASTIC, LAST} - {file.name for file in files}:
        (place / left_over).unlink(missing_ok=True)
    return [*files, place / CONFIG]


def class_name(model: nn.Module) -> str:
    """Return the name of the class that the user's model has, inside wrappers."""
    return type(bare_model(model)).__name__.removeprefix("FSDP")  # fully_shard makes a class with that in front


def any_sharded(model: nn.Module) -> bool:
    """Tell whether ranks hold parts of the model's parameters."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def _summary(ast: AlternatingSparseTraining, model: str, files: list[Path], host: str) -> dict[str, Any]:
    versions = {"ast-plugin": __version__, "torch": torch.__version__, host: _version(host)}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model,
        "default_sub_net": ast.default_sub_net,
        "sub_nets": [
            {
                "name": spec.name,
                "target_sparsity": spec.sparsity,
                "sparsity": ast.masks.sparsity(spec.name),
                "kept": ast.masks.kept(spec.name),
                "total": ast.masks.total(),
                "pattern": spec.pattern,
                "metrics": ast.metrics[spec.name],
            }
            for spec in ast.config.sub_nets
        ],
        "step": ast.step,
        "config": ast.config.to_dict(),
        "files": [file.name for file in files],
        "versions": {package: version for package, version in versions.items() if version is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
