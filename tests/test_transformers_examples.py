"""The examples for the Trainer, shortened: they run, print their tables, and leave files that load."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import ast_plugin

pytestmark = [pytest.mark.extra("hf"), pytest.mark.slow]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> ModuleType:
    """Run an example in this process, which has imported what it needs, and return its module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    module.main()
    return module


def test_bytes_compares_one_run_with_the_same_sub_nets_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "30", "--width", "16", "--batch_size", "4", "--stretches", "64"]
    flags += ["--threads", str(torch.get_num_threads()), "--output_dir", str(tmp_path)]
    module = run("transformers_bytes", monkeypatch, *flags)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(s\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["s50", "s80", "s90"]
    assert all(3 < float(figure) < 8 for row in rows for figure in row[1:])  # of eight bits: it has begun to learn
    assert all(float(equal) > float(full) for _, _, equal, full in rows)  # a third of the steps
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "together")
    elastic = ast_plugin.load(tmp_path / "together", model)
    assert elastic.sub_nets == ("s50", "s80", "s90")
    assert model(torch.arange(module._CONTEXT)[None]).logits.shape == (1, module._CONTEXT, 256)


@pytest.mark.parametrize("sparsities", [("0.5", "0.9"), ()])
def test_digits_takes_sub_nets_by_flags_and_is_an_ordinary_training_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sparsities: tuple[str, ...]
) -> None:
    flags = ["--output_dir", str(tmp_path), "--num_train_epochs", "2", "--use_cpu", "--dataloader_pin_memory", "false"]
    if sparsities:
        flags += ["--ast_sparsities", *sparsities]
    run("transformers_digits", monkeypatch, *flags)
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(s\d+|without a name): accuracy ([\d.]+)", printed, re.MULTILINE))
    assert set(found) == {"without a name", *(f"s{float(sparsity) * 100:g}" for sparsity in sparsities)}
    assert all(0 < float(accuracy) <= 1 for accuracy in found.values())
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert (tmp_path / "elastic.safetensors").exists() == bool(sparsities)
    if sparsities:
        assert ast_plugin.load(tmp_path, model).default_sub_net == "s50"
