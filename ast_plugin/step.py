"""One optimizer step of the active sub-net: what is done before the user's optimizer runs, and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ast_plugin.attachment import is_stepping
from ast_plugin.correction import Correction
from ast_plugin.distributed import check_same_on_all_ranks
from ast_plugin.errors import ActivationError
from ast_plugin.guests import Guests
from ast_plugin.optimizers import is_idle
from ast_plugin.parts import RunParts
from ast_plugin.sharding import Gathered, any_on_a_rank
from ast_plugin.step_correction import StepCorrection
from ast_plugin.step_masks import StepMasks
from ast_plugin.step_together import StepTogether
from ast_plugin.step_updates import UpdateRules
from ast_plugin.turns import Turns
from ast_plugin.updates import MaskUpdate


class TrainingStep:
    """Counts steps that really happened and keeps their order of events.

    Args:
        parts: The run's components.
        owner: What plugins are given as ``training``.

    Attributes:
        number: Optimizer steps that have happened, which is also the number of the next one, from 0.
        last_steps: For each sub-net, the step at which it was last trained, None before the first.
        rules: When masks are updated.
    """

    def __init__(self, parts: RunParts, owner: Any) -> None:
        self._parts = parts
        self._owner = owner
        self.rules = UpdateRules(parts.updater)
        self.number = 0
        self.last_steps: dict[str, int | None] = dict.fromkeys(parts.names)
        self._begun = False
        self._counts = False
        self._carrying = False
        self._resting = 0  # how many times a step in progress was interrupted, one within the other
        self._turns = Turns(
            parts.alternation, {name: plan.target_sparsity for name, plan in parts.updater.plans.items()}
        )
        self._together = StepTogether(parts, self._turns)
        self._guests = Guests(parts.normalization)
        self._corrections = StepCorrection(parts, self._turns.first_at, self.rules)
        self._correction: Correction | None = None
        self._agreed = False
        self._masks = StepMasks(parts, self._tell)
        self._fraction: float | None = None  # to drop in the step that has begun; None: its masks stay

    @property
    def scheduled(self) -> str:
        """The sub-net that the next step trains; of several the first, and in their closure the one it is run for."""
        return self._together.turn or self._turns.first_at(self.number)

    @property
    def needs_closure(self) -> bool:
        """Whether steps may train several sub-nets, each in a run of the user's closure."""
        return self._turns.several

    def sub_nets_at(self, step: int) -> tuple[str, ...]:
        """Return the sub-nets that a step trains."""
        return self._turns.names_at(step)

    def announce(self) -> None:
        """Tell plugins which sub-net the first step of the run trains."""
        self._parts.registry.begin(training=self._owner, sub_net=self.scheduled)

    def begin(self) -> None:
        """A training forward is about to run for this step; there may be several (micro-batches)."""
        parts, name = self._parts, self.scheduled
        self._together.check_turn(self.number)
        self.mend()
        self._fraction = self.rules.drop_fraction(name, self.number, self.last_steps[name])
        parts.gradients.begin(name, capture=self._fraction is not None and parts.method.needs_gradient)
        self._begun = True

    def prepare(self) -> None:
        """Everything that comes before the optimizer's arithmetic."""
        self._counts = self._ready()
        if self._counts:
            self._correction = self._corrections.correct(self.scheduled, self.number, self.last_steps)
            self._hand_over()

    def _ready(self) -> bool:
        """Make the mask update and mask the gradients; return whether there are any."""
        if not self._happens():
            return False
        self._agree()
        self._masks.update(self.scheduled, self.number, self._fraction)
        self._parts.gradients.mask(self.scheduled)
        return True

    def around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that prepares the gradients of the first evaluation for the optimizer.

        Later evaluations within one step (line searches) see the same sub-net; their gradients are masked alone.
        """

        def evaluate() -> Any:
            self._restore_rest()
            if self._together.is_wanted(self.number):
                return self._evaluate_together(closure)
            loss = self._evaluate(closure)
            if not self._counts:
                self.prepare()
            elif not self._carrying:
                self._hand_over()
            return loss

        self._counts = False
        return evaluate

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        try:
            return closure()
        finally:
            self._parts.activation.take_off()

    def _evaluate_together(self, closure: Callable[[], Any]) -> Any:
        def one(closure: Callable[[], Any]) -> tuple[Any, bool]:
            self._begun, self._fraction = False, None
            loss = self._evaluate(closure)
            return loss, self._ready()

        loss = self._together.run(self.number, closure, one)
        if self._together.trained and not self._counts:
            self._counts = True
            self._parts.reference.take_back()
            self._parts.reference.take(None, None)
        if self._counts:
            self._hand_over()
        return loss

    def finish(self) -> None:
        """Everything that comes after the optimizer's arithmetic."""
        parts = self._parts
        if not self._counts:
            self.settle()
            return
        before = self.sub_nets_at(self.number)
        name, *others = self._together.trained or before
        if parts.inactive is not None:
            parts.inactive.restore(parts.parameters, self._together.kept(self.number), parts.optimizer)
        self._restore_rest()
        found = self._correction or Correction(checks=0, conflicts=0, cosines=[])
        parts.statistics.step_finished(
            self.number, name, checks=found.checks, conflicts=found.conflicts, cosines=found.cosines, others=others
        )
        self._tell(*parts.sampled.learn(self.number))
        finished = self.number
        self.last_steps.update(dict.fromkeys((name, *others), finished))
        self.number += 1
        self._reset()
        ended = self.number == parts.config.total_steps
        if ended:
            self._complete_masks()  # before a plugin may write a checkpoint: nothing completes them after a resume
        parts.registry.notify("ast_step_finished", training=self._owner, step=finished, sub_net=name)
        if self.sub_nets_at(self.number) != before:
            parts.registry.notify("ast_sub_net_switched", training=self._owner, sub_net=self.scheduled)
        if ended:
            parts.registry.notify("ast_training_finished", training=self._owner)

    def backward_ended(self) -> None:
        """Mask the gradients of the micro-batch that has just run."""
        if self._begun:
            self._parts.gradients.mask(self.scheduled)

    def end(self) -> None:
        """The user says that the run is over, which without `total_steps` nobody else can tell."""
        self.settle()
        self._complete_masks()
        self._parts.registry.notify("ast_training_finished", training=self._owner)

    def settle(self) -> None:
        """Bring model and optimizer to rest, wherever a step or a backward was broken off. Idempotent."""
        parts = self._parts
        parts.activation.take_off()
        if parts.inactive is not None and not parts.inactive.empty:
            # The optimizer was broken off: what it has moved outside the mask goes back.
            parts.inactive.restore(parts.parameters, self._together.kept(self.number), parts.optimizer)
        self._restore_rest()
        if not parts.reference.is_confirmed and not is_stepping(parts.optimizer):
            parts.reference.take_back()

    def settle_unless_stepping(self) -> None:
        """Come to rest, unless the optimizer is at work: weights are dense then."""
        if not (self._carrying and is_stepping(self._parts.optimizer)):
            self.settle()

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Have the model and the optimizer at rest for a moment, also in the middle of a step: a user's step hook."""
        self.rest()
        try:
            yield
        finally:
            self.go_on()

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """Have BatchNorm where it is at rest for a moment in the middle of a step; without effect at other times."""
        with self.at_rest() if self._carrying else contextlib.nullcontext():
            yield

    def rest(self) -> None:
        """Come to rest; a step in progress is only interrupted, for `go_on`."""
        self.settle_unless_stepping()
        if self._carrying:
            self._resting += 1
            self._parts.activation.take_off()
            self._guests.take_back(self._parts.optimizer)

    def go_on(self) -> None:
        """Give a step in progress the sub-net's BatchNorm state again."""
        if self._resting:
            self._resting -= 1
            if not self._resting:
                self._give_private()

    def mend(self) -> None:
        """Bring things to rest if an earlier optimizer step raised halfway; cheap when none did."""
        if self._carrying:
            self.settle()

    def restore(self, number: int, last_steps: Mapping[str, int | None]) -> None:
        """Go on at step `number`, the sub-nets having last been trained at `last_steps`."""
        self.number = number
        self.last_steps = {name: last_steps[name] for name in self._parts.names}
        self._agreed = False
        self._reset()

    def _reset(self) -> None:
        self._begun = self._counts = False
        self._correction = self._fraction = None
        self._masks.reset()
        self._together.reset()
        self._parts.reference.confirm()
        self._parts.gradients.end()

    def _happens(self) -> bool:
        """Return whether this call of ``optimizer.step`` is a step of the run."""
        found_inf = getattr(self._parts.optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return False
        gradients = {name: p.grad for name, p in self._parts.local.items() if p.grad is not None}
        if not gradients:
            return False
        unsure = not self._begun or is_idle(self._parts.optimizer)
        if unsure and not any_on_a_rank(gradients, self._parts.layouts):
            return False  # torch.distributed.checkpoint steps once without any effect, to have the state created
        if not self._begun:
            self._together.check_turn(self.number)
            raise ActivationError(
                "optimizer.step() has gradients of prunable weights, but the wrapped model's forward did not run in "
                "training mode since the last step, so no sub-net was on; call the model that was given to wrap() (or "
                "a module around it), after model.train()"
            )
        return True

    def _agree(self) -> None:
        """Notice, at the first step of a run or of its continuation, ranks that started from different masks."""
        if not self._agreed:
            masks = self._parts.masks
            what = f"the step numbers (here {self.number}) and masks"
            check_same_on_all_ranks(what, lambda: f"{self.number}/{masks.checksum()}", model=self._parts.model)
            self._agreed = True

    def _hand_over(self) -> None:
        """Give the optimizer the sub-net's own BatchNorm state, and remember what it must not move."""
        parts = self._parts
        self._carrying = True  # first: an interrupt anywhere in here is to be mended
        if parts.inactive is not None and parts.inactive.empty:
            parts.inactive.remember(parts.parameters, parts.optimizer)
        self._give_private()

    def _give_private(self) -> None:
        main, gradients = self._together.main(self.number), self._together.private
        self._guests.hand_over(self._parts.optimizer, main, gradients)

    def _restore_rest(self) -> None:
        """Bring the default's BatchNorm state back into model and optimizer, if another's is handed over."""
        if self._carrying:
            self._guests.take_back(self._parts.optimizer)
            self._carrying = False
            self._resting = 0

    def _complete_masks(self) -> None:
        """Bring sub-nets that were not trained after the end of the schedule to their target, once it has come."""
        parts = self._parts
        for name, plan in parts.updater.plans.items():
            last, end = self.last_steps[name], plan.calendar.end
            if self.number >= end and (last is None or last < end) and parts.updater.is_due(name, self.number, last):
                self._tell(parts.updater.finalize(name, self.number, Gathered(parts.parameters)))
        self._tell(*parts.sampled.complete(self.number))

    def _tell(self, *updates: MaskUpdate) -> None:
        for update in updates:
            self._parts.statistics.masks_updated(self.number, update.sub_net, update.target, update.achieved)
            for name in (update.sub_net, *update.trimmed):
                self._parts.registry.notify("ast_masks_updated", training=self._owner, sub_net=name, step=self.number)
