"""timm names a processor among the devices of DistributedDataParallel; for the length of a run that means none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ast_plugin.integrations.timm.cpu_ddp import data_parallel_on_cpu

pytestmark = pytest.mark.extra("timm")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Devices that the constructor is called with, which is not run: it needs a process group."""
    devices: list[Any] = []

    def constructor(self: DistributedDataParallel, module: nn.Module, device_ids: Any = None, **_: Any) -> None:
        devices.append(device_ids)

    monkeypatch.setattr(DistributedDataParallel, "__init__", constructor)
    return devices


def test_a_processor_is_no_device(given: list[Any]) -> None:
    model = nn.Linear(2, 2)
    with data_parallel_on_cpu():
        for devices in ([torch.device("cpu")], ["cpu"], (torch.device("cpu", 0),)):
            DistributedDataParallel(model, device_ids=devices)
    assert given == [None, None, None]


def test_other_devices_are_handed_on(given: list[Any]) -> None:
    model = nn.Linear(2, 2)
    with data_parallel_on_cpu():
        for devices in ([torch.device("cuda", 1)], [0], None, []):
            DistributedDataParallel(model, device_ids=devices)
        DistributedDataParallel(model)
    assert given == [[torch.device("cuda", 1)], [0], None, [], None]


def test_the_class_is_as_before_also_after_an_error(given: list[Any]) -> None:
    before = DistributedDataParallel.__init__
    inside = []

    def broken() -> None:
        with data_parallel_on_cpu():
            inside.append(DistributedDataParallel.__init__)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert inside[0] is not before
    assert DistributedDataParallel.__init__ is before
