"""What importances of torch-pruning say of our groups is what they say of torch-pruning's own, bit by bit."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from attention_networks import gated, gated_groups, separate_attention, separate_attention_groups
from channel_networks import channel_group
from residual_networks import residual_groups, residual_net, token_groups, token_net
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroup, ChannelGroups
from ast_plugin.errors import ConfigError, MissingExtraError
from ast_plugin.integrations.frameworks.torch_pruning import from_importance
from ast_plugin.integrations.frameworks.torch_pruning_groups import stand_in_group, torch_pruning
from ast_plugin.methods import ChannelScoreInputs

pytestmark = pytest.mark.extra("channels")


class SqueezeExcite(nn.Module):
    """An inverted residual as MobileNet has it: expanded, depthwise, gated by a squeeze-and-excite, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(1, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.depthwise(self.norm1(self.expand(x)).relu())).relu()
        return self.project(x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class Flattened(nn.Module):
    """A convolution whose 6 x 6 images are flattened: 36 columns of the linear layer read each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.Linear(7 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def squeeze_excite_groups() -> ChannelGroups:
    group = channel_group("expand", "squeeze", 12, "norm1.weight", "norm1.bias", "depthwise.weight", "norm2.weight")
    gate, reader = channel_group("excite", "project", 12, "excite.bias").axes_of("out", "in")
    axes = (group.axes[0], gate, *group.axes[1:], reader)
    return ChannelGroups(groups=(dataclasses.replace(group, axes=axes), channel_group("squeeze", "excite", 4)))


def flattened_groups() -> ChannelGroups:
    return ChannelGroups(groups=(channel_group("conv", "head", 7, "conv.bias", "norm.weight", columns=36),))


IMAGES, TOKENS = (2, 1, 8, 8), (2, 7, 5)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], ChannelGroups], tuple[int, ...]]] = {
    "residual": (residual_net, residual_groups, IMAGES),
    "fused attention and hidden units": (token_net, token_groups, IMAGES),
    "separate attention": (separate_attention, separate_attention_groups, TOKENS),
    "shared keys and values": (lambda: separate_attention(4, 2), lambda: separate_attention_groups(4, 2), TOKENS),
    "gated": (lambda: gated(fused=False), lambda: gated_groups(fused=False), TOKENS),
    "gated and fused": (lambda: gated(fused=True), lambda: gated_groups(fused=True), TOKENS),
    "squeeze and excite": (SqueezeExcite, squeeze_excite_groups, IMAGES),
    "flattened": (Flattened, flattened_groups, IMAGES),
}
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: tp.importance.MagnitudeImportance(),
    "L1, first layer, as it is": lambda: tp.importance.MagnitudeImportance(
        p=1, group_reduction="first", normalizer=None
    ),
    "last layer, largest 1": lambda: tp.importance.MagnitudeImportance(group_reduction="gate", normalizer="max"),
    "sums, Gaussian": lambda: tp.importance.MagnitudeImportance(group_reduction="sum", normalizer="gaussian"),
    "products": lambda: tp.importance.MagnitudeImportance(group_reduction="prod", normalizer="sum"),
    "largest, by the median": lambda: tp.importance.MagnitudeImportance(
        group_reduction="max", normalizer="sentinel_0.5"
    ),
    "with biases": lambda: tp.importance.MagnitudeImportance(bias=True),
    "lamp": lambda: tp.importance.LAMPImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(),
    "taylor": lambda: tp.importance.TaylorImportance(),
    "taylor of units": lambda: tp.importance.TaylorImportance(multivariable=True),
}


def trained_a_little(network: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """Return the network with gradients, and with BatchNorm scales that differ."""
    torch.manual_seed(1)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model(torch.randn(shape)).pow(2).sum().backward()
    return model


def inputs_of(model: nn.Module, group: ChannelGroup, /, **changes: Any) -> ChannelScoreInputs:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {axis.tensor for axis in group.axes if axis.role != "state"}
    values: dict[str, Any] = {
        "group": group,
        "weights": {name: tensors[name].detach() for name in names},
        "gradients": {name: tensors[name].grad for name in names},
        "kept": torch.ones(group.units, dtype=torch.bool),
        "generator": torch.Generator().manual_seed(3),
        "states": {axis.tensor: tensors[axis.tensor].detach() for axis in group.axes if axis.role == "state"},
        "model": model,
    }
    return ChannelScoreInputs(**{**values, **changes})


def own_group(model: nn.Module, group: ChannelGroup, shape: tuple[int, ...]) -> Any:
    """Return the group that torch-pruning finds by its graph, of a copy of the model, for the same layers.

    Its pruners begin at the layer that reads where there are attention heads; they have no other way with halves.
    """
    twin = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.grad = ours.grad
    graph = tp.DependencyGraph().build_dependency(twin, torch.randn(shape), verbose=False)
    (maker, *_), (reader, *_) = group.axes_of("out"), group.axes_of("in")
    backwards = group.kind == "heads" or len(maker.parts) > 1
    layer = twin.get_submodule((reader if backwards else maker).tensor.rpartition(".")[0])
    pruner = graph.get_pruner_of_module(layer)
    if backwards:
        return graph.get_pruning_group(layer, pruner.prune_in_channels, list(range(pruner.get_in_channels(layer))))
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))


@pytest.mark.parametrize("case", NETWORKS)
def test_scores_are_those_of_the_packages_own_groups_bit_by_bit(case: str) -> None:
    network, groups, shape = NETWORKS[case]
    model = trained_a_little(network, shape)
    for group in groups().groups:
        theirs = own_group(model, group, shape)
        for name, make in IMPORTANCES.items():
            score = from_importance(make()).channel_score
            assert score is not None
            ours = score(inputs_of(model, group))
            expected = make()(theirs).view(group.units, -1).mean(1)
            assert torch.equal(ours, expected), (group.name, name)
            assert len(expected.unique()) > 1, (group.name, name)


def test_batch_norm_scales_are_those_that_are_given() -> None:
    model = trained_a_little(residual_net, IMAGES)
    group = residual_groups().groups[0]
    score = from_importance(tp.importance.BNScaleImportance()).channel_score
    assert score is not None
    assert torch.equal(
        score(inputs_of(model, group)), tp.importance.BNScaleImportance()(own_group(model, group, IMAGES))
    )
    others = {"blocks.0.bn1.weight": torch.arange(16.0)}
    assert torch.equal(score(inputs_of(model, group, states=others)), torch.arange(16.0) / 7.5)  # divided by the mean


def test_heads_are_averaged_as_the_packages_pruner_averages_them() -> None:
    model = trained_a_little(token_net, IMAGES)
    twin = copy.deepcopy(model)
    layers = [twin.get_submodule(f"blocks.{i}.attn.qkv") for i in range(2)]
    pruner = tp.pruner.BasePruner(
        twin,
        torch.randn(IMAGES),
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.01,  # of nothing, no heads would go either
        num_heads=dict.fromkeys(layers, 4),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[twin.get_submodule("embed"), twin.get_submodule("head")],
    )
    score = from_importance(tp.importance.MagnitudeImportance()).channel_score
    assert score is not None
    groups = [group for group in token_groups().groups if group.kind == "heads"]
    ours = {group.name: score(inputs_of(model, group)) for group in groups}
    pruner.step()
    for i, name in enumerate(ours):
        kept = ours[name].topk(2).indices.sort().values
        rows = torch.cat([part + head * 3 + torch.arange(3) for part in (0, 12, 24) for head in kept.tolist()])
        pruned = twin.get_submodule(f"blocks.{i}.attn.qkv").weight
        assert torch.equal(pruned, model.get_submodule(f"blocks.{i}.attn.qkv").weight[rows])


def test_layers_stand_in_without_copies_and_the_model_keeps_its_own() -> None:
    model = trained_a_little(residual_net, IMAGES)
    group = residual_groups().groups[0]
    before = {name: (id(p), p.grad, p._version) for name, p in model.named_parameters()}
    found = stand_in_group(inputs_of(model, group), with_gradients=True)
    layer = found.group[0].dep.target.module
    conv1 = model.get_submodule("blocks.0.conv1")
    assert isinstance(layer, nn.Conv2d)
    assert layer is not conv1
    assert layer.weight.data_ptr() == conv1.weight.data_ptr()
    assert layer.weight.grad.data_ptr() == conv1.weight.grad.data_ptr()
    assert found.layers == ("blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2")
    layer.register_forward_hook(lambda *_: None)
    layer.register_parameter("weight", None)
    assert not conv1._forward_hooks
    assert {name: (id(p), p.grad, p._version) for name, p in model.named_parameters()} == before


def test_a_layer_whose_weight_is_in_by_out_is_shown_as_a_linear_one() -> None:
    transformers_like = type("Conv1D", (nn.Module,), {})
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    swapped = nn.Sequential(transformers_like(), transformers_like())
    for ours, theirs in zip(swapped, model, strict=True):
        ours.weight, ours.bias = nn.Parameter(theirs.weight.detach().t().contiguous()), theirs.bias
    group = channel_group("0", "1", 6, "0.bias")
    axes = [dataclasses.replace(axis, dim=1 - axis.dim) if axis.role != "state" else axis for axis in group.axes]
    score = from_importance(tp.importance.MagnitudeImportance(), base="gmp").channel_score
    assert score is not None
    plain = score(inputs_of(model, group, gradients=None))
    assert torch.equal(score(inputs_of(swapped, dataclasses.replace(group, axes=tuple(axes)), gradients=None)), plain)


def test_parameters_outside_of_known_layers_are_shown_as_parameters() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(6))
            self.register_buffer("seen", torch.zeros(6))

    model = nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 3))
    group = channel_group("0", "2", 6, "0.bias", "1.gamma", "1.seen")
    found = stand_in_group(inputs_of(model, group, gradients=None), with_gradients=False)
    shown = [(item.dep.target.module, item.idxs, item.root_idxs) for item in found.group]
    assert [type(target) for target, _, _ in shown] == [nn.Linear, nn.Parameter, nn.Linear]
    assert all(idxs == root_idxs == list(range(6)) for _, idxs, root_idxs in shown)
    assert found.layers == ("0", "1.gamma", "2")


def test_without_the_package_or_a_model_or_with_another_version_the_remedy_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = residual_net()
    with pytest.raises(ConfigError, match="needs the model"):
        stand_in_group(inputs_of(model, residual_groups().groups[0], model=None), with_gradients=False)
    with monkeypatch.context() as patch:
        patch.delattr("torch_pruning.dependency.Node")
        with pytest.raises(ConfigError, match=r"torch-pruning .* has no dependency\.Node; install torch-pruning>="):
            torch_pruning()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_pruning.ops", None)
        with pytest.raises(ConfigError, match="has no ops; install"):
            torch_pruning()
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"torch-pruning.*ast-plugin\[channels\]"):
        torch_pruning()
