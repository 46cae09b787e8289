"""The smaller weights that stand in for the model's own, and how their gradients come home.

One set is made each time a sub-net is put on. A graph that was recorded with it may be gone through at any later
moment, also when the sub-net was taken off: the smaller weights have memory of their own. What a graph of ordinary
weights would refuse, because they were written to since, is refused here too: `Small.expire` raises the version numbers
of the smaller weights, which autograd looks at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ActivationError
from ast_plugin.sliced_kernels import gather, spread, spread_differentiably, take
from ast_plugin.sliced_plans import Cut

Delivered = Callable[[str, Tensor | None, Tensor], None]


class Small:
    """The smaller parameters of one sub-net at one moment.

    Args:
        sub_net: The sub-net's name.
        revision: Of its masks.
        cuts: What is left of which parameters.
        gathered: Whether all are made by autograd from the parameters; otherwise those that nothing watches are leaves.

    Attributes:
        tensors: One for each cut.
    """

    def __init__(self, sub_net: str, revision: int, cuts: Sequence[Cut], *, gathered: bool) -> None:
        self.sub_net = sub_net
        self.revision = revision
        self._cuts = cuts
        self._wholes = [cut.place.tensor for cut in cuts]
        self._versions = [whole._version for whole in self._wholes]
        self._trained = [whole.requires_grad for whole in self._wholes]
        self._leaves: list[int] = []
        self._hooked = False
        self.tensors: list[Tensor] = []
        with torch.enable_grad():
            for cut, whole in zip(cuts, self._wholes, strict=True):
                if whole.requires_grad and (gathered or _is_watched(whole)):
                    self.tensors.append(gather(whole, cut.dims))
                    continue
                if whole.requires_grad:
                    self._leaves.append(len(self.tensors))
                self.tensors.append(take(whole, cut.dims).requires_grad_(whole.requires_grad))

    def is_current(self) -> bool:
        """Return whether the model's parameters are the same, untouched since."""
        return all(
            cut.place.tensor is whole and whole._version == version and whole.requires_grad == trained
            for cut, whole, version, trained in zip(
                self._cuts, self._wholes, self._versions, self._trained, strict=True
            )
        )

    def check(self) -> None:
        """Have graphs refused whose weights were written to since: those alone."""
        written = [
            small
            for small, whole, version in zip(self.tensors, self._wholes, self._versions, strict=True)
            if whole._version != version
        ]
        _raise_versions(written)

    def expire(self) -> None:
        """Have graphs refused that were recorded with this set: weights were written to, or masks have changed."""
        _raise_versions(self.tensors)

    def deliver(self, delivered: Delivered) -> None:
        """Add the gradients that have arrived to those of the parameters, and clear them here.

        Args:
            delivered: Called with name, earlier gradient and gradient of each.
        """
        for i in self._leaves:
            small = self.tensors[i]
            if small.grad is not None:
                _deliver(self._cuts[i], self._wholes[i], small, delivered)

    def deliver_at_once(self, delivered: Delivered) -> None:
        """Deliver every gradient when it is accumulated: nothing will tell when backward has ended."""
        if self._hooked:
            return
        self._hooked = True
        for i in self._leaves:
            self.tensors[i].register_post_accumulate_grad_hook(_Delivery(self._cuts[i], self._wholes[i], delivered))

    def is_passed_by(self) -> bool:
        """Return whether the backward that is running ends at tensors that were named to it, and not here.

        That is ``backward(inputs=...)`` and ``torch.autograd.grad``, which cannot know the leaves. To be called from a
        hook of that backward.
        """
        edges = [torch.autograd.graph.get_gradient_edge(self.tensors[i]) for i in self._leaves[:1]]
        return any(not torch._C._will_engine_execute_node(edge.node) for edge in edges)

    def check_arrived(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step of an optimizer whose gradients passed the leaves by.

        Raises:
            ActivationError: If other parameters have gradients, and none of those behind the leaves.
        """
        wholes = (self._wholes[i] for i in self._leaves)
        if any(whole.grad is not None and bool(whole.grad.any()) for whole in wholes):
            return
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise ActivationError(
                "gradients were asked for by parameter, with backward(inputs=...) or torch.autograd.grad, which does "
                'not reach the smaller weights that stood in for those of channel groups; pass slicing="gather" to '
                "wrap(), or call backward() without inputs"
            )

    def __del__(self) -> None:
        # A gradient that arrived now would be lost without a word: nothing looks at these leaves any more.
        if not self._hooked and not sys.is_finalizing():
            _raise_versions([self.tensors[i] for i in self._leaves])


class _Delivery:
    def __init__(self, cut: Cut, whole: Tensor, delivered: Delivered) -> None:
        self._cut, self._whole, self._delivered = cut, whole, delivered

    def __call__(self, small: Tensor) -> None:
        _deliver(self._cut, self._whole, small, self._delivered)


def _deliver(cut: Cut, whole: Tensor, small: Tensor, delivered: Delivered) -> None:
    gradient, small.grad = small.grad, None
    earlier = whole.grad
    if gradient is not None and gradient.requires_grad:  # create_graph
        full = spread_differentiably(gradient, cut.dims, whole)
        whole.grad = full if earlier is None else earlier + full
    elif gradient is not None:
        with torch.inference_mode(False), torch.no_grad():
            into = earlier if earlier is not None and earlier.dtype == gradient.dtype else None
            full = spread(gradient, cut.dims, whole, into)
            whole.grad = full if earlier is None or into is not None else earlier + full
    if whole.grad is not None:
        delivered(cut.name, earlier, whole.grad)


def _is_watched(whole: Tensor) -> bool:
    """Return whether somebody waits for the gradient of a parameter with a hook, which a leaf would pass by."""
    hooks: Any = (whole._backward_hooks, getattr(whole, "_post_accumulate_grad_hooks", None))
    return any(hooks)


def _raise_versions(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
