"""Which layers are private to each sub-net, and what of them."""

from __future__ import annotations

import torch
from torch import nn

from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.normalization import PrivateNormalization


def test_every_kind_of_batch_norm_is_found_and_layer_norm_is_not() -> None:
    model = nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(4),
            "two": nn.SyncBatchNorm(4),
            "plain": nn.BatchNorm2d(4, affine=False),
            "batch": nn.BatchNorm2d(4, track_running_stats=False),
            "layer": nn.LayerNorm(4),
            "instance": nn.InstanceNorm2d(4, affine=True),
        }
    )
    assert list(batch_norm_modules(model)) == ["one", "two", "plain", "batch"]
    names = PrivateNormalization(model, ("a", "b"), "a").names
    assert {name for name in names if name.startswith("plain.")} == {
        "plain.running_mean",
        "plain.running_var",
        "plain.num_batches_tracked",
    }
    assert {name for name in names if name.startswith("batch.")} == {"batch.weight", "batch.bias"}


class ForeignNorm(nn.Module):
    """Stands for a batch norm of another library that derives from no class of torch."""

    def __init__(self, *, learns: bool = True, extra: torch.Tensor | None = None) -> None:
        super().__init__()
        self.momentum = 0.1
        if learns:
            self.weight = nn.Parameter(torch.ones(4))
            self.v = nn.Parameter(torch.ones(4))
        if extra is not None:
            self.extra = nn.Parameter(extra)
        self.register_buffer("running_var", torch.ones(4))


def test_norms_of_other_libraries_are_private_where_they_learn_and_keep_statistics() -> None:
    model = nn.ModuleDict(
        {
            "foreign": ForeignNorm(),
            "frozen": ForeignNorm(learns=False),
            "layer": ForeignNorm(extra=torch.zeros(4, 4)),  # more than a norm
            "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            "untracked": nn.InstanceNorm2d(4, affine=True),
            "group": nn.GroupNorm(2, 4),
        }
    )
    assert list(batch_norm_modules(model)) == ["foreign", "instance"]
    assert set(PrivateNormalization(model, ("a", "b"), "a").names) == {
        "foreign.weight",
        "foreign.v",
        "foreign.running_var",
        *(f"instance.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
