"""Training loops that call the model in other ways: modes, several forwards and backwards, other outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import SETTINGS, ConvNet, adamw, conv_net, image_batch, mlp, sgd, snapshot, train, vector_batch, wrapped
from reference_run import Loss, ReferenceRun, assert_runs_agree
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for, plain_step
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import ast_plugin

pytestmark = pytest.mark.matrix

Setup = Callable[[Any, torch.optim.Optimizer, int], None]


def evaluate(model: nn.Module) -> None:
    """Run the default sub-net in eval mode, under no_grad and under inference_mode; the mode stays as it was."""
    training = model.training
    model.eval()
    inputs = batch_for(model, 500)[0]
    with torch.no_grad():
        model(inputs)
    with torch.inference_mode():
        model(inputs)
    model.train(training)


def first_in_eval_mode(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 0:
        evaluate(model)
    plain_step(model, optimizer, step)


def interleaved(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    evaluate(model)
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), labels)
    evaluate(model)
    loss.backward()
    evaluate(model)
    optimizer.step()


def second_batch(step: int, net: nn.Module) -> tuple[Tensor, Tensor]:
    return batch_for(net, step + 1000)


def two_losses(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)
    others, other_labels = second_batch(step, net)
    return [
        lambda network: (
            functional.cross_entropy(network(inputs), labels) + functional.cross_entropy(network(others), other_labels)
        )
    ]


def summed_losses(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    two_losses(model, step)[0](model).backward()
    optimizer.step()


def siamese_loss(net: nn.Module, step: int) -> list[Loss]:
    (inputs, labels), (others, other_labels) = batch_for(net, step), second_batch(step, net)

    def loss(network: Any) -> Tensor:
        distance = (network(inputs) - network(others)).square().sum(dim=1)
        same = (labels == other_labels).float()
        return (same * distance + (1 - same) * functional.relu(1 - distance)).mean()

    return [loss]


def siamese(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    siamese_loss(model, step)[0](model).backward()
    optimizer.step()


def separate_losses(net: nn.Module, step: int) -> list[Loss]:
    (inputs, labels), (others, other_labels) = batch_for(net, step), second_batch(step, net)
    return [
        lambda network: functional.cross_entropy(network(inputs), labels),
        lambda network: functional.cross_entropy(network(others), other_labels),
    ]


def a_backward_each(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    losses = [loss(model) for loss in separate_losses(model, step)]
    for loss in losses:
        loss.backward()
    optimizer.step()


def a_backward_each_evaluating(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    losses = [loss(model) for loss in separate_losses(model, step)]
    evaluate(model)
    for loss in losses:
        loss.backward()
        evaluate(model)
    optimizer.step()


def same_loss_twice(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)
    return [lambda network: functional.cross_entropy(network(inputs), labels)] * 2


def retained_graph(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), labels)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def penalty_loss(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)

    def loss(network: Any) -> Tensor:
        leaf = inputs.clone().requires_grad_()
        output = network(leaf)
        (gradient,) = torch.autograd.grad(output.logsumexp(dim=1).sum(), leaf, create_graph=True)
        return functional.cross_entropy(output, labels) + 10 * gradient.square().mean()

    return [loss]


def gradient_penalty(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    penalty_loss(model, step)[0](model).backward()
    optimizer.step()


PLAIN: dict[str, Setup] = {
    "first forward in eval mode": first_in_eval_mode,
    "train and eval interleaved": interleaved,
    "summed losses": summed_losses,
    "siamese": siamese,
    "a backward each": a_backward_each,
    "a backward each, evaluating": a_backward_each_evaluating,
    "retain_graph": retained_graph,
    "gradient penalty": gradient_penalty,
}
LOSSES: dict[str, Any] = {
    "summed losses": two_losses,
    "siamese": siamese_loss,
    "a backward each": separate_losses,
    "a backward each, evaluating": separate_losses,
    "gradient penalty": penalty_loss,
}


@pytest.mark.parametrize("setup", sorted(PLAIN))
def test_calling_the_model_otherwise_is_bit_identical_to_doing_so_plainly(setup: str) -> None:
    assert_as_plain(PLAIN[setup], net=mlp if setup == "gradient penalty" else conv_net)


@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize("setup", sorted(set(PLAIN) - {"retain_graph"}))
def test_calling_the_model_otherwise_with_sub_nets_is_the_run_written_by_hand(setup: str, build: Any) -> None:
    losses = {"losses": LOSSES[setup]} if setup in LOSSES else {}
    assert_as_reference(PLAIN[setup], build=build, steps=18, **losses)


def test_two_backwards_through_one_graph_are_two_gradients() -> None:
    # Without BatchNorm, because the reference calls the network twice.
    assert_as_reference(retained_graph, net=mlp, losses=same_loss_twice)


def test_gradients_taken_task_by_task_from_one_graph_are_those_of_the_sub_net() -> None:
    # As gradient surgery does: torch.autograd.grad with retain_graph, then gradients assigned.
    model, optimizer, ast = wrapped(mlp(), method="static")
    inputs, _ = vector_batch(0)
    for _ in range(4):
        name = ast.active
        alone = mlp()
        alone.load_state_dict(ast.materialize(name))
        found = []
        for network in (model, alone):
            output = network(inputs)
            parameters = list(network.parameters())
            tasks = [output[:, 0].square().mean(), output[:, 1].square().mean(), output.sum()]
            found.append([torch.autograd.grad(task, parameters, retain_graph=True) for task in tasks])
        for ours, theirs in zip(*found, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)
        for parameter, *gradients in zip(model.parameters(), *found[0], strict=True):
            parameter.grad = sum(gradients)
        optimizer.step()
    assert ast.step == 4


def test_a_graph_from_before_a_step_or_a_change_is_refused_as_without_sub_nets() -> None:
    model, optimizer, _ = wrapped(method="static")
    first, second = (loss(model) for loss in separate_losses(model, 0))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    changed = separate_losses(model, 1)[0](model)
    model.state_dict()  # takes the sub-net off
    with torch.no_grad():
        model.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.backward()
    while_on = separate_losses(model, 1)[0](model)
    with torch.no_grad():
        model.conv2.weight.mul_(2)
    evaluate(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        while_on.backward()


def test_a_graph_recorded_at_rest_is_good_after_another_was_gone_through_again() -> None:
    # A penalty on the dense weights, recorded between two backward passes through the network.
    model, optimizer, ast = wrapped(mlp(), method="static")
    first, second = (loss(model) for loss in separate_losses(model, 0))
    first.backward()
    evaluate(model)
    penalty = model[2].weight.square().sum()
    second.backward()
    model.zero_grad()
    penalty.backward()
    weight, name = model[2].weight, ast.active
    dense = 2 * weight.detach()
    assert torch.equal(weight.grad, dense)  # nothing tells of a backward that does not go through the model's output
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    optimizer.step()
    assert torch.equal(seen[0], dense * ast.masks.get(name, "2.weight"))


def test_a_graph_from_before_a_mask_update_is_never_gone_through_with_other_masks() -> None:
    model, optimizer, ast = wrapped(mlp(), **BUSY)
    train(model, optimizer, range(3), vector_batch)
    loss = functional.cross_entropy(model(vector_batch(3)[0]), vector_batch(3)[1])
    model.state_dict()
    name = ast.active
    mask = ast.masks.get(name, "2.weight")
    ast.masks.set(name, "2.weight", mask.roll(1, dims=0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adversarial_examples_made_in_eval_mode_are_those_of_the_default_sub_net() -> None:
    model, optimizer, ast = wrapped(**BUSY)
    train(model, optimizer, range(9))
    images, labels = image_batch(9)
    alone = conv_net()
    alone.load_state_dict(ast.materialize("s50"))
    found = []
    for network in (model, alone):
        leaf = images.clone().requires_grad_()
        loss = functional.cross_entropy(network.eval()(leaf), labels)
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*found)
    model.train()
    plain_step(model, optimizer, 9)
    assert ast.step == 10


def test_training_on_adversarial_examples_is_the_run_written_by_hand() -> None:
    # Made with gradients in train mode, of the sub-net that is about to be trained.
    def loss_for(net: nn.Module, step: int) -> list[Loss]:
        inputs, labels = vector_batch(step)

        def loss(network: Any) -> Tensor:
            leaf = inputs.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(network(leaf), labels), leaf)
            return functional.cross_entropy(network(inputs + 0.1 * gradient.sign()), labels)

        return [loss]

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        loss_for(model, number)[0](model).backward()
        optimizer.step()

    assert_as_reference(step, net=mlp, losses=loss_for)


@dataclasses.dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithLoss(ConvNet):
    """Computes its own loss and returns it in the form asked for."""

    form = "tuple"

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(images)
        if labels is None:
            return logits
        loss = functional.cross_entropy(logits, labels)
        forms = {
            "tuple": (loss, logits),
            "dict": {"loss": loss, "extra": {"logits": [logits]}},
            "dataclass": Output(loss=loss, logits=logits),
            "tensor": loss,
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass", "tensor"])
def test_a_loss_computed_inside_the_model_in_any_form_is_the_run_written_by_hand(form: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        net = WithLoss()
        net.form = form
        return net

    def loss_in(output: Any) -> Tensor:
        if form == "tensor":
            return output
        return output[0] if form == "tuple" else output["loss"] if form == "dict" else output.loss

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = image_batch(number)
        optimizer.zero_grad()
        loss_in(model(inputs, labels=labels)).backward()
        assert model.conv2.weight.count_nonzero() == model.conv2.weight.numel()  # dense as soon as backward has ended
        optimizer.step()

    assert_as_plain(step, net=build)
    assert_as_reference(step, net=build, reference_net=conv_net, method="static")


class Outer(nn.Module):
    """A head of its own on a backbone, which alone is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = conv_net()
        self.head = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(functional.relu(self.backbone(images)))


def outer() -> Outer:
    torch.manual_seed(1)
    return Outer()


def test_a_wrapped_part_of_the_model_is_trained_as_the_run_written_by_hand() -> None:
    model = outer()
    # By hand: everything is wrapped and the head left out.
    options = {**SETTINGS, "method": "granet", "initial_sparsity": 0.3}  # first masks by magnitude, not by name
    reference = ReferenceRun(model, sgd, exclude=["head.weight"], **options)
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model.backbone, **options)
    for step in range(15):
        inputs, labels = image_batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        reference.step([lambda network, i=inputs, t=labels: functional.cross_entropy(network(i), t)])
    assert ast.step == 15
    assert reference.conflicts > 0
    expected = snapshot(reference.model)
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_loop_that_calls_a_part_of_the_wrapped_model_only_is_refused() -> None:
    model = outer()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8, 0.9), **BUSY)
    inputs, labels = image_batch(0)
    functional.cross_entropy(model.backbone(inputs), labels).backward()
    with pytest.raises(ast_plugin.ActivationError, match="forward did not run in training mode"):
        optimizer.step()
    assert ast.step == 0


def test_functional_call_with_the_models_own_parameters_trains_as_calling_it() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        output = functional_call(model, dict(model.named_parameters()), (inputs,))
        functional.cross_entropy(output, labels).backward()
        optimizer.step()

    assert_as_plain(step)
    assert_as_reference(step)


def test_functional_call_with_other_weights_computes_with_them_as_they_are() -> None:
    model, optimizer, ast = wrapped(method="static")
    plain = conv_net()
    for training in (True, False):
        model.train(training), plain.train(training)
        before = snapshot(model)
        inputs, labels = image_batch(0)
        found = []
        for network in (model, plain):
            weights = {name: (2 * p.detach()).requires_grad_() for name, p in network.named_parameters()}
            buffers = {name: b.clone() for name, b in network.named_buffers()}
            given = {name: w.detach().clone() for name, w in weights.items()}
            loss = functional.cross_entropy(functional_call(network, {**weights, **buffers}, (inputs,)), labels)
            loss.backward()
            for name, weight in weights.items():
                assert torch.equal(weight, given[name]), name
            found.append({name: weight.grad for name, weight in weights.items()})
        for name, gradient in found[0].items():
            assert torch.equal(gradient, found[1][name]), name
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, before[name]), name
    train(model.train(), optimizer, range(3))
    assert ast.step == 3


def test_per_sample_gradients_of_a_functional_model_are_those_of_the_weights_handed_over() -> None:
    model, _, ast = wrapped(mlp(), method="static")
    inputs, labels = vector_batch(0)
    weights = ast.materialize("s80")
    alone = mlp()
    alone.load_state_dict(weights)

    def loss(weights: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (inputs[None],)), label[None])

    before = snapshot(model)
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, inputs, labels)
    functional.cross_entropy(alone(inputs), labels).backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(gradients[name].mean(dim=0), parameter.grad)
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]), name


def test_every_sub_net_is_evaluated_under_inference_mode_between_steps() -> None:
    model = conv_net()
    reference = ReferenceRun(model, adamw, **BUSY)
    _, optimizer, ast = wrapped(model, adamw(model), **BUSY)
    inputs = image_batch(40)[0]
    for step in range(12):
        plain_step(model, optimizer, step)
        images, labels = image_batch(step)
        reference.step([lambda network, i=images, t=labels: functional.cross_entropy(network(i), t)])
        model.eval()
        for name in ast.sub_nets:
            alone = conv_net()
            alone.load_state_dict(ast.materialize(name))
            with ast.sub_net(name), torch.inference_mode():
                assert torch.equal(model(inputs), alone.eval()(inputs)), name
        model.train()
    assert_runs_agree(ast, reference)
