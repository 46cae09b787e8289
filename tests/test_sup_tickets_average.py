"""The running mean of tickets, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ast_plugin.errors import StateError
from ast_plugin.integrations.family.sup_tickets_average import TicketAverage


def _mask(*kept: int) -> Tensor:
    return torch.tensor(kept, dtype=torch.bool)


def _three_tickets_of_one_net() -> TicketAverage:
    average = TicketAverage()
    # Values outside the masks (99) are no part of a ticket, and must leave no trace.
    average.add({"w": torch.tensor([3.0, 6.0, 99.0, 99.0])}, {"s": {"w": _mask(1, 1, 0, 0)}}, {})
    average.add({"w": torch.tensor([6.0, 99.0, -3.0, 99.0])}, {"s": {"w": _mask(1, 0, 1, 0)}}, {})
    average.add({"w": torch.tensor([-3.0, 3.0, 99.0, 99.0])}, {"s": {"w": _mask(1, 1, 0, 0)}}, {})
    return average


def test_the_mean_is_over_all_positions_whether_a_ticket_keeps_the_weight_or_not() -> None:
    average = _three_tickets_of_one_net()
    # (3 + 6 - 3) / 3, (6 + 0 + 3) / 3, (0 - 3 + 0) / 3
    assert average.weights["w"].tolist() == [2.0, 3.0, -1.0, 0.0]
    assert average.kept["s"]["w"].tolist() == [3, 2, 1, 0]
    assert average.kept["s"]["w"].dtype == torch.uint8
    assert average.tickets == 3


def test_of_one_sub_net_the_magnitudes_of_the_mean_decide() -> None:
    assert _three_tickets_of_one_net().scores("s")["w"].tolist() == [2.0, 3.0, 1.0, 0.0]


def test_of_several_sub_nets_each_is_scored_by_the_share_of_tickets_in_which_it_kept_a_weight() -> None:
    average = TicketAverage()
    first = {"a": {"w": _mask(1, 1, 1, 0)}, "b": {"w": _mask(1, 0, 0, 0)}}
    second = {"a": {"w": _mask(1, 1, 0, 0)}, "b": {"w": _mask(0, 1, 0, 0)}}
    average.add({"w": torch.tensor([2.0, 4.0, 6.0, 99.0])}, first, {})
    average.add({"w": torch.tensor([4.0, -8.0, 99.0, 99.0])}, second, {})
    assert average.weights["w"].tolist() == [3.0, -2.0, 3.0, 0.0]
    assert average.kept_by_any["w"].tolist() == [2, 2, 1, 0]
    assert average.kept["a"]["w"].tolist() == [2, 2, 1, 0]
    assert average.kept["b"]["w"].tolist() == [1, 1, 0, 0]
    # a kept what the union kept; b half of the first two.
    assert average.scores("a")["w"].tolist() == [3.0, 2.0, 3.0, 0.0]
    assert average.scores("b")["w"].tolist() == [1.5, 1.0, 0.0, 0.0]


def test_what_is_not_pruned_and_batch_norm_are_averaged_and_counts_keep_their_last_value() -> None:
    average = TicketAverage()
    for scale, batches in ((1.0, 10), (2.0, 20), (6.0, 30)):
        private = {
            name: {
                "norm.running_mean": torch.tensor([scale * factor]),
                "norm.num_batches_tracked": torch.tensor(batches),
            }
            for name, factor in (("a", 1.0), ("b", -2.0))
        }
        average.add({"bias": torch.tensor([scale, -scale])}, {"a": {}, "b": {}}, private)
    assert average.weights["bias"].tolist() == [3.0, -3.0]
    assert average.private["a"]["norm.running_mean"].tolist() == [3.0]
    assert average.private["b"]["norm.running_mean"].tolist() == [-6.0]
    assert average.private["b"]["norm.num_batches_tracked"].item() == 30


def test_means_of_half_precision_weights_are_kept_in_single_precision() -> None:
    average = TicketAverage()
    for value in (1.0, 1.0078125):  # neighbours in bfloat16
        average.add({"w": torch.tensor([value], dtype=torch.bfloat16)}, {"s": {"w": _mask(1)}}, {})
    assert average.weights["w"].dtype == torch.float32
    assert average.weights["w"].item() == 1.00390625


def test_what_was_given_and_states_taken_before_stay_as_they_were() -> None:
    average = TicketAverage()
    weight, mask = torch.tensor([1.0, 5.0]), _mask(1, 0)
    average.add({"w": weight}, {"s": {"w": mask}}, {"s": {"m": torch.tensor([1.0])}})
    state = average.state_dict()
    average.add({"w": weight * 3}, {"s": {"w": _mask(1, 1)}}, {"s": {"m": torch.tensor([3.0])}})
    assert weight.tolist() == [1.0, 5.0]
    assert mask.tolist() == [True, False]
    assert state["tickets"] == 1
    assert state["weights"]["w"].tolist() == [1.0, 0.0]
    assert state["kept"]["s"]["w"].tolist() == [1, 0]
    assert state["private"]["s"]["m"].tolist() == [1.0]


def test_a_state_goes_on_as_if_it_had_never_been_saved() -> None:
    weights, masks = {"w": torch.zeros(4)}, {"s": {"w": _mask(1, 1, 0, 0)}}
    through = _three_tickets_of_one_net()
    again = TicketAverage.from_state(through.state_dict(), weights, masks, {})
    for average in (through, again):
        average.add({"w": torch.tensor([10.0, 1.0, 1.0, 1.0])}, masks, {})
    assert torch.equal(through.weights["w"], again.weights["w"])
    assert torch.equal(through.scores("s")["w"], again.scores("s")["w"])
    assert TicketAverage.from_state(TicketAverage().state_dict(), weights, masks, {}).tickets == 0


def test_damaged_and_foreign_states_are_refused() -> None:
    average = _three_tickets_of_one_net()
    masks = {"s": {"w": _mask(1, 1, 0, 0)}}
    with pytest.raises(StateError, match=r"other weights than this run .*'w'"):
        TicketAverage.from_state(average.state_dict(), {"w": torch.zeros(5)}, masks, {})
    with pytest.raises(StateError, match=r"other weights than this run .*'v'"):
        TicketAverage.from_state(average.state_dict(), {"v": torch.zeros(4)}, masks, {})
    for damaged in ({}, {"tickets": "many"}, {**average.state_dict(), "kept": {}}, {**average.state_dict(), "more": 1}):
        with pytest.raises(StateError, match="sup_tickets is damaged"):
            TicketAverage.from_state(damaged, {"w": torch.zeros(4)}, masks, {})
