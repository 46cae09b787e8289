"""The state of a run as tensors and plain containers: what resume needs beside the model's and optimizer's own.

Random choices depend on seed and step alone, so there is no generator state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, StateError
from ast_plugin.masks import MaskStore
from ast_plugin.parts import RunParts
from ast_plugin.schedules import resolve_calendars
from ast_plugin.sharded_masks import ShardedMasks
from ast_plugin.sharding import full, gathered, is_sharded, local_part
from ast_plugin.statistics import Statistics
from ast_plugin.training_plugins import PluginStates, warn_of_left_out
from ast_plugin.versions import LAST

if TYPE_CHECKING:
    from ast_plugin.step import TrainingStep

KEY = "ast_plugin"
FORMAT = 2

_VERSIONS = "version_metrics"


class RunState:
    """Collects and restores the state of one run.

    Args:
        parts: The run's components.
        step: Its step counter.
        metrics: Measured figures by version, by sub-net; changed in place by `restore`.

    Attributes:
        restored: Whether the run goes on from a saved state.
        cut_short: Whether that was saved in the middle of a longer run, at the step where this one ends.
        copies: Whether what plugins keep is copied for the moment, because it will not stay as it is now.
    """

    def __init__(self, parts: RunParts, step: TrainingStep, metrics: dict[str, dict[str, dict[str, float]]]) -> None:
        self._parts = parts
        self._step = step
        self._metrics = metrics
        self._plugins = PluginStates(parts.registry.stateful())
        self.restored = False
        self.cut_short = False
        self.copies = False

    def collect(self, *, whole: bool = False) -> dict[str, Any]:
        """Return the state of the run at rest: plain containers and tensors; masks packed, eight weights a byte.

        What belongs to sharded parameters is DTensors, masks of bool; nothing is communicated.

        Args:
            whole: Whether to gather these, a collective, so that the state is that of a model which is not sharded.
        """
        parts = self._parts
        packed = whole or not parts.sharded
        normalization, reference = parts.normalization.state_dict(), self._reference()
        return {
            "format": FORMAT,
            "step": self._step.number,
            "last_steps": dict(self._step.last_steps),
            "sub_nets": list(parts.names),
            "default_sub_net": parts.default,
            "shapes": {name: list(shape) for name, shape in parts.masks.shapes.items()},
            "masks": {name: parts.masks.pack(name) if packed else parts.masks.of(name) for name in parts.names},
            "normalization": gathered(normalization) if whole else normalization,
            "reference": gathered(reference) if whole else reference,
            "statistics": parts.statistics.state_dict(),
            "metrics": {name: dict(figures) for name, figures in self._metrics[LAST].items()},
            "config": parts.config.to_dict(),
            **parts.sampled.state_dict(),
            **self._plugins.collect(copied=self.copies),
            **self._metrics_of_versions(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Bring the run to a saved state; the model is expected to carry the default's BatchNorm state.

        Args:
            state: What `collect` returned.

        Raises:
            StateError: If the state does not fit, or is damaged; nothing has been changed then.

        Warns:
            UserWarning: If the run goes on with other settings than those it was saved with.
        """
        parts = self._parts
        try:
            _check(parts, state)
            masks = (
                ShardedMasks(parts.names, parts.parameters)
                if parts.sharded
                else MaskStore(parts.names, parts.masks.shapes)
            )
            for name in parts.names:
                masks.unpack(name, state["masks"][name])
            _check_channels(parts, masks)
            _check_reference(state["reference"], masks)
            statistics = Statistics(parts.names, window=1)
            statistics.load_state_dict(state["statistics"])
            number, last_steps = int(state["step"]), {name: state["last_steps"][name] for name in parts.names}
            metrics = {LAST: state["metrics"], **state.get(_VERSIONS, {})}
            metrics = {
                version: {name: dict(figures.get(name, {})) for name in parts.names}
                for version, figures in metrics.items()
            }
            parts.sampled.check_state(state)
            left_out = self._plugins.check(state)
            changed = _changed(state["config"], parts.config.to_dict())
            if changed:
                last_steps = _with_last_updates_due(parts, state["config"], last_steps)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StateError(
                f"the saved state is damaged or none of this package: {type(error).__name__}: {error}; load another "
                "checkpoint"
            ) from error
        _warn_of_other_settings(changed)  # here, because a warning may be made an error
        warn_of_left_out(left_out)
        self._plugins.load(state)  # first: what a plugin refuses is refused before anything else has changed
        if isinstance(parts.masks, ShardedMasks) and isinstance(masks, ShardedMasks):
            parts.masks.adopt(masks)
        else:
            for parameter_name, parameter in parts.parameters.items():
                for name in parts.names:
                    parts.masks.set(name, parameter_name, masks.get(name, parameter_name).to(parameter.device))
        parts.normalization.load_state_dict(state["normalization"])
        parts.reference.load_state_dict(self._parts_of_reference(state["reference"]))
        parts.statistics.load_state_dict(state["statistics"])
        parts.sampled.load_state_dict(state)
        self._metrics.clear()
        self._metrics.update(metrics)
        self.restored = True
        self.cut_short = number == parts.config.total_steps != state["config"].get("total_steps")
        self._step.restore(number, last_steps)

    def _metrics_of_versions(self) -> dict[str, Any]:
        others = {version: figures for version, figures in self._metrics.items() if version != LAST}
        found = {version: {name: dict(named) for name, named in figures.items()} for version, figures in others.items()}
        return {_VERSIONS: found} if found else {}

    def _reference(self) -> dict[str, Any]:
        """Return the reference; where parameters are sharded, as whole gradients of which every rank has a part."""
        parts = self._parts
        if not parts.sharded:
            return parts.reference.state_dict()
        reference = parts.reference.state_dict(whole=True)
        for name, gradient in reference["gradients"].items():
            layout = parts.layouts[name]
            if layout is not None:
                reference["gradients"][name] = layout.join(gradient)
        return reference

    def _parts_of_reference(self, reference: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a saved reference as this rank's parts of whole gradients."""
        parts, coming = self._parts, reference["coming"]
        if not parts.sharded:
            return reference
        gradients = {}
        for name, gradient in reference["gradients"].items():
            layout = parts.layouts[name]
            if coming is not None:
                values = gradient
                gradient = torch.zeros(parts.masks.shapes[name], dtype=values.dtype, device=values.device)
                gradient[full(parts.masks.get(coming, name)).to(values.device)] = values
            part = layout.part_of(gradient) if layout is not None and not is_sharded(gradient) else gradient
            gradients[name] = local_part(part)
        return {"sub_net": reference["sub_net"], "coming": None, "gradients": gradients}


def _check(parts: RunParts, state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or "format" not in state:
        keys = ", ".join(map(repr, list(state)[:3])) if isinstance(state, Mapping) else ""
        raise StateError(
            "the saved state must be what state_dict() of the controller returned, got "
            f"{type(state).__name__}{f' with {keys}' if keys else ''}; pass that, or what the optimizer's state dict "
            f"has under {KEY!r}"
        )
    version = state["format"]
    if version != FORMAT:
        raise StateError(
            f"the saved state has format {version!r}, this version reads {FORMAT}; resume with the ast-plugin version "
            "that wrote it"
        )
    saved = list(state["sub_nets"])
    if saved != list(parts.names):
        raise StateError(
            f"the saved state has the sub-nets {', '.join(saved)}, this run has {', '.join(parts.names)}; resume with "
            "the same sparsities in the same order"
        )
    if state["default_sub_net"] != parts.default:
        raise StateError(
            f"the saved state has the default sub-net {state['default_sub_net']!r}, this run has {parts.default!r}; "
            f"pass default_sub_net={state['default_sub_net']!r}"
        )
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    here = dict(parts.masks.shapes)
    if shapes != here:
        differences = [
            f"{name}: saved {shapes.get(name, 'not prunable')}, here {here.get(name, 'not prunable')}"
            for name in sorted({*shapes, *here})
            if shapes.get(name) != here.get(name)
        ]
        raise StateError(
            f"the saved state belongs to other prunable parameters ({len(differences)} differ: "
            f"{'; '.join(differences[:3])}); use the same model, include and exclude"
        )
    private, optimizer = state["normalization"]["tensors"], state["normalization"]["optimizer"]
    waiting = {name for name in parts.names if name != parts.default}
    if set(private) != waiting or set(optimizer) != waiting:
        raise StateError(
            f"the saved state has private BatchNorm tensors of {', '.join(sorted(private)) or 'no sub-net'}, and needs "
            f"them of {', '.join(sorted(waiting))}; it is damaged, load another checkpoint"
        )
    for name in sorted(waiting):
        if set(private[name]) != set(parts.normalization.names):
            raise StateError(
                "the saved state and this run differ in their private BatchNorm tensors "
                f"({len(private[name])} saved, {len(parts.normalization.names)} here); use the same model and "
                "private_normalization"
            )
        unknown = sorted(set(optimizer[name]) - set(parts.normalization.parameter_names))
        if unknown:
            raise StateError(
                f"the saved state has optimizer state of {unknown[0]!r}, which is no private BatchNorm parameter here; "
                "load a checkpoint of the same model"
            )
    if state["reference"]["sub_net"] not in (None, *parts.names):
        raise StateError(
            f"the saved state has a reference gradient of {state['reference']['sub_net']!r}, which is no sub-net of "
            "this run; it is damaged, load another checkpoint"
        )
    present = {name: tuple(tensor.shape) for name, tensor in parts.normalization.state(parts.default).items()}
    for tensors in private.values():
        _check_tensors("private BatchNorm tensor", tensors, present)


def _check_channels(parts: RunParts, masks: MaskStore) -> None:
    """Refuse masks of channel sub-nets that are not made of whole channels of this run's groups."""
    for name, plan in parts.updater.plans.items():
        if parts.groups is not None and plan.pattern.by_groups:
            saved = {parameter: full(mask) for parameter, mask in masks.of(name).items()}
            whole = parts.groups.masks(parts.groups.kept(saved), masks.shapes)
            for parameter, mask in saved.items():
                if not torch.equal(mask.cpu(), whole[parameter].cpu()):
                    raise StateError(
                        f"the saved masks of sub-net {name!r} do not drop whole channels of this run's groups in "
                        f"{parameter!r}; resume with the pattern, include, exclude and groups of that run"
                    )


def _check_reference(reference: Mapping[str, Any], masks: MaskStore) -> None:
    coming = reference["coming"]
    if coming is None:
        shapes = dict(masks.shapes)
    elif coming in masks.sub_nets:
        shapes = {name: (masks.kept(coming, name),) for name in masks.parameters}
    else:
        raise StateError(
            f"the saved state has a reference for {coming!r}, which is no sub-net of this run; load another checkpoint"
        )
    _check_tensors("reference gradient", reference["gradients"], shapes)


def _check_tensors(what: str, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        if shapes.get(name) != found:
            raise StateError(
                f"the saved state has a {what} {name!r} of shape {found}, this run has {shapes.get(name, 'none')}; "
                "load a checkpoint of the same model"
            )


def _changed(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    return [f"{name}={now!r} (saved: {saved.get(name)!r})" for name, now in present.items() if saved.get(name) != now]


def _with_last_updates_due(
    parts: RunParts, saved: Mapping[str, Any], last_steps: Mapping[str, int | None]
) -> dict[str, int | None]:
    """Return when sub-nets were last trained, just before their last mask update where they have it still to make.

    In a run that is shorter than it was planned the schedule may have ended before a step that was on the way there.
    """
    found = dict(last_steps)
    if not parts.updater.method.updates:
        return found
    try:
        planned = resolve_calendars(ASTConfig.from_dict(saved), len(parts.names))
    except ConfigError:  # by a method that updated no masks, in fewer steps than others need
        return found
    for plan, before in zip(parts.updater.plans.values(), planned, strict=True):
        last, end = last_steps[plan.name], plan.calendar.end
        if last is not None and end <= last < before.end:
            found[plan.name] = end - 1
    return found


def _warn_of_other_settings(changed: list[str]) -> None:
    if changed:
        warnings.warn(f"the run goes on with other settings than it was saved with: {', '.join(changed)}", stacklevel=2)
