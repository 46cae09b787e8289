"""What `DynamicInference` does and costs: a ResNet-50 whose channel sub-nets follow a changing budget and load.

One thread for torch, batches of one image. The network keeps all channels inside its blocks, a half, a quarter or a
tenth of them; its weights are random, which changes no time. Measured are

* a switch by `pin` and by `set_budget`, beside `Elastic.switch` of the same sub-nets, and what `DynamicInference` adds
  to a request, on networks that do nothing;
* the memory of the sub-nets with equal tensors shared and apart, and how long it takes until the first request;
* a trace: phases of requests under one budget after the other, one of them too small for every sub-net, and one with
  several clients at once, each on a thread of its own.

Prints tables and writes a JSON file.

    python benchmarks/governor.py
    python benchmarks/governor.py --size 96 --requests 12 --switches 200 --output governor.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis
from ast_plugin.dynamic import DynamicInference
from ast_plugin.dynamic_policy import Hysteresis
from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_file import write_elastic
from ast_plugin.files import atomic_write_text
from ast_plugin.masks import MaskStore
from ast_plugin.profiles_measure import median, percentile
from ast_plugin.report_text import TextTable, plain_table

RESULTS = Path(__file__).parent / "results" / "governor.json"
SHARES = {"all": 1.0, "c50": 0.5, "c75": 0.25, "c90": 0.1}
RULE = Hysteresis(dwell_ms=500, window=16)
CLIENTS = 4

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, width: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or width != 4 * inner:
            self.short = nn.Sequential(nn.Conv2d(width, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (images, 4 * inner, height, width)."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        inner = torch.relu(self.norm2(self.conv2(inner)))
        return torch.relu(self.norm3(self.conv3(inner)) + self.short(x))


class ResNet50(nn.Module):
    """A ResNet-50 for images of 3 channels and 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        width = 64
        for stage, (inner, count) in enumerate(STAGES):
            for block in range(count):
                blocks.append(Bottleneck(width, inner, 2 if stage and not block else 1))
                width = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (images, 1000)."""
        x = torch.relu(self.norm(self.stem(images)))
        x = self.blocks(nn.functional.max_pool2d(x, 3, 2, 1))
        return self.head(x.mean((2, 3)))


def channel_groups(model: ResNet50) -> ChannelGroups:
    """Return two groups a block: the channels between its first two convolutions, and between its last two."""
    groups = []
    for index, block in enumerate(model.blocks):
        for number in (1, 2):
            path = f"blocks.{index}"
            norm = [f"{path}.norm{number}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
            axes = (
                GroupAxis(tensor=f"{path}.conv{number}.weight", dim=0, role="out"),
                *(GroupAxis(tensor=name, dim=0, role="state") for name in norm),
                GroupAxis(tensor=f"{path}.conv{number + 1}.weight", dim=1, role="in"),
            )
            units = block.get_submodule(f"conv{number}").weight.shape[0]
            groups.append(ChannelGroup(name=f"{path}.conv{number}", kind="channels", units=units, axes=axes))
    return ChannelGroups(groups=tuple(groups))


def write_file(path: Path, model: ResNet50) -> None:
    """Write an elastic file of nested channel sub-nets; each keeps the first channels of every group."""
    groups = channel_groups(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1 and name != "stem.weight"}
    masks = MaskStore(tuple(SHARES), shapes)
    for sub_net, share in SHARES.items():
        kept = {group.name: torch.arange(group.units) < round(share * group.units) for group in groups.groups}
        for name, mask in groups.masks(kept, shapes).items():
            masks.set(sub_net, name, mask)
    state = model.state_dict()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    own = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in norms}
    header = {
        "sub_nets": [{"name": name, "target_sparsity": 1 - s, "pattern": "channel"} for name, s in SHARES.items()],
        "channel_groups": [group.to_dict() for group in groups.groups],
    }
    write_elastic(path, state=state, masks=masks, private=dict.fromkeys(SHARES, own), header=header)


def times_ms(function: Callable[[int], object], repeats: int) -> list[float]:
    """Return the time of each call in ms; `function` is given the number of the call."""
    function(0)
    times = []
    for index in range(1, repeats + 1):
        started = time.perf_counter()
        function(index)
        times.append(1000 * (time.perf_counter() - started))
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and largest of some times."""
    return {"median, ms": median(times), "p95, ms": percentile(times, 0.95), "largest, ms": max(times)}


def measure_switches(dynamic: DynamicInference, elastic: Elastic, repeats: int) -> dict[str, dict[str, float]]:
    """Time switches back and forth between the best and the sparsest sub-net, without requests in between."""
    first, last = dynamic.sub_nets[0], dynamic.sub_nets[-1]
    found = {"pin": spread(times_ms(lambda call: dynamic.pin((first, last)[call % 2]), repeats))}
    dynamic.unpin()
    slow, fast = math.inf, dynamic.profile.fastest(last).latency_ms
    found["set_budget"] = spread(times_ms(lambda call: dynamic.set_budget((slow, fast)[call % 2]), repeats))
    found["Elastic.switch"] = spread(times_ms(lambda call: elastic.switch((first, last)[call % 2]), repeats))
    return found


def measure_overhead(elastic: Elastic, repeats: int) -> dict[str, dict[str, float]]:
    """Time requests to networks that do nothing, with and without `DynamicInference`, in turn."""

    def nothing(x: Tensor) -> Tensor:
        return x

    dynamic = DynamicInference(elastic, 1e9, torch.zeros(1), build=lambda name, form: nothing)
    asking = DynamicInference(elastic, lambda: 1e9, torch.zeros(1), build=lambda name, form: nothing)
    inputs = torch.zeros(1)

    def bare(_: int) -> None:
        with torch.inference_mode():
            nothing(inputs)

    return {
        "in inference mode alone": spread(times_ms(bare, repeats)),
        "through DynamicInference": spread(times_ms(lambda _: dynamic(inputs), repeats)),
        "with a function for the budget": spread(times_ms(lambda _: asking(inputs), repeats)),
    }


def run_phase(dynamic: DynamicInference, image: Tensor, budget: float, requests: int, clients: int) -> dict[str, Any]:
    """Set a budget, send requests from some clients at once, and return what came of them."""
    before = dynamic.report()
    dynamic.set_budget(budget)
    latencies: list[float] = []

    def ask() -> None:
        for _ in range(requests):
            started = time.perf_counter()
            dynamic(image)
            latencies.append(1000 * (time.perf_counter() - started))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = dynamic.report()
    served = Counter({net.name: net.requests for net in after.sub_nets})
    served.subtract({net.name: net.requests for net in before.sub_nets})
    switches = after.switches[len(after.switches) - (after.switch_count - before.switch_count) :]
    return {
        "budget, ms": budget,
        "clients": clients,
        "requests": sum(served.values()),
        "served": {name: count for name, count in served.items() if count},
        "over budget": after.over_budget - before.over_budget,
        "without fit": after.without_fit - before.without_fit,
        "switches": [f"{switch.before} > {switch.after}: {switch.reason}" for switch in switches],
        **spread(latencies),
    }


def trace(dynamic: DynamicInference, image: Tensor, requests: int) -> list[dict[str, Any]]:
    """Follow a budget that falls, becomes too small and rises again; then several clients at once, then one again."""
    profiled = {name: dynamic.profile.fastest(name).latency_ms for name in dynamic.sub_nets}
    roomy = 1.6 * profiled["all"]
    budgets = [roomy, 1.3 * profiled["c50"], 1.3 * profiled["c75"], 0.5 * profiled["c90"], 1.3 * profiled["c75"], roomy]
    phases = [run_phase(dynamic, image, budget, requests, 1) for budget in budgets]
    phases.append(run_phase(dynamic, image, roomy, requests, CLIENTS))
    phases.append(run_phase(dynamic, image, roomy, 3 * requests, 1))
    return phases


def measure(size: int, requests: int, switches: int) -> dict[str, Any]:
    """Return all figures."""
    model = ResNet50().eval()
    image = torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "elastic.safetensors"
        write_file(path, model)
        elastic = load(path, model)
        apart = DynamicInference(elastic, math.inf, image, form="sliced", share=False, runs=1, warmup=0)
        memory = {"apart, MB": apart.report().memory_bytes / 1e6}
        del apart
        started = time.perf_counter()
        dynamic = DynamicInference(elastic, math.inf, image, form="sliced", hysteresis=RULE)
        ready = time.perf_counter() - started
        memory["shared, MB"] = dynamic.report().memory_bytes / 1e6
        memory["dense network alone, MB"] = sum(t.nbytes for t in model.state_dict().values()) / 1e6
        phases = trace(dynamic, image, requests)
        return {
            "image": size,
            "profile": {record.sub_net: record.latency_ms for record in dynamic.profile.records},
            "ready after, s": ready,
            "memory": memory,
            "switch": measure_switches(dynamic, elastic, switches),
            "request": measure_overhead(elastic, switches),
            "trace": phases,
        }


def timing_table(title: str, rows: dict[str, dict[str, float]]) -> TextTable:
    """Return a table of times with one row for each thing that was timed."""
    columns = ("", *next(iter(rows.values())))
    return TextTable(
        title=title,
        columns=columns,
        rows=tuple((what, *(f"{value:.4f}" for value in figures.values())) for what, figures in rows.items()),
    )


def trace_table(phases: Sequence[dict[str, Any]]) -> TextTable:
    """Return the trace with one row a phase."""
    return TextTable(
        title="Trace",
        columns=("budget, ms", "clients", "served", "median, ms", "p95, ms", "over budget", "switches"),
        rows=tuple(
            (
                f"{phase['budget, ms']:.1f}",
                str(phase["clients"]),
                ", ".join(f"{name} {count}" for name, count in phase["served"].items()),
                f"{phase['median, ms']:.1f}",
                f"{phase['p95, ms']:.1f}",
                f"{phase['over budget']} of {phase['requests']}",
                "; ".join(phase["switches"]) or "none",
            )
            for phase in phases
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--requests", type=int, default=40, help="of a client in a phase (default: 40)")
    parser.add_argument("--switches", type=int, default=2000, help="that are timed (default: 2000)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {"torch": str(torch.__version__), **measure(args.size, args.requests, args.switches)}
    print(f"ResNet-50 at {args.size} px, profile in ms: ", end="")
    print(", ".join(f"{name} {ms:.1f}" for name, ms in figures["profile"].items()))
    print(f"ready after {figures['ready after, s']:.1f} s; memory: ", end="")
    print(", ".join(f"{what[:-4]} {megabytes:.1f} MB" for what, megabytes in figures["memory"].items()), end="\n\n")
    tables = [
        timing_table("A switch", figures["switch"]),
        timing_table("A request to a network that does nothing", figures["request"]),
        trace_table(figures["trace"]),
    ]
    print("\n\n".join(plain_table(table) for table in tables))
    atomic_write_text(args.output, json.dumps(figures, indent=1) + "\n")
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
