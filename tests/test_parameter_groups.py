"""Parameter groups: several, added later, frozen and unfrozen; and closures, Lightning's way too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, snapshot, train, train_step, vector_batch
from optimizer_checks import through_file
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin

Run = tuple[Any, Any, ast_plugin.AlternatingSparseTraining]
SETTINGS: dict[str, Any] = {"sparsities": (0.3, 0.6, 0.8), "total_steps": 40, "update_interval": 4}


def with_frozen_stem(seed: int = 0, freeze: tuple[str, ...] = ("stem", "norm0")) -> Run:
    model = conv_net(seed)
    for name in freeze:
        model.get_submodule(name).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)
    return model, optimizer, ast_plugin.wrap(optimizer, model, **SETTINGS)


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer, names: tuple[str, ...] = ("stem", "norm0")) -> None:
    modules = [model.get_submodule(name).requires_grad_(True) for name in names]
    optimizer.add_param_group({"params": [p for module in modules for p in module.parameters()], "lr": 0.01})


def test_a_group_added_later_is_trained_and_its_batch_norm_is_private() -> None:
    model, optimizer, ast = with_frozen_stem()
    train(model, optimizer, range(6))
    frozen = snapshot(model)
    assert torch.equal(frozen["stem.weight"], conv_net().stem.weight)
    unfreeze(model, optimizer)
    train(model, optimizer, range(6, 12))
    assert not torch.equal(frozen["stem.weight"], model.stem.weight)
    weights = [ast.private_state(name)["norm0.weight"] for name in ast.sub_nets]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    assert all(not torch.equal(weight, frozen["norm0.weight"]) for weight in weights)


def test_a_run_with_a_group_added_later_resumes_bit_identically() -> None:
    straight, straight_optimizer, _ = with_frozen_stem()
    train(straight, straight_optimizer, range(6))
    unfreeze(straight, straight_optimizer)
    train(straight, straight_optimizer, range(6, 11))
    checkpoint = through_file({"model": straight.state_dict(), "optimizer": straight_optimizer.state_dict()})
    train(straight, straight_optimizer, range(11, 20))

    second, second_optimizer, ast = with_frozen_stem(seed=9)
    unfreeze(second, second_optimizer)
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    assert ast.step == 11
    train(second, second_optimizer, range(11, 20))
    assert_same(snapshot(straight), snapshot(second))
    assert_same(straight_optimizer.state_dict(), second_optimizer.state_dict())


def test_without_the_added_group_torch_refuses_the_state_and_the_run_does_not_move() -> None:
    model, optimizer, _ = with_frozen_stem()
    unfreeze(model, optimizer)
    train(model, optimizer, range(3))
    _, other_optimizer, other = with_frozen_stem()
    with pytest.raises(ValueError, match="param"):
        other_optimizer.load_state_dict(optimizer.state_dict())
    assert other.step == 0


def test_a_weight_that_was_frozen_when_wrapped_is_trained_dense_after_it_is_unfrozen() -> None:
    model, optimizer, ast = with_frozen_stem(freeze=("conv1",))
    assert "conv1.weight" not in ast.masks.parameters
    assert "frozen" in str(ast.describe())
    train(model, optimizer, range(3))
    unfreeze(model, optimizer, ("conv1",))
    train(model, optimizer, range(3, 9))
    assert not torch.equal(model.conv1.weight, conv_net().conv1.weight)
    with ast.sub_net("s80"):
        assert bool(model.conv1.weight.all())
        assert not bool(model.conv2.weight.all())


@pytest.mark.parametrize("inactive", ["coast", "freeze"])
def test_a_pruned_weight_may_be_frozen_for_a_while(inactive: str) -> None:
    model = conv_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ast = ast_plugin.wrap(optimizer, model, **SETTINGS, inactive=inactive)
    train(model, optimizer, range(5))
    model.conv1.requires_grad_(False)
    before = model.conv1.weight.detach().clone()
    train(model, optimizer, range(5, 20))
    assert torch.equal(before, model.conv1.weight)
    model.conv1.requires_grad_(True)
    train(model, optimizer, range(20, 40))
    assert not torch.equal(before, model.conv1.weight)
    for name, sparsity in zip(ast.sub_nets, SETTINGS["sparsities"], strict=True):
        assert abs(ast.masks.kept(name) - (1 - sparsity) * ast.masks.total()) <= 1


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Make groups with rate and decay of their own, without decay for vectors, as training scripts do."""
    layers: list[dict[str, Any]] = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        decay = 0.0 if parameter.ndim < 2 else 0.02 + 0.01 * index
        layers.append({"params": [parameter], "lr": 0.02 + 0.005 * index, "weight_decay": decay, "name": name})
    return torch.optim.SGD(layers, lr=0.1, momentum=0.9)


def test_groups_keep_their_own_rate_and_decay() -> None:
    bare, tracked = conv_net(), conv_net()
    bare_optimizer, optimizer = grouped(bare), grouped(tracked)
    ast_plugin.wrap(optimizer, tracked, sparsities=(0.0,), total_steps=20, correction="off")
    train(bare, bare_optimizer, range(20))
    train(tracked, optimizer, range(20))
    assert_same(snapshot(bare), snapshot(tracked))


def test_a_rate_of_zero_for_one_group_stops_that_group_alone() -> None:
    model = conv_net()
    optimizer = grouped(model)
    optimizer.param_groups[3]["lr"] = 0.0
    ast_plugin.wrap(optimizer, model, **SETTINGS)
    before = snapshot(model)
    train(model, optimizer, range(4))
    name = optimizer.param_groups[3]["name"]
    assert name == "conv1.weight"
    assert torch.equal(before[name], model.get_parameter(name))
    assert not torch.equal(before["conv2.weight"], model.conv2.weight)


def closures(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[Any]:
    for step in steps:
        inputs, labels = image_batch(step)
        model.train()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)  # noqa: B023  # called in this round
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        yield closure


@pytest.mark.parametrize("inactive", ["coast", "freeze"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_that_does_everything_trains_as_the_plain_loop_does(inactive: str, by_keyword: bool) -> None:
    # Lightning's automatic optimization calls optimizer.step(closure=...) and does all the rest inside.
    runs: list[Run] = []
    for _ in range(2):
        model = conv_net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        runs.append((model, optimizer, ast_plugin.wrap(optimizer, model, **SETTINGS, inactive=inactive)))
    (plain, plain_optimizer, plain_ast), (model, optimizer, ast) = runs
    for closure in closures(plain, plain_optimizer, range(20)):
        closure()
        plain_optimizer.step()
    for closure in closures(model, optimizer, range(20)):
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert loss.requires_grad
    assert ast.step == plain_ast.step == 20
    assert_same(snapshot(plain), snapshot(model))
    assert_same(plain_optimizer.state_dict(), optimizer.state_dict())


def test_a_closure_that_raises_leaves_a_dense_model_and_the_step_uncounted() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ast = ast_plugin.wrap(optimizer, model, **SETTINGS, inactive="freeze")
    train(model, optimizer, range(4))
    before = snapshot(model)

    def closure() -> Tensor:
        model(image_batch(4)[0])
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(closure)
    assert ast.step == 4
    assert_same({n: p for n, p in before.items() if "running" not in n and "num_b" not in n}, dict(parameters(model)))
    train_step(model, optimizer, image_batch(4))
    assert ast.step == 5


def parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())


def test_lbfgs_with_a_line_search_trains_every_sub_net_and_keeps_the_model_dense() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=4, line_search_fn="strong_wolfe")
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.3, 0.5), total_steps=30, inactive="freeze")
    inputs, labels = vector_batch(0, size=64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(12)]
    assert ast.step == 12
    assert all(bool(model.get_parameter(name).all()) for name in ast.masks.parameters)
    assert min(losses[-2:]) < 0.7 * losses[0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than Muon")
def test_muon_for_matrices_beside_a_second_optimizer_for_the_rest() -> None:
    def run(order: tuple[int, int]) -> dict[str, Tensor]:
        model = mlp()
        matrices = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
        vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=0.01)
        ast = ast_plugin.wrap(matrices, model, sparsities=(0.3, 0.6), total_steps=30, inactive="freeze")
        for step in range(8):
            inputs, labels = vector_batch(step)
            model.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            for index in order:
                (matrices, vectors)[index].step()
        assert ast.step == 8
        return snapshot(model)

    assert_same(run((0, 1)), run((1, 0)))
