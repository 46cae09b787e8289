"""The ``with`` blocks of a run: a sub-net, or a version of all of them, on the model for their length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ast_plugin.activation import Form
from ast_plugin.attachment import NO_BACKWARD, current_backward, is_attached, is_running
from ast_plugin.errors import ActivationError
from ast_plugin.parts import RunParts
from ast_plugin.random_state import RandomState
from ast_plugin.step import TrainingStep
from ast_plugin.training_state import RunState
from ast_plugin.versions import Versions


class Blocks:
    """Knows what the user has chosen for now, and what is on the model outside of that.

    Args:
        parts: The run's components.
        step: Its optimizer steps.
        state: What travels in the optimizer's state dict.

    Attributes:
        released: Whether the hooks are gone for good, so that the model may belong to another run.
        versions: The versions of the run.
    """

    def __init__(self, parts: RunParts, step: TrainingStep, state: RunState) -> None:
        self._parts = parts
        self._step = step
        self._state = state
        self._chosen: list[str] = []
        self.released = False
        self.versions = Versions(parts)

    @property
    def chosen(self) -> str | None:
        """The sub-net that the user chose last, None outside of `choose`."""
        return self._chosen[-1] if self._chosen else None

    @property
    def block(self) -> str | None:
        """A block that is open, as it is written: ``sub_net('s90')``; None outside of any."""
        if self._chosen:
            return f"sub_net({self.chosen!r})"
        return None if self.versions.open is None else f"version({self.versions.open!r})"

    def refuse(self, what: str, remedy: str = "leave the block first") -> None:
        """Refuse what cannot be done inside a block.

        Raises:
            ActivationError: Inside a block.
        """
        if self.block is not None:
            raise ActivationError(f"{what} was called inside `with {self.block}`; {remedy}")

    @contextlib.contextmanager
    def choose(self, name: str, form: Form = Form.SHOW) -> Iterator[None]:
        """Put a sub-net on for the length of a block; the one before is back on afterwards."""
        self._check_own()
        with self._step.interrupted():
            self._chosen.append(name)
            try:
                self._parts.activation.put_on(name, form)
                yield
            finally:
                self._chosen.pop()
                self._put_chosen_on()

    @contextlib.contextmanager
    def version(self, name: str) -> Iterator[None]:
        """Give the model the values of a version for the length of a block; random generators are left as they were."""
        self._check_own()
        if current_backward() != NO_BACKWARD or self._is_inside_forward():
            raise ActivationError(
                f"version({name!r}) was called in the middle of a forward or backward pass of the model; evaluate it "
                "between two steps"
            )
        self.versions.check(name)
        chance = RandomState()
        before = chance.state_dict()
        with self._step.interrupted():
            self._parts.activation.take_off()
            try:
                with self.versions.put_on(name):
                    try:
                        self._put_chosen_on()
                        yield
                    finally:
                        self._parts.activation.take_off()
            finally:
                self._put_chosen_on()
                chance.load_state_dict(before)

    @contextlib.contextmanager
    def at_rest(self, *, own: bool = True) -> Iterator[None]:
        """Have the model dense with the default's BatchNorm state for a moment, also inside of blocks.

        Args:
            own: Whether it is to have the run's own values inside the block of a version, too.
        """
        self._check_own()
        with self._step.at_rest():
            try:
                with self.versions.off() if own else contextlib.nullcontext():
                    self._state.copies = own and self.versions.open is not None
                    yield
            finally:
                self._state.copies = False
                if self._chosen:
                    self._put_chosen_on()

    def _put_chosen_on(self) -> None:
        if self._chosen:
            self._parts.activation.put_on(self._chosen[-1], Form.SHOW)
        else:
            self._parts.activation.take_off()

    def _check_own(self) -> None:
        if self.released and is_attached(self._parts.bare):
            raise ActivationError(
                "the model was wrapped anew after detach() of this run, and two runs cannot put sub-nets on it; use "
                "the new run, or save() before detach()"
            )

    def _is_inside_forward(self) -> bool:
        """Return whether a forward is going on that goes on with the sub-net which is on."""
        parts = self._parts
        return parts.activation.worn is not None and any(map(is_running, {parts.called, parts.model, parts.bare}))
