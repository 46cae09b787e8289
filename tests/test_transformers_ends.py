"""Where networks of Hugging Face read their input and where their labels are read from."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers_networks import (
    BERT,
    CLASSIFIER,
    EMBEDDING,
    LLAMA,
    NETWORKS,
    OUTPUT,
    SEQ2SEQ,
    STEM,
    VIT,
    known,
    named,
    on_meta,
    reasons,
)

pytestmark = pytest.mark.extra("hf")


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "segformer"])
def test_the_stem_is_out_with_any_number_of_channels(name: str, channels: int) -> None:
    (stem,) = named(reasons(known(name)), STEM)
    model = known(name, num_channels=channels)
    assert named(reasons(model), STEM) == [stem]
    assert model.get_parameter(stem).shape[1] == channels


def test_patches_may_be_read_by_a_linear_layer() -> None:
    tower = {**VIT, "num_channels": 3}
    model = on_meta("Siglip2ForImageClassification", {"vision_config": tower, "text_config": BERT, "num_labels": 3})
    assert named(reasons(model), STEM) == ["vision_model.embeddings.patch_embedding.weight"]
    assert isinstance(model.vision_model.embeddings.patch_embedding, nn.Linear)


def test_a_series_of_numbers_is_read_by_the_first_layer() -> None:
    settings = {"num_input_channels": 2, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 1}
    model = on_meta("PatchTSTForPrediction", {**settings, "context_length": 8, "patch_length": 4, "patch_stride": 4})
    assert named(reasons(model), STEM) == ["model.encoder.embedder.input_embedding.weight"]


def test_the_tower_of_a_language_model_has_a_stem_of_its_own() -> None:
    audio = {**SEQ2SEQ, "num_mel_bins": 10, "max_source_positions": 16, "model_type": "qwen2_audio_encoder"}
    text = {**LLAMA, "model_type": "qwen2"}
    model = on_meta("Qwen2AudioForConditionalGeneration", {"audio_config": audio, "text_config": text})
    (stem,) = named(reasons(model), STEM)
    assert stem.endswith("audio_tower.conv1.weight")


def test_an_encoder_and_a_decoder_put_together() -> None:
    settings = {
        "encoder": {**VIT, "model_type": "vit"},
        "decoder": {**NETWORKS["gpt2"].settings, "model_type": "gpt2", "add_cross_attention": True},
    }
    kind = transformers.VisionEncoderDecoderModel
    found = reasons(kind(config=transformers.VisionEncoderDecoderConfig(**settings)))
    assert named(found, STEM) == ["encoder.embeddings.patch_embeddings.projection.weight"]
    assert named(found, EMBEDDING) == ["decoder.transformer.wte.weight"]
    assert named(found, OUTPUT) == named(found, CLASSIFIER) == []


# ------------------------------------------------------------------------------------------------ where it answers


def test_a_head_of_its_own_that_the_configuration_ties_says_so() -> None:
    model = known("llama, tied")
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 16, device="meta"))
    found = reasons(model)
    assert found["lm_head.weight"] == "output head, tied to the embedding by the configuration"
    assert found["model.embed_tokens.weight"] == EMBEDDING


def test_a_tied_head_that_is_listed_first_names_the_embedding() -> None:
    class HeadFirst(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(8, 50, bias=False)
            self.embed_tokens = nn.Embedding(50, 8)
            self.layer = nn.Linear(8, 8, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    assert reasons(HeadFirst(PretrainedConfig())) == {
        "lm_head.weight": "tied to the embedding embed_tokens.weight",
        "layer.weight": "",
    }


def test_a_dense_layer_as_wide_as_there_are_labels_is_not_the_head() -> None:
    found = reasons(known("roberta", num_labels=16))
    assert named(found, CLASSIFIER) == ["classifier.out_proj.weight"]
    assert found["classifier.dense.weight"] == ""


def test_a_network_that_knows_of_no_output_embedding_has_none() -> None:
    class Silent(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(8, 8, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert reasons(Silent(PretrainedConfig())) == {"layer.weight": ""}


def test_a_network_of_attention_alone_has_no_stem() -> None:
    model = on_meta("DecisionTransformerModel", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "max_ep_len": 8})
    found = reasons(model)
    assert named(found, STEM) == []
    assert found["encoder.h.0.attn.c_attn.weight"] == found["embed_state.weight"] == ""
