"""Two processes over gloo, started by torchrun and by ``accelerate launch``: one process on the same batches."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launched
from transformers_ranks import AGAIN, BATCH, RUNS, train
from transformers_runs import SUB_NETS

pytestmark = [pytest.mark.extra("hf"), pytest.mark.slow]

HERE = Path(__file__).parent
Found = list[dict[str, dict[str, Any]]]  # by rank, by run


def launch(folder: Path, launcher: list[str], names: list[str]) -> Found:
    """Run `transformers_ranks.py` in two processes; return what they found."""
    script = [str(HERE / "transformers_ranks.py"), str(folder), *names]
    command = [sys.executable, "-W", "ignore", "-m", *launcher, *script]
    launched(command, folder / "stderr")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of two ranks found in all runs; in one launch, because one costs seconds."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return launch(tmp_path_factory.mktemp("ranks"), launcher, list(RUNS))


def assert_alike(one: dict[str, Any], other: dict[str, Any], *, tolerance: float = 0.0, private: bool = True) -> None:
    """Compare what two ranks or runs have; masks bit for bit."""
    for sub_net in SUB_NETS:
        for name, mask in other["masks"][sub_net].items():
            assert torch.equal(one["masks"][sub_net][name], mask), (sub_net, name)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(one["weights"], other["weights"], **close)
    if private:
        torch.testing.assert_close(one["private"], other["private"], **close)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=tolerance, abs=0.0)
    assert one["conflicts"] == other["conflicts"] > 0


@pytest.mark.parametrize("name", [*RUNS, *(f"{name} again" for name in AGAIN)])
def test_ranks_are_alike(ranks: Found, name: str) -> None:
    first, second = (found[name] for found in ranks)
    assert_alike(first, second)
    assert set(first["metrics"]) >= {f"eval_{sub_net}_loss" for sub_net in SUB_NETS}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process_on_the_same_batches(ranks: Found, name: str, tmp_path: Path) -> None:
    # Each rank normalises its own part of a batch, as micro-batches do; their statistics are not averaged in the end.
    normalised = name == "batch norm"
    parts = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2} if normalised else {}
    one = train(tmp_path, name, ranks=1, **parts)
    found = ranks[0][name]
    assert_alike(found, one, tolerance=1e-5, private=not normalised)
    assert found["norms"] == pytest.approx(one["norms"], rel=1e-4)
    sharded = name == "sharded"
    assert found["kinds"] == (
        ("FSDPGPT2LMHeadModel", "DTensor") if sharded else ("DistributedDataParallel", "Parameter")
    )


@pytest.mark.parametrize("name", AGAIN)
def test_a_checkpoint_of_two_ranks_resumes_bit_for_bit(ranks: Found, name: str) -> None:
    for found in ranks:
        assert_alike(found[f"{name} again"], found[name])
        assert found[f"{name} again"]["norms"][-5:] == found[name]["norms"][-5:]


def test_accelerate_launch_is_torchrun(ranks: Found, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # "--multi_gpu" means several processes here; the Trainer is told to use the processor.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    found = launch(tmp_path, ["accelerate.commands.launch", *options, f"--main_process_port={port}"], ["plain"])
    for mine, other in zip(found, ranks, strict=True):
        assert_alike(mine["plain"], other["plain"])
