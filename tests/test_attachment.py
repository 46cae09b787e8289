"""Hooks on model and optimizer, apart from what a controller does with them."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any

import pytest
import torch
from networks import sgd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ast_plugin.attachment import Attachment, is_attached


class Recorder:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.dropped: list[Any] = []

    def before_forward(self, compiling: bool) -> None:
        self.events.append("compiled forward" if compiling else "before_forward")

    def after_forward(self, raised: bool) -> str | None:
        self.events.append("raised" if raised else "after_forward")
        return None if raised else "this forward"

    def before_backward(self, passed: Any) -> None:
        assert passed == "this forward"
        self.events.append("before_backward")

    def after_backward(self, completed: bool) -> None:
        self.events.append("after_backward" if completed else "broken off")

    def end_of_backward_unseen(self) -> None:
        self.events.append("unseen")

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.events.append("before_step")

    def after_step(self) -> None:
        self.events.append("after_step")

    def before_state_access(self) -> None:
        self.events.append("state")

    def after_state_access(self) -> None:
        pass

    def before_part_access(self) -> None:
        self.events.append("part")

    def before_copy(self) -> None:
        self.events.append("part")

    def before_load(self) -> None:
        self.events.append("load")

    def after_load(self) -> None:
        self.events.append("loaded")

    def graph_dropped(self, passed: Any) -> None:
        self.dropped.append(passed)

    def add_state(self, state_dict: dict[str, Any]) -> None:
        state_dict["mine"] = 1

    def take_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key != "mine"}


@dataclasses.dataclass
class Output:
    loss: Tensor
    extra: Any = None


class Plain:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


Named = collections.namedtuple("Named", ["loss"])

SHAPES: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda t: t, lambda o: o),
    "tuple": (lambda t: (1, t), lambda o: o[1]),
    "list": (lambda t: [[t]], lambda o: o[0][0]),
    "dict": (lambda t: {"a": {"b": t}}, lambda o: o["a"]["b"]),
    "ordered": (lambda t: collections.OrderedDict(loss=t), lambda o: o["loss"]),
    "named": (Named, lambda o: o.loss),
    "dataclass": (lambda t: Output(loss=t, extra="x"), lambda o: o.loss),
    "object": (Plain, lambda o: o.loss),
}


class Shaped(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.pack = SHAPES[shape][0]

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.linear(x).sum())


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_end_of_backward_is_reported_whatever_the_model_returns(shape: str) -> None:
    model, recorder = Shaped(shape), Recorder()
    attachment = Attachment(model, model, model, sgd(model), recorder)
    loss = SHAPES[shape][1](model(torch.ones(2, 3)))
    recorder.events.clear()
    loss.backward()
    assert recorder.events == ["before_backward", "after_backward"]
    attachment.remove()


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing_it_is_reported_once_and_last(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=reentrant)
            return checkpoint(self.second, x, use_reentrant=reentrant)

    model, recorder = Checkpointed(), Recorder()
    Attachment(model, model, model, sgd(model), recorder)
    output = model(torch.ones(2, 3, requires_grad=True))
    recorder.events.clear()
    for layer in (model.first, model.second):
        layer.weight.register_post_accumulate_grad_hook(lambda _: recorder.events.append("gradient"))
    output.sum().backward()
    assert recorder.events == ["before_backward", "gradient", "gradient", "after_backward"]


def test_events_come_in_the_order_of_a_step() -> None:
    model, recorder = Shaped("tensor"), Recorder()
    optimizer = sgd(model)
    Attachment(model, model, model, optimizer, recorder)
    model(torch.ones(2, 3)).backward()
    optimizer.step()
    assert recorder.events == [
        "before_forward",
        "after_forward",
        "before_backward",
        "after_backward",
        "before_step",
        "after_step",
    ]
    recorder.events.clear()
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 5))
    assert recorder.events == ["before_forward", "raised"]


def test_every_backward_is_reported_also_a_second_one_and_one_after_an_error() -> None:
    model, recorder = Shaped("tensor"), Recorder()
    Attachment(model, model, model, sgd(model), recorder)
    output = model(torch.ones(2, 3))

    def fail(_: Tensor) -> None:
        raise ValueError

    recorder.events.clear()
    handle = model.get_parameter("linear.weight").register_hook(fail)
    with pytest.raises(ValueError) as held:  # noqa: PT011  # its traceback keeps the engine's frames alive
        output.backward(retain_graph=True)
    handle.remove()
    output.backward(retain_graph=True)
    output.backward()
    assert held is not None
    assert recorder.events.count("before_backward") == 3
    assert recorder.events.count("after_backward") >= 2


def test_recording_gradients_leaves_the_end_to_the_next_backward() -> None:
    model, recorder = Shaped("tensor"), Recorder()
    Attachment(model, model, model, sgd(model), recorder)
    inputs = torch.ones(2, 3, requires_grad=True)
    output = model(inputs)
    recorder.events.clear()
    (gradient,) = torch.autograd.grad(output, inputs, create_graph=True)
    assert recorder.events == ["before_backward"]
    (output + gradient.square().sum()).backward()
    assert recorder.events == ["before_backward", "before_backward", "after_backward"]


def test_a_graph_that_is_gone_is_reported_once_all_outputs_behind_it_are() -> None:
    model, recorder = Shaped("dict"), Recorder()
    Attachment(model, model, model, sgd(model), recorder)
    output = model(torch.ones(2, 3))["a"]["b"]
    loss = output.square()
    del output
    assert recorder.dropped == []
    loss.backward()
    assert recorder.dropped == []
    del loss
    assert recorder.dropped == ["this forward"]
    with torch.no_grad():
        model(torch.ones(2, 3))  # records nothing
    assert recorder.dropped == ["this forward"]
    assert recorder.events.count("unseen") == 1


def test_parts_are_announced_but_not_while_the_whole_is_loaded() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 1))
    recorder = Recorder()
    attachment = Attachment(model, model, model, sgd(model), recorder)
    state = model[0].state_dict()
    assert set(recorder.events) == {"part"}
    recorder.events.clear()
    model[0].load_state_dict(state)
    assert recorder.events == ["load", "loaded"]
    copy.deepcopy(model[0])
    assert set(recorder.events[2:]) == {"part"}
    attachment.remove()
    assert not any(m._state_dict_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert not any(m._load_state_dict_post_hooks for m in model.modules())


def test_state_dicts_are_announced_extended_and_stripped() -> None:
    model, recorder = Shaped("tensor"), Recorder()
    optimizer = sgd(model)
    attachment = Attachment(model, model, model, optimizer, recorder)
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert state["mine"] == 1
    model.load_state_dict(model.state_dict())
    assert recorder.events == ["state", "state", "part", "load", "loaded"]
    attachment.remove()
    assert "mine" not in optimizer.state_dict()


def test_what_is_attached_is_known_until_removed() -> None:
    model, other = Shaped("tensor"), Shaped("tensor")
    optimizer, idle = sgd(model), sgd(other)
    attachment = Attachment(model, model, model, optimizer, Recorder())
    assert is_attached(model)
    assert is_attached(nn.Sequential(model))
    assert is_attached(optimizer)
    assert not is_attached(other)
    assert not is_attached(idle)
    attachment.remove()
    assert not is_attached(model)
    assert not is_attached(optimizer)


def test_the_hook_runs_before_those_that_were_there() -> None:
    model, recorder = Shaped("tensor"), Recorder()
    model.register_forward_pre_hook(lambda *_: recorder.events.append("users"))
    Attachment(model, model, model, sgd(model), recorder)
    model(torch.ones(2, 3))
    assert recorder.events == ["before_forward", "users", "after_forward"]
