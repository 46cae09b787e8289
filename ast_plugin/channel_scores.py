"""One score for every unit of a channel group, from a method's scores of weights or of whole units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ast_plugin.channel_states import ChannelStates
from ast_plugin.channels import ChannelGroup, ChannelGroups
from ast_plugin.errors import PluginError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import ChannelScore, ChannelScoreInputs, Method, Score, ScoreInputs, scores_of
from ast_plugin.random_state import seeded_generator
from ast_plugin.sharding import full

Units = dict[str, Tensor]
"""By group name, one value or one flag a unit: (units,)."""


class ChannelScores:
    """Scores the units of all groups.

    Args:
        method: The rule. Its `channel_score` takes the place of its `drop_score` where it has one.
        masks: The masks; read only.
        groups: The groups.
        seed: The run's seed.
        states: What the units lie in beside the masked weights; None: nothing is known of it.
    """

    def __init__(
        self,
        method: Method,
        masks: MaskStore,
        groups: ChannelGroups,
        *,
        seed: int,
        states: ChannelStates | None = None,
    ) -> None:
        self._states = states
        self._method = method
        self._masks = masks
        self._groups = groups
        self._seed = seed
        self._weights = {
            group.name: tuple(dict.fromkeys(axis.tensor for axis in group.axes if axis.tensor in masks.shapes))
            for group in groups.groups
        }

    def of(
        self,
        sub_net: str,
        score: Score,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        kept: Units,
    ) -> Units:
        """Return the scores of all units.

        Args:
            sub_net: The sub-net whose masks are being renewed.
            score: A score of weights; a unit has the mean over its weights, the rows that make it and the columns that
                read it.
            step: Optimizer step; -1 before the first.
            weights: Dense weights by parameter name.
            gradients: Dense gradients by parameter name, or None.
            kept: The units that the sub-net keeps now.

        Raises:
            PluginError: If a score returns something else than it must.
        """
        by_unit = self._method.channel_score
        if by_unit is not None and score is self._method.drop_score:
            states = {} if self._states is None else self._states.of(sub_net)
            return {
                g.name: self._asked(by_unit, sub_net, g, step, weights, gradients, kept, states)
                for g in self._groups.groups
            }
        made: dict[str, Tensor] = {}
        for names in self._weights.values():
            for name in names:
                if name not in made:
                    made[name] = self._of_weight(sub_net, name, score, step, weights[name].detach(), gradients)
        return self.of_weights(made)

    def of_weights(self, scores: Mapping[str, Tensor]) -> Units:
        """Return the mean of the scores of each unit's weights.

        Args:
            scores: One a weight, by parameter name, of all weights of the groups.
        """
        return {group.name: self._mean(group, scores) for group in self._groups.groups}

    def _asked(
        self,
        score: ChannelScore,
        sub_net: str,
        group: ChannelGroup,
        step: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        kept: Units,
        states: Mapping[str, Tensor],
    ) -> Tensor:
        names = self._weights[group.name]
        scores = score(
            ChannelScoreInputs(
                group=group,
                weights={name: weights[name].detach() for name in names},
                gradients=None if gradients is None else {n: gradients[n] for n in names if n in gradients},
                kept=kept[group.name],
                generator=seeded_generator(self._seed, sub_net, step, group.name),
                states={axis.tensor: states[axis.tensor] for axis in group.axes if axis.tensor in states},
                model=None if self._states is None else self._states.model,
            )
        )
        if not isinstance(scores, Tensor) or scores.shape != (group.units,) or not scores.is_floating_point():
            raise PluginError(
                f"the channel score of method {self._method.name!r} returned {_shown(scores)} for group "
                f"{group.name!r}; it must return a floating-point tensor of shape ({group.units},)"
            )
        return scores

    def _of_weight(
        self,
        sub_net: str,
        name: str,
        score: Score,
        step: int,
        weight: Tensor,
        gradients: Mapping[str, Tensor] | None,
    ) -> Tensor:
        inputs = ScoreInputs(
            weight=weight,
            gradient=None if gradients is None else gradients.get(name),
            mask=full(self._masks.get(sub_net, name)),
            generator=seeded_generator(self._seed, sub_net, step, name),
        )
        return scores_of(self._method, score, inputs)

    def _mean(self, group: ChannelGroup, scores: Mapping[str, Tensor]) -> Tensor:
        parts: list[Tensor] = []
        size = 0
        for axis in group.axes:
            if axis.tensor not in scores:
                continue
            of_weights = scores[axis.tensor]
            wide = torch.float64 if of_weights.dtype == torch.float64 else torch.float32
            along = of_weights.sum([dim for dim in range(of_weights.dim()) if dim != axis.dim], dtype=wide)
            for offset, block in axis.parts:
                parts.append(along[offset : offset + group.units * block].view(group.units, block).sum(1))
            size += of_weights.numel() // group.units
        return torch.stack([part.to(parts[0].device) for part in parts]).sum(0) / size


def _shown(scores: object) -> str:
    return f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
