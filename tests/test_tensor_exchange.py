"""Tensors that change places: by hand, after interrupts, and which of a model take part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError
from ast_plugin.tensor_exchange import TensorExchange, WeightExchange


class Cut(Exception):
    """Stands for an interrupt."""


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    return [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])], [
        torch.tensor([10.0 * i]) for i in (1, 2, 3)
    ]


def values(tensors: list[Tensor]) -> list[float]:
    return [float(tensor) for tensor in tensors]


def test_values_change_places_and_back_in_the_same_memory() -> None:
    ours, others = pairs()
    exchange = TensorExchange(lambda: ours, others)
    addresses = [tensor.data_ptr() for tensor in (*ours, *others)]
    assert not exchange.is_complete
    for _ in range(2):  # a second time changes nothing
        exchange.exchange(True)
        assert (values(ours), values(others)) == ([10, 20, 30], [1, 2, 3])
        assert exchange.is_complete
    ours[1].fill_(25)  # what is changed meanwhile goes along
    exchange.exchange(False)
    assert (values(ours), values(others)) == ([1, 2, 3], [10, 25, 30])
    assert [tensor.data_ptr() for tensor in (*ours, *others)] == addresses


@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after it"])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_it_goes_on_or_back_from_wherever_it_was_cut_off(
    at: int, after: bool, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Tensor.copy_
    for back in (True, False):
        ours, others = pairs()
        exchange = TensorExchange(lambda ours=ours: ours, others)
        exchange.exchange(not on)
        written = 0

        def copy_(self: Tensor, other: Tensor) -> Tensor:
            nonlocal written
            written += 1
            if written == at + 1 and not after:
                raise Cut
            result = original(self, other)
            if written == at + 1:
                raise Cut
            return result

        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "copy_", copy_)
            with pytest.raises(Cut):
                exchange.exchange(on)
        assert not exchange.is_complete or not on
        exchange.exchange(on != back)
        exchange.exchange(False)
        assert (values(ours), values(others)) == ([1, 2, 3], [10, 20, 30])


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("scale", torch.ones(1))
    net.register_buffer("cache", torch.ones(1), persistent=False)
    return net


def test_all_persistent_buffers_take_part_and_tell_what_became_of_them() -> None:
    net = model()
    given = {"0.bias": torch.ones(2), "1.running_mean": torch.full((2,), 4.0)}
    private = {"1.running_var"}
    exchange = WeightExchange(net, given, "weights", private=private)
    exchange.exchange(True)
    assert net[1].running_mean.tolist() == [4, 4]
    assert exchange.changed() == {}
    for name, buffer in net.named_buffers():
        buffer.fill_(7)
        assert name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "scale", "cache")
    found = exchange.changed()
    assert set(found) == {"1.num_batches_tracked", "scale"}  # the mean is in the hands of whoever gave it
    exchange.exchange(False)
    assert given["1.running_mean"].tolist() == [7, 7]
    assert net[1].running_mean.tolist() == [0, 0]
    assert (float(net.scale), float(net.cache), net[1].running_var.tolist()) == (1, 7, [7, 7])


def test_a_buffer_of_another_type_is_told_too() -> None:
    net = model()
    given = {"scale": torch.full((1,), 3.0, dtype=torch.float64)}
    exchange = WeightExchange(net, given, "weights", private=())
    exchange.exchange(True)
    assert exchange.changed() == {}
    net.scale.fill_(5)
    assert float(exchange.changed()["scale"]) == 5
    exchange.exchange(False)
    assert (float(net.scale), float(given["scale"])) == (1, 3)


def test_names_that_are_left_alone_or_are_none_are_refused() -> None:
    for name in ("0.wieght", "1.running_var", "cache"):
        with pytest.raises(ConfigError, match=f"weights names '{name}', which has no place here"):
            WeightExchange(model(), {name: torch.ones(1)}, "weights", private={"1.running_var"})
