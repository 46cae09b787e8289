"""The command line: help, exit codes, and that user errors are one message without a traceback."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sliced_examples import HYBRID_GROUPS, Hybrid, hybrid, write_channels
from torch import nn

from ast_plugin import cli, cli_demo
from ast_plugin.cli import main
from ast_plugin.cli_demo import in_options
from ast_plugin.config import ASTConfig
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.elastic_file import write_elastic
from ast_plugin.errors import ConfigError
from ast_plugin.masks import MaskStore
from ast_plugin.report import Report
from ast_plugin.version import __version__

COMMANDS = ("demo", "inspect", "report", "export", "profile", "plugins")


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    """An elastic file of a linear layer with four weights: ``s50`` keeps the first two, ``s75`` the first one."""
    masks = MaskStore(("s50", "s75"), {"weight": (2, 2)})
    masks.set("s50", "weight", torch.tensor([[True, True], [False, False]]))
    masks.set("s75", "weight", torch.tensor([[True, False], [False, False]]))
    path = tmp_path / "elastic.safetensors"
    write_elastic(
        path,
        state={"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0, 6.0])},
        masks=masks,
        private={},
        header={
            "config": ASTConfig(sparsities=(0.5, 0.75), total_steps=10).to_dict(),
            "metrics": {"s50": {"accuracy": 0.9}, "s75": {"accuracy": 0.8}},
        },
    )
    return path


def test_help_shows_every_command_the_exit_codes_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == cli.OK
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "exit codes:" in text
    assert "ast-plugin demo\n" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == cli.OK
    examples = [
        line.split("ast-plugin ", 1)[1].split("  ")[0].split(" | ")[0].split()
        for line in capsys.readouterr().out.split("examples:")[1].splitlines()
        if "ast-plugin " in line
    ]
    assert examples
    for example in examples:
        assert cli.build_parser().parse_args(example).command == command


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == cli.OK
    assert capsys.readouterr().out.startswith(f"ast-plugin {__version__} (torch ")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["inspect"], "the following arguments are required: FILE"),
        (["export", "file", "--to", "x.pt"], "the following arguments are required: --sub-net"),
        (["demo", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["demo", "--sparsities", "0.5", "most"], "'most' is neither a fraction of zeros"),
        (["demo", "--update-interval", "often"], "'often' is neither a number of steps such as 90"),
        (["demo", "--correction", "maybe"], "argument --correction: invalid choice: 'maybe'"),
        (["demo", "--step", "10"], "unrecognized arguments: --step 10"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == cli.USAGE
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--sparsities", "1.5"], "--sparsities must hold fractions of zeros in [0, 1), got 1.5"),
        (["--sparsities", "0.5", "0.5"], "--sparsities names the sub-net 's50' twice"),
        (["--sparsities", "4:2"], "did you mean '2:4'?"),
        (["--steps", "0"], "--steps must be a positive whole number, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be a number above 0, got 0.0"),
        (["--drop-fraction", "1"], "--drop-fraction must lie in [0, 1), got 1.0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be a positive number of steps, got 0"),
    ],
)
def test_a_setting_out_of_its_range_exits_with_2_and_writes_nothing(
    argv: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output", str(tmp_path / "run"), *argv]) == cli.USAGE
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_demo_help_names_every_setting_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == cli.OK
    text = " ".join(capsys.readouterr().out.split())
    for name, value in DemoSettings().to_dict().items():
        assert f"--{name.replace('_', '-')} " in text
        shown = " ".join(map(str, value)).replace("0.9 ", "0.9 ") if isinstance(value, list) else value
        assert value is None or f"(default: {shown})" in text
    assert "--output DIR" in text
    assert "--resume" in text


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(cli_demo, "run_demo", lambda settings, **rest: seen.update(settings=settings, **rest))
    argv = ["demo", "--sparsities", "0.5", "2:4", "--steps", "90", "--update-interval", "30", "--end-step", "0.5"]
    assert main([*argv, "--output", "somewhere", "--resume"]) == cli.OK
    assert seen["settings"] == DemoSettings(sparsities=(0.5, "2:4"), steps=90, update_interval=30, end_step=0.5)
    assert seen["given"] == {"sparsities", "steps", "update_interval", "end_step"}
    assert seen["output"] == Path("somewhere")
    assert seen["resume"] is True
    assert seen["checkpoint_every"] == 100


def test_inspect_shows_sub_nets_tensors_and_settings(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(elastic), "--tensors"]) == cli.OK
    text = capsys.readouterr().out
    assert "2 sub-nets of one network" in text
    assert "default sub-net: s50" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["s50", "unstructured", "50.00", "%", "2", "4", "0.9000"] in rows
    assert ["s75", "unstructured", "75.00", "%", "1", "4", "0.8000"] in rows
    assert "2 tensors: 1 with masks, 0 private to each sub-net, 1 shared by all" in text
    assert "method granet" in text
    assert ["bias", "2", "float32", "once"] in rows


def test_an_output_that_shows_ascii_only_gets_replacements(elastic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["inspect", str(elastic), "--tensors"]) == cli.OK
    assert b" 2 ? 2 " in out.getvalue()


def test_inspect_as_json_tells_the_same(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(elastic), "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == elastic.stat().st_size
    assert found["default_sub_net"] == "s50"
    assert [(net["name"], net["sparsity"], net["kept"]) for net in found["sub_nets"]] == [
        ("s50", 0.5, 2),
        ("s75", 0.75, 1),
    ]
    assert [entry["name"] for entry in found["tensors"]] == ["weight", "bias"]


def test_inspect_as_json_has_metrics_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = MaskStore(("s50",), {"weight": (2, 2)})
    path = tmp_path / "elastic.safetensors"
    header = {"metrics": {"s50": {"loss": math.nan, "best": math.inf}}}
    write_elastic(path, state={"weight": torch.ones(2, 2)}, masks=masks, private={}, header=header)
    assert main(["inspect", str(path), "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)["sub_nets"][0]["metrics"]
    assert found == {"loss": {"$float": "nan"}, "best": {"$float": "inf"}}
    assert main(["inspect", str(path)]) == cli.OK
    assert " nan " in capsys.readouterr().out


def test_report_shows_the_table(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(elastic), "--layers"]) == cli.OK
    text = capsys.readouterr().out
    assert "s75" in text
    assert "75.00 %" in text
    assert "Sparsity per layer" in text


def test_report_as_json_can_be_read_again(elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(elastic), "--json"]) == cli.OK
    text = capsys.readouterr().out
    report = Report.from_dict(json.loads(text))
    assert [net.name for net in report.sub_nets] == ["s50", "s75"]
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    assert main(["report", str(path)]) == cli.OK
    assert "75.00 %" in capsys.readouterr().out


def test_the_folder_of_an_elastic_file_serves_as_well(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", "--tensors"], ["inspect", "--json"], ["report"], ["report", "--json"]):
        assert main([*command, str(elastic)]) == cli.OK
        wanted = capsys.readouterr().out
        assert main([*command, str(elastic.parent)]) == cli.OK
        assert capsys.readouterr().out == wanted
    assert main(["report", str(elastic.parent), "--html", str(elastic)]) == cli.USAGE
    assert "is the file that is read" in capsys.readouterr().err


def test_a_folder_that_is_named_like_a_report_is_a_folder(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run.json"
    folder.mkdir()
    assert main(["report", str(folder)]) == cli.FAILED
    assert "holds no elastic.safetensors; it holds nothing" in capsys.readouterr().err
    elastic.rename(folder / elastic.name)
    assert main(["report", str(folder)]) == cli.OK
    assert "75.00 %" in capsys.readouterr().out


@pytest.mark.extra("report")
def test_report_writes_a_page(elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(elastic), "--html", str(page)]) == cli.OK
    assert f"Report: {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_export_writes_a_state_dict_that_an_ordinary_module_loads(
    elastic: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"small.{suffix}"
    assert main(["export", str(elastic), "--sub-net", "s75", "--to", str(target)]) == cli.OK
    assert "1 of 4 prunable weights" in capsys.readouterr().out
    state = load_file(target) if suffix == "safetensors" else torch.load(target, weights_only=True)
    model = nn.Linear(2, 2)
    model.load_state_dict(state)
    assert model.weight.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert model.bias.tolist() == [5.0, 6.0]


def test_export_of_a_sliced_sub_net_prints_the_lines_that_load_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_channels(tmp_path / "elastic.safetensors", hybrid(), HYBRID_GROUPS)
    command = ["export", str(path), "--sub-net", "c75", "--form", "sliced", "--to"]
    for target in (tmp_path / "small.safetensors", tmp_path / "small.pt"):
        assert main([*command, str(target)]) == cli.OK
        said, _, code = capsys.readouterr().out.partition("\n\n")
        assert f"{target}: sub-net c75 without its dropped units, " in said
        assert f"{tmp_path / 'small.json'}: what became smaller." in said
        names = {"model": Hybrid()}
        exec(code, names)
        assert names["model"].fc1.out_features == 8
        assert torch.equal(names["model"].head.weight, hybrid().head.weight)


def test_export_refuses_forms_that_do_not_fit(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(elastic), "--sub-net", "s75", "--to"]
    for form, target, message in (
        ("slice", "x.pt", "unknown form 'slice': did you mean 'sliced'?"),
        ("sliced", "x.pt", "sub-net 's75' cannot be sliced"),
    ):
        assert main([*command, str(tmp_path / target), "--form", form]) == cli.USAGE
        assert message in capsys.readouterr().err
    command[1] = str(elastic.parent)
    assert main([*command, str(tmp_path / "folder"), "--form", "sliced"]) == cli.USAGE
    assert "no words for layers of different widths; give a file" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_export_of_a_sub_net_that_was_never_trained_has_to_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"sub_nets": {"c50": {"steps": 4}, "c75": {"steps": 0}}}
    path = write_channels(tmp_path / "elastic.safetensors", hybrid(), HYBRID_GROUPS, statistics=steps)
    command = ["export", str(path), "--sub-net", "c75", "--to", str(tmp_path / "small.pt")]
    assert main(command) == cli.USAGE
    assert "'c75' was never trained" in capsys.readouterr().err
    assert main([*command, "--untrained"]) == cli.OK


def test_export_of_an_unknown_sub_net_offers_the_near_names(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(elastic), "--sub-net", "s57", "--to", str(tmp_path / "x.pt")]) == cli.USAGE
    assert "did you mean 's75'" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


def test_export_to_an_unknown_kind_of_file_says_which_there_are(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(elastic), "--sub-net", "s75", "--to", str(tmp_path / "x.zip")]) == cli.USAGE
    assert "must end in .safetensors, .pt or .pth" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["report"], ["export", "--sub-net", "s75", "--to", "x.pt"]])
def test_a_missing_file_is_named_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], "nowhere.safetensors", *command[1:]]) == cli.FAILED
    captured = capsys.readouterr()
    assert "nowhere.safetensors" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_report_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere.json"]) == cli.FAILED
    assert capsys.readouterr().err == "ast-plugin: error: nowhere.json: No such file or directory\n"


@pytest.mark.parametrize(("content", "complaint"), [("{", "is no JSON"), ("{}", "this is no report")])
def test_a_damaged_report_is_refused(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    assert main(["report", str(path)]) == cli.FAILED
    assert complaint in capsys.readouterr().err


def test_plugins_lists_the_built_in_and_what_it_offers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == cli.OK
    text = capsys.readouterr().out
    assert "built-in" in text
    for name in ("granet", "unstructured", "erk", "alternating"):
        assert f"\n  {name} " in text


def test_plugins_as_json_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert found["plugins"][0]["name"] == "built-in"
    assert found["plugins"][0]["version"] == __version__
    assert {"granet", "gmp", "rigl", "set", "static"} <= {method["name"] for method in found["methods"]}
    assert all(method["description"] for method in found["methods"])


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere.safetensors"]) == cli.FAILED
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert main(["inspect", "nowhere.safetensors"]) == cli.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ast_plugin.cli_files.run_inspect", interrupted)
    assert main(["inspect", "file"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "ast-plugin: interrupted\n"


@pytest.mark.slow
def test_a_reader_who_goes_away_is_no_error_message() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "ast_plugin", "plugins"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert process.returncode == cli.BROKEN_PIPE
    assert process.stderr == ""


def test_a_command_does_not_overwrite_what_it_reads(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = elastic
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for arguments in (
        ["export", str(path), "--sub-net", "s50", "--to", str(path)],
        ["export", str(path), "--sub-net", "s50", "--to", str(tmp_path / "link.safetensors")],
        ["report", str(path), "--html", str(path)],
    ):
        assert main(arguments) == cli.USAGE
        assert "is the file that is read; give another path" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_json_nested_without_end_is_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text("[" * 200_000, encoding="utf-8")
    assert main(["report", str(path)]) == cli.FAILED
    assert "is no JSON" in capsys.readouterr().err


def test_a_closed_standard_output_is_no_traceback(elastic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(elastic)]) == cli.OK


@pytest.mark.extra("demo")
def test_a_seed_that_no_generator_takes_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "9" * 23, "--steps", "6"]) == cli.USAGE
    assert "seed must lie in [0, 2**63)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsities", "abc"], "'abc' is neither a fraction of zeros such as 0.95 nor a pattern such as 2:4"),
        (["--end-step", "soon"], "'soon' is neither a number of steps such as 90 nor a fraction such as 0.05"),
    ],
)
def test_values_that_are_no_numbers_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == cli.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["report"], ["export", "--sub-net", "s75", "--to", "x.pt"]])
def test_a_file_without_an_end_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/zero").is_char_device():
        pytest.skip("needs /dev/zero")
    assert main([command[0], "/dev/zero", *command[1:]]) == cli.FAILED
    assert "it is no regular file; give the path of an elastic file" in capsys.readouterr().err


def test_a_report_without_an_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/zero").is_char_device():
        pytest.skip("needs /dev/zero")
    (tmp_path / "report.json").symlink_to("/dev/zero")
    assert main(["report", str(tmp_path / "report.json")]) == cli.FAILED
    assert "report.json' is no regular file; give a report.json, or an elastic file" in capsys.readouterr().err


def test_errors_name_options_instead_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_options("drop_fraction must lie in [0, 1)") == "--drop-fraction must lie in [0, 1)"
    assert in_options("end_step must be a fraction of total_steps") == "--end-step must be a fraction of --steps"
    assert in_options("steps must be a number of steps") == "--steps must be a number of steps"
    assert in_options("keeps 4 weights; lower the sparsity, exclude layers, or set allow_empty_layers=True") == (
        "keeps 4 weights; lower the sparsity"
    )
    with pytest.raises(ConfigError) as caught:
        DemoSettings(sparsities=(0.9, 0.9))
    assert in_options(str(caught.value)) == "--sparsities names the sub-net 's90' twice; remove the duplicate"
    assert main(["demo", "--batch-size", "1000000000"]) == cli.USAGE
    assert "--batch-size must be at most 1000, got 1000000000" in capsys.readouterr().err


@pytest.mark.extra("demo")
def test_a_sparsity_that_empties_layers_names_no_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--sparsities", "0.99999", "--output", str(tmp_path / "run")]) == cli.USAGE
    message = capsys.readouterr().err
    assert "lower the sparsity" in message
    assert "allow_empty_layers" not in message
