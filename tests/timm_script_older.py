"""A training script of the shape of timm's older ones, without tasks: written for the tests of the launcher."""

import argparse
import contextlib
import os
from collections import OrderedDict

import torch
from timm import utils
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm_script import make_loaders, make_network, make_output, make_parser, parse, validate
from torch import nn

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = make_parser()


def _parse_args():
    return parse(config_parser, parser)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = make_network(args, device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    start_epoch = 0
    if args.resume:
        start_epoch = resume_checkpoint(model, args.resume, optimizer=None if args.no_resume_opt else optimizer) or 0
    model_ema = None
    if args.model_ema:
        model_ema = utils.ModelEmaV3(model, decay=args.model_ema_decay)
        if args.resume:
            load_checkpoint(model_ema.module, args.resume, use_ema=True)
    loader_train, loader_eval = make_loaders(args, model, device)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
        if model_ema is not None:
            model_ema = torch.compile(model_ema, backend=args.torchcompile)
    output_dir = make_output(args, args_text)
    saver = utils.CheckpointSaver(
        model=model,
        optimizer=optimizer,
        args=args,
        model_ema=model_ema,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        decreasing=args.eval_metric == "loss",
        max_history=args.checkpoint_hist,
    )
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loader_train)
    )
    if start_epoch:
        lr_scheduler.step(start_epoch)
    best_metric = None
    for epoch in range(start_epoch, num_epochs):
        utils.random_seed(args.seed + epoch, args.rank)
        train_metrics = train_one_epoch(
            epoch,
            model,
            loader_train,
            optimizer,
            nn.CrossEntropyLoss(),
            args,
            device=device,
            lr_scheduler=lr_scheduler,
            saver=saver,
            output_dir=output_dir,
            model_ema=model_ema,
            num_updates_total=num_epochs * len(loader_train),
        )
        eval_metrics = validate(model, loader_eval, nn.CrossEntropyLoss(), args, device=device)
        if model_ema is not None:
            eval_metrics = validate(
                model_ema, loader_eval, nn.CrossEntropyLoss(), args, device=device, log_suffix=" (EMA)"
            )
        utils.update_summary(
            epoch,
            train_metrics,
            eval_metrics,
            filename=os.path.join(output_dir, "summary.csv"),
            lr=optimizer.param_groups[0]["lr"],
            write_header=best_metric is None,
        )
        best_metric, _ = saver.save_checkpoint(epoch, metric=eval_metrics[args.eval_metric])
        lr_scheduler.step(epoch + 1, eval_metrics[args.eval_metric])


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    loss_fn,
    args,
    device=None,
    lr_scheduler=None,
    saver=None,
    output_dir=None,
    amp_autocast=contextlib.nullcontext,
    model_ema=None,
    num_updates_total=None,
):
    model.train()
    losses = utils.AverageMeter()
    updates = epoch * len(loader)
    for pictures, labels in loader:
        loss = loss_fn(model(pictures), labels)
        losses.update(loss.item(), pictures.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
        if model_ema is not None:
            model_ema.update(model, step=updates)
        lr_scheduler.step_update(num_updates=updates, metric=losses.avg)
    return OrderedDict(loss=losses.avg)


if __name__ == "__main__":
    main()
