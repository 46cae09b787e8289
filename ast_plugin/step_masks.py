"""The mask update within a step: made once, from the dense gradient, also where the step is made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ast_plugin.distributed import average_over_ranks, check_same_on_all_ranks
from ast_plugin.inactive import clear_state_at
from ast_plugin.parts import RunParts
from ast_plugin.sharding import Gathered
from ast_plugin.updates import MaskUpdate


class StepMasks:
    """Updates masks of the sub-nets that a step trains.

    Args:
        parts: The run's components.
        tell: Told of an update that is complete.
    """

    def __init__(self, parts: RunParts, tell: Callable[[MaskUpdate], None]) -> None:
        self._parts = parts
        self._tell = tell
        self._told: set[str] = set()  # a step that is made again after it was broken off must not regrow twice
        self._updates: dict[str, MaskUpdate] = {}

    def update(self, name: str, step: int, drop_fraction: float | None) -> None:
        """Update the masks of a sub-net, whose gradients have been captured, unless this step has done so.

        Args:
            name: The sub-net.
            step: The step, from 0.
            drop_fraction: Share of the kept weights to replace, in [0, 1); None: nothing is due.
        """
        if drop_fraction is None or name in self._told:
            return
        parts = self._parts
        parts.gradients.masks_changed()
        update = self._updates.get(name)
        if update is None:
            gradients = self._dense_gradients() if parts.method.needs_gradient else None
            weights = Gathered(parts.parameters)
            update = parts.updater.update(name, step, weights, gradients, drop_fraction=drop_fraction)
            self._updates[name] = update
        if parts.grow_initialization == "zero":
            self._start_at_zero(name, update.grown)
        what = f"the masks of sub-net {name!r} at step {step}"
        check_same_on_all_ranks(what, parts.masks.checksum, name, model=parts.model)
        self._told.add(name)
        self._tell(update)

    def reset(self) -> None:
        """Forget the step."""
        self._told.clear()
        self._updates.clear()

    def _dense_gradients(self) -> Mapping[str, torch.Tensor]:
        """Return the dense gradients of the step, averaged over the ranks; those of sharded parameters are already."""
        parts = self._parts
        captured = parts.gradients.dense()
        whole = {name: parameter for name, parameter in parts.parameters.items() if parts.layouts[name] is None}
        gradients = {name: gradient for name, gradient in captured.items() if name in whole}
        average_over_ranks(gradients, like=whole, model=parts.model)
        for name, layout in parts.layouts.items():
            if layout is not None and name in captured:
                gradients[name] = layout.join(captured[name])
        return Gathered(gradients)

    def _start_at_zero(self, name: str, grown: dict[str, torch.Tensor]) -> None:
        """Zero grown weights and their optimizer state, except where another sub-net keeps the weight."""
        parts = self._parts
        for parameter_name, mask in grown.items():
            layout = parts.layouts[parameter_name]
            if layout is not None:
                mask = layout.part_of(mask)
            for other in parts.names:
                if other != name:
                    mask = mask & ~parts.local_masks.get(other, parameter_name).to(mask.device)
            with torch.no_grad():
                parts.local[parameter_name].masked_fill_(mask, 0)
            clear_state_at(parts.parameters[parameter_name], mask, parts.optimizer)
