"""The benchmark of `DynamicInference` runs, and the network that it cuts is the one that it masks."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ast_plugin.elastic import load

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def governor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("governor")
    sys.modules.pop("governor", None)


@pytest.mark.slow
def test_the_sliced_networks_compute_what_the_masked_ones_do(governor: Any, tmp_path: Path) -> None:
    model = governor.ResNet50().eval()
    governor.write_file(tmp_path / "elastic.safetensors", model)
    elastic = load(tmp_path / "elastic.safetensors", model)
    image = torch.randn(1, 3, 32, 32)
    sizes = []
    for name in elastic.sub_nets:
        with elastic.sub_net(name), torch.no_grad():
            want = model(image)
        cut = elastic.compile(name, "sliced")
        torch.testing.assert_close(cut(image), want, rtol=1e-3, atol=1e-4)
        sizes.append(sum(parameter.numel() for parameter in cut.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 25_557_032  # a ResNet-50
    assert sizes[-1] < 0.35 * sizes[0]


@pytest.mark.slow
def test_it_measures_and_writes_its_figures(
    governor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "governor.json"
    arguments = ["--size", "32", "--requests", "2", "--switches", "20", "--output", str(path)]
    assert governor.main(arguments) == 0
    assert "A switch" in capsys.readouterr().out
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert [phase["requests"] for phase in figures["trace"]] == [2, 2, 2, 2, 2, 2, 2 * governor.CLIENTS, 6]
    assert figures["trace"][3]["without fit"] == 2
    assert figures["memory"]["shared, MB"] < figures["memory"]["apart, MB"]
