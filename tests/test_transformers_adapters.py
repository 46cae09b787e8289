"""What peft adds to a model is left alone, whether peft made it or something of its form."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers_networks import ADAPTER, BERT, EMBEDDING, LLAMA, OUTPUT, known, named, reasons, three

from ast_plugin.errors import SelectionError
from ast_plugin.integrations.transformers.adapters import adapter_parameters
from ast_plugin.integrations.transformers.ends import networks

pytestmark = pytest.mark.extra("hf")


class LoraLinear(nn.Module):
    """A layer of peft by what it lists."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})
        self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(base_layer.out_features))})


class ModulesToSave(nn.Module):
    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original_module)})


class PromptModel(nn.Module):
    """A wrapper of peft by where its class comes from."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model
        self.word_embeddings = base_model.get_input_embeddings()  # seen from two places
        self.prompt_encoder = nn.ModuleDict({"default": nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 16))})


PromptModel.__module__ = "peft.peft_model"


def with_adapters() -> nn.Module:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**three(BERT)))
    model.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = LoraLinear(layer.attention.self.query)
    model.classifier = ModulesToSave(model.classifier)
    return model


def test_adapters_are_left_alone_where_base_weights_train() -> None:
    model = with_adapters()
    model.bert.encoder.requires_grad_(True)
    found = reasons(model)
    layer = "bert.encoder.layer.0.attention.self.query"
    assert found[f"{layer}.base_layer.weight"] == ""
    assert found[f"{layer}.lora_A.default.weight"] == found[f"{layer}.lora_B.default.weight"] == ADAPTER
    assert found["classifier.modules_to_save.default.weight"] == ADAPTER
    assert found["classifier.original_module.weight"] == "frozen"
    assert set(adapter_parameters(model)) == set(named(found, ADAPTER))
    assert len(named(found, "")) == 12


def test_no_glob_asks_for_an_adapter() -> None:
    model = with_adapters()
    model.bert.encoder.requires_grad_(True)
    assert named(reasons(model, include=("*",)), "") == named(reasons(model, include=("bert.encoder.*",)), "")
    with pytest.raises(SelectionError, match=r"include glob '\*lora_A\*' matches nothing but adapters of peft, which"):
        reasons(model, include=("*.key.weight", "*lora_A*"))


def test_base_weights_that_train_and_cannot_be_pruned_are_not_enough() -> None:
    model = with_adapters()
    model.bert.embeddings.requires_grad_(True)
    with pytest.raises(SelectionError, match=r"word_embeddings\.weight \(64, 16\): embedding(.|\n)*: adapter of peft"):
        reasons(model)
    with pytest.raises(SelectionError, match=r"is left to prune but adapters of peft, which are left alone; check"):
        reasons(model, include=("*",))


@pytest.mark.parametrize("include", [(), ("*.query.*",)])
def test_a_frozen_base_is_said_with_the_remedy(include: tuple[str, ...]) -> None:
    with pytest.raises(SelectionError) as caught:
        reasons(with_adapters(), include=include)
    assert str(caught.value) == (
        "nothing of BertForSequenceClassification is left to prune: the weights under the adapters of peft are frozen, "
        "and the adapters are left alone; merge them and train the merged model (model = model.merge_and_unload(), "
        "then model.requires_grad_(True)), or set requires_grad of base weights to True"
    )


def test_prompts_are_adapters_and_the_embedding_that_they_borrow_is_not() -> None:
    model = PromptModel(known("llama"))
    assert list(adapter_parameters(model)) == [
        "prompt_encoder.default.0.weight",
        "prompt_encoder.default.1.weight",
        "prompt_encoder.default.1.bias",
    ]
    found = reasons(model)
    assert found["base_model.model.embed_tokens.weight"] == EMBEDDING
    assert found["base_model.lm_head.weight"] == OUTPUT
    assert len(named(found, "")) == 14


def test_adapters_on_a_model_of_one_s_own_are_left_alone_too() -> None:
    model = nn.Sequential(LoraLinear(nn.Linear(8, 8, bias=False)), nn.Linear(8, 2, bias=False))
    assert list(networks(model)) == []
    found = reasons(model)
    assert named(found, "") == ["0.base_layer.weight", "1.weight"]
    assert named(found, ADAPTER) == [name for name in found if "lora" in name]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
@pytest.mark.parametrize("kind", ["lora", "dora", "prefix", "ia3"])
def test_adapters_that_peft_itself_makes(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "dora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
        "prefix": lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=2, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
        ),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }[kind]()
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model = peft.get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(adapter_parameters(model)) == trained
    with pytest.raises(SelectionError, match=r"the weights under the adapters of peft are frozen"):
        reasons(model)
    model.requires_grad_(True)
    found = reasons(model)
    assert len(named(found, "")) == 14
    assert {name for name in trained if model.get_parameter(name).ndim > 1} <= set(named(found, ADAPTER))
    if kind != "prefix":
        merged = model.merge_and_unload().requires_grad_(True)
        assert reasons(merged) == reasons(known("llama"))
