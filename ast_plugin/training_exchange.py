"""The state of a run in a form whose entries are the same at every step.

`torch.distributed.checkpoint` reads a checkpoint into the entries that a fresh run has: what a fresh run lacks is
left out without a word, and a tensor of another size is refused. So whatever comes and goes in the course of a run
(the reference gradient, optimizer state, counters) is one entry of bytes, which it takes as it is. Reference
gradients of sharded parameters are too large for that: they are entries of their own, zero where there is none.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import StateError
from ast_plugin.sharding import gathered

_SAME_AT_EVERY_STEP = ("format", "step", "last_steps", "sub_nets", "default_sub_net", "masks")
_REST = "rest"
_GRADIENTS = "reference_gradients"


def with_fixed_entries(state: Mapping[str, Any], sharded: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the state with everything that changes its shape in the course of a run as bytes.

    Args:
        state: What `RunState.collect` returned.
        sharded: Sharded parameters that a reference gradient may be remembered of. Where there are any, this is a
            collective: the small tensors among the bytes are gathered.

    Returns:
        Tensors and plain containers; under ``rest`` the bytes that `torch.save` writes.
    """
    rest = {key: value for key, value in state.items() if key not in _SAME_AT_EVERY_STEP}
    fixed = {key: state[key] for key in _SAME_AT_EVERY_STEP}
    if sharded:
        gradients = rest["reference"]["gradients"]
        fixed[_GRADIENTS] = {name: gradients.get(name, torch.zeros_like(p.detach())) for name, p in sharded.items()}
        others = {name: gradient for name, gradient in gradients.items() if name not in sharded}
        rest["reference"] = {
            **rest["reference"],
            "gradients": others,
            "sharded": [n for n in gradients if n in sharded],
        }
    buffer = io.BytesIO()
    torch.save(gathered(rest), buffer)
    return {**fixed, _REST: buffer.getvalue()}


def without_optimizer_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state without what an optimizer knew of private BatchNorm, for an optimizer that starts anew.

    Args:
        state: Of either form, with fixed entries or plain ones.

    Returns:
        The state with plain entries; one that is damaged as it is, because loading it says what is wrong.

    Raises:
        StateError: If its bytes cannot be read.
    """
    plain = with_plain_entries(state)
    normalization = plain.get("normalization") if isinstance(plain, Mapping) else None
    entries = normalization.get("optimizer") if isinstance(normalization, Mapping) else None
    if not isinstance(normalization, Mapping) or not isinstance(entries, Mapping):
        return plain
    return {**plain, "normalization": {**normalization, "optimizer": {name: {} for name in entries}}}


def with_plain_entries(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `with_fixed_entries` was given; a state without ``rest`` is returned as it is.

    Raises:
        StateError: If the bytes cannot be read.
    """
    if not isinstance(state, Mapping) or _REST not in state:
        return state
    try:
        rest = torch.load(io.BytesIO(state[_REST]), weights_only=True)
        for name in rest["reference"].pop("sharded", ()):
            rest["reference"]["gradients"][name] = state[_GRADIENTS][name]
        return {**{key: value for key, value in state.items() if key not in (_REST, _GRADIENTS)}, **rest}
    except Exception as error:  # what the reader of torch raises depends on where the damage is, and gives bad advice
        raise StateError(
            f"the saved state is damaged in its entry {_REST!r} ({type(error).__name__}); load another checkpoint"
        ) from error
