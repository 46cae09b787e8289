"""Whole runs with channel sub-nets: what is pruned, described, saved, resumed and refused."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import image_batch, sgd, train
from residual_networks import residual_groups, residual_net, token_groups, token_net
from torch import nn

import ast_plugin
import ast_plugin.masks
from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ConfigError, SelectionError, StateError
from ast_plugin.report import Report
from ast_plugin.sub_nets import SubNetSpec

CASES = {"residual": (residual_net, residual_groups), "tokens": (token_net, token_groups)}


def wrapped(case: str = "residual", **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    network, groups = CASES[case]
    model = network()
    optimizer = sgd(model)
    settings = {"sparsities": (0.25, 0.5, 0.75), "pattern": "channel", "total_steps": 40, "update_interval": 4}
    ast = ast_plugin.wrap(optimizer, model, groups=groups(), **{**settings, **options})
    return model, optimizer, ast


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_with_the_asked_shares_of_channels_nested(case: str) -> None:
    model, optimizer, ast = wrapped(case)
    train(model, optimizer, range(40))
    sizes = {group.name: group.units for group in ast.groups.groups}
    kept = {name: ast.kept_channels(name) for name in ast.sub_nets}
    for name, sparsity in zip(ast.sub_nets, (0.25, 0.5, 0.75), strict=True):
        assert {n: int(flags.sum()) for n, flags in kept[name].items()} == {
            n: round((1 - sparsity) * units) for n, units in sizes.items()
        }
        assert ast.statistics()["sub_nets"][name]["dropped_channels"] == sparsity
        assert ast.masks.sparsity(name) == pytest.approx(sparsity, abs=0.01)  # one side of each weight is whole
    for denser, sparser in (("s25", "s50"), ("s50", "s75")):
        assert all(not (kept[sparser][name] & ~kept[denser][name]).any() for name in sizes)
    assert ast.at_target


def test_only_weights_in_groups_are_pruned_and_the_table_says_why_not_the_others() -> None:
    _, _, ast = wrapped()
    assert set(ast.masks.parameters) == {f"blocks.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}
    table = ast.describe()
    reasons = {row.parameter: row.reason for row in table.rows}
    assert reasons["head.weight"] == "reaches the output of the model"
    assert [(row.group, row.kind, row.units, row.kept) for row in table.groups if not row.reason] == [
        ("blocks.0.conv1", "channels", 16, {"s25": 16, "s50": 16, "s75": 16}),
        ("blocks.1.conv1", "channels", 12, {"s25": 12, "s50": 12, "s75": 12}),
    ]
    text = str(table)
    assert "channel group" in text
    assert text.splitlines()[-1].split(maxsplit=1) == ["head", "reaches the output of the model"]


def test_other_sub_nets_of_the_run_prune_all_that_is_prunable() -> None:
    mixed = (SubNetSpec(sparsity=0.5, name="narrow"), SubNetSpec(sparsity=0.9, name="s90", pattern="unstructured"))
    model, optimizer, ast = wrapped(sparsities=mixed)
    assert "head.weight" in ast.masks.parameters
    train(model, optimizer, range(40))
    assert ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)
    assert ast.masks.get("narrow", "head.weight").all()
    assert not ast.masks.get("s90", "head.weight").all()
    with pytest.raises(ConfigError, match="'s90' is no channel sub-net"):
        ast.kept_channels("s90")


def test_the_file_describes_the_groups_and_the_report_the_channels(tmp_path: Path) -> None:
    model, optimizer, ast = wrapped("tokens")
    train(model, optimizer, range(40))
    ast.save(tmp_path / "elastic.safetensors")
    contents = read_elastic(tmp_path / "elastic.safetensors")
    stored = [
        type(group).from_dict(d) for group, d in zip(ast.groups.groups, contents.header["channel_groups"], strict=True)
    ]
    assert tuple(stored) == ast.groups.groups
    assert {record.pattern for record in contents.records.values()} == {"channel"}
    for report in (Report.from_training(ast), Report.from_elastic(contents)):
        assert [net.dropped_channels for net in report.sub_nets] == [0.25, 0.5, 0.75]
        assert all(net.on_target for net in report.sub_nets)
        assert Report.from_dict(report.to_dict()).sub_nets == report.sub_nets


@pytest.mark.extra("report")
def test_the_report_shows_the_share_of_channels_that_is_dropped() -> None:
    model, optimizer, ast = wrapped("tokens")
    train(model, optimizer, range(40))
    assert "channels dropped" in Report.from_training(ast).render_terminal(width=200)
    assert "channels dropped" in Report.from_training(ast).render_html()


def test_a_run_is_resumed_bit_for_bit() -> None:
    straight = wrapped()
    train(straight[0], straight[1], range(40))
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(17))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    model, optimizer, ast = wrapped()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(17, 40))
    for name, tensor in straight[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert ast.masks.checksum() == straight[2].masks.checksum()


def changed(**axis: Any) -> ChannelGroups:
    found = residual_groups()
    first = found.groups[0]
    axes = tuple(dataclasses.replace(a, **axis) if a.role == "in" else a for a in first.axes)
    return dataclasses.replace(found, groups=(dataclasses.replace(first, axes=axes), *found.groups[1:]))


def test_groups_that_do_not_fit_the_model_are_refused_and_the_model_is_untouched() -> None:
    model = residual_net()
    optimizer = sgd(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = residual_groups().groups[0]
    wrong: list[tuple[object, str]] = [
        (changed(tensor="blocks.0.conv3.weight"), "concerns 'blocks.0.conv3.weight', which the model lacks"),
        (changed(dim=0), "do not fill dimension 0 of blocks.0.conv2.weight"),
        (changed(tensor="blocks.1.conv1.weight", dim=0, parts=((0, 1),)), "do not fill dimension 0"),
        (changed(tensor="blocks.0.bn1.weight", dim=0), "in two groups, or twice in one"),
        (ChannelGroups(groups=(first, first)), "names two groups 'blocks.0.conv1'"),
        (ChannelGroups(groups=(dataclasses.replace(first, axes=first.axes[:-1]),)), "weights that read them"),
        (ChannelGroups(groups=(first.name,)), "must hold ChannelGroup objects, got str"),  # type: ignore[arg-type]
        (first, "groups must be a ChannelGroups"),
    ]
    for groups, message in wrong:
        with pytest.raises(ConfigError, match=message):
            ast_plugin.wrap(optimizer, model, sparsities=(0.5,), pattern="channel", total_steps=10, groups=groups)
    stem = GroupAxis(tensor="stem.weight", dim=0, role="out")
    reader = GroupAxis(tensor="head.weight", dim=1, role="in")
    residual = ChannelGroups(groups=(dataclasses.replace(first, name="stream", units=8, axes=(stem, reader)),))
    options: dict[str, Any] = {"pattern": "channel", "total_steps": 10, "exclude": ("head.*",)}
    with pytest.raises(ConfigError, match=r"is read by 'head\.weight', which is not pruned"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5,), groups=residual, **options)
    with pytest.raises(SelectionError, match="finds no group of channels that can be dropped in this ResidualNet"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5,), groups=ChannelGroups(groups=()), **options)
    with pytest.raises(ConfigError, match="groups has no meaning without a channel sub-net"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5,), total_steps=10, groups=residual_groups())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_a_group_that_forgets_the_bias_of_what_makes_its_units_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    axes = (GroupAxis(tensor="0.weight", dim=0, role="out"), GroupAxis(tensor="2.weight", dim=1, role="in"))
    group = ChannelGroup(name="0", kind="hidden", units=8, axes=axes)
    options: dict[str, Any] = {"sparsities": (0.5,), "pattern": "channel", "total_steps": 10, "method": "static"}
    with pytest.raises(
        ConfigError, match=r"leaves '0\.bias' whole.*add GroupAxis\(tensor='0\.bias', dim=0, role='state'"
    ):
        ast_plugin.wrap(sgd(model), model, groups=ChannelGroups(groups=(group,)), **options)
    group = dataclasses.replace(group, axes=(*axes, GroupAxis(tensor="0.bias", dim=0, role="state")))
    ast_plugin.wrap(sgd(model), model, groups=ChannelGroups(groups=(group,)), **options)
    assert model.train()(torch.zeros(3, 4)).shape == (3, 2)


def test_a_sparser_sub_net_cannot_ask_for_units_that_a_denser_one_drops() -> None:
    model = residual_net()
    options: dict[str, Any] = {"pattern": "channel", "total_steps": 10, "groups": residual_groups(), "method": "static"}
    shares: dict[str, Any] = {"blocks.0.conv1": {"s50": 0.9, "s75": 0.6}}
    with pytest.raises(ConfigError, match=r"channel group 'blocks\.0\.conv1' in sub-net 's75', and for .* in 's50'"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.5, 0.75), distribution=shares, **options)
    assert not model._forward_pre_hooks
    shares["blocks.0.conv1"] = {"s50": 0.25, "s75": 0.75}
    ast_plugin.wrap(sgd(model), model, sparsities=(0.5, 0.75), distribution=shares, **options)


def test_numbers_of_modules_that_do_not_fit_are_refused() -> None:
    model = token_net()
    model.blocks[0].attn.num_heads = 3
    with pytest.raises(ConfigError, match=r"expects num_heads of 'blocks\.0\.attn' to be 4, and it is 3"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.5,), pattern="channel", total_steps=10, groups=token_groups())


def test_a_target_that_leaves_a_group_empty_is_refused_before_anything_is_touched() -> None:
    model = token_net()
    with pytest.raises(ConfigError, match=r"leaves nothing of channel group 'blocks\.0\.attn', which has 4 heads"):
        ast_plugin.wrap(
            sgd(model), model, sparsities=(0.5, 0.9), pattern="channel", total_steps=10, groups=token_groups()
        )
    assert not model._forward_pre_hooks
    ast = ast_plugin.wrap(
        sgd(model),
        model,
        sparsities=(0.5, 0.9),
        pattern="channel",
        total_steps=10,
        groups=token_groups(),
        distribution={"blocks.*.attn": {"s50": 0.5, "s90": 0.75}},
        method="static",
    )
    assert {name: int(flags.sum()) for name, flags in ast.kept_channels("s90").items()}["blocks.0.attn"] == 1


def test_example_inputs_are_asked_for_where_the_model_says_nothing() -> None:
    model = residual_net()
    with pytest.raises(ConfigError, match="needs example_inputs to find out which channels"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.5,), pattern="channel", total_steps=10)
    images, _ = image_batch(0)
    assert images.shape[1:] == (1, 8, 8)


def test_saved_masks_of_single_weights_are_refused_by_channel_sub_nets() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(5))
    state = ast.state_dict()
    mask = ast.masks.get("s50", "blocks.0.conv1.weight").clone()
    mask[3, 2, 1, 1] ^= True
    other = ast_plugin.masks.MaskStore(("s50",), ast.masks.shapes)
    other.replace("s50", {**ast.masks.of("s50"), "blocks.0.conv1.weight": mask})
    state["masks"] = {**state["masks"], "s50": other.pack("s50")}
    before = ast.masks.checksum()
    with pytest.raises(StateError, match=r"do not drop whole channels of this run's groups in 'blocks\.0\.conv1"):
        ast.load_state_dict(state)
    assert ast.masks.checksum() == before
