"""What twins take over from a run, and when; `test_setups_averaging.py` uses them in training loops."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import wrapped
from setup_runs import BUSY, plain_step

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
