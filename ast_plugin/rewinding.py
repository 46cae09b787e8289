"""Makes putting sub-nets on and off invisible to autograd, so that a graph can be gone through at any later moment.

A graph remembers the version of every weight that it needs, and refuses to run backward when the weight has been
written to since. Putting a sub-net on and taking it off are such writes, although the values come back exactly. So a
mark is made when a graph was recorded, and when its backward begins, the sub-net is put on again together with the
version numbers of then. Afterwards both go back to what they were. Where anybody else has written to a weight since,
nothing is put on, and autograd refuses as it would without this package.

Thereby work: two forward passes with a backward pass each, ``retain_graph``, an evaluation between forward and
backward, gradients of an eval-mode forward (adversarial examples).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.activation import Activation, Form
from ast_plugin.anchors import Anchors
from ast_plugin.errors import ActivationError
from ast_plugin.sliced_tensors import Small

_GONE = -1  # the version of a tensor that was taken away
_NONE = 0  # no episode: nothing is on, or is being put on or taken off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """What was on the model when a graph was recorded.

    Attributes:
        sub_net: The sub-net that was on.
        episode: Which putting on it was.
        revision: Of its masks then; it rises when one changes.
        versions: Version numbers of the tensors that change with the sub-net.
        writes: How many times somebody else had been found to have written to them.
        form: What the sub-net was on for.
        small: The smaller weights that stood in for the model's own, None where none did.
    """

    sub_net: str
    episode: int
    revision: int
    versions: Sequence[int]
    writes: int
    form: Form = Form.COMPUTE
    small: Small | None = None


class RewindableActivation:
    """An activation that can bring back what was on the model when a graph was recorded.

    Args:
        inner: What really puts sub-nets on and takes them off; nobody else may call it.
        slots: Where the tensors are that it writes to, as `ast_plugin.slots.tensor_slots` returns it.
        watched: How many of them, from the first, nobody writes to while a sub-net is on.
        revision: Returns a number that rises when a mask of the sub-net changes.
        sharded: Whether parameters are sharded: graphs gather them anew, and nothing can be brought back.
        anchors: The modules that hold what it writes to; None where nobody looks after them.

    Attributes:
        compiled: Whether the last forward was compiled or traced.
    """

    def __init__(
        self,
        inner: Activation,
        slots: Sequence[tuple[dict[str, Any], str]],
        watched: int,
        revision: Callable[[str], int],
        *,
        sharded: bool = False,
        anchors: Anchors | None = None,
    ) -> None:
        self._inner = inner
        self._anchors = anchors
        self._slots = slots
        self._watched = watched
        self._revision = revision
        self._is_sharded = sharded
        self.compiled = False
        self._put_on: list[int] = []
        self._rest: list[int] = []
        self._writes = 0
        self._episodes = 0
        self._episode = _NONE
        self._resume: list[int] | None = None

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""
        return self._inner.worn

    def put_on(self, sub_net: str, form: Form = Form.COMPUTE, *, compiling: bool = False) -> None:
        """Make the model compute as `sub_net`; another one that is on is taken off first.

        Args:
            sub_net: A sub-net's name.
            form: What for.
            compiling: Whether the forward that comes is compiled or traced.
        """
        self.compiled = compiling
        self._inner.refresh(compiling=compiling)
        if self._inner.is_on(sub_net, form) and self._resume is None and self._episode != _NONE:
            return
        self.take_off()
        self._resume = None  # an interrupt may have come after the taking off
        if self._anchors is not None:
            self._anchors.check()
        self._notice_writes()
        self._inner.put_on(sub_net, form)
        self._put_on = self._versions()
        self._episodes += 1
        self._episode = self._episodes

    def check_tensors(self) -> None:
        """Raise an `ActivationError` if a tensor that changes with the sub-net is no longer in the model."""
        if self._anchors is not None:
            self._anchors.check_tensors()

    def take_off(self) -> None:
        """Give the model its dense weights back; does nothing when it has them."""
        if self._inner.worn is None:
            return
        self._episode = _NONE
        if self._versions(self._watched) != self._put_on[: self._watched]:
            self._writes += 1
        self._inner.take_off()
        if self._resume is not None:
            # The values are those of that moment again.
            _set_versions(self._tensors(), self._resume)
            self._resume = None
        self._rest = self._versions()

    @property
    def stands_in(self) -> bool:
        """Whether smaller weights stand in for the model's own."""
        return self._inner.small is not None

    @property
    def episode(self) -> int:
        """Which putting on it was that is on the model now, as in `Mark`; 0 for none."""
        return self._episode

    def mark(self) -> Mark | None:
        """Return what is on the model now, None when it is dense."""
        if self._inner.worn is None:
            return None
        return Mark(
            sub_net=self._inner.worn,
            episode=self._episode,
            revision=self._revision(self._inner.worn),
            versions=self._versions(),
            writes=self._writes,
            form=self._inner.form,
            small=self._inner.small,
        )

    def rewind(self, mark: Mark) -> None:
        """Bring the model to where it was at `mark`, for a backward pass; without effect if that is over.

        Args:
            mark: What `mark` returned right after the graph had been recorded.

        Raises:
            ActivationError: If parameters are sharded: their graphs gather them anew and notice nothing.
        """
        if self._inner.worn == mark.sub_net and self._episode == mark.episode:
            if mark.small is not None:
                mark.small.check()
            return
        if self._is_sharded or any(hasattr(tensor, "device_mesh") for tensor in self._tensors()):
            raise ActivationError(
                f"backward goes through a forward of sub-net {mark.sub_net!r}, which was taken off since (by another "
                "backward, an evaluation or a state_dict), and sharded parameters cannot be brought back; run backward "
                "right after its forward, and once"
            )
        self.take_off()
        self._notice_writes()
        if mark.writes != self._writes or mark.revision != self._revision(mark.sub_net):
            if mark.small is not None:
                mark.small.expire()
            return
        resume = self._versions()
        self._inner.put_on(mark.sub_net, mark.form, small=mark.small)
        self._resume = resume
        _set_versions(self._tensors(), mark.versions)
        self._put_on = list(mark.versions)
        self._episode = mark.episode

    def refresh(self, *, compiling: bool) -> None:
        """A forward is about to run: see `Activation.refresh`."""
        self.compiled = compiling
        self._inner.refresh(compiling=compiling)

    def show(self) -> None:
        """Have the parameters hold the sub-net's values; graphs that were recorded go on to be good."""
        if self._inner.worn is not None:
            versions = self._versions()
            self._inner.show()
            if versions != self._versions():
                _set_versions(self._tensors(), versions)

    def hide(self, hidden: bool) -> None:
        """Have nothing stand in for a while: see `Activation.hide`."""
        self._inner.hide(hidden)

    def deliver(self) -> None:
        """Add gradients of what stood in for parameters to the parameters' own."""
        self._inner.deliver()

    def deliver_at_once(self, small: Small | None = None) -> None:
        """Do so from now on whenever a gradient arrives, of `small` or of what stands in now."""
        self._inner.deliver_at_once(self._inner.small if small is None else small)

    def release(self) -> None:
        """Take the sub-net off and free what is kept for putting one on."""
        self.take_off()
        self._inner.release()

    def _notice_writes(self) -> None:
        present = self._versions()
        if present != self._rest:
            self._writes += 1
            self._rest = present

    def _versions(self, count: int | None = None) -> list[int]:
        return [getattr(tensors.get(name), "_version", _GONE) for tensors, name in self._slots[:count]]

    def _tensors(self) -> list[Tensor]:
        return [tensors[name] for tensors, name in self._slots]


def _set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    # What torch.autograd._unsafe_preserve_version_counter does at its end; FSDP relies on it too.
    set_versions = torch._C._autograd._unsafe_set_version_counter
    try:
        set_versions(tuple(tensors), tuple(versions))
    except TypeError:  # earlier releases take one tensor
        for tensor, version in zip(tensors, versions, strict=True):
            set_versions(tensor, version)  # type: ignore[arg-type]
