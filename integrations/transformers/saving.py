"""The files that a run leaves beside a saved model, and one sub-net as a saved model of its own.

Nothing of transformers is imported here: a model saves itself, and the sub-nets are saved as in any other loop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import ConfigError, SaveError
from ast_plugin.export import SubNetSource, export_model
from ast_plugin.files import file_path
from ast_plugin.integrations.sub_net_files import any_sharded, write_sub_nets
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining


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
    return write_sub_nets(ast, folder, host="transformers", elastic=elastic)


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
    if any_sharded(bare):
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


def _has_adapters(model: nn.Module) -> bool:
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    return any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)
