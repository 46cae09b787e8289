"""Which weights of Hugging Face's networks are pruned: exact sets on the well-known ones, the rules one by one."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers_networks import (
    BERT,
    CLASS_TOKEN,
    CLASSIFIER,
    DEPTHWISE,
    EMBEDDING,
    EXPERTS,
    LLAMA,
    NETWORKS,
    ONE_DIMENSIONAL,
    OTHER_KIND,
    POSITION,
    ROUTER,
    STEM,
    Expected,
    known,
    named,
    on_meta,
    reasons,
)

import ast_plugin
from ast_plugin.distributions import DistributionRequest, LayerRequest, erk
from ast_plugin.errors import SelectionError
from ast_plugin.integrations.transformers.ends import networks
from ast_plugin.integrations.transformers.selection import TransformersSelection
from ast_plugin.parameters import select_parameters

pytestmark = pytest.mark.extra("hf")


@pytest.mark.parametrize("name", NETWORKS)
def test_well_known_networks(name: str) -> None:
    expected = NETWORKS[name]
    model = known(name)
    found = reasons(model)
    for reason, (globs, count) in expected.out.items():
        matched = [parameter for parameter in found if any(fnmatchcase(parameter, glob) for glob in globs.split("|"))]
        matched = [parameter for parameter in matched if found[parameter] != ONE_DIMENSIONAL]
        assert (reason, named(found, reason)) == (reason, matched)
        assert len(matched) == count
    flat = named(found, ONE_DIMENSIONAL)
    assert all(model.get_parameter(parameter).ndim == 1 for parameter in flat)
    prunable = named(found, "")
    assert len(prunable) == expected.prunable
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, transformers.pytorch_utils.Conv1D)
    assert all(isinstance(model.get_submodule(parameter.rpartition(".")[0]), layers) for parameter in prunable)
    assert set(found.values()) == {"", ONE_DIMENSIONAL, *expected.out}


def test_the_table_gives_every_reason_and_a_run_goes_on_without_what_is_left_out() -> None:
    expected = NETWORKS["bert"]
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**expected.settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=4, plugins=[TransformersSelection()])
    assert all(f"no: {reason}" in str(ast.describe()) for reason in expected.out)
    tokens = torch.randint(64, (2, 6))
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    for name in ast.sub_nets:
        with ast.sub_net(name):
            assert all(tensor.all() for parameter, tensor in heads_and_embeddings(model, expected))
        assert ast.masks.sparsity(name) == pytest.approx(float(name[1:]) / 100, abs=1e-3)


def heads_and_embeddings(model: nn.Module, expected: Expected) -> list[tuple[str, nn.Parameter]]:
    globs = [glob for reason, (glob, _) in expected.out.items() if reason != EMBEDDING]  # one row there is padding
    return [(name, tensor) for name, tensor in model.named_parameters() if any(fnmatchcase(name, g) for g in globs)]


def test_include_brings_back_heads_and_stems_and_exclude_is_stronger() -> None:
    model = known("vit")
    assert named(reasons(model, include=("classifier.weight",)), "") == ["classifier.weight"]
    everything = reasons(model, include=("*",), exclude=("vit.embeddings.patch_embeddings.*",))
    assert everything["classifier.weight"] == ""
    assert everything["vit.embeddings.patch_embeddings.projection.weight"].startswith("excluded by")
    assert everything["vit.embeddings.cls_token"] == CLASS_TOKEN
    with pytest.raises(SelectionError, match=r"include glob 'clasifier\.weight' matches no parameter; the nearest"):
        reasons(model, include=("clasifier.weight",))


def test_standardized_convolutions_are_left_out() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [32], "depths": [1], "num_groups": 4, "num_labels": 3}
    found = reasons(on_meta("BitForImageClassification", sizes), include=("classifier.*",))
    assert named(found, "") == ["classifier.1.weight"]
    with pytest.raises(SelectionError, match=r"standardized weight: zeros in it do not stay zeros"):
        reasons(on_meta("BitForImageClassification", sizes))


def test_nothing_left_names_what_is_in_the_way() -> None:
    model = known("vit")
    model.vit.requires_grad_(False)
    with pytest.raises(SelectionError, match=r"no parameter of ViTForImageClassification can be pruned") as caught:
        reasons(model)
    assert "vit.embeddings.patch_embeddings.projection.weight (16, 3, 4, 4): frozen" in str(caught.value)


# ------------------------------------------------------------------------------------------------ Conv1D


def test_a_conv1d_is_pruned_like_a_linear_layer_and_n_of_m_runs_along_its_outputs() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**NETWORKS["gpt2"].settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = [TransformersSelection()]
    ast = ast_plugin.wrap(optimizer, model, sparsities=("2:4",), total_steps=4, method="static", plugins=plugins)
    mask = ast.masks.get("2:4", "transformer.h.0.attn.c_attn.weight")
    assert mask.shape == (16, 48)  # inputs, outputs
    assert (mask.reshape(16, 12, 4).sum(-1) == 2).all()
    assert not (mask.T.reshape(48, 4, 4).sum(-1) == 2).all()


def test_the_order_of_dimensions_means_nothing_to_a_distribution() -> None:
    def sparsities(*shapes: tuple[int, int]) -> list[float]:
        layers = tuple(LayerRequest(name=str(i), shape=s, units=s[0] * s[1]) for i, s in enumerate(shapes))
        return erk(
            DistributionRequest(layers=layers, sparsity=0.8, target_sparsity=0.8, sub_net="s80", unit_scores=list)
        )

    assert sparsities((16, 48), (16, 64), (16, 16)) == sparsities((48, 16), (64, 16), (16, 16))


# ------------------------------------------------------------------------------------------------ experts


class MixtralExperts(nn.Module):
    """As transformers 5 holds them: experts, outputs, inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 16))
        self.down_proj_bias = nn.Parameter(torch.zeros(4, 8))


class MixtralTopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class Mixture(PreTrainedModel):
    """Experts in one tensor, and experts that are linear layers, as transformers 4 had them."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate = MixtralTopKRouter()
        self.mlp.experts = MixtralExperts()
        self.older = nn.Module()
        self.older.gate = nn.Linear(8, 4, bias=False)
        self.older.shared_expert_gate = nn.Linear(8, 1, bias=False)
        self.older.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.gated = nn.Module()
        self.gated.gate = nn.Linear(8, 8, bias=False)  # no experts beside it


def test_routers_stay_dense_and_experts_in_one_tensor_wait_to_be_asked_for() -> None:
    assert reasons(Mixture(PretrainedConfig())) == {
        "q_proj.weight": "",
        "mlp.gate.weight": ROUTER,
        "mlp.experts.gate_up_proj": EXPERTS,
        "mlp.experts.down_proj": EXPERTS,
        "mlp.experts.down_proj_bias": "bias of experts",
        "older.gate.weight": ROUTER,
        "older.shared_expert_gate.weight": ROUTER,
        "older.experts.0.weight": "",
        "older.experts.1.weight": "",
        "gated.gate.weight": "",
    }


def test_a_glob_that_means_nothing_but_experts_includes_them() -> None:
    model = Mixture(PretrainedConfig())
    found = reasons(model, include=("q_proj.weight", "mlp.experts.*_proj"))
    assert named(found, "") == ["q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert reasons(model, include=("*",))["mlp.experts.down_proj"] == EXPERTS
    found = reasons(model, include=("mlp.experts.*_proj",), exclude=("*.down_proj",))
    assert named(found, "") == ["mlp.experts.gate_up_proj"]
    assert found["mlp.experts.down_proj"] == "excluded by '*.down_proj'"


def test_experts_in_one_tensor_train_as_sub_nets() -> None:
    model = Mixture(PretrainedConfig())
    nn.init.normal_(model.mlp.experts.gate_up_proj)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ast = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=(0.75,),
        total_steps=4,
        initial_sparsity=0.75,
        include=("mlp.experts.gate_up_proj",),
        plugins=[TransformersSelection()],
    )
    assert ast.masks.get("s75", "mlp.experts.gate_up_proj").sum().item() == 4 * 32 * 8 // 4


@pytest.mark.parametrize(("network", "routers"), [("MixtralForCausalLM", 2), ("Qwen2MoeForCausalLM", 4)])
def test_experts_of_real_networks(network: str, routers: int) -> None:
    sizes = {"num_local_experts": 4} if network == "MixtralForCausalLM" else {"num_experts": 4}
    widths = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
    found = reasons(on_meta(network, {**LLAMA, **sizes, **widths}))
    assert len(named(found, ROUTER)) == routers
    experts = [name for name in found if ".experts." in name]
    stacked = [name for name in experts if name.endswith("_proj")]  # else linear layers, up to transformers 4
    assert {found[name] for name in experts} == ({EXPERTS} if stacked else {""})
    assert len(experts) == (4 if stacked else 2 * 4 * 3)


# ------------------------------------------------------------------------------------------------ for whom it answers


class Owned(nn.Module):
    """A network of Hugging Face inside a model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = on_meta("BertModel", BERT)
        self.classifier = nn.Linear(16, 2, device="meta")
        self.mixer = nn.Conv1d(16, 16, 3, groups=16, device="meta")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16, device="meta"))


def test_inside_a_model_of_one_s_own_the_rules_hold_for_the_part_that_is_hugging_face_s() -> None:
    model = Owned()
    assert [name for name, _ in networks(model)] == ["encoder"]
    found = reasons(model)
    assert found["encoder.embeddings.position_embeddings.weight"] == POSITION
    assert found["encoder.pooler.dense.weight"] == ""
    assert found["classifier.weight"] == found["mixer.weight"] == ""
    assert found["cls_token"] == OTHER_KIND


def test_two_networks_side_by_side() -> None:
    model = nn.ModuleDict({"student": known("vit"), "teacher": known("llama")})
    model["teacher"].requires_grad_(False)
    assert [name for name, _ in networks(model)] == ["student", "teacher"]
    found = reasons(model)
    assert named(found, CLASSIFIER) == ["student.classifier.weight"]
    assert all(found[name] == "frozen" for name in found if name.startswith("teacher."))


def test_a_compiled_part_keeps_its_reasons() -> None:
    model = known("roberta")
    compiled = nn.Module()
    compiled._orig_mod = model.classifier  # as torch.compile does
    model.classifier = compiled
    assert named(reasons(model), CLASSIFIER) == ["classifier._orig_mod.out_proj.weight"]


def test_parts_that_are_timm_s_have_timm_s_rules() -> None:
    image = nn.Sequential(nn.Conv2d(13, 8, 4, device="meta"), nn.Conv2d(8, 8, 3, groups=8, device="meta"))
    image.pretrained_cfg = {"first_conv": "0"}
    image.dist_token = nn.Parameter(torch.zeros(1, 1, 8, device="meta"))
    found = reasons(nn.ModuleDict({"text": known("bert"), "image": image}))
    assert named(found, STEM) == ["image.0.weight"]
    assert named(found, DEPTHWISE) == ["image.1.weight"]
    assert named(found, "distillation token") == ["image.dist_token"]


def test_other_models_are_left_to_the_next_plugin() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert TransformersSelection().ast_select_parameters(model, (), ()) is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5,), total_steps=10, plugins=[TransformersSelection()])
    assert [row.reason for row in ast.describe().rows] == [choice.reason for choice in select_parameters(model)]


def test_the_model_is_only_read() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = Counter(reasons(model, include=("model.layers.*",)).values())
    assert counts[""] == 14
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
