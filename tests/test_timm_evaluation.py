"""Names of metrics: which sub-net ``--eval-metric`` means, and how every sub-net's figures stand side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from timm.utils import CheckpointSaver
from torch import nn

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.timm.evaluation import (
    OWN,
    check_metric,
    count_from_target,
    merged,
    metric_name,
    split_metric,
)

pytestmark = pytest.mark.extra("timm")

SUB_NETS = ("s50", "s95", "s95.5", "2:4")


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("top1", (None, "top1")),
        ("loss", (None, "loss")),
        ("s95_top1", ("s95", "top1")),
        ("s95.5_loss", ("s95.5", "loss")),
        ("2:4_top5", ("2:4", "top5")),
        ("s50_map", ("s50", "map")),
        ("macro_f1", (None, "macro_f1")),  # of a script's own; whether it exists is for the script to say
    ],
)
def test_a_metric_is_split_into_sub_net_and_name(metric: str, expected: tuple[str | None, str]) -> None:
    assert split_metric(metric, SUB_NETS) == expected


@pytest.mark.parametrize("metric", ["s90_top1", "s9_loss", "dense_top5"])
def test_a_metric_of_no_sub_net_is_refused(metric: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_metric(metric, SUB_NETS)
    assert f"--eval-metric {metric}: there is no sub-net '{metric.rpartition('_')[0]}'" in str(error.value)
    assert metric_name("s50", metric.rpartition("_")[2]) in str(error.value)


def test_figures_of_one_sub_net_come_first_and_then_those_of_all() -> None:
    found = {"s50": {"loss": 1.0, "top1": 50.0}, "s80": {"loss": 2.0, "top1": 40.0}}
    metrics = merged("s80", found)
    assert list(metrics.items()) == [
        ("loss", 2.0),
        ("top1", 40.0),
        ("s50_loss", 1.0),
        ("s50_top1", 50.0),
        ("s80_loss", 2.0),
        ("s80_top1", 40.0),
    ]
    assert found["s80"] == {"loss": 2.0, "top1": 40.0}


@pytest.mark.parametrize("decreasing", [False, True])
def test_no_checkpoint_on_the_way_to_the_sparsity_is_the_best(tmp_path: Path, decreasing: bool) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = argparse.Namespace(model="linear")
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=tmp_path, decreasing=decreasing, max_history=2)
    sparsity = 0.0
    count_from_target(saver, lambda: sparsity > 0.9)
    metrics = [90.0, 80.0, 60.0, 65.0, 62.0]  # the first two are less sparse
    for epoch, metric in enumerate(-value if decreasing else value for value in metrics):
        sparsity = 0.95 if epoch >= 2 else 0.4
        best = saver.save_checkpoint(epoch, metric=metric)
    assert best == (-65.0 if decreasing else 65.0, 3)
    assert torch.load(tmp_path / "model_best.pth.tar", weights_only=False)["epoch"] == 3
    assert {Path(file).name for file, _ in saver.checkpoint_files} == {f"checkpoint-{n}.pth.tar" for n in (3, 4)}


def test_a_metric_that_is_not_measured_is_refused() -> None:
    check_metric("top5", OWN)
    with pytest.raises(ConfigError, match="--eval-metric: validation measures no 'top'; did you mean 'top5'"):
        check_metric("top", OWN)
