"""Choice of prunable weights on networks of the kinds that users bring, with the reasons for all others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ast_plugin.errors import SelectionError
from ast_plugin.parameters import ParameterChoice, select_parameters

ONE_DIMENSIONAL = "bias or norm (1-D)"
OTHER_KIND = "not a linear or convolution weight"


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


class ResNet(nn.Module):
    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.fc = nn.Linear(8, 10)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.ones(width))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 10)


class Conv1D(nn.Module):
    """Stands for Hugging Face's linear layer of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 24))
        self.bias = nn.Parameter(torch.zeros(24))


class LanguageModel(nn.Module):
    def __init__(self, *, head_first: bool = False, tied: bool = True) -> None:
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(8, 50, bias=False)
        self.wte = nn.Embedding(50, 8)
        self.attn = Conv1D()
        if not head_first:
            self.lm_head = nn.Linear(8, 50, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def reasons(choices: list[ParameterChoice]) -> dict[str, str]:
    assert all(choice.prunable == (choice.reason == "") for choice in choices)
    return {choice.name: choice.reason for choice in choices}


def prunable(model: nn.Module, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    return [c.name for c in select_parameters(model, include=include, exclude=exclude) if c.prunable]


def test_residual_network() -> None:
    model = ResNet()
    found = reasons(select_parameters(model, include=(), exclude=()))
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found["conv1.weight"] == "input stem"
    assert found["bn1.weight"] == found["fc.bias"] == ONE_DIMENSIONAL
    kept = [name for name, reason in found.items() if not reason]
    assert kept == [
        "layer1.0.conv1.weight",
        "layer1.0.depthwise.weight",
        "layer1.1.conv1.weight",
        "layer1.1.depthwise.weight",
        "fc.weight",
    ]


def test_shapes_are_the_parameters_own() -> None:
    model = ResNet()
    for choice in select_parameters(model):
        assert choice.shape == tuple(model.get_parameter(choice.name).shape)


def test_vision_transformer() -> None:
    found = reasons(select_parameters(VisionTransformer()))
    assert found["patch_embed.weight"] == "input stem"
    assert found["cls_token"] == found["pos_embed"] == OTHER_KIND
    assert found["blocks.0.scale"] == found["blocks.0.norm.weight"] == ONE_DIMENSIONAL
    kept = [name for name, reason in found.items() if not reason]
    assert kept[:3] == ["blocks.0.qkv.weight", "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"]
    assert kept[-1] == "head.weight"


def test_a_pure_linear_model_has_no_stem() -> None:
    assert prunable(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) == ["0.weight", "2.weight"]


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)), "0.weight"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), "0.weight"),
        (nn.Sequential(nn.Conv2d(5, 8, 3), nn.Conv2d(2, 8, 3)), None),  # a spectrum: no narrow input to protect
        (nn.Sequential(nn.Linear(8, 9), nn.Conv2d(1, 8, 3)), None),
        (nn.Sequential(nn.MultiheadAttention(8, 2), nn.Conv2d(1, 8, 3)), None),
        (nn.Sequential(Conv1D(), nn.Conv2d(1, 8, 3)), None),
        (nn.Sequential(nn.ConvTranspose2d(100, 8, 3), nn.Conv2d(8, 3, 3)), None),
        (nn.Sequential(nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3)), "0.weight"),
    ],
)
def test_the_stem_is_a_first_convolution_that_reads_few_channels(model: nn.Module, stem: str | None) -> None:
    found = reasons(select_parameters(model))
    assert [name for name, reason in found.items() if reason == "input stem"] == ([stem] if stem else [])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 8),
        nn.Conv1d(8, 8, 3),
        nn.Conv2d(8, 8, 3),
        nn.Conv3d(8, 8, 3),
        nn.ConvTranspose1d(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3),
        nn.ConvTranspose3d(8, 8, 3),
        Conv1D(),
    ],
)
def test_every_kind_of_layer(layer: nn.Module) -> None:
    assert prunable(nn.Sequential(layer)) == ["0.weight"]


def test_a_subclass_of_a_layer_is_one() -> None:
    class Lazy(nn.Linear):
        pass

    class Conv1DWithBias(Conv1D):
        pass

    assert prunable(nn.Sequential(Lazy(3, 3), Conv1DWithBias())) == ["0.weight", "1.weight"]


def test_other_parameters_of_a_layer_are_left_alone() -> None:
    layer = nn.Linear(8, 8)
    layer.low_rank = nn.Parameter(torch.zeros(8, 2))
    assert reasons(select_parameters(layer)) == {"weight": "", "bias": ONE_DIMENSIONAL, "low_rank": OTHER_KIND}


def test_multi_head_attention() -> None:
    joint = prunable(nn.MultiheadAttention(8, 2))
    assert joint == ["in_proj_weight", "out_proj.weight"]
    separate = select_parameters(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True))
    assert [c.name for c in separate if c.prunable] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    ]
    assert reasons(separate)["bias_k"] == OTHER_KIND


def test_a_head_tied_to_the_embedding_is_not_pruned() -> None:
    model = LanguageModel()
    found = reasons(select_parameters(model))
    assert found == {"wte.weight": "embedding", "attn.weight": "", "attn.bias": ONE_DIMENSIONAL}


def test_a_tied_head_that_is_listed_first_says_to_what_it_is_tied() -> None:
    found = reasons(select_parameters(LanguageModel(head_first=True)))
    assert found["lm_head.weight"] == "tied to the embedding wte.weight"
    assert "wte.weight" not in found


def test_an_untied_head_is_pruned() -> None:
    assert prunable(LanguageModel(tied=False)) == ["attn.weight", "lm_head.weight"]


def test_embeddings_of_other_libraries_are_recognised_by_name() -> None:
    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(50, 8))

    found = reasons(select_parameters(nn.Sequential(VocabParallelEmbedding(), nn.EmbeddingBag(5, 8), nn.Linear(8, 8))))
    assert found["0.weight"] == found["1.weight"] == "embedding"


def test_two_tied_linear_layers_are_listed_once_and_found_by_either_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert prunable(model) == ["0.weight", "2.weight"]
    assert reasons(select_parameters(model, exclude=("1.weight",)))["0.weight"] == "excluded by '1.weight'"
    shared = nn.Linear(4, 4)
    assert prunable(nn.Sequential(shared, shared)) == ["0.weight"]


def test_frozen_and_integer_parameters_are_not_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    found = reasons(select_parameters(model))
    assert found["0.weight"] == "frozen"
    assert found["1.weight"] == "not floating point"
    assert found["temperature"] == "scalar"
    assert found["2.weight"] == ""


def test_include_prunes_nothing_else() -> None:
    found = reasons(select_parameters(ResNet(), include=("layer1.*",)))
    assert [name for name, reason in found.items() if not reason] == [
        "layer1.0.conv1.weight",
        "layer1.0.depthwise.weight",
        "layer1.1.conv1.weight",
        "layer1.1.depthwise.weight",
    ]
    assert found["fc.weight"] == found["conv1.weight"] == "not matched by include"
    assert found["layer1.0.bn1.weight"] == ONE_DIMENSIONAL


def test_include_pulls_in_the_stem() -> None:
    assert prunable(ResNet(), include=("conv1.weight", "fc.*")) == ["conv1.weight", "fc.weight"]
    assert prunable(ResNet(), include=("*",))[0] == "conv1.weight"


def test_a_parameter_of_another_kind_is_included_by_its_full_name_alone() -> None:
    assert prunable(VisionTransformer(), include=("pos_embed", "head.*")) == ["pos_embed", "head.weight"]
    found = reasons(select_parameters(VisionTransformer(), include=("*",)))
    assert found["pos_embed"] == OTHER_KIND


def test_exclude_is_stronger_than_include() -> None:
    found = reasons(select_parameters(ResNet(), include=("layer1.*",), exclude=("*.depthwise.*", "fc.*")))
    assert found["layer1.0.depthwise.weight"] == "excluded by '*.depthwise.*'"
    assert found["layer1.0.conv1.weight"] == ""
    assert found["fc.weight"] == "excluded by 'fc.*'"


KNOWN = {
    "layer1.0.depthwise.weight": "depthwise convolution",
    "fc.weight": "classifier",
    "layer1.1.bn1.weight": "layer scale",
}


def test_what_a_plugin_leaves_out_is_out_for_its_reason() -> None:
    found = reasons(select_parameters(ResNet(), left_out=KNOWN))
    assert {name: found[name] for name in KNOWN} == KNOWN
    assert found["layer1.0.bn1.weight"] == ONE_DIMENSIONAL
    assert [name for name, reason in found.items() if not reason] == [
        "layer1.0.conv1.weight",
        "layer1.1.conv1.weight",
        "layer1.1.depthwise.weight",
    ]


def test_include_brings_back_what_a_plugin_left_out_and_exclude_is_stronger_still() -> None:
    found = reasons(select_parameters(ResNet(), include=("layer1.*",), left_out=KNOWN))
    assert found["layer1.0.depthwise.weight"] == ""
    assert found["fc.weight"] == "not matched by include"
    assert found["layer1.1.bn1.weight"] == "layer scale"  # one-dimensional all the same
    found = reasons(select_parameters(ResNet(), include=("*",), exclude=("*.depthwise.*",), left_out=KNOWN))
    assert found["layer1.0.depthwise.weight"] == "excluded by '*.depthwise.*'"


def test_a_plugin_words_why_a_parameter_of_another_kind_is_out() -> None:
    known = {"pos_embed": "position embedding"}
    assert reasons(select_parameters(VisionTransformer(), left_out=known))["pos_embed"] == "position embedding"
    found = reasons(select_parameters(VisionTransformer(), include=("*",), left_out=known))
    assert (found["pos_embed"], found["cls_token"]) == ("position embedding", OTHER_KIND)
    assert prunable(VisionTransformer(), include=("pos_embed", "head.*")) == ["pos_embed", "head.weight"]


def test_a_plugin_words_what_an_embedding_is_for_but_not_what_is_tied_to_it() -> None:
    known = {"wte.weight": "position embedding"}
    assert reasons(select_parameters(LanguageModel(), left_out=known))["wte.weight"] == "position embedding"
    found = reasons(select_parameters(LanguageModel(head_first=True), left_out={"lm_head.weight": "output head"}))
    assert found["lm_head.weight"] == "tied to the embedding wte.weight"


def test_what_must_stay_dense_says_so_whatever_a_plugin_knows() -> None:
    model = ResNet()
    model.fc.weight.requires_grad_(False)
    assert reasons(select_parameters(model, left_out=KNOWN))["fc.weight"] == "frozen"


def test_a_plugin_may_use_any_name_of_a_tied_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert reasons(select_parameters(model, left_out={"1.weight": "tied"})) == {"0.weight": "tied", "2.weight": ""}


def test_a_plugin_that_names_no_parameter_is_told() -> None:
    with pytest.raises(SelectionError, match=r"left_out names no parameter of ResNet: head\.weight"):
        select_parameters(ResNet(), left_out={"head.weight": "classifier"})


def test_globs_find_parameters_under_their_names_before_compile_and_data_parallel() -> None:
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = ResNet()
    assert prunable(wrapped, include=("fc.weight",)) == ["module._orig_mod.fc.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ("layr1.0.conv1.weight",)},
            "include glob 'layr1.0.conv1.weight' matches no parameter; the nearest",
        ),
        ({"include": ("layr1.0.conv1.weight",)}, "'layer1.0.conv1.weight'"),
        ({"exclude": ("head.*",)}, "exclude glob 'head.*' matches no parameter; the nearest names are"),
        ({"exclude": ("layer1",)}, "exclude glob 'layer1' matches no parameter: it names a module; write 'layer1.*'"),
        (
            {"include": ("fc.bias", "fc.weight")},
            "include glob 'fc.bias' matches no parameter that can be pruned:\n  fc.bias: bias or norm (1-D)",
        ),
        ({"include": ("fc.*",), "exclude": ("*",)}, "no parameter of ResNet can be pruned; check the model, include"),
    ],
)
def test_globs_that_cannot_be_followed(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        select_parameters(ResNet(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "glob", "reason"),
    [
        (lambda model: model.attn.weight.requires_grad_(False), "attn.weight", "frozen"),
        (lambda model: None, "wte.weight", "embedding"),
        (lambda model: None, "lm_head.weight", "embedding"),
        (lambda model: None, "attn.bias", ONE_DIMENSIONAL),
    ],
)
def test_include_cannot_pull_in_what_must_stay_dense(
    prepare: Callable[[LanguageModel], object], glob: str, reason: str
) -> None:
    model = LanguageModel()
    prepare(model)
    with pytest.raises(
        SelectionError, match=f"include glob '{glob}' matches no parameter that can be pruned"
    ) as caught:
        select_parameters(model, include=(glob,))
    assert reason in str(caught.value)


def test_nothing_prunable_lists_what_was_seen() -> None:
    with pytest.raises(SelectionError) as caught:
        select_parameters(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert str(caught.value) == (
        "no parameter of Sequential can be pruned; check the model, include and exclude. Seen:"
        "\n  0.weight (8, 3, 3, 3): input stem"
        "\n  0.bias (8,): bias or norm (1-D)"
        "\n  1.weight (8,): bias or norm (1-D)"
        "\n  1.bias (8,): bias or norm (1-D)"
    )


def test_a_long_list_of_what_was_seen_is_cut() -> None:
    with pytest.raises(SelectionError) as caught:
        select_parameters(nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(15))))
    assert str(caught.value).endswith("\n  and 10 more")
    assert str(caught.value).count("\n") == 21


def test_a_model_without_parameters() -> None:
    with pytest.raises(SelectionError, match=r"Seen: no parameter at all"):
        select_parameters(nn.ReLU())


def test_a_lazy_model_has_to_run_first() -> None:
    with pytest.raises(SelectionError, match=r"parameter '0.weight' has no shape yet: run the model once"):
        select_parameters(nn.Sequential(nn.LazyLinear(4)))


def test_the_model_is_only_read() -> None:
    model = ResNet()
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    select_parameters(model, include=("layer1.*",), exclude=("*.depthwise.*",))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
