"""An exported sub-net is an ordinary model that gives the sub-net's own outputs, without this package."""

from __future__ import annotations

import copy
import errno
import importlib.util
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import ast_plugin
from ast_plugin import export_graph
from ast_plugin.elastic import load
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ConfigError, ElasticFileError, MissingExtraError, SaveError
from ast_plugin.export import SubNetSource, export_model, export_state_dict, sparse_state_dict
from ast_plugin.export_graph import export_onnx
from ast_plugin.plain_model import HOOKS


def from_contents(folder: Path) -> SubNetSource:
    return read_elastic(write_example(folder / "elastic.safetensors"))


def from_elastic(folder: Path) -> SubNetSource:
    return load(write_example(folder / "elastic.safetensors"), network(seed=5))


class FakeTraining:
    """Anything with `materialize` serves; this one clones every entry, as a training does."""

    def __init__(self) -> None:
        model = network()
        self.states = {n: expected(model, random_masks(model), private_state(model), n) for n in SUB_NETS}

    def materialize(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self.states[name].items()}


SOURCES: dict[str, Callable[[Path], SubNetSource]] = {
    "contents": from_contents,
    "elastic": from_elastic,
    "training": lambda _: FakeTraining(),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SubNetSource:
    return SOURCES[request.param](tmp_path)


def want(name: str) -> dict[str, Tensor]:
    return FakeTraining().states[name]


def wanted_outputs(name: str) -> Tensor:
    plain = Network().eval()
    plain.load_state_dict(want(name))
    with torch.no_grad():
        return plain(images())


# ------------------------------------------------------------------------------------------------ state dicts


def test_safetensors_load_with_safetensors_alone(source: SubNetSource, tmp_path: Path) -> None:
    export_state_dict(source, "s80", tmp_path / "s80.safetensors")
    state = load_file(tmp_path / "s80.safetensors")
    assert same_state({key: state[key] for key in want("s80")}, want("s80"))
    with safe_open(tmp_path / "s80.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "sub_net": "s80"}


def test_pt_loads_with_weights_only(source: SubNetSource, tmp_path: Path) -> None:
    for suffix in ("pt", "pth"):
        export_state_dict(source, "s80", str(tmp_path / f"s80.{suffix}"))
        assert same_state(torch.load(tmp_path / f"s80.{suffix}", weights_only=True), want("s80"))


@pytest.mark.parametrize("name", ["s80.bin", "s80", "s80.onnx"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"path must end in .safetensors, .pt or .pth, got '.*{name}'"):
        export_state_dict(FakeTraining(), "s80", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_unknown_sub_net_writes_nothing(tmp_path: Path, suffix: str) -> None:
    contents = from_contents(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no sub-net 's8' in '.*': did you mean 's80'"):
        export_state_dict(contents, "s8", tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic.safetensors"]


def test_a_failing_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s80.pt"
    export_state_dict(FakeTraining(), "s80", path)
    before = path.read_bytes()

    def full(state: object, file: BinaryIO) -> None:
        file.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveError, match="free some space"):
        export_state_dict(FakeTraining(), "s50", path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s80.pt"]


def test_the_name_of_a_file_is_not_in_its_bytes(tmp_path: Path) -> None:
    export_state_dict(FakeTraining(), "s80", tmp_path / "one.pt")
    export_state_dict(FakeTraining(), "s80", tmp_path / "another.pt")
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


class TiedSource:
    """A sub-net of a network whose output layer is its embedding; a file cannot share, a state dict can."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = TiedSource.build()

    @staticmethod
    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    def materialize(self, name: str) -> dict[str, Tensor]:
        weight = self.model[0].weight.detach() * 2
        return {"0.weight": weight, "1.weight": weight}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tied_weights_load_strictly(tmp_path: Path, suffix: str) -> None:
    source, path = TiedSource(), tmp_path / f"tied{suffix}"
    export_state_dict(source, "s90", path)
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    model = TiedSource.build()
    model.load_state_dict(state)
    assert torch.equal(model[1].weight, source.model[0].weight * 2)
    assert model[1].weight is model[0].weight
    if suffix == ".pt":
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_names_of_a_compiled_model_are_exported_plain(tmp_path: Path) -> None:
    class Compiled(FakeTraining):
        def materialize(self, name: str) -> dict[str, Tensor]:
            return {f"_orig_mod.{key}": tensor for key, tensor in super().materialize(name).items()}

    export_state_dict(Compiled(), "s80", tmp_path / "a.pt")
    assert same_state(torch.load(tmp_path / "a.pt", weights_only=True), want("s80"))
    assert same_state(dict(export_model(Compiled(), "s80", network()).state_dict()), want("s80"))


def test_memory_order_does_not_matter(tmp_path: Path) -> None:
    source = FakeTraining()
    source.states["s80"]["conv.weight"] = want("s80")["conv.weight"].to(memory_format=torch.channels_last)
    export_state_dict(source, "s80", tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["conv.weight"], want("s80")["conv.weight"])


# ------------------------------------------------------------------------------------------------ models


def test_a_model_is_an_independent_plain_copy(source: SubNetSource) -> None:
    architecture = network(seed=7)
    before = {key: tensor.clone() for key, tensor in architecture.state_dict().items()}
    plain = export_model(source, "s80", architecture)
    assert type(plain) is Network
    assert not plain.training
    assert same_state(dict(plain.state_dict()), want("s80"))
    assert torch.equal(plain(images()).detach(), wanted_outputs("s80"))
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert same_state(dict(architecture.state_dict()), before)
    assert same_state(dict(source.materialize("s80")), want("s80"))


def _ours(*_: object) -> None:
    """Stand in for a hook of the controller."""


_ours.__module__ = "ast_plugin.somewhere"


def test_hooks_of_this_package_are_not_copied_and_the_users_are() -> None:
    architecture = network()
    calls = []
    for module in (architecture, architecture.hidden):
        module.register_forward_pre_hook(_ours, prepend=True)
        module.register_forward_hook(_ours, always_call=True)
        module.register_state_dict_pre_hook(_ours)
        module.register_load_state_dict_pre_hook(_ours)
        module.register_full_backward_hook(_ours)
    architecture.register_forward_hook(lambda *_: calls.append("user"))
    plain = export_model(FakeTraining(), "s80", architecture)
    plain(images())
    assert calls == ["user"]
    for module in plain.modules():
        for place in HOOKS:
            hooks = getattr(module, place).values()
            assert not any(getattr(hook, "hook", hook) is _ours for hook in hooks)
    assert len(architecture._forward_pre_hooks) == 1


def test_a_compiled_or_data_parallel_model_gives_a_plain_one() -> None:
    for wrapped in (torch.compile(network(), backend="eager"), nn.DataParallel(network())):
        plain = export_model(FakeTraining(), "s80", wrapped)
        assert type(plain) is Network
        assert torch.equal(plain(images()).detach(), wanted_outputs("s80"))
    torch._dynamo.reset()


def test_a_model_pickled_whole_mentions_this_package_nowhere() -> None:
    architecture = network()
    architecture.register_forward_pre_hook(_ours)
    assert b"ast_plugin" not in pickle.dumps(export_model(FakeTraining(), "s80", architecture))


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ElasticFileError, match=r"(?s)sub-net 's80' does not fit the model: .*size mismatch for head"):
        export_model(FakeTraining(), "s80", Network(classes=9))


# ------------------------------------------------------------------------------------------------ without the package

WITHOUT_US = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ast_plugin":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

{source}

folder = sys.argv[1]
torch.set_num_threads(1)
given = torch.load(f"{{folder}}/given.pt", weights_only=True)
for name in {names!r}:
    stem = f"{{folder}}/{{name}}"
    for state in (load_file(stem + ".safetensors"), torch.load(stem + ".pt", weights_only=True)):
        model = Network()
        model.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(model.eval()(given["images"]), given[name]), name
assert not any(module.partition(".")[0] == "ast_plugin" for module in sys.modules)
print("equal")
"""


def test_a_process_without_this_package_gives_the_controllers_outputs(tmp_path: Path) -> None:
    # The sub-net put on the model here, the exports loaded there, equal bit for bit.
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), total_steps=12, update_interval=2)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    model.eval()
    ast.save(tmp_path / "elastic.safetensors")
    contents = read_elastic(tmp_path / "elastic.safetensors")
    given = {"images": images()}
    for name in SUB_NETS:
        with ast.sub_net(name), torch.no_grad():
            given[name] = model(images())
        export_state_dict(ast, name, tmp_path / f"{name}.pt")
        export_state_dict(contents, name, tmp_path / f"{name}.safetensors")
        assert torch.equal(export_model(ast, name, model)(images()).detach(), given[name])
    assert not torch.equal(given["s50"], given["s80"])
    torch.save(given, tmp_path / "given.pt")
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_US.format(source=inspect.getsource(Network), names=SUB_NETS))
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


# ------------------------------------------------------------------------------------------------ sparse tensors


def test_a_hand_worked_sparse_matrix() -> None:
    # Rows: one value in column 2, none, two in columns 0 and 1; 3 of 9 are kept, 2/3 zeros.
    class Source:
        def materialize(self, name: str) -> dict[str, Tensor]:
            weight = torch.tensor([[0.0, 0, 5], [0, 0, 0], [7, 8, 0]])
            return {"w": weight, "full": torch.ones(2, 2), "bias": torch.zeros(3), "count": torch.zeros(2, 2).long()}

    state = sparse_state_dict(Source(), "s", minimum_sparsity=0.6)
    assert state["w"].crow_indices().tolist() == [0, 1, 1, 3]
    assert state["w"].col_indices().tolist() == [2, 0, 1]
    assert state["w"].values().tolist() == [5, 7, 8]
    assert state["w"].crow_indices().dtype == torch.int32
    assert [state[key].layout for key in ("full", "bias", "count")] == [torch.strided] * 3
    assert sparse_state_dict(Source(), "s", minimum_sparsity=0.7)["w"].layout == torch.strided


def test_sparse_matrices_multiply_like_the_dense_ones(source: SubNetSource) -> None:
    sparse, dense = sparse_state_dict(source, "s80", minimum_sparsity=0.5), want("s80")
    assert list(sparse) == list(dense)
    x = torch.randn(3, 7)
    for name in ("hidden.weight", "head.weight"):
        assert sparse[name].layout == torch.sparse_csr
        assert torch.equal(sparse[name].to_dense(), dense[name])
        torch.testing.assert_close(sparse[name] @ x.T, dense[name] @ x.T)
    assert sparse["conv.weight"].layout == torch.strided  # four-dimensional


def test_tied_matrices_stay_one_sparse_tensor() -> None:
    state = sparse_state_dict(TiedSource(), "s90", minimum_sparsity=0)
    assert state["0.weight"] is state["1.weight"]


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", float("nan")])
def test_a_minimum_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"minimum_sparsity must lie in \[0, 1\], got"):
        sparse_state_dict(FakeTraining(), "s80", minimum_sparsity=value)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="layout must be 'csr', got 'bsr'"):
        sparse_state_dict(FakeTraining(), "s80", layout="bsr")


# ------------------------------------------------------------------------------------------------ ONNX


def test_onnx_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ast-plugin\[onnx\]'"):
        export_onnx(FakeTraining(), "s80", network(), images(), tmp_path / "a.onnx")


def test_onnx_refuses_what_one_file_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(export_graph, "_LARGEST_ONNX", 1000)
    with pytest.raises(ConfigError, match="one ONNX file holds 2 GB; call export_model and"):
        export_onnx(FakeTraining(), "s80", network(), images(), tmp_path / "a.onnx")


@pytest.mark.extra("onnx")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and its packages, about themselves
@pytest.mark.parametrize("free", [False, True], ids=["fixed batch", "any batch"])
def test_onnx_runtime_gives_the_same_outputs(tmp_path: Path, free: bool) -> None:
    import onnxruntime

    elastic = load(write_example(tmp_path / "elastic.safetensors"), network(seed=5).train())
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    given = (images(),) if free else images()
    export_onnx(elastic, "s80", elastic.model, given, tmp_path / "s80.onnx", dynamic_shapes=shapes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic.safetensors", "s80.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "s80.onnx", providers=["CPUExecutionProvider"])
    batch = torch.cat([images(), images() + 1]) if free else images()
    plain = copy.deepcopy(elastic.model).eval()
    plain.load_state_dict(want("s80"))
    (result,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), plain(batch).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.extra("onnx")
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_onnx_cannot_express_keeps_the_old_file(tmp_path: Path) -> None:
    class Branching(Network):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if images.sum() > 0 else images

    (tmp_path / "a.onnx").write_bytes(b"old")
    with pytest.raises(SaveError, match=r"torch\.onnx cannot express sub-net 's80': "):
        export_onnx(FakeTraining(), "s80", Branching(), images(), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
