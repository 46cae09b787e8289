"""Profiles: what is measured by a clock of the test, what is counted by hand."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_examples import Network, images, network, write_example
from sliced_examples import HYBRID_GROUPS, hybrid, pictures, write_channels
from torch import Tensor, nn

from ast_plugin.compile_linear import SparseLinear
from ast_plugin.elastic import Elastic, load
from ast_plugin.errors import ConfigError, MissingExtraError, StateError
from ast_plugin.export import export_model
from ast_plugin.profiles import compiler, form_of, profile
from ast_plugin.profiles_measure import (
    file_bytes,
    measure_latency,
    memory_bytes,
    percentile,
    share_memory,
    threads,
    waiting,
)
from ast_plugin.profiles_picture import check_picture, write_picture
from ast_plugin.profiles_records import LeftOut, Profile, ProfileRecord
from ast_plugin.profiles_text import profile_table, render_profile
from ast_plugin.report_flops import count_flops


@pytest.fixture
def elastic(tmp_path: Path) -> Elastic:
    metrics = {"s50": {"top1": 0.75}, "s80": {"top1": 0.5}}
    return load(write_example(tmp_path / "elastic.safetensors", metrics=metrics), network())


class Clock:
    """Ticks by a second a reading, so that every call takes one second; `slow` adds to that."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def build(elastic: Elastic, **slow: float) -> Any:
    """Return what builds dense copies under the names of two forms."""

    def make(name: str, form: str) -> nn.Module:
        if form not in ("dense", "other"):
            raise ConfigError(f"no {form} here")
        return export_model(elastic, name, elastic.model).eval()

    return make


def record(sub_net: str, form: str, latency_ms: float, **more: Any) -> ProfileRecord:
    values = {"sparsity": 0.5, "metrics": {}, "p95_ms": latency_ms, **more}
    return ProfileRecord(sub_net=sub_net, form=form, latency_ms=latency_ms, **values)


def test_every_sub_net_and_form_has_a_record(elastic: Elastic) -> None:
    found = profile(elastic, images(), forms=("dense", "other", "sliced"), build=build(elastic), clock=Clock(), runs=4)
    assert [(r.sub_net, r.form) for r in found.records] == [
        ("s50", "dense"),
        ("s50", "other"),
        ("s80", "dense"),
        ("s80", "other"),
    ]
    assert found.left_out == tuple(LeftOut(sub_net=n, form="sliced", reason="no sliced here") for n in ("s50", "s80"))
    assert {r.latency_ms for r in found.records} == {1000}
    assert [r.metrics["top1"] for r in found.records] == [0.75, 0.75, 0.5, 0.5]
    assert found.records[0].sparsity == elastic.records["s50"].sparsity
    # on 4 x 3 x 6 x 6: 4 x 4 places x 7 channels x 27 weights, then 7 x 7 and 7 x 5, two operations each, 4 images
    assert {r.flops for r in found.records} == {4 * 2 * (16 * 7 * 27 + 49 + 35)}
    assert {r.memory_bytes for r in found.records} == {sum(t.nbytes for t in Network().state_dict().values())}
    assert (found.example_input, found.runs, found.threads) == ("4 x 3 x 6 x 6", 4, torch.get_num_threads())
    assert found.elastic_bytes == Path(elastic.path).stat().st_size
    assert found.sub_nets == ("s50", "s80")
    assert found.metrics == ("top1",)


def test_sub_nets_can_be_chosen_and_the_model_stays_as_it_is(elastic: Elastic) -> None:
    before = copy.deepcopy(elastic.model.state_dict())
    found = profile(elastic, images(), sub_nets=["s80"], forms=["dense"], build=build(elastic), runs=1, warmup=0)
    assert found.sub_nets == ("s80",)
    assert all(torch.equal(tensor, before[name]) for name, tensor in elastic.model.state_dict().items())
    assert elastic.active == elastic.default_sub_net


def test_calls_alternate_and_warm_up_first() -> None:
    calls: list[str] = []
    functions = [lambda _: calls.append("a"), lambda _: calls.append("b")]
    times = measure_latency(functions, "input", runs=2, warmup=1, clock=Clock())
    assert calls == ["a", "b"] * 3
    assert times == [[1000, 1000], [1000, 1000]]


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2), (torch.zeros(2),), [torch.zeros(2)], {"x": torch.zeros(2)}],
    ids=["one", "tuple", "list", "dict"],
)
def test_inputs_are_handed_over_as_arguments_in_inference_mode(inputs: Any) -> None:
    seen: list[Any] = []

    def run(x: Tensor) -> None:
        seen.append((x.shape, torch.is_inference_mode_enabled()))

    measure_latency([run], inputs, runs=1, warmup=0, clock=Clock())
    assert seen == [((2,), True)]


def test_a_network_that_fails_on_the_example_is_reported(elastic: Elastic) -> None:
    with pytest.raises(ConfigError, match=r"example_inputs \(1 x 9\) cannot be run through the network: RuntimeError"):
        profile(elastic, torch.zeros(1, 9), forms=["dense"], build=build(elastic))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"runs": 0}, "runs must be a whole number of at least 1, got 0"),
        ({"runs": 1.5}, "runs must be a whole number of at least 1, got 1.5"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0, got -1"),
        ({"num_threads": 0}, "num_threads must be a whole number of at least 1, got 0"),
        ({"num_threads": 10**6}, r"num_threads must be at most \d+, got 1000000"),
        ({"sub_nets": 3}, "sub_nets must be a list of at least one name, got 3"),
        ({"forms": [3]}, r"forms must be a list of at least one name, got \[3\]"),
        ({"forms": "dense"}, "forms must be a list of at least one name, got 'dense'"),
        ({"forms": []}, r"forms must be a list of at least one name, got \[\]"),
        ({"sub_nets": []}, r"sub_nets must be a list of at least one name, got \[\]"),
        ({"sub_nets": ["s90"]}, "there is no sub-net 's90': did you mean"),
        ({"build": "dense"}, "build must be a function, got 'dense'"),
        ({"clock": None}, "clock must be a function, got None"),
        ({"forms": ["dense", "csc"], "build": None}, "unknown form 'csc': did you mean 'csr'"),
        ({"forms": ["csr"]}, r"forms=\('csr',\) leave nothing to measure \(s50 as csr: no csr here; .* add 'dense'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], complaint: str, elastic: Elastic) -> None:
    with pytest.raises(ConfigError, match=complaint):
        profile(elastic, images(), **{"build": build(elastic), **options})


def test_threads_are_set_for_the_measurement_alone() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3, 1, 2], 0.5, 2), ([4, 3, 2, 1], 0.5, 2), (range(1, 21), 0.95, 19), (range(1, 101), 0.95, 95), ([7], 0.01, 7)],
)
def test_percentile_is_the_smallest_value_that_covers_the_share(values: Any, share: float, expected: float) -> None:
    assert percentile(list(values), share) == expected


def test_memory_that_tensors_share_counts_once() -> None:
    one = nn.Linear(4, 4, bias=False)
    other = copy.deepcopy(one)
    tied = nn.Sequential(one, nn.Linear(4, 4, bias=False))
    tied[1].weight = one.weight
    assert [memory_bytes([one]), memory_bytes([one, other]), memory_bytes([tied]), memory_bytes([one, tied])] == [
        64,
        128,
        64,
        64,
    ]
    assert memory_bytes([lambda x: x]) == 0


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support")
def test_memory_of_sparse_tensors_is_that_of_their_parts() -> None:
    module = nn.Module()
    rows, columns = torch.arange(5), torch.arange(4)
    module.register_buffer("csr", torch.sparse_csr_tensor(rows, columns, torch.ones(4), (4, 4), check_invariants=True))
    blocks = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2, 2, 2)
    module.bsr = torch.sparse_bsr_tensor(*blocks, (4, 4), check_invariants=True)  # a plain attribute
    # indices of 8 bytes, values of 4
    assert memory_bytes([module]) == 8 * (5 + 4) + 4 * 4 + 8 * (3 + 2) + 4 * 8


def test_the_size_of_the_file_is_the_size_of_the_file() -> None:
    model = network()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file_bytes(model) == file.tell()
    assert file_bytes(lambda x: x) is None


def test_equal_tensors_of_one_name_get_one_memory() -> None:
    first, second = network(), network()
    with torch.no_grad():
        second.head.weight[0, 0] += 1
    objects = dict(second.named_parameters())
    want = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    share_memory([first, second])
    together = {
        name: tensor.data_ptr() == second.state_dict()[name].data_ptr() for name, tensor in first.state_dict().items()
    }
    assert [name for name, shared in together.items() if not shared] == ["head.weight"]
    assert all(second.get_parameter(name) is parameter for name, parameter in objects.items())
    assert all(torch.equal(tensor, want[name]) for name, tensor in second.state_dict().items())


def test_zeros_of_another_sign_and_other_layouts_stay_apart() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    nn.init.zeros_(first.weight)
    nn.init.constant_(second.weight, -0.0)
    share_memory([first, second])
    assert first.weight.data_ptr() != second.weight.data_ptr()
    turned = nn.Linear(2, 2, bias=False)
    turned.weight = nn.Parameter(torch.zeros(2, 2).t())
    share_memory([first, turned, lambda x: x])
    assert first.weight.data_ptr() != turned.weight.data_ptr()


def test_nothing_is_waited_for_on_the_cpu() -> None:
    assert waiting(network())() is None
    assert waiting(lambda x: x) is waiting(network())


def test_products_with_sparse_tensors_count_their_stored_values() -> None:
    class Sparse(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight @ x.T).T

    weight = torch.zeros(8, 8)
    weight[0, :3] = 1
    tokens = torch.zeros(10, 8)
    assert count_flops(Sparse(weight), (), tokens).total == 2 * 64 * 10
    assert count_flops(Sparse(weight.to_sparse_csr()), (), tokens).total == 2 * 3 * 10
    assert count_flops(Sparse(weight.to_sparse_bsr((2, 2))), (), tokens).total == 2 * 8 * 10  # two blocks of four


@pytest.mark.parametrize(("layout", "stored"), [("csr", 3), ("bsr", 64)])
def test_compressed_layers_count_what_they_store(layout: Any, stored: int) -> None:
    weight = torch.zeros(16, 16)
    weight[0, :3] = 1
    layer = SparseLinear(weight, torch.ones(16), layout=layout, block_size=8)
    assert count_flops(layer, (), torch.zeros(2, 5, 16)).total == 2 * stored * 10
    assert memory_bytes([layer]) < weight.nbytes + 16 * 4


def test_a_form_that_pays_in_no_layer_is_left_out() -> None:
    class Source:
        def compile(self, name: str, form: str, inputs: Any) -> nn.Module:
            module = nn.Linear(2, 2)
            chosen = {"csr": "dense", "auto": "bsr"}.get(form, form)
            module.compiled_form = {"form": chosen if form == "auto" else form, "layers": [{"form": chosen}]}
            return module

    make = compiler(Source(), [torch.zeros(2)])
    with pytest.raises(ConfigError, match="pays in no layer"):
        make("s50", "csr")
    assert form_of(make("s50", "bsr"), "bsr") == "bsr"
    assert form_of(make("s50", "auto"), "auto") == "bsr"
    assert form_of(lambda x: x, "dense") == "dense"


def test_the_fastest_form_of_a_sub_net() -> None:
    found = Profile(records=(record("s50", "dense", 4), record("s50", "csr", 2), record("s80", "csr", 1)))
    assert found.fastest("s50").form == "csr"
    with pytest.raises(ConfigError, match="there is no sub-net 's5'"):
        found.fastest("s5")


def test_a_profile_goes_through_json(elastic: Elastic) -> None:
    found = profile(elastic, images(), forms=("dense", "csr"), build=build(elastic), runs=1)
    assert Profile.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("records"),
        lambda values: values.update(novel=1),
        lambda values: values["records"][0].pop("form"),
        lambda values: values["records"][0].update(latency_ms=0),
        lambda values: values["records"][0].update(latency_ms="fast"),
        lambda values: values["records"][0].update(metrics=3),
    ],
)
def test_what_is_no_profile_is_refused(change: Any) -> None:
    values = Profile(records=(record("s50", "dense", 4),)).to_dict()
    change(values)
    with pytest.raises(StateError, match=r"this is no profile: .*; give what Profile.to_dict\(\) returned"):
        Profile.from_dict(values)


def test_what_is_no_mapping_is_no_profile() -> None:
    with pytest.raises(StateError, match="this is no profile"):
        Profile.from_dict([])  # type: ignore[arg-type]  # what users do


def test_the_table_compares_forms_with_the_dense_one() -> None:
    found = Profile(
        records=(
            record("s50", "dense", 4, metrics={"top1": 0.5}, flops=2000),
            record("s50", "csr", 2, metrics={"top1": 0.5}, memory_bytes=1500),
            record("s80", "csr", 1),
        ),
        left_out=(LeftOut(sub_net="s50", form="bsr", reason="no"), LeftOut(sub_net="s80", form="bsr", reason="no")),
        example_input="1 x 3",
        threads=1,
    )
    table = profile_table(found)
    assert table.columns == (
        *("sub-net", "form", "sparsity", "top1", "latency, ms", "p95, ms", "faster than dense", "memory", "FLOPs"),
    )
    assert table.rows[1][6:] == ("2.00 x", "1.50 kB", "–")
    assert table.rows[2][3] == "–"
    assert table.rows[2][6] == "–"
    text = render_profile(found, width=200, color=False)
    assert "input 1 x 3, one thread" in text
    assert "Not measured: bsr of s50, s80: no" in text


def test_the_table_is_plain_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    text = str(Profile(records=(record("s50", "dense", 4), record("s80", "dense", 2))))
    assert "\nsub-net   form  sparsity" in text
    assert "\n-------  -----  --------" in text


def test_channel_sub_nets_are_measured_as_they_are_compiled(tmp_path: Path) -> None:
    model = hybrid()
    path = write_channels(tmp_path / "channels.safetensors", model, HYBRID_GROUPS)
    channels = load(path, model)
    found = profile(channels, pictures(1), forms=("dense", "sliced", "2:4"), runs=1, warmup=0)
    assert [(r.sub_net, r.form) for r in found.records] == [(n, f) for n in ("c50", "c75") for f in ("dense", "sliced")]
    dense, half, _, quarter = found.records
    for smaller, larger in ((half, dense), (quarter, half)):
        for cost in ("flops", "memory_bytes", "file_bytes"):
            assert getattr(smaller, cost) < getattr(larger, cost)
    assert {(entry.form, entry.sub_net) for entry in found.left_out} == {("2:4", "c50"), ("2:4", "c75")}


def test_sub_nets_without_channels_are_not_sliced(elastic: Elastic) -> None:
    found = profile(elastic, images(), forms=("dense", "sliced"), runs=1, warmup=0)
    assert [(r.sub_net, r.form) for r in found.records] == [("s50", "dense"), ("s80", "dense")]
    assert "channel" in found.left_out[0].reason


def test_inputs_that_no_form_accepts_are_reported(elastic: Elastic) -> None:
    with pytest.raises(ConfigError, match=r"example_inputs \(1 x 9\) cannot be run through the model: RuntimeError"):
        compiler(elastic, torch.zeros(1, 9))("s50", "csr")
    with pytest.raises(ConfigError, match=r"example_inputs \(1 x 9\) cannot be run through the network"):
        profile(elastic, torch.zeros(1, 9), forms=["csr", "dense"])


@pytest.mark.extra("report")
@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".PNG", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_picture_is_written_as_its_suffix_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    records = (
        record("s50", "dense", 4, metrics={"top1": 0.5, "loss": 1}, memory_bytes=1000),
        record("s80", "csr", 1, metrics={"top1": 0.4, "loss": 2}, memory_bytes=500),
        record("s95", "csr", 1, metrics={"loss": 3}),
    )
    path = tmp_path / f"profile{suffix}"
    write_picture(Profile(records=records, example_input="1 x 3"), path)
    assert path.read_bytes().startswith(start)
    again = tmp_path / f"again{suffix}"
    write_picture(Profile(records=records, example_input="1 x 3"), again, metric="top1")
    assert again.read_bytes() == path.read_bytes()
    write_picture(Profile(records=records, example_input="1 x 3"), again, metric="loss")
    assert again.read_bytes() != path.read_bytes()


@pytest.mark.extra("report")
def test_the_picture_names_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "profile.svg"
    with_svg_text = Profile(records=(record("s50", "dense", 4, flops=10), record("s80", "sliced", 2, flops=5)))
    write_picture(with_svg_text, path)
    text = path.read_text(encoding="utf-8")
    for word in ("latency, ms", "FLOPs", "share of weights kept", "s50", "sliced"):
        assert f"<!-- {word} -->" in text
    assert "memory" not in text


@pytest.mark.extra("report")
def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    found = Profile(records=(record("s50", "dense", 4, metrics={"top1": 0.5}),))
    with pytest.raises(ConfigError, match=r"picture must end in .svg, .png, .pdf, got .*profile.txt"):
        write_picture(found, tmp_path / "profile.txt")
    with pytest.raises(ConfigError, match="metric 'top5' is none of the profile's; known: top1"):
        write_picture(found, tmp_path / "profile.svg", metric="top5")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"a picture needs the package 'matplotlib'.*ast-plugin\[report\]"):
        check_picture(tmp_path / "profile.svg")
