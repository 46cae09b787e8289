"""``--ast-...`` flags become settings; mistakes are found before anything is read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.timm.flags import TITLE, Settings, add_flags, settings_of, without_flags

pytestmark = pytest.mark.extra("timm")


def parse(*arguments: str, **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=42)
    add_flags(parser)
    parser.set_defaults(**defaults)
    return parser.parse_args(arguments)


def settings(*arguments: str, **defaults: object) -> Settings:
    found = settings_of(parse(*arguments, **defaults))
    assert found is not None
    return found


def test_no_flag_means_no_sub_nets() -> None:
    assert settings_of(parse()) is None


def test_every_flag_reaches_its_setting() -> None:
    found = settings(
        *("--ast-sparsities", "0.5", "2:4", "0.9", "--ast-method", "rigl", "--ast-pattern", "4x4"),
        *("--ast-distribution", "uniform", "--ast-update-interval", "7", "--ast-drop-fraction", "0.2"),
        *("--ast-correction", "global", "--ast-inactive", "freeze", "--ast-include", "a*", "b*"),
        *("--ast-exclude", "c*", "--ast-eval-sub-net", "s90", "--ast-no-report"),
    )
    assert found.report is False
    assert found.sub_nets == ("s50", "2:4", "s90")
    config = found.config(total_steps=100, steps_per_epoch=10)
    assert config == ASTConfig(
        sparsities=(0.5, "2:4", 0.9),
        method="rigl",
        pattern="4x4",
        distribution="uniform",
        update_interval=7,
        drop_fraction=0.2,
        correction="global",
        inactive="freeze",
        include=("a*", "b*"),
        exclude=("c*",),
        default_sub_net="s90",
        seed=42,
        total_steps=100,
        steps_per_epoch=10,
    )


def test_the_seed_is_that_of_the_script() -> None:
    for given, expected in (("7", 7), ("-1", 0)):
        found = settings("--ast-sparsities", "0.5", "--seed", given)
        assert found.config(total_steps=1, steps_per_epoch=1).seed == expected


@pytest.mark.parametrize(("text", "value"), [("100", 100), ("0.02", 0.02), ("1e-2", 0.01)])
def test_an_interval_is_a_number_of_steps_or_a_fraction(text: str, value: float) -> None:
    interval = settings("--ast-sparsities", "0.5", "--ast-update-interval", text).options["update_interval"]
    assert interval == value
    assert type(interval) is type(value)


def test_zero_is_a_value() -> None:
    assert settings("--ast-sparsities", "0.5", "--ast-drop-fraction", "0").options["drop_fraction"] == 0
    with pytest.raises(ConfigError, match="update_interval"):
        settings("--ast-sparsities", "0.5", "--ast-update-interval", "0")


@pytest.mark.parametrize("value", [[0.5, 0.8], ["0.5", "8e-1"], (0.5, 0.8)])
def test_values_of_a_yaml_file_are_read_as_flags_are(value: object) -> None:
    assert settings(ast_sparsities=value).sub_nets == ("s50", "s80")


def test_a_single_value_of_a_yaml_file_stands_for_a_list() -> None:
    found = settings(ast_sparsities=0.9, ast_include="layer*", ast_drop_fraction="1e-1")
    assert found.sub_nets == ("s90",)
    assert found.options["include"] == ["layer*"]
    assert found.options["drop_fraction"] == 0.1


def test_flags_are_stronger_than_the_file_and_the_file_than_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sparsities: [0.5, 0.8]\nmethod: rigl\ndrop_fraction: 0.2\ntotal_steps: 3\nsteps_per_epoch: 1\n")
    found = settings("--ast-config", str(file), "--ast-method", "set")
    config = found.config(total_steps=50, steps_per_epoch=5)
    assert (config.method, config.drop_fraction, config.total_steps) == ("set", 0.2, 50)
    assert found.sub_nets == ("s50", "s80")


def test_settings_that_have_no_flag_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"sparsities": [0.5], "stagger": false, "seed": 3, "initial_sparsity": null}')
    config = settings("--ast-config", str(file)).config(total_steps=1, steps_per_epoch=1)
    assert (config.stagger, config.seed, config.initial_sparsity) == (False, 3, None)


def test_what_is_recorded_can_be_read_again() -> None:
    args = parse("--ast-sparsities", "0.5", "2:4", "--ast-update-interval", "0.1")
    again = yaml.safe_load(yaml.safe_dump(vars(args)))
    assert settings_of(argparse.Namespace(**again)) == settings_of(args)


def test_nothing_of_the_flags_is_left_without_them() -> None:
    assert vars(without_flags(parse("--seed", "3"))) == {"seed": 3}


def test_flags_stand_in_a_group_of_their_own() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    (group,) = [group for group in parser._action_groups if group.title == TITLE]
    flags = {action.option_strings[0] for action in group._group_actions}
    assert flags == {
        *("--ast-sparsities", "--ast-method", "--ast-pattern", "--ast-distribution", "--ast-update-interval"),
        *("--ast-drop-fraction", "--ast-correction", "--ast-inactive", "--ast-include", "--ast-exclude"),
        *("--ast-eval-sub-net", "--ast-sup-tickets", "--ast-config", "--ast-no-report"),
    }
    assert all(action.help for action in group._group_actions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ast-sparsities", "1.5"), "sparsities"),
        (("--ast-sparsities", "dense"), "'dense'"),
        (("--ast-sparsities", "0.5", "0.5"), "'s50' twice"),
        (("--ast-sparsities", "0.5", "--ast-eval-sub-net", "s60"), "'s60'"),
        (("--ast-sparsities", "0.5", "--ast-inactive", "melt"), "melt"),
        (("--ast-sparsities", "0.5", "--ast-correction", "none"), "none"),
        (("--ast-sparsities", "0.5", "--ast-drop-fraction", "-1"), "drop_fraction"),
        (("--ast-sparsities", "0.5", "--ast-update-interval", "often"), "update_interval"),
        (("--ast-no-report",), "--ast-no-report: no effect without --ast-sparsities"),
        (("--ast-method", "rigl", "--ast-inactive", "freeze"), "--ast-method, --ast-inactive: no effect without"),
    ],
)
def test_a_bad_value_is_refused_at_once(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(parse(*arguments))
    assert said in str(error.value)


def test_an_unknown_flag_in_a_yaml_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="ast_sparsity in the configuration file is no flag: did you mean 'ast_spars"):
        settings_of(parse(ast_sparsity=[0.5]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[0.5, 0.8]", "must hold settings by name"),
        ("sparsity: [0.5]", "unknown setting 'sparsity': did you mean 'sparsities'"),
        ("sparsities: [0.5", "neither YAML nor JSON"),
        ("method: rigl", "--ast-config: no effect without --ast-sparsities"),
    ],
)
def test_a_bad_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        settings_of(parse("--ast-config", str(file)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    if "no effect" not in said:
        assert str(file) in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        settings_of(parse("--ast-config", str(file)))


def test_the_word_off_is_no_missing_value(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sparsities: [0.5]\ncorrection: off\n")  # YAML reads false
    for found in (settings(**yaml.safe_load("{ast_sparsities: [0.5], ast_correction: off}")), settings_with(file)):
        assert found.config(total_steps=1, steps_per_epoch=1).correction == "off"


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ("{ast_sparsities: [0.5, 2:4]}", "--ast-sparsities: got 124; YAML reads 2:4 as this number"),
        ("{ast_sparsities: [0.5], ast_pattern: 1:4}", "--ast-pattern: got 64; YAML reads 1:4 as this number"),
        ("{ast_sparsities: false}", "sparsities must hold fractions"),
        ("{ast_sparsities: [0.5], ast_method: false}", "method must be a name, got False"),
        ("{ast_sparsities: [0.5], ast_no_report: 'no'}", "ast_no_report in the configuration file must be true or"),
        ("{ast_config: 3}", "--ast-config must be the path of a file, got 3"),
    ],
)
def test_values_of_another_kind_in_a_yaml_file_are_refused(defaults: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(parse(**yaml.safe_load(defaults)))
    assert said in str(error.value)


def test_a_pattern_without_quotes_in_a_file_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sparsities: [0.5]\npattern: 2:4\n")
    with pytest.raises(ConfigError, match="pattern: got 124; YAML reads 2:4 as this number, so write N:M in quotes"):
        settings_with(file)


def settings_with(file: Path) -> Settings:
    return settings("--ast-config", str(file))
