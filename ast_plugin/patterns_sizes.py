"""Units of unequal size: blocks that the edge of a weight cuts off hold fewer weights than whole ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ast_plugin.selection_kernels import ordered_keys


def weights_in(kept: Tensor, sizes: Tensor) -> int:
    """Return the number of weights in the kept units.

    Args:
        kept: Bool (units,).
        sizes: Weights in each unit, int64 (units,), on the CPU.
    """
    return int(sizes[kept.cpu()].sum())


def level(kept: Tensor, sizes: Tensor, scores: Tensor, wanted: float) -> Tensor:
    """Keep the best dropped units too, or drop the worst kept ones, until as near to `wanted` weights as can be.

    Args:
        kept: Bool (units,). Not changed.
        sizes: Weights in each unit, int64 (units,), on the CPU.
        scores: Floating (units,); equal scores go to the lower index, NaN is worse than everything.
        wanted: Number of weights to keep.

    Returns:
        Bool (units,), on the device of `kept`; a layer that has kept units keeps at least one.
    """
    missing = wanted - weights_in(kept, sizes)
    present = kept.cpu()
    candidates = torch.nonzero(~present if missing > 0 else present).flatten()
    keys = ordered_keys(scores.cpu())[candidates]
    # A stable sort leaves equal keys in the order of their indices: the lower is kept first, the higher dropped first.
    best_first = candidates[torch.sort(keys, descending=True, stable=True).indices]
    order = best_first if missing > 0 else best_first[1:].flip(0)
    reached = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[order].cumsum(0)])
    count = int((reached - abs(missing)).abs().argmin())
    if count == 0:
        return kept
    changed = present.clone()
    changed[order[:count]] = missing > 0
    return changed.to(kept.device)
