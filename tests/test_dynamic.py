"""`DynamicInference` with a clock of its own and networks that only take time, and with real ones."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elastic_examples import Network, images, network, write_example
from torch import Tensor, nn

from ast_plugin.dynamic import DynamicInference
from ast_plugin.dynamic_policy import Hysteresis
from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_contents import StoredSubNet
from ast_plugin.errors import BudgetError, ConfigError
from ast_plugin.export import export_model
from ast_plugin.profiles import profile
from ast_plugin.profiles_records import Profile

LATENCIES = {"s50": 8000.0, "s80": 4000.0, "s95": 2000.0}  # in ms; whole seconds, so that sums are exact


def sub_nets(metrics: dict[str, dict[str, float]] | None = None) -> Any:
    """Return what stands for an elastic file: three sub-nets of 100 weights."""
    records = {
        name: StoredSubNet(
            name=name,
            target_sparsity=None,
            sparsity=int(name[1:]) / 100,
            kept=100 - int(name[1:]),
            total=100,
            pattern=None,
            metrics=(metrics or {}).get(name, {}),
        )
        for name in ("s80", "s50", "s95")
    }
    return SimpleNamespace(sub_nets=tuple(records), records=records)


class Machine:
    """Networks that take the time they should, by a clock that stands still otherwise.

    Attributes:
        load: How many times longer everything takes.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.load = 1.0

    def clock(self) -> float:
        return self.now

    def build(self, name: str, form: str) -> Callable[..., str]:
        def run(*args: Any, fail: bool = False) -> str:
            self.now += self.load * LATENCIES[name] / 1000
            if fail:
                raise RuntimeError("bad input")
            return name

        return run

    def dynamic(self, budget: Any = 10_000.0, *, metrics: Any = None, **options: Any) -> DynamicInference:
        rule = Hysteresis(enter=0.8, leave=1.0, dwell_ms=100_000, window=4, quantile=0.75)
        options = {"build": self.build, "clock": self.clock, "hysteresis": rule, **options}
        return DynamicInference(sub_nets(metrics), budget, "input", **options)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def elastic(tmp_path: Path) -> Elastic:
    return load(write_example(tmp_path / "elastic.safetensors"), network())


def dense(elastic: Elastic) -> Callable[[str, str], nn.Module]:
    """Return what builds a sub-net as an independent dense copy."""
    return lambda name, form: export_model(elastic, name, elastic.model).eval()


def answers(dynamic: DynamicInference, count: int) -> list[str]:
    return [dynamic("x") for _ in range(count)]


def test_the_sub_nets_are_measured_and_the_densest_that_fits_serves(machine: Machine) -> None:
    dynamic = machine.dynamic(budget=5000)
    assert dynamic.sub_nets == ("s50", "s80", "s95")
    assert {r.sub_net: r.latency_ms for r in dynamic.profile.records} == LATENCIES
    assert answers(dynamic, 2) == ["s80", "s80"]


def test_the_highest_metric_is_the_best(machine: Machine) -> None:
    metrics = {"s50": {"top1": 0.8}, "s80": {"top1": 0.9}, "s95": {"top1": 0.8}}
    dynamic = machine.dynamic(metrics=metrics)
    assert dynamic.sub_nets == ("s80", "s95", "s50")  # of two equals the faster one first


def test_a_loss_is_better_when_it_is_lower_unless_said_otherwise(machine: Machine) -> None:
    metrics = {n: {"eval_loss": v, "speed": 10 * v} for n, v in (("s50", 0.3), ("s80", 0.1), ("s95", 0.2))}
    assert machine.dynamic(metrics=metrics, metric="eval_loss").sub_nets == ("s80", "s95", "s50")
    assert machine.dynamic(metrics=metrics, metric="speed").sub_nets == ("s50", "s95", "s80")
    lower = machine.dynamic(metrics=metrics, metric="speed", greater_is_better=False)
    assert lower.sub_nets == ("s80", "s95", "s50")


def test_a_budget_that_is_set_is_followed_at_once(machine: Machine) -> None:
    dynamic = machine.dynamic(budget=math.inf)
    served = answers(dynamic, 1)
    for budget in (4000, 3000, 8000, 7900):
        dynamic.set_budget(budget)
        assert dynamic.budget_ms == budget
        served += answers(dynamic, 1)
    assert served == ["s50", "s80", "s95", "s50", "s80"]
    assert [switch.reason for switch in dynamic.report().switches] == ["budget"] * 4


def test_a_function_gives_the_budget_at_the_start_of_every_request(machine: Machine) -> None:
    budgets: Iterator[float] = iter([10e3, 10e3, 3e3, 3e3, 3e3, 10e3])
    dynamic = machine.dynamic(lambda: next(budgets))  # the constructor asks once
    assert answers(dynamic, 4) == ["s50", "s95", "s95", "s95"]
    machine.now += 100  # the dwell time
    assert answers(dynamic, 1) == ["s50"]


def test_load_moves_to_a_cheaper_sub_net_and_room_moves_back(machine: Machine) -> None:
    dynamic = machine.dynamic(hysteresis=Hysteresis(enter=0.9, dwell_ms=100_000, window=8, quantile=0.75))
    assert set(answers(dynamic, 8)) == {"s50"}
    machine.load = 2
    assert answers(dynamic, 10)[3:] == ["s80"] * 7  # three of eight slow ones change the quantile
    machine.load = 1
    served = answers(dynamic, 60)
    assert served[0] == "s80"
    assert served[-1] == "s50"
    assert [(s.before, s.after, s.reason) for s in dynamic.report().switches] == [
        ("s50", "s80", "load"),
        ("s80", "s50", "room"),
    ]


def test_a_steady_load_ends_in_one_sub_net(machine: Machine) -> None:
    dynamic = machine.dynamic()
    machine.load = 1.4
    answers(dynamic, 500)
    assert dynamic.report().switch_count == 1
    assert dynamic.active == "s80"


def test_when_nothing_fits_the_fastest_serves_and_is_counted(machine: Machine) -> None:
    dynamic = machine.dynamic(budget=1000)
    assert answers(dynamic, 3) == ["s95"] * 3
    report = dynamic.report()
    assert (report.without_fit, report.over_budget, report.requests) == (3, 3, 3)
    dynamic.set_budget(2500)
    answers(dynamic, 2)
    assert dynamic.report().without_fit == 3


def test_strict_refuses_budgets_that_nothing_fits(machine: Machine) -> None:
    with pytest.raises(
        BudgetError, match="budget_ms=1000 is exceeded by every sub-net: the fastest, 's95', takes 2000 ms"
    ):
        machine.dynamic(budget=1000, strict=True)
    dynamic = machine.dynamic(budget=5000, strict=True)
    with pytest.raises(BudgetError, match="set strict=False"):
        dynamic.set_budget(1500)
    assert (dynamic.budget_ms, dynamic.active) == (5000, "s80")
    budgets: Iterator[float] = iter([5e3, 1e3, 5e3])
    asking = machine.dynamic(lambda: next(budgets), strict=True)
    with pytest.raises(BudgetError, match="is exceeded"):
        asking("x")
    assert asking("x") == "s80"


def test_load_alone_does_not_make_strict_raise(machine: Machine) -> None:
    # A request that is refused is not measured: a load once seen would shut the door for good.
    dynamic = machine.dynamic(budget=5000, strict=True)
    machine.load = 10
    answers(dynamic, 20)
    assert dynamic.report().without_fit > 0
    machine.load = 1
    answers(dynamic, 200)
    assert dynamic.active == "s80"


def test_a_pinned_sub_net_serves_whatever_budget_and_load(machine: Machine) -> None:
    dynamic = machine.dynamic(budget=5000)
    dynamic.pin("s50")
    assert answers(dynamic, 3) == ["s50"] * 3
    dynamic.set_budget(3000)
    machine.load = 4
    assert answers(dynamic, 10) == ["s50"] * 10
    report = dynamic.report()
    assert (report.pinned, report.budget_ms, report.over_budget, report.without_fit) == (True, 3000, 13, 0)
    machine.load = 1
    answers(dynamic, 4)
    dynamic.unpin()
    assert answers(dynamic, 1) == ["s95"]
    assert [(s.after, s.reason) for s in dynamic.report().switches] == [("s50", "pin"), ("s95", "unpin")]
    dynamic.unpin()  # does nothing
    assert dynamic.report().switch_count == 2


def test_a_pinned_sub_net_serves_also_where_strict_would_raise(machine: Machine) -> None:
    budgets: Iterator[float] = iter([5e3, 1e3, 1e3])
    dynamic = machine.dynamic(lambda: next(budgets), strict=True)
    dynamic.pin("s50")
    assert answers(dynamic, 1) == ["s50"]
    dynamic.unpin()
    with pytest.raises(BudgetError, match="budget_ms=1000 is exceeded"):
        dynamic("x")


def test_a_clock_that_stands_still_is_no_error() -> None:
    dynamic = DynamicInference(sub_nets(), 1, "x", build=lambda name, form: lambda x: name, clock=lambda: 0.0)
    assert answers(dynamic, 50) == ["s50"] * 50


def test_the_report_tells_requests_latencies_and_switches(machine: Machine) -> None:
    dynamic = machine.dynamic(hysteresis=Hysteresis(dwell_ms=1e9, quantile=1))
    answers(dynamic, 19)
    machine.load = 3  # 24 s, once
    answers(dynamic, 1)
    machine.load = 1
    answers(dynamic, 2)
    report = dynamic.report()
    first, second, third = report.sub_nets
    assert (first.name, first.requests, first.over_budget, first.failed) == ("s50", 20, 1, 0)
    assert (first.median_ms, first.p95_ms, first.profiled_ms) == (8000, 8000, 8000)
    assert (second.requests, third.requests, third.median_ms) == (0, 2, 2000)
    assert second.median_ms is None
    assert report.elapsed_s == 19 * 8 + 24 + 2 * 2
    (switch,) = report.switches
    assert (switch.before, switch.after, switch.reason, switch.budget_ms) == ("s50", "s95", "load", 10_000)
    assert (switch.slowdown, switch.time_s) == (3, 19 * 8 + 24)


def test_the_report_is_shown_as_text_and_plain_containers(machine: Machine) -> None:
    dynamic = machine.dynamic()
    dynamic.set_budget(4000)
    answers(dynamic, 1)
    with pytest.raises(RuntimeError, match="bad input"):
        dynamic("x", fail=True)
    text = str(dynamic.report())
    assert "1 requests in" in text
    assert "budget 4000 ms, s80 serves" in text
    assert "failed" in text
    values = dynamic.report().to_dict()
    assert values["sub_nets"][1]["requests"] == 1
    assert values["switches"][0]["after"] == "s80"


def test_memory_for_the_report_is_bounded(machine: Machine) -> None:
    dynamic = machine.dynamic()
    for index in range(3000):
        dynamic.set_budget(3000 if index % 2 else 10_000)
        dynamic("x")
    report = dynamic.report()
    assert (report.switch_count, report.requests) == (2999, 3000)
    assert len(report.switches) == 1024
    assert len(dynamic._networks["s50"].counters._latencies) == 1024


def test_a_request_that_fails_is_counted_apart(machine: Machine) -> None:
    dynamic = machine.dynamic()
    machine.load = 100
    for _ in range(10):
        with pytest.raises(RuntimeError, match="bad input"):
            dynamic("x", fail=True)
    report = dynamic.report()
    assert (report.requests, report.over_budget, report.sub_nets[0].failed, report.slowdown) == (0, 0, 10, 1)
    assert report.active == "s50"


def test_a_profile_that_was_measured_before_is_used_instead(machine: Machine) -> None:
    built: list[tuple[str, str]] = []

    def build(name: str, form: str) -> Any:
        built.append((name, form))
        return machine.build(name, form)

    found = profile(sub_nets(), "input", build=machine.build, clock=machine.clock, forms=("dense", "csr"))
    faster = [r for r in found.to_dict()["records"] if r["form"] == "dense"]
    factor = {"s50": 2, "s80": 2, "s95": 0.5}
    slower = [{**r, "form": "csr", "latency_ms": factor[r["sub_net"]] * r["latency_ms"]} for r in faster]
    measured_before = Profile.from_dict({**found.to_dict(), "records": faster + slower})
    machine.now = 0
    dynamic = DynamicInference(sub_nets(), 1000, profile=measured_before, build=build, clock=machine.clock)
    assert built == [("s80", "dense"), ("s50", "dense"), ("s95", "csr")]
    assert machine.now == 0  # nothing was run
    assert dynamic.report().without_fit == 0
    assert dynamic.active == "s95"


@pytest.mark.parametrize(
    "budget", [0, -1, 10**400, math.nan, "10", None, True, [10], lambda: 0, lambda: math.nan, lambda: "x"]
)
def test_what_is_no_budget_is_refused(budget: Any, machine: Machine) -> None:
    complaint = "budget_ms must be a number of milliseconds above 0, or a function that returns one, got"
    with pytest.raises(ConfigError, match=complaint):
        machine.dynamic(budget)
    dynamic = machine.dynamic(5)
    with pytest.raises(ConfigError, match=complaint):
        dynamic.set_budget(budget)
    assert dynamic.budget_ms == 5
    budgets: Iterator[Any] = iter([5, budget() if callable(budget) else budget])
    asking = machine.dynamic(lambda: next(budgets))
    with pytest.raises(ConfigError, match=complaint):
        asking("x")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"metric": "top1"}, r"unknown metric 'top1': did you mean 'top2'\? Known: other, top2"),
        ({}, "metric is missing, and the file has several: other, top2; name the one"),
        ({"metric": "other", "sub_nets": ["s90"]}, "there is no sub-net 's90': did you mean"),
        ({"metric": "other", "sub_nets": "s50"}, "sub_nets must be a list of at least one name, got 's50'"),
        ({"metric": "other", "sub_nets": []}, "sub_nets must be a list of at least one name"),
        ({"metric": "other", "sub_nets": 3}, "sub_nets must be a list of at least one name, got 3"),
        (
            {"metric": "other", "sub_nets": [["s50"]]},
            r"sub_nets must be a list of at least one name, got \[\['s50'\]\]",
        ),
        (
            {"metric": "other", "hysteresis": {"enter": 1}},
            r"hysteresis must be a Hysteresis\(\.\.\.\), got \{'enter': 1\}",
        ),
        ({"metric": "other", "profile": {}}, r"profile must be what profile\(\) .* returned, got a dict"),
        ({"metric": "other", "runs": 0}, "runs must be a whole number of at least 1, got 0"),
        ({"metric": "other", "warmup": -1}, "warmup must be a whole number of at least 0, got -1"),
        ({"metric": "nan"}, "metric 'nan' of sub-net 's80' is no number"),
        ({"metric": "other", "strict": "no"}, "strict must be True or False, got 'no'"),
        ({"metric": "other", "strict": None}, "strict must be True or False, got None"),
        ({"metric": "other", "share": 0}, "share must be True or False, got 0"),
        ({"metric": "other", "greater_is_better": "False"}, "greater_is_better must be True or False, got 'False'"),
        ({"metric": "other", "greater_is_better": 1}, "greater_is_better must be True or False, got 1"),
        ({"metric": "other", "build": "dense"}, "build must be a function, got 'dense'"),
        ({"metric": "other", "clock": 3.5}, r"clock must be a function, got 3\.5"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options: dict[str, Any], complaint: str, machine: Machine) -> None:
    metrics: dict[str, dict[str, float]] = {name: {"other": 1.0, "top2": 2.0} for name in LATENCIES}
    if options.get("metric") == "nan":
        metrics["s80"]["nan"] = math.nan
    with pytest.raises(ConfigError, match=complaint):
        machine.dynamic(metrics=metrics, **options)


def test_a_metric_that_a_sub_net_lacks_is_refused(machine: Machine) -> None:
    metrics = {"s50": {"top1": 0.5}}
    with pytest.raises(ConfigError, match="unknown metric 'top1' of sub-net 's80'"):
        machine.dynamic(metrics=metrics, metric="top1")
    with pytest.raises(ConfigError, match=r"none is there for every sub-net \(known: top1\); choose sub_nets"):
        machine.dynamic(metrics=metrics)
    assert machine.dynamic(metrics=metrics, sub_nets=["s50"]).sub_nets == ("s50",)


def test_without_inputs_and_profile_there_is_nothing_to_measure() -> None:
    with pytest.raises(ConfigError, match="example_inputs is missing: give an input like those of the requests"):
        DynamicInference(sub_nets(), 10, build=Machine().build)


def test_inputs_that_do_not_fit_the_network_are_refused(elastic: Elastic) -> None:
    with pytest.raises(ConfigError, match=r"example_inputs \(1 x 2\) cannot be run through the network: RuntimeError"):
        DynamicInference(elastic, 10, torch.zeros(1, 2), build=dense(elastic))


def test_an_unknown_sub_net_cannot_be_pinned(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"there is no sub-net 's51': did you mean .*'s50'"):
        machine.dynamic().pin("s51")


def test_a_function_for_the_budget_may_ask_for_the_report(machine: Machine) -> None:
    holder: list[DynamicInference] = []

    def ask() -> float:
        return 3e3 if holder and holder[0].report().requests >= 2 else 10e3

    holder.append(machine.dynamic(ask))
    assert answers(holder[0], 3) == ["s50", "s50", "s95"]


def test_requests_are_answered_as_by_the_sub_net_alone_and_in_inference_mode(elastic: Elastic) -> None:
    dynamic = DynamicInference(elastic, math.inf, images(), build=dense(elastic), runs=1)
    for name in elastic.sub_nets:
        dynamic.pin(name)
        answer = dynamic(images=images())  # any signature
        with elastic.sub_net(name) as model, torch.no_grad():
            assert torch.equal(answer, model(images()))
        assert answer.is_inference()
    assert elastic.active == elastic.default_sub_net


def test_compiled_sub_nets_are_served(elastic: Elastic) -> None:
    dynamic = DynamicInference(elastic, math.inf, [images()], form="dense", runs=1)
    assert {net.form for net in dynamic.report().sub_nets} == {"dense"}
    want = export_model(elastic, "s80", elastic.model)(images())
    dynamic.pin("s80")
    assert torch.equal(dynamic(images()), want)


def test_a_form_that_a_sub_net_cannot_have_is_refused(elastic: Elastic) -> None:
    with pytest.raises(ConfigError, match="sliced"):
        DynamicInference(elastic, math.inf, images(), form="sliced")
    with pytest.raises(ConfigError, match="unknown form 'fast'"):
        DynamicInference(elastic, math.inf, images(), form="fast")


def test_equal_tensors_are_in_memory_once(elastic: Elastic) -> None:
    apart = DynamicInference(elastic, math.inf, images(), build=dense(elastic), runs=1, share=False)
    shared = DynamicInference(elastic, math.inf, images(), build=dense(elastic), runs=1)
    one = sum(t.nbytes for t in Network().state_dict().values())
    biases = sum(t.nbytes for name, t in Network().state_dict().items() if name in ("hidden.bias", "head.bias"))
    assert apart.report().memory_bytes == 2 * one
    assert shared.report().memory_bytes == 2 * one - biases  # masked weights and BatchNorm differ
    for name in elastic.sub_nets:
        apart.pin(name)
        shared.pin(name)
        assert torch.equal(apart(images()), shared(images()))


def test_the_elastic_is_not_kept_alive(elastic: Elastic, tmp_path: Path) -> None:
    other = load(tmp_path / "elastic.safetensors", network(3))
    gone = weakref.ref(other)
    dynamic = DynamicInference(other, math.inf, images(), build=dense(other), runs=1)
    del other
    gc.collect()
    assert gone() is None
    assert dynamic(images()).shape == (4, 5)


class Waits(nn.Module):
    """Answers with its name, after another thread said so."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def forward(self, x: Tensor) -> str:
        before = self.name
        self.entered.set()
        assert self.go.wait(20)
        return f"{before} {self.name}"


def test_a_request_keeps_its_sub_net_while_others_run_on_another() -> None:
    made: dict[str, Waits] = {}

    def build(name: str, form: str) -> Waits:
        return made.setdefault(name, Waits(name))

    dynamic = DynamicInference(sub_nets(), math.inf, torch.zeros(1), build=build, runs=1)
    dynamic.pin("s50")
    made["s50"].go.clear()
    made["s50"].entered.clear()
    found: list[str] = []
    running = threading.Thread(target=lambda: found.append(dynamic(torch.zeros(1))))
    running.start()
    assert made["s50"].entered.wait(20)
    dynamic.pin("s95")
    assert dynamic(torch.zeros(1)) == "s95 s95"
    made["s50"].go.set()
    running.join(20)
    assert found == ["s50 s50"]
    assert [net.requests for net in dynamic.report().sub_nets] == [1, 0, 1]


@pytest.mark.slow
def test_under_load_every_answer_is_exactly_that_of_one_sub_net(elastic: Elastic) -> None:
    # 24,000 requests from four threads while a fifth changes the budget and pins as fast as it can.
    dynamic = DynamicInference(
        elastic, 1e3, images(), build=dense(elastic), hysteresis=Hysteresis(dwell_ms=0, window=4), runs=3
    )
    want = {}
    for name in elastic.sub_nets:
        dynamic.pin(name)
        want[name] = dynamic(images())
    assert not torch.equal(want["s50"], want["s80"])
    already = {net.name: net.requests for net in dynamic.report().sub_nets}
    latency = {net.name: net.profiled_ms for net in dynamic.report().sub_nets}
    seen = [dict.fromkeys(want, 0) for _ in range(4)]
    wrong: list[Any] = []
    finished = threading.Event()

    def ask(counts: dict[str, int]) -> None:
        inputs = images()
        try:
            for _ in range(6000):
                answer = dynamic(inputs)
                matching = [name for name, output in want.items() if torch.equal(answer, output)]
                if len(matching) != 1:
                    wrong.append(answer)
                else:
                    counts[matching[0]] += 1
        except BaseException as error:
            wrong.append(error)

    def change() -> None:
        turn = 0
        while not finished.is_set():
            turn += 1
            if turn % 3 == 0:
                dynamic.pin(dynamic.sub_nets[turn % 2])
            elif turn % 3 == 1:
                dynamic.unpin()
            else:
                dynamic.set_budget(1e3 if turn % 2 else 0.5 * min(latency.values()))

    threads = [threading.Thread(target=ask, args=(counts,)) for counts in seen]
    changing = threading.Thread(target=change)
    for thread in (*threads, changing):
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    changing.join()
    assert wrong == []
    report = dynamic.report()
    assert report.requests == 24_000 + sum(already.values())
    for net in report.sub_nets:
        assert net.requests - already[net.name] == sum(counts[net.name] for counts in seen)
        assert net.requests > already[net.name]
    assert report.switch_count > 100
