from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ast_plugin.compile_timing import describe_inputs
from ast_plugin.errors import ConfigError
from ast_plugin.report_flops import FlopCount, count_flops


def test_linear_and_convolution_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    counted = count_flops(model, ("0.weight", "3.weight"), torch.zeros(1, 3, 4, 4))
    # convolution: 4 * 4 places x 8 * 3 * 3 * 3 multiply-adds; linear: 128 * 10; two operations each
    assert counted.layers == {"0.weight": 2 * 16 * 216, "3.weight": 2 * 1280}
    assert counted.total == 2 * 16 * 216 + 2 * 1280


def test_whole_batch_is_counted() -> None:
    assert count_flops(nn.Linear(4, 2), ("weight",), torch.zeros(5, 4)).total == 2 * 5 * 4 * 2


def test_grouped_convolution_counts_the_channels_of_its_group() -> None:
    model = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    assert count_flops(model, ("weight",), torch.zeros(1, 8, 3, 3)).total == 2 * 8 * 9


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.shared(self.shared(x)) * scale


def test_weight_used_twice_counts_twice_and_an_unused_one_not() -> None:
    counted = count_flops(Twice(), ("shared.weight", "unused.weight"), torch.zeros(1, 4))
    assert counted.layers == {"shared.weight": 2 * 2 * 16, "unused.weight": 0}


def test_tied_weight_is_found_under_either_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_flops(model, ("0.weight",), torch.zeros(1, 4)).layers == {"0.weight": 2 * 2 * 16}
    assert count_flops(model, ("1.weight",), torch.zeros(1, 4)).layers == {"1.weight": 2 * 2 * 16}


@pytest.mark.filterwarnings("error")
def test_attention_is_counted_for_each_projection() -> None:
    # 6 tokens of width 8: in_proj 8 -> 24, out_proj 8 -> 8; scores and mixing 2 heads x 6 x 6 x 4, not prunable
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, dropout=0.0)
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    counted = count_flops(model, names, torch.zeros(1, 6, 8))
    assert list(counted.layers.values()) == [2 * 6 * 8 * 24, 2 * 6 * 8 * 8, 2 * 6 * 8 * 16, 2 * 6 * 16 * 8]
    # torch 2.6 does not count attention itself where it runs in one piece on the CPU
    assert counted.total - sum(counted.layers.values()) in (0, 2 * 2 * (2 * 6 * 6 * 4))


def test_share_of_each_layer_is_scaled_by_its_density() -> None:
    counted = FlopCount(total=1000, layers={"a": 400, "b": 500})
    assert counted.at_sparsity({"a": 0.5, "b": 0.9}) == 1000 - 200 - 450
    assert counted.at_sparsity({"a": 0.0}) == 1000
    assert counted.at_sparsity({"unknown": 0.5}) == 1000


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    count_flops(model, ("0.weight",), torch.ones(2, 4))
    assert [module.training for module in model] == [True, True, False]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is fast_path


def test_compiled_model_is_counted_without_compiling() -> None:
    def never(graph: object, example: object) -> object:
        raise AssertionError("compiled")

    model = torch.compile(nn.Sequential(nn.Linear(4, 2)), backend=never)
    counted = count_flops(model, ("0.weight",), torch.zeros(1, 4))
    assert counted.layers == {"0.weight": 2 * 4 * 2}
    assert count_flops(model, ("_orig_mod.0.weight",), torch.zeros(1, 4)).layers == {"_orig_mod.0.weight": 2 * 4 * 2}


@pytest.mark.parametrize("inputs", [(torch.zeros(1, 4),), [torch.zeros(1, 4)], {"x": torch.zeros(1, 4), "scale": 2.0}])
def test_inputs_may_be_positional_or_by_name(inputs: object) -> None:
    assert count_flops(Twice(), ("shared.weight",), inputs).total == 2 * 2 * 16


def test_wrong_inputs_are_explained_and_the_model_is_as_before() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(
        ConfigError, match=r"example_inputs \(1 x 3\) cannot be run through the model: RuntimeError: .*shap"
    ):
        count_flops(model, ("weight",), torch.zeros(1, 3))
    with pytest.raises(ConfigError, match=r"example_inputs \(x: 1 x 4\).*TypeError: .*unexpected keyword"):
        count_flops(model, ("weight",), {"x": torch.zeros(1, 4)})
    assert model.training


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.zeros(1, 3, 8, 8), "1 x 3 x 8 x 8"),
        (torch.tensor(1.0), "one number"),
        ((torch.zeros(2), "text"), "2, str"),
        ({"ids": torch.zeros(1, 9)}, "ids: 1 x 9"),
        ((), "no input"),
        ({}, "no input"),
    ],
)
def test_inputs_are_described_by_their_shapes(inputs: object, text: str) -> None:
    assert describe_inputs(inputs) == text
