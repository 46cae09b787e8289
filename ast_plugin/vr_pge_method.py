"""VR-PGE as a method: one channel sub-net whose units are chosen by learned probabilities (Zhou et al. 2021).

At every step the network is trained as one that was drawn by the probabilities, and the losses of two drawn networks
move them. From `end_step` on the masks are fixed: the best, by loss, of a few with exactly the budget of units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, StateError
from ast_plugin.methods import Method, chance
from ast_plugin.patterns import nearest_count
from ast_plugin.samplers import Sample, Sampler, SamplerInputs
from ast_plugin.vr_pge import Probabilities, cosine_rate, draw, gradient, largest

NAME = "vr-pge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VRPGEOptions:
    """Settings of VR-PGE; the defaults are the source's.

    Attributes:
        rate: Learning rate of the probabilities at the start, in (0, 1]; it falls to 0 by a half cosine.
        samples: How many drawn networks are compared at a step, at least 2.
        candidates: How many masks the final one is chosen from, at least 1.

    Raises:
        ConfigError: If a value is outside its range.
    """

    rate: float = 0.012
    samples: int = 2
    candidates: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must lie in (0, 1], got {self.rate!r}")
        for name, least in (("samples", 2), ("candidates", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an int from {least} on, got {value!r}")


class ChannelSampler:
    """The probabilities of one run's channels.

    Args:
        inputs: The sub-net.
        options: The settings.

    Attributes:
        budget: How many units of all groups together are kept in the end, and at each step on average.

    Raises:
        ConfigError: If there are no channels to choose from.
    """

    def __init__(self, inputs: SamplerInputs, options: VRPGEOptions) -> None:
        if inputs.pattern != "channel" or not inputs.groups:
            raise ConfigError(
                f"method {NAME!r} learns which channels to keep, and sub-net {inputs.sub_net!r} has "
                f"{f'pattern {inputs.pattern!r}' if inputs.pattern != 'channel' else 'no channel group'}; pass "
                "pattern='channel' with example_inputs=..., or choose another method"
            )
        self._groups = inputs.groups
        self._inputs = inputs
        self._options = options
        self._sizes = [group.units for group in self._groups.groups]
        self.budget = max(nearest_count(sum(self._sizes), inputs.sparsity), len(self._sizes))
        self._learned = Probabilities.start(self.budget, self._sizes)
        self._final: Tensor | None = None

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """How probable it is that a unit is kept: by group name, float64 (units,), in [0, 1]."""
        return self._by_group(self._learned.values.clone())

    @property
    def is_final(self) -> bool:
        """Whether the masks change no more."""
        return self._final is not None

    def samples(self, step: int) -> Sequence[Sample]:
        """Return the masks to try at `step`: drawn ones, then candidates with the exact budget, then none."""
        return [] if self.is_final else [self._sample(kept) for kept in self._drawn(step)]

    def learn(self, step: int, losses: Tensor | None) -> None:
        """Move the probabilities by the losses of the step's masks, or fix the best of the candidates."""
        if self.is_final:
            return
        drawn = self._drawn(step)
        if step >= self._inputs.end:
            self._final = drawn[0 if losses is None else int(losses.argmin())]
        elif losses is not None:
            slope = gradient(torch.stack(drawn), losses, self._learned.values)
            rate = cosine_rate(step, begin=self._inputs.begin, end=self._inputs.end, rate=self._options.rate)
            self._learned = self._learned.moved(slope, rate, self.budget, self._sizes)

    def complete(self) -> None:
        """Keep the most probable units."""
        if self._final is None:
            self._final = self._most_probable()

    def final(self) -> Sample:
        """Return the final masks.

        Raises:
            StateError: If they are not final.
        """
        return self._sample(self._chosen())

    def achieved(self) -> float:
        """Return the share of all units that the final masks drop."""
        chosen = self._chosen()
        return 1 - int(chosen.sum()) / len(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the probabilities and the final choice as tensors and plain containers."""
        return {**self._learned.state_dict(), "final": None if self._final is None else self._final.clone()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Make sure that a saved state can be loaded; nothing is changed.

        Raises:
            StateError: If it is damaged, or of other groups.
        """
        self._read(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: As `check_state`.
        """
        self._learned, self._final = self._read(state)

    def _read(self, state: Mapping[str, Any]) -> tuple[Probabilities, Tensor | None]:
        learned = Probabilities.from_state(state, sum(self._sizes))
        final = state.get("final")
        if final is None:
            return learned, None
        if not isinstance(final, Tensor) or final.dtype != torch.bool or final.shape != learned.values.shape:
            raise StateError("the saved choice of channels is damaged; load another checkpoint")
        return learned, final.detach().cpu().clone()

    def _drawn(self, step: int) -> list[Tensor]:
        begin, end = self._inputs.begin, self._inputs.end
        generator = self._inputs.generator(step)
        if step < end:
            count = self._options.samples if step >= begin else 1
            return [draw(self._learned.values, self._sizes, generator) for _ in range(count)]
        others = [draw(self._learned.values, self._sizes, generator) for _ in range(self._options.candidates - 1)]
        return [self._most_probable(), *(self._most_probable(after=kept) for kept in others)]

    def _most_probable(self, after: Tensor | None = None) -> Tensor:
        """Return as many units as the budget has: the most probable, or those of a drawn mask and then these."""
        values = self._learned.values
        return largest(values if after is None else values + after, self.budget, self._sizes)

    def _chosen(self) -> Tensor:
        if self._final is None:
            raise StateError("the channels of this run are not fixed yet: their probabilities are still being learned")
        return self._final

    def _by_group(self, units: Tensor) -> dict[str, Tensor]:
        parts = units.split(self._sizes)
        return {group.name: part for group, part in zip(self._groups.groups, parts, strict=True)}

    def _sample(self, kept: Tensor) -> Sample:
        units = self._by_group(kept)
        return Sample(masks=self._groups.cut_masks(units, self._inputs.shapes), units=units)


def vr_pge(options: VRPGEOptions | None = None) -> Method:
    """Return the method; ``method="vr-pge"`` is the one with the source's settings.

    Args:
        options: Its settings.

    Example:
        >>> method = vr_pge(VRPGEOptions(rate=0.05))
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5,), pattern="channel", method=method, ...)
    """
    chosen = options or VRPGEOptions()

    def sampler(inputs: SamplerInputs) -> Sampler:
        return ChannelSampler(inputs, chosen)

    return Method(
        name=NAME,
        description="learned channel probabilities, policy gradient of two forwards (Zhou et al. 2021)",
        drop_score=chance,
        updates=False,
        distribution="uniform",
        sampler=sampler,
    )


VR_PGE = vr_pge()
