"""A script gets the settings of a run by one more class in its parser's tuple."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError
from ast_plugin.flag_settings import FLAGS
from ast_plugin.integrations.transformers import callback as callbacks
from ast_plugin.integrations.transformers.arguments import ASTArguments

pytestmark = pytest.mark.extra("hf")


class Recorded(callbacks.ASTCallback):
    """The callback, with what it was made of."""

    def __init__(self, **options: Any) -> None:
        self.given = options
        super().__init__(**options)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "ASTCallback", Recorded)


def parse(*words: str) -> ASTArguments:
    (found,) = HfArgumentParser(ASTArguments).parse_args_into_dataclasses(list(words), look_for_args_file=False)
    return found


def given(arguments: ASTArguments) -> dict[str, Any]:
    """Return what the callback is made of, the settings alone."""
    (callback,) = arguments.callbacks()
    assert isinstance(callback, Recorded)
    return {name: value for name, value in callback.given.items() if name != "resume_plain"}


def test_nothing_asked_for_is_no_callback() -> None:
    for arguments in (ASTArguments(), parse()):
        assert arguments.callback() is None
        assert arguments.callbacks() == []


def test_every_flag_is_an_argument_with_a_help_text() -> None:
    fields = {field.name: field for field in dataclasses.fields(ASTArguments)}
    assert set(fields) == {*(flag.name for flag in FLAGS), "ast_sup_tickets", "ast_config", "ast_resume_plain"}
    help_text = " ".join(HfArgumentParser(ASTArguments).format_help().split())
    for flag in FLAGS:
        assert f"--{flag.name} " in help_text
        assert flag.help in help_text
    assert "Alternating sparse training:" in help_text
    assert "None" not in help_text


def test_every_argument_of_a_command_line_reaches_its_setting() -> None:
    arguments = parse(
        *("--ast_sparsities", "0.5", "2:4", "9e-1", "--ast_method", "rigl", "--ast_pattern", "4x4"),
        *("--ast_distribution", "uniform", "--ast_update_interval", "7", "--ast_drop_fraction", "0.2"),
        *("--ast_correction", "global", "--ast_inactive", "freeze", "--ast_include", "a*", "b*"),
        *("--ast_exclude", "c*", "--ast_eval_sub_net", "s90", "--ast_resume_plain"),
    )
    assert given(arguments) == {
        "sparsities": [0.5, "2:4", 0.9],
        "method": "rigl",
        "pattern": "4x4",
        "distribution": "uniform",
        "update_interval": 7,
        "drop_fraction": 0.2,
        "correction": "global",
        "inactive": "freeze",
        "include": ["a*", "b*"],
        "exclude": ["c*"],
        "default_sub_net": "s90",
    }
    callback = arguments.callback()
    assert isinstance(callback, Recorded)
    assert callback.sub_nets == ("s50", "2:4", "s90")
    assert callback.given["resume_plain"] is True


def test_hyphens_do_as_well() -> None:
    assert given(parse("--ast-sparsities", "0.5", "--ast-update-interval", "1e-2")) == {
        "sparsities": [0.5],
        "update_interval": 0.01,
    }


def test_it_stands_beside_the_arguments_of_the_trainer(tmp_path: Path) -> None:
    values = {
        "output_dir": str(tmp_path),
        "seed": 3,
        "use_cpu": True,
        "ast_sparsities": [0.9, "2:4"],
        "ast_method": "set",
    }
    words = ["--output_dir", str(tmp_path), "--seed", "3", "--use_cpu", "--ast_sparsities", "0.9", "2:4"]
    parser = HfArgumentParser((TrainingArguments, ASTArguments))
    json_file, yaml_file = tmp_path / "arguments.json", tmp_path / "arguments.yaml"
    json_file.write_text(json.dumps(values))
    yaml_file.write_text(yaml.safe_dump(values))
    for training, sparse in (
        parser.parse_args_into_dataclasses([*words, "--ast_method", "set"], look_for_args_file=False),
        parser.parse_dict(values),
        parser.parse_json_file(str(json_file)),
        parser.parse_yaml_file(str(yaml_file)),
    ):
        assert (training.seed, training.output_dir) == (3, str(tmp_path))
        assert sparse == ASTArguments(ast_sparsities=[0.9, "2:4"], ast_method="set")
        assert given(sparse) == {"sparsities": [0.9, "2:4"], "method": "set"}


def test_one_class_may_be_both(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Both(ASTArguments, TrainingArguments):
        pass

    both = Both(output_dir=str(tmp_path), use_cpu=True, ast_sparsities=[0.9])
    assert both.device.type == "cpu"
    assert given(both) == {"sparsities": [0.9]}
    with pytest.raises(ValueError, match="--load_best_model_at_end requires"):  # as TrainingArguments says
        Both(output_dir=str(tmp_path), use_cpu=True, load_best_model_at_end=True)


def test_values_are_read_when_the_object_is_made() -> None:
    arguments = ASTArguments(ast_sparsities="0.9", ast_drop_fraction="1e-1", ast_exclude="head*")  # type: ignore[arg-type]  # as a dict may hold them
    assert (arguments.ast_sparsities, arguments.ast_drop_fraction) == ([0.9], 0.1)
    assert arguments.ast_exclude == ["head*"]


def test_a_script_may_change_them_afterwards() -> None:
    arguments = ASTArguments()
    arguments.ast_sparsities = [0.5]
    assert given(arguments) == {"sparsities": [0.5]}
    arguments.ast_inactive = "melt"
    with pytest.raises(ConfigError, match=r"^--ast_inactive: inactive must be one of coast, freeze, got 'melt'"):
        arguments.callbacks()


def test_arguments_are_stronger_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sparsities: [0.5, 8e-1]\nmethod: rigl\nseed: 7\ncorrection: off\ntotal_steps: 9\n")
    assert given(parse("--ast_config", str(file), "--ast_method", "set")) == {
        "sparsities": [0.5, 0.8],
        "method": "set",
        "seed": 7,
        "correction": "off",
    }


def test_the_settings_of_another_run_will_do(tmp_path: Path) -> None:
    config = ASTConfig(sparsities=(0.5, "2:4"), distribution={"a*": 0.3}, total_steps=8)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(config.to_dict()))
    found = ASTConfig.from_dict(given(ASTArguments(ast_config=str(file))))
    assert found == dataclasses.replace(config, total_steps=None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ast_sparsities 1.5", "--ast_sparsities: sparsities must hold fractions of zeros in [0, 1), got 1.5"),
        ("--ast_sparsities dense", "--ast_sparsities: sparsities entry 'dense' is not understood"),
        ("--ast_sparsities 0.5 --ast_update_interval often", "--ast_update_interval: update_interval must be"),
        ("--ast_sparsities 0.5 --ast_update_interval 0", "--ast_update_interval: update_interval must be"),
        (
            "--ast_sparsities 0.5 --ast_drop_fraction -1",
            "--ast_drop_fraction: drop_fraction must lie in [0, 1)",
        ),
        ("--ast_sparsities 0.5 --ast_correction none", "--ast_correction: correction must be one of"),
        ("--ast_sparsities 0.5 --ast_eval_sub_net s60", "--ast_eval_sub_net: default_sub_net names no sub-net"),
        (
            "--ast_method rigl --ast_resume_plain",
            "--ast_method, --ast_resume_plain: no effect without --ast_sparsities",
        ),
        ("--ast_config none.json", "--ast_config none.json: cannot be read: No such file or directory; check the path"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_argument(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse(*words.split())
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{ast_sparsities: [0.5, 2:4]}", "--ast_sparsities: got 124; YAML reads 2:4 as this number"),
        ("{ast_sparsities: [0.5], ast_pattern: 1:4}", "--ast_pattern: got 64; YAML reads 1:4 as this number"),
        ("{ast_sparsities: [0.5], ast_method: false}", "--ast_method: method must be a name, got False"),
        ("{ast_sparsities: [0.5], ast_resume_plain: 'no'}", "--ast_resume_plain must be true or false, got 'no'"),
        ("{ast_config: 3}", "--ast_config must be the path of a file, got 3"),
    ],
)
def test_values_of_another_kind_in_a_file_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        HfArgumentParser(ASTArguments).parse_yaml_file(str(file))
    assert str(error.value).startswith(said)


def test_the_word_off_is_no_missing_value(tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text("{ast_sparsities: [0.5], ast_correction: off}")  # YAML reads false
    (found,) = HfArgumentParser(ASTArguments).parse_yaml_file(str(file))
    assert given(found) == {"sparsities": [0.5], "correction": "off"}
