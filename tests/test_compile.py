"""A compiled sub-net is a module of its own with the sub-net's outputs, in the form that was asked for."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_examples import images, network, write_example
from sliced_examples import HYBRID_GROUPS, hybrid, pictures, write_channels
from torch import Tensor, nn

import ast_plugin.compile as forms
from ast_plugin import compile_layers, compile_semi_structured
from ast_plugin.compile import FORMS
from ast_plugin.compile_layers import compress_layers
from ast_plugin.compile_linear import SparseLinear, linear_layers
from ast_plugin.compile_semi_structured import is_two_of_four
from ast_plugin.compile_timing import call, interleaved, same_outputs
from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_file import write_elastic
from ast_plugin.errors import ActivationError, ConfigError
from ast_plugin.masks import MaskStore


@pytest.fixture
def channels(tmp_path: Path) -> Elastic:
    return load(write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS), hybrid(seed=5))


@pytest.fixture
def unstructured(tmp_path: Path) -> Elastic:
    return load(write_example(tmp_path / "elastic.safetensors"), network(seed=5))


def sparse_weight(rows: int, columns: int, sparsity: float, block: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows // block, columns // block, generator=generator) >= sparsity
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(rows, columns, generator=generator) * kept


def sparse_mlp(sparsity: float = 0.9, block: int = 1) -> nn.Sequential:
    """Two linear layers with zeros, and a dense one that no block of 8 fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    for index in (0, 2):
        model[index].weight.data = sparse_weight(*model[index].weight.shape, sparsity, block, seed=index)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", ["dense", "sliced", "csr", "bsr"])
@pytest.mark.parametrize("name", ["c50", "c75"])
def test_every_form_gives_the_outputs_of_the_sub_net(channels: Elastic, name: str, form: str) -> None:
    with channels.sub_net(name), torch.no_grad():
        expected = channels.model(pictures())
    for inputs in (None, pictures(), (pictures(),), {"images": pictures()}):
        module = channels.compile(name, form, inputs, seconds=0.01)
        torch.testing.assert_close(module(pictures()), expected, rtol=1e-5, atol=1e-5)
        assert module.compiled_form["form"] == form
        assert module.compiled_form["sub_net"] == name


def test_the_loaded_model_is_left_as_it_is(channels: Elastic) -> None:
    channels.model.train()
    before = {name: tensor.clone() for name, tensor in channels.model.state_dict().items()}
    for form in ("dense", "sliced", "csr"):
        module = channels.compile("c75", form, pictures(), seconds=0.01)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert channels.active == "c50"
    assert channels.model.training
    assert channels.model.fc1.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in channels.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in channels.model.modules())


@pytest.mark.parametrize("form", ["dense", "sliced"])
def test_no_hook_and_no_class_of_ours_is_in_the_module(channels: Elastic, form: str) -> None:
    module = channels.compile("c50", form, pictures())
    assert b"ast_plugin" not in pickle.dumps(module).replace(b"sliced_examples", b"")
    assert not any(place for m in module.modules() for place in (m._forward_hooks, m._forward_pre_hooks))


def test_a_sub_net_that_was_trained_on_as_an_ordinary_model_is_not_sliced(channels: Elastic) -> None:
    with channels.sub_net("c75") as model, torch.no_grad():
        model.fc2.weight += 0.1
    with pytest.raises(ActivationError, match=r"'fc2\.weight' reads dropped units .* use form='dense', or load"):
        channels.compile("c75", "sliced")
    assert (
        "reads dropped units"
        in channels.compile("c75", "auto", pictures(), seconds=0.01).compiled_form["left_out"]["sliced"]
    )
    channels.compile("c50", "sliced", pictures())  # another memory


def test_a_sliced_module_is_smaller_and_says_so(channels: Elastic) -> None:
    module = channels.compile("c75", "sliced")
    assert "Conv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6, bias=False)" in repr(module)
    assert module.compiled_form["units"] == {"block.expand": "6 of 24", "attn.qkv": "1 of 4", "fc1": "8 of 32"}
    whole = sum(p.numel() for p in channels.compile("c75", "dense").parameters())
    assert sum(p.numel() for p in module.parameters()) < 0.5 * whole


@pytest.mark.parametrize("name", ["sclied", "2:8", "", None])
def test_an_unknown_form_is_refused_with_the_near_ones(unstructured: Elastic, name: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown form .*Known: 2:4, auto, bsr, csr, dense, sliced"):
        unstructured.compile("s80", name)
    with pytest.raises(ConfigError, match="unknown form 'sclied': did you mean 'sliced'"):
        unstructured.compile("s80", "sclied")


def test_an_unknown_sub_net_is_refused_with_the_near_ones(unstructured: Elastic) -> None:
    with pytest.raises(ConfigError, match="there is no sub-net 's8': did you mean 's80'"):
        unstructured.compile("s8", "dense")


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": "5"}, {"block_size": 1}, {"block_size": 4.0}])
def test_options_out_of_range_are_refused(unstructured: Elastic, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} must be a .*, got"):
        unstructured.compile("s80", "csr", **options)


def test_inputs_of_another_kind_are_refused(unstructured: Elastic) -> None:
    with pytest.raises(ConfigError, match=r"example_inputs must be a tensor, a tuple .* got list"):
        unstructured.compile("s80", "auto", [images()])


@pytest.mark.parametrize("form", ["auto", "sliced", "csr", "bsr"])
def test_inputs_that_the_model_does_not_accept_are_named(channels: Elastic, form: str) -> None:
    with pytest.raises(ConfigError, match=r"example_inputs \(2 x 1 x 8 x 8\) cannot be run .*; give what the model"):
        channels.compile("c75", form, torch.ones(2, 1, 8, 8))


@pytest.mark.parametrize("name", [["c75"], {"c75"}, 3, None])
def test_names_of_another_kind_are_refused(channels: Elastic, name: Any) -> None:
    for ask in (channels.compile, channels.switch, channels.kept_channels, channels.materialize):
        with pytest.raises(ConfigError, match=r"there is no sub-net .* Known: c50, c75"):
            ask(name)


@pytest.mark.parametrize("form", ["dense", "csr", "bsr", "2:4"])
def test_a_multiple_goes_with_a_form_that_cuts_channels_out(channels: Elastic, form: str) -> None:
    with pytest.raises(ConfigError, match=rf"multiple=8 .* form '{form}' cuts out none; give form='sliced', or leave"):
        channels.compile("c75", form, pictures(), multiple=8)
    assert channels.compile("c75", "auto", pictures(), multiple=8, seconds=0.1).compiled_form["sub_net"] == "c75"


@pytest.mark.parametrize("form", ["auto", "dense", "sliced"])
def test_a_multiple_out_of_range_is_refused_whatever_the_form(channels: Elastic, form: str) -> None:
    with pytest.raises(ConfigError, match="multiple must be a whole number of at least 1, such as 8 or 16, got 0"):
        channels.compile("c75", form, pictures(), multiple=0)


def test_sub_nets_of_another_pattern_cannot_be_sliced(unstructured: Elastic, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'s80' cannot be sliced: its pattern is None; .* pattern='channel'"):
        unstructured.compile("s80", "sliced")
    entries = [{"name": name, "target_sparsity": 0.5, "pattern": "channel"} for name in ("s50", "s80")]
    older = load(write_example(tmp_path / "older.safetensors", sub_nets=entries), network())
    with pytest.raises(ConfigError, match="describes no channel groups"):
        older.compile("s80", "sliced")


def test_a_model_of_half_precision_has_the_dense_and_the_sliced_form(tmp_path: Path) -> None:
    path = write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS)
    elastic = load(path, hybrid().bfloat16())
    given = pictures().bfloat16()
    dense, sliced = (elastic.compile("c75", form, given) for form in ("dense", "sliced"))
    torch.testing.assert_close(sliced(given), dense(given), rtol=0.05, atol=0.05)
    with pytest.raises(ConfigError, match=r"form 'csr' fits none of the 5 linear layers: attn\.qkv: weights of bf"):
        elastic.compile("c75", "csr", given)


# ------------------------------------------------------------------------------------------------ auto


def test_auto_needs_inputs(unstructured: Elastic) -> None:
    with pytest.raises(ConfigError, match="form='auto' measures the forms, which takes example_inputs"):
        unstructured.compile("s80")


def test_auto_takes_what_was_measured_fastest(channels: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, float] = {}

    def times(functions: dict[str, Callable[[], Any]], *, seconds: float) -> dict[str, float]:
        assert seconds > 0
        for function in functions.values():
            function()
        return {name: measured.get(name, 9.0) for name in functions}

    monkeypatch.setattr(forms, "interleaved", times)
    for best in ("dense", "sliced"):
        measured.clear()
        measured[best] = 1.0
        module = channels.compile("c75", "auto", pictures(), seconds=0.01)
        assert module.compiled_form["form"] == best
        assert module.compiled_form["measured_ms"][best] == 1.0
        assert {"dense", "sliced"} <= set(module.compiled_form["measured_ms"])
        assert module.fc1.out_features == (8 if best == "sliced" else 32)
        assert "needs a CUDA device" in module.compiled_form["left_out"]["2:4"]
    json.dumps(module.compiled_form)


def test_auto_measures_for_real_and_leaves_out_what_does_not_fit(unstructured: Elastic) -> None:
    module = unstructured.compile("s80", "auto", images(), seconds=0.05)
    report = module.compiled_form
    assert report["form"] == min(report["measured_ms"], key=report["measured_ms"].get)
    assert report["left_out"]["sliced"] == "not a channel sub-net"
    assert set(report["measured_ms"]) | set(report["left_out"]) == set(FORMS) - {"auto"}
    with unstructured.sub_net("s80"), torch.no_grad():
        torch.testing.assert_close(module(images()), unstructured.model(images()), rtol=1e-5, atol=1e-5)


def test_a_pattern_of_blocks_chooses_the_blocks(tmp_path: Path) -> None:
    model = sparse_mlp(0.8, block=4)
    masks = MaskStore(("b80",), {"0.weight": (64, 32), "2.weight": (32, 64)})
    for name in masks.parameters:
        masks.set("b80", name, model.get_parameter(name) != 0)
    for pattern, edge in (("4x4", 4), ("unstructured", 8), ("2x4", 8)):
        header = {"sub_nets": [{"name": "b80", "target_sparsity": 0.8, "pattern": pattern}]}
        write_elastic(tmp_path / "b.safetensors", state=model.state_dict(), masks=masks, private={}, header=header)
        module = load(tmp_path / "b.safetensors", sparse_mlp()).compile("b80", "bsr")
        layers = {layer["layer"]: layer["zeros"] for layer in module.compiled_form["layers"]}
        assert (layers["0"] > 0.7) == (edge == 4)


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(("layout", "block"), [("csr", 1), ("bsr", 8), ("bsr", 4)])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (2, 3, 4), (64,), (3, 25)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_layer_multiplies_inputs_of_any_rank(
    layout: Any, block: int, shape: tuple[int, ...], bias: bool, contiguous: bool
) -> None:
    dense = nn.Linear(16, 24, bias=bias).requires_grad_(False)
    dense.weight.data = sparse_weight(24, 16, 0.6, block)
    layer = SparseLinear(dense.weight, dense.bias, layout=layout, block_size=block, contiguous=contiguous)
    given = torch.randn(*shape, 16)
    result = layer(given)
    torch.testing.assert_close(result, dense(given))
    assert result.is_contiguous() or not contiguous
    assert torch.equal(layer(input=given.double().float()), result)
    assert layer.weight.shape == (24, 16)
    assert layer.weight.dtype == torch.float32


def test_a_hand_worked_layer() -> None:
    # Rows: one value in column 2, none, two in columns 0 and 1.
    layer = SparseLinear(torch.tensor([[0.0, 0, 5], [0, 0, 0], [7, 8, 0]]), torch.tensor([1.0, 2, 3]), layout="csr")
    assert layer.row_starts.tolist() == [0, 1, 1, 3]
    assert layer.columns.tolist() == [2, 0, 1]
    assert layer.values.tolist() == [5, 7, 8]
    assert layer.row_starts.dtype == layer.columns.dtype == torch.int32
    assert layer(torch.tensor([[1.0, 10, 100]])).tolist() == [[501, 2, 90]]
    assert "csr, 66.7% zeros" in repr(layer)


@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_a_weight_of_zeros_and_no_tokens_are_no_special_cases(layout: Any) -> None:
    layer = SparseLinear(torch.zeros(16, 8), torch.arange(16.0), layout=layout)
    assert torch.equal(layer(torch.randn(3, 8)), torch.arange(16.0).expand(3, 16))
    assert layer(torch.randn(0, 8)).shape == (0, 16)
    assert layer(torch.randn(2, 0, 8)).shape == (2, 0, 16)
    assert torch.equal(SparseLinear(torch.zeros(16, 8), None, layout=layout)(torch.randn(8)), torch.zeros(16))


def test_double_precision_is_multiplied_too() -> None:
    weight = sparse_weight(16, 8, 0.5).double()
    given = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(SparseLinear(weight, None, layout="csr")(given), given @ weight.T)


def test_autocast_is_off_for_the_product() -> None:
    layer = SparseLinear(sparse_weight(16, 8, 0.5), None, layout="csr")
    given = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(given), layer(given.float()))
        assert layer(given.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(layer(given), given @ layer.weight.to_dense().T)


def test_other_types_and_sizes_are_refused() -> None:
    layer = SparseLinear(sparse_weight(16, 8, 0.5), None, layout="csr")
    for given in (torch.randn(3, 8).half(), torch.randn(3, 16), torch.randn(3, 8).double()):
        with pytest.raises(ConfigError, match=r"takes torch.float32 of shape \(\.\.\., 8\), got"):
            layer(given)
    with pytest.raises(ConfigError, match=r"converted to torch\.float16"):
        layer.half()(torch.randn(3, 8).half())
    with pytest.raises(ConfigError, match="multiplies float32 and float64 weights"):
        SparseLinear(torch.zeros(8, 8).bfloat16(), None, layout="csr")
    with pytest.raises(ConfigError, match=r"blocks of 8x8 do not fill a weight of shape \(12, 8\)"):
        SparseLinear(torch.zeros(12, 8), None, layout="bsr")


def test_gradients_are_refused() -> None:
    layer = SparseLinear(sparse_weight(16, 8, 0.5), None, layout="csr")
    given = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ActivationError, match="has no gradients: call the model under"):
        layer(given)
    with torch.no_grad():
        assert layer(given).shape == (3, 16)


def test_layers_can_be_copied_saved_converted_and_loaded() -> None:
    layer = SparseLinear(sparse_weight(16, 8, 0.5), torch.randn(16), layout="csr")
    given = torch.randn(3, 8)
    expected = layer(given)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(given), expected)
        assert other.values.data_ptr() != layer.values.data_ptr()
    state = layer.state_dict()
    assert all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in state.values())
    again = SparseLinear(layer.weight.to_dense() * 2, torch.zeros(16), layout="csr")
    again(given)
    again.load_state_dict(state)
    assert torch.equal(again(given), expected)
    again.load_state_dict({name: 3 * tensor if name == "values" else tensor for name, tensor in state.items()})
    assert not torch.equal(again(given), expected)
    again.load_state_dict(state, assign=True)
    assert torch.equal(again(given), expected)
    assert torch.allclose(layer.double()(given.double()).float(), expected)


def test_layers_are_taken_where_they_were_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def times(functions: dict[str, Callable[[], Any]], *, seconds: float) -> dict[str, float]:
        outputs = [function() for function in functions.values()]
        torch.testing.assert_close(*outputs)
        seen.append(outputs[0].shape)
        return {"dense": 1.0, "sparse": 0.5 if len(seen) == 1 else 0.99}

    monkeypatch.setattr(compile_layers, "interleaved", times)
    model, layers = compress_layers(sparse_mlp(), "csr", torch.randn(7, 32), block_size=8, seconds=1)
    assert [type(module) for module in model if not isinstance(module, nn.ReLU)] == [SparseLinear, nn.Linear, nn.Linear]
    assert [(layer.form, layer.reason) for layer in layers] == [
        ("csr", ""),
        ("dense", "measured not to pay"),
        ("dense", "too few zeros"),
    ]
    assert (layers[0].dense_ms, layers[0].ms) == (1.0, 0.5)
    assert seen == [(7, 64), (7, 32)]


def test_without_inputs_zeros_decide() -> None:
    dense = sparse_mlp()
    model, layers = compress_layers(sparse_mlp(), "csr", None, block_size=8, seconds=1)
    assert [layer.form for layer in layers] == ["csr", "csr", "dense"]
    given = torch.randn(4, 32)
    torch.testing.assert_close(model(given), dense(given))
    assert model(given).is_contiguous()
    _, layers = compress_layers(sparse_mlp(0.8), "csr", None, block_size=8, seconds=1)
    assert layers[0].reason == "fewer than 85% zeros, and nothing measured"


def test_layers_that_blocks_do_not_fill_stay_dense() -> None:
    _, layers = compress_layers(sparse_mlp(0.8, block=8), "bsr", None, block_size=8, seconds=1)
    assert [layer.form for layer in layers] == ["bsr", "bsr", "dense"]
    assert layers[2].reason == "5 x 32 is not made of blocks of 8x8"
    with pytest.raises(ConfigError, match="form 'bsr' fits none of the 3 linear layers: 0: 64 x 32 is not made"):
        compress_layers(sparse_mlp(), "bsr", None, block_size=7, seconds=1)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="form 'csr' is for linear layers, and the model has none"):
        compress_layers(nn.Conv2d(3, 4, 1), "csr", None, block_size=8, seconds=1)


class Conv1D(nn.Module):
    """Hugging Face's linear layer, whose weight is stored inputs first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(sparse_weight(nf, nx, 0.9).t().contiguous())
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def test_a_transposed_weight_is_turned() -> None:
    model = nn.Sequential(Conv1D(24, 16)).eval().requires_grad_(False)
    given = torch.randn(2, 3, 16)
    expected = model(given)
    for layout, block in (("csr", 8), ("bsr", 1)):
        model, layers = compress_layers(nn.Sequential(model[0]), layout, None, block_size=block, seconds=1)
        assert layers[0].form == layout
        torch.testing.assert_close(model(given), expected)
        model = nn.Sequential(Conv1D(24, 16))
        expected = model(given).detach()


def test_a_layer_at_two_places_is_replaced_at_both() -> None:
    layer = nn.Linear(16, 16)
    layer.weight.data = sparse_weight(16, 16, 0.9)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    model, layers = compress_layers(model, "csr", None, block_size=8, seconds=1)
    assert len(layers) == 1
    assert isinstance(model["a"], SparseLinear)
    assert model["b"][0] is model["a"]
    alone, _ = compress_layers(layer, "csr", None, block_size=8, seconds=1)
    assert isinstance(alone, SparseLinear)


def test_layers_that_others_read_or_watch_are_left_alone() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    watched = nn.Linear(8, 8)
    watched.register_forward_hook(lambda *_: None)
    model = nn.ModuleList(
        [
            nn.MultiheadAttention(8, 2),
            nn.TransformerEncoderLayer(8, 2, 16),
            Other(8, 8),
            watched,
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            nn.Linear(8, 8),
        ]
    )
    assert [layer.paths for layer in linear_layers(model)] == [("5",)]


def test_a_layer_that_is_not_called_stays_dense() -> None:
    model = sparse_mlp()
    model.register_module("idle", nn.Linear(32, 32))
    model.forward = lambda given: nn.Sequential.forward(nn.Sequential(*list(model)[:5]), given)
    _, layers = compress_layers(model, "csr", torch.randn(4, 32), block_size=8, seconds=0.01)
    assert layers[3].reason == "not called with the example inputs"


def test_code_that_views_outputs_gets_the_usual_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 24)
            self.fc.weight.data = sparse_weight(24, 16, 0.9)

        def forward(self, given: Tensor) -> Tensor:
            return self.fc(given).view(-1)

    monkeypatch.setattr(compile_layers, "interleaved", lambda functions, seconds: {"dense": 2.0, "sparse": 1.0})
    model = Viewing().requires_grad_(False)
    given = torch.randn(3, 16)
    expected = model(given)
    model, _ = compress_layers(model, "csr", given, block_size=8, seconds=1)
    assert model.fc.contiguous
    torch.testing.assert_close(model(given), expected)


def test_a_form_that_changes_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SparseLinear):
        def _product(self, input: Tensor) -> Tensor:
            return super()._product(input) + 1

    monkeypatch.setattr(compile_layers, "SparseLinear", Wrong)
    monkeypatch.setattr(compile_layers, "interleaved", lambda functions, seconds: {"dense": 2.0, "sparse": 1.0})
    with pytest.raises(ActivationError, match="form 'csr' gives other outputs than the dense form"):
        compress_layers(sparse_mlp(), "csr", torch.randn(4, 32), block_size=8, seconds=1)


# ------------------------------------------------------------------------------------------------ 2:4


def test_two_of_four_needs_cuda(unstructured: Elastic) -> None:
    with pytest.raises(ConfigError, match="form '2:4' needs a CUDA device, and the model is on 'cpu'"):
        unstructured.compile("s80", "2:4")


def test_which_weights_are_two_of_four() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3], [0, 0, 0, 0, 1, 1, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 2, 3, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0]]))


def test_layers_that_are_two_of_four_are_turned_and_others_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything but torch's kernel, which needs the device: the weight passes through unchanged.
    monkeypatch.setattr(compile_semi_structured, "_check_device", lambda layers: None)
    taken = []

    def turn(weight: Tensor) -> Tensor:
        if weight.shape[0] < 16:
            raise RuntimeError("shape is not supported\nmore")
        taken.append(weight.shape)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", turn)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)).bfloat16().requires_grad_(False)
    for index in (0, 2):
        model[index].weight.data[:, ::2] = 0
    given = torch.randn(3, 8).bfloat16()
    expected = model(given)
    model, layers = compile_semi_structured.two_of_four(model, given)
    assert [(layer.form, layer.reason) for layer in layers] == [
        ("2:4", ""),
        ("dense", "its weights are not 2:4 sparse"),
        ("dense", "shape is not supported"),
    ]
    assert taken == [(16, 8)]
    assert torch.equal(model(given), expected)


# ------------------------------------------------------------------------------------------------ timing


def test_functions_are_called_in_turn_and_at_least_three_times() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0)
    assert calls == ["a", "b"] * 4  # one round to warm up
    assert set(times) == {"a", "b"}
    assert all(0 <= time < 1000 for time in times.values())


def test_outputs_are_compared_through_containers() -> None:
    one = {"logits": torch.ones(2, 3), "states": (torch.zeros(2), [torch.tensor(1)]), "note": "x"}
    assert same_outputs(one, copy.deepcopy(one))
    for change in (
        {"logits": torch.ones(2, 3) * 1.01},
        {"logits": torch.ones(3, 2)},
        {"states": (torch.zeros(2),)},
        {"logits": torch.full((2, 3), torch.nan)},
    ):
        assert not same_outputs(one, {**one, **change})
    assert same_outputs(torch.ones(3), torch.ones(3) * 1.0001)
    assert same_outputs(torch.zeros(0), torch.zeros(0))


def test_inputs_are_handed_on_as_they_were_given() -> None:
    class Sum(nn.Module):
        def forward(self, one: Tensor, other: Tensor | None = None) -> Tensor:
            return one if other is None else one - other

    two, three = torch.tensor(2), torch.tensor(3)
    assert [call(Sum(), given) for given in (two, (two, three), {"other": two, "one": three})] == [2, -1, 1]
