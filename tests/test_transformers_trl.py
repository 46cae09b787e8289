"""Trainers of TRL, where it is installed: the metrics that they keep to their logs are those of each sub-net too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers_runs import SUB_NETS, gpt2, logged, sparse

from ast_plugin.integrations.transformers import attach

pytestmark = [pytest.mark.extra("hf"), pytest.mark.slow]

trl = pytest.importorskip("trl")

USUAL: dict[str, Any] = {
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 4,
    "max_length": 16,
    "learning_rate": 1e-2,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", " ", *"0123456789+="]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_supervised_fine_tuning(tmp_path: Path) -> None:
    from datasets import Dataset

    sums = Dataset.from_dict({"text": [f"{n}+{n + 1}={2 * n + 1}" for n in range(32)]})
    trainer = trl.SFTTrainer(
        model=gpt2(),
        args=trl.SFTConfig(output_dir=str(tmp_path), **USUAL),
        train_dataset=sums,
        eval_dataset=sums.select(range(8)),
        processing_class=tokenizer(),
        callbacks=[callback := sparse()],
    )
    trainer.train()
    assert callback.ast is not None
    assert callback.ast.step == 6
    metrics = trainer.evaluate()
    for name in SUB_NETS:
        with callback.sub_net(name):
            trainer.evaluate()
        alone = logged(trainer, "eval_mean_token_accuracy")[-1]
        assert metrics[f"eval_{name}_mean_token_accuracy"] == alone


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_preference_optimisation(tmp_path: Path) -> None:
    from datasets import Dataset

    pairs = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(32)]
    trainer = trl.DPOTrainer(
        model=gpt2(),
        ref_model=gpt2(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **USUAL),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(pairs[:8]),
        processing_class=tokenizer(),
    )
    callback = attach(trainer, sparsities=(0.5, 0.8, 0.9), method="rigl", update_interval=3)
    trainer.train()
    assert callback.ast is not None
    assert callback.ast.step == 6
    metrics = trainer.evaluate()
    margins = [metrics[f"eval_{name}_rewards/margins"] for name in SUB_NETS]
    assert len(set(margins)) == 3
    assert metrics["eval_rewards/margins"] == margins[0]
