"""Names, sparsities and patterns of the entries of `sparsities`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ast_plugin
from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import (
    SubNetSpec,
    check_sub_net,
    checked_sparsity,
    is_n_of_m,
    parse_n_of_m,
    parse_sub_nets,
    sparsity_name,
)


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [(0.9, "s90"), (0.0, "s0"), (0.955, "s95.5"), (0.98, "s98"), (0.57, "s57"), (0.29, "s29"), (0.9999, "s99.99")],
)
def test_a_sub_net_is_named_by_its_percentage_of_zeros(sparsity: float, name: str) -> None:
    assert sparsity_name(sparsity) == name


def test_a_mixed_list_keeps_its_order_and_gives_each_its_pattern() -> None:
    specs = parse_sub_nets((0.5, "2:4", SubNetSpec(name="small", sparsity=0.9, pattern="4x4"), 0.9))
    assert [(s.name, s.sparsity, s.pattern) for s in specs] == [
        ("s50", 0.5, "unstructured"),
        ("2:4", 0.5, "2:4"),
        ("small", 0.9, "4x4"),
        ("s90", 0.9, "unstructured"),
    ]


def test_a_pattern_that_fixes_the_sparsity_must_agree_with_the_number() -> None:
    assert parse_sub_nets((0.5,), "2:4")[0].pattern == "2:4"
    with pytest.raises(ConfigError, match=r"entry 0.9 contradicts pattern '2:4', which fixes the sparsity at 0.5"):
        parse_sub_nets((0.9,), "2:4")


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2:", "two:four", "dense"])
def test_malformed_entries_are_refused_with_the_entry(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_sub_nets((text,))


@pytest.mark.parametrize("value", [True, None, float("nan"), 1, -0.5, [0.9]])
def test_what_is_no_sparsity_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="must hold fractions of zeros"):
        checked_sparsity("sparsities", value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\\b", "a::b"])
def test_names_that_no_file_could_carry_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a sub-net"):
        SubNetSpec(name=name, sparsity=0.5)


def test_n_of_m_is_recognised_by_its_form_and_checked_by_its_numbers() -> None:
    assert is_n_of_m("4:2")
    assert not is_n_of_m("4x2")
    assert parse_n_of_m("pattern", "1:8") == (1, 8)


@pytest.mark.parametrize("where", ["", "'elastic.safetensors'"])
def test_an_unknown_sub_net_is_refused_with_the_near_names(where: str) -> None:
    check_sub_net("s90", ("s90", "s95"), where=where)
    place = f" in {where}" if where else ""
    with pytest.raises(ConfigError, match=f"^there is no sub-net 's59'{place}: did you mean 's95'"):
        check_sub_net("s59", ("s90", "s95"), where=where)


def test_it_is_said_in_one_way() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(ast_plugin.__file__).parent.glob("*.py")}
    assert [name for name, text in sources.items() if "there is no sub-net {" in text] == ["sub_nets.py"]
    assert [name for name, text in sources.items() if re.search(r'f".*(unknown|holds no) sub-net \{', text)] == []
