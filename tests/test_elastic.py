"""A model loaded from an elastic file is each of its sub-nets exactly, and switches by pointer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from elastic_examples import (
    SUB_NETS,
    Network,
    expected,
    images,
    network,
    private_state,
    random_masks,
    same_state,
    write_example,
)
from sliced_examples import HYBRID_GROUPS, SHARES, hybrid, random_units, write_channels
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ast_plugin
from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_file import write_elastic
from ast_plugin.errors import ActivationError, ConfigError, ElasticFileError, WrapError
from ast_plugin.masks import MaskStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_example(tmp_path / "elastic.safetensors", metrics={"s50": {"accuracy": 0.5}})


@pytest.fixture
def elastic(path: Path) -> Elastic:
    return load(path, network(seed=5))


def states() -> dict[str, dict[str, torch.Tensor]]:
    model = network()
    masks, private = random_masks(model), private_state(model)
    return {name: expected(model, masks, private, name) for name in SUB_NETS}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images())


def reference_outputs() -> dict[str, torch.Tensor]:
    """Return what a plain network gives that was never near an elastic file."""
    result = {}
    for name, state in states().items():
        plain = Network().eval()
        plain.load_state_dict(state)
        result[name] = outputs(plain)
    return result


def test_says_what_it_holds(elastic: Elastic, path: Path) -> None:
    assert elastic.sub_nets == SUB_NETS
    assert elastic.default_sub_net == "s50"
    assert elastic.metrics == {"s50": {"accuracy": 0.5}, "s80": {}}
    assert elastic.records["s80"].kept < elastic.records["s50"].kept
    assert elastic.path == str(path)
    assert repr(elastic) == f"Elastic({str(path)!r}, sub_nets=('s50', 's80'), active='s50')"


def test_the_default_is_active_after_loading(elastic: Elastic) -> None:
    assert elastic.active == "s50"
    assert torch.equal(outputs(elastic.model), reference_outputs()["s50"])


def test_the_folder_of_the_file_serves_as_well(path: Path) -> None:
    elastic = load(path.parent, network(seed=5))
    assert elastic.path == str(path)
    assert torch.equal(outputs(elastic.model), reference_outputs()["s50"])


def test_a_folder_without_a_file_leaves_the_model_alone(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ElasticFileError, match=r"holds no elastic\.safetensors; it holds nothing"):
        load(tmp_path, model)
    assert same_state(model.state_dict(), before)


def test_every_switch_gives_exactly_that_sub_net(elastic: Elastic) -> None:
    want_states, want_outputs = states(), reference_outputs()
    for name in ("s80", "s50", "s50", "s80", "s50"):
        elastic.switch(name)
        assert elastic.active == name
        assert same_state(elastic.model.state_dict(), want_states[name])
        assert torch.equal(outputs(elastic.model), want_outputs[name])


def test_parameters_stay_the_same_objects_and_keep_their_flags(path: Path) -> None:
    model = network(seed=5).train()
    model.hidden.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    elastic = load(path, model)
    elastic.switch("s80")
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.training
    assert [name for name, parameter in after.items() if not parameter.requires_grad] == ["hidden.weight"]
    assert all(parameter.is_leaf for parameter in after.values())


def test_a_switch_copies_nothing(elastic: Elastic) -> None:
    weight = elastic.model.conv.weight
    first = weight.data_ptr()
    elastic.switch("s80")
    second = weight.data_ptr()
    elastic.switch("s50")
    assert first != second
    assert weight.data_ptr() == first


def test_tensors_that_all_sub_nets_share_are_left_alone(tmp_path: Path) -> None:
    model = network()
    masks = MaskStore(SUB_NETS, {"conv.weight": (7, 3, 3, 3), "head.weight": (5, 7)})
    masks.set("s80", "head.weight", torch.rand(5, 7) > 0.8)  # the convolution has equal masks
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=masks, private={}, header={})
    other = network(seed=5)
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    elastic = load(tmp_path / "e", other)
    elastic.switch("s80")
    moved = [name for name, tensor in other.state_dict().items() if tensor.data_ptr() != addresses[name]]
    assert moved == ["head.weight"]
    assert torch.equal(other.conv.weight, model.conv.weight)


def test_private_statistics_stay_private_though_they_were_equal_in_the_file(tmp_path: Path) -> None:
    model = network()
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("norm.")}
    private = {name: {key: tensor.clone() for key, tensor in own.items()} for name in SUB_NETS}
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=random_masks(model), private=private, header={})
    elastic = load(tmp_path / "e", network(seed=5))
    elastic.model.train()
    outputs(elastic.model)  # moves the running statistics of the active one
    assert not torch.equal(elastic.model.norm.running_mean, model.norm.running_mean)
    changed = elastic.model.norm.running_mean.clone()
    elastic.switch("s80")
    assert torch.equal(elastic.model.norm.running_mean, model.norm.running_mean)
    elastic.switch("s50")
    assert torch.equal(elastic.model.norm.running_mean, changed)


def test_one_sub_net_alone_needs_no_switching(tmp_path: Path) -> None:
    model = network()
    masks = MaskStore(("s50",), {"head.weight": (5, 7)})
    masks.set("s50", "head.weight", torch.rand(5, 7) > 0.5)
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=masks, private={}, header={})
    elastic = load(tmp_path / "e", network(seed=5))
    elastic.switch("s50")
    want = {**model.state_dict(), "head.weight": torch.where(masks.get("s50", "head.weight"), model.head.weight, 0)}
    assert same_state(elastic.model.state_dict(), want)


def test_the_context_manager_restores_the_earlier_sub_net(elastic: Elastic) -> None:
    with elastic.sub_net("s80") as model:
        assert model is elastic.model
        assert elastic.active == "s80"
        with elastic.sub_net("s50"):
            assert elastic.active == "s50"
        assert elastic.active == "s80"
    assert elastic.active == "s50"
    assert torch.equal(outputs(elastic.model), reference_outputs()["s50"])


def test_the_context_manager_restores_after_an_exception(elastic: Elastic) -> None:
    with pytest.raises(KeyboardInterrupt), elastic.sub_net("s80"):
        raise KeyboardInterrupt
    assert elastic.active == "s50"
    assert same_state(elastic.model.state_dict(), states()["s50"])


def test_an_unknown_sub_net_offers_the_near_ones_and_changes_nothing(elastic: Elastic) -> None:
    for use in (elastic.switch, elastic.materialize, lambda name: elastic.sub_net(name).__enter__()):
        with pytest.raises(ConfigError, match="there is no sub-net 's8': did you mean 's80'"):
            use("s8")
    assert elastic.active == "s50"


def test_materialize_gives_any_sub_net_whichever_is_active(elastic: Elastic) -> None:
    want = states()
    for active in SUB_NETS:
        elastic.switch(active)
        for name in SUB_NETS:
            state = elastic.materialize(name)
            assert same_state(state, want[name])
            assert not any(tensor.requires_grad for tensor in state.values())
            for tensor in state.values():
                tensor.zero_()
    assert same_state(elastic.materialize("s80"), want["s80"])


def test_works_under_inference_mode_and_trains_afterwards(path: Path) -> None:
    model = network(seed=5)
    with torch.inference_mode():
        elastic = load(path, model)
        for name, want in reference_outputs().items():
            elastic.switch(name)
            assert torch.equal(model(images()), want)
        materialized = elastic.materialize("s80")
    assert not any(tensor.is_inference() for tensor in [*model.state_dict().values(), *materialized.values()])
    model(images()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_training_changes_the_weights_of_the_active_sub_net_alone(elastic: Elastic) -> None:
    optimizer = torch.optim.SGD(elastic.model.parameters(), lr=0.1)
    elastic.switch("s80")
    elastic.model(images()).square().sum().backward()
    optimizer.step()
    tuned = elastic.model.hidden.weight.detach().clone()
    assert not torch.equal(tuned, states()["s80"]["hidden.weight"])
    elastic.switch("s50")
    assert torch.equal(elastic.model.hidden.weight, states()["s50"]["hidden.weight"])
    elastic.switch("s80")
    assert torch.equal(elastic.model.hidden.weight, tuned)


def test_backward_through_another_sub_nets_forward_raises(elastic: Elastic) -> None:
    # The graph would multiply by the weights that the tensors point to now.
    loss = elastic.model(images()).sum()
    elastic.switch("s80")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copied_model_is_an_ordinary_one(elastic: Elastic) -> None:
    elastic.switch("s80")
    twin = copy.deepcopy(elastic.model)
    elastic.switch("s50")
    assert same_state(twin.state_dict(), states()["s80"])
    assert torch.equal(outputs(twin), reference_outputs()["s80"])
    assert all(parameter.is_leaf for parameter in twin.parameters())


def test_a_copied_elastic_is_independent(elastic: Elastic) -> None:
    twin = copy.deepcopy(elastic)
    twin.switch("s80")
    assert elastic.active == "s50"
    assert torch.equal(outputs(elastic.model), reference_outputs()["s50"])
    assert torch.equal(outputs(twin.model), reference_outputs()["s80"])
    twin.switch("s50")
    assert torch.equal(outputs(twin.model), reference_outputs()["s50"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_go_to_the_types_of_the_model(path: Path, dtype: torch.dtype) -> None:
    elastic = load(path, network(seed=5).to(dtype))
    for name, state in states().items():
        elastic.switch(name)
        want = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
        assert same_state(elastic.model.state_dict(), want)


def test_sub_nets_follow_a_model_that_is_converted_later(elastic: Elastic) -> None:
    elastic.model.double()
    for name in ("s80", "s50", "s80"):
        elastic.switch(name)
        want = {k: t.double() if t.is_floating_point() else t for k, t in states()[name].items()}
        assert same_state(elastic.model.state_dict(), want)
        assert same_state(elastic.materialize("s50"), {k: want[k] if name == "s50" else t.to(want[k].dtype)
                                                       for k, t in states()["s50"].items()})  # fmt: skip


def test_sub_nets_follow_parameters_that_were_replaced(elastic: Elastic) -> None:
    elastic.model.load_state_dict({k: t + 1 for k, t in states()["s50"].items()}, assign=True)
    elastic.switch("s80")
    assert same_state(elastic.model.state_dict(), {**states()["s80"], **{k: states()["s50"][k] + 1 for k in
                                                   ("hidden.bias", "head.bias")}})  # fmt: skip
    elastic.switch("s50")
    assert torch.equal(elastic.model.conv.weight, states()["s50"]["conv.weight"] + 1)


def test_a_reshaped_or_removed_parameter_is_named_and_nothing_changes(elastic: Elastic) -> None:
    before = {key: tensor.clone() for key, tensor in elastic.model.state_dict().items()}
    head = elastic.model.head.weight
    elastic.model.head.weight = nn.Parameter(torch.zeros(2, 7))
    with pytest.raises(ActivationError, match=r"'head.weight' has shape \(2, 7\) now and had \(5, 7\) when"):
        elastic.switch("s80")
    del elastic.model.head.weight
    with pytest.raises(ActivationError, match=r"'head.weight' is gone from the model"):
        elastic.switch("s80")
    elastic.model.head.register_parameter("weight", None)
    with pytest.raises(ActivationError, match=r"'head.weight' is gone from the model"):
        elastic.materialize("s80")
    assert elastic.active == "s50"
    elastic.model.head.weight = head
    elastic.model.head._parameters = {key: elastic.model.head._parameters[key] for key in ("weight", "bias")}
    assert same_state(elastic.model.state_dict(), before)


def test_an_interrupted_switch_leaves_one_whole_sub_net(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    install, calls = Elastic._install, []

    def interrupted(self: Elastic, own: list[torch.Tensor]) -> None:
        calls.append(len(own))
        install(self, own)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Elastic, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        elastic.switch("s80")
    assert elastic.active == "s50"
    assert same_state(elastic.model.state_dict(), states()["s50"])


def test_memory_order_of_the_model_is_kept(path: Path) -> None:
    elastic = load(path, network(seed=5).to(memory_format=torch.channels_last))
    for name, state in states().items():
        elastic.switch(name)
        weight = elastic.model.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(weight, state["conv.weight"])


def test_autocast_sees_the_switched_weights(path: Path) -> None:
    # Autocast keeps the low-precision copy of a weight until its block ends, by tensor object.
    elastic = load(path, network(seed=5))
    wanted = {}
    for name in SUB_NETS:
        elastic.switch(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted[name] = elastic.model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in SUB_NETS:
            elastic.switch(name)
            assert torch.equal(elastic.model(images()), wanted[name])


def test_a_compiled_model_switches_without_compiling_again(path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network(seed=5), backend=counter)
    elastic = load(path, compiled)
    with torch.no_grad():
        for name in (*SUB_NETS, *SUB_NETS):
            elastic.switch(name)
            assert torch.equal(compiled(images()), reference_outputs()[name])
    assert counter.frame_count == 1
    assert list(elastic.materialize("s80")) == list(Network().state_dict())
    torch._dynamo.reset()


def test_a_compiled_part_changes_no_names(path: Path) -> None:
    model = network(seed=5)
    model.hidden = torch.compile(model.hidden, backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    elastic = load(path, model)
    elastic.switch("s80")
    assert same_state(elastic.materialize("s80"), states()["s80"])
    torch._dynamo.reset()


def test_a_file_made_from_a_compiled_model_fits_the_plain_one(tmp_path: Path) -> None:
    model = network()
    compiled = nn.ModuleDict({"_orig_mod": model})  # the names that torch.compile makes
    masks = MaskStore(SUB_NETS, {"_orig_mod.head.weight": (5, 7)})
    masks.set("s80", "_orig_mod.head.weight", torch.rand(5, 7) > 0.8)
    write_elastic(tmp_path / "e", state=compiled.state_dict(), masks=masks, private={}, header={})
    elastic = load(tmp_path / "e", network(seed=5))
    assert same_state(elastic.model.state_dict(), model.state_dict())


def test_a_data_parallel_wrapper_is_looked_through(path: Path) -> None:
    elastic = load(path, nn.DataParallel(network(seed=5)))
    elastic.switch("s80")
    assert torch.equal(outputs(elastic.model.module), reference_outputs()["s80"])


class Tied(nn.Module):
    """Two layers that may share one weight, and an LSTM, whose module keeps a list of its parameters."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


def tied_file(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Tied()
    masks = random_masks(model, ("embedding.weight", "recurrent.weight_hh_l0"))
    write_elastic(path, state=model.state_dict(), masks=masks, private={}, header={})
    want = {name: expected(model, masks, {name: {}}, name) for name in SUB_NETS}
    return {name: {**state, "head.weight": state["embedding.weight"]} for name, state in want.items()}


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_and_modules_with_lists_of_their_own(tmp_path: Path, tie: bool) -> None:
    want = tied_file(tmp_path / "e")
    elastic = load(tmp_path / "e", Tied(tie).eval())
    tokens = torch.tensor([[1, 2, 5, 0]])
    for name in ("s80", "s50"):
        elastic.switch(name)
        assert same_state(elastic.model.state_dict(), want[name])
        assert (elastic.model.head.weight is elastic.model.embedding.weight) == tie
        plain = Tied().eval()
        plain.load_state_dict(want[name])
        assert torch.equal(outputs_of(elastic.model, tokens), outputs_of(plain, tokens))
        state = elastic.materialize(name)
        assert (state["head.weight"] is state["embedding.weight"]) == tie


def outputs_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


def test_weights_untied_in_the_file_do_not_go_into_a_tied_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied(tie=False)
    masks = random_masks(model, ("embedding.weight",))
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=masks, private={}, header={})
    with pytest.raises(
        ElasticFileError, match=r"tied in the model but not in the file: embedding.weight and head.weig"
    ):
        load(tmp_path / "e", Tied())


def test_weights_that_are_equal_in_the_file_may_go_into_a_tied_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # cloning forgets the tie
    masks = random_masks(model, ("recurrent.weight_hh_l0",))
    write_elastic(tmp_path / "e", state=state, masks=masks, private={}, header={})
    elastic = load(tmp_path / "e", Tied())
    assert torch.equal(elastic.model.head.weight, model.head.weight)


class Larger(Network):
    def __init__(self) -> None:
        super().__init__(classes=9)
        self.extra = nn.Linear(2, 2)
        self.hidden = None
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_another_architecture_is_refused_with_the_first_differences(path: Path) -> None:
    torch.manual_seed(0)
    model = Larger()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ElasticFileError) as caught:
        load(path, model)
    assert str(caught.value) == (
        f"{str(path)!r} was made for another architecture (10 tensors in the file, 10 in the model): the model lacks "
        "hidden.weight, hidden.bias; the file lacks extra.weight, extra.bias; other shape: head.weight is (5, 7) in "
        "the file and (9, 7) in the model, head.bias is (5,) in the file and (9,) in the model. Nothing was changed; "
        "build the model as it was when the file was saved, then load again"
    )
    assert same_state(model.state_dict(), before)


def test_long_lists_of_differences_are_cut(path: Path) -> None:
    with pytest.raises(ElasticFileError, match=r"the model lacks conv.weight, norm.weight, norm.bias and 7 more"):
        load(path, nn.Linear(2, 2))


def test_other_kinds_of_numbers_are_refused(path: Path) -> None:
    model = network()
    model.norm.num_batches_tracked = model.norm.num_batches_tracked.float()
    with pytest.raises(ElasticFileError, match=r"norm.num_batches_tracked is int64 in the file and float32 in the mod"):
        load(path, model)
    model = network()
    model.head.bias = nn.Parameter(torch.zeros(5, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ElasticFileError, match=r"head.bias is float32 in the file and int64 in the model"):
        load(path, model)


def test_tensors_that_cannot_be_loaded_into_are_refused(path: Path) -> None:
    with torch.device("meta"):
        on_meta = Network()
    with pytest.raises(ElasticFileError, match=r"conv.weight is on the meta device \(call model.to_empty"):
        load(path, on_meta)
    model = network()
    model.head = nn.LazyLinear(5)
    with pytest.raises(ElasticFileError, match=r"head.weight has no shape yet"):
        load(path, model)
    with torch.inference_mode():
        inference = network()
    with pytest.raises(ElasticFileError, match=r"was made under torch.inference_mode"):
        load(path, inference)
    model = network()
    model.norm.running_mean = torch.zeros(7).to_sparse()
    with pytest.raises(ElasticFileError, match=r"running_mean is a Tensor of torch.float32, not an ordinary dense"):
        load(path, model)


class WithExtraState(Network):
    def get_extra_state(self) -> dict:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_outside_of_parameters_and_buffers_is_refused(path: Path) -> None:
    with pytest.raises(ElasticFileError, match="no parameter or buffer, so it cannot be loaded into: _extra_state"):
        load(path, WithExtraState())


def test_a_model_in_training_is_refused_until_it_is_detached(tmp_path: Path) -> None:
    model = network()
    ast = ast_plugin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, sparsities=(0.5, 0.8), total_steps=10)
    with pytest.warns(UserWarning, match="is saved with sparsity 0"):
        ast.save(tmp_path / "e")
    want = {name: ast.materialize(name) for name in ast.sub_nets}
    with pytest.raises(WrapError, match=r"wrapped for training: call detach\(\) on its controller first"):
        load(tmp_path / "e", model)
    for other in (copy.deepcopy(model), ast.detach()):
        elastic = load(tmp_path / "e", other)
        for name, state in want.items():
            elastic.switch(name)
            assert same_state(dict(other.state_dict()), state)


def test_a_damaged_file_leaves_the_model_alone(path: Path) -> None:
    model = network(seed=5)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ElasticFileError, match="does not match its digest"):
        load(path, model)
    assert same_state(model.state_dict(), network(seed=5).state_dict())


def test_an_elastic_gives_way_to_the_next_one_loaded_into_its_model(elastic: Elastic) -> None:
    later = load(elastic.path, elastic.model)
    for use in (lambda: elastic.switch("s80"), lambda: elastic.materialize("s50")):
        with pytest.raises(ActivationError, match="another elastic file was loaded into this model"):
            use()
    later.switch("s80")
    assert later.active == "s80"


def test_a_model_that_is_trained_again_is_not_switched(elastic: Elastic) -> None:
    optimizer = torch.optim.SGD(elastic.model.parameters(), lr=0.1)
    ast = ast_plugin.wrap(optimizer, elastic.model, sparsities=(0.5,), total_steps=100)
    with pytest.raises(ActivationError, match="wrapped for training now"):
        elastic.switch("s80")
    ast.detach()
    elastic.switch("s80")


def test_what_is_no_path_and_what_is_no_model_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="path must be the path of a file, got None"):
        load(None, network())  # type: ignore[arg-type]  # what users do
    with pytest.raises(ConfigError, match=r"model must be a torch.nn.Module, got str; call load\(path, model\)"):
        load(network(), str(path))  # type: ignore[arg-type]  # what users do


# ------------------------------------------------------------------------------------------------ channel sub-nets


def test_units_of_channel_sub_nets_are_read_back(tmp_path: Path) -> None:
    elastic = load(write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS), hybrid())
    assert elastic.groups == HYBRID_GROUPS
    for name, share in SHARES.items():
        expected = random_units(HYBRID_GROUPS, share)
        kept = elastic.kept_channels(name)
        assert {group: flags.tolist() for group, flags in kept.items()} == {g: f.tolist() for g, f in expected.items()}
        kept["fc1"].zero_()
        assert elastic.kept_channels(name)["fc1"].any()


def test_files_without_groups_have_no_units(tmp_path: Path) -> None:
    elastic = load(write_example(tmp_path / "elastic.safetensors"), network())
    assert elastic.groups is None
    with pytest.raises(ConfigError, match=r"'s80' cannot be sliced: its pattern is None; .* pattern='channel'"):
        elastic.kept_channels("s80")
    with pytest.raises(ConfigError, match="there is no sub-net 's8'"):
        elastic.kept_channels("s8")


def test_sub_nets_of_several_patterns_are_told_apart(tmp_path: Path) -> None:
    entries = [{"name": "c50", "pattern": "channel"}, {"name": "c75", "pattern": "unstructured"}]
    path = write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS, sub_nets=entries)
    elastic = load(path, hybrid())
    assert set(elastic.kept_channels("c50")) == {"block.expand", "attn.qkv", "fc1"}
    with pytest.raises(ConfigError, match="'c75' cannot be sliced: its pattern is 'unstructured'"):
        elastic.kept_channels("c75")


READS = {"tensor": "fc2.weight", "dim": 1, "role": "in", "parts": [[0, 1]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 31}, "do not fit its tensors: 31 units in parts"),
        ({"axes": [{"tensor": "fc9.weight", "dim": 0, "role": "in", "parts": [[0, 1]]}]}, "do not fit its tensors"),
        ({"units": "32"}, "does not follow the elastic format: the description of channel group 'fc1' is damaged"),
        ({"name": "attn.qkv"}, "its channel groups have channel group 'attn.qkv' twice"),
        ({"name": ["fc1"]}, r"the description of channel group \['fc1'\] is damaged"),
        (
            {"attributes": [{"module": "", "name": 3, "per_unit": 1}]},
            "the description of channel group 'fc1' is damaged",
        ),
        ({"axes": 2 * [READS]}, "its channel groups have dimension 1 of 'fc2.weight' twice"),
        ({"colour": "red"}, "does not follow the elastic format: the description of a channel group is damaged"),
    ],
)
def test_damaged_groups_are_refused_before_the_model_is_touched(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    groups = [group.to_dict() for group in HYBRID_GROUPS.groups]
    path = write_channels(
        tmp_path / "channels.safetensors",
        hybrid(),
        HYBRID_GROUPS,
        channel_groups=[*groups[:2], {**groups[2], **change}],
    )
    model = hybrid(seed=5)
    before = model.fc1.weight.detach().clone()
    with pytest.raises(ElasticFileError, match=message):
        load(path, model)
    assert torch.equal(model.fc1.weight, before)
