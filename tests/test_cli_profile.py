"""`ast-plugin profile`: the network and its inputs from a command line; table, JSON, picture and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from elastic_examples import write_example
from torch import nn

from ast_plugin import cli
from ast_plugin.cli import main
from ast_plugin.cli_model import make_inputs, make_model
from ast_plugin.errors import ConfigError
from ast_plugin.profiles_records import Profile

FACTORY = """
from torch import nn
from elastic_examples import network

def make():
    return network(3)

def sized(classes, name="none"):
    return nn.Linear(3, classes)

class Makers:
    width = 3

    @staticmethod
    def make(*, bias=True):
        return nn.Linear(Makers.width, 2, bias=bias)

number = 4

def nothing():
    return None

def broken():
    raise ValueError("no weights here")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an elastic file and a module that makes its network, which the command runs in."""
    write_example(tmp_path / "elastic.safetensors", metrics={"s50": {"top1": 0.75}, "s80": {"top1": 0.5}})
    (tmp_path / "factories_of_the_test.py").write_text(FACTORY)
    (tmp_path / "syntax_error_of_the_test.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "factories_of_the_test", raising=False)
    return tmp_path


MODEL = ["--model", "factories_of_the_test:make", "--input", "4x3x6x6", "--runs", "1", "--warmup", "0"]
PROFILE = ["profile", "elastic.safetensors", *MODEL]


def test_the_table_has_a_row_for_each_sub_net_and_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PROFILE, "--forms", "dense", "sliced", "--threads", "1"]) == cli.OK
    text = capsys.readouterr().out
    assert "input 4 × 3 × 6 × 6" in text or "input 4 x 3 x 6 x 6" in text
    assert "one thread" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.lstrip().startswith("s")]
    assert rows[:2] == [["sub-net", "form"], ["s50", "dense"]]
    assert ["s80", "dense"] in rows
    assert "Not measured: sliced of s50" in text


def test_json_is_a_profile_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PROFILE, "--forms", "dense", "--sub-nets", "s80", "--json"]) == cli.OK
    found = Profile.from_dict(json.loads(capsys.readouterr().out))
    assert [(r.sub_net, r.form, r.metrics) for r in found.records] == [("s80", "dense", {"top1": 0.5})]
    assert found.runs == 1


def test_a_folder_serves_as_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", ".", *MODEL, "--forms", "dense", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["elastic_bytes"] == Path("elastic.safetensors").stat().st_size


@pytest.mark.extra("report")
def test_the_picture_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PROFILE, "--forms", "dense", "--picture", "profile.svg", "--metric", "top1"]) == cli.OK
    assert "<!-- top1 -->" in Path("profile.svg").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith("Picture: profile.svg\n")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "the following arguments are required: --model, --input"),
        (["--model", "factories_of_the_test"], "the following arguments are required: --input"),
    ],
)
def test_a_network_and_an_input_must_be_named(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "elastic.safetensors", *argv]) == cli.USAGE
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--forms", "csc"], "unknown form 'csc': did you mean 'csr'"),
        (["--sub-nets", "s51"], "there is no sub-net 's51'"),
        (["--runs", "0"], "runs must be a whole number of at least 1, got 0"),
        (["--threads", "-1"], "num_threads must be a whole number of at least 1, got -1"),
        (["--metric", "top5"], "--metric 'top5' is not in the file; known: top1"),
        (["--picture", "profile.txt"], "picture must end in .svg, .png, .pdf, got 'profile.txt'"),
        (["--input", "3"], "cannot be run through the network"),
    ],
)
def test_what_cannot_be_measured_exits_with_2(
    argv: list[str], complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PROFILE, *argv]) == cli.USAGE
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_network_of_another_architecture_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "factories_of_the_test:sized", "--model-argument", "classes=2", "--input", "1x3"]
    assert main(["profile", "elastic.safetensors", *argv]) == cli.FAILED
    assert "was made for another architecture" in capsys.readouterr().err


def test_arguments_are_json_or_else_texts(folder: Path) -> None:
    model = make_model("factories_of_the_test:sized", ["classes=7", "name=resnet"], "cpu")
    assert (model.out_features, model.training) == (7, False)
    assert make_model("factories_of_the_test:Makers.make", ["bias=false"], "cpu").bias is None


def test_a_class_of_an_installed_package_makes_the_network(folder: Path) -> None:
    model = make_model("torch.nn:Linear", ["in_features=2", "out_features=3", "dtype=null"], "cpu")
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize(
    ("path", "arguments", "device", "complaint"),
    [
        ("factories_of_the_test", [], "cpu", "--model must have the form MODULE:NAME, such as"),
        (":make", [], "cpu", "--model must have the form MODULE:NAME"),
        ("missing_module:make", [], "cpu", "'missing_module' cannot be imported: ModuleNotFoundError"),
        ("syntax_error_of_the_test:make", [], "cpu", "cannot be imported: SyntaxError"),
        ("factories_of_the_test:mak", [], "cpu", "there is no 'mak'; did you mean 'make'"),
        ("factories_of_the_test:Makers.mak", [], "cpu", "there is no 'mak'; did you mean 'make'"),
        ("factories_of_the_test:number", [], "cpu", "is a int; name a function that returns the network"),
        ("factories_of_the_test:nothing", [], "cpu", "returned a NoneType, not a torch.nn.Module"),
        ("factories_of_the_test:broken", [], "cpu", "called with no arguments failed: ValueError: no weights here"),
        ("factories_of_the_test:sized", ["size=2"], "cpu", "called with size=2 failed: TypeError"),
        ("factories_of_the_test:sized", ["classes"], "cpu", "--model-argument must have the form NAME=VALUE"),
        ("factories_of_the_test:sized", ["a b=1"], "cpu", "--model-argument must have the form NAME=VALUE"),
        ("factories_of_the_test:make", [], "gpu", "--device 'gpu' cannot be used"),
    ],
)
def test_what_makes_no_network_is_refused(
    path: str, arguments: list[str], device: str, complaint: str, folder: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_model(path, arguments, device)
    assert complaint in str(caught.value)


def test_inputs_are_random_numbers_or_ones() -> None:
    (image,) = make_inputs(["2x3"], "cpu")
    assert (image.shape, image.dtype) == ((2, 3), torch.float32)
    assert len(image.unique()) == 6
    assert torch.equal(make_inputs(["2x3"], "cpu")[0], image)
    found = make_inputs(["input_ids=1x4:int64", "mask=1x4:bool", "x=2:bfloat16"], "cpu")
    assert isinstance(found, dict)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        "input_ids": (torch.int64, (1, 4)),
        "mask": (torch.bool, (1, 4)),
        "x": (torch.bfloat16, (2,)),
    }
    assert found["input_ids"].tolist() == [[1, 1, 1, 1]]
    assert found["mask"].all()
    assert len(make_inputs(["2", "3"], "cpu")) == 2


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["3,4"], "--input '3,4' is not understood: write a shape such as 1x3x224x224"),
        (["0x3"], "--input '0x3' is not understood"),
        (["a b=3"], "is not understood"),
        (["3:float"], "--input '3:float' has the unknown type 'float'; did you mean"),
        (["99999x99999"], "has 9,999,800,001 values; give a smaller shape"),
        (["x=3", "4"], "--input must have a name of its own for each input, or for none, got x=3 4"),
        (["x=3", "x=4"], "--input must have a name of its own for each input"),
    ],
)
def test_what_is_no_input_is_refused(texts: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_inputs(texts, "cpu")
    assert complaint in str(caught.value)


@pytest.mark.extra("timm")
def test_networks_of_timm_are_made_by_their_name(folder: Path) -> None:
    model = make_model("timm:create_model", ["model_name=resnet10t", "num_classes=3"], "cpu")
    assert model.get_classifier().out_features == 3


@pytest.mark.extra("hf")
def test_networks_of_transformers_are_made_from_their_folder(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained("saved")
    path = "transformers:AutoModelForSequenceClassification.from_pretrained"
    model = make_model(path, ["pretrained_model_name_or_path=saved"], "cpu")
    inputs = make_inputs(["input_ids=1x4:int64", "attention_mask=1x4:int64"], "cpu")
    assert isinstance(inputs, dict)
    assert model(**inputs).logits.shape == (1, 3)
