"""Flags and files of a training script become settings; a mistake is named as the script spells it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, MissingExtraError
from ast_plugin.flag_settings import FLAGS, NUMBERS, PREFIX, check_settings, read_flags, read_number

SETTINGS = {field.name for field in dataclasses.fields(ASTConfig)}


def spelled(name: str) -> str:
    return f"/{name}"


def read(**given: Any) -> dict[str, Any]:
    return read_flags(given, spelled=spelled, extra="timm")


def written(folder: Path, text: str, name: str = "settings.json") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_flag_stands_for_a_setting_of_its_own() -> None:
    settings = [flag.setting for flag in FLAGS]
    assert set(settings) <= SETTINGS
    assert set(NUMBERS) <= SETTINGS
    assert len(set(settings)) == len(settings)
    assert all(flag.name.startswith(PREFIX) and flag.help and flag.metavar for flag in FLAGS)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("100", 100),
        ("0.02", 0.02),
        ("1e-2", 0.01),
        (3, 3),
        (0.5, 0.5),
        ("2:4", "2:4"),
        ("often", "often"),
        (None, None),
    ],
)
def test_text_is_read_as_a_number_where_it_is_one(value: object, number: object) -> None:
    found = read_number(value)
    assert found == number
    assert type(found) is type(number)


def test_flags_become_settings() -> None:
    found = read(
        ast_sparsities=["0.5", "2:4", 0.9],
        ast_update_interval="7",
        ast_include="layer*",
        ast_correction=False,  # what YAML makes of off
        ast_eval_sub_net="s90",
    )
    assert found == {
        "sparsities": [0.5, "2:4", 0.9],
        "update_interval": 7,
        "include": ["layer*"],
        "correction": "off",
        "default_sub_net": "s90",
    }


def test_one_value_stands_for_a_list() -> None:
    assert read(ast_sparsities="0.9")["sparsities"] == [0.9]


def test_flags_are_stronger_than_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, '{"sparsities": [0.5], "method": "rigl", "stagger": false}')
    assert read(ast_config=file, ast_method="set") == {"sparsities": [0.5], "method": "set", "stagger": False}


def test_a_file_says_nothing_about_the_length_of_the_run(tmp_path: Path) -> None:
    config = ASTConfig(sparsities=(0.5,), total_steps=300, steps_per_epoch=10)
    found = read(ast_config=written(tmp_path, json.dumps(config.to_dict())))
    assert "total_steps" not in found
    assert "steps_per_epoch" not in found
    assert dataclasses.replace(ASTConfig.from_dict(found), total_steps=300, steps_per_epoch=10) == config


def test_a_json_file_is_read_without_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    # YAML reads neither this number nor this indentation.
    file = written(tmp_path, '{\n\t"sparsities": [0.5],\n\t"update_interval": 1e-2\n}')
    assert read(ast_config=file) == {"sparsities": [0.5], "update_interval": 0.01}


def test_a_yaml_file_without_yaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = written(tmp_path, "sparsities: [0.5]", "settings.yaml")
    with pytest.raises(MissingExtraError) as error:
        read(ast_config=file)
    assert f"/ast_config {file}, which is not JSON, needs the package 'PyYAML'" in str(error.value)
    assert "ast-plugin[timm]" in str(error.value)


@pytest.mark.extra("timm")
@pytest.mark.parametrize("setting", sorted(set(NUMBERS) - {"sparsities"}))
def test_numbers_that_yaml_takes_for_text_are_read(setting: str, tmp_path: Path) -> None:
    found = read(ast_config=written(tmp_path, f"sparsities: [5e-1]\n{setting}: 1e-2\n"))
    assert found == {"sparsities": [0.5], setting: 0.01}
    assert getattr(ASTConfig.from_dict(found), setting) == 0.01


@pytest.mark.extra("timm")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[0.5, 0.8]", ": must hold settings by name"),
        ("", ": must hold settings by name"),
        ("sparsity: [0.5]", ": unknown setting 'sparsity': did you mean 'sparsities'"),
        ("sparsities: [0.5", ": neither YAML nor JSON"),
        ("include: 2024-99-99", ": neither YAML nor JSON"),  # a date that there is not
        ("sparsities: [2:4]", ": sparsities: got 124; YAML reads 2:4 as this number"),
        ("sparsities: [0.5]\npattern: 1:4", ": pattern: got 64; YAML reads 1:4 as this number"),
    ],
)
def test_a_bad_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, text, "settings.yaml")
    with pytest.raises(ConfigError) as error:
        read(ast_config=file)
    assert str(error.value).startswith(f"/ast_config {file}{said}")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/ast_config \S+none\.yaml: cannot be read: No such file"):
        read(ast_config=str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"^/ast_config must be the path of a file, got 3"):
        read(ast_config=3)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes: neither YAML nor JSON: 'utf-8' codec"):
        read(ast_config=tmp_path / "bytes")


def test_flags_without_sparsities_are_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        read(ast_method="rigl", ast_no_report=True)
    assert str(error.value) == (
        "/ast_method, /ast_no_report: no effect without /ast_sparsities; add it, for example: /ast_sparsities 0.9 0.95"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ast_sparsities": 124}, "/ast_sparsities: got 124; YAML reads 2:4 as this number, so write N:M in quotes"),
        ({"ast_sparsities": [0.5], "ast_pattern": 64}, "/ast_pattern: got 64; YAML reads 1:4"),
    ],
)
def test_a_pattern_that_yaml_read_as_a_number_is_explained(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**given)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ast_sparsities": [1.5]}, "/ast_sparsities: sparsities must hold fractions"),
        ({"ast_sparsities": [0.5, 0.5]}, "/ast_sparsities: sparsities names the sub-net 's50' twice"),
        ({"ast_update_interval": "often"}, "/ast_update_interval: update_interval must be a number of"),
        ({"ast_drop_fraction": -1}, "/ast_drop_fraction: drop_fraction must lie in [0, 1), got -1"),
        ({"ast_method": 3, "ast_correction": "none"}, "/ast_method: method must be a name, got 3"),
        ({"ast_correction": "none"}, "/ast_correction: correction must be one of layer, global, off, got 'none'"),
        ({"ast_pattern": "2:4"}, "/ast_pattern: sparsities entry 0.9 contradicts pattern '2:4'"),
        ({"ast_eval_sub_net": "s60"}, "/ast_eval_sub_net: default_sub_net names no sub-net of this run: 's60'"),
    ],
)
def test_a_wrong_setting_is_named_by_its_flag(given: dict[str, Any], said: str) -> None:
    given = {"ast_eval_sub_net": "s90", "ast_method": "set", "ast_sparsities": [0.9]} | given
    with pytest.raises(ConfigError) as error:
        check_settings(read(**given), given, spelled=spelled)
    assert str(error.value).startswith(said)


def test_a_wrong_setting_of_the_file_is_named_by_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, '{"sparsities": [0.5], "end_step": 1.5, "drop_fraction": 2}')
    given = {"ast_config": file, "ast_drop_fraction": 0.1}
    with pytest.raises(ConfigError) as error:
        check_settings(read(**given), given, spelled=spelled)
    assert str(error.value).startswith(f"/ast_config {file}: end_step must be")


def test_settings_that_fit_together_are_accepted() -> None:
    given = {"ast_eval_sub_net": "2:4", "ast_sparsities": ["0.9", "2:4"], "ast_pattern": "4x4"}
    check_settings(read(**given), given, spelled=spelled)
