"""The tables of docs/speed.md, from the JSON files that the benchmarks of speed write.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; names are the keys of `TABLES`.

    python benchmarks/speed_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ast_plugin.files import atomic_write_text
from sliced_training import WANTED

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
MARKER = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
ABSENT = "–"


def training(results: Mapping[str, Any], network: str) -> str:
    """Return the factors of a network's training steps over the dense step."""
    found = results["networks"][network]
    head = ["", *(f"kept {kept:g}" for kept in results["kept"]), "whole run"]
    rows = [[f"dense ({found['dense_ms']:.0f} ms)", *["1.00"] * len(results["kept"]), "1.00"]]
    for name, factors in found["factors"].items():
        steps = [factors[-1]] * len(factors) if name.startswith("dense") else factors
        rows.append([name, *(f"{factor:.2f}" for factor in steps)])
    rows.append(["wanted, leaves", *(f"{factor:g}" for factor in WANTED[network]), ""])
    return markdown(head, rows)


def inference(results: Mapping[str, Any], part: str) -> str:
    """Return the times and factors of a network after training."""
    head = ["engine", "form", "ms", "factor", "wanted"]
    rows = [
        [row["engine"], row["name"], f"{row['ms']:.1f}", f"{row['factor']:.2f}", _number(row["at_least"])]
        for row in results["parts"][part]["rows"]
    ]
    return markdown(head, rows)


def probabilities(results: Mapping[str, Any]) -> str:
    """Return the factors of VR-PGE's steps over the dense step."""
    names = {"vr-pge": "VR-PGE", "random": "the same share of channels, fixed"}
    rows = [
        [network, names[rule], *(f"{factor:.2f}" for factor in found["factors"][rule])]
        for network, found in results["networks"].items()
        for rule in names
    ]
    return markdown(["", "", *(f"kept {kept:g}" for kept in results["kept"])], rows)


def whole_runs(results: Mapping[str, Any]) -> str:
    """Return the time of whole runs as shares of a dense run's."""
    rows = [
        [name, f"{found['share']:.2f}", f"{found['share_long']:.2f}", str(found["updates"])]
        for name, found in results["runs"].items()
    ]
    return markdown(["", f"{results['steps']} steps", "computed for 10,000", "masks changed"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all but texts are aligned to the right."""
    texts = [column for column in range(len(head)) if any(not _is_number(row[column]) for row in rows)]
    rule = ["---" if column in texts else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows)) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _is_number(text: str) -> bool:
    return not text or text == ABSENT or text.replace(".", "", 1).isdigit()


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


TABLES: dict[str, Callable[[], str]] = {
    "training-resnet50": lambda: training(_read("sliced_training"), "ResNet-50"),
    "training-resnet32": lambda: training(_read("sliced_training"), "ResNet-32"),
    "training-vit": lambda: training(_read("sliced_training"), "ViT-B blocks"),
    "runs": lambda: whole_runs(_read("sliced_runs")),
    "inference-resnet50": lambda: inference(_read("inference"), "ResNet-50"),
    "inference-vit": lambda: inference(_read("inference"), "ViT-B, channels"),
    "inference-linear": lambda: inference(_read("inference"), "ViT-B, linear layers"),
    "vr-pge": lambda: probabilities(_read("vr_pge")),
}


def renewed(page: str) -> str:
    """Return the page with its tables made anew."""
    return MARKER.sub(lambda m: f"{m['begin']}\n{TABLES[m['name']]()}\n{m['end']}", page)


if __name__ == "__main__":
    atomic_write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8")))
