from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from ast_plugin.errors import StateError
from ast_plugin.report_records import ConflictPoint, LayerRecord, SubNetRecord, finite, from_plain, plain


def sub_net(**changes: Any) -> SubNetRecord:
    values: dict[str, Any] = {
        "name": "s90",
        "pattern": "unstructured",
        "target_sparsity": 0.9,
        "achieved_sparsity": 0.9,
        "kept_weights": 10,
        "prunable_weights": 100,
    }
    return SubNetRecord(**{**values, **changes})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), (torch.tensor(2.0), 2.0), (math.nan, None), (math.inf, None), (None, None), ("many", None)],
)
def test_finite_keeps_numbers_and_nothing_else(value: Any, expected: float | None) -> None:
    assert finite(value) == expected


def test_plain_makes_what_json_gives_back() -> None:
    value = {1: (0.5, math.nan, -math.inf), "b": {"x"}, "c": None, "d": [True, 3], "e": torch.float32}
    made = plain(value)
    assert made == {"1": [0.5, None, None], "b": ["x"], "c": None, "d": [True, 3], "e": "torch.float32"}
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_conflict_rate_is_absent_without_checks() -> None:
    assert sub_net().conflict_rate is None
    assert sub_net(checks=8, conflicts=2).conflict_rate == 0.25


@pytest.mark.parametrize(("achieved", "expected"), [(0.9, True), (0.896, True), (0.89, False), (0.0, False)])
def test_target_is_reached_to_half_a_percentage_point(achieved: float, expected: bool) -> None:
    assert sub_net(achieved_sparsity=achieved).on_target is expected


def test_layer_counts_its_weights() -> None:
    assert LayerRecord(name="conv.weight", shape=(16, 8, 3, 3), sparsity={}).weights == 16 * 8 * 9


@pytest.mark.parametrize(
    "record",
    [
        sub_net(metrics={"accuracy": 0.5, "loss": None}, parameters=12, mean_cosine=-0.25),
        LayerRecord(name="fc.weight", shape=(2, 3), flops=None, sparsity={"s90": 0.5}),
        ConflictPoint(step=3, sub_net="s90", checks=1, conflicts=0, mean_cosine=None),
    ],
)
def test_records_come_back_from_json(record: Any) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    assert from_plain(type(record), values, where="here") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "here.name must be a text, got None"),
        ({"kept_weights": 1.5}, "here.kept_weights must be an integer, got 1.5"),
        ({"kept_weights": True}, "here.kept_weights must be an integer, got True"),
        ({"achieved_sparsity": "0.9"}, "here.achieved_sparsity must be a finite number, got '0.9'"),
        ({"achieved_sparsity": math.nan}, "here.achieved_sparsity must be a finite number, got nan"),
        ({"achieved_sparsity": 1.5}, "here.achieved_sparsity must be between 0 and 1, got 1.5; use a report"),
        ({"target_sparsity": -0.1}, "here.target_sparsity must be between 0 and 1, got -0.1"),
        ({"kept_weights": -3}, "here.kept_weights must be at least 0, got -3"),
        ({"kept_weights": 101}, r"here.kept_weights must be at most prunable_weights \(100\), got 101"),
        ({"conflicts": 2, "checks": 1}, r"here.conflicts must be at most checks \(1\), got 2"),
        ({"mean_cosine": -1.1}, "here.mean_cosine must be between -1 and 1, got -1.1"),
        ({"flops": -1}, "here.flops must be at least 0, got -1"),
        ({"metrics": [1]}, r"here.metrics must be a mapping, got \[1\]"),
        ({"metrics": {"a": "b"}}, r"here.metrics\['a'\] must be a finite number, got 'b'"),
        ({"sparsity": 0.9}, "here has an unknown field 'sparsity': .*target_sparsity"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=message):
        from_plain(SubNetRecord, {**dataclasses.asdict(sub_net()), **change}, where="here")


def test_impossible_numbers_are_found_inside_mappings_and_lists() -> None:
    layer = {"name": "fc.weight", "shape": [2, 3], "sparsity": {"s90": 0.5}}
    with pytest.raises(StateError, match=r"here.sparsity\['s90'\] must be between 0 and 1, got 2.0"):
        from_plain(LayerRecord, {**layer, "sparsity": {"s90": 2}}, where="here")
    with pytest.raises(StateError, match=r"here.shape\[1\] must be at least 0, got -3"):
        from_plain(LayerRecord, {**layer, "shape": [2, -3]}, where="here")


def test_a_cosine_may_be_rounded_beyond_one() -> None:
    values = {**dataclasses.asdict(sub_net()), "mean_cosine": 1 + 1e-7}
    assert from_plain(SubNetRecord, values, where="here").mean_cosine == 1 + 1e-7


def test_missing_fields_and_wrong_containers_are_named() -> None:
    with pytest.raises(StateError, match="here has no field 'name'"):
        from_plain(SubNetRecord, {}, where="here")
    with pytest.raises(StateError, match="here must be a mapping, got 7"):
        from_plain(SubNetRecord, 7, where="here")
    with pytest.raises(StateError, match="here must be a list, got 'text'"):
        from_plain(tuple[int, ...], "text", where="here")
