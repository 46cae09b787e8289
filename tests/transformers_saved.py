"""Tiny models of Hugging Face, trained for a few steps with plain `wrap` and saved, as the tests of files use them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import ast_plugin
from ast_plugin.integrations.transformers.saving import save_sub_nets

SUB_NETS = ("s50", "s80")
SPARSITIES = (0.5, 0.8)
STEPS = 6
WORDS = 40


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    )


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForMaskedLM(config)


def vit(num_channels: int = 3) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=num_channels,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def resnet() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "bert": bert, "vit": vit, "resnet": resnet}


def batch(kind: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("gpt2", "bert"):
        tokens = torch.randint(3, WORDS, (4, 8), generator=generator)
        return {"input_ids": tokens, "labels": tokens}
    size = 8 if kind == "vit" else 32
    return {
        "pixel_values": torch.randn(4, 3, size, size, generator=generator),
        "labels": torch.randint(5, (4,), generator=generator),
    }


def logits(model: nn.Module, kind: str) -> Tensor:
    inputs = {key: value for key, value in batch(kind, seed=9).items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits.clone()


def train(kind: str, model: nn.Module | None = None, **options: Any) -> ast_plugin.AlternatingSparseTraining:
    """Train a model for a few steps; with all of them done the sub-nets are as sparse as they are to become."""
    torch.manual_seed(0)
    model = MODELS[kind]() if model is None else model
    steps = options.pop("steps", STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    settings = {"sparsities": SPARSITIES, "total_steps": STEPS, **options}
    ast = ast_plugin.wrap(optimizer, model, **settings)
    for step in range(steps):
        model.train()(**batch(kind, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for number, name in enumerate(ast.sub_nets):
        ast.add_report_metric("loss", 1.5 + number, sub_net=name)
    return ast


@dataclasses.dataclass(frozen=True)
class Saved:
    """A trained model, the folder it was saved in, and what its sub-nets compute."""

    kind: str
    ast: ast_plugin.AlternatingSparseTraining
    folder: Path
    dense: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]

    def fresh(self) -> PreTrainedModel:
        """Return a model of the same architecture with other weights."""
        torch.manual_seed(1)
        return MODELS[self.kind]()

    def stock(self, folder: Path | None = None, **options: Any) -> PreTrainedModel:
        """Load a folder as everybody does."""
        return type(self.ast.model).from_pretrained(folder or self.folder, **options)


def saved(kind: str, folder: Path, **options: Any) -> Saved:
    """Train, save the model with `options` as ``save_pretrained`` takes them, and the sub-nets beside it."""
    ast = train(kind)
    ast.model.save_pretrained(folder, **options)
    save_sub_nets(ast, folder)
    computed = {}
    for name in ast.sub_nets:
        with ast.sub_net(name):
            computed[name] = logits(ast.model, kind)
    dense = {key: value.clone() for key, value in ast.model.state_dict().items()}
    return Saved(kind, ast, folder, dense, computed)


class SavedModels:
    """One saved model a kind, made when it is first asked for; tests only read it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.of = functools.cache(self._of)

    def _of(self, kind: str) -> Saved:
        return saved(kind, self._root / kind)
