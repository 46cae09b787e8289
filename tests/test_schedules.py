"""Schedules: hand-worked values, and the calendar replayed step by step against its definition."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError
from ast_plugin.schedules import (
    MaskCalendar,
    constant_drop_fraction,
    constant_sparsity,
    cosine_drop_fraction,
    cubic_sparsity,
    resolve_calendars,
)


def test_cubic_ramp_by_hand():
    # Half-way from step 100 to 300 the missing part is (1 - 1/2)^3 = 1/8: 0.8 - 0.8 / 8 = 0.7.
    values = [cubic_sparsity(step, begin=100, end=300, initial=0.0, final=0.8) for step in (0, 100, 200, 300, 999)]
    assert values == pytest.approx([0.0, 0.0, 0.7, 0.8, 0.8])


def test_cubic_ramp_starts_at_the_initial_and_never_turns_back():
    values = [cubic_sparsity(step, begin=3, end=50, initial=0.5, final=0.98) for step in range(60)]
    assert values[0] == values[3] == 0.5
    assert values == sorted(values)
    assert set(values[50:]) == {0.98}  # exactly, so that the last mask has the exact count


def test_cosine_drop_fraction_by_hand():
    # Half-way the cosine is 0: the mean of 0.5 and 0.1. A third of the way it is cos(60 deg) = 1/2: 0.1 + 0.4 * 0.75.
    values = [cosine_drop_fraction(step, begin=0, end=300, initial=0.5, final=0.1) for step in (0, 100, 150, 300, 400)]
    assert values == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])


def test_constant_schedules():
    for step in (0, 5, 50):
        assert constant_sparsity(step, begin=0, end=10, initial=0.0, final=0.9) == 0.9
        assert constant_drop_fraction(step, begin=0, end=10, initial=0.3, final=0.0) == 0.3


def test_calendar_by_hand():
    # Regular updates at 12, 22, 32 (42 is not before the end), and the last at 40.
    calendar = MaskCalendar(begin=10, end=40, interval=10, offset=2)
    due = [step for step in range(60) if calendar.is_due(step, step - 1 if step else None)]
    assert due == [12, 22, 32, 40]
    assert [calendar.updates_until(step) for step in (0, 11, 12, 31, 32, 39, 40, 100)] == [0, 0, 1, 2, 3, 3, 4, 4]


def test_an_update_that_falls_on_the_end_counts_once():
    calendar = MaskCalendar(begin=0, end=20, interval=10, offset=0)
    assert [step for step in range(30) if calendar.is_due(step, step - 1 if step else None)] == [0, 10, 20]


def test_a_sub_net_never_trained_makes_up_for_what_fell_due():
    calendar = MaskCalendar(begin=0, end=20, interval=5, offset=0)
    assert calendar.is_due(0, None)
    assert calendar.is_due(7, None)
    assert calendar.is_due(25, None)
    assert not calendar.is_due(26, 25)
    assert not MaskCalendar(begin=8, end=20, interval=5, offset=0).is_due(7, None)


def test_several_missed_updates_become_one():
    calendar = MaskCalendar(begin=0, end=100, interval=10, offset=0)
    assert calendar.is_due(55, 4)
    assert not calendar.is_due(56, 55)


def walk(calendar, own_steps):
    """Return the own steps at which an update is made."""
    last, made = None, []
    for step in own_steps:
        if calendar.is_due(step, last):
            made.append(step)
        last = step
    return made


@pytest.mark.parametrize("sub_nets", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("interval", [1, 2, 10, 11, 20])
def test_alternating_sub_nets_update_once_an_interval_whatever_divides_what(sub_nets, interval):
    config = ASTConfig(sparsities=(0.9,), total_steps=200, end_step=150, update_interval=interval)
    for index, calendar in enumerate(resolve_calendars(config, sub_nets)):
        made = walk(calendar, range(index, 200, sub_nets))
        scheduled = [*range(calendar.begin + calendar.offset, calendar.end, interval), calendar.end]
        # Each update happens at the first own step at or after it fell due, and several at one step are one.
        expected = sorted({next(s for s in range(index, 200, sub_nets) if s >= due) for due in scheduled})
        assert made == expected
        assert sum(step >= calendar.end for step in made) == 1


@settings(max_examples=80, deadline=None)
@given(
    begin=st.integers(0, 20),
    length=st.integers(1, 60),
    interval=st.integers(1, 30),
    offset=st.integers(0, 29),
    seed=st.integers(0, 1000),
)
def test_any_order_makes_the_last_update_at_the_first_own_step_after_the_end(begin, length, interval, offset, seed):
    calendar = MaskCalendar(begin=begin, end=begin + length, interval=interval, offset=offset % interval)
    own_steps = [step for step in range(140) if random.Random(seed * 1000 + step).random() < 0.3]
    made = walk(calendar, own_steps)
    after = [step for step in own_steps if step >= calendar.end]
    assert [step for step in made if step >= calendar.end] == after[:1]
    assert all(step >= calendar.begin + calendar.offset or step >= calendar.end for step in made)
    # No update is ever lost: between two own steps one is made exactly if one fell due.
    scheduled = {*range(begin + calendar.offset, calendar.end, interval), calendar.end}
    for last, step in zip([-1, *own_steps], own_steps, strict=False):
        assert (step in made) == any(last < due <= step for due in scheduled)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"begin": -1}, "begin_step must be at least 0, got -1"),
        ({"end": 5}, "end_step must lie after begin_step, got end_step=5 and begin_step=5"),
        ({"interval": 0, "offset": 0}, "update_interval must be at least 1"),
        ({"offset": 10}, r"offset must lie in \[0, update_interval\), got offset=10"),
    ],
)
def test_calendar_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        MaskCalendar(**{"begin": 5, "end": 100, "interval": 10, "offset": 0, **values})


def test_fractions_become_steps_and_sub_nets_are_staggered():
    config = ASTConfig(sparsities=(0.9,), total_steps=1000, begin_step=0.1, end_step=0.7, update_interval=0.1)
    calendars = resolve_calendars(config, 3)
    assert [(c.begin, c.end, c.interval, c.offset) for c in calendars] == [
        (100, 700, 100, 0),
        (100, 700, 100, 33),
        (100, 700, 100, 66),
    ]


def test_without_stagger_all_update_together():
    config = ASTConfig(sparsities=(0.9,), total_steps=1000, update_interval=100, stagger=False)
    assert [c.offset for c in resolve_calendars(config, 3)] == [0, 0, 0]


def test_a_fraction_below_one_step_is_one_step():
    config = ASTConfig(sparsities=(0.9,), total_steps=20, update_interval=0.001)
    assert resolve_calendars(config, 2)[0].interval == 1


def test_whole_steps_need_no_total():
    config = ASTConfig(sparsities=(0.9,), begin_step=0, end_step=70, update_interval=10)
    assert resolve_calendars(config, 1) == (MaskCalendar(begin=0, end=70, interval=10, offset=0),)


@pytest.mark.parametrize("name", ["begin_step", "end_step", "update_interval"])
def test_a_fraction_without_total_steps_is_refused(name):
    moments = {"begin_step": 0, "end_step": 100, "update_interval": 10, name: 0.5}
    with pytest.raises(ConfigError, match=f"{name}=0.5 is a fraction of total_steps, which is not given"):
        resolve_calendars(ASTConfig(sparsities=(0.9,), **moments), 1)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        # 0.7 of 8 steps is step 6, after which only step 7 is left for 3 sub-nets; of 9 it is step 6 with 3 left.
        (
            {"total_steps": 8, "end_step": 0.7},
            r"total_steps=8 is too small for end_step=0.7 \(step 6\).* works with these settings is 9$",
        ),
        (
            {"total_steps": 1000, "begin_step": 800, "end_step": 0.7},
            r"end_step must lie after begin_step, got end_step=0.7 \(step 700\)",
        ),
        ({"total_steps": 60, "end_step": 70}, "too small for end_step=70: .* lower end_step to at most 57; .* is 73$"),
        ({"total_steps": 100, "end_step": 0.5, "update_interval": 60}, "update_interval=60 is longer than .* is 119$"),
        ({"total_steps": 100, "end_step": 1.0}, r"end_step=1.0 \(step 100\).* lower end_step to at most 97$"),
        ({"total_steps": 500, "begin_step": 0.5, "end_step": 100}, "raise end_step or lower begin_step$"),
        (
            {"total_steps": 100, "begin_step": 0.4, "end_step": 0.5, "update_interval": 0.3},
            r"update_interval=0.3 \(30 steps\) is longer than .* move begin_step and end_step apart$",
        ),
        ({"begin_step": 50, "end_step": 40, "update_interval": 5}, "got end_step=40 and begin_step=50; raise end_step"),
    ],
)
def test_impossible_schedules_say_what_would_work(moments, message):
    with pytest.raises(ConfigError, match=message):
        resolve_calendars(ASTConfig(sparsities=(0.9,), **moments), 3)


@settings(max_examples=40, deadline=None)
@given(
    begin=st.one_of(st.integers(0, 60), st.floats(0, 0.6)),
    end=st.one_of(st.integers(1, 100), st.floats(0.05, 1)),
    interval=st.one_of(st.integers(1, 50), st.floats(0.01, 0.5)),
    sub_nets=st.integers(1, 5),
    total=st.integers(1, 80),
)
def test_the_total_named_works_and_none_smaller_does(begin, end, interval, sub_nets, total):
    def outcome(total_steps):
        try:
            resolve_calendars(
                ASTConfig(
                    sparsities=(0.9,),
                    total_steps=total_steps,
                    begin_step=begin,
                    end_step=end,
                    update_interval=interval,
                ),
                sub_nets,
            )
        except ConfigError as error:
            return str(error)
        return None

    message = outcome(total)
    named = message.rsplit(" ", 1)[1] if message and "the smallest total_steps" in message else None
    if named is not None:
        assert outcome(int(named)) is None
        assert all(outcome(smaller) is not None for smaller in range(max(1, int(named) - 300), int(named)))
    elif message is not None:
        assert all(outcome(larger) is not None for larger in range(total, 4 * total + 200))


def test_a_schedule_that_ends_just_before_the_run_does_names_its_total_at_once():
    # round(.99999 t) leaves two steps from t = 150,000 on: .99999 * 150,000 = 149,998.5, rounded to even.
    config = ASTConfig(sparsities=(0.9,), total_steps=606, begin_step=48, end_step=0.99999, update_interval=6)
    with pytest.raises(ConfigError, match=r"the smallest total_steps that works with these settings is 150000$"):
        resolve_calendars(config, 2)
