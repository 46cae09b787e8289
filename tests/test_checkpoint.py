"""Checkpoints: complete or absent, read without executing anything, loaded wholly or not at all."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from networks import (
    OPTIMIZERS,
    assert_same,
    conv_net,
    image_batch,
    mlp,
    sgd,
    snapshot,
    train,
    train_step,
    vector_batch,
    wrapped,
)
from torch import nn
from torch.nn import functional

import ast_plugin
from ast_plugin.checkpoint import load_together, read_checkpoint, write_checkpoint
from ast_plugin.errors import ActivationError, ConfigError, SaveError, StateError

STEPS = 36


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> dict[str, Any]:
    """Everything that must be equal, as independent copies."""
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), *(other.state_dict() for other in others)], buffer)
    buffer.seek(0)
    return {"state": torch.load(buffer, weights_only=True)}


# Each method, order, scope of the correction, rule and start, mixed so that every pair of neighbours meets somewhere.
_METHODS = ("static", "set", "rigl", "gmp", "granet")
_ORDERS = ("alternating", "random", "single_path", "fixed:s80")
_SCOPES = tuple(itertools.product(("layer", "global", "off"), (False, True)))
_RULES = ("coast", "freeze")
_STARTS = (None, "zero", "keep")
_STOPS = (1, 11, 12, 13, 25, 35, 36)


@pytest.mark.parametrize("case", range(24))
def test_every_setting_resumes_to_the_bit(case: int, tmp_path: Path) -> None:
    scope, first = _SCOPES[case % 6]
    kind = sorted(OPTIMIZERS)[case // 2 % 2]
    settings: dict[str, Any] = {
        "method": _METHODS[case % 5],
        "alternation": _ORDERS[case // 3 % 4],
        "steps_per_epoch": 5,
        "correction": ast_plugin.CorrectionOptions(scope=scope, first_step=first),
        "inactive": _RULES[case % 2],
        "grow_initialization": _STARTS[case % 3],
        "private_normalization": case % 7 != 3,
        "default_sub_net": (None, "s90")[case % 2],
        "total_steps": STEPS,
        "end_step": 0.6,
    }
    straight, optimizer, ast = wrapped(straight := conv_net(), OPTIMIZERS[kind](straight), **settings)
    train(straight, optimizer, range(STEPS + 4))  # four beyond the end of the run

    stop = _STOPS[case % 7]
    first_model, first_optimizer, first_ast = wrapped(m := conv_net(), OPTIMIZERS[kind](m), **settings)
    train(first_model, first_optimizer, range(stop))
    first_ast.save_checkpoint(tmp_path / "checkpoint.pt")
    again, again_optimizer, again_ast = wrapped(m := conv_net(seed=7), OPTIMIZERS[kind](m), **settings)
    assert again_ast.load_checkpoint(tmp_path / "checkpoint.pt") == {}
    assert again_ast.step == stop
    train(again, again_optimizer, range(stop, STEPS + 4))
    assert_same(state_of(straight, optimizer), state_of(again, again_optimizer))
    assert ast.history == again_ast.history
    for name in ast.sub_nets:
        assert_same(ast.materialize(name), again_ast.materialize(name))


def test_the_cases_hold_every_setting() -> None:
    cases = range(24)
    for choices, index in ((_METHODS, 1), (_ORDERS, 3), (_SCOPES, 1), (_RULES, 1), (_STARTS, 1), (_STOPS, 1)):
        assert {case // index % len(choices) for case in cases} == set(range(len(choices)))


def test_everything_given_comes_back(tmp_path: Path) -> None:
    model, optimizer, ast = wrapped()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(10):
        train_step(model, optimizer, image_batch(step))
        scheduler.step()
        average.update_parameters(model)
    path = tmp_path / "new" / "checkpoint.pt"
    order = torch.randperm(5)
    ast.save_checkpoint(path, scheduler=scheduler, average=average, epoch=3, order=order, best={"s50": [0.5, None]})
    random_numbers = [random.random(), numpy.random.rand(), torch.rand(1)]

    other, other_optimizer, other_ast = wrapped(conv_net(seed=3))
    other_scheduler = torch.optim.lr_scheduler.OneCycleLR(other_optimizer, 0.1, total_steps=60)
    other_average = torch.optim.swa_utils.AveragedModel(other)
    values = other_ast.load_checkpoint(path, scheduler=other_scheduler, average=other_average)
    assert_same(values, {"epoch": 3, "order": order, "best": {"s50": [0.5, None]}})
    assert random_numbers == [random.random(), numpy.random.rand(), torch.rand(1)]
    assert_same(
        state_of(model, optimizer, scheduler, average),
        state_of(other, other_optimizer, other_scheduler, other_average),
    )
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1
    # The file is an ordinary one.
    plain = torch.load(path, weights_only=True)["states"]
    conv_net().load_state_dict(plain["model"])
    assert plain["optimizer"]["ast_plugin"]["step"] == 10


def test_the_random_state_can_be_left_out_and_left_alone(tmp_path: Path) -> None:
    _, _, ast = wrapped()
    ast.save_checkpoint(tmp_path / "with.pt")
    ast.save_checkpoint(tmp_path / "without.pt", random_state=False)
    before = torch.get_rng_state()
    torch.rand(3)
    moved = torch.get_rng_state()
    ast.load_checkpoint(tmp_path / "without.pt")
    assert torch.equal(torch.get_rng_state(), moved)
    ast.load_checkpoint(tmp_path / "with.pt", random_state=False)
    assert torch.equal(torch.get_rng_state(), moved)
    ast.load_checkpoint(tmp_path / "with.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_of_several_processes_keeps_its_random_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ast = wrapped()
    monkeypatch.setattr("ast_plugin.training_files.ranks", lambda: 2)
    ast.save_checkpoint(tmp_path / "checkpoint.pt")
    assert "random_state" not in read_checkpoint(tmp_path / "checkpoint.pt")[0]


def accumulate(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], parts: range) -> None:
    model.train()
    for part in parts:
        functional.cross_entropy(model(batch[0][part::2]), batch[1][part::2]).backward()


@pytest.mark.parametrize("stop", range(9, 15))
def test_a_checkpoint_between_micro_batches_disturbs_nothing_and_goes_on_from_the_step(
    stop: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": "rigl", "total_steps": 30, "update_interval": 6}

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            accumulate(model, vector_batch(number), range(2))
            optimizer.step()
            optimizer.zero_grad()

    straight, straight_optimizer, _ = wrapped(straight := mlp(), sgd(straight), **settings)
    steps(straight, straight_optimizer, range(30))

    model, optimizer, ast = wrapped(model := mlp(), sgd(model), **settings)
    steps(model, optimizer, range(stop))
    accumulate(model, vector_batch(stop), range(1))
    ast.save_checkpoint(tmp_path / "checkpoint.pt")
    accumulate(model, vector_batch(stop), range(1, 2))  # among others the step of a mask update
    optimizer.step()
    optimizer.zero_grad()
    steps(model, optimizer, range(stop + 1, 30))
    assert_same(state_of(straight, straight_optimizer), state_of(model, optimizer))

    again, again_optimizer, again_ast = wrapped(again := mlp(4), sgd(again), **settings)
    again_ast.load_checkpoint(tmp_path / "checkpoint.pt")
    assert again_ast.step == stop
    steps(again, again_optimizer, range(stop, 30))  # gradients are in no checkpoint: the step begins anew
    assert_same(state_of(straight, straight_optimizer), state_of(again, again_optimizer))


def test_a_step_begun_anew_counts_batch_norm_statistics_twice_and_nothing_else(tmp_path: Path) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            accumulate(model, image_batch(number), range(2))
            optimizer.step()
            optimizer.zero_grad()

    straight, straight_optimizer, straight_ast = wrapped(total_steps=30)
    steps(straight, straight_optimizer, range(30))
    model, optimizer, ast = wrapped(total_steps=30)
    steps(model, optimizer, range(13))
    accumulate(model, image_batch(13), range(1))
    ast.save_checkpoint(tmp_path / "checkpoint.pt")
    again, again_optimizer, again_ast = wrapped(conv_net(4), total_steps=30)
    again_ast.load_checkpoint(tmp_path / "checkpoint.pt")
    steps(again, again_optimizer, range(13, 30))
    for name in ast.sub_nets:
        one, other = straight_ast.materialize(name), again_ast.materialize(name)
        differing = {key.rpartition(".")[2] for key, value in one.items() if not torch.equal(value, other[key])}
        trained_at_13 = name == "s80"
        assert differing == ({"running_mean", "running_var", "num_batches_tracked"} if trained_at_13 else set())


def test_a_gradient_scaler_resumes_between_skipped_steps(tmp_path: Path) -> None:
    def run(numbers: range, load: bool, save: bool) -> dict[str, Any]:
        model, optimizer, ast = wrapped(conv_net(3 * load))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        if load:
            ast.load_checkpoint(tmp_path / "checkpoint.pt", scaler=scaler)
        for number in numbers:
            images, labels = image_batch(number)
            model.train()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            scaler.scale(loss * (float("inf") if number % 7 == 5 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        if save:
            ast.save_checkpoint(tmp_path / "checkpoint.pt", scaler=scaler)
        assert ast.step < 30
        return state_of(model, optimizer, scaler)

    straight = run(range(30), load=False, save=False)
    run(range(13), load=False, save=True)  # right after a step that was skipped
    assert_same(straight, run(range(13, 30), load=True, save=False))


def test_a_plugin_that_saves_after_the_last_step_saves_the_completed_masks(tmp_path: Path) -> None:
    class Saver:
        @ast_plugin.hookimpl
        def ast_step_finished(self, training: Any, step: int) -> None:
            if step == STEPS - 1:
                training.save_checkpoint(tmp_path / "checkpoint.pt")

    settings: dict[str, Any] = {"alternation": "fixed:s80", "total_steps": STEPS, "update_interval": 6}
    model = conv_net()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8, 0.9), plugins=[Saver()], **settings)
    train(model, optimizer, range(STEPS))
    again, again_optimizer, again_ast = wrapped(conv_net(5), **settings)
    again_ast.load_checkpoint(tmp_path / "checkpoint.pt")
    assert again_ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)
    assert_same(state_of(model, optimizer), state_of(again, again_optimizer))
    assert ast.history == again_ast.history


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"numbers": torch.arange(200.0), "text": ["a", 2]})
    good = path.read_bytes()
    _, expected = read_checkpoint(path)
    complaints = []
    folder = good.rindex(b"PK\x01\x02") + 38  # its attributes, which only torch reads
    for place in (*range(0, len(good), 7), folder):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _, values = read_checkpoint(path)
            except StateError as error:
                complaints.append(str(error))
            else:
                assert_same(values, expected)
    assert len(complaints) > len(good) / 7 / 3
    assert all(str(path) in complaint and "weights_only=False" not in complaint for complaint in complaints)
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(StateError, match="damaged"):
            read_checkpoint(path)


def test_files_of_other_kinds_are_refused_with_the_reason(tmp_path: Path) -> None:
    _, _, ast = wrapped()
    path = tmp_path / "file"
    with pytest.raises(StateError, match="does not exist; check the path, or start a new run"):
        ast.load_checkpoint(path)
    with pytest.raises(StateError, match="no regular file"):
        ast.load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="path must be the path of a file, got None"):
        ast.load_checkpoint(None)  # type: ignore[arg-type]  # what users do
    torch.save({"model": {}}, path)
    with pytest.raises(StateError, match="no checkpoint that save_checkpoint"):
        ast.load_checkpoint(path)
    torch.save({"format": "ast_plugin.checkpoint", "version": 2}, path)
    with pytest.raises(StateError, match="version 2, and this version of ast-plugin reads 1"):
        ast.load_checkpoint(path)
    path.write_bytes(pickle.dumps({"format": "ast_plugin.checkpoint"}))
    with pytest.raises(StateError, match="damaged, or no checkpoint"):
        ast.load_checkpoint(path)
    path.write_text("text")
    with pytest.raises(StateError, match="damaged, or no checkpoint"):
        ast.load_checkpoint(path)


class Bomb:
    """What a foreign file would execute."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "ast_plugin.checkpoint", "version": 1, "values": Bomb()}, "checkpoint.pt")
    with pytest.raises(StateError, match="holds no tensors and plain containers that can be read"):
        read_checkpoint("checkpoint.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "value",
    [numpy.float64(0.5), Path("x"), Bomb(), lambda: None, {"a": [object()]}, numpy.zeros(3)],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(value: Any, tmp_path: Path) -> None:
    _, _, ast = wrapped()
    path = tmp_path / "checkpoint.pt"
    ast.save_checkpoint(path, epoch=1)
    with pytest.raises(ConfigError, match="'best' holds something else than tensors, numbers, strings"):
        ast.save_checkpoint(path, epoch=2, best=value)
    assert ast.load_checkpoint(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_states_of_usual_schedulers_can_be_loaded(tmp_path: Path) -> None:
    _, optimizer, ast = wrapped()
    schedulers = torch.optim.lr_scheduler
    path = tmp_path / "checkpoint.pt"
    for scheduler in (
        schedulers.MultiStepLR(optimizer, [3, 4]),  # a Counter
        schedulers.ReduceLROnPlateau(optimizer),
        schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    ):
        ast.save_checkpoint(path, scheduler=scheduler)
        ast.load_checkpoint(path, scheduler=scheduler)
    write_checkpoint(path, {"counts": Counter("abba")})
    assert read_checkpoint(path)[1] == {"counts": {"a": 2, "b": 2}}


def test_parts_of_sharded_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ast_plugin.checkpoint.is_sharded", lambda tensor: tensor.numel() == 3)
    with pytest.raises(ConfigError, match=r"'x' holds tensors of which this process has a part only; save sharded"):
        write_checkpoint(tmp_path / "checkpoint.pt", {"x": {"a": [torch.zeros(3)]}})
    assert list(tmp_path.iterdir()) == []


class Stubborn:
    """A state that can be saved and not loaded."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError("not today")


def test_a_load_that_fails_halfway_puts_everything_back(tmp_path: Path) -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ast.save_checkpoint(tmp_path / "checkpoint.pt", scheduler=scheduler, odd=Stubborn())
    other, other_optimizer, other_ast = wrapped(conv_net(8))
    other_scheduler = torch.optim.lr_scheduler.StepLR(other_optimizer, 2)
    train(other, other_optimizer, range(4))
    other_scheduler.step()
    before = state_of(other, other_optimizer, other_scheduler)
    generator = torch.get_rng_state()
    with pytest.raises(
        StateError, match=r"state of 'odd' in '.*' does not fit: not today; .* as it was before, except 'odd'"
    ):
        other_ast.load_checkpoint(tmp_path / "checkpoint.pt", scheduler=other_scheduler, odd=Stubborn())
    assert other_ast.step == 4
    assert torch.equal(generator, torch.get_rng_state())
    assert_same(before, state_of(other, other_optimizer, other_scheduler))
    assert model.state_dict()._metadata == other.state_dict()._metadata  # type: ignore[attr-defined]  # torch's


@pytest.mark.parametrize("change", ["model", "sub_nets"])
def test_a_checkpoint_of_another_run_changes_nothing(change: str, tmp_path: Path) -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(6))
    ast.save_checkpoint(tmp_path / "checkpoint.pt")
    if change == "model":
        other = conv_net(2)
        other.head = nn.Linear(16, 7)
        other, other_optimizer, other_ast = wrapped(other)
    else:
        other, other_optimizer, other_ast = wrapped(conv_net(2), sparsities=(0.5, 0.9))
    before = state_of(other, other_optimizer)
    path = tmp_path / "checkpoint.pt"
    where = "model" if change == "model" else "optimizer"
    with pytest.raises(
        StateError, match=rf"(?s)state of '{where}' in '.*' does not fit: .*as it was before$"
    ) as caught:
        other_ast.load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert ("has the sub-nets s50, s80, s90, this run has s50, s90" in str(caught.value)) == (change == "sub_nets")
    assert_same(before, state_of(other, other_optimizer))


def test_names_must_agree(tmp_path: Path) -> None:
    _, optimizer, ast = wrapped()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    path = tmp_path / "checkpoint.pt"
    ast.save_checkpoint(path, scheduler=scheduler, epoch=1)
    with pytest.raises(StateError, match="also holds the state of 'scheduler'; pass the objects under these names"):
        ast.load_checkpoint(path)
    with pytest.raises(StateError, match="holds no state of 'plan'; it has 'model', 'optimizer', 'scheduler'"):
        ast.load_checkpoint(path, plan=scheduler)
    with pytest.raises(ConfigError, match=r"epoch must have state_dict\(\) and load_state_dict\(\), got int"):
        ast.load_checkpoint(path, scheduler=scheduler, epoch=2)  # type: ignore[arg-type]  # what users do
    for call in (ast.save_checkpoint, ast.load_checkpoint):
        with pytest.raises(ConfigError, match="'model' is in every checkpoint already"):
            call(path, model=nn.Linear(1, 1))
    with pytest.raises(StateError):
        load_together(path, {"a": scheduler}, {})


def test_a_chosen_sub_net_is_in_the_way(tmp_path: Path) -> None:
    _, _, ast = wrapped()
    ast.save_checkpoint(tmp_path / "checkpoint.pt")
    with ast.sub_net("s80"):
        with pytest.raises(ActivationError, match=r"save_checkpoint\(\) was called inside `with sub_net\('s80'\)`"):
            ast.save_checkpoint(tmp_path / "other.pt")
        with pytest.raises(ActivationError, match=r"load_checkpoint\(\) was called inside"):
            ast.load_checkpoint(tmp_path / "checkpoint.pt")
        with pytest.raises(ActivationError, match=r"finish\(\) was called inside"):
            ast.finish()


def test_equal_runs_give_equal_bytes_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("one.pt", "another.ckpt"):
        model, optimizer, ast = wrapped()
        train(model, optimizer, range(3))
        ast.save_checkpoint(tmp_path / name, epoch=1, random_state=False)
    first = (tmp_path / "one.pt").read_bytes()
    assert first == (tmp_path / "another.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pt") as archive:
        assert {entry.split("/")[0] for entry in archive.namelist()} == {"archive"}


def test_checksums_are_written_also_where_they_are_switched_off(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.arange(4)})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(tmp_path / "checkpoint.pt")[1], {"x": torch.arange(4)})


def test_a_file_that_cannot_be_written_is_a_save_error(tmp_path: Path) -> None:
    _, _, ast = wrapped()
    with pytest.raises(SaveError, match="add a file name"):
        ast.save_checkpoint(tmp_path)


def test_without_total_steps_finish_completes_sub_nets_that_never_trained(tmp_path: Path) -> None:
    told = []

    class Observer:
        @ast_plugin.hookimpl
        def ast_training_finished(self) -> None:
            told.append("finished")

    model = conv_net()
    optimizer = sgd(model)
    settings: dict[str, Any] = {"begin_step": 0, "end_step": 12, "update_interval": 6, "alternation": "fixed:s80"}
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8, 0.9), plugins=[Observer()], **settings)
    train(model, optimizer, range(15))
    with pytest.warns(UserWarning, match=r"call finish\(\) when the run is over") as caught:
        ast.save(tmp_path / "elastic.safetensors")
    assert [str(warning.message)[:13] for warning in caught] == ["sub-net 's50'", "sub-net 's90'"]
    before = snapshot(model)
    ast.finish()
    assert told == ["finished"]
    assert_same(before, snapshot(model))
    for name, target in (("s50", 0.5), ("s80", 0.8), ("s90", 0.9)):
        assert ast.masks.sparsity(name) == pytest.approx(target, abs=1e-3)
    masks = {name: {p: m.clone() for p, m in ast.masks.of(name).items()} for name in ast.sub_nets}
    ast.save(tmp_path / "elastic.safetensors")
    ast.finish()
    assert_same(masks, {name: dict(ast.masks.of(name)) for name in ast.sub_nets})


def test_finish_after_total_steps_does_nothing_more() -> None:
    told = []

    class Observer:
        @ast_plugin.hookimpl
        def ast_training_finished(self) -> None:
            told.append("finished")

    model = conv_net()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=(0.5, 0.9), total_steps=20, update_interval=4, plugins=[Observer()]
    )
    train(model, optimizer, range(20))
    history = ast.history
    ast.finish()
    assert told == ["finished"]
    assert ast.history == history
