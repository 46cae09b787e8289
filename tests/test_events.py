"""What is asked of a run in the middle of something: inside a forward, inside a step, after an interrupt."""

from __future__ import annotations

import copy
import gc
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, train_step, vector_batch, wrapped
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin


def everything(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> dict[Any, Any]:
    return {"dense": snapshot(model), **{name: ast.private_state(name) for name in ast.sub_nets}}


class Interrupted(nn.Module):
    """A network that does something else in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)
        self.teacher = copy.deepcopy(self.second).requires_grad_(False)
        self.meanwhile: Callable[[], Any] = lambda: None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.first(inputs))
        self.meanwhile()
        return self.second(hidden)


def interrupted_net() -> Interrupted:
    torch.manual_seed(0)
    return Interrupted()


def test_outputs_freed_in_the_middle_of_the_next_forward_leave_its_sub_net_on() -> None:
    outputs = []
    for skipped in (False, True):
        model, _, ast = wrapped(interrupted_net(), method="static")
        gc.disable()
        try:
            if skipped:
                cycle: list[Any] = [model(vector_batch(0)[0])]
                cycle.append(cycle)
                del cycle
                model.meanwhile = gc.collect
            output = model(vector_batch(1)[0])
        finally:
            gc.enable()
        output.sum().backward()
        outputs.append({"output": output.detach(), "gradient": model.first.weight.grad})
        assert int((outputs[-1]["gradient"] != 0).sum()) <= ast.masks.kept("s50", "first.weight")
    assert_same(*outputs)


def test_outputs_freed_in_the_middle_of_an_evaluation_leave_dense_weights_after_it() -> None:
    model, _, ast = wrapped(interrupted_net(), method="static")
    with torch.no_grad():
        want = model.eval()(vector_batch(1)[0])
    gc.disable()
    try:
        cycle: list[Any] = [model.train()(vector_batch(0)[0])]
        cycle.append(cycle)
        del cycle
        model.meanwhile = gc.collect
        with torch.no_grad():
            assert torch.equal(model.eval()(vector_batch(1)[0]), want)
    finally:
        gc.enable()
    assert bool(model.second.weight.all())
    assert ast.masks.kept("s50") < ast.masks.total()


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda model: model.second.state_dict(),
        lambda model: model.state_dict(),
        lambda model: copy.deepcopy(model.second),
        lambda model: model.teacher.load_state_dict(model.second.state_dict()),
    ],
    ids=["part", "whole", "copy", "teacher"],
)
def test_what_is_read_inside_the_forward_does_not_change_it(meanwhile: Callable[[Interrupted], Any]) -> None:
    results = []
    for busy in (False, True):
        model, optimizer, _ = wrapped(interrupted_net(), method="static")
        if busy:
            model.meanwhile = lambda model=model: meanwhile(model)
        train(model, optimizer, range(6), vector_batch)
        results.append({name: p for name, p in snapshot(model).items() if not name.startswith("teacher")})
    assert_same(*results)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["sub_net", "materialize", "copy", "state_dict", "optimizer", "nested"])
def test_what_a_hook_on_the_step_asks_for_does_not_change_the_run(what: str, when: str) -> None:
    def ask(model: nn.Module, optimizer: torch.optim.Optimizer, ast: Any) -> None:
        if what == "sub_net":
            with ast.sub_net("s90"):
                model.eval()(image_batch(9)[0])
                model.train()
        elif what == "nested":
            with ast.sub_net("s90"), ast.sub_net("s80"):
                ast.state_dict()
        elif what == "materialize":
            ast.materialize("s80")
        elif what == "copy":
            copy.deepcopy(model)
        elif what == "optimizer":
            optimizer.state_dict()
        else:
            model.state_dict()

    results = []
    for busy in (False, True):
        model = conv_net()
        optimizer = sgd(model)
        seen: list[Any] = []
        if when == "after":  # registered first, runs before this package's
            optimizer.register_step_post_hook(lambda opt, *_, m=model, s=seen: ask(m, opt, s[0]) if s else None)
        _, _, ast = wrapped(model, optimizer)
        if when == "before":
            optimizer.register_step_pre_hook(lambda opt, *_, m=model, s=seen: ask(m, opt, s[0]) if s else None)
        seen += [ast] if busy else []
        for step in range(7):
            train(model, optimizer, range(step, step + 1))
            model.state_dict()
        results.append(everything(model, ast))
    assert_same(*results)


def test_a_hook_on_the_step_sees_each_sub_nets_own_batch_norm() -> None:
    model = conv_net()
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append({name: ast.private_state(name) for name in ast.sub_nets}))
    _, _, ast = wrapped(model, optimizer)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        assert_same(seen[-1], {name: ast.private_state(name) for name in ast.sub_nets})


def test_after_an_interrupt_inside_the_module_around_it_the_network_evaluates_as_the_default() -> None:
    class Task(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.stop = network, False

        def forward(self, images: Tensor) -> Tensor:
            if self.stop:
                raise KeyboardInterrupt
            return self.network(images)

    network = conv_net()
    task = Task(network)
    optimizer = sgd(network)
    ast = ast_plugin.wrap(optimizer, network, outermost=task, sparsities=(0.5, 0.9), method="static")
    train(task, optimizer, range(3))
    images = image_batch(0)[0]
    with torch.no_grad(), ast.sub_net("s50"):
        want = network.eval()(images)
    task.train().stop = True
    with pytest.raises(KeyboardInterrupt):
        task(images)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), want)


def test_a_refused_load_leaves_the_next_one_watched() -> None:
    model, _, ast = wrapped(method="static")
    whole = model.state_dict()
    part = {name: tensor + 1 for name, tensor in model.conv2.state_dict().items()}
    for module, state in ((model, whole), (model.conv2, part), (model.conv2, part)):
        with ast.sub_net("s90"), pytest.raises(ast_plugin.ActivationError):
            module.load_state_dict(state)
    output = model(image_batch(0)[0])
    model.conv2.load_state_dict(part)
    assert torch.equal(model.conv2.weight, part["weight"])
    del output
    assert torch.equal(model.conv2.weight, part["weight"])


def test_a_model_that_hands_out_its_own_parameters_is_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.scale = mlp(), nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(inputs), self.scale

    model = Scaled()
    _, optimizer, ast = wrapped(model, method="static")
    for step in range(6):
        inputs, labels = vector_batch(step)
        optimizer.zero_grad()
        output, scale = model(inputs)
        functional.cross_entropy(output * scale, labels).backward()
        optimizer.step()
    assert ast.step == 6
    assert not model.scale._backward_hooks


@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("ast_plugin.inactive._elementwise_state", (0, 1, 2)),  # weights are being remembered
        ("ast_plugin.step_correction.correct_pairs", (0,)),  # the gradient is the next reference already
        ("ast_plugin.normalization._present", (0, 1)),  # BatchNorm is being exchanged
    ],
    ids=["remember", "correct", "exchange"],
)
def test_a_step_made_again_after_an_interrupt_is_the_step(where: str, calls: tuple[int, ...], looked_at: bool) -> None:
    results = []
    for interrupted in (False, True):
        model = conv_net()
        for norm in (model.norm0, model.norm1, model.norm2):
            norm.momentum = 0.0  # a forward more does not move statistics
        _, optimizer, ast = wrapped(model, method="static", inactive="freeze")
        train(model, optimizer, range(4))
        for count in calls if interrupted else ():
            optimizer.zero_grad()
            functional.cross_entropy(model(image_batch(4)[0]), image_batch(4)[1]).backward()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(where, interrupt_after(count, where))
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            if looked_at:
                ast.state_dict()
        train(model, optimizer, range(4, 9))
        results.append({n: t for n, t in snapshot(model).items() if "tracked" not in n})
        assert ast.step == 9
    assert_same(*results)


def interrupt_after(calls: int, where: str) -> Callable[..., Any]:
    """Return the function at `where`, but interrupted at the call after so many."""
    real = pkgutil.resolve_name(where)
    left = [calls]

    def function(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **kwargs)

    return function


def test_a_sub_net_whose_taking_off_was_interrupted_is_put_on_as_a_whole() -> None:
    results = []
    for interrupted in (False, True):
        model, optimizer, _ = wrapped(mlp(), method="static")
        train(model, optimizer, range(2), vector_batch)
        if interrupted:
            output = model(vector_batch(2)[0])
            with pytest.MonkeyPatch.context() as patch:
                carry = "ast_plugin.normalization.PrivateNormalization.carry"
                patch.setattr(carry, interrupt_after(0, carry))
                with pytest.raises(KeyboardInterrupt):
                    model.state_dict()
            del output
        train_step(model, optimizer, vector_batch(2))
        results.append(snapshot(model))
    assert_same(*results)
