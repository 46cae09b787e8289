"""Sub-nets of a small network on scikit-learn's handwritten digits, in a loop on Hugging Face Accelerate.

accelerate launch examples/accelerate_loop.py digits --sparsities 0.9 0.95 0.98
accelerate launch examples/accelerate_loop.py digits --accumulate 2 --clip 1.0 --resume

Beside what such a loop has anyway: `wrap`, `register_for_checkpointing`, a ``with`` block for evaluation, `save`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ast_plugin

_TRAIN = 1300  # of 1797


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return batches of pictures of 8 x 8 pixels in [-1, 1] for training and for evaluation."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    sets = []
    for chosen in (order[:_TRAIN], order[_TRAIN:]):
        pictures = torch.tensor(digits.images[chosen] / 8 - 1, dtype=torch.float32).unsqueeze(1)
        sets.append(TensorDataset(pictures, torch.tensor(digits.target[chosen])))
    return DataLoader(sets[0], batch_size, shuffle=True, drop_last=True), DataLoader(sets[1], 256)


def network() -> nn.Module:
    """Return three convolutions and a classifier."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Return the share of pictures that all processes together recognise."""
    model.eval()
    right = []
    with torch.no_grad():
        for pictures, labels in loader:
            right.append(accelerator.gather_for_metrics(model(pictures).argmax(1) == labels))
    model.train()
    return float(torch.cat(right).float().mean())


def main() -> None:
    """Train, evaluate every sub-net after each epoch, save; go on from a saved state where that is asked for."""
    parser = argparse.ArgumentParser(description="Train sub-nets in a loop on Accelerate.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--accumulate", type=int, default=1, metavar="BATCHES")
    parser.add_argument("--clip", type=float, default=1.0, metavar="NORM")
    parser.add_argument("--stop-after", type=int, default=None, metavar="EPOCHS", help="as if it were interrupted")
    parser.add_argument("--resume", action="store_true", help="go on from the state in DIR")
    arguments = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    train, held_out = loaders(arguments.batch_size)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    model, optimizer, train, held_out = accelerator.prepare(model, optimizer, train, held_out)

    # The run: after prepare, which decides how many batches a process has.
    steps = math.ceil(len(train) / arguments.accumulate)
    ast = ast_plugin.wrap(optimizer, model, sparsities=arguments.sparsities, total_steps=arguments.epochs * steps)
    accelerator.register_for_checkpointing(ast)

    first = 0
    if arguments.resume:
        accelerator.load_state(str(arguments.folder / "state"))
        first = ast.step // steps
    for epoch in range(first, arguments.epochs):
        if epoch == arguments.stop_after:
            return
        train.set_epoch(epoch)
        for pictures, labels in train:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(pictures), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.clip)
                optimizer.step()
                optimizer.zero_grad()

        ast.synchronize_normalization()  # every process has estimated BatchNorm's statistics from its own data
        for name in ast.sub_nets:
            with ast.sub_net(name):
                ast.add_report_metric("accuracy", accuracy(accelerator, model, held_out), sub_net=name)
        figures = ", ".join(f"{name} {ast.metrics[name]['accuracy']:.4f}" for name in ast.sub_nets)
        accelerator.print(f"epoch {epoch + 1}: {figures}")
        accelerator.save_state(str(arguments.folder / "state"))

    if accelerator.is_main_process:
        ast.save(arguments.folder / "elastic.safetensors")
        accelerator.print(f"{arguments.folder / 'elastic.safetensors'} holds {', '.join(ast.sub_nets)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
