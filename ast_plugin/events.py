"""What happens at each event of the training loop: which sub-net is on the model, and when it is dense."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ast_plugin.activation import Form
from ast_plugin.attachment import NO_BACKWARD, current_backward
from ast_plugin.blocks import Blocks
from ast_plugin.distributed import check_every_rank_goes_on
from ast_plugin.errors import ActivationError
from ast_plugin.exploration import Loss, losses_of
from ast_plugin.parts import RunParts
from ast_plugin.rewinding import Mark
from ast_plugin.sharding import is_sharding_module
from ast_plugin.sliced_routes import check_not_traced, is_tracing
from ast_plugin.sliced_tensors import Small
from ast_plugin.step import TrainingStep
from ast_plugin.training_state import KEY, RunState


class RunEvents(Blocks):
    """Answers the hooks of `ast_plugin.attachment` for one run.

    Args:
        parts: The run's components.
        step: Its optimizer steps.
        state: What travels in the optimizer's state dict.

    Attributes:
        state_in_optimizer: Whether the optimizer's state dict carries the run's state.
        refused: Why the model must not be trained now; None if it may.
    """

    def __init__(self, parts: RunParts, step: TrainingStep, state: RunState) -> None:
        super().__init__(parts, step, state)
        self.state_in_optimizer = True
        self.refused: str | None = None
        self._exploring = self._passing = False
        self._running = False  # may be stale after an interrupt
        self._passed_by: Small | None = None
        self._graphs = (0, 0)  # the episode that the last graphs were recorded in, and how many there are

    def explore(self, loss: Loss) -> None:
        """Have the losses of the masks that were drawn for the next step, where the method wants any."""
        parts, number = self._parts, self._step.number
        if self.released or self._exploring or not parts.sampled.wanted(number):
            return
        self.check_allowed()
        self.refuse("explore()", "leave the block before training goes on")
        self._check_own()
        check_every_rank_goes_on(parts.model)
        self._step.mend()
        self._exploring = True
        try:
            losses = losses_of(loss, parts.sampled.wanted(number), self._sample, parts.called, parts.optimizer)
        finally:
            self._exploring = False
        parts.sampled.note(losses)

    @contextlib.contextmanager
    def _sample(self, index: int) -> Iterator[None]:
        self._parts.sampled.put(index)
        with self.choose(self._step.scheduled, Form.COMPUTE):
            yield

    def check_allowed(self) -> None:
        """Raise where the model must not be trained now; a chosen sub-net may be looked at all the same."""
        if self.refused is not None and not self._hands_off():
            raise ActivationError(self.refused)

    def before_forward(self, compiling: bool) -> None:
        """Put on the scheduled sub-net in training, the default one otherwise, unless one was chosen."""
        activation = self._parts.activation
        if self._parts.parameters.lent() or is_tracing():
            activation.hide(True)  # others stand in for the model's tensors already
        elif self._chosen:
            activation.refresh(compiling=compiling)
        if self._hands_off():
            return
        check_not_traced()
        if current_backward() != NO_BACKWARD:
            raise ActivationError(
                "the wrapped model's forward runs for the first time inside backward, so its first pass ran without "
                "gradients, as the default sub-net: the whole model is inside a reentrant checkpoint; pass "
                "use_reentrant=False, or wrap the module around it"
            )
        if self._is_training():
            self.check_allowed()
            self.refuse("the model in training mode", "leave the block, or call model.eval() first")
        self._running = True
        self._step.mend()
        if self._is_training():
            self._check_sharding()
            check_every_rank_goes_on(self._parts.model)
            self._parts.sampled.begin(self._step.number)
            self._step.begin()
            form = Form.PROBE if self._parts.gradients.captures else Form.COMPUTE
            activation.put_on(self._step.scheduled, form, compiling=compiling)
        else:
            self._passing = self._passing or activation.worn != self._parts.default
            activation.put_on(self._parts.default, compiling=compiling)

    def after_forward(self, raised: bool) -> Mark | None:
        """Keep the sub-net on for backward after a training forward; take it off otherwise."""
        activation = self._parts.activation
        self._running = False
        activation.hide(False)
        if self._hands_off():
            return None
        mark = activation.mark() if torch.is_grad_enabled() and not raised else None
        all_dropped = mark is None and self._graphs == (activation.episode, 0)
        if raised or self._passing or all_dropped:
            self._passing = False
            activation.take_off()
        if mark is not None:
            self._graphs = mark.episode, 1 + (self._graphs[1] if self._graphs[0] == mark.episode else 0)
        return mark

    def before_backward(self, passed: Mark) -> None:
        """Put on again what was on in the forward, if it was taken off since; tell micro-batches from new attempts."""
        self._parts.gradients.forget_cleared()
        if not self._chosen:
            self._parts.activation.rewind(passed)
        if passed.small is not None and passed.small.is_passed_by():
            self._passed_by = passed.small
        if torch.is_grad_enabled():  # create_graph: the end of this backward is not reported
            self._parts.activation.deliver_at_once(passed.small)

    def after_backward(self, completed: bool) -> None:
        """Make the model dense again and mask the gradients that have arrived."""
        self._parts.activation.deliver()
        if not self._chosen:
            self._parts.activation.take_off()
        if completed:
            self._step.backward_ended()

    def end_of_backward_unseen(self) -> None:
        """Mask gradients as they arrive: their end cannot be told."""
        self._parts.gradients.attach()
        self._parts.activation.deliver_at_once()

    def graph_dropped(self, passed: Mark) -> None:
        """Make the model dense again after a forward that is never followed by backward: a skipped batch.

        May be called at any moment at which memory is freed.
        """
        if self._graphs[0] != passed.episode:
            return
        self._graphs = passed.episode, self._graphs[1] - 1
        is_on = self._parts.activation.episode == passed.episode and not self._chosen
        # Freed in the middle of the next forward, by the garbage collector for example, it is on for that one, too.
        if self._graphs[1] == 0 and is_on and not self._running and current_backward() == NO_BACKWARD:
            self._parts.activation.take_off()

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Update masks and correct gradients now, or after a closure has run its own forward and backward."""
        self.refuse("optimizer.step()", "leave the block before training goes on")
        self._parts.activation.deliver()
        self._parts.activation.take_off()
        passed_by, self._passed_by = self._passed_by, None
        if passed_by is not None:
            passed_by.check_arrived(self._parts.optimizer)
        # args holds the optimizer itself first.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._step.prepare()
            return None
        if not self._parts.sampled.heard(self._step.number):
            self.explore(closure)
        prepared = self._step.around(self._on_resting_weights(closure))
        if len(args) > 1:
            return (args[0], prepared, *args[2:]), kwargs
        return args, {**kwargs, "closure": prepared}

    def after_step(self) -> None:
        """Settle what the step left behind and schedule the next sub-net."""
        self._step.finish()

    def before_state_access(self) -> None:
        """Make the model dense, unless the user chose a sub-net to look at, or looks from inside its forward."""
        if self._is_inside_forward():
            return
        if self._chosen:
            self._parts.activation.show()
        else:
            self._step.rest()

    def after_state_access(self) -> None:
        """Let a step in progress go on."""
        if not self._chosen:
            self._step.go_on()

    def before_part_access(self) -> None:
        """Make the model dense, but inside its forward; a step in progress has it so."""
        if self._is_inside_forward():
            return
        if self._chosen:
            self._parts.activation.show()
        else:
            self._step.settle_unless_stepping()

    def before_copy(self) -> None:
        """Do the same for a copy, which inside a forward would take along what stands in for weights."""
        if self._parts.activation.stands_in and self._is_inside_forward():
            raise ActivationError(
                "the model is copied inside its own forward, in which smaller weights stand in for its own; copy it "
                'between steps, or compute with masked weights: slicing="off"'
            )
        self.before_part_access()

    def after_load(self) -> None:
        """Start all sub-nets from BatchNorm state that is loaded before the first step, as from that found by wrap."""
        if self._step.number == 0 and not self._state.restored:
            self._parts.normalization.start_from_present()

    def before_load(self) -> None:
        """Make the model dense; inside a block, what is loaded would be lost at its end."""
        if self.block is not None:
            raise ActivationError(
                f"a state dict is being loaded inside `with {self.block}`, at whose end the earlier weights come back; "
                "leave the block first"
            )
        if not self._is_inside_forward():
            self._step.settle()

    def add_state(self, state_dict: dict[str, Any]) -> None:
        """Put the run's state into the optimizer's state dict, unless it is kept elsewhere."""
        if not self.state_in_optimizer:
            self.after_state_access()
            return
        with self.at_rest():
            state_dict[KEY] = self._state.collect()
        self.after_state_access()

    def take_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the run's state out of an optimizer's state dict; one without is taken as it is."""
        self.before_load()
        if KEY not in state_dict:
            return state_dict
        if self._fits_optimizer(state_dict):
            self._state.restore(state_dict[KEY])
        return {key: value for key, value in state_dict.items() if key != KEY}

    def _fits_optimizer(self, state_dict: dict[str, Any]) -> bool:
        """Return whether torch will accept the state dict; if not, it raises right after, and the run must not move."""
        saved = [len(group["params"]) for group in state_dict.get("param_groups", ())]
        return saved == [len(group["params"]) for group in self._parts.optimizer.param_groups]

    def _hands_off(self) -> bool:
        """Return whether a forward is none of the run's business."""
        if self._chosen or self._parts.parameters.lent():
            return True
        # Activation checkpointing around the whole model runs it again; before_backward has put on what it needs.
        return current_backward() != NO_BACKWARD and self._parts.activation.worn is not None

    def _on_resting_weights(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that refuses a step which moved weights before it asked for their gradients.

        What is private to a sub-net, and what must not move, is settled once the gradients are there: too late then.
        """
        parts = self._parts
        names = [*parts.normalization.parameter_names, *(parts.parameters if parts.inactive is not None else ())]
        before = self._versions(names)

        def evaluate() -> Any:
            nonlocal before
            if before and before != self._versions(names):
                raise ActivationError(
                    f"{type(parts.optimizer).__name__} moved weights before it called the closure, so neither "
                    "BatchNorm state nor frozen weights of the sub-nets can be kept apart; use an optimizer that calls "
                    'the closure first, or private_normalization=False and inactive="coast"'
                )
            before = {}
            return closure()

        return evaluate

    def _versions(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self._parts.bare.get_parameter(name)._version for name in names}

    def _check_sharding(self) -> None:
        """Notice ``fully_shard`` after `wrap`: its hook would run first, and masks would be put on a passing copy."""
        if is_sharding_module(self._parts.bare) and not self._parts.sharded:
            raise ActivationError(
                "fully_shard() was applied to the model after wrap(); shard the model first, then construct the "
                "optimizer, then call wrap()"
            )

    def _is_training(self) -> bool:
        return self._parts.bare.training and torch.is_grad_enabled()
