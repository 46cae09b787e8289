"""Sub-nets of a small Llama over bytes, from one training, beside the same sub-nets trained alone.

python examples/transformers_bytes.py --output_dir bytes

The text is Python's own standard library; one file in ten is held out. Under ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from ast_plugin.integrations.transformers import ASTCallback

_CONTEXT = 128  # bytes that the network sees at once
_HELD_OUT = 10  # one file in so many


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """A text cut into stretches of equal length.

    Args:
        text: The bytes.
        limit: How many stretches to take, spread evenly; None takes all.
    """

    def __init__(self, text: bytes, limit: int | None = None) -> None:
        count = len(text) // _CONTEXT
        stretches = torch.frombuffer(bytearray(text[: count * _CONTEXT]), dtype=torch.uint8).view(count, _CONTEXT)
        self._stretches = stretches if limit is None else stretches[:: max(count // limit, 1)][:limit]

    def __len__(self) -> int:
        return len(self._stretches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self._stretches[index].long()
        return {"input_ids": tokens, "labels": tokens}


def texts() -> tuple[bytes, bytes]:
    """Return the source of the standard library's top-level modules: for training, and held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for place, file in enumerate(files):
        parts[place % _HELD_OUT == 0].append(file.read_bytes())
    return b"".join(parts[0]), b"".join(parts[1])


def network(width: int) -> LlamaForCausalLM:
    """Return a Llama of four layers over bytes, the same at every call."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    sparsities: tuple[float, ...], steps: int, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Train one network, and write it with its sub-nets.

    Args:
        sparsities: One a sub-net.
        steps: Optimizer steps in all.
        folder: Where to.
        options: The command line.

    Returns:
        Bits per held-out byte by sub-net, and the seconds that training took.
    """
    text, held_out = texts()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.05,
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
    )
    callback = ASTCallback(sparsities=sparsities)
    trainer = Trainer(
        model=network(options.width),
        args=arguments,
        train_dataset=Bytes(text),
        eval_dataset=Bytes(held_out, options.stretches),
        callbacks=[callback],
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    metrics = trainer.evaluate()
    trainer.save_model()
    return {name: metrics[f"eval_{name}_loss"] / math.log(2) for name in callback.sub_nets}, seconds


def main() -> None:
    """Train, compare and print the table."""
    parser = argparse.ArgumentParser(description="Sub-nets of a byte-level Llama, and the same trained alone.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of the one run")
    parser.add_argument("--width", type=int, default=96, help="hidden size")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--stretches", type=int, default=512, help="of held-out text that are evaluated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    count = len(options.sparsities)
    together, seconds = train(tuple(options.sparsities), options.steps, options.output_dir / "together", options)
    rows = []
    for sparsity in options.sparsities:
        runs = [
            train((sparsity,), steps, options.output_dir / f"alone-{sparsity}-{steps}", options)
            for steps in (options.steps // count, options.steps)
        ]
        (name,) = runs[0][0]
        rows.append((name, together[name], *(found[name] for found, _ in runs), *(time for _, time in runs)))

    steps = options.steps
    print(f"\nBits per held-out byte. One run: {steps} steps, {seconds:.0f} s for all {count} sub-nets.")
    print(f"{'sub-net':8} {'one run':>8} {'alone, equal cost':>18} {'alone, full cost':>17}")
    for name, ours, equal, full, *_ in rows:
        print(f"{name:8} {ours:8.3f} {equal:18.3f} {full:17.3f}")
    print(f"{'seconds':8} {seconds:8.0f} {sum(row[4] for row in rows):18.0f} {sum(row[5] for row in rows):17.0f}")
    print(f"\nThe dense model with its sub-nets: {options.output_dir / 'together'}")


if __name__ == "__main__":
    main()
