"""Agreement over ranks: two processes on gloo."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from ast_plugin.distributed import average_over_ranks, check_same_on_all_ranks, ranks

SCRIPT = """
import sys, torch
import torch.distributed as dist
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
from ast_plugin.distributed import average_over_ranks, check_same_on_all_ranks, ranks
from ast_plugin.errors import StateError
assert ranks() == 2
scores = {"b": torch.tensor([float(rank)]), "a": torch.tensor([2.0, 4.0 * rank])}
average_over_ranks(scores)
assert scores["a"].tolist() == [2.0, 2.0], scores
assert scores["b"].tolist() == [0.5], scores
check_same_on_all_ranks("masks", lambda argument: argument, "same")
try:
    check_same_on_all_ranks("the masks of 's90'", lambda argument: argument + str(rank), "differs")
except StateError as error:
    assert "the masks of 's90' differ between ranks: ['differs0', 'differs1']" in str(error), error
else:
    raise SystemExit("a difference was not noticed")
dist.barrier()  # older versions of torch may hang where one process leaves while the other still talks
dist.destroy_process_group()
"""


def test_a_single_process_changes_and_computes_nothing() -> None:
    assert ranks() == 1
    scores = {"a": torch.ones(2)}
    average_over_ranks(scores)
    assert scores["a"].tolist() == [1.0, 1.0]
    check_same_on_all_ranks("masks", lambda _: pytest.fail("computed for nobody"), "x")


@pytest.mark.slow
def test_two_ranks_average_their_scores_and_notice_a_difference() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port]) for rank in range(2)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
