"""torch_compile: the Trainer calls a compiled module around the model; sub-nets are those of the model inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import default_data_collator
from transformers_loops import assert_as_loop, assert_as_plain
from transformers_runs import SUB_NETS, gpt2, sparse, texts, trainer_of

pytestmark = [
    pytest.mark.extra("hf"),
    pytest.mark.slow,
    # The compiler looks at outputs that it hands to a hook, and warns of its own doing.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "eval_strategy": "steps", "eval_steps": 5}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Return how many graphs have been compiled since this was asked last."""
    number = counters["stats"]["unique_graphs"]
    counters.clear()
    torch._dynamo.reset()
    return number


def test_compiling_is_the_plain_trainers(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, **COMPILED)


@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 0.0), ("inductor", 1e-3)])
def test_compiling_with_sub_nets_is_the_loops_without(tmp_path: Path, backend: str, tolerance: float) -> None:
    given = {**COMPILED, "torch_compile_backend": backend, "optim": "sgd", "learning_rate": 0.3}
    assert_as_loop(tmp_path, **given, rtol=tolerance)


def test_sub_nets_are_compiled_no_more_often_than_the_model(tmp_path: Path) -> None:
    trainer_of(tmp_path, **COMPILED).train()
    plain = graphs()
    trainer_of(tmp_path, sparse(), **COMPILED).train()
    assert graphs() == plain == 1


def test_evaluation_afterwards_is_that_of_sub_nets(tmp_path: Path) -> None:
    callback = sparse()
    trainer = trainer_of(tmp_path, callback, **COMPILED)
    trainer.train()
    data = texts(8, seed=1)
    batch = default_data_collator(data)
    every = trainer.evaluate()
    without = trainer.predict(data)
    assert callback.ast is not None
    for name in SUB_NETS:
        alone = gpt2(seed=1).eval()
        alone.load_state_dict(callback.ast.materialize(name))
        with torch.no_grad():
            expected = alone(**batch).logits
        with callback.sub_net(name):
            predicted = trainer.predict(data)
            metrics = trainer.evaluate()
        numpy.testing.assert_allclose(predicted.predictions, expected, rtol=1e-4, atol=1e-5)
        assert every[f"eval_{name}_loss"] == metrics["eval_loss"] == predicted.metrics["test_loss"]
        if name == callback.ast.default_sub_net:
            assert every["eval_loss"] == metrics["eval_loss"]
            assert (without.predictions == predicted.predictions).all()
