from __future__ import annotations

import pytest

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.metric_names import check_metric, sub_net_of

SUB_NETS = ("s50", "s80", "s90")


def test_the_sub_net_that_a_metric_names() -> None:
    assert sub_net_of("eval_s95_loss", SUB_NETS) is None
    assert sub_net_of("eval_s90_loss", SUB_NETS) == "s90"
    assert sub_net_of("s80_accuracy", SUB_NETS) == "s80"
    assert sub_net_of("val_loss_s80", SUB_NETS) == "s80"
    assert sub_net_of("eval_german_2:4_loss", ("s50", "2:4")) == "2:4"
    assert sub_net_of(None, SUB_NETS) is None


@pytest.mark.parametrize("fine", [None, "loss", "eval_matthews_correlation", "s2s_score", "eval_s90_loss"])
def test_metrics_of_sub_nets_that_exist_and_of_none_are_fine(fine: str | None) -> None:
    check_metric("monitor", fine, SUB_NETS)


def test_a_metric_of_a_sub_net_that_does_not_exist_is_refused_with_the_near_ones() -> None:
    with pytest.raises(
        ConfigError, match="monitor='val_loss_s91': there is no sub-net 's91'; did you mean 'val_loss_s9"
    ):
        check_metric("monitor", "val_loss_s91", SUB_NETS)
    with pytest.raises(ConfigError, match="'2:8'"):
        check_metric("monitor", "eval_2:8_loss", ("s50", "2:4"))
