"""What goes into an elastic file comes out again, bit for bit, whatever the tensors are like."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from elastic_examples import (
    PRUNABLE,
    SUB_NETS,
    Network,
    expected,
    network,
    private_state,
    random_masks,
    same_state,
    write_example,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ast_plugin import sealed_file
from ast_plugin.config import ASTConfig
from ast_plugin.elastic_file import ELASTIC, elastic_path, read_elastic, write_elastic
from ast_plugin.errors import ConfigError, ElasticFileError, SaveError
from ast_plugin.masks import MaskStore
from ast_plugin.sealed_file import FORMAT, write_sealed


def test_a_hand_worked_file(tmp_path: Path) -> None:
    # weights         1    2    3    4    5    6    7    8    9
    # "a" keeps       1    2    .    .    .    .    .    .    9    bits, lowest first: 11000000 1 -> bytes 3, 1
    # "b" keeps       .    2    3    .    .    .    .    .    .    bits, lowest first: 01100000 0 -> bytes 6, 0
    # union           1    2    3                             9    -> four values are stored
    weight = torch.arange(1.0, 10.0).reshape(3, 3)
    masks = MaskStore(("a", "b"), {"w": (3, 3)})
    masks.set("a", "w", torch.isin(weight, torch.tensor([1.0, 2.0, 9.0])))
    masks.set("b", "w", torch.isin(weight, torch.tensor([2.0, 3.0])))
    state = {"w": weight, "bias": torch.ones(3)}
    write_elastic(tmp_path / "e", state=state, masks=masks, private={}, header={})
    stored = load_file(tmp_path / "e")
    assert {key: tensor.tolist() for key, tensor in stored.items()} == {
        "values::w": [1, 2, 3, 9],
        "mask::a::w": [3, 1],
        "mask::b::w": [6, 0],
        "whole::bias": [1, 1, 1],
    }
    contents = read_elastic(tmp_path / "e")
    assert contents.materialize("a")["w"].tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 9]]
    assert contents.materialize("b")["w"].tolist() == [[0, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert contents.records["a"].sparsity == 6 / 9
    assert (contents.records["b"].kept, contents.records["b"].total) == (2, 9)
    assert contents.default_sub_net == "a"  # the densest


def test_every_sub_net_comes_out_exactly(tmp_path: Path) -> None:
    model = network()
    masks, private = random_masks(model), private_state(model)
    contents = read_elastic(write_example(tmp_path / "e"))
    assert contents.sub_nets == SUB_NETS
    assert contents.parameters == PRUNABLE
    for name in SUB_NETS:
        state = contents.materialize(name)
        assert same_state(state, expected(model, masks, private, name))
        Network().load_state_dict(state)
        assert all(torch.equal(contents.mask(name, p), masks.get(name, p)) for p in PRUNABLE)
    assert contents.masks.checksum() == masks.checksum()


def test_what_is_written_once_is_written_once(tmp_path: Path) -> None:
    model = network()
    keys = set(load_file(write_example(tmp_path / "e")))
    masks = {f"mask::{s}::{p}" for s in SUB_NETS for p in PRUNABLE}
    own = {f"private::{s}::{n}" for s in SUB_NETS for n in model.state_dict() if n.startswith("norm.")}
    assert keys == masks | own | {f"values::{p}" for p in PRUNABLE} | {"whole::hidden.bias", "whole::head.bias"}


def test_writing_changes_nothing_and_equal_runs_give_equal_files(tmp_path: Path) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    one, two = write_example(tmp_path / "1", model), write_example(tmp_path / "2", model)
    assert same_state(model.state_dict(), before)
    assert one.read_bytes() == two.read_bytes()


def test_materialized_tensors_are_the_callers_own(tmp_path: Path) -> None:
    contents = read_elastic(write_example(tmp_path / "e"))
    for tensor in contents.materialize("s50").values():
        tensor.fill_(5)
    assert not any((tensor == 5).all() for tensor in contents.materialize("s50").values())


def test_the_file_opens_with_safetensors_and_numpy_alone(tmp_path: Path) -> None:
    # The recipe of docs/elastic-file.md.
    model = network()
    want = expected(model, random_masks(model), private_state(model), "s80")
    with safe_open(write_example(tmp_path / "e"), "np") as file:
        header = json.loads(file.metadata()[FORMAT])
        names = [record["name"] for record in header["sub_nets"]]
        state = {}
        for entry in header["tensors"]:
            name, count = entry["name"], math.prod(entry["shape"])
            if entry["kind"] == "masked":
                bits = {
                    n: np.unpackbits(file.get_tensor(f"mask::{n}::{name}"), count=count, bitorder="little")
                    for n in names
                }
                weight = np.zeros(count, dtype=entry["dtype"])
                weight[np.any(list(bits.values()), axis=0)] = file.get_tensor(f"values::{name}")
                state[name] = np.where(bits["s80"], weight, 0).reshape(entry["shape"])
            elif entry["kind"] == "private":
                state[name] = file.get_tensor(f"private::s80::{name}")
            else:
                state[name] = file.get_tensor(f"whole::{name}")
    assert list(state) == list(want)
    assert all(np.array_equal(state[name], want[name].numpy()) for name in want)


def test_the_header_comes_back_as_it_was_given(tmp_path: Path) -> None:
    config = ASTConfig(sparsities=(0.5, 0.8), total_steps=10, correction="off")
    header = {
        "config": config.to_dict(),
        "default_sub_net": "s80",
        "metrics": {"s50": {"accuracy": 0.75, "loss": math.nan}, "s80": {}},
        "statistics": {"steps": 10},
        "history": {"sparsity": [{"step": 1, "sub_net": "s50", "target": 0.5, "achieved": 0.5}]},
        "report": {"title": "t"},
    }
    contents = read_elastic(write_example(tmp_path / "e", **header))
    assert contents.default_sub_net == "s80"
    assert ASTConfig.from_dict(contents.config) == config
    assert contents.metrics["s50"]["accuracy"] == 0.75
    assert math.isnan(contents.metrics["s50"]["loss"])
    assert contents.statistics == {"steps": 10}
    assert contents.history == header["history"]
    assert contents.header["report"] == {"title": "t"}
    assert contents.records["s80"].target_sparsity == 0.8
    assert contents.records["s80"].pattern == "unstructured"


def test_targets_may_be_given_without_a_config(tmp_path: Path) -> None:
    targets = [{"name": "s50", "target_sparsity": 0.5, "pattern": "4x4"}]
    contents = read_elastic(write_example(tmp_path / "e", sub_nets=targets))
    assert (contents.records["s50"].target_sparsity, contents.records["s50"].pattern) == (0.5, "4x4")
    assert (contents.records["s80"].target_sparsity, contents.records["s80"].pattern) == (None, None)


def test_an_empty_header_is_enough(tmp_path: Path) -> None:
    contents = read_elastic(write_example(tmp_path / "e"))
    assert (contents.config, contents.statistics, contents.history) == ({}, {}, {})
    assert contents.metrics == {"s50": {}, "s80": {}}
    assert contents.header == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_types_and_special_values_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    values = [math.inf, -math.inf, math.nan, -0.0, 1.5, 2.0**-14, 3.0]
    weight = torch.tensor(values, dtype=dtype).reshape(1, 7)
    masks = MaskStore(("all", "some"), {"w": (1, 7)})
    masks.set("some", "w", torch.tensor([[False, True, False, True, True, False, True]]))
    write_elastic(tmp_path / "e", state={"w": weight}, masks=masks, private={}, header={})
    contents = read_elastic(tmp_path / "e")
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(contents.tensor("all", "w").view(integers), weight.view(integers))
    # A dropped infinity or NaN is a plain zero, which a product with the mask would not give.
    some = contents.tensor("some", "w").flatten()
    assert some.dtype == dtype
    assert [some[i].item() for i in (0, 2, 5)] == [0, 0, 0]
    assert some[1] == -math.inf
    assert math.copysign(1, some[3].item()) == -1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor(2.5),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.int8),
        torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5),
        torch.tensor([1 + 2j]),
    ],
    ids=lambda tensor: f"{str(tensor.dtype)[6:]}-{'x'.join(map(str, tensor.shape))}-{tensor.stride()}",
)
def test_buffers_of_any_kind_survive_whole_and_private(tmp_path: Path, tensor: torch.Tensor) -> None:
    masks = MaskStore(("a", "b"), {"w": (2, 2)})
    state = {"w": torch.ones(2, 2), "whole": tensor, "own": tensor.clone()}
    private = {"a": {"own": tensor}, "b": {"own": tensor.clone()}}
    write_elastic(tmp_path / "e", state=state, masks=masks, private=private, header={})
    for name in ("a", "b"):
        read = read_elastic(tmp_path / "e").materialize(name)
        assert read["whole"].dtype == tensor.dtype
        assert torch.equal(read["whole"], tensor)
        assert torch.equal(read["own"], tensor)


def test_masked_weights_in_another_memory_order_survive(tmp_path: Path) -> None:
    model = network()
    channels_last = network().to(memory_format=torch.channels_last)
    assert not channels_last.conv.weight.is_contiguous()
    contents = read_elastic(write_example(tmp_path / "e", channels_last))
    want = expected(model, random_masks(model), private_state(model), "s50")
    assert same_state(contents.materialize("s50"), want)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 2**31), count=st.integers(1, 4))
def test_any_shape_and_number_of_sub_nets(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    masks = MaskStore([f"n{i}" for i in range(count)], {"w": tuple(shape)})
    for name in masks.sub_nets:
        masks.set(name, "w", torch.rand(shape, generator=generator) < torch.rand((), generator=generator))
    path = tmp_path_factory.mktemp("any") / "e"
    write_elastic(path, state={"w": weight}, masks=masks, private={}, header={})
    contents = read_elastic(path)
    assert len(load_file(path)["values::w"]) == int(masks.union("w").sum())
    for name in masks.sub_nets:
        assert torch.equal(contents.tensor(name, "w"), torch.where(masks.get(name, "w"), weight, 0))
        assert contents.records[name].kept == masks.kept(name)


def test_a_layer_that_nobody_keeps_takes_no_values(tmp_path: Path) -> None:
    masks = MaskStore(("a",), {"w": (3, 3)})
    masks.set("a", "w", torch.zeros(3, 3, dtype=torch.bool))
    write_elastic(tmp_path / "e", state={"w": torch.ones(3, 3)}, masks=masks, private={}, header={})
    assert load_file(tmp_path / "e")["values::w"].numel() == 0
    assert torch.equal(read_elastic(tmp_path / "e").tensor("a", "w"), torch.zeros(3, 3))


class Tied(nn.Module):
    """An output layer that uses the weights of the second layer, as language models do with embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head.weight = self.second.weight


def test_tied_parameters_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = Tied()
    # The mask is on the name that comes second in the state dict.
    masks = random_masks(model, ("first.weight", "second.weight"))
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=masks, private={}, header={})
    stored = load_file(tmp_path / "e")
    assert [key for key in stored if "head" in key] == []
    contents = read_elastic(tmp_path / "e")
    assert contents.entries["head.weight"].same_as == "second.weight"
    state = contents.materialize("s80")
    assert list(state) == list(model.state_dict())
    assert state["head.weight"] is state["second.weight"]
    assert torch.equal(state["head.weight"], torch.where(masks.get("s80", "second.weight"), model.head.weight, 0))
    assert torch.equal(contents.tensor("s80", "head.weight"), state["head.weight"])


def test_a_tied_private_norm_is_stored_once_per_sub_net(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"layer": nn.Linear(3, 3), "one": norm, "two": norm})
    masks = random_masks(model, ("layer.weight",))
    names = [name for name in model.state_dict() if not name.startswith("layer")]
    private = {s: {name: model.state_dict()[name] + i for name in names} for i, s in enumerate(SUB_NETS)}
    write_elastic(tmp_path / "e", state=model.state_dict(), masks=masks, private=private, header={})
    assert not [key for key in load_file(tmp_path / "e") if "two." in key]
    assert torch.equal(read_elastic(tmp_path / "e").tensor("s80", "two.bias"), torch.ones(3))


def test_views_of_one_memory_that_differ_are_stored_apart(tmp_path: Path) -> None:
    memory = torch.arange(6.0)
    state = {"w": torch.ones(2, 2), "a": memory[:3], "b": memory[3:], "c": memory.reshape(2, 3), "d": memory[:3]}
    write_elastic(tmp_path / "e", state=state, masks=MaskStore(("s",), {"w": (2, 2)}), private={}, header={})
    contents = read_elastic(tmp_path / "e")
    assert all(torch.equal(contents.tensor("s", name), tensor) for name, tensor in state.items())
    assert [entry.name for entry in contents.entries.values() if entry.same_as] == ["d"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": {"w": torch.ones(2, 2), "x": "text"}}, "'x' is a str, and an elastic file holds tensors only"),
        ({"state": {"w": torch.ones(2, 2), "x": torch.eye(2).to_sparse()}}, "'x' is a torch.sparse_coo tensor"),
        ({"state": {"w": torch.ones(2, 2), "x": torch.ones(2, device="meta")}}, "on meta"),
        ({"state": {"w": torch.ones(2, 2), "x": torch.ones(2, dtype=torch.complex128)}}, "torch.complex128"),
        ({"state": {"v": torch.ones(2, 2)}}, "masks name 'w', which the state dict lacks"),
        ({"state": {"w": torch.ones(2, 3)}}, r"masks of 'w' have shape \(2, 2\), and the state dict's tensor has"),
        ({"private": {"c": {}}}, "private names no sub-net of the masks: .*Known: a, b"),
        ({"private": {"a": {"y": torch.ones(1)}}}, r"private\['a'\] holds 'y', which must be an entry"),
        ({"private": {"a": {"w": torch.ones(2, 2)}}}, r"private\['a'\] holds 'w', which must be an entry"),
        ({"private": {"a": {"x": torch.ones(2)}}}, r"private\['a'\]\['x'\] is \(2,\) of torch.float32, and the state"),
        ({"private": {"a": {"x": torch.ones(1)}}}, "private holds 'x' for a only; give it for every sub-net"),
        ({"header": {"default_sub_net": "c"}}, "'default_sub_net'.* names no sub-net: 'c'; "),
        ({"header": {"metrics": {"c": {}}}}, "'metrics'.* names no sub-net: 'c'; "),
        ({"header": {"config": {"method": "set"}}}, "sparsities is missing"),
        ({"header": {"note": object()}}, r"header\['run'\]\['note'\] cannot be stored"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(tmp_path: Path, changes: dict, words: str) -> None:
    arguments = {
        "state": {"w": torch.ones(2, 2), "x": torch.ones(1)},
        "masks": MaskStore(("a", "b"), {"w": (2, 2)}),
        "private": {},
        "header": {},
        **changes,
    }
    with pytest.raises(ConfigError, match=words):
        write_elastic(tmp_path / "e", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_example(tmp_path / "e")
    before = path.read_bytes()
    with pytest.raises(SaveError, match="a part of the path is a file"):
        write_example(path / "inside")
    monkeypatch.setattr(sealed_file, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SaveError, match="No space left on device"):
        write_example(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_unknown_names_offer_the_near_ones(tmp_path: Path) -> None:
    contents = read_elastic(write_example(tmp_path / "e"))
    with pytest.raises(ConfigError, match=r"there is no sub-net 's8' in '.*': did you mean 's80'"):
        contents.materialize("s8")
    with pytest.raises(ConfigError, match=r"holds no tensor 'head.wight'; did you mean 'head.weight'"):
        contents.tensor("s80", "head.wight")


def _rewritten(path: Path, change) -> Path:
    """Seal the file again after `change(header, tensors)`: what a faulty writer could make, with a right digest."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    tensors = load_file(path)
    header = {key: value for key, value in header.items() if key not in ("digest", "format", "version")}
    change(header, tensors)
    write_sealed(path.with_name("rewritten"), tensors, header)
    return path.with_name("rewritten")


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("tensors"),
        lambda header, tensors: header.pop("run"),
        lambda header, tensors: header.update(sub_nets=[]),
        lambda header, tensors: header.update(sub_nets=7),
        lambda header, tensors: header.update(default_sub_net="s99"),
        lambda header, tensors: header["sub_nets"].append(header["sub_nets"][0]),
        lambda header, tensors: header["sub_nets"][0].update(surprise=1),
        lambda header, tensors: header["tensors"][0].update(kind="new kind"),
        lambda header, tensors: header["tensors"][0].update(dtype="float33"),
        lambda header, tensors: header["tensors"][0].update(shape=[7, 3, 3]),
        lambda header, tensors: header["tensors"][0].update(kind="alias"),
        lambda header, tensors: header["tensors"][0].update(kind="alias", same_as="nothing"),
        lambda header, tensors: header["tensors"][0].update(kind="alias", same_as="conv.weight"),
        lambda header, tensors: header["tensors"].pop(),
        lambda header, tensors: tensors.pop("values::conv.weight"),
        lambda header, tensors: tensors.pop("mask::s80::conv.weight"),
        lambda header, tensors: tensors.pop("private::s80::norm.bias"),
        lambda header, tensors: tensors.update({"values::conv.weight": tensors["values::conv.weight"][1:]}),
        lambda header, tensors: tensors.update({"mask::s80::conv.weight": torch.zeros(3)}),
        lambda header, tensors: tensors["mask::s80::head.weight"].fill_(255),  # 35 weights: spare bits are set
        lambda header, tensors: tensors.update({"whole::surprise": torch.zeros(3)}),
    ],
)
def test_a_well_sealed_file_that_breaks_the_format_is_refused(tmp_path: Path, change) -> None:
    path = _rewritten(write_example(tmp_path / "e"), change)
    with pytest.raises(ElasticFileError, match=r"rewritten' does not follow the elastic format: .*; save it again"):
        read_elastic(path)


def test_rewriting_without_a_change_is_accepted(tmp_path: Path) -> None:
    path = _rewritten(write_example(tmp_path / "e"), lambda header, tensors: None)
    assert path.read_bytes() == (tmp_path / "e").read_bytes()
    read_elastic(path)


# ---------------------------------------------------------------------------------------------- in a folder


def test_a_folder_with_the_file_stands_for_it(tmp_path: Path) -> None:
    path = write_example(tmp_path / ELASTIC)
    for folder in (tmp_path, str(tmp_path)):
        assert elastic_path(folder) == path
        contents = read_elastic(folder)
        assert contents.path == str(path)
        assert contents.sub_nets == SUB_NETS


def test_a_folder_without_the_file_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(
        ElasticFileError, match=r"holds no elastic\.safetensors; it holds nothing; give the elastic file"
    ):
        read_elastic(tmp_path)
    for name in "gfedcba":
        (tmp_path / f"{name}.json").touch()
    with pytest.raises(ElasticFileError) as caught:
        read_elastic(tmp_path)
    message = str(caught.value)
    assert "it holds a.json, b.json, c.json, d.json, e.json and 2 more; give the elastic file itself" in message
    assert f"save({str(tmp_path / ELASTIC)!r})" in message


def test_folders_below_that_have_the_file_are_named(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20", "runs"):
        (tmp_path / name).mkdir()
    write_example(tmp_path / "checkpoint-20" / ELASTIC)
    with pytest.raises(ElasticFileError, match=r"give one of the folders in it that have one: checkpoint-20$"):
        read_elastic(tmp_path)


def test_a_folder_where_the_file_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / ELASTIC).mkdir()
    with pytest.raises(ElasticFileError, match="Is a directory"):
        read_elastic(tmp_path)
