"""Which weights of timm's networks are pruned: exact sets on the well-known ones, the rules one by one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import ast_plugin
from ast_plugin.errors import SelectionError
from ast_plugin.integrations.timm import TimmSelection, wrap
from ast_plugin.integrations.timm.selection import timm_networks
from ast_plugin.parameters import select_parameters

pytestmark = pytest.mark.extra("timm")

ONE_DIMENSIONAL = "bias or norm (1-D)"
STEM = "input stem"
DEPTHWISE = "depthwise convolution"
SINGLE = "convolution of a single channel"
RELATIVE = "relative position bias"
STANDARDIZED = "standardized weight: zeros in it do not stay zeros"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What `describe()` has to say of a network: every glob stands for all parameters that it matches."""

    prunable: int
    prunable_weights: int
    one_dimensional: int
    out: dict[str, tuple[str, int]]


# Counted by hand from the layers: prunable = all convolutions and linear layers but those that are out;
# one-dimensional = two of each norm, and the biases.
NETWORKS = {
    "resnet50": Expected(53, 25_493_504, 107, {STEM: ("conv1.weight", 1)}),
    "efficientnet_b0": Expected(
        65, 5_053_312, 131, {STEM: ("conv_stem.weight", 1), DEPTHWISE: ("blocks.*.conv_dw.weight", 16)}
    ),
    "convnext_tiny": Expected(
        40,
        28_194_816,
        105,
        {
            STEM: ("stem.0.weight", 1),
            DEPTHWISE: ("stages.*.conv_dw.weight", 18),
            "layer scale": ("stages.*.gamma", 18),
        },
    ),
    "vit_small_patch16_224": Expected(
        49,
        21_617_664,
        100,
        {
            "class token": ("cls_token", 1),
            "position embedding": ("pos_embed", 1),
            STEM: ("patch_embed.proj.weight", 1),
        },
    ),
    "swin_tiny_patch4_window7_224": Expected(
        52,
        28_194_816,
        108,
        {STEM: ("patch_embed.proj.weight", 1), RELATIVE: ("*.attn.relative_position_bias_table", 12)},
    ),
    "mobilenetv3_large_100": Expected(
        48, 5_359_232, 110, {STEM: ("conv_stem.weight", 1), DEPTHWISE: ("blocks.*.conv_dw.weight", 15)}
    ),
}


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def reasons(model: nn.Module, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> dict[str, str]:
    choices = TimmSelection().ast_select_parameters(model, include, exclude)
    assert choices is not None
    assert [choice.name for choice in choices] == [name for name, _ in model.named_parameters()]
    assert all(choice.prunable == (choice.reason == "") for choice in choices)
    return {choice.name: choice.reason for choice in choices}


def named(found: dict[str, str], reason: str) -> list[str]:
    return [name for name, other in found.items() if other == reason]


@pytest.mark.parametrize("name", NETWORKS)
def test_describe_of_well_known_networks(name: str) -> None:
    expected = NETWORKS[name]
    model = timm.create_model(name, pretrained=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = wrap(optimizer, model, sparsities=(0.9,), total_steps=100).describe()
    by_reason: dict[str, set[str]] = {}
    for row in table.rows:
        by_reason.setdefault(row.reason, set()).add(row.parameter)
    parameters = [parameter for parameter, _ in model.named_parameters()]
    for reason, (glob, count) in expected.out.items():
        assert by_reason.pop(reason) == {p for p in parameters if fnmatchcase(p, glob)}
        assert sum(fnmatchcase(p, glob) for p in parameters) == count
    prunable, flat = by_reason.pop(""), by_reason.pop(ONE_DIMENSIONAL)
    assert by_reason == {}
    assert (len(prunable), table.prunable_weights) == (expected.prunable, expected.prunable_weights)
    assert len(flat) == expected.one_dimensional
    assert flat == {p for p, tensor in model.named_parameters() if tensor.ndim == 1 and not p.endswith("gamma")}
    classifier = model.pretrained_cfg["classifier"]
    assert f"{classifier}.weight" in prunable
    assert all(f"no: {reason}" in str(table) for reason in expected.out)


@pytest.mark.parametrize(
    ("name", "prunable", "others"),
    [
        # 48 linear layers in the blocks, two heads
        (
            "deit_tiny_distilled_patch16_224",
            50,
            {STEM: 1, "class token": 1, "distillation token": 1, "position embedding": 1},
        ),
        ("resnet50d", 55, {STEM: 1}),  # two further convolutions of the deep stem read 32 channels
        ("regnety_008", 75, {STEM: 1}),  # grouped convolutions, 16 channels a group
        ("mixer_b16_224", 49, {STEM: 1}),
        (
            "naflexvit_base_patch16_gap",
            49,
            {STEM: 1, "register token": 1, "position embedding": 1, "layer scale": 24},
        ),
        ("swinv2_tiny_window8_256", 52, {STEM: 1, RELATIVE: 24, "not a linear or convolution weight": 12}),
        ("levit_128s", 51, {STEM: 1, RELATIVE: 11}),  # 48 linear layers, 3 convolutions of the stem
        ("repvgg_a0", 43, {STEM: 2}),  # a 3x3 and a 1x1 convolution side by side
        ("ecaresnet26t", 31, {STEM: 1, SINGLE: 8}),
        ("mobilevit_xxs", 64, {STEM: 1, DEPTHWISE: 7}),
        ("tresnet_m", 96, {STEM: 1}),  # reads 48 channels: pixels in blocks of 4 x 4
        ("resnetv2_50x1_bit", 1, {STEM: 1, STANDARDIZED: 52}),
    ],
)
def test_other_families(name: str, prunable: int, others: dict[str, int]) -> None:
    counts = Counter(reasons(on_meta(name)).values())
    assert counts.pop("") == prunable
    counts.pop(ONE_DIMENSIONAL)
    assert counts == others


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_the_rules_hold_on_every_small_network(name: str) -> None:
    model = on_meta(name)
    found = reasons(model)
    first = model.pretrained_cfg["first_conv"]
    assert named(found, STEM) == [f"{first}.weight"]
    layers = (nn.Linear, nn.Conv2d)
    for path, module in model.named_modules():
        weight = f"{path}.weight"
        if isinstance(module, layers) and path != first:
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            if isinstance(module, (ScaledStdConv2d, StdConv2d)):
                assert found[weight] == STANDARDIZED
            elif depthwise:
                assert found[weight] == DEPTHWISE
            else:
                assert found[weight] in ("", RELATIVE)
    assert all(isinstance(model.get_submodule(p.rpartition(".")[0]), layers) for p in named(found, ""))


# ------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("name", ["resnet18d", "test_vit", "test_convnext"])
def test_the_stem_is_out_with_any_number_of_input_channels(name: str, channels: int) -> None:
    model = on_meta(name, in_chans=channels)
    assert named(reasons(model), STEM) == [f"{model.pretrained_cfg['first_conv']}.weight"]


def test_a_configuration_may_be_an_object_and_may_name_a_block_or_nothing_that_there_is() -> None:
    model = on_meta("repvgg_a0")
    model.pretrained_cfg = SimpleNamespace(first_conv=("stem.conv_kxk", "stem.conv_1x1"))
    assert named(reasons(model), STEM) == ["stem.conv_kxk.conv.weight", "stem.conv_1x1.conv.weight"]
    model.pretrained_cfg = SimpleNamespace(first_conv="no.such.layer")
    assert named(reasons(model), STEM) == ["stem.conv_kxk.conv.weight"]  # the core's rule
    model.pretrained_cfg = {"first_conv": None}
    assert named(reasons(model), STEM) == ["stem.conv_kxk.conv.weight"]


def test_the_stem_is_found_in_a_compiled_part() -> None:
    model = on_meta("test_vit", in_chans=13)
    compiled = nn.Module()
    compiled._orig_mod = model.patch_embed  # as torch.compile does
    model.patch_embed = compiled
    assert named(reasons(model), STEM) == ["patch_embed._orig_mod.proj.weight"]


def test_a_list_of_feature_maps_keeps_the_core_s_stem_and_timm_s_rules() -> None:
    found = reasons(on_meta("test_efficientnet", features_only=True))
    assert named(found, STEM) == ["conv_stem.weight"]
    assert len(named(found, DEPTHWISE)) == 2


def test_the_inner_network_of_a_hybrid_is_part_of_the_outer_one() -> None:
    model = on_meta("vit_small_r26_s32_224")
    assert [name for name, _ in timm_networks(model)] == [""]
    found = reasons(model)
    assert named(found, STEM) == ["patch_embed.backbone.stem.conv.weight"]
    assert len(named(found, STANDARDIZED)) == 4 * (2 * 3 + 1)  # stages, blocks of three, shortcuts


def test_include_brings_back_what_is_left_out_and_exclude_is_stronger() -> None:
    model = on_meta("test_efficientnet")
    depthwise = named(reasons(model), DEPTHWISE)
    assert len(depthwise) == 2
    assert named(reasons(model, include=("*.conv_dw.weight",)), "") == depthwise
    everything = reasons(model, include=("*",), exclude=("conv_stem.*",))
    assert everything["conv_stem.weight"] == "excluded by 'conv_stem.*'"
    assert set(everything.values()) == {"", ONE_DIMENSIONAL, "excluded by 'conv_stem.*'"}
    assert reasons(model, exclude=("classifier.*",))["classifier.weight"] == "excluded by 'classifier.*'"
    with pytest.raises(SelectionError, match=r"exclude glob 'clasifier\.weight' matches no parameter; the nearest"):
        reasons(model, exclude=("clasifier.weight",))


def test_a_table_is_included_by_its_full_name_alone() -> None:
    model = on_meta("swin_tiny_patch4_window7_224")
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert reasons(model, include=("layers.*",))[table] == RELATIVE
    assert reasons(model, include=("layers.*", table))[table] == ""


def test_frozen_and_missing_parts() -> None:
    model = on_meta("test_efficientnet", num_classes=0)
    model.conv_stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    found = reasons(model)
    assert found["conv_stem.weight"] == "frozen"
    assert all(reason == "frozen" for name, reason in found.items() if name.startswith("blocks.0."))
    assert "classifier.weight" not in found


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_a_zero_in_a_standardized_weight_does_not_stay_one(kind: type[nn.Conv2d]) -> None:
    layer = kind(2, 4, 1, bias=False)
    with torch.no_grad():
        layer.weight[:, 1] = 0.0  # nothing should come from the second channel
    only_second = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert layer(only_second).abs().min().item() > 0.1


# ------------------------------------------------------------------------------------------------ for whom it answers


class Detector(nn.Module):
    """A network of timm with a neck behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = on_meta("test_efficientnet", num_classes=0, in_chans=6)
        self.neck = nn.Conv2d(8, 8, 3, groups=8, device="meta")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8, device="meta"))


def test_inside_a_larger_model_the_rules_hold_for_the_part_that_is_timm_s() -> None:
    model = Detector()
    assert [name for name, _ in timm_networks(model)] == ["backbone"]
    found = reasons(model)
    assert found["backbone.conv_stem.weight"] == STEM
    assert all(name.startswith("backbone.") for name in named(found, DEPTHWISE))
    assert found["neck.weight"] == ""
    assert found["cls_token"] == "not a linear or convolution weight"


def test_inside_a_training_task_the_names_are_the_task_s() -> None:
    tasks = pytest.importorskip("timm.task")
    task = tasks.ClassificationTask(timm.create_model("test_efficientnet"), nn.CrossEntropyLoss(), verbose=False)
    assert named(reasons(task), STEM) == ["trainable_module.conv_stem.weight"]


def test_two_networks_side_by_side() -> None:
    model = nn.ModuleDict({"student": on_meta("test_resnet"), "teacher": on_meta("test_efficientnet")})
    model["teacher"].requires_grad_(False)
    found = reasons(model)
    assert named(found, STEM) == ["student.conv1.0.weight"]
    assert all(found[name] == "frozen" for name in found if name.startswith("teacher."))


def test_a_subclass_of_a_network_of_timm_is_one() -> None:
    class Mine(timm.models.resnet.ResNet):
        pass

    with torch.device("meta"):
        model = Mine(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    assert named(reasons(model), STEM) == ["conv1.weight"]


def test_other_models_are_left_to_the_next_plugin() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert TimmSelection().ast_select_parameters(model, (), ()) is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5,), total_steps=10, plugins=[TimmSelection()])
    assert [row.reason for row in ast.describe().rows] == [choice.reason for choice in select_parameters(model)]


def test_the_model_is_only_read() -> None:
    model = timm.create_model("test_vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reasons(model, include=("blocks.*",))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
