"""benchmarks/inference.py: factors by hand, contenders that compute the same, tables, picture, and that it runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytestmark = pytest.mark.extra("timm")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "inference.py"


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        names = {name: importlib.import_module(f"inference_{name}") for name in ("engines", "networks", "picture")}
        yield SimpleNamespace(script=importlib.import_module("inference"), **names)


def test_factors_are_medians_of_rounds_against_the_fastest_dense(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(parts.engines.time, "process_time", lambda: now)

    def contender(engine: str, name: str, took: list[float], **more: Any) -> Any:
        left = iter([9.0, *took])  # one to warm up

        def run() -> None:
            nonlocal now
            now += next(left)

        return parts.engines.Contender(engine=engine, name=name, run=run, **more)

    rows = parts.engines.measure(
        [
            contender("A", "slow dense", [8, 8, 8], dense=True),
            contender("A", "dense", [4, 6, 4], dense=True),
            contender("A", "small", [1, 3, 2], at_least=3.0),
            contender("B", "dense", [1, 1, 1], dense=True),
            contender("B", "small", [0.5, 0.5, 0.5]),
        ],
        rounds=3,
        warmup=1,
    )
    # small in A: 4/1, 6/3, 4/2 = 4, 2, 2; the slow dense: 4/8, 6/8, 4/8.
    assert [(row["engine"], row["name"], row["ms"], row["factor"]) for row in rows] == [
        ("A", "slow dense", 8000.0, 0.5),
        ("A", "dense", 4000.0, 1.0),
        ("A", "small", 2000.0, 2.0),
        ("B", "dense", 1000.0, 1.0),
        ("B", "small", 500.0, 2.0),
    ]
    assert (rows[2]["low"], rows[2]["high"], rows[2]["at_least"]) == (2.0, 3.0, 3.0)


def results(reached: bool) -> dict[str, Any]:
    row = {"engine": "PyTorch", "ms": 10.0, "low": 0.9, "high": 1.1}
    rows = [
        {**row, "name": "dense", "factor": 1.0, "at_least": None},
        {**row, "name": "sliced", "factor": 2.5 if reached else 1.5, "at_least": 2.0},
    ]
    return {"parts": {"Net": {"rows": rows, "files": {"dense": 3.25}}}}


def test_tables_say_what_is_reached(parts: Any) -> None:
    for reached, word in ((True, "yes"), (False, "no")):
        figures, files = parts.script.tables(results(reached))
        assert figures.rows[0][3:] == ("", "")
        assert figures.rows[1][3:] == ("2x", word)
        assert files.rows == (("dense", "3.2"),)


@pytest.mark.extra("report")
def test_the_picture_shows_every_row(parts: Any) -> None:
    text = parts.picture.picture(results(True))
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert {"sliced (PyTorch)", "2.50x", "Net"} <= {"".join(node.itertext()).strip() for node in root.iter()}
    assert parts.picture.picture(results(True)) == text


@pytest.mark.extra("channels")
@pytest.mark.slow
def test_contenders_compute_what_the_sub_nets_compute(parts: Any, tmp_path: Path) -> None:
    model, inputs = parts.networks.vit_b(quick=True)
    name = parts.networks.linear_name(0.9, 8)
    elastic = parts.networks.linear_file(tmp_path / "e.safetensors", model, {(0.9, 8): name})
    assert elastic.records[name].sparsity == pytest.approx(0.9, abs=0.03)
    assert elastic.records[name].pattern == "8x8"
    dense, wrong = elastic.compile(name, "dense"), elastic.compile(name, "csr")
    wrong = parts.engines.wrong_way_round(wrong)
    assert any(isinstance(module, parts.engines.WrongWayRound) for module in wrong.modules())
    with torch.inference_mode():
        torch.testing.assert_close(wrong(inputs), dense(inputs), rtol=1e-4, atol=1e-4)
    model, inputs = parts.networks.resnet50(quick=True)
    elastic = parts.networks.channel_file(tmp_path / "c.safetensors", model, inputs, (0.5, 0.1))
    assert elastic.sub_nets == ("kept-0.5", "kept-0.1")
    assert {int(flags.sum()) for flags in elastic.kept_channels("kept-0.5").values()} == {32, 64, 128, 256}
    whole = parts.script._whole(elastic)
    zeros = [int((p == 0).sum()) for p in whole.parameters() if p.dim() > 1]
    assert sum(zeros) < 100  # of 11 million; random numbers may be zero


@pytest.mark.extra("channels")
@pytest.mark.slow
def test_a_quick_run_writes_figures_and_picture(tmp_path: Path) -> None:
    output = tmp_path / "inference.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--parts", "ViT-B, linear layers"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    (part,) = found["parts"].values()
    assert {"dense", "csr, 95%", "bsr 8x8, 80%", "F.linear(x, csr), 90 %"} <= {row["name"] for row in part["rows"]}
    assert part["layers"]["csr, 95%"]["csr"] + part["layers"]["csr, 95%"]["dense"] == 9
    assert "PyTorch: csr, 95%" in done.stdout
    if importlib.util.find_spec("matplotlib") is not None:
        assert output.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
