"""Runs whose sub-nets have different patterns: single weights, 2:4 and whole channels, beside the dense one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import image_batch, sgd, snapshot, train
from residual_networks import residual_groups, residual_net, token_groups, token_net
from torch import Tensor, nn

import ast_plugin
from ast_plugin.elastic_file import read_elastic
from ast_plugin.integrations.family import plugin
from ast_plugin.report import Report
from ast_plugin.sub_nets import SubNetSpec

pytestmark = pytest.mark.matrix

CASES = {"residual": (residual_net, residual_groups), "tokens": (token_net, token_groups)}
ORDERS = ("alternating", "dense_pivot")
MIXED = (0.0, 0.9, "2:4", SubNetSpec(name="c50", sparsity=0.5, pattern="channel"))


def wrapped(case: str = "residual", **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    network, groups = CASES[case]
    model = network()
    optimizer = sgd(model)
    settings = {"sparsities": MIXED, "total_steps": 48, "update_interval": 4, "plugins": [plugin]}
    return model, optimizer, ast_plugin.wrap(optimizer, model, groups=groups(), **{**settings, **options})


def outputs(model: nn.Module, names: tuple[str, ...], put_on: Callable[[str], Any]) -> dict[str, Tensor]:
    model.eval()
    found = {}
    for name in names:
        with put_on(name), torch.no_grad():
            found[name] = model(image_batch(999)[0])
    return found


def kept_of_four(mask: Tensor) -> Tensor:
    """Return how many of every four weights along the inputs a mask of two or four axes keeps."""
    rows = mask.movedim(1, -1)
    return rows.reshape(*rows.shape[:-1], -1, 4).sum(-1)


@pytest.mark.parametrize("method", ["granet", "gmp", "rigl", "set", "static"])
@pytest.mark.parametrize("alternation", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_every_sub_net_follows_its_own_pattern_at_every_step(case: str, alternation: str, method: str) -> None:
    model, optimizer, ast = wrapped(case, alternation=alternation, method=method)
    for step in range(48):
        train(model, optimizer, range(step, step + 1))
        assert all((kept_of_four(ast.masks.get("2:4", name)) >= 2).all() for name in ast.masks.parameters)
        kept = ast.kept_channels("c50")
        first = next(iter(kept))
        maker = {"residual": f"{first}.weight", "tokens": "blocks.0.fc1.weight"}[case]
        units = kept[first] if case == "residual" else kept["blocks.0.fc1"]
        rows = ast.masks.get("c50", maker).flatten(1)
        assert torch.equal(rows.any(1), units)
        assert torch.equal(rows.all(1), units)
        assert all(ast.masks.get("s0", name).all() for name in ast.masks.parameters)
    assert ast.at_target
    assert ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)
    assert all((kept_of_four(ast.masks.get("2:4", name)) == 2).all() for name in ast.masks.parameters)
    assert ast.statistics()["sub_nets"]["c50"]["dropped_channels"] == 0.5


def test_table_file_and_report_tell_the_patterns_apart(tmp_path: Path) -> None:
    model, optimizer, ast = wrapped("tokens", alternation="dense_pivot")
    train(model, optimizer, range(48))
    text = str(ast.describe())
    assert "c50 keeps" in text
    assert all(name in text.splitlines()[0] for name in ast.sub_nets)
    for name in ast.sub_nets:
        ast.add_report_metric("accuracy", 0.5, sub_net=name)
    ast.save(tmp_path / "elastic.safetensors")
    contents = read_elastic(tmp_path / "elastic.safetensors")
    assert {name: record.pattern for name, record in contents.records.items()} == {
        "s0": "unstructured",
        "s90": "unstructured",
        "2:4": "2:4",
        "c50": "channel",
    }
    for report in (Report.from_training(ast), Report.from_elastic(contents)):
        assert [net.dropped_channels for net in report.sub_nets] == [None, None, None, 0.5]
        assert all(net.on_target for net in report.sub_nets)
    elastic = ast_plugin.load(tmp_path / "elastic.safetensors", token_net())
    loaded = outputs(elastic.model, ast.sub_nets, elastic.sub_net)
    for name, found in outputs(model, ast.sub_nets, ast.sub_net).items():
        assert torch.allclose(found, loaded[name], atol=1e-6), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alternation", ORDERS)
def test_a_run_is_resumed_bit_for_bit_at_every_place_of_the_turn(case: str, alternation: str) -> None:
    straight = wrapped(case, alternation=alternation)
    saved = []
    for step in range(30):
        if step >= 16 and len(saved) < 6:
            buffer = io.BytesIO()
            torch.save((straight[0].state_dict(), straight[1].state_dict()), buffer)
            saved.append((step, buffer))
        train(straight[0], straight[1], range(step, step + 1))
    for step, buffer in saved:
        model, optimizer, ast = wrapped(case, alternation=alternation)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(step, 30))
        assert ast.active == straight[2].active
        assert ast.masks.checksum() == straight[2].masks.checksum()
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, snapshot(straight[0])[name]), (step, name)


@pytest.mark.parametrize("case", CASES)
def test_smaller_weights_compute_what_masked_ones_do_between_other_patterns(case: str) -> None:
    runs = {}
    for slicing in ("leaves", "gather", "off"):
        model, optimizer, ast = wrapped(case, alternation="dense_pivot", slicing=slicing, correction="global")
        train(model, optimizer, range(12))
        runs[slicing] = (snapshot(model), ast.masks.checksum(), ast.statistics()["conflicts"])
    for slicing in ("leaves", "gather"):
        for name, tensor in runs[slicing][0].items():
            assert torch.allclose(tensor, runs["off"][0][name], atol=1e-5), (slicing, name)
        assert runs[slicing][1:] == runs["off"][1:]


def test_gradients_are_corrected_between_patterns() -> None:
    model, optimizer, ast = wrapped(method="static")
    previous: dict[str, Tensor] = {}
    opposed = dict.fromkeys(ast.sub_nets, 0)
    for step in range(40):
        name = ast.active
        optimizer.zero_grad()
        images, labels = image_batch(step)
        nn.functional.cross_entropy(model.train()(images), labels).backward()
        before = {n: model.get_parameter(n).grad.clone() for n in ast.masks.parameters}
        optimizer.step()
        for parameter, gradient in before.items():
            mask = ast.masks.get(name, parameter)
            assert not gradient[~mask].any()
            if step % 4 == 0:
                assert torch.equal(model.get_parameter(parameter).grad, gradient)
                continue
            reference = previous[parameter] * mask
            product, square = (gradient * reference).sum(), (reference * reference).sum()
            expected = gradient - product / square * reference if product < 0 else gradient
            assert torch.allclose(model.get_parameter(parameter).grad, expected, atol=1e-6)
            opposed[name] += int(product < 0)
        previous = before
    assert opposed.pop("s0") == 0
    assert all(opposed.values())


@pytest.mark.extra("channels")
def test_the_search_for_channels_serves_one_sub_net_among_others() -> None:
    model = residual_net()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=MIXED,
        total_steps=16,
        alternation="dense_pivot",
        plugins=[plugin],
        example_inputs=image_batch(0)[0][:1],
    )
    train(model, optimizer, range(16))
    assert ast.at_target
    assert ast.statistics()["sub_nets"]["c50"]["dropped_channels"] == pytest.approx(0.5, abs=0.05)
