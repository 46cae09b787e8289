"""When tickets are made: the cycles of a run, their rates and explorations, and runs that have no room for them."""

from __future__ import annotations

import pytest

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family.sup_tickets_calendar import TicketCalendar


def test_the_last_share_is_cycles_of_equal_length_and_a_remainder_stays_before_them() -> None:
    calendar = TicketCalendar.of(104, cycles=3, share=0.1)
    assert (calendar.begin, calendar.length, calendar.end) == (95, 3, 104)
    assert [calendar.cycle_at(step) for step in range(93, 106)] == [None, None, 0, 0, 0, 1, 1, 1, 2, 2, 2, None, None]


def test_the_rate_goes_up_and_down_in_straight_lines_once_a_cycle() -> None:
    calendar = TicketCalendar.of(50, cycles=2, share=0.2)
    assert calendar.length == 5
    heights = [calendar.height_at(step) for step in range(39, 51)]
    assert heights == [None, 0, 0.5, 1, 0.5, 0, 0, 0.5, 1, 0.5, 0, None]
    even = TicketCalendar.of(40, cycles=1, share=0.1)
    assert [even.height_at(step) for step in range(36, 40)] == pytest.approx([0, 2 / 3, 2 / 3, 0])
    assert TicketCalendar(begin=9, length=1, cycles=1).height_at(9) == 0


def test_a_ticket_is_finished_with_the_last_step_of_each_cycle() -> None:
    calendar = TicketCalendar.of(30, cycles=2, share=0.2)
    finished = {step: calendar.ticket_after(step) for step in range(30) if calendar.ticket_after(step) is not None}
    assert finished == {26: 1, 29: 2}


def test_a_sub_net_explores_at_its_first_own_step_of_every_cycle() -> None:
    calendar = TicketCalendar.of(100, cycles=2, share=0.12)
    assert (calendar.begin, calendar.length) == (88, 6)
    explored, last = [], None
    for step in range(1, 100, 3):  # a sub-net that is trained at every third step
        if calendar.explores(step, last):
            explored.append(step)
        last = step
    assert explored == [88, 94]
    assert calendar.explores(90, None)
    assert not calendar.explores(87, None)


def _alternating(step: int) -> tuple[str, ...]:
    return (("a", "b", "c")[step % 3],)


def test_a_cycle_in_which_some_sub_net_has_too_few_steps_is_refused() -> None:
    names = ("a", "b", "c")
    TicketCalendar.of(270, cycles=3, share=0.1).check(names, _alternating, share=0.1, schedule_end=135)
    with pytest.raises(ConfigError, match=r"share=0.1 of total_steps=260 is 26 steps.*cycles=3.*\(8 steps each\)"):
        TicketCalendar.of(260, cycles=3, share=0.1).check(names, _alternating, share=0.1, schedule_end=130)
    late = [*"a" * 261, *"abc" * 3]
    with pytest.raises(ConfigError, match="cycle 1 sub-net 'b' is trained 0 times, and needs 3; raise share or"):
        TicketCalendar.of(270, cycles=3, share=0.1).check(names, late.__getitem__, share=0.1, schedule_end=135)
    # Where every step trains all of them, a third of the steps does.
    TicketCalendar.of(90, cycles=3, share=0.1).check(names, lambda step: names, share=0.1, schedule_end=45)


def test_own_steps_are_counted_within_a_cycle_until_all_sub_nets_have_enough() -> None:
    calendar = TicketCalendar(begin=90, length=8, cycles=3)
    assert calendar.own_steps(0, ("a", "b", "c"), _alternating, enough=9) == {"a": 3, "b": 3, "c": 2}
    assert calendar.own_steps(1, ("a", "b", "c"), _alternating, enough=9) == {"a": 3, "b": 2, "c": 3}
    assert calendar.own_steps(0, ("a", "b", "c"), _alternating, enough=1) == {"a": 1, "b": 1, "c": 1}
    assert calendar.own_steps(0, ("a",), lambda step: "a", enough=9) == {"a": 8}


def test_a_sub_net_that_no_cycle_trains_is_refused_with_a_remedy_that_helps() -> None:
    calendar = TicketCalendar.of(270, cycles=3, share=0.1)
    with pytest.raises(ConfigError, match=r"trains sub-net 'b' at no step of them .*choose another alternation, or"):
        calendar.check(("a", "b", "c"), lambda step: "ac", share=0.1, schedule_end=135)


def test_a_share_without_a_step_for_each_cycle_or_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"share=0.01 of total_steps=100 is 1 steps.*not one for each cycle"):
        TicketCalendar.of(100, cycles=3, share=0.01)
    with pytest.raises(ConfigError, match=r"share=0.1\), and total_steps is not given; pass total_steps"):
        TicketCalendar.of(None, cycles=3, share=0.1)


def test_a_mask_schedule_that_leaves_some_sub_net_no_step_before_the_cycles_is_refused() -> None:
    names = ("a", "b", "c")
    calendar = TicketCalendar.of(270, cycles=3, share=0.1)
    assert calendar.begin == 243
    calendar.check(names, _alternating, share=0.1, schedule_end=240)
    calendar.check(names, _alternating, share=0.1, schedule_end=None)
    for end in (241, 250, 270):
        with pytest.raises(ConfigError, match=rf"end_step falls on step {end} .* begin at step 243.*lower end_step"):
            calendar.check(names, _alternating, share=0.1, schedule_end=end)
