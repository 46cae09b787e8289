"""What a controller is told by the hooks on its model and optimizer."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingEvents(Protocol):
    """What a controller is told, in the order of one training step."""

    def check_allowed(self) -> None:
        """Raise where the model must not be trained now: a part of it is about to be."""

    def before_forward(self, compiling: bool) -> None:
        """The model's forward is about to run, compiled or recorded if `compiling`."""

    def after_forward(self, raised: bool) -> object | None:
        """The forward has run, or raised. Returns what backward is to be reported with; None: do not report it."""

    def before_backward(self, passed: Any) -> None:
        """A backward through a forward begins, for which `after_forward` returned `passed`."""

    def after_backward(self, completed: bool) -> None:
        """Backward has ended; not `completed` after an exception."""

    def end_of_backward_unseen(self) -> None:
        """The output of a training forward holds no tensor that could tell of backward."""

    def graph_dropped(self, passed: Any) -> None:
        """Nothing is left through which backward could go: outputs of a forward that returned `passed` are gone."""

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The optimizer is about to step. May return the arguments to call its step with instead."""

    def after_step(self) -> None:
        """The optimizer's step has returned."""

    def before_state_access(self) -> None:
        """A state dict of the model or optimizer is about to be read."""

    def after_state_access(self) -> None:
        """A state dict of the model has been read."""

    def before_part_access(self) -> None:
        """The state dict of a part of the model is about to be read."""

    def before_copy(self) -> None:
        """The model or a part of it is about to be copied."""

    def before_load(self) -> None:
        """A state dict of the model, or of a part, is about to be loaded."""

    def after_load(self) -> None:
        """A state dict of the model, or of a part, has been loaded."""

    def add_state(self, state_dict: dict[str, Any]) -> None:
        """Add to the optimizer's state dict, in place."""

    def take_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state dict without what `add_state` put there; the argument is left as it is."""
