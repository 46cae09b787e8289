"""What must hold for every optimizer that is wrapped. The tests and the table in docs/optimizers.md run the same."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from typing import Any

import torch
from networks import assert_same, snapshot
from optimizer_cases import Batches, Case
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin

_SUB_NETS = (0.3, 0.6, 0.8)


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether ``step`` cannot be called without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, batches: Batches) -> None:
    """Train as the optimizer asks for; random numbers drawn by the optimizer depend on the step alone."""
    for step in steps:
        torch.manual_seed(step)
        inputs, labels = batches(step)
        model.train()

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)  # noqa: B023  # called in this round
            loss.backward()
            return loss

        if needs_closure(optimizer):
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


def check_one_dense_sub_net(case: Case, steps: int = 20) -> None:
    """Check that one sub-net without zeros leaves everything as the bare optimizer does, bit for bit."""
    bare, tracked = case.network(0), case.network(0)
    bare_optimizer, optimizer = case.make(bare), case.make(tracked)
    ast_plugin.wrap(optimizer, tracked, sparsities=(0.0,), total_steps=steps, correction="off")
    train(bare, bare_optimizer, range(steps), case.batches)
    train(tracked, optimizer, range(steps), case.batches)
    assert_same(snapshot(bare), snapshot(tracked))
    state = optimizer.state_dict()
    assert state.pop("ast_plugin")["step"] == steps
    assert_same(bare_optimizer.state_dict(), state)


def check_freeze(case: Case) -> None:
    """Check every step of three sub-nets under `freeze` against the bare optimizer.

    Inactive weights and their state of weight shape stay as they were, bit for bit. Everything else is what the bare
    optimizer makes of the same weights, state and masked gradient; that gradient comes from a forward in which the
    masks are factors.
    """
    model, bare = case.network(0), case.network(0)
    optimizer, bare_optimizer = case.make(model), case.make(bare)
    settings: dict[str, Any] = {"total_steps": 60, "method": "static", "correction": "off", "inactive": "freeze"}
    ast = ast_plugin.wrap(optimizer, model, sparsities=_SUB_NETS, **settings)
    twin = _Twin(ast, bare, bare_optimizer)
    state = state_of(optimizer)
    for step in range(case.steps):
        active = ast.active
        masks = ast.masks.of(active)
        twin.bring_over(active)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        known = {name: _of_weight_shape(state, model.get_parameter(name)) for name in masks}

        train(Masked(bare, masks), bare_optimizer, range(step, step + 1), case.batches)
        train(model, optimizer, range(step, step + 1), case.batches)

        twin.compare_private(active)
        for name, parameter, other in twin.shared():
            mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
            where = (active, name)
            assert torch.equal(parameter[mask], other[mask]), where
            assert torch.equal(parameter[~mask], before[name][~mask]), where
            _compare_states(state.get(parameter, {}), twin.state.get(other, {}), mask, where)
            if name in masks:
                old, tolerance = known[name], 0.0
                if not old:  # made by this step
                    old, tolerance = _initial_state(case, before, name), 1e-3
                for key, new in _of_weight_shape(state, parameter).items():
                    torch.testing.assert_close(new[~mask], old[key][~mask], rtol=tolerance, atol=tolerance / 1000)


def state_of(optimizer: Any) -> dict[Tensor, Any]:
    """Return the state where it really is: Lookahead keeps it in the optimizer inside."""
    state: dict[Tensor, Any] = getattr(optimizer, "_base_optimizer", optimizer).state
    return state


class Masked(nn.Module):
    """Computes with masked weights, by a product that autograd sees."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.masks = masks

    def forward(self, inputs: Tensor) -> Tensor:
        weights = {name: self.inner.get_parameter(name) * mask for name, mask in self.masks.items()}
        return torch.func.functional_call(self.inner, weights, (inputs,))


class _Twin:
    """A bare model and optimizer that make the same step as a wrapped one, from the same weights and state.

    The private BatchNorm state of the optimizer is kept here for every sub-net, independently of the wrapped one's.
    """

    def __init__(
        self, ast: ast_plugin.AlternatingSparseTraining, bare: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.state = state_of(optimizer)
        self._ast = ast
        self._bare = bare
        self._fused = any(group.get("fused") for group in optimizer.param_groups)
        self._private = set(ast.private_state(ast.default_sub_net))
        self._entries = {
            name: {key: copy.deepcopy(self.state.get(p)) for key, p in self._own()} for name in ast.sub_nets
        }

    def _own(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter) for name, parameter in self._bare.named_parameters() if name in self._private]

    def shared(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, wrapped and bare parameter of all that the sub-nets share."""
        for name, parameter in self._bare.named_parameters():
            if name not in self._private:
                yield name, self._ast.model.get_parameter(name), parameter

    def bring_over(self, active: str) -> None:
        """Take the wrapped one's dense weights and state, and what is private to the active sub-net."""
        own = self._ast.private_state(active)
        state = self._ast.optimizer.state
        with torch.no_grad():
            for name, tensor in (*self._bare.named_parameters(), *self._bare.named_buffers()):
                tensor.copy_(own[name] if name in own else self._ast.model.get_parameter(name))
        for name, parameter, other in self.shared():
            self._enter(other, state.get(parameter))
            assert name not in own
        for name, parameter in self._own():
            entry = self._entries[active][name]
            if entry is None and self._fused:
                # Fused kernels refuse a step in which some parameters have state and others none.
                made = state.get(self._ast.model.get_parameter(name), {})
                entry = {key: torch.zeros_like(value) for key, value in made.items()} or None
            self._enter(parameter, entry)

    def _enter(self, parameter: Tensor, entry: Any) -> None:
        self.state.pop(parameter, None)
        if entry is not None:
            self.state[parameter] = copy.deepcopy(entry)

    def compare_private(self, active: str) -> None:
        """Compare the BatchNorm state of the sub-net that stepped, and keep the optimizer's part of it."""
        own = self._ast.private_state(active)
        for name, parameter in self._own():
            assert torch.equal(own[name], parameter), (active, name)
            self._entries[active][name] = copy.deepcopy(self.state.get(parameter))
        for name, buffer in self._bare.named_buffers():
            assert torch.equal(own[name], buffer), (active, name)


def _of_weight_shape(state: dict[Tensor, Any], parameter: Tensor) -> dict[str, Tensor]:
    return {
        key: value.clone()
        for key, value in state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def _initial_state(case: Case, before: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the state that the optimizer makes for weights which get no gradient and do not decay."""
    fresh = case.network(0)
    optimizer = case.make(fresh)
    for group in optimizer.param_groups:
        group.update({key: 0.0 for key in ("weight_decay", "lambd") if key in group})
    with torch.no_grad():
        for key, parameter in fresh.named_parameters():
            parameter.copy_(before[key])
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(*([lambda: torch.zeros(())] if needs_closure(optimizer) else []))
    return _of_weight_shape(state_of(optimizer), fresh.get_parameter(name))


def _compare_states(one: dict[str, Any], other: dict[str, Any], mask: Tensor, where: object) -> None:
    assert one.keys() == other.keys(), where
    for key, value in one.items():
        if isinstance(value, Tensor) and value.shape == mask.shape:
            assert torch.equal(value[mask], other[key][mask]), (where, key)
        else:
            assert_same({key: value}, {key: other[key]})


def check_resume(case: Case, steps: int = 14, stop: int = 8) -> None:
    """Check that a run resumed from a file goes on as if it had not been interrupted, bit for bit."""
    straight, straight_optimizer, straight_ast = _resumable(case, 0)
    train(straight, straight_optimizer, range(steps), case.batches)

    first, first_optimizer, _ = _resumable(case, 0)
    train(first, first_optimizer, range(stop), case.batches)
    checkpoint = through_file({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()})

    second, second_optimizer, second_ast = _resumable(case, 99)
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    train(second, second_optimizer, range(stop, steps), case.batches)

    assert straight_ast.step == second_ast.step == steps
    assert_same(snapshot(straight), snapshot(second))
    assert_same(straight_optimizer.state_dict(), second_optimizer.state_dict())
    for name in straight_ast.sub_nets:
        assert_same(straight_ast.private_state(name), second_ast.private_state(name))


def _resumable(case: Case, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    model = case.network(seed)
    optimizer = case.make(model)
    settings: dict[str, Any] = {"sparsities": _SUB_NETS, "total_steps": 30, "update_interval": 3}
    return model, optimizer, ast_plugin.wrap(optimizer, model, **settings)


def through_file(state: dict[str, Any]) -> Any:
    """Return a state dict as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CHECKS = {"a": check_one_dense_sub_net, "b": check_freeze, "c": check_resume}


def refusal(case: Case) -> str | None:
    """Return why an optimizer cannot train three sub-nets, as the user is told; None if it can."""
    try:
        model, optimizer, _ = _resumable(case, 0)
        train(model, optimizer, range(1), case.batches)
    except (ast_plugin.WrapError, ast_plugin.ActivationError) as error:
        return str(error)
    return None


def notes(case: Case) -> list[str]:
    """Return what a reader should know of an optimizer: its own note, and what its state shows after a few steps."""
    model = case.network(0)
    optimizer = case.make(model)
    before = [dict(group) for group in optimizer.param_groups]
    train(model, optimizer, range(3), case.batches)
    counters = {
        key
        for old, new in zip(before, optimizer.param_groups, strict=True)
        for key, value in new.items()
        if isinstance(value, (int, float, Tensor)) and key not in ("lr", "scheduled_lr") and value != old.get(key)
    }
    other = {
        key
        for parameter in model.parameters()
        if parameter.dim() > 1
        for key, value in state_of(optimizer).get(parameter, {}).items()
        if _has_axes(value) and not (isinstance(value, Tensor) and value.shape == parameter.shape)
    }
    found = [case.note] if case.note else []
    if counters:
        found.append(f"counts over all sub-nets, per parameter group: {_listed(counters)}")
    if other:
        found.append(f"`freeze` lets state of other shapes move on: {_listed(other)}")
    return found


def _has_axes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_axes(item) for item in value)
    return isinstance(value, Tensor) and value.dim() > 0


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
