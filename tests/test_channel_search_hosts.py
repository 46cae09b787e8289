"""Groups in networks of timm and Hugging Face: one small network of each popular family, counted by hand."""

from __future__ import annotations

import collections
import warnings

import pytest
import timm
import torch
import transformers

from ast_plugin.channel_search import example_inputs_of, find_groups
from ast_plugin.channels import GroupAttribute

pytestmark = [pytest.mark.extra("channels"), pytest.mark.extra("timm"), pytest.mark.extra("hf")]

IMAGE = torch.zeros(1, 3, 64, 64)
IDS = {"input_ids": torch.arange(3, 11)[None]}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STACK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**TOKENS, **STACK, "num_key_value_heads": 2}


def counts(groups):
    return dict(collections.Counter(group.kind for group in groups.groups))


def of_hugging_face(name, settings):
    kind = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(kind.config_class(**settings))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Two widths in each of the blocks of a bottleneck, one in each basic block.
        ("resnet18", {"channels": (16, 16, 16, 16)}, {"channels": 8}),
        ("resnet50", {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}, {"channels": 8}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, {"heads": 2, "hidden": 2}),
        ("deit3_small_patch16_224", {"img_size": 64, "depth": 2}, {"heads": 2, "hidden": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, {"heads": 4, "hidden": 4}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, {"channels": 4}),
        ("mixer_s16_224", {"img_size": 64}, {"hidden": 16}),
        # The shape of x is taken after attention, so that heads cannot go.
        ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}, {"hidden": 2}),
    ],
)
def test_families_of_timm(name, options, expected):
    groups = find_groups(timm.create_model(name, num_classes=5, **options), IMAGE)
    assert counts(groups) == expected


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "regnety_002"])
def test_convolutional_families_of_timm_have_groups_in_every_block_with_an_inner_width(name):
    model = timm.create_model(name, num_classes=5)
    groups = find_groups(model, IMAGE)
    made = {axis.tensor for group in groups.groups for axis in group.axes_of("out", "state")}
    inner = ("conv_pw.weight", "conv_dw.weight") if "net" in name and "reg" not in name else ("conv1.conv.weight",)
    layers = [
        layer for layer, _ in model.named_parameters() if layer.endswith(inner) and not layer.startswith("blocks.0")
    ]
    assert layers
    assert [layer for layer in layers if layer not in made] == []


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("BertModel", {**TOKENS, **STACK}, {"heads": 2, "hidden": 2}),
        ("GPT2LMHeadModel", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"heads": 2, "hidden": 2}),
        ("LlamaForCausalLM", GQA, {"heads": 2, "hidden": 2}),
        ("Qwen2ForCausalLM", GQA, {"heads": 2, "hidden": 2}),
        ("MixtralForCausalLM", {**GQA, "num_local_experts": 2}, {"heads": 2}),
    ],
)
def test_families_of_hugging_face(name, settings, expected):
    assert counts(find_groups(of_hugging_face(name, settings), IDS)) == expected


def test_a_bias_of_positions_that_blocks_share_joins_their_heads():
    settings = {**TOKENS, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    model = of_hugging_face("T5ForConditionalGeneration", settings)
    groups = find_groups(model, {**IDS, "decoder_input_ids": torch.arange(3, 8)[None]})
    # Self-attention of the encoder, of the decoder, and cross-attention of each block of the decoder.
    assert counts(groups) == {"heads": 4, "hidden": 4}
    shared = groups.groups[0]
    assert len(shared.axes_of("out")) == 6
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert [(axis.dim, axis.parts) for axis in shared.axes if axis.tensor == table] == [(1, ((0, 1),))]


def test_numbers_of_modules_follow_the_heads():
    model = of_hugging_face("GPT2LMHeadModel", {**TOKENS, "n_embd": 32, "n_layer": 1, "n_head": 4})
    heads = find_groups(model, IDS).groups[0]
    # 96 columns are queries, keys and values of four heads of eight.
    assert heads.axes[0].parts == ((0, 8), (32, 8), (64, 8))
    layer = "transformer.h.0.attn"
    assert GroupAttribute(module=layer, name="split_size", per_unit=8) in heads.attributes
    assert GroupAttribute(module=f"{layer}.c_attn", name="nf", per_unit=24) in heads.attributes


def test_a_relative_position_table_has_a_column_for_each_head():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), num_classes=5)
    heads = find_groups(model, IMAGE).groups[0]
    table = [axis for axis in heads.axes if axis.tensor.endswith("relative_position_bias_table")]
    assert [(axis.dim, axis.role, axis.parts) for axis in table] == [(1, "state", ((0, 1),))]


def test_networks_of_both_know_example_inputs():
    assert example_inputs_of(timm.create_model("resnet18")).shape == (1, 3, 224, 224)
    known = example_inputs_of(of_hugging_face("BertModel", {**TOKENS, **STACK}))
    assert known["input_ids"].dtype == torch.int64
