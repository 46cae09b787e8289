"""Data-parallel training of timm's scripts on processors.

timm hands its device to DistributedDataParallel as ``device_ids``, which torch refuses for a CPU: there must be
none. Everything else in timm works on gloo.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def data_parallel_on_cpu() -> Iterator[None]:
    """Within the block, ``DistributedDataParallel`` takes a CPU among `device_ids` for what it is: none."""
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def without_processors(self: DistributedDataParallel, *args: Any, **options: Any) -> None:
        if _processors(options.get("device_ids")):
            options["device_ids"] = None
        original(self, *args, **options)

    DistributedDataParallel.__init__ = without_processors  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = original  # type: ignore[method-assign]


def _processors(device_ids: Any) -> bool:
    devices = device_ids if isinstance(device_ids, (list, tuple)) else ()
    return bool(devices) and all(isinstance(d, (str, torch.device)) and torch.device(d).type == "cpu" for d in devices)
