"""What twins take over from a run, and when; `test_setups_averaging.py` uses them in training loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import image_batch, train_step, wrapped
from setup_runs import BUSY, plain_step

import ast_plugin
from ast_plugin.masks import MaskStore


def test_a_twin_takes_masks_over_only_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ast = wrapped(**BUSY)
    twin = ast.twin(copy.deepcopy(model))
    taken: list[str] = []
    real = MaskStore.set

    def counted(store: MaskStore, sub_net: str, parameter: str, mask: torch.Tensor) -> None:
        if store is not ast.masks:
            taken.append(sub_net)
        real(store, sub_net, parameter, mask)

    monkeypatch.setattr(MaskStore, "set", counted)
    count = len(ast.masks.parameters)
    for _ in range(3):
        for name in ("s80", "s90", "s80"):
            with twin.sub_net(name):
                pass
    assert taken == ["s80"] * count + ["s90"] * count
    taken.clear()
    name = ast.active
    before = ast.masks.checksum(name)
    step = 0
    while ast.masks.checksum(name) == before:
        plain_step(model, optimizer, step)
        step += 1
    with twin.sub_net(name) as network:
        zeros = network.conv2.weight == 0
    assert taken == [name] * count
    assert torch.equal(zeros, ~ast.masks.get(name, "conv2.weight"))


def test_a_decay_averages_the_batch_norm_of_waiting_sub_nets_as_the_formula_says() -> None:
    model, optimizer, ast = wrapped(**BUSY)
    twin = ast.twin(copy.deepcopy(model))
    expected = {name: twin.private_state(name) for name in ast.sub_nets if name != ast.default_sub_net}
    for step in range(4):
        train_step(model, optimizer, image_batch(step))
        twin.update(decay=0.75)
        for name, averaged in expected.items():
            for key, present in ast.private_state(name).items():
                floating = present.is_floating_point()
                averaged[key] = averaged[key] + 0.25 * (present - averaged[key]) if floating else present
    for name, averaged in expected.items():
        found = twin.private_state(name)
        assert any(not torch.equal(found[key], ast.private_state(name)[key]) for key in found)
        for key, value in averaged.items():
            torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.5}, {"decay": -0.1}, {"decay": "0.9"}, {"average": lambda a, b, n: a, "decay": 0.9}],
)
def test_a_decay_that_is_no_share_or_does_not_stand_alone_is_refused(options: dict[str, Any]) -> None:
    model, _, ast = wrapped(**BUSY)
    twin = ast.twin(copy.deepcopy(model))
    with pytest.raises(ast_plugin.ConfigError, match=r"decay must lie in \[0, 1\] and stand alone"):
        twin.update(**options)
