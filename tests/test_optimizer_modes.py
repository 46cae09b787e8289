"""Schedule-free optimizers: ``train()`` and ``eval()`` hold for every sub-net, at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optimizer_checks as checks
import pytest
import schedulefree
import torch
from networks import assert_same, image_batch, snapshot
from optimizer_cases import Case, schedule_free_cases, tiny_net
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin

pytestmark = pytest.mark.extra("schedulefree")

WORKING = [case for case in schedule_free_cases() if not case.name.endswith("Closure")]
EVALUATED_FIRST = [case for case in schedule_free_cases() if case.name.endswith("Closure")]
KINDS = {
    "adamw": lambda model: schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02, weight_decay=0.01),
    "sgd": lambda model: schedulefree.SGDScheduleFree(model.parameters(), lr=0.2, momentum=0.8),
    "radam": lambda model: schedulefree.RAdamScheduleFree(model.parameters(), lr=0.02),
}
Run = tuple[nn.Module, Any, ast_plugin.AlternatingSparseTraining]


def run(kind: str = "adamw", steps: int = 10, seed: int = 0, **options: Any) -> Run:
    model = tiny_net(seed)
    optimizer = KINDS[kind](model)
    settings = {"sparsities": (0.3, 0.6, 0.8), "total_steps": 30, "update_interval": 3, **options}
    ast = ast_plugin.wrap(optimizer, model, **settings)
    optimizer.train()
    checks.train(model, optimizer, range(steps), image_batch)
    return model, optimizer, ast


def everything(ast: ast_plugin.AlternatingSparseTraining) -> dict[str, dict[str, Tensor]]:
    return {name: ast.materialize(name) for name in ast.sub_nets}


def weights(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for sub_net in ast.sub_nets:
        own = ast.private_state(sub_net)
        found |= {f"{sub_net} {name}": own[name] for name in own if name in found}
    return found


@pytest.mark.parametrize("case", WORKING, ids=lambda case: case.name)
@pytest.mark.parametrize("check", sorted(checks.CHECKS))
def test_optimizer_of_schedulefree(case: Case, check: str) -> None:
    checks.CHECKS[check](case)


@pytest.mark.parametrize("case", EVALUATED_FIRST, ids=lambda case: case.name)
def test_closure_variants_keep_to_one_sub_net_or_shared_state(case: Case) -> None:
    checks.check_one_dense_sub_net(case)
    assert "moved weights before it called the closure" in str(checks.refusal(case))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_sub_net_is_switched_as_the_default_one_is(kind: str) -> None:
    # The default's BatchNorm is in the model when eval() is called; which one that is must make no difference.
    runs = [run(kind, default_sub_net=name) for name in ("s30", "s60", "s80")]
    training = [everything(ast) for _, _, ast in runs]
    for _, optimizer, _ in runs:
        optimizer.eval()
    evaluating = [everything(ast) for _, _, ast in runs]
    for other in (1, 2):
        assert_same(training[0], training[other])
        assert_same(evaluating[0], evaluating[other])
    for name in ("s30", "s60", "s80"):
        for key in ("norm0.weight", "norm1.bias", "conv.weight"):
            assert not torch.equal(training[0][name][key], evaluating[0][name][key]), (name, key)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_switching_there_and_back_changes_nothing_but_the_last_digit(kind: str) -> None:
    _, optimizer, ast = run(kind)
    before = everything(ast)
    optimizer.eval()
    optimizer.eval()
    optimizer.train()
    after = everything(ast)
    for name in ast.sub_nets:
        for key, value in before[name].items():
            torch.testing.assert_close(after[name][key], value, rtol=1e-4, atol=1e-6)


def test_switching_inside_a_block_is_the_same_as_before_it() -> None:
    (model, optimizer, ast), (other, other_optimizer, other_ast) = run(), run()
    images = image_batch(0)[0]
    with ast.sub_net("s80"), torch.no_grad():
        model.eval()
        optimizer.eval()
        inside = model(images)
        zeros = int((model.get_parameter("conv.weight") == 0).sum())
    other_optimizer.eval()
    other.eval()
    with other_ast.sub_net("s80"), torch.no_grad():
        expected = other(images)
    assert torch.equal(inside, expected)
    assert zeros == ast.masks.total("conv.weight") - ast.masks.kept("s80", "conv.weight")
    assert_same(snapshot(other), snapshot(model))
    assert_same(everything(other_ast), everything(ast))


def test_switching_between_forward_and_backward_is_refused_by_autograd_and_leaves_both_sequences_intact() -> None:
    (model, optimizer, ast), (other, other_optimizer, other_ast) = run(), run()
    images, labels = image_batch(10)
    for net in (model, other):
        loss = functional.cross_entropy(net(images), labels)
        if net is model:
            optimizer.eval()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            other_optimizer.eval()
    assert ast.step == other_ast.step == 10
    assert_same(snapshot(other), snapshot(model))
    assert_same(everything(other_ast), everything(ast))


def test_a_step_in_evaluation_mode_is_refused_and_the_run_goes_on_after_train() -> None:
    model, optimizer, ast = run()
    optimizer.eval()
    before = weights(model, ast)
    with pytest.raises(Exception, match="not in train mode"):
        checks.train(model, optimizer, range(10, 11), image_batch)
    assert ast.step == 10
    optimizer.train()
    optimizer.eval()
    for key, value in weights(model, ast).items():
        torch.testing.assert_close(value, before[key], rtol=1e-4, atol=1e-6)
    optimizer.train()
    checks.train(model, optimizer, range(11, 13), image_batch)
    assert ast.step == 12


def test_a_state_saved_in_evaluation_mode_resumes_bit_identically() -> None:
    straight, straight_optimizer, straight_ast = run()
    straight_optimizer.eval()  # as the package's documentation asks for before saving
    checkpoint = checks.through_file({"model": straight.state_dict(), "optimizer": straight_optimizer.state_dict()})
    straight_optimizer.train()
    checks.train(straight, straight_optimizer, range(10, 20), image_batch)

    second, second_optimizer, second_ast = run(seed=5, steps=0)
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    second_optimizer.train()
    checks.train(second, second_optimizer, range(10, 20), image_batch)
    assert_same(snapshot(straight), snapshot(second))
    assert_same(straight_optimizer.state_dict(), second_optimizer.state_dict())
    assert_same(everything(straight_ast), everything(second_ast))


@pytest.mark.filterwarnings("ignore:sub-net .* is saved with sparsity")
def test_the_elastic_file_holds_the_weights_of_the_mode_it_was_saved_in(tmp_path: Path) -> None:
    model, optimizer, ast = run()
    optimizer.eval()
    ast.save(tmp_path / "elastic.safetensors")
    elastic = ast_plugin.load(tmp_path / "elastic.safetensors", tiny_net(7))
    model.eval()
    images = image_batch(3)[0]
    for name in ast.sub_nets:
        elastic.switch(name)
        with ast.sub_net(name), torch.no_grad():
            assert torch.equal(elastic.model.eval()(images), model(images))


def test_calling_train_before_every_micro_batch_changes_nothing() -> None:
    # The Hugging Face Trainer does so.
    results = []
    for often in (False, True):
        model, optimizer, ast = run()
        for step in range(10, 16):
            optimizer.zero_grad()
            for part in range(2):
                if often:
                    optimizer.train()
                images, labels = image_batch(2 * step + part)
                functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        assert ast.step == 16
        results.append(everything(ast))
    assert_same(*results)


def test_detach_gives_the_optimizer_its_own_methods_back() -> None:
    model, optimizer, ast = run()
    assert "eval" in vars(optimizer)
    ast.detach()
    assert "eval" not in vars(optimizer)
    assert "train" not in vars(optimizer)
    optimizer.eval()
    optimizer.train()
    checks.train(model, optimizer, range(2), image_batch)


def test_the_wrapper_around_other_optimizers_is_refused() -> None:
    model = tiny_net()
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ast_plugin.WrapError, match=r"ScheduleFreeWrapper is no torch.optim.Optimizer; it steps a SGD"):
        ast_plugin.wrap(wrapper, model, sparsities=(0.5, 0.9), total_steps=60)
