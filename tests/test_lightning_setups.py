"""What Lightning's Trainer does in a step, with sub-nets: the plain Trainer's bits, and those of a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_loops import assert_as_loop, assert_as_plain

pytestmark = pytest.mark.extra("lightning")

EVERY_TWO = {"val_check_interval": 3, "num_sanity_val_steps": 2}


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("network", ["model", None])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3, **EVERY_TWO},
    ],
    ids=["plain", "accumulation", "clipping", "all with validation in between"],
)
def test_training_is_the_plain_trainers_and_the_loops(
    tmp_path: Path, given: dict[str, Any], network: str | None
) -> None:
    assert_as_plain(tmp_path, network=network, **given)
    assert_as_loop(tmp_path, network=network, **given)


def test_half_precision(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1)
    assert_as_loop(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1, forward=autocast)
