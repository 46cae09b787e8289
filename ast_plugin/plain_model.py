"""A copy of a model that holds one sub-net and nothing of this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError, ElasticFileError
from ast_plugin.slots import bare_model, plain_name

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def plain_copy(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Return an independent copy of a model with the values of a state dict.

    Args:
        model: The architecture. It is not changed; wrappers for compilation and data-parallel use are left out of the
            copy.
        name: The sub-net, for the error.
        state: Its state dict.

    Raises:
        ConfigError: If `model` is no module.
        ElasticFileError: If the sub-net does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}; give the architecture")
    values = {plain_name(key): tensor for key, tensor in state.items()}
    with torch.inference_mode(False):
        plain = copy.deepcopy(bare_model(model))
        for module in plain.modules():
            _remove_our_hooks(module)
        present = {plain_name(key): key for key in plain.state_dict()}
        try:
            plain.load_state_dict({present.get(key, key): tensor for key, tensor in values.items()})
        except RuntimeError as error:
            raise ElasticFileError(
                f"sub-net {name!r} does not fit the model: {error}; build the model as it was in training"
            ) from error
    return plain


def _remove_our_hooks(module: nn.Module) -> None:
    # A copied model carries the controller's hooks with nothing behind them; pickled whole, it would need this package.
    for place in HOOKS:
        hooks = getattr(module, place, {})
        for key, hook in list(hooks.items()):
            function = getattr(hook, "hook", hook)  # torch wraps some kinds
            origin = getattr(function, "__module__", None) or ""
            if origin.partition(".")[0] == "ast_plugin":
                del hooks[key]
