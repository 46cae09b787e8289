"""Hooks on the user's own model and optimizer: public torch hooks only, no subclass, no wrapper, all removable.

The model gets a forward pre-hook, a forward hook and state-dict hooks; the optimizer gets step and state-dict hooks.
What they report is described by `TrainingEvents`. Copies of the model (``copy.deepcopy``, pickling) carry hooks that
do nothing, so they are ordinary dense models.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ast_plugin.attachment_events import TrainingEvents
from ast_plugin.sliced_routes import is_tracing

_F = TypeVar("_F", bound=Callable[..., Any])

NO_BACKWARD = -1
_CALL = nn.Module.__call__.__code__
_OUTSIDE = (  # what the compiler says where it may not leave the hooks out
    "ast_plugin puts sub-nets on outside of graphs: with fullgraph=True compile the model before wrap(); to export a "
    "sub-net use ast_plugin.export_graph.export_program"
)

_attached: weakref.WeakSet[object] = weakref.WeakSet()


class Attachment:
    """The registered hooks of one controller.

    Args:
        called: The outermost module that the training loop calls.
        model: The network inside it; `called` where nothing is around it.
        bare: The module inside wrappers for compilation and data-parallel use. Evaluation may call any of the three by
            itself.
        optimizer: The torch optimizer whose ``step`` really runs.
        events: Who is told.
    """

    def __init__(
        self,
        called: nn.Module,
        model: nn.Module,
        bare: nn.Module,
        optimizer: torch.optim.Optimizer,
        events: TrainingEvents,
    ) -> None:
        self._called = called
        self._model = model
        self._events = events
        self._backward = NO_BACKWARD
        hook = functools.partial(_ModelHook, before_copy=events.before_copy)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(_uncompiled(lambda _, args, kwargs: events.before_step(args, kwargs))),
            optimizer.register_step_post_hook(_uncompiled(lambda *_: events.after_step())),
            optimizer.register_state_dict_pre_hook(lambda _: events.before_state_access()),
            optimizer.register_state_dict_post_hook(lambda _, state: events.add_state(state)),
            optimizer.register_load_state_dict_pre_hook(lambda _, state: events.take_state(state)),
        ]
        for module in {called, model, bare}:
            within = module is not called
            before = _outside_graphs(self._before_forward) if within else _told_of_graphs(self._before_forward)
            after = _outside_graphs(self._after_forward) if within else _uncompiled(self._after_forward)
            self._handles += [
                module.register_forward_pre_hook(hook(before), prepend=True),
                module.register_forward_hook(hook(after), always_call=True),
            ]
        for module in {called, model, bare}:
            self._handles += [
                module.register_state_dict_pre_hook(hook(self._before_state_access)),
                module.register_state_dict_post_hook(hook(self._after_state_access)),
                module.register_load_state_dict_pre_hook(hook(self._before_load)),
            ]
        for module in model.modules():
            if module not in (called, model, bare):
                self._handles += [
                    module.register_state_dict_pre_hook(hook(lambda *_: events.before_part_access())),
                    module.register_load_state_dict_pre_hook(hook(self._before_load)),
                ]
            self._handles.append(module.register_load_state_dict_post_hook(hook(self._after_load)))
        self._stateful = (called, model, bare)
        self._loading: tuple[nn.Module, object] | None = None  # the outermost module, and what all in its load have
        # Not all that the outermost module holds: a teacher or a moving average beside the network is free.
        self._claimed = (optimizer, called, *model.modules())
        _attached.update(self._claimed)

    def remove(self) -> None:
        """Remove every hook."""
        for claimed in self._claimed:
            _attached.discard(claimed)
        self._claimed = ()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_forward(self, module: nn.Module, *_: Any, compiling: bool = False) -> None:
        if self._is_outermost(module):
            self._events.before_forward(compiling or is_tracing())
        elif module.training and torch.is_grad_enabled():  # perhaps by a loop that knows of no module around it
            self._events.check_allowed()

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._is_outermost(module):
            passed = self._events.after_forward(output is None)
            if passed is not None:
                self._report_backward(output, passed)

    def _is_outermost(self, module: nn.Module) -> bool:
        """Return whether a forward is one to act on: of the called module, or of the network evaluated by itself."""
        if module is self._called:
            return True
        training = module.training and torch.is_grad_enabled()
        return not training and not any(
            is_running(other) for other in (self._called, self._model) if other is not module
        )

    def _before_state_access(self, module: nn.Module, *_: Any) -> None:
        if module in self._stateful:
            self._events.before_state_access()

    def _after_state_access(self, module: nn.Module, *_: Any) -> None:
        if module in self._stateful:
            self._events.after_state_access()

    def _before_load(self, module: nn.Module, *args: Any) -> None:
        errors = args[-1]  # one list in all that one call loads; an earlier one may have been refused or broken off
        within = self._loading is not None and self._loading[1] is errors
        if not within or module in self._stateful:  # what is inside is loaded with it
            self._events.before_load()
            self._loading = module, errors

    def _after_load(self, module: nn.Module, *_: Any) -> None:
        if self._loading is not None and module is self._loading[0]:
            self._loading = None
            self._events.after_load()

    def _report_backward(self, output: Any, passed: object) -> None:
        # A parameter that the model hands out outlives the graph, and its hooks would add up.
        tensors = [tensor for tensor in _tensors(output) if tensor.grad_fn is not None]
        if not tensors:
            self._events.end_of_backward_unseen()
            return
        began = _BackwardBegan(self._backward_began, passed)
        weakref.finalize(began, self._events.graph_dropped, passed).atexit = False
        for tensor in tensors:
            tensor.register_hook(began)

    def _backward_began(self, passed: object) -> None:
        # From the outermost graph: queued inside a nested backward (reentrant checkpointing) it would come early.
        backward = current_backward()
        if self._backward != backward:  # several outputs, or several forwards, in one backward
            self._backward = backward
            self._events.before_backward(passed)
            if not torch.is_grad_enabled():  # create_graph: a second backward through this one needs the same weights
                _queue(_EndOfBackward(self._events.after_backward))


def current_backward() -> int:
    """Return a number that no other backward pass of this process has, `NO_BACKWARD` outside of any."""
    return torch._C._current_graph_task_id()


def is_stepping(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this is called from within the optimizer's step, and not after one that was broken off."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def is_running(module: nn.Module) -> bool:
    """Return whether this is called from within the module's forward, and not after one that was broken off."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def is_attached(thing: nn.Module | torch.optim.Optimizer) -> bool:
    """Return whether an optimizer or some part of a model belongs to a controller already."""
    if isinstance(thing, nn.Module):
        return any(module in _attached for module in thing.modules())
    return thing in _attached


class _BackwardBegan:
    """A hook on the outputs of one forward; it lives as long as the graph behind any of them."""

    def __init__(self, report: Callable[[object], None], passed: object) -> None:
        self._report = report
        self._passed = passed

    def __call__(self, _: Tensor) -> None:
        self._report(self._passed)


class _EndOfBackward:
    """Reports once: when the autograd engine calls it the second time, or drops it because backward raised.

    Data-parallel modules put averaged gradients in place by callbacks of their own, queued during backward. Queued
    once more when backward has ended, this one comes after them.
    """

    def __init__(self, report: Callable[[bool], None]) -> None:
        self._report: Callable[[bool], None] | None = report
        self._last = False

    def __call__(self) -> None:
        if self._last:
            self._finish(True)
        else:
            self._last = True
            _queue(self)

    def __del__(self) -> None:
        self._finish(False)

    def _finish(self, completed: bool) -> None:
        report, self._report = self._report, None
        if report is not None:
            report(completed)


def _queue(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


class _ModelHook:
    """A module hook that stays behind when the module is copied or pickled, and has it made dense first."""

    def __init__(self, function: Callable[..., None], before_copy: Callable[[], None]) -> None:
        self._function = function
        self._before_copy = before_copy

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        self._before_copy()  # a module's hooks are copied before the modules inside it
        return _idle_hook, ()


def _idle_hook() -> Callable[..., None]:
    return _idle


def _idle(*_: Any, **__: Any) -> None:
    """Do nothing: what a copied model carries in place of a hook."""


def _uncompiled(function: _F) -> _F:
    # Traced into a graph, the hook would run once instead of at every step, or be compiled anew at each.
    known = inspect.signature(torch.compiler.disable).parameters
    disabled: _F = torch.compiler.disable(function, **({"reason": _OUTSIDE} if "reason" in known else {}))  # torch 2.7
    return disabled


def _told_of_graphs(function: _F) -> _F:
    """Return a hook that is left out of graphs, and tells its function whether it stands in what is being compiled."""
    disabled = _uncompiled(function)

    def hook(*args: Any) -> None:
        disabled(*args, compiling=torch.compiler.is_compiling())

    return cast(_F, hook)


def _outside_graphs(function: _F) -> _F:
    """Return a hook for a module that may stand inside a compiled graph, where it leaves no trace."""
    disabled = _uncompiled(function)

    def hook(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            disabled(*args)

    return cast(_F, hook)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Find the tensors in what a model returned: containers, mappings, dataclasses and plain objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
    elif hasattr(output, "__dict__") and not isinstance(output, (type, nn.Module)):
        for value in vars(output).values():
            if isinstance(value, (Tensor, Mapping, list, tuple)):
                yield from _tensors(value)
