"""Gradients of the active sub-net: masked when they have arrived, kept dense for growth.

Backward computes gradients with respect to the masked weights, which are dense. Masking them before the training loop
goes on makes clipping, logged norms and overflow checks see the active sub-net's gradient only.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ast_plugin.kept import Kept
from ast_plugin.masking import zero_outside_
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import Pack


class GradientMasks:
    """Masks the prunable parameters' gradients when backward ends, and keeps dense ones aside on request.

    At the end of backward, all at once, the work is warm in the processor's caches; done in a hook at every parameter,
    between two layers' backward, it took ten times as long (docs/decisions.md). Dense gradients, on the few steps that
    need them, are kept aside by such hooks, which see every accumulation.

    Args:
        parameters: The prunable parameters by name, resolved at every use.
        masks: The masks.
        packed: The same masks as they are applied.
        owners: What the hooks are registered on, where `parameters` are parts of it; None where they are the same.

    Attributes:
        sub_net: Whose gradients are expected, None between steps.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        masks: MaskStore,
        packed: PackedMasks,
        owners: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parameters = parameters
        self._owners = parameters if owners is None else owners
        self._masks = masks
        self._packed = packed
        self.sub_net: str | None = None
        self._handles: dict[str, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._captured: dict[str, _Captured] | None = None
        self._masked: dict[Pack, _Masked] = {}
        self._clean: dict[str, _Masked] = {}

    @property
    def captures(self) -> bool:
        """Whether the dense gradient of the present step is kept aside."""
        return self._captured is not None

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
        if capture:
            self.forget_cleared()
            self.attach()

    def end(self) -> None:
        """Forget the sub-net and its gradients: the step is over, or was never made."""
        self.sub_net = None
        self._captured = None
        self.masks_changed()
        self.detach()

    def attach(self) -> None:
        """Register hooks for this step: it keeps dense gradients, or its end of backward cannot be told.

        Parameters that were replaced since get theirs, too.
        """
        for name, parameter in self._owners.items():
            known = self._handles.get(name)
            if known is not None:
                if known[0]() is parameter:
                    continue
                known[1].remove()
            if not parameter.requires_grad:
                continue  # frozen for a while
            handle = parameter.register_post_accumulate_grad_hook(_accumulation_hook(weakref.ref(self), name))
            self._handles[name] = (weakref.ref(parameter), handle)

    def detach(self) -> None:
        """Remove the hooks."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def accumulated(self, name: str) -> None:
        """Mask the gradient that was just accumulated into a parameter, in place."""
        gradient = self._parameters[name].grad
        if self.sub_net is None or gradient is None:
            return
        mask = self._masks.get(self.sub_net, name).to(gradient.device)
        with torch.no_grad():
            if self._captured is not None:
                self._captured[name] = _capture(gradient, mask, self._captured.get(name))
            zero_outside_(gradient, mask)

    @torch.no_grad()
    def mask(self, sub_net: str) -> None:
        """Mask in place the gradients that are not as this method left them.

        Backward has ended, or something has come since: clipping, noise, a gradient assigned to ``grad``, other masks.
        """
        for pack in self._packed.packs:
            gradients = self._packed.gradients(pack)
            known = self._masked.get(pack)
            if known is not None and known.still(gradients):
                continue
            if self._needs_masking(sub_net, pack, gradients):
                kept = self._packed.kept(sub_net, pack, gradients)
                if not kept.everything:
                    kept.keep_only_(pack.vector(gradients))
                    pack.write(gradients)
            self._masked[pack] = _Masked(gradients)
        for name, captured in (self._captured or {}).items():
            captured.remember(self._parameters[name].grad)

    def forget_cleared(self) -> None:
        """Backward has begun: what was kept aside of gradients that were cleared since belongs to a skipped step."""
        captured = self._captured or {}
        fates = {name: kept.cleared(self._parameters[name].grad) for name, kept in captured.items()}
        if any(fates.values()):  # None: zero before and after; it goes with the others
            self._captured = {name: kept for name, kept in captured.items() if fates[name] is False}

    def masks_changed(self) -> None:
        """Have all gradients masked again: what was done before was for other masks."""
        self._masked.clear()
        self._clean.clear()

    def delivered(self, sub_net: str, revision: int, name: str, earlier: Tensor | None, gradient: Tensor) -> None:
        """Note a gradient that was put together from a smaller one, with zeros everywhere else.

        Args:
            sub_net: Whose masks left the zeros.
            revision: Of these masks.
            name: The parameter, prunable or not.
            earlier: The gradient that it was added to, None for none.
            gradient: What is in ``grad`` now.
        """
        if sub_net != self.sub_net or revision != self._masks.revision(sub_net):
            return
        known = self._clean.get(name)
        # The earlier one was added to in place, which its version number shows: once.
        if earlier is None or (known is not None and known.still([earlier], writes=int(earlier is gradient))):
            self._clean[name] = _Masked([gradient])

    def _needs_masking(self, sub_net: str, pack: Pack, gradients: Sequence[Tensor | None]) -> bool:
        for name, gradient in zip(pack.names, gradients, strict=True):
            if gradient is None:
                continue
            known = self._clean.get(name)
            clean = known is not None and known.still([gradient])
            if not clean and self._masks.kept(sub_net, name) < self._masks.total(name):
                return True
        return False

    def dense(self) -> dict[str, Tensor]:
        """Return the dense gradients of this step by parameter name, summed over its micro-batches, unclipped."""
        return {name: captured.dense for name, captured in (self._captured or {}).items()}

    def values(self, pack: Pack, gradients: Sequence[Tensor | None], kept: Kept) -> Tensor:
        """Return ``kept.values`` of masked gradients: a vector of their own, or the memory of the gradients themselves.

        They are read anew. What `mask` has seen may have been scaled since without a trace: neither a gradient
        scaler's ``unscale_`` nor clipping of DTensors nor writing to ``grad.data`` raises a version counter.
        """
        values = kept.values(pack.vector(gradients))
        return values.clone() if pack.is_buffer(values) else values


class _Masked:
    """Gradients that were masked.

    Args:
        gradients: The tensors; not kept alive.
    """

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._gradients = [None if g is None else (weakref.ref(g), g._version) for g in gradients]

    def still(self, gradients: Sequence[Tensor | None], *, writes: int = 0) -> bool:
        """Return whether `gradients` are the same tensors, and written to since as many times as is known of."""
        for known, gradient in zip(self._gradients, gradients, strict=True):
            if known is None or gradient is None:
                if known is not None or gradient is not None:
                    return False
            elif known[0]() is not gradient or known[1] + writes != gradient._version:  # every change counts one up
                return False
        return True


@dataclasses.dataclass
class _Captured:
    """The dense gradient of one parameter, and how to tell the next micro-batch from the next attempt at a step.

    Attributes:
        dense: Sum over the micro-batches so far, taken before clipping and unscaling.
        gradient: The tensor in ``grad`` when it was last masked, after backward.
        version: Its version counter then, which clearing it in place raises.
        zero: Whether it was zero then.
    """

    dense: Tensor
    gradient: Tensor | None = None
    version: int = -1
    zero: bool = False

    def remember(self, gradient: Tensor | None) -> None:
        self.gradient = gradient
        self.version = -1 if gradient is None else gradient._version
        self.zero = gradient is not None and not bool(gradient.any())

    def cleared(self, gradient: Tensor | None) -> bool | None:
        """Return whether ``grad`` was cleared since, None where that cannot be told.

        It is zero then. A raised counter alone may come from a neighbour in a bucket, and ``grad.data.zero_()`` raises
        none.
        """
        if gradient is None:
            return True
        if bool(gradient.any()):
            return False
        unchanged = gradient is self.gradient and gradient._version == self.version
        return None if unchanged and self.zero else True


def _capture(gradient: Tensor, mask: Tensor, earlier: _Captured | None) -> _Captured:
    """Return the dense gradient with the micro-batch that was just accumulated into `gradient`.

    Inside the mask the gradient itself is the sum over micro-batches; outside, it was zeroed after each of them.
    """
    if earlier is None:
        return _Captured(dense=gradient.detach().clone())
    earlier.dense = zero_outside_(earlier.dense, ~mask).add_(gradient)
    return earlier


def _accumulation_hook(owner: weakref.ref[GradientMasks], name: str) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        masks = owner()
        if masks is not None:
            masks.accumulated(name)

    return hook
