"""One network under a latency budget that changes: the best sub-net that fits serves each request.

Every sub-net is a network of its own, built and measured once. A switch is one assignment: a request takes its network
with one read at its start and keeps it, so it never sees parts of two sub-nets, and requests that run at the same time
may be on different ones. The networks that `ast_plugin.load` switches by pointer would not do here: there a switch
concerns every thread that is inside the model.

What differs between sub-nets is in memory once for each; tensors that are equal in several are there once.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ast_plugin.dynamic_choice import check_yes_or_no, checked_budget, chosen_sub_nets, ranked
from ast_plugin.dynamic_policy import Decision, Hysteresis, Policy
from ast_plugin.dynamic_report import REMEMBERED, Counters, DynamicReport, Switch
from ast_plugin.errors import BudgetError, ConfigError
from ast_plugin.profiles import Build, SubNets, check_counts, check_functions, compiler, form_of, measured, profile_of
from ast_plugin.profiles_measure import Clock, Runnable, memory_bytes, share_memory, waiting
from ast_plugin.profiles_records import Profile
from ast_plugin.report_format import decimal
from ast_plugin.sub_nets import check_sub_net

Budget = float | Callable[[], float]

_SHORTEST_MS = 1e-6  # what a clock cannot tell from nothing is no divisor


@dataclasses.dataclass(frozen=True)
class _Network:
    """A sub-net, ready to run."""

    name: str
    form: str
    profiled_ms: float
    run: Runnable
    finish: Callable[[], None]
    counters: Counters


@dataclasses.dataclass(frozen=True)
class _State:
    """What a request needs to know; replaced as a whole."""

    network: _Network
    budget_ms: float
    fits: bool


class DynamicInference:
    """Serves one network under a changing latency budget: ``dynamic(inputs)`` runs the best sub-net that fits.

    The best is the one with the highest metric, or the densest where the file has no metrics. Latencies of real
    requests move it to a cheaper sub-net when the budget is exceeded, and back when there is room; `Hysteresis` says
    when. If nothing fits, the fastest serves, and `report` counts it.

    Requests may come from any number of threads, and run in inference mode. A request's latency is measured from its
    call to its answer; time that it waited before is not seen. The networks must not write into their own tensors.

    Args:
        elastic: What `ast_plugin.load` returned. It is not needed afterwards, and not held.
        budget_ms: What a request may take, in milliseconds, above 0; or what returns it, asked at the start of every
            request. `math.inf` for no limit.
        example_inputs: What the sub-nets are measured on: a tensor, a tuple or list of positional arguments, or a
            mapping of keyword arguments, on the network's device and of the size that requests have.
        form: How sub-nets are computed, as `Elastic.compile` knows it: ``auto``, ``dense``, ``sliced``, ``csr``,
            ``bsr``, ``2:4``.
        profile: What `profile` returned, instead of measuring again; each sub-net takes its fastest form there, and
            `example_inputs` and `form` are not needed.
        sub_nets: Which ones to choose from; None takes all.
        metric: Which metric tells the best. None takes the only one that all sub-nets have, or without metrics
            the density.
        greater_is_better: Whether a higher value of the metric is better; None says yes unless its name ends in
            ``loss``.
        hysteresis: When to change the sub-net.
        strict: Whether a budget that the fastest sub-net exceeds even without load raises.
        share: Whether tensors that are equal in several sub-nets use one memory.
        build: Makes a network from the names of sub-net and form, instead of ``elastic.compile``.
        runs: Timed calls of each sub-net for the profile, at least 1.
        warmup: Calls before, at least 0.
        clock: Seconds that pass.

    Raises:
        ConfigError: If the budget is no number above 0, a sub-net or metric is unknown, there is nothing to measure on,
            or another argument is out of range or of another kind.
        BudgetError: If `strict`, and the fastest sub-net exceeds the budget.

    Attributes:
        profile: What was measured, one record for each sub-net.
        sub_nets: Names of the sub-nets, from the best to the worst.
    """

    def __init__(
        self,
        elastic: SubNets,
        budget_ms: Budget,
        example_inputs: Any = None,
        *,
        form: str = "auto",
        profile: Profile | None = None,
        sub_nets: Sequence[str] | None = None,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        hysteresis: Hysteresis | None = None,
        strict: bool = False,
        share: bool = True,
        build: Build | None = None,
        runs: int = 20,
        warmup: int = 3,
        clock: Clock = time.perf_counter,
    ) -> None:
        if profile is None and example_inputs is None:
            raise ConfigError(
                "example_inputs is missing: give an input like those of the requests, to measure the sub-nets on, or "
                "a profile that was measured before"
            )
        check_counts(runs=runs, warmup=warmup)
        check_yes_or_no(strict=strict, share=share)
        if greater_is_better is not None:
            check_yes_or_no(greater_is_better=greater_is_better)
        check_functions(build=build, clock=clock)
        if not isinstance(hysteresis, Hysteresis | None):
            raise ConfigError(f"hysteresis must be a Hysteresis(...), got {hysteresis!r}")
        self._ask = budget_ms if callable(budget_ms) else None
        budget = checked_budget(budget_ms() if callable(budget_ms) else budget_ms)
        chosen = chosen_sub_nets(elastic, sub_nets, profile)
        order = ranked({name: elastic.records[name] for name in chosen}, metric, greater_is_better)
        forms = {name: form if profile is None else profile.fastest(name).form for name in chosen}
        make = build or compiler(elastic, example_inputs)
        # Tensors made under inference mode could not be shared.
        with torch.inference_mode(False), torch.no_grad():
            networks = {name: make(name, forms[name]) for name in chosen}
        if share:
            share_memory(networks.values())
        if profile is None:
            built = [(name, forms[name], networks[name]) for name in chosen]
            records = measured(
                elastic, built, example_inputs, runs=runs, warmup=warmup, clock=clock, latency_alone=True
            )
            profile = profile_of(elastic, records, (), example_inputs, runs)
        self.profile = profile
        latency = {name: max(profile.fastest(name).latency_ms, _SHORTEST_MS) for name in chosen}
        self._policy = Policy(order(latency), hysteresis or Hysteresis())
        self.sub_nets = tuple(candidate.name for candidate in order(latency))
        self._networks = {
            name: _Network(
                name,
                form_of(networks[name], forms[name]),
                latency[name],
                networks[name],
                waiting(networks[name]),
                Counters(),
            )
            for name in self.sub_nets
        }
        self._memory = memory_bytes(networks.values())
        self._clock, self._strict = clock, strict
        self._lock = threading.Lock()
        self._pinned = False
        self._without_fit = self._switch_count = 0
        self._switches: list[Switch] = []
        self._check_fits(budget)
        self._started = clock()
        decision = self._policy.restart(0.0, budget)
        self._state = _State(self._networks[decision.name], budget, decision.fits)

    @property
    def active(self) -> str:
        """Name of the sub-net that serves the next request."""
        return self._state.network.name

    @property
    def budget_ms(self) -> float:
        """What a request may take, in milliseconds; of a callable what it said last."""
        return self._state.budget_ms

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a request with the sub-net that is active at its start.

        Args:
            *args: What the network takes.
            **kwargs: What the network takes.

        Returns:
            What the network returns.

        Raises:
            ConfigError: If the callable that gives the budget returned no number above 0.
            BudgetError: If `strict`, and the fastest sub-net exceeds what it returned.
        """
        if self._ask is not None:
            self._follow(self._ask)
        state = self._state  # the one read: what happens to the attribute from here on concerns later requests
        network = state.network
        started = self._clock()
        try:
            with torch.inference_mode():
                answer = network.run(*args, **kwargs)
                network.finish()
        except BaseException:
            with self._lock:
                network.counters.failed += 1
            raise
        now = self._clock()
        self._served(state, 1000 * (now - started), now)
        return answer

    def set_budget(self, budget_ms: Budget) -> None:
        """Change the budget; the next request follows it, without regard to margins and dwell time.

        For a budget that varies all the time, give a callable: what it returns is followed with hysteresis.

        Args:
            budget_ms: Milliseconds above 0, or what returns them.

        Raises:
            ConfigError: If it is no number above 0. The budget stays as it was.
            BudgetError: If `strict`, and the fastest sub-net exceeds it. The budget stays as it was.
        """
        ask = budget_ms if callable(budget_ms) else None
        budget = checked_budget(budget_ms() if callable(budget_ms) else budget_ms)
        self._check_fits(budget)
        with self._lock:
            self._ask = ask
            self._restart(budget, "budget")

    def pin(self, name: str) -> None:
        """Let one sub-net serve all requests, whatever the budget, until `unpin`.

        Args:
            name: The sub-net.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        check_sub_net(name, self.sub_nets)
        with self._lock:
            now, before = self._now(), self._state
            self._pinned = True
            self._policy.force(name, 1000 * now)
            self._install(Decision(name=name, reason="pin", fits=True), before.budget_ms, now)

    def unpin(self) -> None:
        """Let the budget choose again."""
        with self._lock:
            if self._pinned:
                self._pinned = False
                self._restart(self._state.budget_ms, "unpin")

    def report(self) -> DynamicReport:
        """Return what was done so far; ``print`` shows it as tables."""
        with self._lock:
            state = self._state
            nets = tuple(n.counters.served(n.name, n.form, n.profiled_ms) for n in self._networks.values())
            return DynamicReport(
                elapsed_s=self._now(),
                budget_ms=state.budget_ms,
                active=state.network.name,
                pinned=self._pinned,
                slowdown=self._policy.slowdown,
                memory_bytes=self._memory,
                requests=sum(net.requests for net in nets),
                over_budget=sum(net.over_budget for net in nets),
                without_fit=self._without_fit,
                switch_count=self._switch_count,
                sub_nets=nets,
                switches=tuple(self._switches),
            )

    def __repr__(self) -> str:
        return f"DynamicInference(sub_nets={self.sub_nets!r}, active={self.active!r}, budget_ms={self.budget_ms!r})"

    def _follow(self, ask: Callable[[], float]) -> None:
        """Take over what the caller's function says; it is asked outside the lock, for it may ask us something."""
        budget = checked_budget(ask())
        if not self._pinned:
            self._check_fits(budget)
        if budget == self._state.budget_ms:
            return
        with self._lock:
            if ask is self._ask:
                self._decide(budget)

    def _served(self, state: _State, latency_ms: float, now: float) -> None:
        with self._lock:
            state.network.counters.add(latency_ms, latency_ms > state.budget_ms)
            self._without_fit += not state.fits
            self._policy.observe(state.network.name, latency_ms)
            self._decide(self._state.budget_ms, now - self._started)

    def _decide(self, budget_ms: float, now: float | None = None) -> None:
        now = self._now() if now is None else now
        if self._pinned:
            if budget_ms != self._state.budget_ms:
                self._state = dataclasses.replace(self._state, budget_ms=budget_ms)
            return
        self._install(self._policy.decide(1000 * now, budget_ms), budget_ms, now)

    def _restart(self, budget_ms: float, reason: str) -> None:
        if self._pinned:
            self._decide(budget_ms)
            return
        now = self._now()
        decision = self._policy.restart(1000 * now, budget_ms)
        self._install(dataclasses.replace(decision, reason=reason), budget_ms, now)

    def _install(self, decision: Decision, budget_ms: float, now: float) -> None:
        before = self._state
        if decision.name != before.network.name:
            self._switch_count += 1
            self._switches.append(
                Switch(
                    time_s=now,
                    before=before.network.name,
                    after=decision.name,
                    reason=decision.reason,
                    budget_ms=budget_ms,
                    slowdown=self._policy.slowdown,
                )
            )
            del self._switches[:-REMEMBERED]
        elif budget_ms == before.budget_ms and decision.fits == before.fits:
            return
        self._state = _State(self._networks[decision.name], budget_ms, decision.fits)

    def _check_fits(self, budget_ms: float) -> None:
        if self._strict and not self._policy.fits_unloaded(budget_ms):
            fastest = min(self._networks.values(), key=lambda network: network.profiled_ms)
            raise BudgetError(
                f"budget_ms={budget_ms:g} is exceeded by every sub-net: the fastest, {fastest.name!r}, takes "
                f"{decimal(fastest.profiled_ms, 3)} ms; give a larger budget or smaller inputs, or set strict=False"
            )

    def _now(self) -> float:
        return self._clock() - self._started
