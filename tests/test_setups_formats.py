"""What models are made of: channels_last, tied weights, frozen parameters, parametrizations, other dtypes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import ConvNet, conv_net, mlp, sgd, snapshot, train, vector_batch, wrapped
from reference_run import Loss, ReferenceRun, assert_runs_agree
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for, plain_step, whole_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import ast_plugin


def channels_last_net() -> nn.Module:
    return conv_net().to(memory_format=torch.channels_last)


def channels_last_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels).backward()
    optimizer.step()


def channels_last_loss(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)
    inputs = inputs.to(memory_format=torch.channels_last)
    return [lambda network: functional.cross_entropy(network(inputs), labels)]


def test_channels_last_is_bit_identical_to_plain_channels_last() -> None:
    assert_as_plain(channels_last_step, net=channels_last_net)


@pytest.mark.parametrize("inactive", ["coast", "freeze"])
def test_channels_last_with_sub_nets_is_the_run_written_by_hand(inactive: str) -> None:
    ast = assert_as_reference(channels_last_step, net=channels_last_net, losses=channels_last_loss, inactive=inactive)
    assert ast.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_is_the_run_in_the_ordinary_layout() -> None:
    # Other kernels, hence a tolerance. Masks are equal bit for bit.
    assert_as_reference(
        channels_last_step, net=channels_last_net, reference_net=conv_net, method="static", rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("where", ["channels_last", "double and back", "cpu"])
def test_a_model_moved_during_the_run_goes_on(where: str) -> None:
    model = conv_net()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(12):
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
        if step == 4 and where == "channels_last":
            model.to(memory_format=torch.channels_last)
            reference.model.to(memory_format=torch.channels_last)
        elif step == 4 and where == "double and back":
            model.double().float()
        elif step == 4:
            model.to("cpu")
    assert_runs_agree(ast, reference, **({"rtol": 1e-4, "atol": 1e-6} if where == "channels_last" else {}))


class TiedNet(nn.Module):
    """Two layers that share one weight, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.inlet(x))
        x = functional.relu(self.two(functional.relu(self.one(x))))
        return self.head(functional.relu(self.two(x)))


def tied_net() -> TiedNet:
    torch.manual_seed(0)
    return TiedNet()


def test_tied_weights_are_bit_identical_to_plain_tied_weights() -> None:
    assert_as_plain(plain_step, net=tied_net)


def test_tied_weights_have_one_mask_and_train_as_the_run_written_by_hand() -> None:
    ast = assert_as_reference(plain_step, net=tied_net)
    assert set(ast.masks.parameters) == {"inlet.weight", "one.weight", "head.weight"}
    assert ast.model.two.weight is ast.model.one.weight
    with ast.sub_net("s90"):
        assert int(ast.model.two.weight.count_nonzero()) <= ast.masks.kept("s90", "one.weight")


def frozen_net() -> ConvNet:
    net = conv_net()
    net.conv1.requires_grad_(False)
    net.norm1.requires_grad_(False)
    return net


def test_frozen_parameters_are_bit_identical_to_plain_frozen_parameters() -> None:
    assert_as_plain(plain_step, net=frozen_net)


def test_frozen_parameters_are_never_masked_nor_moved() -> None:
    start = frozen_net()
    ast = assert_as_reference(plain_step, net=frozen_net, steps=45)
    assert "conv1.weight" not in ast.masks.parameters
    assert torch.equal(ast.model.conv1.weight, start.conv1.weight)
    seen = []
    handle = ast.model.conv1.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    plain_step(ast.model, ast.optimizer, 20)
    handle.remove()
    assert torch.equal(seen[0], start.conv1.weight)


def test_a_layer_frozen_during_the_run_keeps_its_weights_and_its_masks() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(4))
    model.conv2.requires_grad_(False)
    before = model.conv2.weight.detach().clone()
    seen: list[int] = []
    handle = model.conv2.register_forward_hook(lambda module, *_: seen.append(int(module.weight.count_nonzero())))
    names = []
    for step in range(4, 7):
        names.append(ast.active)
        plain_step(model, optimizer, step)
    handle.remove()
    assert torch.equal(model.conv2.weight, before)
    assert seen == [ast.masks.kept(name, "conv2.weight") for name in names]
    model.conv2.requires_grad_(True)
    train(model, optimizer, range(7, 10))
    assert ast.step == 10
    assert not torch.equal(model.conv2.weight, before)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


@pytest.mark.parametrize("kind", sorted(PARAMETRIZED))
def test_a_layer_whose_weight_is_computed_is_trained_densely_beside_the_sub_nets(kind: str) -> None:
    model = mlp()
    PARAMETRIZED[kind](model[2])
    _, optimizer, ast = wrapped(model, **BUSY)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(9):
        plain_step(model, optimizer, step)
    assert set(ast.masks.parameters) == {"0.weight", "4.weight"}
    assert not any(row.prunable for row in ast.describe().rows if row.parameter.startswith("2."))
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    if kind != "spectral_norm":  # whose power iteration writes to buffers, so that two forwards differ
        inputs = vector_batch(0)[0]
        with ast.sub_net("s90"), torch.no_grad():
            output = model.eval()(inputs)
        alone = copy.deepcopy(model)
        alone.load_state_dict(ast.materialize("s90"))
        assert torch.equal(output, alone(inputs))


@pytest.mark.parametrize("kind", sorted(PARAMETRIZED))
def test_a_parametrization_registered_after_wrapping_is_refused_by_name(kind: str) -> None:
    model, optimizer, _ = wrapped(mlp(), **BUSY)
    PARAMETRIZED[kind](model[2])
    before = snapshot(model)
    with pytest.raises(ast_plugin.ActivationError, match=r"'2.weight' is gone.*before wrap\(\)"):
        train(model, optimizer, range(1), vector_batch)
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]), name


def test_a_model_without_biases_or_with_double_weights_is_the_run_written_by_hand() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)).double()

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = vector_batch(number)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs.double()), labels).backward()
        optimizer.step()

    def losses(_: nn.Module, number: int) -> list[Loss]:
        inputs, labels = vector_batch(number)
        return [lambda network: functional.cross_entropy(network(inputs.double()), labels)]

    assert_as_reference(step, net=build, losses=losses)
