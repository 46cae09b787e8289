"""The state of a run as tensors and plain containers: what resume needs beside the model's and optimizer's own.

Random choices depend on seed and step alone, so there is no generator state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import StateError
from ast_plugin.parts import RunParts

if TYPE_CHECKING:
    from ast_plugin.step import TrainingStep

KEY = "ast_plugin"
FORMAT = 1


def collect(parts: RunParts, step: TrainingStep, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the state of a run at rest.

    Args:
        parts: The run's components.
        step: Its step counter.
        metrics: Measured figures by sub-net.

    Returns:
        Plain containers and tensors; masks are packed, eight weights a byte.
    """
    return {
        "format": FORMAT,
        "step": step.number,
        "last_steps": dict(step.last_steps),
        "sub_nets": list(parts.names),
        "default_sub_net": parts.default,
        "shapes": {name: list(shape) for name, shape in parts.masks.shapes.items()},
        "masks": {name: parts.masks.pack(name) for name in parts.names},
        "normalization": parts.normalization.state_dict(),
        "reference": parts.reference.state_dict(),
        "statistics": parts.statistics.state_dict(),
        "metrics": {name: dict(figures) for name, figures in metrics.items()},
        "config": parts.config.to_dict(),
    }


def restore(
    parts: RunParts, step: TrainingStep, metrics: dict[str, dict[str, float]], state: Mapping[str, Any]
) -> None:
    """Bring a run to a saved state; the model is expected to carry the default's BatchNorm state.

    Args:
        parts: The run's components; changed in place.
        step: Its step counter; changed in place.
        metrics: Measured figures; changed in place.
        state: What `collect` returned.

    Raises:
        StateError: If the state does not fit; nothing has been changed then.
    """
    _check(parts, state)
    for name in parts.names:
        parts.masks.unpack(name, state["masks"][name])
        for parameter_name, parameter in parts.parameters.items():
            parts.masks.set(name, parameter_name, parts.masks.get(name, parameter_name).to(parameter.device))
    parts.normalization.load_state_dict(state["normalization"])
    parts.reference.load_state_dict(state["reference"])
    parts.statistics.load_state_dict(state["statistics"])
    for name in parts.names:
        metrics[name] = dict(state["metrics"].get(name, {}))
    step.restore(int(state["step"]), state["last_steps"])


def _check(parts: RunParts, state: Mapping[str, Any]) -> None:
    version = state.get("format")
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
    saved_private = {n for tensors in state["normalization"]["tensors"].values() for n in tensors}
    if len(parts.names) > 1 and saved_private != set(parts.normalization.names):
        raise StateError(
            "the saved state and this run differ in their private BatchNorm tensors "
            f"({len(saved_private)} saved, {len(parts.normalization.names)} here); use the same model and "
            "private_normalization"
        )
