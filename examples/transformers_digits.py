"""Sub-nets of a small Vision Transformer on scikit-learn's handwritten digits, by flags beside the Trainer's own.

python examples/transformers_digits.py --output_dir digits --ast_sparsities 0.5 0.8 0.9

Every flag of TrainingArguments and ASTArguments may be given; without --ast_sparsities it is an ordinary training.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from ast_plugin.integrations.transformers import ASTArguments

_TRAIN = 1300  # of 1797


_DEFAULTS = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_train_epochs": 30,
    "warmup_steps": 50,
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "report_to": ["none"],
    "disable_tqdm": True,
}


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Pictures of 8 x 8 pixels in [-1, 1].

    Args:
        training: Whether to take those for training, or the others.
    """

    def __init__(self, *, training: bool) -> None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        chosen = order[:_TRAIN] if training else order[_TRAIN:]
        self._pictures = torch.tensor(digits.images[chosen] / 8 - 1, dtype=torch.float32).unsqueeze(1)
        self._labels = torch.tensor(digits.target[chosen])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self._pictures[index], "labels": self._labels[index]}


def network() -> ViTForImageClassification:
    """Return a Vision Transformer with patches of 2 x 2 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=10,
        )
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of pictures that are recognised."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, then print what each sub-net has reached."""
    parser = HfArgumentParser((TrainingArguments, ASTArguments))
    parser.set_defaults(**_DEFAULTS)
    arguments, ast_arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    trainer = Trainer(
        model=network(),
        args=arguments,
        train_dataset=Digits(training=True),
        eval_dataset=Digits(training=False),
        compute_metrics=accuracy,
        callbacks=ast_arguments.callbacks(),
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    print(f"\nwithout a name: accuracy {metrics['eval_accuracy']:.4f}")
    for name in (key.split("_")[1] for key in metrics if key.endswith("_sparsity")):
        figures = {what: metrics[f"eval_{name}_{what}"] for what in ("accuracy", "sparsity")}
        print(f"{name}: accuracy {figures['accuracy']:.4f} with {figures['sparsity']:.1%} zeros")


if __name__ == "__main__":
    main()
