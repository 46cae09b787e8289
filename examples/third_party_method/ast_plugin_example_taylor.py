"""A method of one's own for ast_plugin: one score, one record, one decorated function.

RigL regrows weights where the dense gradient is largest, which asks how fast the loss changes near zero. In alternating
sparse training a weight that one sub-net lacks still has a value, because other sub-nets train it, and it comes back
with that value at once. The first-order Taylor term |w * dL/dw| estimates how far the loss moves then (Molchanov,
Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning", CVPR 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ast_plugin import Method, ScoreInputs, hookimpl
from ast_plugin.hookspecs import MethodRecord
from ast_plugin.methods import magnitude


def taylor_importance(inputs: ScoreInputs) -> Tensor:
    """Return |w * dL/dw|: shape of the weight, never negative; zeros where the parameter had no gradient."""
    if inputs.gradient is None:
        return torch.zeros_like(inputs.weight)
    return (inputs.weight * inputs.gradient).abs()


TAYLOR = Method(
    name="taylor",
    description="drop the smallest magnitudes, grow the largest |w * dL/dw| (after Molchanov et al. 2019)",
    drop_score=magnitude,
    grow_score=taylor_importance,
    needs_gradient=True,
    # The score is right only for a weight that comes back with its value.
    grow_initialization="keep",
)


@hookimpl
def ast_methods() -> list[MethodRecord]:
    """Offer the method; from then on ``method="taylor"`` works wherever a method is named."""
    return [MethodRecord.of(TAYLOR)]
