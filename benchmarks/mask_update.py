"""What a mask update costs for a network of ResNet-50's size, and its parts against other ways to do them.

One thread, processor time, medians of interleaved repeats. The update is GraNet's, built from the same functions that
training uses: magnitudes, one global threshold, exact selection by layer, gradient magnitudes, drop and regrow. The
prunable weights are those of the 52 convolutions after the stem and of the last linear layer.

Beside the global threshold stand the usual ways to find it, each on |w| of all layers concatenated; beside the whole
update stands one written with `torch.sort` alone, as research code has it. Prints tables and writes a JSON file.

    python benchmarks/mask_update.py
    python benchmarks/mask_update.py --repeats 3 --patterns unstructured 2:4 4x4 channel
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ast_plugin.distributions import DistributionRequest, LayerRequest, global_magnitude, kept_units
from ast_plugin.files import atomic_write_text
from ast_plugin.patterns import Pattern, parse_pattern
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.selection_kernels import kth_largest

RESULTS = Path(__file__).parent / "results" / "mask_update.json"
SPARSITIES = (0.1, 0.5, 0.9, 0.98)  # the first stands for the beginning of a ramp, where almost all is kept
THRESHOLD_SPARSITIES = (0.1, 0.9)
DROP_FRACTION = 0.5


def resnet50_shapes(classes: int) -> list[tuple[int, ...]]:
    """Return the shapes of a ResNet-50's prunable weights."""
    shapes: list[tuple[int, ...]] = []
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            if block == 0:
                shapes.append((4 * inner, width, 1, 1))
            width = 4 * inner
    return [*shapes, (classes, width)]


def make_weights(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Return normal weights whose spread differs from layer to layer as after the usual initialization."""
    generator = torch.Generator().manual_seed(seed)
    fans = [int(np.prod(shape[1:])) for shape in shapes]
    return [torch.randn(s, generator=generator) * (2 / f) ** 0.5 for s, f in zip(shapes, fans, strict=True)]


class Stopwatch:
    """Adds up the time of named parts of one run."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for `part`."""
        now = time.process_time()
        self.parts[part] = self.parts.get(part, 0.0) + 1000 * (now - self._last)
        self._last = now


def update(
    pattern: Pattern, weights: Sequence[Tensor], gradients: Sequence[Tensor], sparsity: float
) -> dict[str, float]:
    """Make one mask update and return the time of its parts and of the whole, in ms."""
    watch = Stopwatch()
    scores = [pattern.unit_scores(weight.abs()) for weight in weights]
    watch.lap("magnitudes")
    layers = tuple(
        LayerRequest(name=str(index), shape=tuple(weight.shape), units=pattern.unit_count(weight.shape))
        for index, weight in enumerate(weights)
    )
    request = DistributionRequest(
        layers=layers, sparsity=sparsity, target_sparsity=sparsity, sub_net="", unit_scores=lambda: scores
    )
    if pattern.fixed_sparsity is None:
        counts = kept_units(request, global_magnitude(request), allow_empty_layers=False)
    else:
        counts = [pattern.kept_units(weight.shape, sparsity) for weight in weights]
    watch.lap("global threshold")
    kept = [pattern.keep_top(s, c, w.shape) for s, c, w in zip(scores, counts, weights, strict=True)]
    watch.lap("select by layer")
    grow_scores = [pattern.unit_scores(gradient.abs()) for gradient in gradients]
    watch.lap("gradient magnitudes")
    for index, (mask, weight) in enumerate(zip(kept, weights, strict=True)):
        replaced = int(DROP_FRACTION * counts[index])
        kept[index] = pattern.regrow(mask, scores[index], grow_scores[index], replaced, weight.shape)
    watch.lap("drop and regrow")
    masks = [pattern.expand(mask, weight.shape) for mask, weight in zip(kept, weights, strict=True)]
    watch.lap("masks of weights")
    if sum(int(mask.sum()) for mask in masks) == 0:
        raise RuntimeError("the update kept nothing, so its time means nothing")
    return {**watch.parts, "whole update": sum(watch.parts.values())}


def update_by_sorting(weights: Sequence[Tensor], gradients: Sequence[Tensor], sparsity: float) -> dict[str, float]:
    """Make the same update with sorts and strict thresholds, not exact where scores are equal."""
    started = time.process_time()
    together = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = together.sort(descending=True).values[round((1 - sparsity) * together.numel())]
    for weight, gradient in zip(weights, gradients, strict=True):
        mask = (weight.abs() > threshold).float()
        replaced = int(DROP_FRACTION * int(mask.sum()))
        by_weight = torch.sort(torch.where(mask > 0, weight.abs(), torch.inf).flatten()).indices
        mask.view(-1)[by_weight[:replaced]] = 0.0
        by_gradient = torch.sort(torch.where(mask > 0, -torch.inf, gradient.abs()).flatten(), descending=True).indices
        mask.view(-1)[by_gradient[:replaced]] = 1.0
    return {"by torch.sort alone": 1000 * (time.process_time() - started)}


def by_partition(scores: Sequence[Tensor], count: int) -> float:
    """Return the `count`-th largest score by `numpy.partition`."""
    together = np.concatenate([part.numpy() for part in scores])
    return float(np.partition(together, together.size - count)[together.size - count])


THRESHOLDS: dict[str, Callable[[Sequence[Tensor], int], float]] = {
    "kth_largest": lambda scores, count: kth_largest(scores, count)[0],
    "numpy.partition": by_partition,
    "torch.kthvalue": lambda scores, count: float(
        (t := torch.cat(list(scores))).kthvalue(t.numel() - count + 1).values
    ),
    "torch.topk": lambda scores, count: float(torch.cat(list(scores)).topk(count).values[-1]),
    "torch.sort": lambda scores, count: float(torch.cat(list(scores)).sort(descending=True).values[count - 1]),
}


def find_thresholds(scores: Sequence[Tensor], count: int) -> dict[str, float]:
    """Find the global threshold in every way, make sure that all agree, and return the times in ms."""
    times, values = {}, {}
    for name, find in THRESHOLDS.items():
        started = time.process_time()
        values[name] = find(scores, count)
        times[name] = 1000 * (time.process_time() - started)
    if len(set(values.values())) != 1:
        raise RuntimeError(f"the thresholds differ: {values}")
    return times


def medians(function: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """Return the median of each figure of `function` over `repeats` calls, after one that is not counted."""
    function()
    runs = [function() for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measure_updates(shapes: Sequence[tuple[int, ...]], pattern_name: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return by sparsity the times of the update under a pattern, in ms."""
    pattern = parse_pattern(pattern_name)
    weights, gradients = make_weights(shapes, 0), make_weights(shapes, 1)

    def once(sparsity: float) -> dict[str, float]:
        peer = update_by_sorting(weights, gradients, sparsity) if pattern_name == "unstructured" else {}
        return {**update(pattern, weights, gradients, sparsity), **peer}

    sparsities = SPARSITIES if pattern.fixed_sparsity is None else (pattern.fixed_sparsity,)
    return {f"{sparsity:.0%}": medians(functools.partial(once, sparsity), repeats) for sparsity in sparsities}


def measure_thresholds(shapes: Sequence[tuple[int, ...]], repeats: int) -> dict[str, dict[str, float]]:
    """Return by sparsity the times of all ways to find the global threshold, in ms."""
    scores = [weight.abs().flatten() for weight in make_weights(shapes, 0)]
    total = sum(part.numel() for part in scores)
    counts = {f"{sparsity:.0%}": round((1 - sparsity) * total) for sparsity in THRESHOLD_SPARSITIES}
    return {
        sparsity: medians(functools.partial(find_thresholds, scores, count), repeats)
        for sparsity, count in counts.items()
    }


def print_table(title: str, figures: dict[str, dict[str, float]], ratio_to: str | None = None) -> None:
    """Print times with one column a sparsity; with `ratio_to`, how many times as long as that row each row takes."""
    names = next(iter(figures.values()))
    rows = []
    for name in names:
        cells = []
        for times in figures.values():
            ratio = f"  ({times[name] / times[ratio_to]:5.1f}x)" if ratio_to is not None else ""
            cells.append(f"{times[name]:,.1f}{ratio}")
        rows.append((name, *cells))
    print(plain_table(TextTable(title=title, columns=("ms", *figures), rows=tuple(rows))), end="\n\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats (default: 5)")
    parser.add_argument("--classes", type=int, default=10, help="outputs of the last layer (default: 10)")
    parser.add_argument("--patterns", nargs="+", default=["unstructured"], help="default: unstructured")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes = resnet50_shapes(args.classes)
    total = sum(int(np.prod(shape)) for shape in shapes)
    print(f"{len(shapes)} layers, {total / 1e6:.2f} million prunable weights, torch {torch.__version__}, one thread\n")
    updates = {name: measure_updates(shapes, name, args.repeats) for name in args.patterns}
    for name, figures in updates.items():
        print_table(f"One mask update, {name}, by sparsity", figures, "whole update")
    thresholds = measure_thresholds(shapes, args.repeats)
    print_table("The global threshold alone, by sparsity", thresholds, "kth_largest")
    results = {"layers": len(shapes), "weights": total, "torch": torch.__version__, "numpy": np.__version__}
    atomic_write_text(
        args.output, json.dumps({**results, "updates_ms": updates, "thresholds_ms": thresholds}, indent=1) + "\n"
    )
    print(f"Figures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
