"""A training script of the shape of timm's newest ones, written for the tests of the launcher: their names alone count.

Every epoch is seeded by its number, so that a resumed run draws the batches that an uninterrupted one does.
"""

import argparse
import contextlib
import logging
import os
from collections import OrderedDict
from functools import partial

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from torch import nn

_logger = logging.getLogger("train")


def make_parser():
    parser = argparse.ArgumentParser(description="a training script")
    parser.add_argument("data", nargs="?", default=None)
    parser.add_argument("--data-dir")
    for name in ("--model", "--opt", "--sched", "--device", "--output", "--experiment", "--eval-metric"):
        parser.add_argument(name, type=str, default="")
    for name in ("--resume", "--initial-checkpoint", "--kd-model-name", "--dist-bn", "--torchcompile", "--amp-dtype"):
        parser.add_argument(name, type=str, default="")
    for name in ("--num-classes", "--img-size", "--epochs", "--warmup-epochs", "--log-interval", "--checkpoint-hist"):
        parser.add_argument(name, type=int, default=0)
    for name in ("--momentum", "--weight-decay", "--model-ema-decay"):
        parser.add_argument(name, type=float, default=0.9)
    for name in ("--no-resume-opt", "--model-ema", "--no-aug", "--torchscript", "--amp", "--channels-last"):
        parser.add_argument(name, action="store_true", default=False)
    for name in ("--grad-checkpointing", "--sched-on-updates"):
        parser.add_argument(name, action="store_true", default=False)
    parser.add_argument("--clip-mode", default="norm")
    parser.add_argument("--clip-grad", type=float, default=None)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--val-interval", type=int, default=1)
    parser.add_argument("--kd-distill-type", default="logit")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-j", "--workers", type=int, default=4)
    parser.set_defaults(opt="sgd", sched="cosine", device="cuda", eval_metric="top1", weight_decay=2e-5)
    parser.set_defaults(dist_bn="reduce", amp_dtype="float16", checkpoint_hist=10)
    return parser


config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = make_parser()


def parse(first, second):
    given, remaining = first.parse_known_args()
    if given.config:
        with open(given.config, encoding="utf-8") as file:
            second.set_defaults(**yaml.safe_load(file))
    args = second.parse_args(remaining)
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def _parse_args():
    return parse(config_parser, parser)


def make_network(args, device):
    model = create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.initial_checkpoint)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    model.to(device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_loaders(args, model, device):
    config = resolve_data_config(vars(args), model=model)
    for split, training in (("train", True), ("validation", False)):
        yield create_loader(
            create_dataset("", root=args.data_dir or args.data, split=split, is_training=training),
            input_size=config["input_size"],
            batch_size=args.batch_size,
            is_training=training,
            no_aug=args.no_aug,
            mean=config["mean"],
            std=config["std"],
            crop_pct=None if training else config["crop_pct"],
            interpolation=config["interpolation"],
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            distributed=args.distributed,
            device=device,
        )


def make_autocast(args, device):
    if not args.amp:
        return contextlib.nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def make_output(args, args_text):
    if not utils.is_primary(args):
        return None
    folder = utils.get_outdir(args.output, args.experiment)
    with open(os.path.join(folder, "args.yaml"), "w", encoding="utf-8") as file:
        file.write(args_text)
    return folder


def make_task(args, model, device):
    criterion = nn.CrossEntropyLoss()
    if not args.kd_model_name:
        return ClassificationTask(model=model, criterion=criterion, device=device)
    kind = FeatureDistillationTask if args.kd_distill_type == "feature" else LogitDistillationTask
    return kind(student_model=model, teacher_model=args.kd_model_name, criterion=criterion, device=device)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = make_network(args, device)
    loader_train, loader_eval = make_loaders(args, model, device)
    task = make_task(args, model, device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    start_epoch = 0
    if args.resume:
        start_epoch = (
            resume_task_checkpoint(
                task, args.resume, optimizer=None if args.no_resume_opt else optimizer, log_info=utils.is_primary(args)
            )
            or 0
        )
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    model, eval_model = task.get_trainable_module(), task.get_eval_model()
    output_dir = make_output(args, args_text)
    saver = best_metric = None
    if output_dir is not None:
        saver = utils.CheckpointSaver(
            model=model,
            optimizer=optimizer,
            args=args,
            checkpoint_dir=output_dir,
            recovery_dir=output_dir,
            decreasing=args.eval_metric == "loss",
            max_history=args.checkpoint_hist,
            task=task,
        )
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    if start_epoch:
        done = start_epoch * updates_per_epoch if args.sched_on_updates else start_epoch
        (lr_scheduler.step_update if args.sched_on_updates else lr_scheduler.step)(done)
    autocast = make_autocast(args, device)
    for epoch in range(start_epoch, num_epochs):
        utils.random_seed(args.seed + epoch, args.rank)
        if args.distributed:
            loader_train.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(
            epoch,
            model,
            loader_train,
            optimizer,
            args,
            task=task,
            device=device,
            lr_scheduler=lr_scheduler,
            saver=saver,
            output_dir=output_dir,
            amp_autocast=autocast,
            num_updates_total=num_epochs * updates_per_epoch,
        )
        if args.distributed and args.dist_bn:
            utils.distribute_bn(model, args.world_size, args.dist_bn == "reduce")
        if (epoch + 1) % args.val_interval and epoch + 1 < num_epochs:
            lr_scheduler.step(epoch + 1, metric=None)
            continue
        loss_fn = nn.CrossEntropyLoss()
        eval_metrics = validate(eval_model, loader_eval, loss_fn, args, device=device, amp_autocast=autocast)
        if task.has_ema():
            if args.distributed and args.dist_bn:
                utils.distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == "reduce")
            eval_metrics = validate(
                task.get_eval_model(ema=True),
                loader_eval,
                loss_fn,
                args,
                device=device,
                amp_autocast=autocast,
                log_suffix=" (EMA)",
            )
        if saver is not None:
            rates = [group["lr"] for group in optimizer.param_groups]
            utils.update_summary(
                epoch,
                train_metrics,
                eval_metrics,
                filename=os.path.join(output_dir, "summary.csv"),
                lr=sum(rates) / len(rates),
                write_header=best_metric is None,
            )
            best_metric, _ = saver.save_checkpoint(epoch, metric=eval_metrics[args.eval_metric])
        lr_scheduler.step(epoch + 1, eval_metrics[args.eval_metric])
    if args.distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    args,
    task=None,
    device=None,
    lr_scheduler=None,
    saver=None,
    output_dir=None,
    amp_autocast=contextlib.nullcontext,
    num_updates_total=None,
):
    task.get_trainable_module().train()
    losses = utils.AverageMeter()
    batches, accumulated = len(loader), args.grad_accum_steps
    updates = epoch * -(-batches // accumulated)
    rest = batches % accumulated
    optimizer.zero_grad()
    for index, (pictures, labels) in enumerate(loader):
        last = index + 1 == batches
        share = rest if rest and index >= batches - rest else accumulated
        if args.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            loss = task(pictures, labels)["loss"] / share
        loss.backward()
        losses.update(loss.item() * share, pictures.size(0))
        if not last and (index + 1) % accumulated:
            continue
        if args.clip_grad is not None:
            parameters = task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()
        updates += 1
        optimizer.zero_grad()
        task.update_ema(step=updates)
        lr_scheduler.step_update(num_updates=updates, metric=losses.avg)
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    return OrderedDict(loss=losses.avg)


def validate(
    model,
    loader,
    loss_fn,
    args,
    device=None,
    amp_autocast=contextlib.nullcontext,
    model_dtype=None,
    log_suffix="",
):
    meters = OrderedDict((name, utils.AverageMeter()) for name in ("loss", "top1", "top5"))
    model.eval()
    with torch.inference_mode():
        for pictures, labels in loader:
            with amp_autocast():
                output = model(pictures)
                loss = loss_fn(output, labels)
            for meter, figure in zip(meters.values(), (loss, *utils.accuracy(output, labels, (1, 5))), strict=True):
                figure = utils.reduce_tensor(figure, args.world_size) if args.distributed else figure
                meter.update(figure.item(), labels.size(0))
    metrics = OrderedDict((name, meter.avg) for name, meter in meters.items())
    _logger.info(f"Test{log_suffix}: {dict(metrics)}")
    return metrics


if __name__ == "__main__":
    main()
