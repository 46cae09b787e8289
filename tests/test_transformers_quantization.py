"""Quantized layers and models are refused with their names, whoever made them."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers_networks import BERT, known, named, on_meta, reasons

from ast_plugin.errors import SelectionError
from ast_plugin.integrations.transformers.quantization import quantized_layer

pytestmark = pytest.mark.extra("hf")


def foreign(kind: type, module: str) -> type:
    kind.__module__ = module
    return kind


class Linear4bit(nn.Linear):
    pass


class TorchQuantLinear(nn.Module):
    """As GPTQ has them: no parameter at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


class Params4bit(nn.Parameter):
    pass


class Bits(enum.Enum):
    GPTQ = "gptq"


def linear_of(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = weight
    return layer


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: foreign(Linear4bit, "bitsandbytes.nn.modules")(4, 4), "layer 'extra' is quantized (Linear4bit)"),
        (lambda: foreign(TorchQuantLinear, "gptqmodel.nn_modules")(), "layer 'extra' is quantized (TorchQuantLinear)"),
        (
            lambda: linear_of(nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)),
            "parameter 'extra.weight' is quantized (Parameter of int8)",
        ),
        (
            lambda: linear_of(nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)),
            "parameter 'extra.weight' is quantized (Parameter of float8_e4m3fn)",
        ),
        (
            lambda: linear_of(foreign(Params4bit, "bitsandbytes.nn.modules")(torch.zeros(4, 4))),
            "parameter 'extra.weight' is quantized (Params4bit of float32)",
        ),
    ],
)
def test_a_quantized_layer_is_refused_with_its_name(make: Any, told: str) -> None:
    model = known("llama")
    model.extra = make()
    with pytest.raises(SelectionError) as caught:
        reasons(model)
    assert str(caught.value) == (
        f"{told}: such weights are packed and cannot be masked; load the model without quantization_config, or turn it "
        "back with model.dequantize()"
    )


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, SimpleNamespace(quant_method=Bits.GPTQ)])
@pytest.mark.parametrize("flag", ["is_quantized", "hf_quantizer"])
def test_a_model_that_says_it_is_quantized_is_refused_with_the_method(flag: str, config: Any) -> None:
    model = known("llama")
    setattr(model, flag, True)
    assert quantized_layer(model) == "LlamaForCausalLM is quantized, as its is_quantized says"
    model.config.quantization_config = config
    with pytest.raises(SelectionError, match=r"LlamaForCausalLM is quantized, by gptq: such weights"):
        reasons(nn.ModuleDict({"inner": model})["inner"])


def test_a_configuration_alone_quantizes_nothing_nor_does_a_model_that_was_turned_back() -> None:
    model = known("llama")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    model.is_quantized = False
    assert quantized_layer(model) is None
    assert len(named(reasons(model), "")) == 14


def test_a_network_that_imitates_quantization_is_not_quantized() -> None:
    sizes = {**BERT, "num_labels": 3}
    found = reasons(on_meta("IBertForSequenceClassification", sizes))
    assert named(found, "") == ["classifier.dense.weight"]
