"""Tensors by parameter name: what fits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ast_plugin.errors import ConfigError
from ast_plugin.named_tensors import checked_masks, checked_tensors

SHAPES = {"fc.weight": (2, 3), "head.weight": (1, 2)}
FITTING = {"head.weight": torch.ones(1, 2), "fc.weight": torch.zeros(2, 3)}


def test_what_fits_is_returned_in_the_order_of_the_shapes() -> None:
    assert list(checked_tensors("scores", FITTING, SHAPES)) == ["fc.weight", "head.weight"]
    assert checked_tensors("scores", {"fc.weight": FITTING["fc.weight"]}, SHAPES, complete=False).keys() == {
        "fc.weight"
    }
    masks = checked_masks("masks", {name: tensor > 0 for name, tensor in FITTING.items()}, SHAPES)
    assert int(masks["head.weight"].sum()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (list(FITTING), "^scores must be a mapping from parameter names to tensors, got list"),
        ({**FITTING, "fc.wieght": torch.ones(1)}, "names 'fc.wieght', .* did you mean 'fc.weight'"),
        ({"fc.weight": FITTING["fc.weight"]}, "lacks 'head.weight'; give a tensor for each of 2"),
        ({**FITTING, "fc.weight": torch.ones(3, 2)}, r"'fc.weight'\] must be a tensor of shape \(2, 3\), got \(3, 2\)"),
        ({**FITTING, "fc.weight": 1.0}, r"'fc.weight'\] must be a tensor of shape \(2, 3\), got float"),
    ],
)
def test_what_does_not_fit_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_tensors("scores", given, SHAPES)


def test_masks_are_bool() -> None:
    with pytest.raises(ConfigError, match=r"masks\['fc.weight'\] must be bool, True = kept, got torch.float32"):
        checked_masks("masks", FITTING, SHAPES)
