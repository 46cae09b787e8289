"""The example of a loop on Accelerate, shortened: in one process, interrupted and resumed, and in two processes."""

from __future__ import annotations

import importlib.util
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import assert_same
from ranks import launched

import ast_plugin

pytestmark = pytest.mark.extra("hf")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "accelerate_loop.py"
SHORT = ["--sparsities", "0.5", "0.9", "--epochs", "2", "--batch-size", "130"]


@pytest.fixture(autouse=True)
def one_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its state in singletons."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, str(folder), *SHORT, *flags])
    module().main()


def sub_nets(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the sub-nets in a folder as plain networks, and look at their sparsity."""
    elastic = ast_plugin.load(folder / "elastic.safetensors", module().network())
    assert elastic.sub_nets == ("s50", "s90")
    found = {name: elastic.materialize(name) for name in elastic.sub_nets}
    for name, sparsity in (("s50", 0.5), ("s90", 0.9)):
        weights = [found[name][key] for key in ("3.weight", "6.weight", "11.weight")]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        assert zeros == pytest.approx(sparsity, abs=1e-3)
    return found


@pytest.mark.slow
def test_a_run_that_was_interrupted_is_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path / "straight", "--accumulate", "2")
    printed = re.findall(r"^epoch (\d): s50 ([\d.]+), s90 ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in printed] == ["1", "2"]
    assert all(0 < float(figure) <= 1 for row in printed for figure in row[1:])
    run(monkeypatch, tmp_path / "again", "--accumulate", "2", "--stop-after", "1")
    assert not (tmp_path / "again" / "elastic.safetensors").exists()
    run(monkeypatch, tmp_path / "again", "--accumulate", "2", "--resume")
    assert_same(sub_nets(tmp_path / "straight"), sub_nets(tmp_path / "again"))
    assert f"epoch 2: s50 {printed[1][1]}, s90 {printed[1][2]}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_by_accelerate_launch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # "--multi_gpu" means several processes here; the environment says that they use the processor.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = ["accelerate.commands.launch", *options, f"--main_process_port={port}"]
    command = [sys.executable, "-W", "ignore", "-m", *launcher, str(EXAMPLE), str(tmp_path), *SHORT]
    launched(command, tmp_path / "stderr")
    assert "epoch 2: s50" in (tmp_path / "stderr").read_text()
    sub_nets(tmp_path)
