"""What the entry point ``family`` registers: the orders of this package."""

from __future__ import annotations

from collections.abc import Sequence

from ast_plugin.hookspecs import AlternationRecord, hookimpl
from ast_plugin.integrations.family.alternations import DENSE_PIVOT, JOINT, JointOrder, build_dense_pivot


@hookimpl
def ast_alternations() -> Sequence[AlternationRecord]:
    """Offer the orders of `ast_plugin.integrations.family.alternations`."""
    return [
        AlternationRecord(
            name=DENSE_PIVOT,
            description="a step of the dense sub-net before each step of another one (Li et al. 2024)",
            build=build_dense_pivot,
            takes_argument=True,
        ),
        AlternationRecord(
            name=JOINT,
            description="every step all sub-nets, gradients added up; needs optimizer.step(closure) (Yu et al. 2019)",
            build=JointOrder,
        ),
    ]
