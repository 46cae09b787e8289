"""What a model card says of the sub-nets: a section of README.md, and the front matter that a hub reads."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ast_plugin.elastic_file import ELASTIC
from ast_plugin.export_card import CITATION, README, code, metrics_table, with_section
from ast_plugin.files import atomic_write_text, file_path
from ast_plugin.integrations.sub_net_files import class_name
from ast_plugin.report_format import grouped, percent, short_percent
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining

TAGS = ("ast-plugin", "sparse", "pruning")

_FENCE = "---"
_FRONT_MATTER = re.compile(r"\s*---\r?\n(?P<lines>(?:.*?\n)??)---(?:\r?\n|\Z)", re.DOTALL)

_logger = logging.getLogger("ast_plugin.transformers")


def write_card(ast: AlternatingSparseTraining, folder: str | os.PathLike[str]) -> Path | None:
    """Write the section about the sub-nets into README.md: a new one, or in the place of an earlier one.

    The text around it stays as it is. The front matter gets the tags that it lacks, and ``library_name`` if it has
    none; comments, order and spelling of the rest stay. One that cannot be read is left alone, with a warning in the
    log.

    Args:
        ast: The run; its metrics are those of the last evaluation.
        folder: Where the model is saved; made if it is missing.

    Returns:
        The file; None if there is one already that is no UTF-8, which is left alone too.

    Raises:
        ConfigError: If `folder` is no path.
        SaveError: If the file cannot be written; the older one is still there then.
    """
    path = file_path(folder) / README
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else f"# {class_name(ast.model)}\n"
    except UnicodeDecodeError:
        _logger.warning(f"{README} has no section about the sub-nets: it is no UTF-8, and is left as it is")
        return None
    text = with_section(text, _section(ast, elastic=(path.parent / ELASTIC).is_file()))
    atomic_write_text(path, _with_front_matter(text))
    return path


def _section(ast: AlternatingSparseTraining, *, elastic: bool) -> str:
    names, default = ast.sub_nets, ast.default_sub_net
    lines = [
        "## Sub-nets",
        "",
        f"{len(names)} sparse sub-nets share the weights of this model; they were trained in turn, in one run, by "
        "alternating sparse training (`ast_plugin`)."
        if len(names) > 1
        else "This model holds a sparse sub-net, trained by `ast_plugin`.",
        "",
        metrics_table(
            names,
            ast.metrics,
            {
                "pattern": [code(spec.pattern or ast.config.pattern) for spec in ast.config.sub_nets],
                "sparsity": [percent(ast.masks.sparsity(name)) for name in names],
                "weights kept": [grouped(ast.masks.kept(name)) for name in names],
            },
        ),
        "",
        f"Sparsity is the share of zeros among the {grouped(ast.masks.total())} prunable weights. The sub-net to use "
        f"where none is chosen is {code(default)}. The dense weights, which all share, were not trained to be used as "
        "a whole.",
    ]
    early = [
        f"{code(spec.name)} is to reach {short_percent(spec.sparsity)}"
        for spec in ast.config.sub_nets
        if not ast.is_near_target(spec.name)
    ]
    if early:
        lines += ["", f"The run had not ended when this was written, at step {grouped(ast.step)}: {', '.join(early)}."]
    if elastic:
        lines += ["", *_usage(ast)]
    return "\n".join([*lines, "", f"Method: {CITATION}"])


def _usage(ast: AlternatingSparseTraining) -> list[str]:
    """Return how to load the sub-nets."""
    model, name = bare_model(ast.model), class_name(ast.model)
    sparsest = min(ast.sub_nets, key=ast.masks.kept)
    known = any(c.__name__ == name and c.__module__.startswith("transformers.") for c in type(model).__mro__)
    loading = (
        f"model = {name}.from_pretrained(folder)  # the dense weights"
        if callable(getattr(model, "from_pretrained", None))
        else f"model = {name}(...)  # as it was built for training"
    )
    return [
        f"`{ELASTIC}` holds all of them. Switch between them on one model:",
        "",
        "```python",
        "import ast_plugin",
        *([f"from transformers import {name}"] if known else []),
        "",
        'folder = "path/to/this/folder"',
        loading,
        f"elastic = ast_plugin.load(folder, model)  # now {json.dumps(ast.default_sub_net)}",
        f"elastic.switch({json.dumps(sparsest)})",
        "```",
        "",
        "Or write one of them as an ordinary model, which needs `ast_plugin` no more:",
        "",
        "```bash",
        f"ast-plugin export path/to/this/folder --sub-net {sparsest} --to path/to/new/folder",
        "```",
    ]


def _with_front_matter(text: str) -> str:
    """Return a README whose front matter has our tags and a library; whatever it has else stays as it is written."""
    line_end = "\r\n" if "\r\n" in text else "\n"
    mark, body = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    if not body.lstrip().startswith(_FENCE):
        front = _completed("", line_end)
        return f"{mark}{_FENCE}{line_end}{front}{_FENCE}{line_end}{line_end}{body}"
    found = _FRONT_MATTER.match(body)
    try:
        if found is None:
            raise ValueError("it has no end")
        front = _completed(found["lines"], "\r\n" if "\r\n" in found.group() else "\n")
    except (yaml.YAMLError, ValueError) as error:
        _logger.warning(f"The front matter of {README} is left as it is, for it cannot be read: {error}")
        return text
    return mark + body[: found.start("lines")] + front + body[found.end("lines") :]


def _completed(lines: str, line_end: str) -> str:
    """Return the lines of a front matter with what they lack, and nothing else changed."""
    values = _values(lines)
    given = values.get("tags")
    tags = [given] if isinstance(given, str) else given or []
    if not isinstance(tags, list):
        raise ValueError(f"its tags are {tags!r}, no list")
    lacking = [tag for tag in TAGS if tag not in tags]
    wanted, completed = dict(values), lines
    if lacking:
        wanted["tags"] = [*tags, *lacking]
        completed = _with_tags(completed, wanted["tags"], lacking, line_end)
    if "library_name" not in wanted:
        wanted["library_name"] = "transformers"
        completed += f"library_name: transformers{line_end}"
    if _values(completed) != wanted:
        raise ValueError("its entries are not written as lines of their own")
    return completed


def _values(lines: str) -> dict[str, Any]:
    values = yaml.safe_load(lines)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError("it does not hold values by name")
    return values


def _with_tags(lines: str, tags: Sequence[Any], lacking: Sequence[str], line_end: str) -> str:
    """Return the lines with a complete list of tags: in the place of the one that is there, or else at the end."""
    root = yaml.compose(lines, Loader=yaml.SafeLoader)
    entries = [] if root is None else root.value  # None where all is comments
    node = next((value for key, value in entries if key.value == "tags"), None)
    if node is None:
        return lines + "".join(f"{line}{line_end}" for line in ("tags:", *(f"- {tag}" for tag in tags)))
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        end = lines.index("\n", node.value[-1].end_mark.index - 1) + 1
        indent = " " * node.start_mark.column
        return lines[:end] + "".join(f"{indent}- {tag}{line_end}" for tag in lacking) + lines[end:]
    start, end = node.start_mark.index, node.end_mark.index
    dumped = yaml.safe_dump(tags, default_flow_style=True, allow_unicode=True, width=math.inf).strip()
    return f"{lines[:start]}{' ' if lines[start - 1] == ':' else ''}{dumped}{lines[end:]}"
