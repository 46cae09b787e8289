"""Which layers of a model are quantized, by what, and so cannot be pruned; no library of quantization is imported."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

# Layers of bitsandbytes, GPTQ, AWQ, HQQ, quanto, AQLM, VPTQ, SpQR, EETQ, HIGGS, FP8, MXFP4, NVFP4, BitNet and others.
_LAYERS = re.compile(
    r"Linear(4bit|8bitLt|FP4|NF4)|Embedding[48]bit"
    r"|\w*Quant(ized)?(Linear|Embedding)|WQLinear\w*|HQQLinear|QLinear|QConv2d|(Compressed|Eetq|Higgs|Metal|SINQ)Linear"
    r"|\w*(Fp8|FP8|NVFP4|Mxfp4)\w*(Linear|Experts)|(Auto)?BitLinear"
)
# Tensors that hold packed weights inside an ordinary layer.
_TENSORS = re.compile(r"(bitsandbytes|torchao\.(quantization|dtypes|prototype)|optimum\.quanto|hqq)(\..*)?")


def quantized_layer(model: nn.Module) -> str | None:
    """Return what is quantized in a model and how, in words, None if nothing is.

    The layers are looked at before the flag that transformers sets. A configuration alone that names a method quantizes
    nothing, and is not a sign.

    Args:
        model: Any module.
    """
    for name, module in model.named_modules():
        if any(_LAYERS.fullmatch(kind.__name__) and _is_foreign(kind) for kind in type(module).__mro__):
            return f"layer {name!r} is quantized ({type(module).__name__}{_by(model)})"
        for attribute, parameter in module.named_parameters(recurse=False):
            if _is_packed(parameter):
                where = f"{name}.{attribute}" if name else attribute
                how = str(parameter.dtype).removeprefix("torch.")
                return f"parameter {where!r} is quantized ({type(parameter).__name__} of {how}{_by(model)})"
    flagged = any(_is_flagged(module) for module in model.modules())
    return f"{type(model).__name__} is quantized{_by(model) or ', as its is_quantized says'}" if flagged else None


def _is_foreign(kind: type) -> bool:
    """Return whether a class is not one of transformers' own networks, some of which imitate quantization."""
    return not kind.__module__.startswith("transformers.models.")


def _is_packed(parameter: nn.Parameter) -> bool:
    kind = type(parameter.data) if type(parameter) is nn.Parameter else type(parameter)
    if _TENSORS.fullmatch(kind.__module__):
        return True
    narrow = parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1
    integer = not (parameter.dtype.is_floating_point or parameter.dtype.is_complex or parameter.dtype == torch.bool)
    return (narrow or integer) and parameter.ndim > 1


def _is_flagged(module: nn.Module) -> bool:
    return getattr(module, "is_quantized", False) is True or getattr(module, "hf_quantizer", None) is not None


def _by(model: nn.Module) -> str:
    """Return the name of the method, as far as a configuration tells it, in the form ", by NAME"."""
    for module in model.modules():
        config: Any = getattr(getattr(module, "config", None), "quantization_config", None)
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        if method is not None:
            return f", by {getattr(method, 'value', method)}"
    return ""
