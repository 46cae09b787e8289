"""Counters, summaries and histories."""

from __future__ import annotations

import pytest

from ast_plugin.statistics import Counter, Statistics


def filled() -> Statistics:
    statistics = Statistics(("a", "b"), window=4)
    for step in range(10):
        name = "ab"[step % 2]
        # a: two checks, none in conflict, cosines .5 and .1; b: two checks, one in conflict, cosines -.4 and .2
        conflicts, cosines = (0, [0.5, 0.1]) if name == "a" else (1, [-0.4, 0.2])
        statistics.step_finished(step, name, checks=2, conflicts=conflicts, cosines=cosines)
    statistics.masks_updated(3, "b", target=0.5, achieved=0.49)
    return statistics


def test_the_summary_adds_up_per_sub_net_and_in_all() -> None:
    summary = filled().summary()
    assert summary["steps"] == 10
    assert summary["checks"] == 20
    assert summary["conflicts"] == 5
    # 5 steps of a at (.5 + .1) and 5 of b at (-.4 + .2) over 20 checks = (3 - 1) / 20
    assert summary["mean_cosine"] == pytest.approx(0.1)
    assert summary["sub_nets"]["a"] == {"steps": 5, "checks": 10, "conflicts": 0, "mean_cosine": pytest.approx(0.3)}
    assert summary["sub_nets"]["b"] == {"steps": 5, "checks": 10, "conflicts": 5, "mean_cosine": pytest.approx(-0.1)}


def test_history_has_one_point_a_full_window_and_sub_net() -> None:
    history = filled().history()
    assert [(p["step"], p["sub_net"], p["checks"], p["conflicts"]) for p in history["conflicts"]] == [
        (4, "a", 4, 0),
        (4, "b", 4, 2),
        (8, "a", 4, 0),
        (8, "b", 4, 2),
    ]
    assert history["sparsity"] == [{"step": 3, "sub_net": "b", "target": 0.5, "achieved": 0.49}]


def test_windows_without_checks_leave_no_point() -> None:
    statistics = Statistics(("a",), window=1)
    statistics.step_finished(0, "a", checks=0, conflicts=0, cosines=[])
    assert statistics.history()["conflicts"] == []
    assert statistics.summary()["mean_cosine"] is None
    assert Counter().mean_cosine is None


def test_a_saved_state_goes_on_in_the_middle_of_a_window() -> None:
    one, other = filled(), Statistics(("a", "b"), window=99)
    other.load_state_dict(one.state_dict())
    for statistics in (one, other):
        statistics.step_finished(10, "a", checks=1, conflicts=1, cosines=[-1.0])
        statistics.step_finished(11, "b", checks=1, conflicts=0, cosines=[1.0])
    assert one.history() == other.history()
    assert one.summary() == other.summary()
    assert one.history()["conflicts"][-1]["checks"] == 3
