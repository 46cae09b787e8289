"""Smaller weights stand in for the model's own: what others see meanwhile, where gradients go, what is made anew."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from channel_networks import groups_of, sliced_run, tokens
from networks import conv_net, image_batch, mlp, sgd, vector_batch
from setup_runs import plain_step
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.sliced_tensors import Small

ROUTES = pytest.mark.parametrize("slicing", ["leaves", "gather"])


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    inputs, labels = vector_batch(step)
    return functional.cross_entropy(model(inputs), labels)


@ROUTES
def test_loops_over_parameters_see_whole_weights_while_smaller_ones_stand_in(slicing: str) -> None:
    model = mlp()
    parameters = dict(model.named_parameters())
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, slicing, method="static", sparsities=(0.5,))
    loss = loss_of(model)
    assert model[2].weight.shape == (8, 8)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.zero_grad()  # between forward and backward, as some loops do
    loss.backward()
    assert model[2].weight is parameters["2.weight"]
    assert "weight" not in model[2].__dict__
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        if name in ast.masks.parameters:
            assert not parameter.grad[~ast.masks.get("s50", name)].any()
            assert parameter.grad[ast.masks.get("s50", name)].any()


def test_gradients_are_those_of_a_network_built_with_fewer_units() -> None:
    model = mlp()
    ast = sliced_run(model, sgd(model), "leaves", method="static", sparsities=(0.5,))
    kept = ast.kept_channels("s50")
    a, b = kept["a"], kept["b"]
    small = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for name, value in (
            ("0.weight", model[0].weight[a]),
            ("0.bias", model[0].bias[a]),
            ("2.weight", model[2].weight[b][:, a]),
            ("2.bias", model[2].bias[b]),
            ("4.weight", model[4].weight[:, b]),
            ("4.bias", model[4].bias),
        ):
            small.get_parameter(name).copy_(value)
    ours, theirs = loss_of(model), loss_of(small)
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert torch.equal(model[2].weight.grad[b][:, a], small[2].weight.grad)
    assert torch.equal(model[0].bias.grad[a], small[0].bias.grad)
    assert not model[0].bias.grad[~a].any()


@ROUTES
def test_gradients_add_up_over_micro_batches_in_the_same_tensor(slicing: str) -> None:
    model = mlp()
    sliced_run(model, sgd(model), slicing, method="static", sparsities=(0.5,))
    loss_of(model, 0).backward()
    first, weight = model[2].weight.grad.clone(), model[2].weight.grad
    loss_of(model, 1).backward()
    assert model[2].weight.grad is weight
    both = weight.clone()
    model.zero_grad()
    loss_of(model, 1).backward()
    torch.testing.assert_close(both, first + model[2].weight.grad)


def test_gradients_put_together_from_smaller_ones_are_not_masked_again_and_others_are() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static", sparsities=(0.5,), inactive="freeze")
    made: list[str] = []
    packed = ast._parts.gradients._packed
    kept = packed.kept
    packed.kept = lambda *args: made.append(args[0]) or kept(*args)
    for number in range(3):
        plain_step(model, optimizer, number)
    assert made == []
    loss_of(model).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad.add_(1.0)  # noise, for example
    optimizer.step()
    assert made
    for name in ast.masks.parameters:
        mask = ast.masks.get("s50", name)
        assert torch.equal(model.get_parameter(name)[~mask], before[name][~mask])
        assert not torch.equal(model.get_parameter(name)[mask], before[name][mask])


def test_a_penalty_on_the_weights_themselves_is_masked() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static", sparsities=(0.5,))
    parameters = dict(model.named_parameters())
    (loss_of(model) + sum(p.square().sum() for p in parameters.values())).backward()
    for name in ast.masks.parameters:
        assert not parameters[name].grad[~ast.masks.get("s50", name)].any(), name


def test_a_model_whose_output_hides_its_tensors_gets_its_gradients_all_the_same() -> None:
    class Opaque:
        __slots__ = ("loss",)

        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Model(nn.Sequential):
        def forward(self, inputs: Tensor) -> Any:
            return Opaque(super().forward(inputs).square().mean())

    found = []
    for slicing in ("off", "leaves", "gather"):
        model = Model(*mlp())
        optimizer = sgd(model)
        sliced_run(model, optimizer, slicing, method="static", sparsities=(0.5,))
        for number in range(3):
            optimizer.zero_grad()
            model(vector_batch(number)[0]).loss.backward()
            assert model.get_submodule("2")._parameters["weight"].grad is not None
            optimizer.step()
        found.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # that it keeps graphs alive
@ROUTES
def test_a_gradient_of_gradients_goes_through_backward_with_create_graph(slicing: str) -> None:
    found = []
    for how in ("off", slicing):
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        optimizer = sgd(model)
        ast = sliced_run(model, optimizer, how, method="static", sparsities=(0.5,))
        parameters = dict(model.named_parameters())
        loss_of(model).backward(create_graph=True)
        mask = ast.masks.get("s50", "2.weight")
        penalty = (parameters["2.weight"].grad * mask).square().sum()
        parameters["2.weight"].grad = None
        penalty.backward()
        optimizer.step()
        found.append([parameter.detach().clone() for parameter in parameters.values()])
        for parameter in parameters.values():
            parameter.grad = None
    torch.testing.assert_close(found[1], found[0])


def test_masks_that_are_no_whole_units_are_computed_with_as_masks() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static", sparsities=(0.5,))
    mask = ast.masks.get("s50", "2.weight").clone()
    row, column = mask.nonzero()[0].tolist()
    mask[row, column] = False  # as a plugin or a file may have it
    ast.masks.set("s50", "2.weight", mask)
    alone = mlp()
    alone.load_state_dict(ast.materialize("s50"))
    with ast.sub_net("s50"):
        assert model[2].weight.shape == (16, 16)
        torch.testing.assert_close(model(vector_batch(0)[0]), alone(vector_batch(0)[0]))
    plain_step(model, optimizer, 0)
    assert ast.step == 1


def test_what_is_left_is_worked_out_once_for_each_change_of_masks() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", sparsities=(0.25, 0.5), method="gmp", update_interval=20)
    plans = ast._parts.activation._inner._plans
    made: list[str] = []
    make = plans._make
    plans._make = lambda name: made.append(name) or make(name)
    for number in range(12):
        plain_step(model, optimizer, number)
    assert made.count("s25") <= 2
    assert made.count("s50") <= 2


def test_a_sub_net_that_keeps_everything_has_nothing_smaller() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", sparsities=(0.0, 0.5), method="static")
    with ast.sub_net("s0"):
        assert model[2].weight.shape == (16, 16)
    for number in range(4):
        plain_step(model, optimizer, number)
    assert ast.step == 4


def test_smaller_weights_are_freed_with_their_graphs() -> None:
    model = mlp()
    optimizer = sgd(model)
    sliced_run(model, optimizer, "leaves", method="static", sparsities=(0.5,))
    made: list[weakref.ref[Small]] = []
    issued = weakref.WeakSet.add

    def add(self: Any, item: Any) -> None:
        if isinstance(item, Small):
            made.append(weakref.ref(item))
        issued(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weakref.WeakSet, "add", add)
        for number in range(5):
            plain_step(model, optimizer, number)
    gc.collect()
    assert len(made) == 5
    assert sum(ref() is not None for ref in made) <= 1


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    model = mlp()
    optimizer = sgd(model)
    sliced_run(model, optimizer, "leaves", method="static", sparsities=(0.5,))
    inside: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda _, __, output: inside.append(output))
    model(vector_batch(0)[0])  # the output is dropped, and with it all that tells of backward
    handle.remove()
    plain_step(model, optimizer, 0)
    plain_step(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside[0].sum().backward()


def test_interrupts_between_any_two_of_its_own_steps_leave_the_model_whole() -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    inner = ast._parts.activation._inner
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for broken in ("_cover", "_stand_in"):
        original = getattr(inner, broken)

        def fail(*args: Any, original: Any = original) -> None:
            original(*args)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inner, broken, fail)
            with pytest.raises(KeyboardInterrupt), ast.sub_net("s50"):
                pass
        assert inner.worn is None
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert not any("weight" in module.__dict__ for module in model.modules())


def test_running_statistics_go_to_the_sub_net_that_was_on() -> None:
    model = conv_net()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static")
    before = {name: ast.private_state(name) for name in ast.sub_nets}
    name = ast.active
    images, labels = image_batch(0)
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    kept = ast.kept_channels(name)["conv1"]
    for other in ast.sub_nets:
        moved = ast.private_state(other)["norm1.running_mean"] != before[other]["norm1.running_mean"]
        assert torch.equal(moved, kept if other == name else torch.zeros_like(kept))


def test_recalibration_estimates_the_statistics_of_what_is_kept() -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "auto", method="static")
    loader = [image_batch(step) for step in range(4)]
    ast.recalibrate(loader)
    for name in ast.sub_nets:
        alone = conv_net()
        alone.load_state_dict(ast.materialize(name))
        found = ast.private_state(name)["norm1.running_mean"]
        torch.optim.swa_utils.update_bn([images for images, _ in loader], alone)
        kept = ast.kept_channels(name)["conv1"]
        torch.testing.assert_close(found[kept], alone.norm1.running_mean[kept])


def test_groups_of_the_helper_cover_the_networks() -> None:
    for net in (conv_net(), mlp(), tokens()):
        ast = ast_plugin.wrap(sgd(net), net, sparsities=(0.5,), pattern="channel", groups=groups_of(net), total_steps=3)
        assert ast.groups is not None
