"""A sliced sub-net runs without this package: as state dict with sizes, as torch's program, as ONNX."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sliced_examples
import torch
from elastic_examples import network, write_example
from safetensors.torch import load_file
from sliced_examples import HYBRID_GROUPS, Hybrid, hybrid, pictures, write_channels
from torch import Tensor, nn

import ast_plugin
from ast_plugin.elastic import load
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ActivationError, ConfigError, ElasticFileError, MissingExtraError, SaveError
from ast_plugin.export import export_model, export_state_dict
from ast_plugin.export_folder import export_folder
from ast_plugin.export_graph import export_onnx, export_program
from ast_plugin.export_sliced import shrink


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS)


def outputs(file: Path, name: str) -> Tensor:
    elastic = load(file, hybrid(seed=7))
    with elastic.sub_net(name), torch.no_grad():
        return elastic.model(pictures())


# ------------------------------------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_freshly_built_model_shrinks_to_what_was_written(file: Path, suffix: str, loaded: bool) -> None:
    target = file.with_name(f"small{suffix}")
    source = load(file, hybrid()) if loaded else read_elastic(file)
    export_state_dict(source, "c75", target, form="sliced")
    state = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    sizes = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    model = shrink(Hybrid(), sizes).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures()), outputs(file, "c75"), rtol=1e-5, atol=1e-5)
    assert repr(model) == repr(export_model(source, "c75", hybrid(), form="sliced"))
    assert (model.block.depth.groups, model.attn.heads, model.attn.inner) == (6, 1, 4)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    whole = read_elastic(file).materialize("c75")
    assert sum(tensor.numel() for tensor in state.values()) < 0.5 * sum(tensor.numel() for tensor in whole.values())


def test_the_sizes_say_what_was_kept(file: Path) -> None:
    export_state_dict(read_elastic(file), "c75", file.with_name("small.pt"), form="sliced")
    sizes = json.loads(file.with_name("small.json").read_text(encoding="utf-8"))
    assert (sizes["format"], sizes["version"], sizes["sub_net"]) == ("ast_plugin.sliced", 1, "c75")
    assert sizes["modules"]["fc2"]["tensors"] == {"weight": [16, 8]}
    assert sizes["modules"]["attn"] == {"tensors": {}, "numbers": {"heads": 1, "inner": 4}}
    kept = load(file, hybrid()).kept_channels("c75")
    assert sizes["units"] == {group: flags.nonzero().reshape(-1).tolist() for group, flags in kept.items()}
    small = torch.load(file.with_name("small.pt"), weights_only=True)["fc1.bias"]
    assert torch.equal(small, hybrid().fc1.bias.detach()[sizes["units"]["fc1"]])


def test_channels_fill_multiples_where_it_is_asked_for(file: Path) -> None:
    export_state_dict(read_elastic(file), "c75", file.with_name("small.pt"), form="sliced", multiple=16)
    model = shrink(Hybrid(), json.loads(file.with_name("small.json").read_bytes())).eval()
    model.load_state_dict(torch.load(file.with_name("small.pt"), weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model(pictures()), outputs(file, "c75"), rtol=1e-5, atol=1e-5)
    compiled = load(file, hybrid()).compile("c75", "sliced", pictures(), multiple=16)
    copied = export_model(read_elastic(file), "c75", hybrid(), form="sliced", multiple=16)
    assert [m.block.expand.out_channels for m in (model, compiled, copied)] == [16, 16, 16]
    assert [m.attn.heads for m in (model, compiled, copied)] == [1, 1, 1]


def test_when_the_state_dict_cannot_be_written_the_older_sizes_stay(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = file.with_name("small.safetensors")
    export_state_dict(read_elastic(file), "c75", target, form="sliced")
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ast_plugin.export.save_file", full)
    with pytest.raises(SaveError, match=r"small\.safetensors"):
        export_state_dict(read_elastic(file), "c50", target, form="sliced")
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_other_files_in_the_place_of_the_sizes_are_kept(file: Path) -> None:
    for content in (b'{"name": "mine"}', b"[1]", b"\xff"):
        file.with_name("small.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"small.json', where the sizes .* is a file of another kind"):
            export_state_dict(read_elastic(file), "c75", file.with_name("small.pt"), form="sliced")
        assert file.with_name("small.json").read_bytes() == content
        assert not file.with_name("small.pt").exists()
    file.with_name("small.json").unlink()
    for name in ("c75", "c50"):
        export_state_dict(read_elastic(file), name, file.with_name("small.pt"), form="sliced")
    assert json.loads(file.with_name("small.json").read_bytes())["sub_net"] == "c50"


@pytest.mark.parametrize("form", ["slicd", "csr", None])
def test_an_unknown_form_is_refused_with_the_near_ones(file: Path, form: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown form .*: .*dense, sliced"):
        export_state_dict(read_elastic(file), "c75", file.with_name("small.pt"), form=form)
    with pytest.raises(ConfigError, match="unknown form 'slicd': did you mean 'sliced'"):
        export_model(read_elastic(file), "c75", hybrid(), form="slicd")


def test_sub_nets_without_channels_are_refused(tmp_path: Path) -> None:
    contents = read_elastic(write_example(tmp_path / "elastic.safetensors"))
    for source in (contents, load(contents.path, network())):
        with pytest.raises(ConfigError, match=r"'s80' cannot be sliced: its pattern is None; .* pattern='channel'"):
            export_state_dict(source, "s80", tmp_path / "small.pt", form="sliced")

    class Other:
        def materialize(self, name: str) -> dict[str, Tensor]:
            return contents.materialize(name)

    with pytest.raises(ConfigError, match="'s80' cannot be sliced: a Other knows no channel groups"):
        export_state_dict(Other(), "s80", tmp_path / "small.pt", form="sliced")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic.safetensors"]


def test_another_architecture_is_refused(file: Path) -> None:
    model = hybrid()
    model.attn.heads = 2
    with pytest.raises(ElasticFileError, match="expects heads of 'attn' to be 4, and it is 2"):
        export_model(read_elastic(file), "c75", model, form="sliced")


def test_a_sub_net_that_was_trained_on_as_an_ordinary_model_is_refused(file: Path) -> None:
    elastic = load(file, hybrid())
    with elastic.sub_net("c75") as model, torch.no_grad():
        model.block.project.weight += 0.1
    complaint = r"'block\.project\.weight' reads dropped units of .* use form='dense', or load the elastic file again"
    with pytest.raises(ActivationError, match=complaint):
        export_state_dict(elastic, "c75", file.with_name("small.pt"), form="sliced")
    with pytest.raises(ActivationError, match=complaint):
        export_model(elastic, "c75", hybrid(), form="sliced")
    with pytest.raises(ActivationError, match=complaint):
        export_program(elastic, "c75", hybrid(), pictures(), file.with_name("small.pt2"), form="sliced")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# ------------------------------------------------------------------------------------------------ never trained


def statistics(**steps: int) -> dict[str, Any]:
    return {"sub_nets": {name: {"steps": count} for name, count in steps.items()}}


def test_a_sub_net_that_was_never_trained_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = write_channels(tmp_path / "e.safetensors", hybrid(), HYBRID_GROUPS, statistics=statistics(c50=3, c75=0))
    small = tmp_path / "small.pt"
    for source in (read_elastic(path), load(path, hybrid())):
        for form in ("dense", "sliced"):
            with pytest.raises(ConfigError, match=r"'c75' was never trained: .* allow_untrained=True"):
                export_state_dict(source, "c75", small, form=form)
            with pytest.raises(ConfigError, match="never trained"):
                export_model(source, "c75", hybrid(), form=form)
            assert not small.exists()
            export_state_dict(source, "c75", small, form=form, allow_untrained=True)
            small.unlink()
            export_state_dict(source, "c50", small, form=form)
            small.unlink()
    with pytest.raises(ConfigError, match="never trained"):
        export_program(read_elastic(path), "c75", hybrid(), pictures(), tmp_path / "small.pt2")
    with pytest.raises(ConfigError, match="never trained"):
        export_folder(_with_folder(path), "c75", tmp_path / "other")


def _with_folder(path: Path) -> Path:
    folder = path.with_name("saved")
    folder.mkdir()
    (folder / "elastic.safetensors").write_bytes(path.read_bytes())
    return folder


def test_a_training_knows_which_sub_nets_it_trained(tmp_path: Path) -> None:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    training = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), total_steps=12)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    first, second = training.sub_nets
    export_state_dict(training, first, tmp_path / "first.pt")
    with pytest.raises(ConfigError, match=f"'{second}' was never trained"):
        export_state_dict(training, second, tmp_path / "second.pt")


def test_a_training_its_file_and_a_loaded_model_give_the_same_small_network(tmp_path: Path) -> None:
    model = hybrid().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = ast_plugin.wrap(
        optimizer, model, sparsities=(0.5, 0.75), total_steps=8, pattern="channel", groups=HYBRID_GROUPS
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(pictures(4)).square().mean().backward()
        optimizer.step()
    path = tmp_path / "elastic.safetensors"
    training.save(path)
    model.eval()
    for name in training.sub_nets:
        with training.sub_net(name), torch.no_grad():
            expected = model(pictures())
        for number, source in enumerate((training, read_elastic(path), load(path, hybrid()))):
            target = tmp_path / f"{name}-{number}.pt"
            export_state_dict(source, name, target, form="sliced")
            small = shrink(Hybrid(), json.loads(target.with_suffix(".json").read_bytes())).eval()
            small.load_state_dict(torch.load(target, weights_only=True))
            with torch.no_grad():
                torch.testing.assert_close(small(pictures()), expected, rtol=1e-5, atol=1e-5)
            kept = round(32 * (1 - training.sub_nets.index(name) * 0.25 - 0.5))
            assert small.fc1.out_features == kept


# ------------------------------------------------------------------------------------------------ graphs


@pytest.mark.slow
def test_a_program_of_torch_runs_without_the_model(file: Path) -> None:
    path = file.with_name("small.pt2")
    export_program(read_elastic(file), "c75", hybrid(), pictures(), path, form="sliced")
    program = torch.export.load(path).module()
    torch.testing.assert_close(program(pictures()), outputs(file, "c75"), rtol=1e-5, atol=1e-5)
    whole = file.with_name("whole.pt2")
    shapes = {"images": {0: torch.export.Dim("batch", min=2)}}
    export_program(read_elastic(file), "c75", hybrid(), {"images": pictures(3)}, whole, dynamic_shapes=shapes)
    assert torch.export.load(whole).module()(images=pictures(5)).shape == (5, 5)
    assert path.stat().st_size < whole.stat().st_size


def test_a_program_needs_its_suffix_and_a_network_that_torch_can_express(file: Path) -> None:
    class Branching(Hybrid):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if images.sum() > 0 else images

    with pytest.raises(ConfigError, match=r"path must end in .pt2, .* got '.*small.pt'"):
        export_program(read_elastic(file), "c75", hybrid(), pictures(), file.with_name("small.pt"))
    with pytest.raises(SaveError, match=r"torch\.export cannot express sub-net 'c75'"):
        export_program(read_elastic(file), "c75", Branching(), pictures(), file.with_name("small.pt2"))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("inputs", [None, "x", [torch.ones(1, 3, 8, 8)], torch.ones(1, 1, 8, 8)])
def test_inputs_that_the_model_does_not_accept_are_named(file: Path, inputs: Any) -> None:
    with pytest.raises(ConfigError, match=r"^example_inputs .*; give what the model accepts|^example_inputs must be"):
        export_program(read_elastic(file), "c75", hybrid(), inputs, file.with_name("small.pt2"), form="sliced")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_is_no_source_and_no_model_is_refused(file: Path) -> None:
    source: Any = str(file)
    model: Any = "hybrid"
    with pytest.raises(ConfigError, match=r"source must be a training, .* got str"):
        export_model(source, "c75", hybrid())
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got str"):
        export_model(read_elastic(file), "c75", model)


@pytest.mark.parametrize("path", [None, 3, ""])
def test_what_is_no_path_is_refused(file: Path, path: Any) -> None:
    with pytest.raises(ConfigError, match="path must be the path of a file"):
        export_state_dict(read_elastic(file), "c75", path)
    with pytest.raises(ConfigError, match="path must be the path of a file"):
        export_program(read_elastic(file), "c75", hybrid(), pictures(), path)


@pytest.mark.extra("onnx")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and its packages, about themselves
def test_onnx_runtime_gives_the_outputs_of_the_smaller_network(file: Path) -> None:
    import onnxruntime

    for form, given in (("dense", pictures()), ("sliced", {"images": pictures()})):
        export_onnx(read_elastic(file), "c75", hybrid(), given, file.with_name(f"{form}.onnx"), form=form)
    session = onnxruntime.InferenceSession(file.with_name("sliced.onnx"), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: pictures().numpy()})
    torch.testing.assert_close(torch.from_numpy(result), outputs(file, "c75"), rtol=1e-4, atol=1e-5)
    assert file.with_name("sliced.onnx").stat().st_size < file.with_name("dense.onnx").stat().st_size


@pytest.mark.extra("onnx")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_with_other_outputs_is_not_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Hybrid):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                Counting.calls += 1
                return super().forward(images) + 1
            return super().forward(images)

    with pytest.raises(SaveError, match="ONNX Runtime gives other outputs than the model; nothing was written"):
        export_onnx(read_elastic(file), "c75", Counting().eval(), pictures(), file.with_name("small.onnx"))
    assert Counting.calls == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_missing_engine_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(MissingExtraError, match=r"'onnxruntime', which is not installed; .* 'ast-plugin\[onnx\]'"):
        export_onnx(read_elastic(file), "c75", hybrid(), pictures(), file.with_name("small.onnx"), form="sliced")


# ------------------------------------------------------------------------------------------------ without the package

WITHOUT_US = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ast_plugin":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from typing import Any
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

{sources}

folder = sys.argv[1]
torch.set_num_threads(1)
given = torch.load(f"{{folder}}/given.pt", weights_only=True)
model = Hybrid()
shrink(model, json.load(open(f"{{folder}}/small.json")))
model.load_state_dict(load_file(f"{{folder}}/small.safetensors"))
program = torch.export.load(f"{{folder}}/small.pt2").module()
with torch.no_grad():
    for network in (model.eval(), program):
        torch.testing.assert_close(network(given["images"]), given["outputs"], rtol=1e-5, atol=1e-5)
assert not any(module.partition(".")[0] == "ast_plugin" for module in sys.modules)
print("equal", sum(parameter.numel() for parameter in model.parameters()))
"""


def test_the_lines_of_the_page_are_those_of_the_package() -> None:
    page = (Path(__file__).parent.parent / "docs" / "compile.md").read_text(encoding="utf-8")
    shown = page[page.index("def shrink(") : page.index("with open(")]
    here, there = (ast.parse(source).body[0] for source in (inspect.getsource(shrink), shown))
    assert ast.unparse(here.body[1:]) == ast.unparse(there.body)  # without the docstring
    assert ast.unparse(here.args) == ast.unparse(there.args)


@pytest.mark.slow
def test_a_process_without_this_package_runs_the_smaller_network(file: Path, tmp_path: Path) -> None:
    contents = read_elastic(file)
    export_state_dict(contents, "c75", tmp_path / "small.safetensors", form="sliced")
    export_program(contents, "c75", hybrid(), pictures(), tmp_path / "small.pt2", form="sliced")
    torch.save({"images": pictures(), "outputs": outputs(file, "c75")}, tmp_path / "given.pt")
    classes = (sliced_examples.Attention, sliced_examples.Inverted, Hybrid, shrink)
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_US.format(sources="\n\n".join(map(inspect.getsource, classes))))
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    small = export_model(contents, "c75", hybrid(), form="sliced")
    assert done.stdout.split() == ["equal", str(sum(parameter.numel() for parameter in small.parameters()))]


def test_a_model_pickled_whole_mentions_this_package_nowhere(file: Path, tmp_path: Path) -> None:
    small = export_model(read_elastic(file), "c75", nn.Sequential(hybrid())[0], form="sliced")
    torch.save(small, tmp_path / "small.pt")
    assert b"ast_plugin" not in (tmp_path / "small.pt").read_bytes()


@pytest.mark.parametrize("multiple", [16, 0, 2.0])
def test_a_multiple_goes_with_the_form_that_cuts_alone(file: Path, multiple: Any) -> None:
    message = "form 'dense' cuts out none; give form='sliced'" if multiple == 16 else "multiple must be a whole number"
    contents, path = read_elastic(file), file.with_name("whole.pt")
    with pytest.raises(ConfigError, match=message):
        export_state_dict(contents, "c75", path, multiple=multiple)
    with pytest.raises(ConfigError, match=message):
        export_model(contents, "c75", hybrid(), multiple=multiple)
    assert not path.exists()
