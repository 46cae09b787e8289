"""Linear layers of which two of every four weights are zero, as CUDA devices multiply them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.compile_layers import LayerForm, LayerInputs
from ast_plugin.compile_linear import LinearLayer, linear_layers, replace
from ast_plugin.errors import ConfigError

_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)  # sparse tensor cores


def two_of_four(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, list[LayerForm]]:
    """Turn the weights of linear layers that are 2:4 sparse to torch's semi-structured form, in place.

    Args:
        model: The network with the sub-net's values, on a CUDA device, in half precision.
        example_inputs: To compare the outputs with the dense ones; None: they are not compared.

    Returns:
        The model, and what became of each linear layer.

    Raises:
        ConfigError: If the device, the types or the masks do not allow it.
        ActivationError: If the outputs change.
    """
    layers = linear_layers(model)
    _check_device(layers)
    inputs = LayerInputs(model, (), example_inputs)
    found = [_turned(model, layer) for layer in layers]
    if not any(form.form == "2:4" for form in found):
        raise ConfigError(
            f"form '2:4' fits none of the {len(found)} linear layers: {found[0].layer}: {found[0].reason}; train a "
            "sub-net with pattern '2:4', or choose another form"
        )
    inputs.check(model, "2:4")
    return model, found


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether every four weights of a row in a row have at least two zeros; shape (out, in)."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


def _check_device(layers: list[LinearLayer]) -> None:
    if not layers:
        raise ConfigError("form '2:4' is for linear layers, and the model has none; choose another form")
    weight = layers[0].weight
    if weight.device.type != "cuda":
        raise ConfigError(
            f"form '2:4' needs a CUDA device, and the model is on {weight.device.type!r}, where no kernel uses this "
            "pattern; choose form='auto', or move the model to a CUDA device before it is compiled"
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _CAPABILITY:
        raise ConfigError(
            f"form '2:4' needs a CUDA device of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or above, and "
            f"this one has {capability[0]}.{capability[1]}; choose another form"
        )
    if not any(layer.weight.dtype in _DTYPES for layer in layers):
        raise ConfigError(
            f"form '2:4' needs float16 or bfloat16 weights, and these are {weight.dtype}; convert the model before it "
            "is compiled: model.bfloat16()"
        )


def _turned(model: nn.Module, layer: LinearLayer) -> LayerForm:
    reason = ""
    if layer.weight.dtype not in _DTYPES:
        reason = f"weights of {layer.weight.dtype}"
    elif not is_two_of_four(layer.weight):
        reason = "its weights are not 2:4 sparse"
    else:
        try:
            _turn(model, layer)
        except (RuntimeError, ValueError) as error:  # sizes that the kernels do not take
            reason = str(error).partition("\n")[0]
    return LayerForm(layer=layer.paths[0], form="dense" if reason else "2:4", zeros=0.5, reason=reason)


def _turn(model: nn.Module, layer: LinearLayer) -> None:
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.contiguous())
    out_features, in_features = layer.weight.shape
    turned = nn.Linear(in_features, out_features, bias=False, device="meta")
    turned.weight = nn.Parameter(weight, requires_grad=False)
    turned.register_parameter("bias", None if layer.bias is None else nn.Parameter(layer.bias, requires_grad=False))
    replace(model, layer, turned)
