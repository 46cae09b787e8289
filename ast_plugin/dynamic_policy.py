"""Which sub-net serves the next request: pure decisions from latencies, a budget and a time, without any network.

The machine's load is one number, the *slowdown*: how many times longer requests take than the profile says. It is the
quantile of the last requests' ratios, whichever sub-nets served them, so a request on one tells about all. A quantile
of a window, not a moving average: what a budget promises is that most requests keep it, and a single request of a
hundred times the usual length (a collection of garbage, a cold cache) would move an average for long and a quantile not
at all.

A sub-net is left when its expected latency, profile times slowdown, exceeds ``leave`` times the budget, and entered
when it is at most ``enter`` times the budget; in between nothing happens. A better one is not entered before the
present one has served for the dwell time. One that was entered and had to be left again soon, because under load it is
slower than its profile and the others say, is held back twice as long each time.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ast_plugin.errors import ConfigError
from ast_plugin.profiles_measure import percentile
from ast_plugin.sub_nets import is_number

_SOON = 4  # dwell times after which having entered a sub-net counts as a success
_MOST_DOUBLINGS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hysteresis:
    """When `DynamicInference` changes the sub-net.

    Attributes:
        enter: A better sub-net is entered if it is expected to take at most this share of the budget; in (0, `leave`].
        leave: A sub-net is left if it is expected to take more than this share of the budget; above 0.
        dwell_ms: Least time on a sub-net before a better one is entered, in milliseconds, at least 0. A cheaper one is
            entered at once.
        window: Requests that the load is measured on, at least 1; it counts once a quarter of them is there.
        quantile: Share of these requests that the estimate of the load covers, in (0, 1].
    """

    enter: float = 0.85
    leave: float = 1.0
    dwell_ms: float = 1000.0
    window: int = 32
    quantile: float = 0.9

    def __post_init__(self) -> None:
        _check("leave", self.leave, "a number above 0", is_number(self.leave) and 0 < self.leave < math.inf)
        inside = is_number(self.enter) and 0 < self.enter <= self.leave
        _check("enter", self.enter, f"a number above 0 and at most leave={self.leave!r}", inside)
        dwells = is_number(self.dwell_ms) and 0 <= self.dwell_ms < math.inf
        _check("dwell_ms", self.dwell_ms, "a number of milliseconds of at least 0", dwells)
        whole = isinstance(self.window, int) and not isinstance(self.window, bool) and self.window >= 1
        _check("window", self.window, "a whole number of requests of at least 1", whole)
        _check("quantile", self.quantile, "a share in (0, 1]", is_number(self.quantile) and 0 < self.quantile <= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sub-net to choose from.

    Attributes:
        name: Its name.
        latency_ms: What a request takes without load, in milliseconds, above 0.
    """

    name: str
    latency_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now.

    Attributes:
        name: The sub-net for the next requests.
        reason: ``budget``, ``load`` or ``room`` if it is another one than before; ``stay`` if not.
        fits: Whether it is expected to keep the budget.
    """

    name: str
    reason: str
    fits: bool


class Policy:
    """Decides between sub-nets; knows nothing of modules, threads and clocks.

    Args:
        candidates: From the best to the worst, at least one.
        hysteresis: When to change.

    Attributes:
        active: Name of the sub-net that was decided on last.
    """

    def __init__(self, candidates: Sequence[Candidate], hysteresis: Hysteresis) -> None:
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self._rank = {candidate.name: rank for rank, candidate in enumerate(candidates)}
        self._fastest = min(candidates, key=lambda candidate: candidate.latency_ms).name
        self._rule = hysteresis
        self._ratios: collections.deque[float] = collections.deque(maxlen=hysteresis.window)
        self._slowdown = 1.0
        self._budget = math.inf
        self._entered = 0.0
        self._not_before = dict.fromkeys(self._candidates, -math.inf)
        self._failures = dict.fromkeys(self._candidates, 0)
        self.active = candidates[0].name

    @property
    def slowdown(self) -> float:
        """How many times longer requests take than profiled; 1 until enough of them were seen."""
        return self._slowdown

    def observe(self, name: str, latency_ms: float) -> None:
        """Take note of a request.

        Args:
            name: The sub-net that served it.
            latency_ms: How long it took, in milliseconds.
        """
        self._ratios.append(latency_ms / self._candidates[name].latency_ms)
        if 4 * len(self._ratios) >= self._rule.window:
            self._slowdown = percentile(self._ratios, self._rule.quantile)

    def expected_ms(self, name: str) -> float:
        """Return how long a request is expected to take on a sub-net now, in milliseconds.

        Args:
            name: The sub-net.
        """
        return self._slowdown * self._candidates[name].latency_ms

    def decide(self, now_ms: float, budget_ms: float) -> Decision:
        """Decide as load and budget go.

        Args:
            now_ms: Time in milliseconds.
            budget_ms: What a request may take, in milliseconds.
        """
        before, self._budget = self._budget, budget_ms
        expected = self.expected_ms(self.active)
        if expected > self._rule.leave * budget_ms:
            target = self._best(self._rule.enter * budget_ms) or self._fastest
            return self._enter(target, "load" if expected > self._rule.leave * before else "budget", now_ms)
        if now_ms - self._entered < self._rule.dwell_ms:
            return self._enter(self.active, "stay", now_ms)
        target = self._best(self._rule.enter * budget_ms, better_than=self.active, now_ms=now_ms) or self.active
        roomy = self.expected_ms(target) <= self._rule.enter * before
        return self._enter(target, "room" if roomy else "budget", now_ms)

    def restart(self, now_ms: float, budget_ms: float) -> Decision:
        """Decide anew, without regard to the sub-net that is active: the best that fits, or the fastest.

        Args:
            now_ms: Time in milliseconds.
            budget_ms: What a request may take, in milliseconds.
        """
        self._budget = budget_ms
        self._not_before = dict.fromkeys(self._candidates, -math.inf)
        self._failures = dict.fromkeys(self._candidates, 0)
        return self._enter(self._best(self._rule.leave * budget_ms) or self._fastest, "budget", now_ms)

    def force(self, name: str, now_ms: float) -> None:
        """Make a sub-net the active one, whatever it takes.

        Args:
            name: The sub-net.
            now_ms: Time in milliseconds.
        """
        if name != self.active:
            self.active, self._entered = name, now_ms

    def fits_unloaded(self, budget_ms: float) -> bool:
        """Return whether the fastest sub-net keeps a budget when there is no load.

        Args:
            budget_ms: What a request may take, in milliseconds.
        """
        return self._candidates[self._fastest].latency_ms <= self._rule.leave * budget_ms

    def _best(self, limit_ms: float, *, better_than: str | None = None, now_ms: float = math.inf) -> str | None:
        """Return the first candidate that is expected to keep a limit; None if there is none."""
        for name, rank in self._rank.items():
            if better_than is not None and rank >= self._rank[better_than]:
                return None
            if now_ms >= self._not_before[name] and self.expected_ms(name) <= limit_ms:
                return name
        return None

    def _enter(self, target: str, reason: str, now_ms: float) -> Decision:
        fits = self.expected_ms(target) <= self._rule.leave * self._budget
        if target == self.active:
            return Decision(name=target, reason="stay", fits=fits)
        if reason == "load":
            self._hold_back(self.active, now_ms)
        self.active, self._entered = target, now_ms
        return Decision(name=target, reason=reason, fits=fits)

    def _hold_back(self, name: str, now_ms: float) -> None:
        """Keep a sub-net that load drove out from coming back at once."""
        delay = self._rule.dwell_ms * 2 ** self._failures[name]
        soon = now_ms - self._entered < max(_SOON * self._rule.dwell_ms, delay)
        self._failures[name] = min(self._failures[name] + 1, _MOST_DOUBLINGS) if soon else 0
        self._not_before[name] = now_ms + self._rule.dwell_ms * 2 ** self._failures[name]


def _check(name: str, value: Any, legal: str, fine: bool) -> None:
    if not fine:
        raise ConfigError(f"{name} must be {legal}, got {value!r}")
