"""Gradient checkpointing: parts of the forward run a second time inside backward, as the same sub-net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import BATCH_NORM_FREE, ConvNet, conv_net, mlp, snapshot, wrapped
from reference_run import ReferenceRun, assert_close
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for, plain_step, whole_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ast_plugin

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class CheckpointedConvNet(ConvNet):
    """`ConvNet`, whose two inner convolutions with their BatchNorm are recomputed in backward."""

    reentrant = False

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm0(self.stem(images)))
        x = checkpoint(lambda x: functional.relu(self.norm1(self.conv1(x))), x, use_reentrant=self.reentrant)
        x = checkpoint(lambda x: functional.relu(self.norm2(self.conv2(x))), x, use_reentrant=self.reentrant)
        return self.head(x.mean(dim=(2, 3)))


def checkpointed(reentrant: bool) -> Any:
    def build() -> ConvNet:
        torch.manual_seed(0)
        net = CheckpointedConvNet()
        net.reentrant = reentrant
        return net

    return build


@REENTRANT
def test_checkpointing_is_bit_identical_to_plain_checkpointing(reentrant: bool) -> None:
    assert_as_plain(plain_step, net=checkpointed(reentrant))


@REENTRANT
def test_checkpointing_is_the_run_without_it(reentrant: bool) -> None:
    model = checkpointed(reentrant)()
    reference = ReferenceRun(conv_net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), **BUSY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _, _, ast = wrapped(model, optimizer, **BUSY)
    for step in range(15):
        plain_step(model, optimizer, step)
        reference.step(whole_batch(reference.model, step))
    for name in ast.sub_nets:
        for parameter in ast.masks.parameters:
            assert torch.equal(ast.masks.get(name, parameter), reference.masks.get(name, parameter))
        # Running statistics alone differ: torch updates those of recomputed BatchNorms a second time.
        ours, theirs = ({n: t for n, t in run.private_state(name).items() if "running" not in n and "num_" not in n}
                        for run in (ast, reference))  # fmt: skip
        assert_close(ours, theirs, rtol=0.0, atol=0.0)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    assert_close(weights, {n: p.detach() for n, p in reference.parameters.items()}, rtol=0.0, atol=0.0)


@REENTRANT
def test_recomputed_statistics_go_to_the_sub_net_that_is_trained(reentrant: bool) -> None:
    model, optimizer, ast = wrapped(checkpointed(reentrant)(), method="static")
    for step in range(6):
        before = {name: ast.private_state(name) for name in ast.sub_nets}
        name = ast.active
        plain_step(model, optimizer, step)
        for other in ast.sub_nets:
            counts = [int(state["norm1.num_batches_tracked"]) for state in (before[other], ast.private_state(other))]
            assert counts[1] - counts[0] == (2 if other == name else 0)


@REENTRANT
def test_a_checkpointed_sequence_without_batch_norm_is_the_run_written_by_hand(reentrant: bool) -> None:
    class Sequence(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_() if reentrant else x  # a reentrant checkpoint needs one input with a gradient
            return checkpoint_sequential([*self], 2, x, use_reentrant=reentrant)

    def build() -> nn.Module:
        return Sequence(*mlp())

    assert_as_reference(plain_step, net=build, reference_net=mlp)


@pytest.mark.parametrize("net", BATCH_NORM_FREE)
def test_a_checkpoint_around_the_whole_model_is_the_run_without_it(net: Any) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        functional.cross_entropy(checkpoint(model, inputs, use_reentrant=False), labels).backward()
        optimizer.step()

    assert_as_reference(step, net=net)


def test_a_reentrant_checkpoint_around_the_whole_model_is_refused() -> None:
    # Its first pass runs without gradients, as the default sub-net, and nothing tells that apart from an evaluation.
    model, _, _ = wrapped(method="static")
    before = snapshot(model)
    inputs, labels = batch_for(model, 0)
    loss = functional.cross_entropy(checkpoint(model, inputs.requires_grad_(), use_reentrant=True), labels)
    with pytest.raises(ast_plugin.ActivationError, match="use_reentrant=False"):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
