"""The decisions between sub-nets, on numbers alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from ast_plugin.dynamic_policy import Candidate, Decision, Hysteresis, Policy
from ast_plugin.errors import ConfigError

LATENCIES = {"s50": 8.0, "s80": 4.0, "s95": 2.0}  # from the best to the worst
RULE = Hysteresis(enter=0.8, leave=1.0, dwell_ms=100, window=4, quantile=0.75)


def policy(budget: float = 10.0, rule: Hysteresis = RULE) -> Policy:
    made = Policy([Candidate(name=name, latency_ms=ms) for name, ms in LATENCIES.items()], rule)
    made.restart(0, budget)
    return made


def observe(made: Policy, slowdown: float, count: int = 4) -> None:
    for _ in range(count):
        made.observe(made.active, slowdown * LATENCIES[made.active])


@pytest.mark.parametrize(
    ("budget", "name", "fits"),
    [(math.inf, "s50", True), (8, "s50", True), (7.9, "s80", True), (2, "s95", True), (1.9, "s95", False)],
)
def test_the_first_choice_is_the_best_that_fits_or_the_fastest(budget: float, name: str, fits: bool) -> None:
    decision = policy().restart(0, budget)
    assert (decision.name, decision.fits) == (name, fits)


def test_slowdown_is_the_quantile_of_the_last_requests_on_any_sub_net() -> None:
    made = policy()
    assert made.slowdown == 1
    made.observe("s50", 16)  # 2 x
    assert made.slowdown == 2  # a quarter of the window
    made.observe("s80", 4)  # 1 x
    made.observe("s95", 6)  # 3 x
    made.observe("s50", 80)  # 10 x
    assert made.slowdown == 3  # three of four requests took at most 3 x
    made.observe("s50", 8)
    assert made.slowdown == 3  # the window holds 1, 3, 10, 1


def test_one_outlier_changes_nothing() -> None:
    made = policy(rule=Hysteresis(enter=0.8, dwell_ms=0))
    for _ in range(40):
        made.observe("s50", 8)
    made.observe("s50", 10_000)
    assert made.decide(1000, 10).name == "s50"


def test_load_is_believed_after_a_quarter_of_the_window() -> None:
    made = policy(rule=Hysteresis(window=32))
    observe(made, 5, count=7)
    assert made.decide(0, 10).name == "s50"
    observe(made, 5, count=1)
    assert (made.slowdown, made.decide(0, 10).name) == (5, "s95")


def test_a_sub_net_is_left_above_the_leaving_margin_only() -> None:
    made = policy()
    observe(made, 1.25)  # 10 ms of 10
    assert made.decide(1, 10).reason == "stay"
    observe(made, 1.3)
    decision = made.decide(2, 10)  # 10.4 ms; s80 is expected to take 5.2
    assert (decision.name, decision.reason, decision.fits) == ("s80", "load", True)


def test_leaving_passes_over_what_does_not_fit_either() -> None:
    made = policy()
    observe(made, 2.5)  # 20, 10, 5 ms; 10 is more than 0.8 x 10
    assert made.decide(1, 10).name == "s95"


def test_a_better_one_is_entered_below_the_entering_margin_and_after_the_dwell_time() -> None:
    made = policy(budget=5)  # s80 serves
    assert made.active == "s80"
    assert made.decide(1000, 9.9).reason == "stay"  # 8 ms is more than 0.8 x 9.9
    decision = made.decide(1001, 10)
    assert (decision.name, decision.reason) == ("s50", "budget")
    assert made.decide(1002, 4).name == "s95"  # 4 ms is more than 0.8 x 4
    assert made.decide(1101, 10).reason == "stay"  # 99 ms after it
    assert made.decide(1102, 10).name == "s50"


def test_room_after_load_brings_the_better_one_back_once_it_may() -> None:
    made = policy()
    observe(made, 2)
    assert made.decide(500, 10).name == "s80"
    observe(made, 1)
    assert made.decide(599, 10).reason == "stay"
    decision = made.decide(600, 10)
    assert (decision.name, decision.reason) == ("s50", "room")


def test_nothing_happens_between_the_margins() -> None:
    made = policy()
    observe(made, 1.1)  # 8.8 ms: above 0.8 x 10, below 10
    assert {made.decide(now, 10).reason for now in range(0, 10_000, 10)} == {"stay"}
    made.decide(10_000, 5)
    assert made.active == "s95"
    assert made.decide(20_000, 10).name == "s80"  # not s50, which would be 8.8 ms


def test_one_that_fails_again_and_again_is_tried_ever_less_often() -> None:
    # s50 is slow under a load that s80 does not feel, so its return is always a mistake.
    made = policy()
    entered = []
    for now in range(0, 20_000, 5):
        observe(made, 2 if made.active == "s50" else 1)
        if made.decide(now, 10).reason == "room":
            entered.append(now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(entered)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 30 * gaps[0] / 2
    assert len(entered) <= 9


def test_a_long_stay_is_a_success() -> None:
    made = policy()
    now = 0.0
    for _ in range(5):
        now += 10_000
        observe(made, 2)
        assert made.decide(now, 10).name == "s80"
        observe(made, 1)
        assert made.decide(now + 100, 10).name == "s50"


def test_alternating_load_at_the_margin_does_not_flap() -> None:
    made = policy()
    switches = 0
    for now in range(0, 10_000, 10):
        made.observe(made.active, LATENCIES[made.active] * (1.3 if now % 20 else 1.0))
        switches += made.decide(now, 10).reason != "stay"
    assert switches == 1


def test_a_budget_around_a_margin_does_not_flap() -> None:
    made = policy()
    names = [made.decide(now, 8.2 if now % 20 else 7.8).name for now in range(0, 10_000, 10)]
    assert names[0] == "s80"
    assert set(names) == {"s80"}


def test_a_fastest_that_is_too_slow_says_so_until_it_fits() -> None:
    made = policy()
    observe(made, 6)
    assert made.decide(1, 10) == Decision(name="s95", reason="load", fits=False)
    assert made.decide(2, 10) == Decision(name="s95", reason="stay", fits=False)
    observe(made, 5)
    assert made.decide(3, 10) == Decision(name="s95", reason="stay", fits=True)


def test_a_faster_and_better_one_is_taken_whatever_the_order_of_latencies() -> None:
    made = Policy([Candidate(name="good", latency_ms=2), Candidate(name="poor", latency_ms=5)], RULE)
    made.force("poor", 0)
    assert made.decide(100, 10).name == "good"
    assert made.restart(0, 1) == Decision(name="good", reason="stay", fits=False)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"leave": 0}, "leave must be a number above 0, got 0"),
        ({"leave": math.inf}, "leave must be a number above 0, got inf"),
        ({"enter": 1.1}, r"enter must be a number above 0 and at most leave=1.0, got 1.1"),
        ({"enter": math.nan}, "enter must be .* got nan"),
        ({"enter": "most"}, "enter must be .* got 'most'"),
        ({"dwell_ms": -1}, "dwell_ms must be a number of milliseconds of at least 0, got -1"),
        ({"window": 0}, "window must be a whole number of requests of at least 1, got 0"),
        ({"window": True}, "window must be .* got True"),
        ({"quantile": 0}, r"quantile must be a share in \(0, 1\], got 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(setting: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Hysteresis(**setting)
