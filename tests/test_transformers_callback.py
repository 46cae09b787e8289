"""The callback: when a run begins and ends, what it is tied to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, snapshot
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers_runs import SUB_NETS, arguments_of, gpt2, sparse, texts, trainer_of

from ast_plugin import ASTConfig, SubNetSpec
from ast_plugin.errors import ActivationError, ConfigError, SelectionError, StateError, WrapError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.family import plugin
from ast_plugin.integrations.frameworks import from_sparsifier
from ast_plugin.integrations.transformers import ASTCallback, attach
from ast_plugin.methods import Method, magnitude

pytestmark = pytest.mark.extra("hf")


class Noted(TrainerCallback):
    """Writes down, at every event of interest, what the sub-nets' callback has."""

    def __init__(self, callback: ASTCallback) -> None:
        self.callback = callback
        self.steps: list[int] = []
        self.begun = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self.callback.ast is not None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.callback.ast is not None
        self.steps.append(self.callback.ast.step)


def test_every_sub_net_has_its_sparsity_after_an_ordinary_training(tmp_path: Path) -> None:
    callback = ASTCallback(sparsities=(0.5, 0.8, 0.9))
    trainer = trainer_of(tmp_path, callback)
    assert callback.ast is None
    trainer.train()
    ast = callback.ast
    assert ast is not None
    assert callback.sub_nets == ast.sub_nets == SUB_NETS
    assert ast.step == trainer.state.global_step == 16
    for name, sparsity in zip(SUB_NETS, (0.5, 0.8, 0.9), strict=True):
        assert abs(ast.masks.sparsity(name) - sparsity) * ast.masks.total() < 1
    assert ast.config.total_steps == 16
    assert ast.config.steps_per_epoch == 8
    assert ast.config.seed == trainer.args.seed == 3
    assert ast.optimizer is trainer.optimizer.optimizer  # and not Accelerate's wrapper around it
    assert "ast_plugin" not in trainer.optimizer.state_dict()


def test_the_model_is_dense_at_every_event(tmp_path: Path) -> None:
    class Dense(TrainerCallback):
        def __init__(self) -> None:
            self.zeros: list[int] = []

        def count(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            assert model is not None
            self.zeros.append(int((model.transformer.h[0].mlp.c_fc.weight == 0).sum()))

        on_step_begin = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_substep_end = on_train_end = count

    trainer_of(tmp_path, watched := Dense(), sparse(method="static"), gradient_accumulation_steps=2).train()
    assert set(watched.zeros) == {0}
    assert len(watched.zeros) > 20


def test_it_stands_first_and_the_run_is_there_for_every_other_callback(tmp_path: Path) -> None:
    callback = sparse()
    trainer = trainer_of(tmp_path, noted := Noted(callback), callback)
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    assert noted.begun
    assert noted.steps == list(range(1, 17))


def test_one_that_is_added_to_a_trainer_is_found_when_training_begins(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="epoch")
    trainer.add_callback(callback := sparse())
    trainer.train()
    assert callback.ast is not None
    assert callback.ast.step == 16
    assert trainer.callback_handler.callbacks[0] is callback
    assert (tmp_path / "checkpoint-16" / "ast_state.pt").is_file()
    assert "eval_s90_loss" in trainer.evaluate()


def test_one_that_is_added_resumes_from_the_output_folder_and_refuses_another(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "here", sparse(), save_strategy="epoch")
    whole.train()
    resumed = trainer_of(tmp_path / "here", save_strategy="epoch")
    resumed.add_callback(callback := sparse())
    resumed.train(resume_from_checkpoint=True)  # ended: nothing is left to train
    assert callback.ast is not None
    assert callback.ast.step == 16
    resumed = trainer_of(tmp_path / "here", save_strategy="epoch")
    resumed.add_callback(callback := sparse())
    resumed.train(resume_from_checkpoint=str(tmp_path / "here" / "checkpoint-8"))
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    elsewhere = trainer_of(tmp_path / "there")
    elsewhere.add_callback(sparse())
    with pytest.raises(StateError, match=r"attach\(trainer\)"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "here" / "checkpoint-8"))


def test_attach_does_the_same_on_a_trainer_of_another_kind(tmp_path: Path) -> None:
    usual = trainer_of(tmp_path, sparse())
    usual.train()
    arguments = arguments_of(tmp_path, Seq2SeqTrainingArguments)
    trainer = Seq2SeqTrainer(model=gpt2(), args=arguments, train_dataset=texts(), eval_dataset=texts(8, seed=1))
    callback = attach(trainer, sparsities=(0.5, 0.8, 0.9), method="rigl", update_interval=3)
    trainer.train()
    assert callback.ast is not None
    assert_same(snapshot(trainer.model), snapshot(usual.model))
    assert "eval_s90_loss" in trainer.evaluate()


def test_settings_may_be_one_object_and_hold_a_method_of_ones_own(tmp_path: Path) -> None:
    config = ASTConfig(sparsities=(SubNetSpec(name="half", sparsity=0.5), "2:4"), seed=7, total_steps=16)
    callback = ASTCallback(config)
    trainer_of(tmp_path, callback).train()
    assert callback.ast is not None
    assert callback.ast.sub_nets == ("half", "2:4")
    assert callback.ast.config.seed == 7
    mine = Method(name="mine", description="none", drop_score=magnitude, updates=False)
    callback = ASTCallback(sparsities=(0.5,), method=mine)
    trainer_of(tmp_path, callback).train()
    assert callback.ast is not None
    assert callback.ast.config.method == "mine"


def test_a_method_that_takes_the_model_over_does_so_when_training_begins_and_resumes(tmp_path: Path) -> None:
    layers = [f"transformer.h.{block}.mlp.{layer}.weight" for block in (0, 1) for layer in ("c_fc", "c_proj")]

    def prepared() -> tuple[Any, ASTCallback]:
        model = gpt2()
        sparsifier = WeightNormSparsifier(sparse_block_shape=(1, 1))
        sparsifier.prepare(model, [{"tensor_fqn": name} for name in layers])
        callback = ASTCallback(sparsities=(0.5, 0.75), method=from_sparsifier(sparsifier), update_interval=4)
        return trainer_of(tmp_path, callback, model=model, save_strategy="steps", save_steps=8, max_steps=16), callback

    trainer, callback = prepared()
    assert "transformer.h.0.mlp.c_fc.weight" not in trainer.model.state_dict()
    trainer.train()
    assert callback.ast is not None
    assert list(callback.ast.masks.parameters) == layers
    assert sorted(trainer.model.state_dict()) == sorted(gpt2().state_dict())
    assert callback.ast.masks.sparsity("s75") == pytest.approx(0.75, abs=0.01)
    again, resumed = prepared()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.ast is not None
    assert_same(snapshot(again.model), snapshot(trainer.model))
    assert resumed.ast.masks.checksum() == callback.ast.masks.checksum()


class Steps:
    """A plugin that counts the steps of a run, and tells them in its state."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl
    def ast_step_finished(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_a_plugin_by_keyword_takes_part_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    steps, saving = Steps(), {"save_steps": 8, "save_strategy": "steps"}
    callback = ASTCallback(ASTConfig(sparsities=(0.5,), method="static", seed=3), steps=steps)
    trainer = trainer_of(tmp_path, callback, **saving)
    trainer.train()
    assert steps.count == trainer.state.global_step == 16
    again, trainer = Steps(), trainer_of(tmp_path, **saving)
    attach(trainer, sparsities=(0.5,), method="static", seed=3, steps=again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.count == 16


def test_a_second_training_goes_on_with_the_masks_of_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback := sparse(), num_train_epochs=1)
    trainer.train()
    ast = callback.ast
    assert ast is not None
    masks = {name: ast.masks.pack(name) for name in SUB_NETS}
    before = snapshot(trainer.model)
    trainer.train()
    assert callback.ast is ast
    assert ast.step == 16
    assert_same({name: ast.masks.pack(name) for name in SUB_NETS}, masks)
    assert not torch.equal(snapshot(trainer.model)["transformer.wte.weight"], before["transformer.wte.weight"])


def test_a_training_that_was_broken_off_starts_anew(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        at: int | None = 5

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == self.at:
                raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, callback := sparse(), stop := Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = callback.ast
    assert first is not None
    assert first.step == 5
    stop.at = None
    trainer.train()
    assert callback.ast is not first
    assert callback.ast is not None
    assert callback.ast.step == 16
    assert not first.attached


def test_unbinding_gives_the_trainer_back_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    plain = set(vars(trainer))
    callback = attach(trainer, sparsities=(0.5, 0.8))
    assert set(vars(trainer)) > plain
    trainer.train()
    callback.unbind()
    assert set(vars(trainer)) - plain <= {"model_wrapped", "_past", "_tr_loss"} | _of_training()
    assert callback not in trainer.callback_handler.callbacks
    assert not any("s80" in metric for metric in trainer.evaluate())
    assert callback.ast is not None
    with callback.sub_net("s80"):
        assert int((trainer.model.transformer.h[0].mlp.c_fc.weight == 0).sum()) > 0


def _of_training() -> set[str]:
    """Return the names of what a training leaves on a Trainer."""
    trainer = trainer_of(Path("unused"), do_train=False)
    before = set(vars(trainer))
    trainer.train()
    trainer.evaluate()
    return set(vars(trainer)) - before


def test_a_model_of_a_training_that_has_ended_is_trained_elsewhere_after_unbinding(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback := sparse())
    trainer.train()
    before = snapshot(trainer.model)
    other = trainer_of(tmp_path, model=trainer.model, num_train_epochs=1)
    with pytest.raises(ActivationError, match=r"unbind\(\)"):
        other.train()
    with pytest.raises(WrapError, match=r"unbind\(\)"):
        trainer_of(tmp_path, sparse(), model=trainer.model)
    assert_same(snapshot(trainer.model), before)
    assert "eval_loss" in other.evaluate()
    callback.unbind()
    trainer_of(tmp_path, model=trainer.model, num_train_epochs=1).train()
    trainer_of(tmp_path, second := sparse(), model=trainer.model, num_train_epochs=1).train()
    assert second.ast is not None
    assert second.ast.step == 8


def test_before_training_there_are_no_sub_nets_to_use(tmp_path: Path) -> None:
    callback = sparse()
    trainer = trainer_of(tmp_path, callback)
    with pytest.raises(ActivationError, match=r"call trainer\.train\(\) first"):
        callback.sub_net("s90")
    assert set(trainer.evaluate()) >= {"eval_loss"}
    assert not any("s90" in metric for metric in trainer.evaluate())


def test_a_model_saved_over_an_earlier_run_before_training_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, sparse())
    trainer.save_model()
    assert not caplog.records
    trainer.train()
    trainer.save_model()
    with caplog.at_level("WARNING", "ast_plugin.transformers"):
        trainer_of(tmp_path, sparse()).save_model()
    assert "of an earlier run" in caplog.text


def test_outside_of_a_trainer_it_does_nothing_but_say_so(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    callback = sparse()
    callback.on_init_end(trainer.args, trainer.state, trainer.control)
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    with pytest.raises(WrapError, match=r"ast_plugin\.wrap"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


# Bad input: what is named, and that nothing was touched.


def test_a_callback_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one ASTCallback"):
        trainer_of(tmp_path, sparse(), sparse())
    trainer = trainer_of(tmp_path, sparse())
    with pytest.raises(ConfigError, match="one ASTCallback"):
        attach(trainer, sparsities=(0.5,))
    trainer.train()


def test_a_callback_belongs_to_one_trainer(tmp_path: Path) -> None:
    callback = sparse()
    trainer_of(tmp_path, callback)
    with pytest.raises(WrapError, match="another Trainer"):
        trainer_of(tmp_path, callback)


def test_a_class_in_place_of_a_callback_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsities is missing"):
        trainer_of(tmp_path, ASTCallback)  # type: ignore[arg-type]


def test_a_model_without_weights_to_prune_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    model = gpt2()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(SelectionError, match="no parameter"):
        trainer_of(tmp_path, sparse(), model=model)
    assert_same(snapshot(model), before)


def test_evaluation_without_data_for_it_is_refused_by_the_trainer_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer_of(tmp_path, sparse(), eval_strategy="steps", eval_dataset=None)


@pytest.mark.parametrize("metric", ["eval_s95_loss", "s95_accuracy"])
def test_a_metric_of_a_sub_net_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, metric: str) -> None:
    with pytest.raises(ConfigError, match=metric.replace("s95", "s90")):
        trainer_of(tmp_path, sparse(), metric_for_best_model=metric)


def test_a_trainer_that_has_trained_without_sub_nets_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    trainer.train()
    before = snapshot(trainer.model)
    with pytest.raises(WrapError, match="trained without sub-nets"):
        attach(trainer, sparsities=(0.5,))
    trainer.add_callback(sparse())
    with pytest.raises(WrapError, match="trained without sub-nets"):
        trainer.train()
    assert_same(snapshot(trainer.model), before)


def test_a_length_that_is_not_the_trainers_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(total_steps=100))
    with pytest.raises(ConfigError, match="total_steps=100, and the Trainer makes 16"):
        trainer.train()


def test_an_order_that_needs_a_closure_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(ConfigError, match=r"'joint' trains several sub-nets in each step and needs optimizer\.step"):
        trainer_of(tmp_path, sparse(alternation="joint", plugins=[plugin]), model=model)
    assert not model._forward_pre_hooks
    trainer_of(
        tmp_path, sparse(alternation="dense_pivot", sparsities=(0.0, 0.5), plugins=[plugin]), model=model
    ).train()


def test_a_training_of_no_steps_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(), num_train_epochs=0)
    with pytest.raises(ConfigError, match="0 of 0 are made; raise num_train_epochs or max_steps"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsities": (0.5, 1.5)}, "1.5"),
        ({"sparsity": 0.5}, "unknown setting 'sparsity'"),
        ({"sparsities": (0.5,), "resume_plain": "yes"}, "resume_plain"),
        ({"sparsities": (0.5,), "total_steps": 0}, "total_steps"),
    ],
)
def test_a_setting_that_is_out_of_range_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ASTCallback(**given)


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a transformers\.Trainer, got GPT2LMHeadModel"):
        attach(gpt2(), sparsities=(0.5,))  # type: ignore[arg-type]


def test_deepspeed_and_the_first_fsdp_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path)
    for attribute, message in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP version 1")):
        monkeypatch.setattr(trainer, attribute, True)
        with pytest.raises(WrapError, match=message):
            attach(trainer, sparsities=(0.5,))
        assert "evaluate" not in vars(trainer)
        monkeypatch.undo()
