"""Joint training worked out by hand: a copy of the network for each sub-net, and one optimizer over all of them.

Nothing here goes through the controller's step; the masks are those of a controller that is never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from networks import image_batch
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin

Batch = tuple[Tensor, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]


def double_batch(step: int) -> Batch:
    images, labels = image_batch(step)
    return images.double(), labels


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], *, clear: bool = True
) -> Callable[[], Tensor]:
    """Return an ordinary closure: it clears gradients and accumulates those of one or more batches."""

    def closure() -> Tensor:
        if clear:
            optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = cross_entropy(model, batch) / len(batches)
            loss.backward()
            total = total + loss.detach()
        return total

    return closure


def train_jointly(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    batch: Callable[[int], Batch] = image_batch,
) -> None:
    for step in steps:
        model.train()
        optimizer.step(closure_of(model, optimizer, [batch(step)]))


class Reference:
    """The shared weights, a network for every sub-net, and one optimizer over all that is trained.

    Attributes:
        masks: The masks.
        shared: The shared parameters by name.
        nets: The networks by sub-net, with private BatchNorm of their own.
        optimizer: Made from all of these parameters.
    """

    def __init__(self, model: nn.Module, make: Make, **options: Any) -> None:
        lender = copy.deepcopy(model)
        ast = ast_plugin.wrap(torch.optim.SGD(lender.parameters(), lr=0.1), lender, **options)
        self.masks, self._updater = ast.masks, ast._parts.updater
        names = sorted(ast.sub_nets, key=lambda name: self._updater.plans[name].target_sparsity)
        private = set(ast.private_state(names[0]))
        self.nets = {name: copy.deepcopy(model).train() for name in names}
        self.shared = {
            name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name not in private
        }
        own = [p for net in self.nets.values() for name, p in net.named_parameters() if name in private]
        self.optimizer = make(nn.ParameterList([*self.shared.values(), *own]))
        self._step = 0

    def train(self, batches: Sequence[Batch]) -> None:
        """Make one step on the sum of every sub-net's mean loss over the batches."""
        updated: set[str] = set()
        self.optimizer.step(lambda: self._go_back(batches, updated))
        self._step += 1

    def _go_back(self, batches: Sequence[Batch], updated: set[str]) -> Tensor:
        total = torch.zeros((), dtype=next(iter(self.shared.values())).dtype)
        for parameter in self.shared.values():
            parameter.grad = None
        for sub_net, net in self.nets.items():
            before = {name: self.masks.get(sub_net, name).clone() for name in self.masks.parameters}
            with torch.no_grad():
                for name, parameter in self.shared.items():
                    net.get_parameter(name).copy_(parameter * before[name] if name in before else parameter)
            net.zero_grad()
            for batch in batches:
                loss = cross_entropy(net, batch) / len(batches)
                loss.backward()
                total += loss.detach()
            dense = {name: net.get_parameter(name).grad for name in before}
            due = self._updater.is_due(sub_net, self._step, self._step - 1 if self._step else None)
            if due and sub_net not in updated:
                self._updater.update(sub_net, self._step, self.shared, dense)
                updated.add(sub_net)
            for name, parameter in self.shared.items():
                gradient = net.get_parameter(name).grad
                if name in before:  # weights that have just grown have had no gradient
                    gradient = gradient * before[name] * self.masks.get(sub_net, name)
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        return total

    def differences(self, model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> dict[str, float]:
        """Return by name how far a controller's weights, private state and masks are from these."""
        found = {
            name: (model.get_parameter(name).detach() - p.detach()).abs().max().item()
            for name, p in self.shared.items()
        }
        for sub_net in ast.sub_nets:
            expected = self.nets[sub_net].state_dict()
            for name, tensor in ast.private_state(sub_net).items():
                found[f"{sub_net}/{name}"] = (tensor - expected[name]).abs().max().item()
            for name in ast.masks.parameters:
                other = self.masks.get(sub_net, name)
                found[f"{sub_net}/mask of {name}"] = float((ast.masks.get(sub_net, name) ^ other).sum())
        return found
