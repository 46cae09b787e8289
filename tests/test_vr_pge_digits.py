"""VR-PGE on real data: probabilities go to 0 and 1 on handwritten digits, and channels of no use are dropped."""

from __future__ import annotations

import networks
import pytest
import torch
import vr_pge_runs as runs
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.demo_data import load_digits
from ast_plugin.vr_pge_method import ChannelSampler, VRPGEOptions, vr_pge

pytestmark = [pytest.mark.slow, pytest.mark.extra("demo")]

STEPS = 400
RATE = 0.1


class HalfBroken(networks.ConvNet):
    """`networks.ConvNet` for digits, in which every other channel of the last convolution never gives anything."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.norm2.register_forward_hook(lambda _, __, output: output * (torch.arange(16) % 2).view(16, 1, 1))


def test_probabilities_converge_to_0_and_1_on_digits_and_the_channels_that_work_are_kept() -> None:
    digits = load_digits()
    torch.manual_seed(0)
    model = HalfBroken()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = vr_pge(VRPGEOptions(rate=RATE))
    _, _, ast = runs.wrapped(model, optimizer, method=method, total_steps=STEPS, end_step=0.6, slicing="off")
    sampler = ast.sampler
    assert isinstance(sampler, ChannelSampler)
    undecided: list[float] = []
    for step in range(STEPS):
        images, labels = digits.batch(step, seed=0, batch_size=64)

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        values = torch.cat(list(sampler.probabilities.values()))
        undecided.append(float((values * (1 - values)).mean()))
    assert undecided[0] > 0.2
    assert undecided[-1] < 0.02
    assert float(((values < 0.02) | (values > 0.98)).double().mean()) > 0.9
    kept = torch.cat(list(ast.kept_channels("s50").values()))
    assert int(kept.sum()) == sampler.budget == len(values) // 2
    assert values[kept].mean() - values[~kept].mean() > 0.9
    model.eval()
    with torch.no_grad():
        right = model(digits.test_images).argmax(1) == digits.test_labels
    assert float(right.double().mean()) > 0.4
    last = ast.kept_channels("s50")["conv2"]
    assert int(last[1::2].sum()) >= 5  # of the eight that work
    assert int(last[::2].sum()) <= 2
