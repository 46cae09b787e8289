"""Two processes over gloo, started by torchrun: one process on the same batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_ranks import AGAIN, RUNS, train
from lightning_runs import SUB_NETS
from networks import assert_same
from ranks import launched

pytestmark = [
    pytest.mark.extra("lightning"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]

HERE = Path(__file__).parent
Found = list[dict[str, dict[str, Any]]]  # by rank, by run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of two ranks found in all runs; in one launch, because one costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-W", "ignore", "-m", *launcher, str(HERE / "lightning_ranks.py"), str(folder), *RUNS]
    launched(command, folder / "stderr")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", [*RUNS, f"{AGAIN} again"])
def test_ranks_are_alike(ranks: Found, name: str) -> None:
    first, second = (found[name] for found in ranks)
    for key in ("weights", "masks", "private", "metrics", "conflicts", "validated"):
        assert_same({key: first[key]}, {key: second[key]})
    assert first["around"] in ("DistributedDataParallel", "" if name == "by hand" else None)
    assert set(first["metrics"]) >= {f"val_loss_{sub_net}" for sub_net in SUB_NETS}
    assert first["conflicts"] > 0


@pytest.mark.parametrize("name", [name for name in RUNS if name != AGAIN])
def test_two_ranks_are_one_process_on_the_same_batches(ranks: Found, name: str, tmp_path: Path) -> None:
    one, found = train(tmp_path, name, ranks=1), ranks[0][name]
    assert_same(found["masks"], one["masks"])
    torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    assert found["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert found["validated"] == pytest.approx(one["validated"], rel=1e-4)
    assert found["conflicts"] == one["conflicts"]


def test_a_checkpoint_of_two_ranks_resumes_bit_for_bit(ranks: Found) -> None:
    for found in ranks:
        for key in ("weights", "masks", "private", "metrics", "conflicts"):
            assert_same({key: found[f"{AGAIN} again"][key]}, {key: found[AGAIN][key]})


def test_files_are_written_once(ranks: Found) -> None:
    expected = ["ast_config.json", "elastic.safetensors", "step=16.ckpt", "step=16.elastic.safetensors"]
    assert set(expected) <= set(ranks[0]["plain"]["files"])
