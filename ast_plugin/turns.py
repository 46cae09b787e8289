"""Whose turn it is: the sub-nets that a step trains, by name, as an alternation answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ast_plugin.alternation import Alternation, trains_several
from ast_plugin.errors import PluginError


class Turns:
    """Asks an alternation and checks its answers.

    Args:
        alternation: The order.
        sparsities: Target sparsity by name, of the sub-nets in training order.
    """

    def __init__(self, alternation: Alternation, sparsities: Mapping[str, float]) -> None:
        self._alternation = alternation
        self._together = alternation if trains_several(alternation) else None
        self._names = tuple(sparsities)
        self._sparsities = sparsities

    @property
    def several(self) -> bool:
        """Whether steps may train several sub-nets."""
        return self._together is not None

    def first_at(self, step: int) -> str:
        """Return the sub-net that `step` trains, or the first of several.

        Raises:
            PluginError: If the alternation answers with something else than an index.
        """
        return self.names_at(step)[0]

    def names_at(self, step: int) -> tuple[str, ...]:
        """Return the sub-nets that `step` trains, from the densest to the sparsest.

        Raises:
            PluginError: If the alternation answers with something else than indices, with none, or with one twice.
        """
        if self._together is None:
            return (self._name(self._alternation.sub_net_at(step), step),)
        indices = self._together.sub_nets_at(step)
        if not isinstance(indices, Sequence) or not indices or len(set(indices)) < len(indices):
            raise PluginError(
                f"alternation {self._alternation.name!r} chose {indices!r} for step {step}; sub_nets_at() must return "
                "the indices of one or more sub-nets, each once"
            )
        names = [self._name(index, step) for index in indices]
        # The update of a channel sub-net may trim sparser ones, whose turn is to come after it.
        return tuple(sorted(names, key=lambda name: (self._sparsities[name], self._names.index(name))))

    def _name(self, index: object, step: int) -> str:
        if not isinstance(index, int) or not 0 <= index < len(self._names):
            raise PluginError(
                f"alternation {self._alternation.name!r} chose {index!r} for step {step}; it must return the index of "
                f"one of the {len(self._names)} sub-nets, from 0"
            )
        return self._names[index]
