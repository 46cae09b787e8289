"""A step that trains several sub-nets: one after the other computes the user's closure, and their gradients add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ActivationError
from ast_plugin.parts import RunParts
from ast_plugin.sub_nets import is_number
from ast_plugin.turns import Turns


class StepTogether:
    """Runs the closure once for each of the sub-nets, and keeps what every one of them leaves behind.

    Args:
        parts: The run's components.
        turns: Which sub-nets a step trains.

    Attributes:
        turn: The sub-net that the closure is being run for, None at other times.
        trained: Those that have had gradients in this step.
        private: Gradients of private BatchNorm parameters by name, by sub-net.
    """

    def __init__(self, parts: RunParts, turns: Turns) -> None:
        self._parts = parts
        self._turns = turns
        self.turn: str | None = None
        self.trained: tuple[str, ...] = ()
        self.private: dict[str, dict[str, Tensor]] = {}

    def is_wanted(self, step: int) -> bool:
        """Return whether `step` trains several sub-nets, so that a closure has to be run for each."""
        return self._turns.several and len(self._turns.names_at(step)) > 1

    def check_turn(self, step: int) -> None:
        """Refuse a forward, or a step, outside of the closure that has to be run for each sub-net.

        Raises:
            ActivationError: If `step` trains several sub-nets, and it is no one's turn.
        """
        if self.turn is None and self.is_wanted(step):
            names = self._turns.names_at(step)
            raise ActivationError(
                f"alternation {self._parts.alternation.name!r} trains {len(names)} sub-nets in this step, and each "
                "needs a forward and a backward of its own: call optimizer.step(closure) with a function that clears "
                "the gradients, calls the model, calls backward and returns the loss, and call the model in training "
                "mode nowhere else; or use alternation='alternating'"
            )

    def run(self, step: int, closure: Callable[[], Any], one: Callable[[Callable[[], Any]], tuple[Any, bool]]) -> Any:
        """Run the closure for each sub-net of a step, and leave the sum of their gradients in the model.

        Gradients of private parameters are those of the sub-net that `main` returns; the others' are in `private`.

        Args:
            step: The step.
            closure: The user's.
            one: Runs it for the sub-net whose turn it is, and masks the gradients that it leaves. Returns the loss and
                whether there were any.

        Returns:
            The sum of the losses; the last one where they are no numbers.
        """
        gradients = self._parts.gradients
        names, losses, trained = self._turns.names_at(step), [], []
        sums: dict[Tensor, Tensor] = {}
        self.private = {}
        try:
            for name in names:
                self.turn = name
                gradients.end()
                loss, has_gradients = one(closure)
                losses.append(loss)
                trained += [name] if has_gradients else []
                self._set_aside(name, sums, leave=name == names[-1])
        finally:
            self.turn = None
            gradients.end()
        self.trained = tuple(trained)
        self._bring_back(sums, self.private.get(self.main(step), {}))
        return _added(losses)

    def main(self, step: int) -> str:
        """Return the sub-net of a step whose private parameters are in the model while the optimizer steps."""
        names = self._turns.names_at(step)
        return self._parts.default if self._parts.default in names else names[0]

    def kept(self, step: int) -> Mapping[str, Tensor]:
        """Return what the sub-nets that a step trains keep between them: bool masks by parameter name."""
        masks = self._parts.local_masks
        first, *others = self.trained or (self._turns.first_at(step),)
        if not others:
            return masks.of(first)
        return {name: _any([mask, *(masks.get(o, name) for o in others)]) for name, mask in masks.of(first).items()}

    def reset(self) -> None:
        """Forget the step."""
        self.trained = ()
        self.private = {}

    def _set_aside(self, name: str, sums: dict[Tensor, Tensor], *, leave: bool) -> None:
        """Add the gradients of one sub-net to `sums`, and take them away for the next one's closure.

        They are copied: a data-parallel module goes on using the memory of a gradient.
        """
        private = self._private_names()
        with torch.no_grad():
            for parameter in self._parameters():
                gradient = parameter.grad
                if gradient is None:
                    continue
                if id(parameter) in private:
                    self.private.setdefault(name, {})[private[id(parameter)]] = gradient.detach().clone()
                elif parameter in sums:
                    sums[parameter].add_(gradient)
                else:
                    sums[parameter] = gradient.detach().clone()
                if not leave:
                    parameter.grad = None

    def _bring_back(self, sums: Mapping[Tensor, Tensor], private: Mapping[str, Tensor]) -> None:
        names = self._private_names()
        with torch.no_grad():
            for parameter in self._parameters():
                key = names.get(id(parameter))
                total = sums.get(parameter) if key is None else private.get(key)
                if total is not None and parameter.grad is not None:
                    parameter.grad.copy_(total)
                else:
                    parameter.grad = total

    def _parameters(self) -> dict[Tensor, None]:
        trained = (parameter for group in self._parts.optimizer.param_groups for parameter in group["params"])
        return dict.fromkeys((*self._parts.called.parameters(), *trained))

    def _private_names(self) -> dict[int, str]:
        return {id(owner): name for name, owner in self._parts.normalization.owners().items()}


def _any(masks: Sequence[Tensor]) -> Tensor:
    union = masks[0].clone()
    for mask in masks[1:]:
        union |= mask.to(union.device)
    return union


def _added(losses: Sequence[Any]) -> Any:
    if all(isinstance(loss, Tensor) or is_number(loss) for loss in losses):
        return sum(losses[1:], start=losses[0])
    return losses[-1]
