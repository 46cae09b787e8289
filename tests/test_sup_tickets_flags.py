"""Sup-tickets on the command lines of timm's script and of the Trainer's, and in their settings files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from ast_plugin.errors import ConfigError
from ast_plugin.flag_settings import read_flags
from ast_plugin.integrations.family import SupTickets
from ast_plugin.integrations.family.sup_tickets_flags import SETTING, sup_tickets_of, take_sup_tickets


def spelled(name: str) -> str:
    return f"/{name}"


def taken(**given: Any) -> dict[str, Any] | None:
    given = {"ast_sparsities": [0.5], **given}
    options = read_flags(given, spelled=spelled, extra="timm", further=(SETTING,))
    found = take_sup_tickets(options, given, spelled=spelled)
    assert SETTING not in options
    return found


def written(folder: Path, **settings: Any) -> str:
    path = folder / "settings.json"
    path.write_text(json.dumps({"sparsities": [0.5], **settings}))
    return str(path)


def test_a_number_of_cycles_a_mapping_and_an_object_are_understood() -> None:
    tickets = SupTickets(2)
    assert sup_tickets_of(tickets, "here") is tickets
    assert sup_tickets_of(4, "here").settings.cycles == 4
    found = sup_tickets_of({"cycles": "2", "lr": ["1e-3", 0.005], "max_batches": 7}, "here")
    assert (found.settings.cycles, found.settings.lr, found.max_batches) == (2, (0.001, 0.005), 7)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, r"^here: cycles of sup_tickets must be"),
        ("three", r"^here: cycles of sup_tickets must be .* got 'three'"),
        (True, r"^here: cycles of sup_tickets must be .* got True"),
        ({"cycle": 3}, r"^here: unknown setting 'cycle' of sup_tickets: did you mean 'cycles'"),
        ({"loader": 3}, r"^here: unknown setting 'loader' of sup_tickets"),
        ({"share": 2}, r"^here: share of sup_tickets must lie"),
    ],
)
def test_a_mistake_is_named_with_its_place(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sup_tickets_of(value, "here")


def test_the_flag_is_stronger_than_the_file_whose_other_settings_stay(tmp_path: Path) -> None:
    assert taken() is None
    assert taken(ast_sup_tickets=3) == {"cycles": 3}
    assert taken(ast_config=written(tmp_path, sup_tickets=2)) == {"cycles": 2}
    file = written(tmp_path, sup_tickets={"cycles": 2, "share": 0.2})
    assert taken(ast_config=file, ast_sup_tickets="4") == {"cycles": 4, "share": 0.2}


def test_a_mistake_in_the_file_or_the_flag_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, sup_tickets={"share": 0})
    with pytest.raises(ConfigError, match=rf"^/ast_config {file}: share of sup_tickets must lie"):
        taken(ast_config=file)
    with pytest.raises(ConfigError, match=r"^/ast_sup_tickets: cycles of sup_tickets must be .* got 0"):
        taken(ast_sup_tickets=0)
    with pytest.raises(ConfigError, match="no effect without /ast_sparsities"):
        read_flags({"ast_sup_tickets": 3}, spelled=spelled, extra="timm", further=(SETTING,))


@pytest.mark.extra("timm")
def test_timms_flag_reaches_the_run_and_what_is_recorded_can_be_read_again() -> None:
    from ast_plugin.integrations.timm.flags import add_flags, settings_of

    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--ast-sparsities", "0.5", "--ast-sup-tickets", "2"])
    settings = settings_of(args)
    assert settings is not None
    assert settings.tickets == {"cycles": 2}
    made = settings.sup_tickets()
    assert made is not None
    assert made.settings.cycles == 2
    assert settings_of(argparse.Namespace(**vars(args))) == settings
    without = settings_of(parser.parse_args(["--ast-sparsities", "0.5"]))
    assert without is not None
    assert without.sup_tickets() is None


@pytest.mark.extra("hf")
def test_the_trainers_argument_reaches_the_callback(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    from ast_plugin.integrations.transformers import ASTArguments, ASTCallback

    words = ["--ast_sparsities", "0.5", "--ast_sup_tickets", "2"]
    (parsed,) = HfArgumentParser(ASTArguments).parse_args_into_dataclasses(words)
    file = written(tmp_path, sup_tickets={"cycles": 2})
    for arguments in (parsed, ASTArguments(ast_sparsities=[0.5], ast_sup_tickets=2), ASTArguments(ast_config=file)):
        callback = arguments.callback()
        assert callback is not None
        assert callback.sup_tickets is not None
        assert callback.sup_tickets.settings.cycles == 2
    for tickets in (SupTickets(2), 2, {"cycles": 2}):
        callback = ASTCallback(sparsities=(0.5,), sup_tickets=tickets)
        assert callback.sup_tickets is not None
        assert callback.sup_tickets.settings.cycles == 2
    with pytest.raises(ConfigError, match=r"^--ast_sup_tickets: cycles of sup_tickets must be .* got 'few'"):
        ASTArguments(ast_sparsities=[0.5], ast_sup_tickets="few")
    with pytest.raises(ConfigError, match=r"^sup_tickets: cycles of sup_tickets must be"):
        ASTCallback(sparsities=(0.5,), sup_tickets=0)
