"""Small networks of Hugging Face on the meta device, and what of each is not to be pruned."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import transformers
from torch import nn

from ast_plugin.integrations.transformers.selection import TransformersSelection

ONE_DIMENSIONAL = "bias or norm (1-D)"
OTHER_KIND = "not a linear or convolution weight"
ADAPTER = "adapter of peft"
CLASS_TOKEN = "class token"
CLASSIFIER = "classifier head"
DEPTHWISE = "depthwise convolution"
EMBEDDING = "embedding"
EXPERTS = "experts in one tensor (include them by name)"
OUTPUT = "output head"
POSITION = "position embedding"
RELATIVE = "relative position bias"
ROUTER = "router"
STEM = "input stem"
TOKEN_TYPE = "token type embedding"

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STACK = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**STACK, **TOKENS, "num_key_value_heads": 2}
BERT = {**STACK, **TOKENS}
VIT = {**STACK, "image_size": 16, "patch_size": 4}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, **HEADS}
WAV2VEC2 = {
    **STACK,
    "num_hidden_layers": 1,
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
    "vocab_size": 32,
    "classifier_proj_size": 8,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is left out of a network: every glob stands for all parameters that it matches, "|" parts two versions'."""

    prunable: int
    out: dict[str, tuple[str, int]]
    network: str
    settings: dict[str, Any]


def three(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "num_labels": 3}


def of_bert(name: str) -> dict[str, tuple[str, int]]:
    return {
        EMBEDDING: (f"{name}.embeddings.word_embeddings.weight", 1),
        POSITION: (f"{name}.embeddings.position_embeddings.weight", 1),
        TOKEN_TYPE: (f"{name}.embeddings.token_type_embeddings.weight", 1),
    }


OF_DECODER = {EMBEDDING: ("model.embed_tokens.weight", 1), OUTPUT: ("lm_head.weight", 1)}
OF_VIT = {
    CLASS_TOKEN: ("vit.embeddings.cls_token", 1),
    POSITION: ("vit.embeddings.position_embeddings", 1),
    STEM: ("vit.embeddings.patch_embeddings.projection.weight", 1),
    CLASSIFIER: ("classifier.weight", 1),
}
OF_WAV2VEC2 = {
    STEM: ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", 1),
    "mask token": ("wav2vec2.masked_spec_embed", 1),
    "parametrized weight": ("wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original?", 2),
}

# Counted by hand from the layers: all linear layers and convolutions but those that are out.
NETWORKS = {
    "llama": Expected(14, OF_DECODER, "LlamaForCausalLM", LLAMA),
    "llama, tied": Expected(
        14,
        {EMBEDDING: ("model.embed_tokens.weight", 1)},
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
    ),
    "llama, classifier": Expected(
        14,
        {EMBEDDING: ("model.embed_tokens.weight", 1), CLASSIFIER: ("score.weight", 1)},
        "LlamaForSequenceClassification",
        three(LLAMA),
    ),
    "gemma": Expected(
        14, {EMBEDDING: ("model.embed_tokens.weight", 1)}, "GemmaForCausalLM", {**LLAMA, "head_dim": 8}
    ),  # tied
    "gpt2": Expected(
        8,
        {EMBEDDING: ("transformer.wte.weight", 1), POSITION: ("transformer.wpe.weight", 1)},
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **TOKENS},
    ),
    # the pooler stays
    "bert": Expected(
        13,
        {**of_bert("bert"), CLASSIFIER: ("classifier.weight", 1)},
        "BertForSequenceClassification",
        three(BERT),
    ),
    # transform.dense stays, the decoder is tied
    "bert, masked": Expected(13, of_bert("bert"), "BertForMaskedLM", BERT),
    "bert, questions": Expected(
        12, {**of_bert("bert"), CLASSIFIER: ("qa_outputs.weight", 1)}, "BertForQuestionAnswering", BERT
    ),
    "bert, choices": Expected(
        13, {**of_bert("bert"), CLASSIFIER: ("classifier.weight", 1)}, "BertForMultipleChoice", BERT
    ),
    # classifier.dense stays
    "roberta": Expected(
        13,
        {**of_bert("roberta"), CLASSIFIER: ("classifier.out_proj.weight", 1)},
        "RobertaForSequenceClassification",
        three(BERT),
    ),
    # pre_classifier stays
    "distilbert": Expected(
        13,
        {
            EMBEDDING: ("distilbert.embeddings.word_embeddings.weight", 1),
            POSITION: ("distilbert.embeddings.position_embeddings.weight", 1),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "DistilBertForSequenceClassification",
        three({"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64}),
    ),
    "t5": Expected(
        32,
        {EMBEDDING: ("shared.weight", 1), RELATIVE: ("*.relative_attention_bias.weight", 2)},
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, **TOKENS},
    ),
    "bart": Expected(
        16,
        {EMBEDDING: ("model.shared.weight", 1), POSITION: ("model.*coder.embed_positions.weight", 2)},
        "BartForConditionalGeneration",
        {**SEQ2SEQ, **TOKENS, "max_position_embeddings": 16},
    ),
    "vit": Expected(12, OF_VIT, "ViTForImageClassification", three(VIT)),
    "deit": Expected(
        12,
        {
            CLASS_TOKEN: ("deit.embeddings.cls_token", 1),
            "distillation token": ("deit.embeddings.distillation_token", 1),
            POSITION: ("deit.embeddings.position_embeddings", 1),
            STEM: ("deit.embeddings.patch_embeddings.projection.weight", 1),
            CLASSIFIER: ("*_classifier.weight", 2),
        },
        "DeiTForImageClassificationWithTeacher",
        three(VIT),
    ),
    "beit": Expected(
        12,
        {
            CLASS_TOKEN: ("beit.embeddings.cls_token", 1),
            STEM: ("beit.embeddings.patch_embeddings.projection.weight", 1),
            "layer scale": ("beit.*.lambda_?", 4),
            RELATIVE: ("*.relative_position_bias_table", 2),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "BeitForImageClassification",
        three({**VIT, "use_relative_position_bias": True}),
    ),
    "swin": Expected(
        13,
        {
            STEM: ("swin.embeddings.patch_embeddings.projection.weight", 1),
            RELATIVE: ("*.relative_position_bias_table", 2),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "SwinForImageClassification",
        three(SWIN),
    ),
    "swinv2": Expected(
        13,
        {
            STEM: ("swinv2.embeddings.patch_embeddings.projection.weight", 1),
            RELATIVE: ("*.continuous_position_bias_mlp.?.weight", 4),
            OTHER_KIND: ("*.logit_scale", 2),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "Swinv2ForImageClassification",
        three(SWIN),
    ),
    "convnext": Expected(
        5,
        {
            STEM: ("convnext.embeddings.patch_embeddings.weight", 1),
            DEPTHWISE: ("convnext.encoder.stages.*.dwconv.weight", 2),
            "layer scale": ("convnext.encoder.stages.*.layer_scale_parameter", 2),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "ConvNextForImageClassification",
        three({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    ),
    "resnet": Expected(
        8,
        {STEM: ("resnet.embedder.embedder.convolution.weight", 1), CLASSIFIER: ("classifier.1.weight", 1)},
        "ResNetForImageClassification",
        three(RESNET),
    ),
    # the projections of both towers stay
    "clip": Expected(
        26,
        {
            EMBEDDING: ("text_model.embeddings.token_embedding.weight", 1),
            POSITION: ("*_model.embeddings.position_embedding.weight", 2),
            CLASS_TOKEN: ("vision_model.embeddings.class_embedding", 1),
            STEM: ("vision_model.embeddings.patch_embedding.weight", 1),
            "scalar": ("logit_scale", 1),
        },
        "CLIPModel",
        {"text_config": BERT, "vision_config": VIT, "projection_dim": 8},
    ),
    # a tower without a base model of its name; the head that pools stays
    "siglip": Expected(
        16,
        {
            POSITION: ("vision_model.embeddings.position_embedding.weight", 1),
            STEM: ("vision_model.embeddings.patch_embedding.weight", 1),
            "learned query": ("vision_model.head.probe", 1),
            CLASSIFIER: ("classifier.weight", 1),
        },
        "SiglipForImageClassification",
        three({"vision_config": VIT, "text_config": BERT}),
    ),
    # the spectrogram's 10 bands are no channels of an image; the sinusoids do not train
    "whisper": Expected(
        17,
        {
            STEM: ("model.encoder.conv1.weight", 1),
            "frozen": ("model.encoder.embed_positions.weight", 1),
            EMBEDDING: ("model.decoder.embed_tokens.weight", 1),
            POSITION: ("model.decoder.embed_positions.weight", 1),
        },
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            **TOKENS,
            "num_mel_bins": 10,
            "decoder_start_token_id": 1,
            "max_source_positions": 16,
            "max_target_positions": 16,
        },
    ),
    "wav2vec2": Expected(8, {**OF_WAV2VEC2, CLASSIFIER: ("lm_head.weight", 1)}, "Wav2Vec2ForCTC", WAV2VEC2),
    # the projector stays
    "wav2vec2, classifier": Expected(
        9,
        {**OF_WAV2VEC2, CLASSIFIER: ("classifier.weight", 1)},
        "Wav2Vec2ForSequenceClassification",
        three(WAV2VEC2),
    ),
    "mamba": Expected(
        8,
        {
            EMBEDDING: ("backbone.embeddings.weight", 1),
            DEPTHWISE: ("backbone.layers.?.mixer.conv1d.weight", 2),
            "state-space parameter": ("backbone.layers.?.mixer.[AD]*", 4),
        },
        "MambaForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2, **TOKENS},
    ),
    # patch embeddings of later stages read features, and the decode head stays but for its last layer
    "segformer": Expected(
        17,
        {
            STEM: (
                "segformer.stages.0.patch_embeddings.proj.weight|segformer.encoder.patch_embeddings.0.proj.weight",
                1,
            ),
            DEPTHWISE: ("segformer.*.dwconv.dwconv.weight", 2),
            CLASSIFIER: ("decode_head.classifier.weight", 1),
        },
        "SegformerForSemanticSegmentation",
        three(
            {
                "depths": [1, 1],
                "num_encoder_blocks": 2,
                "hidden_sizes": [8, 16],
                "num_attention_heads": [1, 2],
                "sr_ratios": [2, 1],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "mlp_ratios": [2, 2],
                "decoder_hidden_size": 12,
            }
        ),
    ),
    # the backbone does not train at this depth; boxes stay, and classes are one more than labels
    "detr": Expected(
        20,
        {
            "frozen": ("model.backbone.*", 9),
            POSITION: ("model.query_position_embeddings.weight", 1),
            CLASSIFIER: ("class_labels_classifier.weight", 1),
        },
        "DetrForObjectDetection",
        three(
            {
                **SEQ2SEQ,
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                "backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage2"]},
                "num_queries": 5,
            }
        ),
    ),
    # a projector between a tower and a language model stays
    "llava": Expected(
        28,
        {
            CLASS_TOKEN: ("model.vision_tower.*embeddings.class_embedding", 1),
            POSITION: ("model.vision_tower.*embeddings.position_embedding.weight", 1),
            STEM: ("model.vision_tower.*embeddings.patch_embedding.weight", 1),
            EMBEDDING: ("model.language_model.embed_tokens.weight", 1),
            OUTPUT: ("lm_head.weight", 1),
        },
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**VIT, "model_type": "clip_vision_model", "projection_dim": 16},
            "text_config": {**LLAMA, "model_type": "llama"},
            "image_token_id": 5,
        },
    ),
}


def on_meta(network: str, settings: dict[str, Any]) -> Any:
    kind = getattr(transformers, network)
    with torch.device("meta"):
        return kind(kind.config_class(**copy.deepcopy(settings)))


def known(name: str, **changes: Any) -> Any:
    expected = NETWORKS[name]
    return on_meta(expected.network, {**expected.settings, **changes})


def reasons(model: nn.Module, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> dict[str, str]:
    choices = TransformersSelection().ast_select_parameters(model, include, exclude)
    assert choices is not None
    assert [choice.name for choice in choices] == [name for name, _ in model.named_parameters()]
    assert all(choice.prunable == (choice.reason == "") for choice in choices)
    return {choice.name: choice.reason for choice in choices}


def named(found: dict[str, str], reason: str) -> list[str]:
    return [name for name, other in found.items() if other == reason]
