"""A compact training script of timm's public pieces, with sub-nets: ``python -m ast_plugin.integrations.timm.train``.

Arguments have timm's names. Runs on CPU and CUDA, in one process and under torchrun, and needs timm 1.0.27 or newer.
What sub-nets need stands in five places, each of which mentions ``sub_nets``; the rest is a plain training script.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import yaml
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

from ast_plugin.errors import ASTError
from ast_plugin.integrations.timm.cpu_ddp import data_parallel_on_cpu
from ast_plugin.integrations.timm.flags import settings_of
from ast_plugin.integrations.timm.run import TimmRun
from ast_plugin.integrations.timm.state import explained
from ast_plugin.integrations.timm.train_arguments import build_parser, check_arguments, read_defaults
from ast_plugin.integrations.timm.train_parts import build_loaders, build_task, output_folder, scaled_rate

_logger = logging.getLogger("train")


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, str]:
    """Return the arguments, flags before those of ``--config``, and all of them as YAML."""
    parser = build_parser()
    config = parser.parse_known_args(arguments)[0].config
    if config:
        read_defaults(parser, config)
    args = parser.parse_args(arguments)
    args.data_dir = args.data_dir or args.data
    return args, yaml.safe_dump(vars(args), default_flow_style=False)


def train(args: argparse.Namespace, args_text: str = "") -> OrderedDict[str, float] | None:
    """Train, and return the metrics of the last evaluation.

    Args:
        args: What `parse_arguments` returned.
        args_text: The same as YAML, for ``args.yaml``.
    """
    settings = settings_of(args)
    sub_nets = None if settings is None else TimmRun(settings, args)  # 1: checks the flags
    check_arguments(args)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint_path=args.initial_checkpoint,
        num_classes=args.num_classes,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    )
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config(vars(args), model=model, verbose=utils.is_primary(args))
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.distributed and args.sync_bn:
        args.dist_bn = ""
        model = convert_sync_batchnorm(model)
    train_loader, eval_loader, mixup = build_loaders(args, data_config, device)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)

    task = build_task(model, args, device)
    args.lr = args.lr or scaled_rate(args)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    if sub_nets is not None:
        sub_nets.check(optimizer, model)  # 2: finds mistakes before training
    loss_scaler = utils.NativeScaler(device=device.type) if _needs_scaler(args, device) else None
    start_epoch = _resume(task, optimizer, loss_scaler, args) if args.resume else 0
    start_epoch = start_epoch if args.start_epoch is None else args.start_epoch
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])

    metric = args.eval_metric
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=metric == "loss"), updates_per_epoch=updates_per_epoch
    )
    if start_epoch and scheduler is not None:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
    folder = output_folder(args, data_config, args_text) if utils.is_primary(args) else None
    saver = None
    if folder is not None:
        saver = utils.CheckpointSaver(
            model=task.get_trainable_module(),
            optimizer=optimizer,
            args=args,
            amp_scaler=loss_scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=metric == "loss",
            max_history=args.checkpoint_hist,
            task=task,
        )
    if sub_nets is not None and start_epoch < epochs:
        sub_nets.begin(  # 3: from here on, steps train sub-nets in turn
            task.get_trainable_module(),
            optimizer,
            total_steps=epochs * updates_per_epoch,
            steps_per_epoch=updates_per_epoch,
            epoch=start_epoch,
            task=task,
            average=task.get_trainable_module(ema=True),
            saver=saver,
            output_dir=folder,
        )
    amp = (
        partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype))
        if args.amp
        else contextlib.nullcontext
    )
    epoch_of = train_one_epoch if sub_nets is None else partial(sub_nets.train, train_one_epoch)
    evaluate = validate if sub_nets is None else partial(sub_nets.validate, validate)  # 4: metrics of every sub-net
    metrics: OrderedDict[str, float] | None = None
    try:
        for epoch in range(start_epoch, epochs):
            if args.distributed:
                train_loader.sampler.set_epoch(epoch)
            if mixup is not None or getattr(train_loader, "mixup_enabled", False):
                _end_mixing(train_loader, mixup, args, epoch)
            found = epoch_of(
                epoch,
                task,
                train_loader,
                optimizer,
                args,
                device=device,
                scheduler=scheduler,
                saver=saver,
                amp=amp,
                loss_scaler=loss_scaler,
                mixup=mixup,
            )
            if args.distributed and args.dist_bn in ("broadcast", "reduce"):
                utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == "reduce")
            if (epoch + 1) % args.val_interval and epoch + 1 < epochs:
                if scheduler is not None:
                    scheduler.step(epoch + 1, metric=None)
                continue
            metrics = evaluate(task.get_eval_model(), eval_loader, args, device=device, amp=amp)
            if task.has_ema():
                average = task.get_trainable_module(ema=True)
                if args.distributed and args.dist_bn in ("broadcast", "reduce"):
                    utils.distribute_bn(average, args.world_size, args.dist_bn == "reduce")
                metrics = evaluate(
                    task.get_eval_model(ema=True), eval_loader, args, device=device, amp=amp, log_suffix=" (EMA)"
                )
            if folder is not None and saver is not None:
                rates = [group["lr"] for group in optimizer.param_groups]
                summary = folder / "summary.csv"
                utils.update_summary(
                    epoch,
                    found,
                    metrics,
                    filename=str(summary),
                    lr=sum(rates) / len(rates),
                    write_header=not summary.exists(),
                )
                saver.save_checkpoint(epoch, metric=metrics[metric])
            if scheduler is not None:
                scheduler.step(epoch + 1, metrics[metric])
        interrupted = False
    except KeyboardInterrupt:
        _logger.warning("Interrupted: what was trained so far is written.")
        interrupted = True
    if sub_nets is not None:
        sub_nets.finish()  # 5: elastic.safetensors, report.html, ast.json
    if args.distributed:
        if not interrupted:  # a rank that ends badly would take the first one along, which is still writing
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return metrics


def train_one_epoch(
    epoch: int,
    task: Any,
    loader: Any,
    optimizer: Any,
    args: argparse.Namespace,
    *,
    device: torch.device,
    scheduler: Any = None,
    saver: Any = None,
    amp: Callable[[], Any] = contextlib.nullcontext,
    loss_scaler: Any = None,
    mixup: Any = None,
) -> OrderedDict[str, float]:
    """Train for one epoch and return the mean loss."""
    losses = utils.AverageMeter()
    trained = task.get_trainable_module()
    trained.train()
    batches, accumulate = len(loader), args.grad_accum_steps
    updates = -(-batches // accumulate)
    rest = batches % accumulate  # the last update may have fewer batches
    began = time.monotonic()
    optimizer.zero_grad()
    for index, (pictures, labels) in enumerate(loader):
        is_update = (index + 1) % accumulate == 0 or index + 1 == batches
        share = rest if rest and index >= batches - rest else accumulate
        if args.no_prefetcher:
            pictures, labels = pictures.to(device), labels.to(device)
            if mixup is not None:
                pictures, labels = mixup(pictures, labels)
        if args.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        with contextlib.nullcontext() if is_update else task.no_sync():
            with amp():
                loss = task(pictures, labels)["loss"] / share
            clipped = task.get_clip_parameters(exclude_head=args.clip_mode == "agc") if args.clip_grad else None
            if loss_scaler is not None:
                loss_scaler(
                    loss,
                    optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=clipped,
                    need_update=is_update,
                )
            else:
                loss.backward()
                if is_update:
                    if clipped is not None:
                        utils.dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        losses.update(loss.item() * share, pictures.size(0))
        if not is_update:
            continue
        update = index // accumulate
        done = epoch * updates + update + 1
        optimizer.zero_grad()
        task.update_ema(step=done)
        if utils.is_primary(args) and (update % args.log_interval == 0 or update + 1 == updates):
            rate = optimizer.param_groups[0]["lr"]
            seconds = (time.monotonic() - began) / (update + 1)
            _logger.info(
                f"Train: {epoch} [{update + 1}/{updates}]  Loss: {losses.val:.4g} ({losses.avg:.4g})  "
                f"Time: {seconds:.3f} s  LR: {rate:.3e}"
            )
        if saver is not None and args.recovery_interval and (update + 1) % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=update)
        if scheduler is not None:
            scheduler.step_update(num_updates=done, metric=losses.avg)
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    mean = torch.tensor([losses.avg], device=device)
    return OrderedDict(loss=(utils.reduce_tensor(mean, args.world_size) if args.distributed else mean).item())


def validate(
    model: nn.Module,
    loader: Any,
    args: argparse.Namespace,
    *,
    device: torch.device,
    amp: Callable[[], Any] = contextlib.nullcontext,
    log_suffix: str = "",
) -> OrderedDict[str, float]:
    """Return loss, top-1 and top-5 accuracy (in %) of a model."""
    meters = OrderedDict((name, utils.AverageMeter()) for name in ("loss", "top1", "top5"))
    model.eval()
    with torch.inference_mode():
        for pictures, labels in loader:
            if args.no_prefetcher:
                pictures, labels = pictures.to(device), labels.to(device)
            if args.channels_last:
                pictures = pictures.contiguous(memory_format=torch.channels_last)
            with amp():
                output = model(pictures)
                output = output[0] if isinstance(output, (tuple, list)) else output
                loss = nn.functional.cross_entropy(output, labels)
            found = [loss, *utils.accuracy(output, labels, topk=(1, 5))]
            for meter, figure in zip(meters.values(), found, strict=True):
                figure = utils.reduce_tensor(figure, args.world_size) if args.distributed else figure
                meter.update(figure.item(), labels.size(0))
    metrics = OrderedDict((name, meter.avg) for name, meter in meters.items())
    if utils.is_primary(args):
        _logger.info(f"Test{log_suffix}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics


def _needs_scaler(args: argparse.Namespace, device: torch.device) -> bool:
    return bool(args.amp) and device.type == "cuda" and args.amp_dtype == "float16"


def _resume(task: Any, optimizer: Any, loss_scaler: Any, args: argparse.Namespace) -> int:
    """Load a checkpoint and return the epoch to go on with."""
    with explained(args.resume, args):
        epoch = resume_task_checkpoint(
            task,
            args.resume,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else loss_scaler,
            log_info=utils.is_primary(args),
        )
    return epoch or 0


def _end_mixing(loader: Any, mixup: Any, args: argparse.Namespace, epoch: int) -> None:
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if mixup is not None:
            mixup.mixup_enabled = False
        else:
            loader.mixup_enabled = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 after an error in what was asked for."""
    utils.setup_default_logging()
    try:
        with data_parallel_on_cpu():
            train(*parse_arguments(arguments))
    except ASTError as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
