"""What stands in for tensors and numbers of full size is copied and pickled as what it stands for.

``copy.deepcopy`` and ``pickle`` take a module's attributes before any hook of it is called, so a layer that is copied
by itself while a sub-net is on would take smaller weights along, and keep them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor


def copied_as(small: Tensor, whole: Tensor) -> Tensor:
    """Have `small` copied and pickled as `whole`; returns `small`."""
    small.__deepcopy__ = functools.partial(copy.deepcopy, whole)  # type: ignore[method-assign]
    small.__reduce_ex__ = functools.partial(_reduced, whole)  # type: ignore[method-assign]
    return small


class Count(int):
    """A number of units that are left, copied and pickled as the number of all.

    Args:
        value: The number.
        whole: The number of all.
    """

    whole: int

    def __new__(cls, value: int, whole: int) -> Count:
        """Return the number, which knows the other one."""
        made = super().__new__(cls, value)
        made.whole = whole
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return how the number of all is made."""
        return int, (self.whole,)


def _reduced(whole: Tensor, protocol: Any) -> tuple[Any, ...]:
    return _itself, (whole,)


def _itself(whole: Tensor) -> Tensor:
    return whole
