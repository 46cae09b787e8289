"""`ast-plugin demo`: the options of the main job."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ast_plugin.demo import DEFAULT_OUTPUT, run_demo
from ast_plugin.demo_data import TRAIN_IMAGES
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import is_n_of_m

_DESCRIPTION = """\
Train a small residual network on scikit-learn's handwritten digits (real images, augmented), so that one run
yields several sparse networks. At the end: a table, a file with all of them, and a report to open in a browser.
Takes one to two minutes on one core.
"""

_EPILOG = """\
examples:
  ast-plugin demo
  ast-plugin demo --sparsities 0.5 0.9 2:4 --output mixed
  ast-plugin demo --method rigl --distribution erk --seed 3
  ast-plugin demo --correction off --inactive freeze
  ast-plugin demo --resume                 go on after Ctrl-C, to the bit as if nothing had happened

Files in the output folder: elastic.safetensors (all sub-nets), report.html, report.json, checkpoint.pt (for --resume).
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "demo",
        help="train sparse sub-nets on real images, then show table, report and elastic file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # An option that was not given leaves no trace: --resume must tell it from one that repeats the default.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    default = DemoSettings()
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--sparsities",
        nargs="+",
        type=sparsity,
        metavar="S",
        help="one a sub-net: a fraction of zeros in [0, 1), or N:M such as 2:4 (default: 0.9 0.95 0.98)",
    )
    add("--steps", type=int, metavar="N", help=f"optimizer steps of the whole run (default: {default.steps})")
    add("--seed", type=int, metavar="N", help=f"seed of weights, data order and masks (default: {default.seed})")
    add = parser.add_argument_group("how").add_argument
    add(
        "--method",
        metavar="NAME",
        help="rule for mask updates: granet, gmp, rigl, set, static, or a plugin's; "
        f"'ast-plugin plugins' lists them (default: {default.method})",
    )
    add(
        "--pattern",
        metavar="NAME",
        help=f"which masks are allowed: unstructured, N:M, RxC blocks, channel (default: {default.pattern})",
    )
    add(
        "--distribution",
        metavar="NAME",
        help="how a sparsity is spread over the layers: uniform, erk, global (default: the method's)",
    )
    add(
        "--alternation",
        metavar="NAME",
        help="which sub-net trains at a step: alternating, random, single_path, fixed:NAME "
        f"(default: {default.alternation})",
    )
    add(
        "--correction",
        choices=("layer", "global", "off"),
        help="keep a gradient from opposing the previous sub-net's: per layer, over all layers together, or not "
        f"(default: {default.correction})",
    )
    add(
        "--inactive",
        choices=("coast", "freeze"),
        help="weights outside the active mask: moved by momentum and weight decay, or left alone "
        f"(default: {default.inactive})",
    )
    add(
        "--drop-fraction",
        type=float,
        metavar="F",
        help="share of the kept weights that the first mask update replaces, in [0, 1) "
        f"(default: {default.drop_fraction})",
    )
    add(
        "--update-interval",
        type=moment,
        metavar="N",
        help="between two mask updates of a sub-net: steps (90) or a fraction of them (0.05) "
        f"(default: {default.update_interval})",
    )
    add(
        "--end-step",
        type=moment,
        metavar="N",
        help="when the sparsities are reached and the masks final: a step (900) or a fraction (0.5) "
        f"(default: {default.end_step})",
    )
    add = parser.add_argument_group("network and optimizer").add_argument
    add("--width", type=int, metavar="N", help=f"channels of the first stage (default: {default.width})")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images a step, at most {TRAIN_IMAGES} (default: {default.batch_size})",
    )
    add(
        "--learning-rate",
        type=float,
        metavar="R",
        help=f"at the start; it falls to zero along a cosine (default: {default.learning_rate})",
    )
    add("--weight-decay", type=float, metavar="R", help=f"on all parameters (default: {default.weight_decay})")
    add("--threads", type=int, metavar="N", help=f"threads that compute (default: {default.threads})")
    add = parser.add_argument_group("where").add_argument
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help=f"folder (default: {DEFAULT_OUTPUT})")
    add(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the interrupted run in the output folder; its options need not be repeated",
    )
    add(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between two writings of the state; Ctrl-C writes it in any case (default: 100)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo as the command line says."""
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    try:
        run_demo(
            DemoSettings(**given),
            output=args.output,
            resume=args.resume,
            given=frozenset(given),
            checkpoint_every=args.checkpoint_every,
        )
    except ConfigError as error:
        raise ConfigError(in_options(str(error))) from error
    return 0


def in_options(message: str) -> str:
    """Return a message about settings in the words of the command line: ``--drop-fraction`` for ``drop_fraction``.

    Args:
        message: What an error says. One-word settings are found at its beginning only: elsewhere they may be English.
    """
    message = message.replace(", exclude layers, or set allow_empty_layers=True", "")  # the demo has no such options
    message = message.replace(", or give one of them a name of its own with SubNetSpec(name=..., sparsity=...)", "")
    message = re.sub(r"\btotal_steps\b", "--steps", message)
    for name in (*_SETTINGS, "checkpoint_every"):
        found = rf"\b{name}\b" if "_" in name else rf"^{name}\b"
        message = re.sub(found, f"--{name.replace('_', '-')}", message)
    return message


def sparsity(text: str) -> float | str:
    """Return a sparsity as a number, or an ``N:M`` string as it is; its range is checked later."""
    if is_n_of_m(text):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a fraction of zeros such as 0.95 nor a pattern such as 2:4"
        ) from None


def moment(text: str) -> int | float:
    """Return a count of steps (``60``) as an int and a fraction (``0.05``) as a float."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of steps such as 90 nor a fraction such as 0.05"
        ) from None


_SETTINGS = frozenset(DemoSettings().to_dict())
