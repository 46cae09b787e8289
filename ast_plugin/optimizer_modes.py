"""Optimizers with ``train()`` and ``eval()``: schedule-free methods, which exchange two sequences of weights.

Both methods move the weights in place, so they need the dense ones; and they know the BatchNorm state that is in the
model, while those of the other sub-nets wait in banks. torch has no hook for them, so they are replaced on the
optimizer object by functions that bring the model to rest, call the original, and call it again for every bank.

Source: Defazio et al.: "The Road Less Scheduled", NeurIPS 2024, section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ast_plugin.optimizers import switches_modes
from ast_plugin.parts import RunParts

_METHODS = ("train", "eval")
_FLAG = "train_mode"


class OptimizerModes:
    """Makes ``optimizer.train()`` and ``optimizer.eval()`` hold for every sub-net, at any moment.

    Args:
        parts: The run's components.
        at_rest: Makes the model dense with the default's BatchNorm state for a moment.
    """

    def __init__(self, parts: RunParts, at_rest: Callable[[], AbstractContextManager[None]]) -> None:
        self._parts = parts
        self._at_rest = at_rest

    def attach(self) -> None:
        """Replace the two methods on the optimizer object, where it has them."""
        optimizer = self._parts.optimizer
        if switches_modes(optimizer):
            for name in _METHODS:
                setattr(optimizer, name, self._for_every_sub_net(getattr(optimizer, name), name == "train"))

    def detach(self) -> None:
        """Give the optimizer its own methods back."""
        for name in _METHODS:
            vars(self._parts.optimizer).pop(name, None)

    def _for_every_sub_net(self, original: Callable[[], Any], target: bool) -> Callable[[], Any]:
        @functools.wraps(original)
        def switch() -> Any:
            if all(flag == target for flag in self._flags()):
                return original()
            with self._at_rest():
                before = self._flags()
                result = original()
                after = self._flags()
                if after != before:
                    self._switch_banks(original, before, after)
                return result

        return switch

    def _switch_banks(self, original: Callable[[], Any], before: list[Any], after: list[Any]) -> None:
        """Call the method for the BatchNorm parameters of each waiting sub-net, and for nothing else."""
        parts, normalization = self._parts, self._parts.normalization
        private = {id(parts.bare.get_parameter(name)) for name in normalization.parameter_names}
        groups = parts.optimizer.param_groups
        everything = [group["params"] for group in groups]
        rest = normalization.carried
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in private]
            for name in parts.names:
                if name == rest or not private:
                    continue
                normalization.hand_over(parts.optimizer, name)
                try:
                    self._set_flags(before)
                    original()
                finally:
                    normalization.take_back(parts.optimizer)
        finally:
            for group, parameters in zip(groups, everything, strict=True):
                group["params"] = parameters
            self._set_flags(after)

    def _flags(self) -> list[Any]:
        return [group[_FLAG] for group in self._parts.optimizer.param_groups]

    def _set_flags(self, flags: list[Any]) -> None:
        for group, flag in zip(self._parts.optimizer.param_groups, flags, strict=True):
            group[_FLAG] = flag
