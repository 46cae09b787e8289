"""The previous sub-net's gradient, and the correction against it (Yang et al. 2022, section 3.3).

Only the weights that the next sub-net keeps are compared, so only those are remembered: a twentieth of the memory of
a whole gradient at 95 % sparsity. Where the next masks are not known yet, or a plugin corrects, whole gradients are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.correction import Correction
from ast_plugin.gradients import GradientMasks
from ast_plugin.kept import Kept, KeptByMask
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import MemoryOrder, Pack, order_of

CorrectGradients = Callable[..., Correction | None]


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """The gradients of one pack.

    Attributes:
        values: What ``kept.values`` returned; memory of its own.
        kept: The elements it was taken from.
        order: The order of the vector.
        present: For every parameter whether it had a gradient.
    """

    values: Tensor
    kept: Kept
    order: MemoryOrder
    present: tuple[bool, ...]

    def vector(self, size: int) -> Tensor:
        """Return the whole vector, zero where nothing was taken."""
        vector = torch.zeros(size, dtype=self.values.dtype, device=self.values.device)
        self.kept.write(self.values, vector)
        return vector


class GradientReference:
    """Remembers the gradient of one step, restricted to the sub-net of the next.

    Args:
        masks: The masks and the parameters they belong to.
        gradients: What has masked the gradients, and may have their kept values at hand.

    Attributes:
        sub_net: Whose gradient is remembered, None when there is none.
        coming: The sub-net that it is restricted to, None for whole gradients.
    """

    def __init__(self, masks: PackedMasks, gradients: GradientMasks) -> None:
        self._masks = masks
        self._gradients = gradients
        self.sub_net: str | None = None
        self.coming: str | None = None
        self._remembered: dict[Pack, _Remembered] = {}
        self._earlier: tuple[str | None, str | None, dict[Pack, _Remembered]] | None = None

    def serves(self, sub_net: str) -> bool:
        """Return whether gradients of `sub_net` can be corrected: there is another sub-net's, taken for it."""
        return self.sub_net not in (None, sub_net) and self.coming in (None, sub_net)

    @torch.no_grad()
    def take(self, sub_net: str | None, coming: str | None) -> None:
        """Make the present gradients of `sub_net` the reference, in place of one that is kept until `confirm`.

        Args:
            sub_net: The sub-net whose masked gradients the parameters hold; None: there is to be no reference.
            coming: The sub-net that will be compared with them, if its masks stay as they are until then; None
                remembers whole gradients.
        """
        self._earlier = self.sub_net, self.coming, self._remembered
        self._remembered = {}
        self.sub_net, self.coming = sub_net, coming
        for pack in self._masks.packs if sub_net is not None else ():
            self._remember(pack, self._masks.gradients(pack))

    def confirm(self) -> None:
        """The step is made that the reference was taken in."""
        self._earlier = None

    @property
    def is_confirmed(self) -> bool:
        """Whether there is nothing to take back."""
        return self._earlier is None

    def take_back(self) -> None:
        """Bring the earlier reference back: the step was broken off, and will be compared with it once more."""
        if self._earlier is not None:
            self.sub_net, self.coming, self._remembered = self._earlier
            self._earlier = None

    def _remember(self, pack: Pack, gradients: Sequence[Tensor | None]) -> None:
        if all(gradient is None for gradient in gradients):
            return
        kept = self._kept(pack, gradients)
        values = kept.values_of_dense(pack.vector(gradients))
        present = tuple(gradient is not None for gradient in gradients)
        self._remembered[pack] = _Remembered(values, kept, pack.order(gradients), present)

    def _follow(self, packs: Sequence[Pack]) -> None:
        """Sort what is remembered into new packs, which there are when the model was converted or moved."""
        if self._remembered.keys() <= set(packs):
            return
        wholes = self._wholes()
        self._remembered = {}
        for pack in packs:
            named = zip(pack.names, self._masks.parameters(pack), strict=True)
            self._remember(pack, [None if wholes.get(n) is None else wholes[n].to(p.device, p.dtype) for n, p in named])

    def _wholes(self) -> dict[str, Tensor]:
        """Return what is remembered by parameter name, in the parameters' shapes, zero where nothing was taken."""
        wholes: dict[str, Tensor] = {}
        for pack, remembered in self._remembered.items():
            tensors = pack.tensors(remembered.vector(pack.total), remembered.order)
            wholes |= {n: t for n, t, p in zip(pack.names, tensors, remembered.present, strict=True) if p}
        return wholes

    def forget(self) -> None:
        """Drop the reference."""
        self._earlier = None
        self._remembered = {}
        self.sub_net = self.coming = None

    @torch.no_grad()
    def pairs(self, sub_net: str) -> list[ComparedGradients]:
        """Return the present gradients of `sub_net` beside the reference, both restricted to its masks."""
        pairs = []
        self._follow(self._masks.packs)
        for pack in self._masks.packs:
            gradients = self._masks.gradients(pack)
            earlier = self._remembered.get(pack)
            if earlier is None or all(g is None for g in gradients):
                continue
            kept = self._masks.kept(sub_net, pack, gradients)
            known = earlier.kept is kept and earlier.order == pack.order(gradients)
            pairs.append(
                ComparedGradients(
                    pack=pack,
                    gradients=gradients,
                    kept=kept,
                    values=self._gradients.values(pack, gradients, kept),
                    reference=earlier.values if known else kept.values_of_dense(_whole(pack, earlier, gradients)),
                    both=tuple(p and g is not None for p, g in zip(earlier.present, gradients, strict=True)),
                )
            )
        return pairs

    def _kept(self, pack: Pack, tensors: Sequence[Tensor | None]) -> Kept:
        if self.coming is None:
            return KeptByMask(None, pack.sizes)
        return self._masks.kept(self.coming, pack, tensors)

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return a copy of the reference as plain containers.

        Whole gradients have their parameters' shapes; restricted ones are vectors of the weights that the coming
        sub-net keeps, in row-major order.

        Args:
            whole: Whether to return restricted gradients as whole ones, zero outside.
        """
        coming = None if whole else self.coming
        self._follow(self._masks.refresh())
        gradients = {
            name: tensor.clone() if coming is None else tensor[self._mask(name)]
            for name, tensor in self._wholes().items()
        }
        return {"sub_net": self.sub_net, "coming": coming, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, for the present masks."""
        self.forget()
        self.sub_net, self.coming = state["sub_net"], state["coming"]
        for pack in self._masks.packs:
            named = zip(pack.names, self._masks.parameters(pack), strict=True)
            self._remember(pack, [self._whole(name, p, state["gradients"].get(name)) for name, p in named])

    def _whole(self, name: str, parameter: Tensor, saved: Tensor | None) -> Tensor | None:
        """Return a saved gradient in its parameter's shape and memory layout."""
        if saved is None:
            return None
        whole = torch.zeros_like(parameter, dtype=saved.dtype, requires_grad=False)
        if self.coming is None:
            whole.copy_(saved)
        else:
            whole[self._mask(name)] = saved.to(parameter.device)
        return whole

    def _mask(self, name: str) -> Tensor:
        return self._masks.mask(self.coming or "", name)


@dataclasses.dataclass(frozen=True)
class ComparedGradients:
    """The gradients of one pack beside their reference.

    Attributes:
        pack: The pack.
        gradients: The gradients of its parameters, zero outside the masks.
        kept: The elements that the sub-net keeps.
        values: The gradients at these elements, as ``kept.values`` returns them.
        reference: The reference there, as ``kept.values_of_dense`` returns it.
        both: For every parameter whether it has a gradient and a reference.
    """

    pack: Pack
    gradients: list[Tensor | None]
    kept: Kept
    values: Tensor
    reference: Tensor
    both: tuple[bool, ...]


def _whole(pack: Pack, earlier: _Remembered, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return all of a remembered gradient in the order in which the present ones lie."""
    vector, order = earlier.vector(pack.total), pack.order(gradients)
    if order == earlier.order:
        return vector
    return order_of(pack.tensors(vector, earlier.order)[0], order)


@torch.no_grad()
def correct_pairs(pairs: Sequence[ComparedGradients], correct: CorrectGradients) -> Correction | None:
    """Call `correct` once, with vectors of the kept weights, and write corrected ones back to the gradients."""
    names, gradients, references = [], [], []
    for pair in pairs:
        lengths = pair.kept.lengths
        parts = zip(pair.pack.names, pair.values.split(lengths), pair.reference.split(lengths), pair.both, strict=True)
        for name, gradient, reference, both in parts:
            if both:
                names.append(name)
                gradients.append(gradient)
                references.append(reference)
    versions = [pair.values._version for pair in pairs]
    correction = correct(gradients=gradients, references=references, names=names)
    for pair, version in zip(pairs, versions, strict=True):
        if pair.values._version != version:
            vector = pair.pack.vector(pair.gradients)
            pair.kept.write(pair.values, vector)
            pair.pack.write(pair.gradients)
    return correction


@torch.no_grad()
def correct_whole(pairs: Sequence[ComparedGradients], correct: CorrectGradients) -> Correction | None:
    """Call `correct` once, with the gradients themselves and references of their shapes, as plugins expect."""
    names, gradients, references = [], [], []
    for pair in pairs:
        vector = torch.zeros(pair.pack.total, dtype=pair.reference.dtype, device=pair.reference.device)
        pair.kept.write(pair.reference, vector)
        wholes = pair.pack.tensors(vector, pair.pack.order(pair.gradients))
        for name, gradient, reference, both in zip(pair.pack.names, pair.gradients, wholes, pair.both, strict=True):
            if both and gradient is not None:
                names.append(name)
                gradients.append(gradient)
                references.append(reference)
    return correct(gradients=gradients, references=references, names=names)
