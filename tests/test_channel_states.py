"""What a score of whole units is told beside weights: biases, and normalization as the sub-net has it."""

from __future__ import annotations

import torch
from channel_networks import channel_group
from networks import conv_net
from residual_networks import residual_groups, residual_net

from ast_plugin.channel_states import ChannelStates
from ast_plugin.channels import ChannelGroups
from ast_plugin.normalization import PrivateNormalization

STATES = ("weight", "bias", "running_mean", "running_var")


def test_private_tensors_are_the_sub_nets_own_and_masked_weights_are_left_out() -> None:
    model = residual_net()
    groups = residual_groups()
    normalization = PrivateNormalization(model, ("s50", "s75"), "s50")
    state = normalization.state("s75")
    state["blocks.0.bn1.weight"].fill_(3)
    normalization.load("s75", state)
    masked = [axis.tensor for group in groups.groups for axis in group.axes if axis.role != "state"]
    states = ChannelStates(model, groups, normalization, masked)
    assert states.model is model
    assert list(states.of("s50")) == [f"blocks.{i}.bn1.{name}" for i in (0, 1) for name in STATES]
    assert torch.equal(states.of("s75")["blocks.0.bn1.weight"], torch.full((16,), 3.0))
    assert torch.equal(states.of("s50")["blocks.0.bn1.weight"], torch.ones(16))


def test_shared_tensors_are_the_models_own_without_a_copy_or_a_graph() -> None:
    model = conv_net()
    groups = ChannelGroups(groups=(channel_group("conv2", "head", 16, "norm2.bias", "norm2.running_var"),))
    shared = PrivateNormalization(model, ("s50", "s75"), "s50", enabled=False)
    found = ChannelStates(model, groups, shared, ("conv2.weight",)).of("s75")
    assert set(found) == {"norm2.bias", "norm2.running_var", "head.weight"}
    assert found["norm2.bias"].data_ptr() == model.norm2.bias.data_ptr()
    assert not any(tensor.requires_grad for tensor in found.values())
