"""Every optimizer of torch: as the bare one, frozen where it must be, resumable; what cannot work is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optimizer_checks as checks
import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train_step, vector_batch
from optimizer_cases import Case, torch_cases
from torch import Tensor, nn

import ast_plugin
from ast_plugin.optimizers import innermost_optimizer, refusal_of

pytestmark = pytest.mark.matrix

REFUSED = {"SparseAdam"}
WORKING = [case for case in torch_cases() if case.name not in REFUSED]


@pytest.mark.parametrize("case", WORKING, ids=lambda case: case.label)
@pytest.mark.parametrize("check", sorted(checks.CHECKS))
def test_optimizer_of_torch(case: Case, check: str) -> None:
    checks.CHECKS[check](case)


@pytest.mark.parametrize("options", [{"max_iter": 3}, {"max_iter": 3, "line_search_fn": "strong_wolfe"}], ids=str)
@pytest.mark.parametrize("check", ["a", "c"])
def test_lbfgs_keeps_one_history_where_the_first_parameter_is_a_private_one(options: Any, check: str) -> None:
    # LBFGS has all its state under the first parameter, which is private to the sub-nets here.
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, **options)

    case = Case(source="torch.optim", name="LBFGS", options=options, make=make, network=network, batches=vector_batch)
    checks.CHECKS[check](case)
    model = network(0)
    optimizer = make(model)
    ast_plugin.wrap(optimizer, model, sparsities=(0.3, 0.6, 0.8), total_steps=30)
    for step in range(1, 5):
        checks.train(model, optimizer, range(step, step + 1), vector_batch)
        assert optimizer.state[model[0].weight]["func_evals"] >= step  # goes up with every sub-net's step


# --- what cannot work is refused when the optimizer is wrapped ---


class HalfSteps(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Container(torch.optim.Optimizer):
    """An optimizer that hands everything to others, as containers and sharded optimizers do."""

    def __init__(self, model: nn.Module, hold: Callable[[torch.optim.Optimizer], Any]) -> None:
        super().__init__(model.parameters(), {})
        self.held = hold(sgd(model))


class Averaging(torch.optim.SGD):
    """Exchanges weights with their average, and says nowhere which are in the model."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class InBackward(torch.optim.SGD):
    """An optimizer with LOMO's interface."""

    def fused_backward(self, loss: Tensor, lr: float) -> None: ...


def second_order(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    optimizer.is_second_order = True
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (second_order, "SGD needs second derivatives.*use a first-order optimizer"),
        (lambda m: torch.optim.SparseAdam(m.parameters()), "SparseAdam takes sparse gradients alone.*use Adam"),
        (
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1, differentiable=True),
            "SGD was made with differentiable=True.*use differentiable=False",
        ),
        (lambda m: HalfSteps(m.parameters(), {}), "HalfSteps trains in two half-steps.*use its base optimizer"),
        (lambda m: Container(m, lambda inner: inner), "Container leaves the arithmetic to a SGD .its attribute 'held'"),
        (lambda m: Container(m, lambda inner: [inner]), "Container leaves the arithmetic to a SGD"),
        (lambda m: Container(m, lambda inner: {"a": (inner,)}), "Container leaves the arithmetic to a SGD"),
        (lambda m: Averaging(m.parameters(), lr=0.1), r"Averaging has train\(\) and eval\(\), but no 'train_mode'"),
        (lambda m: InBackward(m.parameters(), lr=0.1), "InBackward steps inside backward.*stepped after backward"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_with_the_reason(
    make: Callable[[nn.Module], torch.optim.Optimizer], message: str
) -> None:
    model = conv_net()
    optimizer = make(model)
    before = snapshot(model)
    with pytest.raises(ast_plugin.WrapError, match=message):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60)
    assert_same(before, snapshot(model))
    assert not model._forward_pre_hooks


def test_the_reason_for_refusing_differentiable_holds_for_the_bare_optimizer_too() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        train_step(model, optimizer, image_batch(0))


def step_in_closure(model: nn.Module) -> None:
    """Step one optimizer a parameter as soon as its gradient is there, as layer-wise GaLore does."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)


def step_in_partial(model: nn.Module) -> None:
    def hook(optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
        optimizer.step()

    for parameter in model.parameters():
        parameter.register_hook(functools.partial(hook, torch.optim.SGD([parameter], lr=0.1)))


class Stepper:
    """Holds the optimizers that its method steps."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()


def step_in_method(model: nn.Module) -> None:
    stepper = Stepper(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(stepper.hook)


def step_in_torchs_own_way(model: nn.Module) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})


@pytest.mark.parametrize("fuse", [step_in_closure, step_in_partial, step_in_method, step_in_torchs_own_way])
def test_optimizers_fused_into_backward_are_refused_with_the_parameter(fuse: Callable[[nn.Module], None]) -> None:
    model = conv_net()
    fuse(model)
    with pytest.raises(ast_plugin.WrapError, match=r"parameter 'stem\.weight'.*stepped after backward"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.5, 0.9), total_steps=60)


def test_hooks_on_parameters_that_step_nothing_are_no_obstacle() -> None:
    model = conv_net()
    optimizer = sgd(model)
    rates: list[float] = []

    def clamp(parameter: Tensor) -> None:
        parameter.grad.clamp_(-1, 1)

    model.head.weight.register_hook(lambda _: rates.append(optimizer.param_groups[0]["lr"]))
    model.conv1.weight.register_post_accumulate_grad_hook(clamp)
    model.conv2.weight.register_hook(torch.nn.Identity())
    ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60)
    train_step(model, optimizer, image_batch(0))
    assert rates == [0.1]


def test_a_second_optimizer_for_other_parameters_is_no_obstacle() -> None:
    model = mlp()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1)
    optimizer.for_the_rest = torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1)
    assert refusal_of(optimizer, model) is None


def test_what_steps_an_optimizer_without_being_one_is_refused_by_what_it_holds() -> None:
    class Around:
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base = base

        def step(self) -> None:
            self.base.step()

    model = conv_net()
    with pytest.raises(ast_plugin.WrapError, match=r"Around is no torch.optim.Optimizer; it steps a SGD .*'base'"):
        ast_plugin.wrap(Around(sgd(model)), model, sparsities=(0.5, 0.9), total_steps=60)
    with pytest.raises(ast_plugin.WrapError, match=r"must be a torch.optim.Optimizer, got list; call wrap"):
        innermost_optimizer([])


class Extrapolating(torch.optim.Optimizer):
    """Takes the gradient at weights that it has moved first."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        parameters = self.param_groups[0]["params"]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.1)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for parameter in parameters:
                parameter.div_(1.1).sub_(parameter.grad, alpha=0.05)
        return loss


@pytest.mark.parametrize("options", [{}, {"inactive": "freeze", "private_normalization": False}], ids=str)
def test_moving_weights_before_the_closure_is_refused_where_something_is_private_or_frozen(options: Any) -> None:
    model = conv_net()
    optimizer = Extrapolating(model.parameters(), {})
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60, **options)
    with pytest.raises(ast_plugin.ActivationError, match="Extrapolating moved weights before it called the closure"):
        checks.train(model, optimizer, range(1), image_batch)
    assert ast.step == 0
    assert all(bool(model.get_parameter(name).all()) for name in ast.masks.parameters)


def test_moving_weights_before_the_closure_is_exact_where_all_is_shared_and_coasts() -> None:
    model, bare = conv_net(), conv_net()
    optimizer, bare_optimizer = Extrapolating(model.parameters(), {}), Extrapolating(bare.parameters(), {})
    settings: dict[str, Any] = {"private_normalization": False, "correction": "off", "method": "static"}
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60, **settings)
    for step in range(6):
        masked = checks.Masked(bare, ast.masks.of(ast.active))
        checks.train(masked, bare_optimizer, range(step, step + 1), image_batch)
        checks.train(model, optimizer, range(step, step + 1), image_batch)
    assert_same(snapshot(bare), snapshot(model))


@pytest.mark.slow
def test_a_compiled_step_of_the_optimizer_trains_as_the_plain_one_does() -> None:
    results = []
    for compiled in (False, True):
        model = conv_net()
        optimizer = sgd(model)
        settings: dict[str, Any] = {"total_steps": 30, "update_interval": 3, "inactive": "freeze"}
        ast = ast_plugin.wrap(optimizer, model, sparsities=(0.3, 0.6, 0.8), **settings)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(9):
            inputs, labels = image_batch(number)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            step()
        assert ast.step == 9
        results.append(optimizer.state_dict() | {"weights": snapshot(model)})
    assert_same(*results)


def test_complex_parameters_are_trained_and_never_pruned() -> None:
    class Rotating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4)
            self.turn = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last((self.first(inputs).to(torch.complex64) @ self.turn).real)

    model = Rotating()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.3, 0.6), total_steps=30, inactive="freeze")
    before = model.turn.detach().clone()
    checks.train(model, optimizer, range(4), vector_batch)
    assert ast.step == 4
    assert bool((before != model.turn).all())
    assert "turn" not in ast.masks.parameters
