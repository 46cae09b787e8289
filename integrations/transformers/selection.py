"""Which weights of Hugging Face's networks are pruned: what the networks say of themselves, and what their layers are.

Beside the core's rule (`ast_plugin.parameters.select_parameters`) this leaves out, each with its reason:

- the layers that read images or sound, in every part of the network: the projection of patches, which may be a linear
  layer, the first convolution, the first layer of an encoder of spectrograms;
- output heads (`get_output_embeddings`), tied or not, and the last layer of a classifier. The dense layers before it,
  poolers, decoders of segmentation and heads that predict boxes are pruned;
- routers and gates that choose among experts;
- experts that are held in one tensor, as transformers 5 does: a pattern would take the experts for the outputs. A glob
  of `include` that matches nothing else asks for them. Where they are linear layers, as in transformers 4, they are
  pruned;
- convolutions that are depthwise or standardize their weights, and layers that make up a relative position bias;
- what peft added, always. Its base weights are pruned where they are trained.

Hugging Face's ``Conv1D`` (GPT-2) is pruned like any linear layer. Its weight is stored inputs first: counts and
distributions are the same, but groups of N:M run along the outputs, and ``channel`` drops inputs.

A quantized model is refused. Parts that are timm's have timm's rules. Nothing here imports transformers or peft.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from ast_plugin.errors import SelectionError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.layers import class_names, convolution_reason, is_layer
from ast_plugin.integrations.timm.selection import timm_networks, timm_reasons
from ast_plugin.integrations.transformers.adapters import adapter_parameters
from ast_plugin.integrations.transformers.ends import STEM, input_layers, networks, output_layers
from ast_plugin.integrations.transformers.quantization import quantized_layer
from ast_plugin.parameters import ParameterChoice, select_parameters
from ast_plugin.slots import plain_name

_ADAPTER = "adapter of peft"
_EXPERTS = "experts in one tensor (include them by name)"
_ROUTER = "router"
_POSITION = "position embedding"
_RELATIVE = "relative position bias"
_TOKEN_TYPE = "token type embedding"

_ROUTERS = re.compile(r"\w*Router(MLP)?|\w*TopK?Gating|\w*(MoE|Moe)\w*Gate")
_GATES = re.compile(r"(shared_experts?_)?gate|router|wg")  # beside a child called experts
_EXPERT_CLASSES = re.compile(r"\w*Experts|\w*ExpertGLU")
_RELATIVE_LAYERS = frozenset(
    {
        "continuous_position_bias_mlp",
        "gru_rel_pos_linear",
        "rel_pos_bias",
        "rel_pos_x_bias",
        "rel_pos_y_bias",
        "relative_pos_embeddings",
    }
)

# Embeddings, by the name of the module.
_TABLES = (
    (re.compile(r"rel(ative)?_\w+|distance_embedding|pe_k|position_bias"), _RELATIVE),
    (re.compile(r"\w*position\w*|embed_pos\w*|pos_emb\w*|wpe"), _POSITION),
    (re.compile(r"\w*token_type_embeddings\w*|segment_emb\w*"), _TOKEN_TYPE),
)

# Parameters that stand alone, by their own name.
_NAMES = (
    (re.compile(r"cls_\w+|class_embedding|class_pos_emb"), "class token"),
    (re.compile(r"dist(illation)?_token"), "distillation token"),
    (re.compile(r"register_tokens?"), "register token"),
    (re.compile(r"mask(_tokens?|_emb(ed\w*)?|ed_spec_embed)"), "mask token"),
    (re.compile(r"detection_tokens|group_token|query(_tokens|_embeds)?|latents?(_\w+)?|probe"), "learned query"),
    (
        re.compile(r"rel_pos_[hw]|relative_position_bias_table|attention_biases|(pos_)?bias_[uv]|emb_rel_[kv]"),
        _RELATIVE,
    ),
    (re.compile(r"r_[wrs]_bias|gru_rel_pos_const|relative_attention_bias"), _RELATIVE),
    (re.compile(r"\w*pos(ition(al)?)?_(emb|enc)\w*|position_bias|time_embeddings|row_embeddings"), _POSITION),
    (re.compile(r"\w*token_type\w*|type_token_\w+|segment_token_\w+|level_embed"), _TOKEN_TYPE),
    (re.compile(r"gamma(_\d)?|lambda_?\d?|layer_?scale\w*"), "layer scale"),
    (re.compile(r"A_log|D"), "state-space parameter"),
    (re.compile(r"original\d|weight_[gv]"), "parametrized weight"),
)


class TransformersSelection:
    """Plugin that chooses the prunable parameters of Hugging Face's networks, and leaves other models to the next one.

    A network is recognised by its class (``PreTrainedModel``), also inside a wrapper, an adapter of peft or a model of
    the user's own; the rules for Hugging Face's layers then hold inside it alone.
    """

    @hookimpl
    def ast_select_parameters(
        self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]
    ) -> list[ParameterChoice] | None:
        """Choose by layer and by what the network says of itself.

        Args:
            model: The model, dense; it is only read.
            include: Globs on parameter names; stronger than every rule of this module but those of peft and quantized
                layers. A glob that matches nothing but experts held in one tensor includes these.
            exclude: Globs on parameter names; stronger than `include`.

        Returns:
            One choice for every entry of ``model.named_parameters()``; None where neither a network of Hugging Face nor
            an adapter of peft is inside.

        Raises:
            SelectionError: If layers are quantized, a glob cannot be followed, or nothing is prunable.
        """
        found = dict(networks(model))
        adapters = adapter_parameters(model)
        if not found and not adapters:
            return None
        quantized = quantized_layer(model)
        if quantized is not None:
            raise SelectionError(
                f"{quantized}: such weights are packed and cannot be masked; load the model without "
                "quantization_config, or turn it back with model.dequantize()"
            )
        left_out: dict[str, str] = {}
        for rules, parts in ((_reasons, found), (timm_reasons, dict(timm_networks(model)))):
            for name, network in parts.items():
                prefix = f"{name}." if name else ""
                left_out |= {prefix + parameter: reason for parameter, reason in rules(network).items()}
        left_out |= dict.fromkeys(adapters, _ADAPTER)
        if adapters:
            _check_adapters(model, adapters, include)
        wanted = _with_experts(model, include, left_out)
        choices = select_parameters(model, include=wanted, exclude=exclude, left_out=left_out)
        choices = [
            dataclasses.replace(choice, prunable=False, reason=_ADAPTER) if choice.name in adapters else choice
            for choice in choices
        ]
        if not any(choice.prunable for choice in choices):
            raise SelectionError(
                f"nothing of {type(model).__name__} is left to prune but adapters of peft, which are left alone; check "
                "which base weights train, include and exclude"
            )
        return choices


def _reasons(network: nn.Module) -> dict[str, str]:
    """Return why parameters of a network are left out, by name; the first reason that applies."""
    known = dict.fromkeys(input_layers(network), STEM) | output_layers(network)
    tables = {id(module.weight) for module in network.modules() if _is_table(module)}
    inside: dict[nn.Module, str] = {}
    reasons: dict[str, str] = {}
    for name, module in network.named_modules():
        if _ROUTERS.fullmatch(type(module).__name__):
            inside |= dict.fromkeys(module.modules(), _ROUTER)
        if plain_name(name).rpartition(".")[2] in _RELATIVE_LAYERS:
            inside |= dict.fromkeys(module.modules(), _RELATIVE)
        if "experts" in module._modules:
            gates = [child for key, child in module.named_children() if _GATES.fullmatch(key)]
            inside |= dict.fromkeys((part for gate in gates for part in gate.modules()), _ROUTER)
        prefix = f"{name}." if name else ""
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in tables and not _is_table(module):
                continue  # tied to an embedding, as the core says
            place = known.get(module) or inside.get(module) or ""
            reason = place if place and parameter.ndim > 1 else _reason(name, attribute, module, parameter)
            if reason:
                reasons[prefix + attribute] = reason
    return reasons


def _reason(name: str, attribute: str, module: nn.Module, parameter: nn.Parameter) -> str:
    """Return why a parameter is left out for what it is, "" where nothing is known."""
    if attribute == "weight" and is_layer(module):
        return convolution_reason(module)
    if _EXPERT_CLASSES.fullmatch(type(module).__name__) and parameter.ndim > 1:
        return "bias of experts" if "bias" in attribute else _EXPERTS
    if attribute == "weight" and _is_table(module):
        own = next((segment for segment in reversed(plain_name(name).split(".")) if not segment.isdigit()), "")
        return next((reason for form, reason in _TABLES if form.fullmatch(own)), "")
    return next((reason for form, reason in _NAMES if form.fullmatch(attribute)), "")


def _is_table(module: nn.Module) -> bool:
    named = any(kind.endswith(("Embedding", "EmbeddingBag")) for kind in class_names(module))
    return named and "weight" in module._parameters and not is_layer(module)


def _with_experts(model: nn.Module, include: Sequence[str], left_out: Mapping[str, str]) -> list[str]:
    """Return the globs, and by their full names, which the core asks for, the experts that one is meant for."""
    wanted = list(include)
    for glob in include:
        matched = [name for name, _ in model.named_parameters() if fnmatch.fnmatchcase(plain_name(name), glob)]
        if all(left_out.get(name) == _EXPERTS for name in matched):
            wanted += matched
    return wanted


def _check_adapters(model: nn.Module, adapters: Mapping[str, nn.Parameter], include: Sequence[str]) -> None:
    """Refuse a model of which only adapters train, and a glob that asks for adapters alone."""
    names = dict(model.named_parameters())
    if not any(names[name].requires_grad and names[name].ndim > 1 for name in names.keys() - adapters.keys()):
        raise SelectionError(
            f"nothing of {type(model).__name__} is left to prune: the weights under the adapters of peft are frozen, "
            "and the adapters are left alone; merge them and train the merged model (model = model.merge_and_unload(), "
            "then model.requires_grad_(True)), or set requires_grad of base weights to True"
        )
    for glob in include:
        matched = {name for name in names if fnmatch.fnmatchcase(plain_name(name), glob)}
        if matched and matched <= adapters.keys():
            raise SelectionError(f"include glob {glob!r} matches nothing but adapters of peft, which are left alone")
