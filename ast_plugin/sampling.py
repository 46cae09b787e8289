"""The masks of a sub-net that are drawn anew at every step, and what is known of their losses so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ast_plugin.channels import ChannelGroups
from ast_plugin.config import ASTConfig
from ast_plugin.distributed import average_over_ranks, check_same_on_all_ranks, ranks
from ast_plugin.errors import ActivationError, ConfigError, StateError, WrapError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method
from ast_plugin.plans import SubNetPlan
from ast_plugin.random_state import seeded_generator
from ast_plugin.samplers import Sample, Sampler, SamplerInputs
from ast_plugin.updates import MaskUpdate

_KEY = "sampler"


class SampledMasks:
    """Puts the masks that a sampler draws into the store, and gathers their losses for it.

    Args:
        sampler: The rule; None for a method without one: nothing is ever drawn then.
        plan: The sub-net.
        masks: The store; changed in place.
        method: Name of the method, for messages.
        model: The model, which tells the processes that train it.

    Attributes:
        sampler: The rule, or None.
    """

    def __init__(
        self, sampler: Sampler | None, plan: SubNetPlan, masks: MaskStore, *, method: str, model: nn.Module
    ) -> None:
        self.sampler = sampler
        self._plan = plan
        self._masks = masks
        self._method = method
        self._model = model
        self._step: int | None = None
        self._samples: Sequence[Sample] = ()
        self._present: int | None = None
        self._losses: Tensor | None = None
        self._batches = 0

    @property
    def is_final(self) -> bool:
        """Whether no masks will be drawn any more."""
        return self.sampler is None or self.sampler.is_final

    def wanted(self, step: int) -> int:
        """Return how many masks want the loss of a training batch of `step`; 0 if none does."""
        self._draw(step)
        return len(self._samples) if len(self._samples) > 1 else 0

    def heard(self, step: int) -> bool:
        """Return whether losses of `step` have come."""
        return self._step == step and self._batches > 0

    def put(self, index: int) -> None:
        """Have the sub-net keep what one of the step's masks keeps."""
        if self._present != index:
            self._present = None
            self._keep(self._samples[index])
            self._present = index

    def note(self, losses: Tensor) -> None:
        """Add the losses of one batch of the step, float64 (samples,)."""
        self._losses = losses if self._losses is None else self._losses + losses
        self._batches += 1

    def begin(self, step: int) -> None:
        """Have the masks of `step` in place: a training forward is about to run.

        Raises:
            ActivationError: If their losses have not been computed.
        """
        if self.wanted(step) and not self._batches:
            raise ActivationError(
                f"method {self._method!r} learns from the losses of several networks at each step, and this training "
                "forward comes without them: give optimizer.step() a closure that computes the loss, or call "
                "ast.explore(lambda: criterion(model(inputs), targets)) before the forward of every batch"
            )
        if self._samples:
            self.put(0)

    def learn(self, step: int) -> tuple[MaskUpdate, ...]:
        """Hand the losses of `step`, which is over, to the sampler; on several processes a collective.

        A loss that is not finite teaches nothing: those of the step are left out then.

        Returns:
            The update, if the masks have become final by it.
        """
        if self.sampler is None or self.sampler.is_final or self._step != step:
            return ()
        losses = self._averaged()
        if losses is None or bool(losses.isfinite().all()):
            self.sampler.learn(step, losses)
        self._forget()
        return self._settled(self.sampler)

    def complete(self, step: int) -> tuple[MaskUpdate, ...]:
        """Make the masks final if the time for that has come, as it is at the end of a run.

        Returns:
            The update, if they were not.
        """
        if self.sampler is None or self.sampler.is_final or step < self._plan.calendar.end:
            return ()
        self.sampler.complete()
        self._forget()
        return self._settled(self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold; empty for a method without a sampler."""
        return {} if self.sampler is None else {_KEY: self.sampler.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Make sure that a run can go on from a state; nothing is changed.

        Raises:
            StateError: If it lacks what `state_dict` returned, or that does not fit.
        """
        if self.sampler is None:
            return
        if _KEY not in state:
            raise StateError(
                f"the saved state is of a run by another method than {self._method!r}, so it has nothing learned of "
                "masks to go on with; load its weights alone, and start this method from them"
            )
        self.sampler.check_state(state[_KEY])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that has what `state_dict` returned."""
        if self.sampler is not None:
            self.sampler.load_state_dict(state[_KEY])
        self._forget()

    def _draw(self, step: int) -> None:
        if self._step != step:
            self._forget()
            self._samples = () if self.sampler is None else self.sampler.samples(step)
            self._step = step

    def _forget(self) -> None:
        self._step = self._present = self._losses = None
        self._samples = ()
        self._batches = 0

    def _keep(self, sample: Sample) -> None:
        self._masks.replace(self._plan.name, sample.masks)
        if sample.units is not None:
            self._masks.note_units(self._plan.name, sample.units)

    def _averaged(self) -> Tensor | None:
        if self._losses is None:
            return None
        mean = self._losses / self._batches
        if ranks(self._model) == 1:
            return mean
        shared = {"losses": mean.to(next((p.device for p in self._model.parameters()), mean.device))}
        average_over_ranks(shared, like=dict(shared), model=self._model)
        return shared["losses"].cpu()

    def _settled(self, sampler: Sampler) -> tuple[MaskUpdate, ...]:
        if not sampler.is_final:
            return ()
        name = self._plan.name
        self._keep(sampler.final())
        check_same_on_all_ranks(f"the final masks of sub-net {name!r}", self._masks.checksum, name, model=self._model)
        target = self._plan.target_sparsity
        return (MaskUpdate(sub_net=name, target=target, achieved=sampler.achieved(), grown={}),)


def build_sampler(
    method: Method,
    config: ASTConfig,
    plans: Sequence[SubNetPlan],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    groups: ChannelGroups | None,
    sharded: bool,
) -> Sampler | None:
    """Return what draws the masks of a run, None for a method without a sampler.

    Raises:
        ConfigError: If the run has several sub-nets, or none that the method can draw masks of.
        WrapError: If parameters are sharded.
    """
    if method.sampler is None:
        return None
    if len(plans) != 1:
        raise ConfigError(
            f"method {method.name!r} learns one sub-net, and sparsities has {len(plans)}; give one, and take nested "
            "sub-nets from what it has learned in a run after it (see docs/vr_pge.md)"
        )
    if sharded:
        raise WrapError(
            f"method {method.name!r} draws new masks at every step, which cannot be spread over the ranks of a sharded "
            "model; train with DistributedDataParallel, or with another method"
        )
    plan = plans[0]
    inputs = SamplerInputs(
        sub_net=plan.name,
        sparsity=plan.target_sparsity,
        pattern=plan.pattern.name,
        begin=plan.calendar.begin,
        end=plan.calendar.end,
        groups=groups,
        shapes=shapes,
        generator=lambda step: seeded_generator(config.seed, plan.name, step, method.name),
    )
    return method.sampler(inputs)
