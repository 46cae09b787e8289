"""Gradients of the active sub-net: masked as they arrive, kept dense for growth, corrected before the step.

Backward computes gradients with respect to the masked weights, which are dense. Masking them at accumulation makes
clipping, logged norms and overflow checks see the active sub-net's gradient only.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ast_plugin.correction import Correction
from ast_plugin.masking import zero_outside_
from ast_plugin.masks import MaskStore

CorrectGradients = Callable[..., Correction | None]


class GradientMasks:
    """Masks each prunable parameter's gradient as it is accumulated, and keeps dense ones aside on request.

    Args:
        parameters: The prunable parameters by name, resolved at every use.
        masks: The masks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masks: MaskStore) -> None:
        self._parameters = parameters
        self._masks = masks
        self._handles: dict[str, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self.sub_net: str | None = None
        self._captured: dict[str, _Captured] | None = None

    def attach(self) -> None:
        """Register the hooks, again on parameters that were replaced since."""
        for name, parameter in self._parameters.items():
            known = self._handles.get(name)
            if known is not None:
                if known[0]() is parameter:
                    continue
                known[1].remove()
            handle = parameter.register_post_accumulate_grad_hook(_accumulation_hook(weakref.ref(self), name))
            self._handles[name] = (weakref.ref(parameter), handle)

    def detach(self) -> None:
        """Remove the hooks."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def begin(self, sub_net: str, *, capture: bool) -> None:
        """Expect gradients of `sub_net`; called before every training forward.

        Args:
            sub_net: Whose mask applies.
            capture: Whether the dense gradient is kept aside, summed over the micro-batches of the step.
        """
        self.sub_net = sub_net
        if not capture:
            self._captured = None
        elif self._captured is None:
            self._captured = {}

    def end(self) -> None:
        """Forget the sub-net and the dense gradient: the step is over, or was never made."""
        self.sub_net = None
        self._captured = None

    def accumulated(self, name: str, parameter: Tensor) -> None:
        """Mask the gradient that was just accumulated into `parameter`, in place."""
        gradient = parameter.grad
        if self.sub_net is None or gradient is None:
            return
        mask = self._masks.get(self.sub_net, name)
        partial = self._masks.kept(self.sub_net, name) != mask.numel()
        with torch.no_grad():
            if self._captured is not None:
                self._captured[name] = _capture(gradient, mask, self._captured.get(name))
            if partial:
                zero_outside_(gradient, mask)
            if self._captured is not None:
                self._captured[name].version = gradient._version

    def dense(self) -> dict[str, Tensor]:
        """Return the dense gradients of this step by parameter name, summed over its micro-batches, unclipped."""
        return {name: captured.dense for name, captured in (self._captured or {}).items()}

    def mask_now(self, sub_net: str) -> None:
        """Mask all gradients with the present masks of `sub_net`, in place.

        The masks may have changed since accumulation, or something may have come without it: a gradient assigned to
        ``grad``, or noise added to it.
        """
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.grad is not None and self._masks.kept(sub_net, name) != parameter.numel():
                    zero_outside_(parameter.grad, self._masks.get(sub_net, name))


class GradientReference:
    """The previous sub-net's gradient, and the correction against it (Yang et al. 2022, section 3.3).

    Args:
        parameters: The prunable parameters by name, resolved at every use.
        masks: The masks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masks: MaskStore) -> None:
        self._parameters = parameters
        self._masks = masks
        self.sub_net: str | None = None
        self._gradients: dict[str, Tensor] = {}

    def correct(self, sub_net: str, correct: CorrectGradients, *, keep: bool) -> Correction | None:
        """Correct the present gradients of `sub_net` against the reference, in place.

        Args:
            sub_net: The sub-net whose masked gradients the parameters hold.
            correct: Called with ``gradients``, ``references``, ``names`` and ``sub_net``; the references are
                restricted to the sub-net's mask first, and are used up by that.
            keep: Whether these gradients, as they were before the correction, become the next reference.
        """
        names = [n for n, p in self._parameters.items() if p.grad is not None and n in self._gradients]
        references = []
        for name in names:
            reference = self._gradients[name]
            if self._masks.kept(sub_net, name) != reference.numel():
                zero_outside_(reference, self._masks.get(sub_net, name))
            references.append(reference)
        gradients = [g for g in (self._parameters[name].grad for name in names) if g is not None]
        uncorrected = self._copies() if keep else {}
        correction = correct(gradients=gradients, references=references, names=names, sub_net=sub_net)
        self._gradients = uncorrected
        self.sub_net = sub_net if keep else None
        return correction

    def take(self, sub_net: str) -> None:
        """Make the present gradients of `sub_net` the reference."""
        self._gradients = self._copies()
        self.sub_net = sub_net

    def forget(self) -> None:
        """Drop the reference."""
        self._gradients = {}
        self.sub_net = None

    def _copies(self) -> dict[str, Tensor]:
        return {n: p.grad.detach().clone() for n, p in self._parameters.items() if p.grad is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the reference as plain containers; the next correction uses the original up."""
        return {"sub_net": self.sub_net, "gradients": {name: g.clone() for name, g in self._gradients.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.sub_net = state["sub_net"]
        self._gradients = {
            name: gradient.detach().to(self._parameters[name].device, copy=True)
            for name, gradient in state["gradients"].items()
        }


@dataclasses.dataclass
class _Captured:
    """The dense gradient of one parameter, and how to tell the next micro-batch from the next attempt at a step.

    Attributes:
        dense: Sum over the micro-batches so far, taken before clipping and unscaling.
        gradient: The tensor in ``grad`` that held the masked sum.
        version: Its version counter then; one accumulation in place raises it by one, clearing it raises it too.
    """

    dense: Tensor
    gradient: Tensor
    version: int = -1


def _capture(gradient: Tensor, mask: Tensor, earlier: _Captured | None) -> _Captured:
    """Return the dense gradient with the micro-batch that was just accumulated into `gradient`.

    What arrived before a cleared gradient belongs to a step that was skipped, and is forgotten. Inside the mask the
    gradient itself is the sum over micro-batches; outside, it was zeroed after each of them.
    """
    if earlier is None or earlier.gradient is not gradient or gradient._version != earlier.version + 1:
        return _Captured(dense=gradient.detach().clone(), gradient=gradient)
    # Outside the mask add up; inside take the gradient, which has added up by itself.
    dense = zero_outside_(earlier.dense, ~mask).add_(gradient)
    return _Captured(dense=dense, gradient=gradient)


def _accumulation_hook(owner: weakref.ref[GradientMasks], name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        masks = owner()
        if masks is not None:
            masks.accumulated(name, parameter)

    return hook
