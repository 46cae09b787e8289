"""One sub-net as a folder like the one that the network was saved in, made without the network's code.

The saved model's files are the pattern: the same weights files with the sub-net's values, and the files beside them
that stock loading needs. What belongs to the training stays behind.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
from pathlib import Path

from ast_plugin.elastic_file import ELASTIC, read_elastic
from ast_plugin.errors import ConfigError, ElasticFileError
from ast_plugin.export_card import README, sub_net_section, with_section
from ast_plugin.export_names import differences, find_entries
from ast_plugin.export_sliced import check_trained
from ast_plugin.export_weights import find_weights, write_weights_file
from ast_plugin.files import atomic_folder, file_path

_ADAPTER = "adapter_config.json"
_FOLDERS = ("additional_chat_templates",)  # the one that stock loading looks into
_LEFT_OUT = (
    *(".*", "ast_config.json", "ast_state.pt", "ast.json", "report.html", "report.json"),
    # of the training
    *("trainer_state.json", "training_args.*", "*_results.json", "events.out.tfevents.*"),
    *("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "random_states_*"),
    # the dense weights in other formats and versions, and pickles
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.onnx", "*.gguf"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedFolder:
    """What an export wrote, and what it did not.

    Attributes:
        path: The new folder.
        weights: Names of the weights files, which hold the sub-net.
        copied: Names of the files that are as they were.
        left_out: Names of files and folders of the source that were not taken.
    """

    path: Path
    weights: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def export_folder(
    folder: str | os.PathLike[str], name: str, target: str | os.PathLike[str], *, allow_untrained: bool = False
) -> ExportedFolder:
    """Write one sub-net as a folder that loads as the saved model does, without this package.

    Every weights file is written anew with the same keys, order, types and metadata. Files for configuration and
    tokenization are copied; files of the training, the elastic file and other formats of the weights are not. README.md
    gets a section about this sub-net in place of the one about all of them.

    Args:
        folder: Holds ``elastic.safetensors``, and beside it the dense model as ``save_pretrained`` writes it:
            ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        name: The sub-net.
        target: The folder to make; an empty one may be there. It appears when it is complete, or not at all.
        allow_untrained: Whether to write a sub-net that no step has trained.

    Raises:
        ConfigError: If there is no such sub-net, it was never trained, or an argument is no path.
        ElasticFileError: If a file is missing or damaged, or the saved model is not the one of the elastic file; the
            message names the first differences.
        SaveError: If the target holds files, or cannot be written.
    """
    source = file_path(folder)
    if source.exists() and not source.is_dir():
        raise ConfigError(f"folder must be a folder with {ELASTIC} and a saved model, got the file {str(source)!r}")
    contents = read_elastic(source)
    contents.check_sub_net(name)
    check_trained(contents, name, allow_untrained)
    if (source / _ADAPTER).exists():
        raise ElasticFileError(
            f"{str(source)!r} holds adapters ({_ADAPTER}), which stock loading puts on weights from elsewhere; build "
            "the model and merge them: export_model(source, name, model).merge_and_unload().save_pretrained(folder)"
        )
    files, index = find_weights(source)
    entries = find_entries(contents, name, files)
    found = differences(contents, files, entries)
    if found:
        raise ElasticFileError(
            f"the model saved in {str(source)!r} is not as {ELASTIC} there has it: {'; '.join(found)}. Nothing was "
            "written; save the model and its sub-nets at one time, or build the model as it was in training and let it "
            "write the sub-net: export_pretrained(ast_plugin.load(path, model), name, model, folder)"
        )
    written = [file.path.name for file in files]
    copied, left_out = _sorted_out(source, {*written, *([index.name] if index else [])})

    def fill(temporary: Path) -> None:
        for file in files:
            write_weights_file(file, temporary / file.path.name, lambda key: contents.tensor(name, entries[key]))
        for file_name in copied:
            (temporary / file_name).parent.mkdir(exist_ok=True)
            _copy(source / file_name, temporary / file_name)
        _write_card(source / README, temporary / README, sub_net_section(contents, name))

    atomic_folder(target, fill)
    return ExportedFolder(path=Path(target), weights=tuple(written), copied=tuple(copied), left_out=tuple(left_out))


def _sorted_out(folder: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """Return which files to copy, the index of the weights among them, and what else there is."""
    copied, left_out = [], []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name in _FOLDERS:
            copied += [f"{entry.name}/{file.name}" for file in sorted(entry.iterdir()) if file.is_file()]
        elif not entry.is_file():
            left_out.append(f"{entry.name}/" if entry.is_dir() else entry.name)
        elif entry.name in weights:
            copied += [entry.name] if entry.suffix == ".json" else []
        elif any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _LEFT_OUT):
            left_out.append(entry.name)
        elif entry.name != README:
            copied.append(entry.name)
    return copied, left_out


def _copy(source: Path, target: Path) -> None:
    try:
        content = source.open("rb")
    except OSError as error:
        raise ElasticFileError(f"cannot read {str(source)!r}: {error.strerror or error}") from error
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)


def _write_card(source: Path, target: Path, section: str) -> None:
    text = ""
    if source.is_file():
        try:
            text = source.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # nothing of ours is in it
            _copy(source, target)
            return
    target.write_bytes(with_section(text, section).encode("utf-8"))
