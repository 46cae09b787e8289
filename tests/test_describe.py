"""The table of parameters."""

from __future__ import annotations

import torch

from ast_plugin.describe import describe
from ast_plugin.masks import MaskStore
from ast_plugin.parameters import ParameterChoice


def test_a_hand_made_table_reads_as_expected() -> None:
    choices = [
        ParameterChoice(name="fc.weight", shape=(2, 4), prunable=True, reason=""),
        ParameterChoice(name="fc.bias", shape=(2,), prunable=False, reason="bias or norm (1-D)"),
        ParameterChoice(name="scale", shape=(), prunable=False, reason="bias or norm (1-D)"),
    ]
    masks = MaskStore(("s50",), {"fc.weight": (2, 4)})
    masks.set("s50", "fc.weight", torch.tensor([[True] * 4, [False] * 4]))
    table = describe(choices, masks)
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["parameter", "shape", "prunable", "s50"]
    assert lines[2] == ["fc.weight", "2x4", "yes", "50.00", "%"]
    assert lines[3] == ["fc.bias", "2", "no:", "bias", "or", "norm", "(1-D)", "-"]
    assert lines[4][:2] == ["scale", "scalar"]
    assert lines[6] == ["all", "prunable", "8", "of", "11", "weights", "50.00", "%"]
    starts = {line.index("2x4") if "2x4" in line else line.index("scalar") for line in str(table).splitlines()[2:5:2]}
    assert len(starts) == 1  # columns are aligned
    assert table.sparsity == {"s50": 0.5}
    assert table.rows[0].sparsity == {"s50": 0.5}
    assert table.rows[1].sparsity == {}
    assert (table.prunable_weights, table.total_weights) == (8, 11)
    assert table.to_dict()["rows"][0]["parameter"] == "fc.weight"
