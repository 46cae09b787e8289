"""`ast-plugin inspect`, `report` and `export`: what can be done with an elastic file, without the network's code."""

from __future__ import annotations

import argparse
import inspect as python_source
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ast_plugin.elastic_contents import ElasticContents
from ast_plugin.elastic_file import ELASTIC, read_elastic
from ast_plugin.errors import ConfigError, StateError
from ast_plugin.export import SUFFIXES, export_state_dict
from ast_plugin.export_folder import export_folder
from ast_plugin.export_sliced import check_form, shrink, sizes_path
from ast_plugin.export_weights import INDEX, MODEL
from ast_plugin.report import Report
from ast_plugin.report_format import clean, count, decimals, grouped, percent, shape
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.sealed_file import to_json

_FILE = f"an elastic file, or a folder with one named {ELASTIC}"


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands to `commands`."""
    inspect = _command(
        commands,
        "inspect",
        "say what an elastic file holds: sub-nets, stored tensors, settings",
        "ast-plugin inspect elastic.safetensors\n"
        "  ast-plugin inspect saved-model --tensors\n"
        "  ast-plugin inspect elastic.safetensors --json | jq '.sub_nets[].name'",
    )
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("file", type=Path, metavar="FILE", help=_FILE)
    inspect.add_argument("--tensors", action="store_true", help="list every entry of the state dict too")
    inspect.add_argument("--json", action="store_true", help="print JSON instead")

    report = _command(
        commands,
        "report",
        "show the report of a run from its elastic file, or from its JSON",
        "ast-plugin report elastic.safetensors\n"
        "  ast-plugin report elastic.safetensors --html report.html\n"
        "  ast-plugin report report.json --layers",
    )
    report.set_defaults(run=run_report)
    report.add_argument("file", type=Path, metavar="FILE", help=f"{_FILE}, or a report as .json")
    report.add_argument("--layers", action="store_true", help="add the sparsity of every layer")
    report.add_argument("--html", type=Path, metavar="PATH", help="write the page with pictures there as well")
    report.add_argument("--json", action="store_true", help="print JSON instead of the table")

    export = _command(
        commands,
        "export",
        "write one sub-net as an ordinary state dict or saved model, which loads without this package",
        "ast-plugin export elastic.safetensors --sub-net s95 --to s95.safetensors\n"
        "  ast-plugin export elastic.safetensors --sub-net 2:4 --to half.pt\n"
        "  ast-plugin export saved-model --sub-net s95 --to saved-model-s95\n"
        "  ast-plugin export elastic.safetensors --sub-net c75 --form sliced --to small.safetensors",
    )
    export.set_defaults(run=run_export)
    export.add_argument("file", type=Path, metavar="FILE", help=_FILE)
    export.add_argument("--sub-net", required=True, metavar="NAME", help="which one; 'inspect' lists them")
    export.add_argument(
        "--to",
        required=True,
        type=Path,
        metavar="PATH",
        help="file to write, whose suffix (.safetensors, .pt or .pth) says how; if FILE is a folder with a saved model "
        "beside the elastic file, also a folder to write",
    )
    export.add_argument(
        "--form",
        default="dense",
        metavar="NAME",
        help="dense: with zeros (default); sliced: without the dropped units of a channel sub-net, and beside it, as "
        ".json, what became smaller",
    )
    export.add_argument(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="with --form sliced: fill the numbers of channels up to multiples of N, by channels of zeros (default: 1)",
    )
    export.add_argument("--untrained", action="store_true", help="write a sub-net that was never trained too")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what an elastic file holds."""
    contents = read_elastic(args.file)
    file = Path(contents.path)
    if args.json:
        print(json.dumps(to_json("inspect", _description(file, contents)), indent=1, allow_nan=False))
        return 0
    print(f"{clean(file)}: {count(file.stat().st_size)}B, {len(contents.sub_nets)} sub-nets of one network")
    print(f"default sub-net: {clean(contents.default_sub_net)}\n")
    print(plain_table(_sub_net_table(contents)))
    kinds = Counter(entry.kind for entry in contents.entries.values())
    print(
        f"\n{len(contents.entries)} tensors: {kinds['masked']} with masks, {kinds['private']} private to each sub-net, "
        f"{kinds['whole']} shared by all" + (f", {kinds['alias']} tied to others" if kinds["alias"] else "")
    )
    if contents.config:
        shown = ("method", "pattern", "total_steps", "correction", "inactive", "seed")
        print("settings: " + ", ".join(f"{name} {contents.config[name]}" for name in shown if name in contents.config))
    if args.tensors:
        print("\n" + plain_table(_tensor_table(contents)))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Print the report of a run, and write its page if asked to."""
    if args.html is not None:
        _check_other_file("--html", args.html, args.file)
    if args.file.suffix == ".json" and not args.file.is_dir():
        if args.file.exists() and not args.file.is_file():
            raise StateError(f"{str(args.file)!r} is no regular file; give a report.json, or an elastic file")
        try:
            values = json.loads(args.file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise StateError(
                f"{str(args.file)!r} is no JSON: {error}; give a report.json, or an elastic file"
            ) from error
        report = Report.from_dict(values)
    else:
        report = Report.from_elastic(read_elastic(args.file))
    if args.json:
        print(json.dumps(report.to_dict(), indent=1, allow_nan=False))
    else:
        print(report.render_terminal(layers=args.layers))
    if args.html is not None:
        report.write_html(args.html)
        if not args.json:
            print(f"\nReport: {args.html}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Write one sub-net as a state dict, or as a folder like the one that the model was saved in."""
    check_form(args.form, args.multiple)
    if args.file.is_dir() and args.to.suffix.lower() not in SUFFIXES:
        return _export_folder(args)
    contents = read_elastic(args.file)
    _check_other_file("--to", args.to, args.file)
    if args.file.is_dir():
        _check_outside("--to", args.to, args.file)
    export_state_dict(
        contents, args.sub_net, args.to, form=args.form, multiple=args.multiple, allow_untrained=args.untrained
    )
    if args.form == "sliced":
        return _told_sliced(args)
    kept, total = contents.records[args.sub_net].kept, contents.records[args.sub_net].total
    print(
        f"{clean(args.to)}: sub-net {clean(args.sub_net)}, {grouped(kept)} of {grouped(total)} prunable weights, "
        "the rest zeros.\nLoad it, without this package:"
    )
    print(f"  {_loading(args.to)}")
    return 0


def _told_sliced(args: argparse.Namespace) -> int:
    sizes = sizes_path(args.to)
    bytes_written = args.to.stat().st_size
    print(
        f"{clean(args.to)}: sub-net {clean(args.sub_net)} without its dropped units, {count(bytes_written)}B; "
        f"{clean(sizes)}: what became smaller.\nLoad it, without this package, with these lines:\n"
    )
    print("import json\nfrom typing import Any\n\nimport safetensors.torch\nimport torch\nfrom torch import nn\n\n")
    print(python_source.getsource(shrink) + "\n")
    print(f"with open({json.dumps(str(sizes), ensure_ascii=False)}) as file:\n    shrink(model, json.load(file))")
    print(_loading(args.to))
    return 0


def _loading(path: Path) -> str:
    file = json.dumps(str(path), ensure_ascii=False)
    if path.suffix.lower() != ".safetensors":
        return f"model.load_state_dict(torch.load({file}, weights_only=True))"
    return f"model.load_state_dict(safetensors.torch.load_file({file}))"


def _export_folder(args: argparse.Namespace) -> int:
    if args.form != "dense":
        raise ConfigError(
            f"--to {str(args.to)!r} is a folder, which stock loading takes for a whole model: the configuration in it "
            "has no words for layers of different widths; give a file to write, such as small.safetensors"
        )
    done = export_folder(args.file, args.sub_net, args.to, allow_untrained=args.untrained)
    first, *others = done.weights
    more = f" and {len(others)} more" if others else ""
    print(f"{clean(args.to)}: sub-net {clean(args.sub_net)} in {clean(first)}{more}.")
    print(f"Copied: {', '.join(map(clean, done.copied)) or 'no other file'}.")
    if done.left_out:
        print(f"Left out: {', '.join(map(clean, done.left_out))}.")
    print(
        "Load it as the dense model is loaded, without this package, for example:\n"
        f"  model = AutoModel.from_pretrained({json.dumps(str(args.to), ensure_ascii=False)})"
    )
    return 0


def _check_other_file(option: str, path: Path, source: Path) -> None:
    """Refuse to write over the file that is being read."""
    if source.is_dir():
        source /= ELASTIC
    if path.exists() and source.exists() and path.samefile(source):
        raise ConfigError(
            f"{option} {str(path)!r} is the file that is read; give another path, it would be overwritten"
        )


def _check_outside(option: str, path: Path, folder: Path) -> None:
    """Refuse to write a file of weights that stock loading would take for the dense model of a folder."""
    inside = path.parent.exists() and path.parent.samefile(folder)
    shard = path.name.startswith("model-") and path.exists()
    saved = (folder / MODEL).exists() or (folder / INDEX).exists()
    if inside and saved and (path.name == MODEL or shard):
        raise ConfigError(
            f"{option} {str(path)!r} would take the place of the dense model in that folder; give another path"
        )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _sub_net_table(contents: ElasticContents) -> TextTable:
    records = [contents.records[name] for name in contents.sub_nets]
    metrics = list(dict.fromkeys(metric for record in records for metric in record.metrics))
    columns = {
        "sub-net": [clean(record.name) for record in records],
        "pattern": [clean(record.pattern or "?") for record in records],
        "sparsity": [percent(record.sparsity) for record in records],
        "weights kept": [grouped(record.kept) for record in records],
        "of": [grouped(record.total) for record in records],
        **{clean(metric): decimals([record.metrics.get(metric) for record in records]) for metric in metrics},
    }
    return TextTable(title="Sub-nets", columns=tuple(columns), rows=tuple(zip(*columns.values(), strict=True)))


def _tensor_table(contents: ElasticContents) -> TextTable:
    return TextTable(
        title="Tensors",
        columns=("name", "shape", "dtype", "stored"),
        rows=tuple(
            (
                clean(entry.name),
                shape(entry.shape),
                entry.dtype,
                f"as {clean(entry.same_as)}" if entry.same_as is not None else _STORED[entry.kind],
            )
            for entry in contents.entries.values()
        ),
    )


_STORED = {"masked": "shared values, one mask a sub-net", "private": "one a sub-net", "whole": "once"}


def _description(path: Path, contents: ElasticContents) -> dict[str, Any]:
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "default_sub_net": contents.default_sub_net,
        "sub_nets": [
            {
                "name": record.name,
                "pattern": record.pattern,
                "target_sparsity": record.target_sparsity,
                "sparsity": record.sparsity,
                "kept": record.kept,
                "total": record.total,
                "metrics": dict(record.metrics),
            }
            for record in (contents.records[name] for name in contents.sub_nets)
        ],
        "tensors": [entry.to_dict() for entry in contents.entries.values()],
        "config": contents.config,
        "statistics": contents.statistics,
    }
