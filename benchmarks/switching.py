"""What an elastic file costs for a ResNet-50-size network with sub-nets at 50, 80 and 95 %: size, load and switch.

One thread, medians. The ways of switching that `ast_plugin.elastic` does not use are measured next to the one it does:
they change the same tensors of the same network. Prints a table and writes the figures into a JSON file.

    python benchmarks/switching.py
    python benchmarks/switching.py --repeats 50 --output switching.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_file import read_elastic, write_elastic
from ast_plugin.export import export_state_dict
from ast_plugin.files import atomic_write_text
from ast_plugin.masks import MaskStore
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.selection_kernels import keep_largest
from ast_plugin.sub_nets import sparsity_name

RESULTS = Path(__file__).parent / "results" / "switching.json"
SPARSITIES = (0.5, 0.8, 0.95)


def resnet50() -> nn.Module:
    """Return the tensors of a ResNet-50, as a tree of modules that is never run."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(width, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1)]
            if block == 0:
                shapes.append((width, 4 * inner, 1))
            for into, out, kernel in shapes:
                layers += [nn.Conv2d(into, out, kernel, bias=False), nn.BatchNorm2d(out)]
            width = 4 * inner
    return nn.Sequential(*layers, nn.Linear(width, 1000)).eval()


def magnitude_masks(model: nn.Module, sparsities: Sequence[float]) -> MaskStore:
    """Keep the largest weights of every layer but the first; sparser masks lie within denser ones."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("0.")}
    masks = MaskStore(
        [sparsity_name(s) for s in sparsities], {name: tuple(weight.shape) for name, weight in weights.items()}
    )
    for sub_net, sparsity in zip(masks.sub_nets, sparsities, strict=True):
        for name, weight in weights.items():
            kept = keep_largest(weight.detach().abs().reshape(-1), round((1 - sparsity) * weight.numel()))
            masks.set(sub_net, name, kept.reshape(weight.shape))
    return masks


def milliseconds(function: Callable[[int], object], repeats: int) -> float:
    """Return the median time of a call in ms; `function` is given the number of the call."""
    function(0)
    times = []
    for index in range(1, repeats + 1):
        started = time.perf_counter()
        function(index)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def measure_files(folder: Path, model: nn.Module, repeats: int) -> dict[str, float]:
    """Write and read the elastic file; leaves ``elastic.safetensors`` in `folder`."""
    masks = magnitude_masks(model, SPARSITIES)
    state = model.state_dict()
    path = folder / "elastic.safetensors"
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    own = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in norms}
    private = dict.fromkeys(masks.sub_nets, own)
    write = milliseconds(lambda _: write_elastic(path, state=state, masks=masks, private=private, header={}), repeats)
    contents = read_elastic(path)
    export_state_dict(contents, masks.sub_nets[0], folder / "dense.safetensors")
    return {
        "prunable weights": masks.total(),
        "elastic file, MB": path.stat().st_size / 1e6,
        f"{len(SPARSITIES)} dense files, MB": len(SPARSITIES) * (folder / "dense.safetensors").stat().st_size / 1e6,
        "write, ms": write,
        "read and check, ms": milliseconds(lambda _: read_elastic(path), repeats),
        "materialize one, ms": milliseconds(lambda _: contents.materialize(contents.sub_nets[0]), repeats),
        "load into a model, ms": milliseconds(lambda _: load(path, model), repeats),
    }


def measure_switching(folder: Path, model: nn.Module, repeats: int) -> dict[str, float]:
    """Time `Elastic.switch` and the ways that were not chosen."""
    elastic = load(folder / "elastic.safetensors", model)
    names = elastic.sub_nets
    figures = {"Elastic.switch, ms": milliseconds(lambda i: elastic.switch(names[i % len(names)]), 20 * repeats)}
    with torch.inference_mode():
        figures["the same under inference_mode, ms"] = milliseconds(
            lambda i: elastic.switch(names[i % len(names)]), 20 * repeats
        )
    figures.update(measure_alternatives(elastic, model, repeats))
    path = folder / "dense.safetensors"
    figures["load_file + load_state_dict, warm, ms"] = milliseconds(
        lambda _: model.load_state_dict(load_file(path)), repeats
    )
    return figures


def measure_alternatives(elastic: Elastic, model: nn.Module, repeats: int) -> dict[str, float]:
    """Time other ways to exchange the same tensors between the same sub-nets."""
    modules = dict(model.named_modules())
    slots = []
    for name in model.state_dict():
        module = modules[name.rpartition(".")[0]]
        key = name.rpartition(".")[2]
        slots.append((module._parameters if key in module._parameters else module._buffers, key))
    states = [list(elastic.materialize(name).values()) for name in elastic.sub_nets]
    entries = [
        [
            nn.Parameter(tensor) if isinstance(slot[key], nn.Parameter) else tensor
            for (slot, key), tensor in zip(slots, state, strict=True)
        ]
        for state in states
    ]
    targets: list[Tensor] = [slot[key] for slot, key in slots]
    floats = [[(tensor != 0).float() for tensor in state] for state in states]
    weights = [index for index, tensor in enumerate(targets) if tensor.dim() > 1]

    def by_pointer(call: int) -> None:
        for target, tensor in zip(targets, states[call % len(states)], strict=True):
            target.data = tensor

    def by_slot(call: int) -> None:
        for (slot, key), tensor in zip(slots, entries[call % len(states)], strict=True):
            slot[key] = tensor

    @torch.no_grad()
    def by_copy(call: int) -> None:
        for target, tensor in zip(targets, states[call % len(states)], strict=True):
            target.copy_(tensor)

    @torch.no_grad()
    def by_mask(call: int) -> None:
        for index in weights:
            torch.mul(states[0][index], floats[call % len(states)][index], out=targets[index])

    return {
        "tensor.data = prebuilt alone, ms": milliseconds(by_pointer, 20 * repeats),
        "module._parameters[name] = prebuilt, ms": milliseconds(by_slot, 20 * repeats),
        "tensor.copy_(prebuilt), ms": milliseconds(by_copy, repeats),
        "dense weight x float mask, ms": milliseconds(by_mask, repeats),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="of the slow parts; fast ones take more (default: 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet50()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = measure_files(folder, model, args.repeats)
        figures.update(measure_switching(folder, model, args.repeats))
    figures = {"tensors": len(model.state_dict()), **figures}
    rows = tuple(
        (what, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}") for what, value in figures.items()
    )
    print(plain_table(TextTable(title="ResNet-50, sub-nets at 50, 80 and 95 %", columns=("", "median"), rows=rows)))
    atomic_write_text(args.output, json.dumps(figures, indent=1) + "\n")
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
