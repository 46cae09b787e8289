"""What makes sparse networks faster after training, and what does not: whole networks, one picture, one CPU thread.

ResNet-50 and ViT-B of timm at 224 pixels. Channel sub-nets that keep .5, .25 and .1 of all groups, cut out (`sliced`);
ViT-B's linear layers held compressed (`csr`, `bsr`); and zeros left where they are. Every engine is compared with its
own dense network, the fastest form of it: all of them run in turn in one process, and the figures are medians of the
ratios of processor time in each round. Prints tables, and writes the figures into a JSON file and a picture.

    python benchmarks/inference.py                                    # all of it, about 15 minutes
    python benchmarks/inference.py --parts ResNet-50 --rounds 10
    python benchmarks/inference.py --quick --output quick.json        # tiny networks: does it run?
    python benchmarks/inference.py --picture                          # the picture from the JSON file; measures nothing

It needs timm and torch-pruning; ONNX Runtime (extra ``onnx``) and OpenVINO are measured where they are installed, and
matplotlib (extra ``report``) draws the picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ast_plugin.elastic import Elastic
from ast_plugin.errors import MissingExtraError
from ast_plugin.export import export_state_dict
from ast_plugin.files import atomic_write_text
from ast_plugin.report_text import TextTable, plain_table
from inference_engines import Contender, eager, exported, measure, onnx_runtime, openvino, wrong_way_round
from inference_networks import channel_file, linear_file, linear_name, resnet50, share_name, vit_b
from inference_picture import picture

RESULTS = Path(__file__).parent / "results" / "inference.json"
KEPT = (0.5, 0.25, 0.1)
SPARSITIES = (0.8, 0.9, 0.95)
BLOCK = 8
MULTIPLE = 16  # of channels that ONNX Runtime computes at a time
# At least, against the engine's own dense network.
RESNET_ONNX = dict(zip(KEPT, (2.2, 3.8, 4.5), strict=True))
VIT_EAGER = dict(zip(KEPT, (1.9, 3.6, 8.0), strict=True))
CSR = {0.9: 1.5, 0.95: 2.4}
BSR = {0.8: 1.25, 0.9: 2.0, 0.95: 2.9}


def measure_resnet(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure channel sub-nets of ResNet-50, and zeros left in place."""
    model, inputs = resnet50(quick=args.quick)
    elastic = channel_file(folder / "elastic.safetensors", model, inputs, KEPT)
    last = inputs.to(memory_format=torch.channels_last)
    dense = _whole(elastic)
    contenders = [
        eager("dense", dense, inputs, dense=True),
        eager("dense, channels_last", _channels_last(_whole(elastic)), last, dense=True),
        eager("dense, channels_last, bfloat16", _channels_last(_whole(elastic)).bfloat16(), last.bfloat16()),
        eager(f"zeros in place, {share_name(KEPT[-1])}", elastic.compile(share_name(KEPT[-1]), "dense"), inputs),
    ]
    for share in KEPT:
        name = share_name(share)
        contenders += [
            eager(f"sliced, {name}", elastic.compile(name, "sliced", inputs), inputs),
            eager(f"sliced, {name}, channels_last", _channels_last(elastic.compile(name, "sliced")), last),
        ]
    contenders += _graphs(folder, elastic, dense, inputs, RESNET_ONNX)
    return {"rows": measure(contenders, rounds=args.rounds), "files": _files(folder, elastic)}


def measure_vit_sliced(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure channel sub-nets of ViT-B: attention heads and feed-forward units."""
    model, inputs = vit_b(quick=args.quick)
    elastic = channel_file(folder / "elastic.safetensors", model, inputs, KEPT)
    dense = _whole(elastic)
    contenders = [eager("dense", dense, inputs, dense=True)]
    for share in KEPT:
        name = share_name(share)
        sliced = elastic.compile(name, "sliced", inputs)
        contenders.append(eager(f"sliced, {name}", sliced, inputs, at_least=VIT_EAGER[share]))
    contenders += _graphs(folder, elastic, dense, inputs, {})
    return {"rows": measure(contenders, rounds=args.rounds), "files": _files(folder, elastic)}


def measure_vit_sparse(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure ViT-B with zeros in its linear layers, left in place and compressed."""
    model, inputs = vit_b(quick=args.quick)
    names = {(sparsity, edge): linear_name(sparsity, edge) for edge in (1, BLOCK) for sparsity in SPARSITIES}
    elastic = linear_file(folder / "elastic.safetensors", model, names)
    dense = _whole(elastic)
    contenders = [
        eager("dense", dense, inputs, dense=True),
        eager("zeros in place, 90 %", elastic.compile(linear_name(0.9, 1), "dense"), inputs),
        eager(
            "F.linear(x, csr), 90 %", wrong_way_round(elastic.compile(linear_name(0.9, 1), "csr", seconds=0.1)), inputs
        ),
    ]
    if importlib.util.find_spec("onnxruntime") is not None:  # what a compressed network has to beat as well
        whole = exported(_Whole(dense), "dense", dense, inputs, folder / "dense.onnx")
        contenders.append(onnx_runtime("dense", whole, inputs, dense=True))
    layers = {}
    for form, edge, wanted in (("csr", 1, CSR), ("bsr", BLOCK, BSR)):
        for sparsity in SPARSITIES:
            module = elastic.compile(linear_name(sparsity, edge), form, inputs, seconds=args.seconds)
            name = f"{form}{f' {edge}x{edge}' if edge > 1 else ''}, {sparsity:.0%}"
            contenders.append(eager(name, module, inputs, at_least=wanted.get(sparsity)))
            report = module.compiled_form["layers"]
            layers[name] = {kind: sum(one["form"] == kind for one in report) for kind in (form, "dense")}
    rows = measure(contenders, rounds=args.rounds)
    return {"rows": rows, "files": _files(folder, elastic, forms=("dense",)), "layers": layers}


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "ResNet-50": measure_resnet,
    "ViT-B, channels": measure_vit_sliced,
    "ViT-B, linear layers": measure_vit_sparse,
}


def _graphs(
    folder: Path, elastic: Elastic, dense: torch.nn.Module, inputs: torch.Tensor, wanted: dict[float, float]
) -> list[Contender]:
    """Return dense network, zeros in place and sliced sub-nets in ONNX Runtime, and the first two in OpenVINO."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    zeros = exported(elastic, share_name(KEPT[-1]), elastic.model, inputs, folder / "zeros.onnx")
    whole = exported(_Whole(dense), "dense", dense, inputs, folder / "dense.onnx")
    found = [
        onnx_runtime("dense", whole, inputs, dense=True),
        onnx_runtime(f"zeros in place, {share_name(KEPT[-1])}", zeros, inputs),
        *openvino("dense", whole, inputs, dense=True),
        *openvino(f"zeros in place, {share_name(KEPT[-1])}", zeros, inputs),
    ]
    for share in KEPT:
        name = share_name(share)
        paths = [
            exported(
                elastic,
                name,
                elastic.model,
                inputs,
                folder / f"{name}-{multiple}.onnx",
                form="sliced",
                multiple=multiple,
            )
            for multiple in (1, MULTIPLE)
        ]
        found.append(onnx_runtime(f"sliced, {name}", paths[0], inputs))
        filled = f"sliced, {name}, multiples of {MULTIPLE}"
        found.append(onnx_runtime(filled, paths[1], inputs, at_least=wanted.get(share)))
        found += openvino(filled, paths[1], inputs)
    return found


class _Whole:
    """A model as a source of exports."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def materialize(self, name: str) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())


def _whole(elastic: Elastic) -> torch.nn.Module:
    """Return the network with small numbers in the place of zeros."""
    module = elastic.compile(elastic.sub_nets[0], "dense")
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            small = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data = torch.where(parameter == 0, small, parameter)
    return module


def _channels_last(module: torch.nn.Module) -> torch.nn.Module:
    return module.to(memory_format=torch.channels_last)


def _files(folder: Path, elastic: Elastic, forms: Sequence[str] = ("dense", "sliced")) -> dict[str, float]:
    """Return sizes of files in MB."""
    sizes = {"elastic file, all sub-nets": folder / "elastic.safetensors"}
    for form in forms:
        for name in elastic.sub_nets:
            if form == "dense" and name != elastic.sub_nets[0]:
                continue  # all are as large
            path = folder / f"{form}-{name}.safetensors"
            export_state_dict(elastic, name, path, form=form)
            sizes["state dict, any sub-net with zeros" if form == "dense" else f"state dict, sliced, {name}"] = path
    for path in sorted(folder.glob("*.onnx")):
        sizes[f"ONNX, {path.stem}"] = path
    return {name: path.stat().st_size / 1e6 for name, path in sizes.items()}


def tables(results: dict[str, Any]) -> list[TextTable]:
    """Return the figures of all parts."""
    found = []
    for part, measured in results["parts"].items():
        rows = tuple(
            (
                f"{row['engine']}: {row['name']}",
                f"{row['ms']:.1f}",
                f"{row['factor']:.2f}x ({row['low']:.2f}–{row['high']:.2f})",
                "" if row["at_least"] is None else f"{row['at_least']:g}x",
                "" if row["at_least"] is None else "yes" if row["factor"] >= row["at_least"] else "no",
            )
            for row in measured["rows"]
        )
        columns = (part, "ms", "times faster than the engine's best dense", "wanted", "reached")
        found.append(TextTable(title=part, columns=columns, rows=rows))
        files = tuple((name, f"{size:.1f}") for name, size in measured["files"].items())
        found.append(TextTable(title=f"{part}: files", columns=("", "MB"), rows=files))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for, beside what the JSON file has of the others."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"parts": {}}
    if args.output.exists() and set(args.parts) != set(PARTS):
        results = json.loads(args.output.read_text(encoding="utf-8"))
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for package in ("onnxruntime", "openvino", "timm"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = str(importlib.import_module(package).__version__)
    results.update({"versions": versions, "quick": args.quick, "rounds": args.rounds})
    for part in args.parts:
        print(f"Measuring: {part} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as name:
            results["parts"][part] = PARTS[part](Path(name), args)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 25; quick: 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to choose layers, each form (default: 10)")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few rounds; the figures mean nothing")
    parser.add_argument("--picture", action="store_true", help="only draw what the JSON file holds")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 25)
    if args.picture:
        results = json.loads(args.output.read_text(encoding="utf-8"))
    else:
        if os.environ.get("OMP_NUM_THREADS") != "1":
            print("Set OMP_NUM_THREADS=1: some engines ask nothing else.", file=sys.stderr)
        results = run(args)
        atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    print("\n\n".join(plain_table(table) for table in tables(results)))
    try:
        drawn = picture(results)
    except MissingExtraError as error:
        print(f"\nNo picture: {error}", file=sys.stderr)
    else:
        target = args.output.with_suffix(".svg")
        atomic_write_text(target, drawn)
        print(f"\nPicture: {target}")
    print(f"Figures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
