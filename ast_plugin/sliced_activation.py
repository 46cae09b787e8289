"""Puts a channel sub-net on a model as physically smaller weights, so that it computes less.

A smaller tensor stands in for a parameter or buffer by standing in the module's ``__dict__`` under the same name: that
is where Python looks first, before `torch.nn.Module` looks into its ``_parameters``. So the forward of an unmodified
module takes the smaller one, while ``parameters()``, ``state_dict()``, ``zero_grad()``, optimizers, clipping and
data-parallel modules go on seeing the whole ones. Replacing the entry of ``_parameters`` instead was tried against
that: every loop over parameters between forward and backward then sees tensors that no optimizer knows
(``model.zero_grad()`` misses the gradients, a gradient scaler or clipping by name finds none), and
`torch.func.functional_call` with the model's own parameters puts the whole ones back for the length of the call. What
``__dict__`` costs: compiled code has no guard on it and would go on with the weights of another sub-net without a word
(`ast_plugin.sliced_routes` keeps the two apart), and a copy of a module would take it along
(`ast_plugin.sliced_copies` has it copied as what it stands for).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.activation import Form, MaskedActivation
from ast_plugin.channels import Slice
from ast_plugin.gradients import GradientMasks
from ast_plugin.masks import MaskStore
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.sliced_copies import Count, copied_as
from ast_plugin.sliced_kernels import take
from ast_plugin.sliced_plans import Cut, SlicePlan, SlicePlans
from ast_plugin.sliced_routes import Route
from ast_plugin.sliced_tensors import Small


class SlicedActivation(MaskedActivation):
    """Channel sub-nets as smaller weights where that is possible, everything else masked.

    Args:
        masks: The masks and the parameters they belong to.
        normalization: The private normalisation state.
        store: The same masks, for their revisions.
        plans: What is left in each channel sub-net.
        channels: Names of the channel sub-nets.
        route: Returns the route that can be taken now; called with whether the code at hand is compiled.
        gradients: Told which gradients need no masking.
    """

    def __init__(
        self,
        masks: PackedMasks,
        normalization: PrivateNormalization,
        *,
        store: MaskStore,
        plans: SlicePlans,
        channels: Collection[str],
        route: Callable[[bool], Route],
        gradients: GradientMasks,
    ) -> None:
        super().__init__(masks, normalization)
        self._store = store
        self._plans = plans
        self._channels = frozenset(channels)
        self._route = route
        self._gradients = gradients
        self._way: Route = route(False)
        self._small: Small | None = None
        self._issued: weakref.WeakSet[Small] = weakref.WeakSet()
        self._shadowed: list[tuple[dict[str, Any], str, Tensor]] = []
        self._hidden = False
        self._buffers: list[tuple[Cut, Tensor]] = []
        self._numbers: list[tuple[nn.Module, str, Count]] = []
        self._zeroed: list[tuple[Tensor, int, Tensor, Tensor]] = []

    @property
    def small(self) -> Small | None:
        """The smaller weights that stand in for the model's own, None where none do."""
        return self._small if self._shadowed else None

    def is_on(self, sub_net: str, form: Form = Form.COMPUTE) -> bool:
        """Return whether all of `sub_net` is on the model, in a way that serves `form`."""
        if not super().is_on(sub_net):
            return False
        masked = bool(self._covered) and Form.PROBE not in (form, self._form)  # serves both other purposes
        return self._form == form or masked or self._plan(sub_net) is None

    def refresh(self, *, compiling: bool) -> None:
        """Have smaller weights follow those of full size, or go away where they must not stand in.

        Args:
            compiling: Whether the forward that comes is compiled or traced.
        """
        self._way = self._route(compiling)
        plan = None if self._worn is None or self._form == Form.PROBE else self._plan(self._worn)
        if plan is None or self._worn is None:
            return
        if self._way == "off":
            if self._shadowed:
                self.show()
        elif not self._shadowed or self._small is None or not self._small.is_current():
            with torch.inference_mode(False), torch.no_grad():
                self._stand_back()
                self._stand_in(self._worn, self._form, None)

    def hide(self, hidden: bool) -> None:
        """Have nothing stand in for a while, because others stand in for the model's tensors; or have it back."""
        if hidden == self._hidden or not self._shadowed:
            return
        self._hidden = hidden
        for shadows, attribute, tensor in self._shadowed:
            if hidden:
                shadows.pop(attribute, None)
            else:
                shadows[attribute] = tensor
        for module, name, number in self._numbers:
            setattr(module, name, number.whole if hidden else number)

    def show(self) -> None:
        """Have the parameters hold the sub-net's values, zeros where it drops weights, and nothing stand in."""
        with torch.inference_mode(False), torch.no_grad():
            self._take_slices_off()
            if self._worn is not None and self._form == Form.COMPUTE:
                self._form = Form.SHOW
                if self._plan(self._worn) is not None and not self._covered:
                    super()._cover(self._worn, Form.SHOW)

    def deliver(self) -> None:
        """Add what gradients have arrived at smaller weights to those of the parameters."""
        for issued in list(self._issued):
            issued.deliver(self._told(issued))

    def deliver_at_once(self, small: Small | None) -> None:
        """Deliver the gradients of `small` as they are accumulated: nothing tells of the end of their backward."""
        if small is not None:
            small.deliver_at_once(self._told(small))

    def release(self) -> None:
        """Take the sub-net off and free what is kept for putting one on."""
        super().release()
        self._small = None

    def _cover(self, sub_net: str, form: Form) -> None:
        plan = self._plan(sub_net)
        if plan is not None and form == Form.PROBE:
            self._zero_columns(plan)
        elif plan is None or form == Form.SHOW or self._way == "off":
            super()._cover(sub_net, form)

    def _stand_in(self, sub_net: str, form: Form, small: Small | None) -> None:
        plan = None if form == Form.PROBE else self._plan(sub_net)
        if plan is None or self._way == "off":
            return
        revision = self._store.revision(sub_net)
        if small is None or small.revision != revision:
            small = Small(sub_net, revision, plan.parameters, gathered=self._way == "gather")
        self._small = small
        self._issued.add(small)
        self._buffers = [(cut, take(cut.place.tensor, cut.dims)) for cut in plan.buffers]
        pairs = [*zip(plan.parameters, small.tensors, strict=True), *self._buffers]
        for cut, tensor in pairs:
            for shadows, attribute in cut.place.shadows:
                self._shadowed.append((shadows, attribute, copied_as(tensor, cut.place.tensor)))
                shadows[attribute] = tensor
        for module, name, value in plan.attributes:
            number = Count(value, getattr(module, name))
            self._numbers.append((module, name, number))
            setattr(module, name, number)

    def _stand_back(self) -> None:
        self._take_slices_off()
        while self._zeroed:
            tensor, dim, indices, values = self._zeroed[-1]
            tensor.index_copy_(dim, indices, values)
            self._zeroed.pop()

    def _take_slices_off(self) -> None:
        for cut, tensor in self._buffers:
            Slice(cut.name, cut.dims).put_(tensor, cut.place.tensor)
        self._buffers = []
        while self._numbers:
            module, name, number = self._numbers[-1]
            setattr(module, name, number.whole)
            self._numbers.pop()
        while self._shadowed:
            shadows, attribute, _ = self._shadowed[-1]
            shadows.pop(attribute, None)
            self._shadowed.pop()
        self._hidden = False

    def _zero_columns(self, plan: SlicePlan) -> None:
        for column in plan.columns:
            tensor = column.place.tensor.detach()
            self._zeroed.append((tensor, column.dim, column.indices, tensor.index_select(column.dim, column.indices)))
            tensor.index_fill_(column.dim, column.indices, 0)

    def _told(self, small: Small) -> Callable[[str, Tensor | None, Tensor], None]:
        return functools.partial(self._gradients.delivered, small.sub_net, small.revision)

    def _plan(self, sub_net: str) -> SlicePlan | None:
        return self._plans.of(sub_net) if sub_net in self._channels else None
