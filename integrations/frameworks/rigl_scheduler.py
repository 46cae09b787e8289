"""What a `RigLScheduler` of rigl-torch has put on a model and an optimizer: read, taken off, put back."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError, MissingExtraError, SelectionError, StateError, WrapError
from ast_plugin.optimizers import innermost_optimizer
from ast_plugin.parameters import select_parameters
from ast_plugin.slots import bare_model

TESTED = "0.5"
INSTALL = "pip install --no-deps rigl-torch==0.5.2"

_SAVED = ("S", "N", "step", "backward_masks", "hyperparams")
_SETTINGS = ("delta_T", "alpha", "T_end", "static_topo")
_NEEDED = ("W", "S", "backward_masks", "backward_hook_objects", "step", "delta_T", "alpha", "T_end", "static_topo")
_MARK = "_has_rigl_backward_hook"
_PATCHED = "_create_step_wrapper.<locals>._wrapped_step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigLRun:
    """Where a run of rigl-torch stands.

    Attributes:
        masks: By parameter name in the bare model, bool, True = kept; layers that it keeps dense have none.
        asked: The sparsity that rigl-torch gives each of these layers, in (0, 1).
        count: How many times the scheduler has been called.
        delta: Calls from one mask update to the next.
        alpha: Share of the kept weights that the first mask update replaces.
        end: The call from which on masks stay, None where they always do (``static_topo``).
        take_over: Takes rigl-torch off a model and its optimizer; returns what puts it back.
    """

    masks: dict[str, Tensor]
    asked: float
    count: int
    delta: int
    alpha: float
    end: int | None
    take_over: Callable[[torch.optim.Optimizer, nn.Module], Callable[[], None]]


def running(scheduler: Any) -> RigLRun:
    """Return where the run of a live scheduler stands.

    Raises:
        ConfigError: If it is no scheduler of rigl-torch, or has no masks.
        MissingExtraError: If it is one of another version.
    """
    kinds = [kind for kind in type(scheduler).__mro__ if kind.__name__ == "RigLScheduler"]
    if not any(kind.__module__.partition(".")[0] == "rigl_torch" for kind in kinds):
        raise ConfigError(
            f"scheduler must be a RigLScheduler of rigl-torch, or the dict of its state_dict(), got "
            f"{type(scheduler).__name__}"
        )
    missing = [name for name in _NEEDED if not hasattr(scheduler, name)]
    _check_version(missing)
    owner = bare_model(scheduler.model)
    masks = _named(owner, scheduler.W, scheduler.S, scheduler.backward_masks)
    return RigLRun(
        masks=masks,
        asked=max(scheduler.S),
        **_settings(scheduler.step, scheduler.delta_T, scheduler.alpha, scheduler.T_end, scheduler.static_topo),
        take_over=_Live(scheduler, masks).take_over,
    )


def saved(state: Mapping[str, Any], model: nn.Module | None) -> RigLRun:
    """Return where a run stood when its scheduler's state was saved.

    Raises:
        ConfigError: If it is the state of something else, or there is no model.
        MissingExtraError: If rigl-torch is not installed, or has another version.
        StateError: If the masks do not fit the model.
    """
    settings = state.get("hyperparams")
    settings = settings if isinstance(settings, Mapping) else {}
    missing = [name for name in _SAVED if name not in state] or [name for name in _SETTINGS if name not in settings]
    if missing:
        raise ConfigError(
            f"scheduler is a dict without {missing[0]!r}, and so no state of a RigLScheduler; give what its "
            "state_dict() returned"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError("a saved state of rigl-torch has masks without names; pass model=, whose weights they are of")
    _check_version([])
    try:
        weights_of = importlib.import_module("rigl_torch.util").get_W
    except ImportError as error:
        raise MissingExtraError(
            "a saved state of rigl-torch lists masks in the order in which the package 'rigl-torch' finds layers, and "
            f"that cannot be imported ({error}); install it with: {INSTALL}"
        ) from None
    bare = bare_model(model)
    return RigLRun(
        masks=_named(bare, weights_of(bare), state["S"], state["backward_masks"]),
        asked=max(state["S"]),
        **_settings(state["step"], settings["delta_T"], settings["alpha"], settings["T_end"], settings["static_topo"]),
        take_over=_take_over_nothing,
    )


def _settings(count: int, delta: int, alpha: float, end: int | None, static: bool) -> dict[str, Any]:
    if not static and end is None:
        raise ConfigError("the RigLScheduler has T_end=None, with which it fails at its first call; give it a T_end")
    return {"count": int(count), "delta": int(delta), "alpha": float(alpha), "end": None if static else int(end or 0)}


def _named(
    model: nn.Module, weights: Sequence[Tensor], sparsities: Sequence[float], masks: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Return copies of the masks by parameter name, without those of what is never pruned."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not len(weights) == len(sparsities) == len(masks):
        raise StateError(
            f"rigl-torch has masks of {len(masks)} layers, and finds {len(weights)} in this {type(model).__name__}; "
            "give the model that they were made for"
        )
    found: dict[str, Tensor] = {}
    for weight, sparsity, mask in zip(weights, sparsities, masks, strict=True):
        if sparsity <= 0 or mask is None:
            continue
        name = names.get(id(weight))
        if name is None:
            raise StateError(
                f"rigl-torch masks a weight of shape {tuple(weight.shape)} that is no parameter of "
                f"{type(model).__name__}; give the model that it was registered on, with the parameters of then"
            )
        if mask.shape != weight.shape:
            raise StateError(
                f"rigl-torch's mask of {name!r} has shape {tuple(mask.shape)}, and the weight {tuple(weight.shape)}; "
                "give the model that the masks were made for"
            )
        if name in found:
            raise StateError(f"rigl-torch has two masks of {name!r}, which several layers share; untie them before it")
        found[name] = mask.detach().bool().clone()
    return _without_unprunable(model, found)


def _without_unprunable(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    if not masks:
        raise ConfigError("rigl-torch has no mask at all: dense_allocation=1; use wrap(...) with sparsities of its own")
    reasons = {choice.name: choice.reason for choice in select_parameters(model)}
    whole = {name: reasons[name] for name in masks if not _is_prunable(model, name)}
    if whole:
        shown = ", ".join(f"{name} ({reason})" for name, reason in whole.items())
        warnings.warn(
            f"rigl-torch also has masks of {shown}; they stay whole from here on, and their zeros are trained again",
            UserWarning,
            stacklevel=5,
        )
    return {name: mask for name, mask in masks.items() if name not in whole}


def _is_prunable(model: nn.Module, name: str) -> bool:
    """Return whether a weight is pruned where it is asked for by its name."""
    try:
        select_parameters(model, include=(name,))
    except SelectionError:
        return False
    return True


class _Live:
    """A scheduler on its way from its hooks into a run.

    Args:
        scheduler: The scheduler.
        masks: Those of its masks that are taken over, by name.
    """

    def __init__(self, scheduler: Any, masks: Mapping[str, Tensor]) -> None:
        self._scheduler = scheduler
        self._count = scheduler.step
        self._names = tuple(masks)

    def take_over(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Callable[[], None]:
        """Remove the scheduler's hooks and its optimizer step; return what puts them back.

        Raises:
            ConfigError: If it works on another model or optimizer, or has been called since.
            WrapError: If it was taken over before, or its step is inside another replacement.
        """
        scheduler = self._scheduler
        theirs = {id(parameter) for parameter in bare_model(scheduler.model).parameters()}
        if not all(id(model.get_parameter(name)) in theirs for name in self._names):
            raise ConfigError("the RigLScheduler was registered on another model; wrap the one that it has")
        if innermost_optimizer(scheduler.optimizer) is not optimizer:
            raise ConfigError("the RigLScheduler steps another optimizer; wrap the one that it has")
        if scheduler.step != self._count:
            raise ConfigError(
                f"the RigLScheduler went on from call {self._count} to {scheduler.step} since take_over(); call "
                "take_over() right before wrap"
            )
        places = self._places()
        inner = self._inner_step()
        stepped: Any = scheduler.optimizer
        patched, static = vars(stepped)["step"], scheduler.static_topo
        for weight, key, _ in places:
            (weight._backward_hooks or {}).pop(key)
            delattr(weight, _MARK)
        is_own = getattr(inner, "__self__", None) is stepped
        if is_own:
            del stepped.step
        else:  # a learning rate scheduler had replaced it before
            stepped.step = inner
        scheduler.static_topo = True  # a call that stays in the loop answers True and changes nothing

        def undo() -> None:
            for weight, _, hook in places:
                weight.register_hook(hook)
                setattr(weight, _MARK, True)
            stepped.step = patched
            scheduler.static_topo = static

        return undo

    def _places(self) -> list[tuple[Tensor, int, Any]]:
        """Return where its hooks are: weight, key and hook."""
        places = []
        for weight, hook in zip(self._scheduler.W, self._scheduler.backward_hook_objects, strict=True):
            if hook is None:
                continue
            hooks = weight._backward_hooks or {}
            key = next((key for key, value in hooks.items() if value is hook), None)
            if key is None:
                raise WrapError(
                    "the RigLScheduler has lost its hooks on the model's weights: it was taken over before, or the "
                    "model was copied, or its weights were replaced; give the scheduler that is at work"
                )
            places.append((weight, key, hook))
        return places

    def _inner_step(self) -> Any:
        """Return what the scheduler's replacement of ``optimizer.step`` calls."""
        step = vars(self._scheduler.optimizer).get("step")
        if isinstance(step, types.FunctionType) and step.__qualname__ == _PATCHED:
            cells = dict(zip(step.__code__.co_freevars, step.__closure__ or (), strict=True))
            if cells["scheduler"].cell_contents is self._scheduler:
                return cells["_unwrapped_step"].cell_contents
        raise WrapError(
            "optimizer.step was replaced once more after the RigLScheduler did, and cannot be given back; take the run "
            "over before that"
        )


def _take_over_nothing(optimizer: torch.optim.Optimizer, model: nn.Module) -> Callable[[], None]:
    """Refuse a model that a scheduler is still at work on, where there is a saved state alone.

    Raises:
        ConfigError: If there is one.
    """
    if any(getattr(parameter, _MARK, False) for parameter in model.parameters()):
        raise ConfigError(
            "a RigLScheduler is at work on this model; give take_over that scheduler itself, not its saved state"
        )
    return lambda: None


def _check_version(missing: Sequence[str]) -> None:
    try:
        version = importlib.metadata.version("rigl-torch")
    except importlib.metadata.PackageNotFoundError:  # in the path, not installed
        version = TESTED
    if missing or not f"{version}.".startswith(f"{TESTED}."):
        what = f"its RigLScheduler has no {missing[0]!r}" if missing else f"what is known here is {TESTED}"
        raise MissingExtraError(f"rigl-torch {version} is installed, and {what}; install with: {INSTALL}")
