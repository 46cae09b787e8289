"""What learned channel probabilities (VR-PGE) cost and buy.

Steps: one thread, forward, backward and SGD with momentum. A step of VR-PGE also has the extra forward passes of two
drawn networks, so its factor over the dense step stands beside that of the same channels trained without them. All of
them step in turn in one process; the figures are medians of the ratios of CPU time in each round.

Accuracy: a small residual network on scikit-learn's handwritten digits, one channel sub-net. Each rule gets the same
number of floating-point operations, extra forward passes included: rules with cheaper steps make more of them.

    python benchmarks/vr_pge.py                                    # all of it, about 40 minutes
    python benchmarks/vr_pge.py --only accuracy --seeds 5
    python benchmarks/vr_pge.py --only steps --networks ResNet-32 --rounds 5
    python benchmarks/vr_pge.py --quick --output quick.json        # tiny shapes: does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ast_plugin
from ast_plugin.channel_search import find_groups
from ast_plugin.channels import ChannelGroups
from ast_plugin.demo_data import Digits, load_digits
from ast_plugin.demo_model import DigitsResNet
from ast_plugin.files import atomic_write_text
from ast_plugin.methods import GMP, STATIC, Method
from ast_plugin.schedules import constant_sparsity, cubic_sparsity
from ast_plugin.vr_pge_method import VRPGEOptions, vr_pge
from sliced_tasks import NETWORKS, Task, make_task

RESULTS = Path(__file__).parent / "results" / "vr_pge.json"
KEPT = (0.5, 0.25, 0.1)
BATCH, WIDTH, RATE = 64, 12, 0.1
# Thousands of steps instead of the source's tens of thousands: probabilities have to move faster.
LEARNED = vr_pge(VRPGEOptions(rate=0.05))
LEARNED_UNTIL = 0.5
RAMPED_UNTIL = 0.5
RULES: dict[str, Method] = {
    "vr-pge": LEARNED,
    "magnitude, ramp": GMP,
    "magnitude": dataclasses.replace(
        GMP, name="magnitude", sparsity_schedule=constant_sparsity, initial_sparsity=None, distribution="uniform"
    ),
    "random": STATIC,
}


class Steps:
    """A network in training.

    Args:
        task: What is trained.
        kept: Share of the channels that is kept; None for the plain dense network.
        method: How they are chosen.
    """

    def __init__(self, task: Task, kept: float | None = None, method: Method = STATIC) -> None:
        self.task = task
        self.model: nn.Module = task.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        if kept is not None:
            ast_plugin.wrap(
                self.optimizer,
                self.model,
                sparsities=(1 - kept,),
                method=method,
                pattern="channel",
                groups=task.groups,
                total_steps=10_000,
                correction="off",
            )

    def step(self) -> float:
        """Make one step and return the seconds of CPU time that it took."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(self.task.inputs))
            loss.backward()
            return loss

        gc.collect()
        began = time.process_time()
        self.optimizer.step(closure)
        return time.process_time() - began


def measure_steps(task: Task, *, rounds: int) -> dict[str, Any]:
    """Return the dense step in ms, and how much faster the others are than it, by rule and kept share."""
    dense = Steps(task)
    runs = {(rule, kept): Steps(task, kept, RULES[rule]) for rule in ("vr-pge", "random") for kept in KEPT}
    plain: list[float] = []
    factors: dict[tuple[str, float], list[float]] = {key: [] for key in runs}
    for number in range(-1, rounds):
        before = dense.step()
        took = {key: run.step() for key, run in runs.items()}
        middle = statistics.mean((before, dense.step()))
        if number >= 0:
            plain.append(middle)
            for key, seconds in took.items():
                factors[key].append(middle / seconds)
    return {
        "dense_ms": 1000 * statistics.median(plain),
        "factors": {rule: [statistics.median(factors[rule, kept]) for kept in KEPT] for rule in ("vr-pge", "random")},
    }


class Costs:
    """Floating-point operations of the digits' network for one picture: two for a weight that is kept and a place.

    Args:
        model: The network.
        groups: Its groups of channels.
        image: A picture.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, image: Tensor) -> None:
        self.places: dict[str, int] = {}
        self._weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
        inside = set(groups.tensors)
        hooks = [
            module.register_forward_hook(
                lambda _, __, out, key=f"{path}.weight": self.places.update(
                    {key: out[0, 0].numel() if out.dim() > 2 else 1}
                )
            )
            for path, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        with torch.no_grad():
            model.eval()(image[None])
        for hook in hooks:
            hook.remove()
        self.fixed = sum(2 * self._weights[n] * places for n, places in self.places.items() if n not in inside)
        self.sliced = sum(2 * self._weights[n] * places for n, places in self.places.items() if n in inside)

    def of(self, ast: ast_plugin.AlternatingSparseTraining) -> float:
        """Return the operations of a forward pass with the masks that the only sub-net has now."""
        name = ast.sub_nets[0]
        return self.fixed + sum(
            2 * ast.masks.kept(name, weight) * self.places[weight] for weight in ast.masks.parameters
        )

    def planned(self, rule: str, kept: float) -> float:
        """Return the operations of an average step, a backward being two forwards, by a rule on its schedule."""
        if rule == "vr-pge":
            return (self.fixed + kept * self.sliced) * (3 + 2 * LEARNED_UNTIL)
        shares = [kept]
        if rule == "magnitude, ramp":
            shares = [
                1 - cubic_sparsity(i, begin=0, end=round(1000 * RAMPED_UNTIL), initial=0, final=1 - kept)
                for i in range(1000)
            ]
        return 3 * (self.fixed + statistics.mean(shares) * self.sliced)


def train(digits: Digits, rule: str, *, kept: float, seed: int, steps: int) -> dict[str, Any]:
    """Train one channel sub-net by a rule on as many operations as VR-PGE needs for `steps` steps; return figures."""
    torch.manual_seed(seed)
    model = DigitsResNet(width=WIDTH)
    groups = find_groups(model, digits.test_images[:1])
    costs = Costs(model, groups, digits.test_images[0])
    steps = round(steps * costs.planned("vr-pge", kept) / costs.planned(rule, kept))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ast = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=(1 - kept,),
        method=RULES[rule],
        pattern="channel",
        groups=groups,
        total_steps=steps,
        end_step=LEARNED_UNTIL if rule == "vr-pge" else RAMPED_UNTIL,
        correction="off",
        seed=seed,
    )
    spent, settled = 0.0, 0.0
    model.train()
    began = time.process_time()
    for images, labels in digits.batches(0, steps, seed=seed, batch_size=BATCH):

        def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            nonlocal spent
            spent += costs.of(ast) * (3 if torch.is_grad_enabled() else 1)
            return cross_entropy(model(images), labels)

        optimizer.zero_grad()
        ast.explore(loss)
        loss().backward()
        optimizer.step()
        scheduler.step()
    took = time.process_time() - began
    if ast.sampler is not None:
        values = torch.cat(list(ast.sampler.probabilities.values()))
        settled = float(((values < 0.02) | (values > 0.98)).double().mean())
    model.eval()
    with torch.no_grad():
        right = model(digits.test_images).argmax(1) == digits.test_labels
    return {
        "accuracy": 100 * float(right.double().mean()),
        "steps": steps,
        "gigaflops_a_picture": spent / 1e9,
        "seconds": took,
        "settled": settled,
        "kept": {name: int(flags.sum()) for name, flags in ast.kept_channels(ast.sub_nets[0]).items()},
    }


def measure_accuracy(*, shares: Sequence[float], seeds: int, steps: int) -> dict[str, Any]:
    """Return the figures of every rule and seed, by kept share."""
    digits = load_digits()
    found: dict[str, Any] = {}
    for kept in shares:
        rows: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
        for seed in range(seeds):
            for rule, row in rows.items():
                row.append(train(digits, rule, kept=kept, seed=seed, steps=steps))
                print(f"kept {kept:g}, seed {seed}, {rule}: {row[-1]['accuracy']:.2f} %", file=sys.stderr, flush=True)
        found[f"{kept:g}"] = rows
    return found


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = []
    for network, found in results.get("networks", {}).items():
        lines.append(f"{network}: dense step {found['dense_ms']:.0f} ms")
        lines.append(f"  {'':24}" + "".join(f"{f'kept {kept:g}':>11}" for kept in KEPT))
        names = {"vr-pge": "VR-PGE", "random": "same budget, fixed"}
        for rule, factors in found["factors"].items():
            lines.append(f"  {names[rule]:24}" + "".join(f"{factor:>10.2f}x" for factor in factors))
    for kept, rows in results.get("accuracy", {}).items():
        lines.append(f"Digits, {kept} of the channels kept, equal operations: accuracy in %, mean of seeds (deviation)")
        for rule, row in rows.items():
            accuracies = [figures["accuracy"] for figures in row]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            costs = {
                name: statistics.mean(r[name] for r in row) for name in ("steps", "gigaflops_a_picture", "seconds")
            }
            lines.append(
                f"  {rule:18}{statistics.mean(accuracies):>8.2f} ({spread:.2f}){costs['steps']:>8.0f} steps"
                f"{costs['gigaflops_a_picture']:>9.3f} GFLOP a picture{costs['seconds']:>8.0f} s"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("steps", "accuracy"), help="one half of it")
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 15; quick: 2)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--seeds", type=int, help="how many seeds (default: 5; quick: 1)")
    parser.add_argument("--steps", type=int, help="steps of VR-PGE (default: 2000; quick: 20)")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.25, 0.1], help="shares kept on the digits")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 15)
    seeds, steps = args.seeds or (1 if args.quick else 5), args.steps or (20 if args.quick else 2000)
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.only and args.output.exists() else {}
    results |= {"torch": torch.__version__, "python": sys.version.split()[0], "quick": args.quick, "kept": KEPT}
    if args.only != "accuracy":
        results |= {"rounds": rounds, "networks": {}}
        for network in args.networks:
            print(f"Measuring: {network} ...", file=sys.stderr, flush=True)
            results["networks"][network] = measure_steps(make_task(network, quick=args.quick), rounds=rounds)
            atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    if args.only != "steps":
        results["accuracy"] = measure_accuracy(shares=args.kept, seeds=seeds, steps=steps)
        atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
