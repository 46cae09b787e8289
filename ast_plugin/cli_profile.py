"""`ast-plugin profile`: accuracy against measured latency, size and FLOPs of every sub-net and form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ast_plugin.cli_model import add_model_options, make_inputs, make_model
from ast_plugin.elastic import load
from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import ConfigError
from ast_plugin.profiles import FORMS, profile
from ast_plugin.profiles_picture import check_picture, write_picture
from ast_plugin.profiles_text import render_profile
from ast_plugin.report_format import clean
from ast_plugin.sealed_file import to_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    what = "measure latency, size and FLOPs of every sub-net and form on this machine"
    parser = commands.add_parser(
        "profile",
        help=what,
        description=f"{what[0].upper()}{what[1:]}, beside the metrics in the file.\nUnlike the other commands it needs "
        "the network's code.",
        epilog="examples:\n"
        "  ast-plugin profile elastic.safetensors --model my_networks:make --input 1x3x32x32\n"
        "  ast-plugin profile elastic.safetensors --model timm:create_model --model-argument model_name=resnet50"
        " --input 1x3x224x224 --picture profile.svg\n"
        "  ast-plugin profile saved-model --model transformers:AutoModelForCausalLM.from_pretrained"
        " --model-argument pretrained_model_name_or_path=saved-model --input input_ids=1x128:int64 --threads 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=f"an elastic file, or a folder with one named {ELASTIC}"
    )
    add_model_options(parser)
    parser.add_argument(
        "--forms", nargs="+", metavar="FORM", help=f"which ones to measure (default: {' '.join(FORMS)})"
    )
    parser.add_argument("--sub-nets", nargs="+", metavar="NAME", help="which ones to measure (default: all)")
    parser.add_argument("--metric", metavar="NAME", help="the one that the picture shows (default: the first)")
    parser.add_argument("--runs", type=int, default=20, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="calls of each before (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads for torch to use (default: its own choice)")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write the picture there: .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the picture."""
    if args.picture is not None:
        check_picture(args.picture)
    inputs = make_inputs(args.input, args.device)
    elastic = load(args.file, make_model(args.model, args.model_argument, args.device))
    if args.metric is not None and not any(args.metric in record.metrics for record in elastic.records.values()):
        known = dict.fromkeys(name for record in elastic.records.values() for name in record.metrics)
        raise ConfigError(f"--metric {args.metric!r} is not in the file; known: {', '.join(known) or 'none'}")
    found = profile(
        elastic,
        inputs,
        forms=args.forms or FORMS,
        sub_nets=args.sub_nets,
        runs=args.runs,
        warmup=args.warmup,
        num_threads=args.threads,
    )
    if args.json:
        print(json.dumps(to_json("profile", found.to_dict()), indent=1, allow_nan=False))
    else:
        print(render_profile(found))
    if args.picture is not None:
        write_picture(found, args.picture, metric=args.metric)
        if not args.json:
            print(f"\nPicture: {clean(args.picture)}")
    return 0
