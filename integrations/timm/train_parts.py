"""What our own training script is made of, from timm's factories: data, loss, task, output folder."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import safe_model_name
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import get_outdir, is_primary
from torch import nn

from ast_plugin.errors import ConfigError


def build_loaders(
    args: argparse.Namespace, data_config: dict[str, Any], device: torch.device
) -> tuple[Any, Any, Mixup | None]:
    """Return the loaders of training and evaluation, and what mixes a batch if the loader does not do it itself.

    Args:
        args: The arguments.
        data_config: What `timm.data.resolve_data_config` returned.
        device: Where batches go.
    """
    datasets = [
        create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode="RGB" if data_config["input_size"][0] == 3 else "L",
            input_key=args.input_key,
            target_key=args.target_key,
        )
        for split, training in ((args.train_split, True), (args.val_split, False))
    ]
    common = {
        "input_size": data_config["input_size"],
        "interpolation": data_config["interpolation"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": args.pin_mem,
        "distributed": args.distributed,
        "use_prefetcher": not args.no_prefetcher,
        "device": device,
    }
    collate, mixup = _mixing(args)
    train = create_loader(
        datasets[0],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        re_prob=args.reprob,
        collate_fn=collate,
        **common,
    )
    evaluation = create_loader(
        datasets[1],
        batch_size=args.validation_batch_size or args.batch_size,
        crop_pct=data_config["crop_pct"],
        **common,
    )
    return train, evaluation, mixup


def _mixing(args: argparse.Namespace) -> tuple[FastCollateMixup | None, Mixup | None]:
    if not is_mixing(args):
        return None, None
    kind = Mixup if args.no_prefetcher else FastCollateMixup
    mixing = kind(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    return (None, mixing) if args.no_prefetcher else (mixing, None)


def is_mixing(args: argparse.Namespace) -> bool:
    """Return whether pictures of a batch are mixed, and so are their labels."""
    return bool(args.mixup > 0 or args.cutmix > 0)


def build_task(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Any:
    """Return timm's task: the model with its loss, and with a teacher where one is named."""
    if is_mixing(args):
        loss: nn.Module = SoftTargetCrossEntropy()
    elif args.smoothing:
        loss = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    shared = {"criterion": loss.to(device), "device": device, "verbose": is_primary(args)}
    if args.kd_model_name is None:
        return ClassificationTask(model=model, **shared)
    shared |= {
        "student_model": model,
        "teacher_model": args.kd_model_name,
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
    }
    if args.kd_distill_type == "feature":
        return FeatureDistillationTask(**shared)
    return LogitDistillationTask(temperature=args.kd_temperature, **shared)


def scaled_rate(args: argparse.Namespace) -> float:
    """Return ``--lr-base`` for the number of pictures that one step sees."""
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return float(args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def output_folder(args: argparse.Namespace, data_config: dict[str, Any], args_text: str) -> Path:
    """Make the folder of a run, with its arguments as ``args.yaml``, and return it.

    Raises:
        ConfigError: If it cannot be written.
    """
    name = args.experiment or "-".join(
        [datetime.now().strftime("%Y%m%d-%H%M%S"), safe_model_name(args.model), str(data_config["input_size"][-1])]
    )
    place = args.output or os.path.join("output", "train")
    try:
        folder = Path(get_outdir(place, name))
        (folder / "args.yaml").write_text(args_text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {place}: cannot be written: {error.strerror}; choose another folder") from error
    return folder
