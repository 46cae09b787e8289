"""Agreement over ranks where there is one alone; `test_ddp.py` and `test_fsdp.py` start several."""

from __future__ import annotations

import pytest
import torch
from networks import mlp

from ast_plugin.distributed import (
    average_over_ranks,
    check_every_rank_goes_on,
    check_same_on_all_ranks,
    from_first_rank,
    ranks,
)


def test_a_single_process_changes_and_computes_nothing() -> None:
    assert ranks() == ranks(mlp()) == 1
    scores = {"a": torch.ones(2)}
    average_over_ranks(scores, like={"a": torch.ones(2), "b": torch.ones(3)})
    assert list(scores) == ["a"]
    assert scores["a"].tolist() == [1.0, 1.0]
    check_same_on_all_ranks("masks", lambda _: pytest.fail("computed for nobody"), "x")
    assert from_first_rank(lambda: pytest.fail("computed for nobody")) is None
    check_every_rank_goes_on(mlp())
