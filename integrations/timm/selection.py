"""Which weights of timm's networks are pruned: what the networks say of themselves, and what timm's layers are.

Beside the core's rule (`ast_plugin.parameters.select_parameters`) this leaves out, each with its reason:

- every layer that reads the input, as ``pretrained_cfg["first_conv"]`` names them: several in networks with branches,
  a linear layer where patches are embedded by one, and with any number of input channels;
- depthwise convolutions: they hold 3.4 % of the weights of an EfficientNet-B0 and 1.7 % of a MobileNetV3-Large, 9 or 25
  a channel, and a channel whose few are dropped is gone;
- convolutions with standardized weights: the layer subtracts the mean from its weights, so that zeros among them are
  no zeros where they are used;
- layers that make up a relative position bias.

Classifiers and squeeze-excite layers are pruned like any other: the one is often the largest layer, the others hold
12 % of an EfficientNet-B0 and 28 % of a MobileNetV3-Large. Nothing here imports timm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.layers import class_names, convolution_reason, is_layer, is_standardized, outermost
from ast_plugin.parameters import ParameterChoice, select_parameters
from ast_plugin.slots import plain_name

_STEM = "input stem"
_RELATIVE = "relative position bias"
_SCALES = frozenset({"LayerScale", "LayerScale2d", "Scale"})
_POSITION_CLASSES = frozenset({"RelPosMlp"})
_POSITION_NAMES = frozenset({"cpb_mlp", "meta_mlp", "pos_proj"})

# Parameters that stand alone, by what timm calls them.
_NAMES = (
    (re.compile(r"cls_token\w*"), "class token"),
    (re.compile(r"dist_token"), "distillation token"),
    (re.compile(r"reg_token"), "register token"),
    (re.compile(r"mask_token"), "mask token"),
    (re.compile(r"pos_emb(ed\w*)?|position_embedding_table|patch_pos|pixel_pos"), "position embedding"),
    (re.compile(r"relative_position_bias_table|attention_biases|rel_pos_[hw]|(height|width)_rel"), _RELATIVE),
    (re.compile(r"gamma(_?\d|_xca)?|ls\d|layer_scale(_\d)?"), "layer scale"),
)


class TimmSelection:
    """Plugin that chooses the prunable parameters of timm's networks, and leaves others to the next one.

    A network is recognised by its class, or by the configuration that timm attaches to it, also inside a training task,
    a wrapper for data-parallel use or a larger model; the rules for timm's layers then hold inside it alone.
    """

    @hookimpl
    def ast_select_parameters(
        self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]
    ) -> list[ParameterChoice] | None:
        """Choose by layer and by what timm knows of the network.

        Args:
            model: The model, dense; it is only read.
            include: Globs on parameter names; stronger than every rule of this module.
            exclude: Globs on parameter names; stronger than `include`.

        Returns:
            One choice for every entry of ``model.named_parameters()``; None where no network of timm is inside.

        Raises:
            SelectionError: If a glob cannot be followed, or nothing is prunable.
        """
        networks = dict(timm_networks(model))
        if not networks:
            return None
        left_out: dict[str, str] = {}
        for name, network in networks.items():
            prefix = f"{name}." if name else ""
            left_out |= {prefix + parameter: reason for parameter, reason in timm_reasons(network).items()}
        return select_parameters(model, include=include, exclude=exclude, left_out=left_out)


def timm_networks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the networks of timm in `model` by name, itself under "", without those that are part of another.

    Args:
        model: Any module.
    """
    return outermost(model, _is_network)


def _is_network(module: nn.Module) -> bool:
    origins = (kind.__module__ for kind in type(module).__mro__)
    return _config(module) is not None or any(f"{origin}.".startswith("timm.models.") for origin in origins)


def _config(module: nn.Module) -> Mapping[str, Any] | None:
    """Return what timm says of a network: a mapping, or in some versions an object with the same names."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config: Any = getattr(module, attribute, None)
        if isinstance(config, Mapping) and "first_conv" in config:
            return config
        if hasattr(config, "first_conv"):
            return {"first_conv": config.first_conv}
    return None


def timm_reasons(network: nn.Module) -> dict[str, str]:
    """Return why parameters of a network of timm are left out, by name; the first reason that applies."""
    stems = {id(layer) for part in network.modules() for layer in _stems(part)}
    biases: list[str] = []
    reasons: dict[str, str] = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        kinds = class_names(module)
        if kinds & _POSITION_CLASSES or name.rpartition(".")[2] in _POSITION_NAMES:
            biases.append(name)
        in_bias = any(name == outer or name.startswith(f"{outer}.") for outer in biases)
        for attribute, parameter in module.named_parameters(recurse=False):
            if attribute == "weight" and id(module) in stems:
                reason = _STEM
            elif in_bias and parameter.ndim > 1:
                reason = _RELATIVE
            else:
                reason = _reason(attribute, module, kinds)
            if reason:
                reasons[prefix + attribute] = reason
    return reasons


def _stems(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a network that read its input, as far as its configuration names them."""
    named = (_config(module) or {}).get("first_conv") or ()
    named = (named,) if isinstance(named, str) else tuple(named)
    parts = {plain_name(name): part for name, part in module.named_modules()} if named else {}
    holders = [parts[name] for name in named if name in parts]
    # The name may be that of a block around the layer.
    layers = [next((part for part in holder.modules() if is_layer(part)), None) for holder in holders]
    return [layer for layer in layers if layer is not None]


def _reason(attribute: str, module: nn.Module, kinds: frozenset[str]) -> str:
    """Return why a parameter is left out for what it is, "" where nothing is known."""
    if attribute == "weight" and is_layer(module):
        return convolution_reason(module)
    if is_layer(module):
        return "gain of a standardized convolution" if attribute == "gain" and is_standardized(module) else ""
    if attribute == "scale" and kinds & _SCALES:
        return "layer scale"
    return next((reason for form, reason in _NAMES if form.fullmatch(attribute)), "")
