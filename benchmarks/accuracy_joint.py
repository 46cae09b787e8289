"""Joint training, the baseline of `accuracy.py` that every sub-net sees every batch in: their gradients are added up.

N forward and backward passes a step (Yu et al. 2019, "Slimmable Neural Networks", algorithm 1, without its in-place
distillation). Masks follow the very schedule of the alternating run; BatchNorm is private to each sub-net.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ast_plugin
from accuracy_tasks import Batch, Task


class _Called(nn.Module):
    """The model with other tensors in place of its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = (model, tensors)
        self.training = model.training

    def forward(self, *arguments: Any) -> Any:
        return functional_call(*self._call, arguments)


class JointTraining:
    """Shared weights, one mask and one private BatchNorm state a sub-net, and one optimizer over all of them.

    Args:
        model: The initialized network; its own parameters are the shared ones.
        sparsities: One sub-net each.
        steps: Optimizer steps of the whole run.
        seed: Of the masks.
        options: Further settings of `ASTConfig`.

    Attributes:
        parameters: What the optimizer is to train.
        masks: The masks of every sub-net.
    """

    def __init__(
        self, model: nn.Module, *, sparsities: tuple[float, ...], steps: int, seed: int, options: dict[str, Any]
    ) -> None:
        self._model = model
        # A controller of a copy that is never trained lends its mask schedule.
        lender = copy.deepcopy(model)
        controller = ast_plugin.wrap(
            torch.optim.SGD(lender.parameters(), lr=0.1),
            lender,
            sparsities=sparsities,
            total_steps=steps,
            seed=seed,
            **options,
        )
        self._updater, self.masks = controller._parts.updater, controller.masks
        self.sub_nets = controller.sub_nets
        shared = dict(model.named_parameters())
        self._weights = {name: shared[name] for name in self.masks.parameters}
        buffers = dict(model.named_buffers())
        private = set(controller.private_state(self.sub_nets[0]))
        self._rest = {name: p for name, p in shared.items() if name not in self._weights and name not in private}
        self._private = {
            sub_net: {
                name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
                for name, tensor in {**shared, **buffers}.items()
                if name in private
            }
            for sub_net in self.sub_nets
        }
        own = [t for tensors in self._private.values() for t in tensors.values() if t.requires_grad]
        self.parameters = [*self._weights.values(), *self._rest.values(), *own]

    def backward(self, task: Task, batch: Batch, step: int) -> None:
        """Add up the sub-nets' gradients of a batch, after mask updates that are due at `step`."""
        total = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        for sub_net in self.sub_nets:
            masked = self._masked(sub_net)
            self._model.train()
            task.loss(_Called(self._model, self._tensors(sub_net, masked)), batch).backward()
            dense = {name: weight.grad for name, weight in masked.items() if weight.grad is not None}
            if self._updater.is_due(sub_net, step, step - 1 if step else None):
                self._updater.update(sub_net, step, self._weights, dense)
            for name, gradient in dense.items():
                total[name].add_(gradient * self.masks.get(sub_net, name))
        for name, weight in self._weights.items():
            weight.grad = total[name]

    def measure(self, task: Task) -> dict[str, dict[str, float]]:
        """Return the task's figures for every sub-net."""
        self._model.eval()
        with torch.no_grad():
            return {
                sub_net: task.measure(_Called(self._model, self._tensors(sub_net, self._masked(sub_net))))
                for sub_net in self.sub_nets
            }

    def _masked(self, sub_net: str) -> dict[str, Tensor]:
        return {
            name: (weight.detach() * self.masks.get(sub_net, name)).requires_grad_()
            for name, weight in self._weights.items()
        }

    def _tensors(self, sub_net: str, masked: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**masked, **self._rest, **self._private[sub_net]}
