"""The arguments of our own training script: a choice of timm's, under timm's names and with its defaults."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import yaml
from timm.models import is_model
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.integrations.timm.evaluation import OWN, check_metric
from ast_plugin.integrations.timm.flags import add_flags
from ast_plugin.integrations.timm.run import check_device

_logger = logging.getLogger("train")


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with timm's names and the ``--ast`` group."""
    parser = argparse.ArgumentParser(
        prog="python -m ast_plugin.integrations.timm.train",
        description="Train a timm model; with --ast-sparsities, several sparse sub-nets of it in one run.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file with arguments by name; flags are stronger")
    _add_data(parser.add_argument_group("Data"))
    _add_augmentation(parser.add_argument_group("Augmentation and loss"))
    _add_model(parser.add_argument_group("Model"))
    _add_optimizer(parser.add_argument_group("Optimizer and schedule"))
    _add_device(parser.add_argument_group("Device and precision"))
    _add_distillation(parser.add_argument_group("Distillation"))
    _add_run(parser.add_argument_group("Run"))
    add_flags(parser)
    return parser


def read_defaults(parser: argparse.ArgumentParser, path: str) -> None:
    """Take defaults from a YAML file with arguments by name; unknown names are passed over with a warning.

    Args:
        parser: The parser, whose defaults are set.
        path: The file; one that cannot be read ends the program as other mistakes on the command line do.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        parser.error(f"--config {path}: cannot be read: {reason}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: must hold arguments by name, such as 'epochs: 10'")
    known = vars(parser.parse_args([]))
    unknown = [name for name in values if name not in known and not str(name).startswith("ast_")]
    if unknown:
        _logger.warning(f"--config {path}: {', '.join(map(str, unknown))} passed over, as no argument has this name.")
    parser.set_defaults(**{str(name): value for name, value in values.items() if name not in unknown})


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is made.

    Args:
        args: Parsed; ``eval_metric`` names no sub-net any more.

    Raises:
        ConfigError: If a value is out of range, or names something that is not there.
    """
    check_device(args.device)
    check_metric(args.eval_metric, OWN)
    for name in ("epochs", "grad_accum_steps", "batch_size", "val_interval", "log_interval"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if ":" not in args.model and not is_model(args.model):
        raise ConfigError(f"--model {args.model}: timm has no such model; timm.list_models('*resnet*') lists some")
    optimizer = args.opt.lower().split("_")[-1]
    if optimizer not in list_optimizers():
        raise ConfigError(f"--opt {args.opt}: timm has no such optimizer; {near_names(optimizer, list_optimizers())}")
    if not args.dataset and not Path(args.data_dir or "").is_dir():
        raise ConfigError(f"--data-dir {args.data_dir}: there is no such folder; check the path, or name a --dataset")
    if not args.val_split:
        raise ConfigError("--val-split must name a split: this script evaluates; timm's own train.py can do without")
    for name in ("resume", "initial_checkpoint"):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: there is no such file; check the path"
            )


def _add_data(group: Any) -> None:
    group.add_argument("data", nargs="?", metavar="DIR", help="folder of the data set, as --data-dir")
    group.add_argument("--data-dir", metavar="DIR")
    group.add_argument(
        "--dataset", default="", metavar="NAME", help="timm's name: torch/cifar10, hfds/..., '' a folder"
    )
    group.add_argument("--dataset-download", action="store_true")
    group.add_argument("--class-map", default="", metavar="FILE")
    group.add_argument("--train-split", default="train", metavar="NAME")
    group.add_argument("--val-split", default="validation", metavar="NAME")
    group.add_argument("--input-key", metavar="NAME", help="of pictures, in data sets with named fields")
    group.add_argument("--target-key", metavar="NAME")
    group.add_argument("--img-size", type=int, metavar="N")
    group.add_argument("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    group.add_argument("--in-chans", type=int, metavar="N")
    group.add_argument("--crop-pct", type=float, metavar="F")
    group.add_argument("--mean", type=float, nargs="+", metavar="F")
    group.add_argument("--std", type=float, nargs="+", metavar="F")
    group.add_argument("--interpolation", default="", metavar="NAME")
    group.add_argument("-b", "--batch-size", type=int, default=128, metavar="N", help="of each process")
    group.add_argument("-vb", "--validation-batch-size", type=int, metavar="N")
    group.add_argument("-j", "--workers", type=int, default=4, metavar="N")
    group.add_argument("--pin-mem", action="store_true")
    group.add_argument("--no-prefetcher", action="store_true")


def _add_augmentation(group: Any) -> None:
    group.add_argument("--no-aug", action="store_true")
    group.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="F")
    group.add_argument("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="F")
    group.add_argument("--hflip", type=float, default=0.5, metavar="F")
    group.add_argument("--vflip", type=float, default=0.0, metavar="F")
    group.add_argument("--color-jitter", type=float, default=0.4, metavar="F")
    group.add_argument("--aa", metavar="POLICY", help="auto-augmentation")
    group.add_argument("--reprob", type=float, default=0.0, metavar="F", help="random erasing")
    group.add_argument("--mixup", type=float, default=0.0, metavar="F")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="F")
    group.add_argument("--mixup-prob", type=float, default=1.0, metavar="F")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, metavar="F")
    group.add_argument("--mixup-mode", default="batch", metavar="MODE")
    group.add_argument("--mixup-off-epoch", type=int, default=0, metavar="N")
    group.add_argument("--smoothing", type=float, default=0.1, metavar="F")


def _add_model(group: Any) -> None:
    group.add_argument("--model", default="resnet50", metavar="NAME")
    group.add_argument("--pretrained", action="store_true")
    group.add_argument("--initial-checkpoint", default="", metavar="FILE", help="weights to start from")
    group.add_argument("--resume", default="", metavar="FILE", help="a checkpoint of an earlier run, ours or timm's")
    group.add_argument("--no-resume-opt", action="store_true", help="do not resume the optimizer's state")
    group.add_argument("--num-classes", type=int, metavar="N")
    group.add_argument("--drop", type=float, default=0.0, metavar="F")
    group.add_argument("--drop-path", type=float, metavar="F")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")
    group.add_argument("--sync-bn", action="store_true", help="synchronised BatchNorm, on GPUs")
    group.add_argument(
        "--dist-bn", default="reduce", metavar="RULE", help="statistics after an epoch: reduce, broadcast"
    )
    group.add_argument("--model-ema", action="store_true", help="keep a moving average of the weights, and evaluate it")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, metavar="F")
    group.add_argument("--model-ema-warmup", action="store_true")


def _add_optimizer(group: Any) -> None:
    group.add_argument("--opt", default="sgd", metavar="NAME")
    group.add_argument("--opt-eps", type=float, metavar="F")
    group.add_argument("--opt-betas", type=float, nargs="+", metavar="F")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")
    group.add_argument("--momentum", type=float, default=0.9, metavar="F")
    group.add_argument("--weight-decay", type=float, default=2e-5, metavar="F")
    group.add_argument("--layer-decay", type=float, metavar="F")
    group.add_argument("--clip-grad", type=float, metavar="F")
    group.add_argument("--clip-mode", default="norm", choices=("norm", "value", "agc"))
    group.add_argument("--sched", default="cosine", metavar="NAME")
    group.add_argument("--sched-on-updates", action="store_true", help="at every update, not every epoch")
    group.add_argument("--lr", type=float, metavar="F", help="learning rate; overrides --lr-base")
    group.add_argument("--lr-base", type=float, default=0.1, metavar="F", help="for --lr-base-size pictures a step")
    group.add_argument("--lr-base-size", type=int, default=256, metavar="N")
    group.add_argument("--lr-base-scale", default="", choices=("", "linear", "sqrt"))
    group.add_argument("--min-lr", type=float, default=0.0, metavar="F")
    group.add_argument("--warmup-lr", type=float, default=1e-5, metavar="F")
    group.add_argument("--warmup-epochs", type=int, default=5, metavar="N")
    group.add_argument("--warmup-prefix", action="store_true")
    group.add_argument("--cooldown-epochs", type=int, default=0, metavar="N")
    group.add_argument("--decay-epochs", type=float, default=90, metavar="N")
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], metavar="N")
    group.add_argument("--decay-rate", "--dr", type=float, default=0.1, metavar="F")
    group.add_argument("--patience-epochs", type=int, default=10, metavar="N")
    group.add_argument("--epochs", type=int, default=300, metavar="N")
    group.add_argument("--start-epoch", type=int, metavar="N")
    group.add_argument("--grad-accum-steps", type=int, default=1, metavar="N")


def _add_device(group: Any) -> None:
    group.add_argument("--device", default="cuda", metavar="NAME")
    group.add_argument("--amp", action="store_true")
    group.add_argument("--amp-dtype", default="float16", choices=("float16", "bfloat16"))
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--grad-checkpointing", action="store_true")
    group.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND")
    group.add_argument("--torchcompile-mode", metavar="MODE")


def _add_distillation(group: Any) -> None:
    group.add_argument("--kd-model-name", metavar="NAME", help="a pretrained teacher")
    group.add_argument("--kd-distill-type", default="logit", choices=("logit", "feature"))
    group.add_argument("--kd-temperature", type=float, default=4.0, metavar="F")
    group.add_argument("--distill-loss-weight", type=float, metavar="F")
    group.add_argument("--task-loss-weight", type=float, metavar="F")


def _add_run(group: Any) -> None:
    group.add_argument("--seed", type=int, default=42, metavar="N")
    group.add_argument("--log-interval", type=int, default=50, metavar="N", help="updates between two lines of the log")
    group.add_argument("--val-interval", type=int, default=1, metavar="N", help="epochs between evaluations")
    group.add_argument("--checkpoint-hist", type=int, default=10, metavar="N", help="checkpoints to keep")
    group.add_argument("--recovery-interval", type=int, default=0, metavar="N", help="updates between recovery files")
    group.add_argument("--output", default="", metavar="DIR", help="default: ./output/train")
    group.add_argument("--experiment", default="", metavar="NAME", help="folder within it; default: time and model")
    group.add_argument(
        "--eval-metric", default="top1", metavar="NAME", help="of the best checkpoint: top1, s95_top1, loss"
    )
