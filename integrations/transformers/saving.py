"""The files that a run leaves beside a saved model, and one sub-net as a saved model of its own.

Nothing of transformers is imported here: a model saves itself, and the sub-nets are saved as in any other loop.
"""

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
from ast_plugin.errors import ConfigError, SaveError
from ast_plugin.export import SubNetSource, export_model
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


def save_sub_nets(
    ast: AlternatingSparseTraining, folder: str | os.PathLike[str], *, elastic: bool = True
) -> list[Path]:
    """Write the sub-nets beside the saved model: ``elastic.safetensors``, and ``ast_config.json`` for programs.

    Of a run with superposed sub-nets (`ast_plugin.integrations.family.SupTickets`) it writes those, and the last ones
    as ``elastic_last.safetensors``.

    A Trainer with an `ASTCallback` calls this itself; in a loop of your own call it after
    ``model.save_pretrained(folder)``. As for `AlternatingSparseTraining.save`, call it on one rank; where parameters
    are sharded, on all.

    Args:
        ast: The run.
        folder: Where the model is saved; made if it is missing.
        elastic: Whether to write the elastic file. Without it, one of an earlier save there is removed, for it holds
            other weights than the model beside it.

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
    if _any_sharded(ast.model) and not is_first_rank(ast.model):
        return files
    with ast.version(ast.preferred_version) if elastic else contextlib.nullcontext():
        summary = json.dumps(to_json(CONFIG, _summary(ast, name, files)), indent=2, allow_nan=False)
    atomic_write_text(place / CONFIG, summary + "\n")
    for left_over in {ELASTIC, LAST} - {file.name for file in files}:
        (place / left_over).unlink(missing_ok=True)
    return [*files, place / CONFIG]


def export_pretrained(
    source: SubNetSource,
    name: str,
    model: nn.Module,
    folder: str | os.PathLike[str],
    processing_class: Any = None,
) -> None:
    """Save one sub-net as ``save_pretrained`` saves a model; ``from_pretrained`` loads it without this package.

    ``ast-plugin export FOLDER --sub-net NAME --to OTHER`` does the same without the model's code.

    Args:
        source: The controller of a run, what `ast_plugin.load` returned, or the contents of an elastic file.
        name: The sub-net.
        model: The model, which is not changed; wrappers for compilation and data-parallel use are left out.
        folder: Where to save it.
        processing_class: Tokenizer, image processor or whatever else is saved beside it.

    Raises:
        ConfigError: If `source` is none of these or has no such sub-net, the model cannot save itself, has adapters or
            sharded parameters, or the folder is the one of all sub-nets.
        ElasticFileError: If the sub-net does not fit the model.
        SaveError: If a file has the folder's name.
    """
    if not callable(getattr(source, "materialize", None)):
        raise ConfigError(
            f"source must be a run, an Elastic or ElasticContents, got {source!r}; of a folder give "
            "ast_plugin.load(folder, model)"
        )
    bare = bare_model(model) if isinstance(model, nn.Module) else model
    for what, thing in (("model", bare), *([("processing_class", processing_class)] if processing_class else [])):
        if not callable(getattr(thing, "save_pretrained", None)):
            raise ConfigError(f"{what} must have save_pretrained(folder), got {type(thing).__name__}")
    if _has_adapters(bare):
        raise ConfigError(
            f"model is a {type(bare).__name__} with adapters, and save_pretrained would write those alone; merge them: "
            "export_model(source, name, model).merge_and_unload().save_pretrained(folder)"
        )
    if _any_sharded(bare):
        raise ConfigError(
            "model has sharded parameters, of which every rank holds a part; save the sub-nets with save_sub_nets, and "
            "export from that folder: ast-plugin export FOLDER --sub-net NAME --to OTHER"
        )
    place = file_path(folder)
    if place.exists() and not place.is_dir():  # about which save_pretrained says a word and returns
        raise SaveError(f"cannot write the folder {os.fspath(folder)!r}: a file has that name; give another one")
    if (place / ELASTIC).exists():
        raise ConfigError(
            f"folder {os.fspath(folder)!r} holds {ELASTIC} and so the weights of all sub-nets; give another one"
        )
    plain: Any = export_model(source, name, bare)
    plain.save_pretrained(place)
    if processing_class is not None:
        processing_class.save_pretrained(place)


def class_name(model: nn.Module) -> str:
    """Return the name of the class that the user's model has, inside wrappers."""
    return type(bare_model(model)).__name__.removeprefix("FSDP")  # fully_shard makes a class with that in front


def _summary(ast: AlternatingSparseTraining, model: str, files: list[Path]) -> dict[str, Any]:
    versions = {"ast-plugin": __version__, "torch": torch.__version__, "transformers": _version("transformers")}
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


def _has_adapters(model: nn.Module) -> bool:
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    return any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)


def _any_sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
