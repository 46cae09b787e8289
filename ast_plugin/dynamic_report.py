"""What a `DynamicInference` did: requests and latencies of every sub-net, and every switch with its reason."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from ast_plugin.profiles_measure import median, percentile
from ast_plugin.report_format import ABSENT, clean, decimal, decimals, grouped
from ast_plugin.report_text import TextTable, render_tables

_SHOWN = 10  # switches that the text lists
REMEMBERED = 1024  # latencies of each sub-net, and switches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    """Another sub-net serves from now on.

    Attributes:
        time_s: Seconds since the start.
        before: The sub-net until then.
        after: The sub-net from then on.
        reason: ``budget`` (it changed), ``load`` (requests took longer), ``room`` (a better one fits again), ``pin``
            or ``unpin``.
        budget_ms: The budget at that time, in milliseconds.
        slowdown: How many times longer than profiled requests took at that time.
    """

    time_s: float
    before: str
    after: str
    reason: str
    budget_ms: float
    slowdown: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedSubNet:
    """What one sub-net did.

    Attributes:
        name: Its name.
        form: How it is computed.
        profiled_ms: Median latency in the profile, in milliseconds.
        requests: Requests that it answered.
        failed: Requests that ended in an exception; they count nowhere else.
        over_budget: Requests that took longer than the budget at their start.
        median_ms: Median of its last requests (at most 1,024), in milliseconds; None without requests.
        p95_ms: Time that 95 % of them did not exceed, in milliseconds; None without requests.
    """

    name: str
    form: str
    profiled_ms: float
    requests: int
    failed: int
    over_budget: int
    median_ms: float | None
    p95_ms: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicReport:
    """What a `DynamicInference` did so far.

    Attributes:
        elapsed_s: Seconds since the start.
        budget_ms: The budget now, in milliseconds.
        active: The sub-net that serves now.
        pinned: Whether it was chosen by `DynamicInference.pin`.
        slowdown: How many times longer than profiled requests take now.
        memory_bytes: Bytes of the tensors of all sub-nets together.
        requests: Requests that were answered.
        over_budget: How many of them took longer than the budget at their start.
        without_fit: How many of them found no sub-net that was expected to keep the budget.
        switch_count: Number of switches.
        sub_nets: What each sub-net did, from the best to the worst.
        switches: The last switches (at most 1,024), the latest at the end.
    """

    elapsed_s: float
    budget_ms: float
    active: str
    pinned: bool
    slowdown: float
    memory_bytes: int
    requests: int
    over_budget: int
    without_fit: int
    switch_count: int
    sub_nets: tuple[ServedSubNet, ...]
    switches: tuple[Switch, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain containers; an unlimited budget is infinite, which strict JSON has not."""
        values = dataclasses.asdict(self)
        return {**values, "sub_nets": list(values["sub_nets"]), "switches": list(values["switches"])}

    def __str__(self) -> str:
        head = [
            f"{grouped(self.requests)} requests in {decimal(self.elapsed_s)} s",
            f"budget {decimal(self.budget_ms)} ms, {clean(self.active)} serves{', pinned' if self.pinned else ''}, "
            f"slowdown {decimal(self.slowdown, 3)}",
            f"{grouped(self.over_budget)} requests over the budget, {grouped(self.without_fit)} for which no sub-net "
            f"was fast enough, {grouped(self.switch_count)} switches",
        ]
        tables = [self._sub_net_table()]
        if self.switches:
            tables.append(self._switch_table())
        return render_tables(head, tables, ())

    def _sub_net_table(self) -> TextTable:
        nets = self.sub_nets
        columns = {
            "sub-net": [clean(net.name) for net in nets],
            "form": [clean(net.form) for net in nets],
            "profiled, ms": decimals([net.profiled_ms for net in nets]),
            "requests": [grouped(net.requests) for net in nets],
            "median, ms": decimals([net.median_ms for net in nets]),
            "p95, ms": decimals([net.p95_ms for net in nets]),
            "over budget": [grouped(net.over_budget) for net in nets],
        }
        if any(net.failed for net in nets):
            columns["failed"] = [grouped(net.failed) for net in nets]
        return TextTable(title="Sub-nets", columns=tuple(columns), rows=tuple(zip(*columns.values(), strict=True)))

    def _switch_table(self) -> TextTable:
        shown = self.switches[-_SHOWN:]
        more = f", the last {len(shown)} of {grouped(self.switch_count)}" if self.switch_count > len(shown) else ""
        return TextTable(
            title=f"Switches{more}",
            columns=("at, s", "from", "to", "reason", "budget, ms", "slowdown"),
            rows=tuple(
                (
                    f"{switch.time_s:.3f}",
                    clean(switch.before) or ABSENT,
                    clean(switch.after),
                    switch.reason,
                    decimal(switch.budget_ms),
                    decimal(switch.slowdown, 3),
                )
                for switch in shown
            ),
        )


class Counters:
    """Counts of one sub-net, of bounded size."""

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self.over_budget = 0
        self._latencies: collections.deque[float] = collections.deque(maxlen=REMEMBERED)

    def add(self, latency_ms: float, over_budget: bool) -> None:
        """Count a request.

        Args:
            latency_ms: How long it took, in milliseconds.
            over_budget: Whether that was longer than the budget.
        """
        self.requests += 1
        self.over_budget += over_budget
        self._latencies.append(latency_ms)

    def served(self, name: str, form: str, profiled_ms: float) -> ServedSubNet:
        """Return the counts as a record.

        Args:
            name: Name of the sub-net.
            form: How it is computed.
            profiled_ms: Median latency in the profile, in milliseconds.
        """
        latencies = list(self._latencies)
        return ServedSubNet(
            name=name,
            form=form,
            profiled_ms=profiled_ms,
            requests=self.requests,
            failed=self.failed,
            over_budget=self.over_budget,
            median_ms=median(latencies) if latencies else None,
            p95_ms=percentile(latencies, 0.95) if latencies else None,
        )
