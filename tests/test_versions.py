"""Versions: what they put on a model, what they leave behind, and what is refused meanwhile."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from channel_networks import conv_groups
from networks import (
    assert_same,
    conv_net,
    image_batch,
    mlp,
    nonzero,
    plain_conv_net,
    snapshot,
    train,
    train_step,
    vector_batch,
    wrapped,
)
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin import tensor_exchange
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ActivationError, ConfigError
from ast_plugin.report import Report
from ast_plugin.versions import Version

pytestmark = pytest.mark.matrix

Run = tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]

CHANNELS: dict[str, Any] = {"pattern": "channel", "groups": conv_groups(), "sparsities": (0.25, 0.5)}


def shared(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> dict[str, Tensor]:
    """Return copies of the parameters that no sub-net has for its own."""
    private = ast.private_state(ast.default_sub_net)
    return {name: p.detach().clone() for name, p in model.named_parameters() if name not in private}


def present(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> Version:
    """Return the last version as one of its own."""
    return Version(
        weights=shared(model, ast),
        masks={name: {key: mask.clone() for key, mask in ast.masks.of(name).items()} for name in ast.sub_nets},
        private={name: ast.private_state(name) for name in ast.sub_nets},
    )


def copied(version: Version) -> Version:
    return copy.deepcopy(version)


def same(one: Version, other: Version) -> None:
    assert_same(dict(one.weights), dict(other.weights))
    assert_same(dict(one.masks), dict(other.masks))
    assert_same(dict(one.private), dict(other.private))


def of(ast: ast_plugin.AlternatingSparseTraining) -> dict[str, dict[str, Tensor]]:
    return {name: ast.materialize(name) for name in ast.sub_nets}


def everything(run: Run) -> dict[str, Any]:
    """Return all that a run consists of, without going through ``state_dict`` of the model."""
    model, optimizer, _ = run
    return {
        "model": snapshot(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),
    }


def early(steps: int = 12, **options: Any) -> tuple[Run, Version, dict[str, dict[str, Tensor]]]:
    """Return a run of twice as many steps, and a version of what it was half way, with its sub-nets."""
    run = wrapped(**options)
    model, optimizer, ast = run
    train(model, optimizer, range(steps))
    version, nets = present(model, ast), of(ast)
    train(model, optimizer, range(steps, 2 * steps))
    ast.add_version("early", lambda: version, preferred=True)
    return run, version, nets


OPTIONS: dict[str, dict[str, Any]] = {
    "three sub-nets": {},
    "one sub-net": {"sparsities": (0.8,)},
    "shared BatchNorm": {"private_normalization": False},
    "n:m": {"pattern": "2:4", "sparsities": ("2:4", "1:4")},
    "frozen": {"inactive": "freeze"},
    "channels as smaller weights": CHANNELS,
    "channels masked": {**CHANNELS, "slicing": "off"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_version_is_on_for_a_block_and_leaves_no_trace(name: str) -> None:
    run, version, nets = early(**OPTIONS[name])
    model, _, ast = run
    last, before, kept = of(ast), everything(run), copied(version)
    assert any(not torch.equal(last[n][key], nets[n][key]) for n in nets for key in nets[n])
    with ast.version("early") as given:
        assert given is model
        for sub_net, expected in of(ast).items():
            shown = {key: t for key, t in expected.items() if key in nets[sub_net]}
            if name in ("one sub-net", "shared BatchNorm"):  # statistics are buffers that this version does not have
                running = [key for key in shown if "running" in key or key.endswith("tracked")]
                assert_same({k: shown[k] for k in running}, {k: last[sub_net][k] for k in running})
                shown = {key: t for key, t in shown.items() if key not in running}
            assert_same(shown, {key: nets[sub_net][key] for key in shown})
            assert_same(ast.masks.of(sub_net), dict(kept.masks[sub_net]))
    assert_same(before, everything(run))
    assert_same(last, of(ast))
    same(version, kept)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_as_if_there_had_been_no_version(name: str) -> None:
    plain = wrapped(**OPTIONS[name])
    train(*plain[:2], range(40))
    run, _, _ = early(**OPTIONS[name])
    model, optimizer, ast = run
    for step in range(24, 40):
        with ast.version("early"), torch.no_grad():
            for sub_net in ast.sub_nets:
                with ast.sub_net(sub_net):
                    model.eval()(image_batch(step)[0])
        train_step(model, optimizer, image_batch(step))
    one, other = everything(plain), everything(run)
    assert_same(one["model"], other["model"])
    assert_same(one["optimizer"], other["optimizer"])
    for sub_net in ast.sub_nets:
        assert_same(plain[2].masks.of(sub_net), ast.masks.of(sub_net))


def test_outputs_inside_are_those_of_the_sub_nets_of_then() -> None:
    for options in ({}, CHANNELS):
        (model, _, ast), _, nets = early(**options)
        model.eval()
        images, plain = image_batch(99)[0], conv_net().eval()
        with ast.version("early"), torch.no_grad():
            for sub_net, state in nets.items():
                with ast.sub_net(sub_net):
                    found = model(images)
                plain.load_state_dict(state)
                torch.testing.assert_close(found, plain(images))
            plain.load_state_dict(nets[ast.default_sub_net])  # what is chosen where nobody chooses
            torch.testing.assert_close(model(images), plain(images))


def test_an_exception_inside_leaves_no_trace() -> None:
    for options in ({}, CHANNELS):
        run, version, _ = early(**options)
        model, _, ast = run
        before, kept = everything(run), copied(version)

        def fail(*_: Any) -> None:
            raise KeyError

        handle = model.eval().conv2.register_forward_hook(fail)
        with pytest.raises(KeyError), ast.version("early"), ast.sub_net(ast.sub_nets[-1]):
            model(image_batch(0)[0])
        handle.remove()
        assert_same(before["model"], everything(run)["model"])
        assert_same(before["optimizer"], everything(run)["optimizer"])
        same(version, kept)
        assert ast.chosen is None


# Five weights are written twice on the way in, then three times fifteen tensors of BatchNorm; and again on the way out.
@pytest.mark.parametrize("at", [0, 1, 2, 9, 10, 11, 55, 98, 99, 100, 101, 109, 110, 111, 155, 198])
def test_an_interrupt_at_any_write_loses_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, version, nets = early()
    ast = run[2]
    before, kept = everything(run), copied(version)
    written = 0
    original = Tensor.copy_

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal written
        written += 1
        if written == at + 1:
            raise KeyboardInterrupt
        result = original(self, *args, **kwargs)
        if written == at + 2:  # the other side of a write
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", copy_)
        with pytest.raises(KeyboardInterrupt), ast.version("early"):
            pass
    assert_same(before["model"], everything(run)["model"])
    assert_same(before["optimizer"], everything(run)["optimizer"])
    same(version, kept)
    with ast.version("early"):
        assert_same(nets, of(ast))


def test_no_second_copy_of_the_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, _, ast), version, _ = early()
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def copied_and_counted(tensor: Tensor, like: Tensor | None = None) -> Tensor:
        nonlocal most
        copy_made = tensor_exchange_copied(tensor, like)
        made.append(weakref.ref(copy_made))
        most = max(most, sum(0 if (alive := ref()) is None else alive.numel() for ref in made))
        return copy_made

    tensor_exchange_copied = tensor_exchange.copied
    monkeypatch.setattr(tensor_exchange, "copied", copied_and_counted)
    lying = {name: tensor.data_ptr() for name, tensor in version.weights.items()}
    with ast.version("early"):
        # What the model had lies in the version's own tensors.
        assert {name: tensor.data_ptr() for name, tensor in version.weights.items()} == lying
        assert not torch.equal(version.weights["conv2.weight"], model.get_parameter("conv2.weight"))
    assert most == max(p.numel() for p in model.parameters())  # one tensor at a time


def test_random_generators_are_left_as_they_were() -> None:
    (_, _, ast), _, _ = early()
    drawn = random.random, numpy.random.rand, lambda: torch.rand(1).item()

    def seed() -> None:
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = [draw() for draw in drawn]
    seed()
    with ast.version("early"):
        for draw in drawn:
            draw()
    assert [draw() for draw in drawn] == expected


# ---------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("options", [{}, CHANNELS], ids=["masked", "sliced"])
def test_statistics_estimated_inside_stay_with_the_version(options: dict[str, Any]) -> None:
    run, version, _ = early(**options)
    ast = run[2]
    before, kept = everything(run), copied(version)
    batches = [image_batch(step) for step in range(100, 104)]
    with ast.version("early"):
        ast.recalibrate(batches)
        found = {name: ast.private_state(name) for name in ast.sub_nets}
    assert_same(before["model"], everything(run)["model"])
    assert_same(before["optimizer"], everything(run)["optimizer"])
    assert_same(dict(version.private), found)
    for name in ast.sub_nets:
        assert not torch.equal(found[name]["norm1.running_mean"], kept.private[name]["norm1.running_mean"])
        assert torch.equal(found[name]["norm1.weight"], kept.private[name]["norm1.weight"])
    with ast.version("early"):  # and are there again
        assert_same(found, {name: ast.private_state(name) for name in ast.sub_nets})


def test_statistics_that_sub_nets_share_stay_with_the_version_as_buffers() -> None:
    for options in ({"sparsities": (0.8,)}, {"private_normalization": False}):
        run, version, _ = early(**options)
        ast = run[2]
        before = everything(run)
        with ast.version("early"):
            ast.recalibrate([image_batch(100)], sub_nets=[ast.sub_nets[0]])
            found = run[0].get_buffer("norm1.running_var").clone()
        assert_same(before["model"], everything(run)["model"])
        assert torch.equal(version.weights["norm1.running_var"], found)
        assert "norm1.running_var" in version.weights
        with ast.version("early"):
            assert torch.equal(run[0].get_buffer("norm1.running_var"), found)
        assert_same(before["model"], everything(run)["model"])


def test_what_a_version_leaves_out_is_that_of_the_run() -> None:
    (_, _, ast), full, _ = early()
    version = Version(weights={"head.weight": full.weights["head.weight"].clone()}, masks={}, private={})
    ast.add_version("part", lambda: version)
    last = of(ast)
    with ast.version("part"):
        inside = of(ast)
    for sub_net, state in inside.items():
        differing = {key for key, tensor in state.items() if not torch.equal(tensor, last[sub_net][key])}
        assert differing == {"head.weight"}
    assert version.private == {}
    assert set(version.weights) == {"head.weight"}


# ---------------------------------------------------------------- blocks within blocks


def test_versions_and_sub_nets_nest_in_any_order() -> None:
    (model, _, ast), _, nets = early()
    last = of(ast)

    def shown() -> dict[str, Tensor]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    with ast.sub_net("s90"):
        with ast.version("early"):
            assert_same(shown(), nets["s90"])
            with ast.sub_net("s50"):
                assert_same(shown(), nets["s50"])
                with ast.version("last"):
                    assert_same(shown(), last["s50"])
                    assert ast.masks.sparsity("s50") == pytest.approx(0.5, abs=0.3)
                assert_same(shown(), nets["s50"])
            assert_same(shown(), nets["s90"])
        assert_same(shown(), last["s90"])
    with ast.version("last"):
        assert_same(of(ast), last)
    assert nonzero(model, ast) == ast.masks.total()


def test_one_version_inside_of_another() -> None:
    (model, optimizer, ast), early_one, nets = early()
    later = present(model, ast)
    nets_later = of(ast)
    train(model, optimizer, range(24, 30))
    ast.add_version("later", lambda: later)
    kept = copied(early_one), copied(later)
    last = of(ast)
    with ast.version("early"):
        with ast.version("later"):
            assert_same(of(ast), nets_later)
        assert_same(of(ast), nets)
    assert_same(of(ast), last)
    same(early_one, kept[0])
    same(later, kept[1])


# ---------------------------------------------------------------- the state of the run


def test_the_state_of_the_optimizer_is_that_of_the_run_inside_too() -> None:
    class Holder:
        def __init__(self) -> None:
            self.version: Version | None = None

        @ast_plugin.hookimpl
        def ast_sub_net_switched(self, training: ast_plugin.AlternatingSparseTraining) -> None:
            if not training.attached:
                training.add_version("early", lambda: self.version)

        def state_dict(self) -> dict[str, Any]:
            return {} if self.version is None else {"weights": dict(self.version.weights)}  # not copied

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Nothing to go on with."""

    holder = Holder()
    model, optimizer, ast = wrapped(holder=holder)
    train(model, optimizer, range(12))
    assert ast.versions == ("last",)
    holder.version = present(model, ast)
    train(model, optimizer, range(12, 24))
    expected, nets = copy.deepcopy(optimizer.state_dict()), of(ast)
    with ast.version("early"):
        states = [optimizer.state_dict(), {**optimizer.state_dict(), "ast_plugin": ast.state_dict(full=True)}]
        with ast.sub_net("s90"):
            states.append(optimizer.state_dict())
        for sub_net in ast.sub_nets:
            assert not torch.equal(ast.materialize(sub_net)["conv2.weight"], nets[sub_net]["conv2.weight"])
    for state in (states[0], states[2]):
        assert_same(expected, state)
    _, _, other = wrapped(holder=Holder())
    other.load_state_dict(states[1]["ast_plugin"])
    assert other.step == 24
    for sub_net in ast.sub_nets:
        assert_same(other.masks.of(sub_net), ast.masks.of(sub_net))


def test_modes_of_an_optimizer_change_the_weights_of_the_run_inside_too() -> None:
    class Doubling(torch.optim.SGD):
        """Has its weights doubled in evaluation, as schedule-free methods have others."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            for group in self.param_groups:
                group["train_mode"] = True

        def _scale(self, factor: float, train: bool) -> None:
            for group in self.param_groups:
                if group["train_mode"] != train:
                    group["train_mode"] = train
                    for p in group["params"]:
                        p.data.mul_(factor)

        def eval(self) -> None:
            self._scale(2.0, False)

        def train(self) -> None:
            self._scale(0.5, True)

    model = conv_net()
    optimizer = Doubling(model.parameters())
    _, _, ast = wrapped(model, optimizer)
    train(model, optimizer, range(6))
    version = present(model, ast)
    kept = copied(version)
    train(model, optimizer, range(6, 9))
    ast.add_version("early", lambda: version)
    before = snapshot(model)
    with ast.version("early"):
        optimizer.eval()
        assert torch.equal(model.conv2.weight, kept.weights["conv2.weight"])
    assert torch.equal(model.conv2.weight, 2 * before["conv2.weight"])
    optimizer.train()
    assert_same(before, snapshot(model))
    same(version, kept)


@pytest.mark.parametrize(
    "act",
    [
        lambda model, optimizer, ast, path: optimizer.step(),
        lambda model, optimizer, ast, path: optimizer.load_state_dict(optimizer.state_dict()),
        lambda model, optimizer, ast, path: model.load_state_dict(model.state_dict()),
        lambda model, optimizer, ast, path: ast.load_state_dict(ast.state_dict()),
        lambda model, optimizer, ast, path: ast.save_checkpoint(path / "run.pt"),
        lambda model, optimizer, ast, path: ast.load_checkpoint(path / "run.pt"),
        lambda model, optimizer, ast, path: ast.finish(),
        lambda model, optimizer, ast, path: ast.detach(),
        lambda model, optimizer, ast, path: model.train()(image_batch(0)[0]),
    ],
    ids=["step", "optimizer", "model", "run", "save", "load", "finish", "detach", "forward"],
)
@pytest.mark.parametrize("version", ["early", "last"])
def test_what_would_go_on_with_the_run_is_refused_inside(act: Any, version: str, tmp_path: Path) -> None:
    run, kept, _ = early()
    model, optimizer, ast = run
    before, theirs = everything(run), copied(kept)
    with ast.version(version), pytest.raises(ActivationError, match=rf"inside `with version\('{version}'\)`"):
        act(model, optimizer, ast, tmp_path)
    assert_same(before["model"], everything(run)["model"])
    assert_same(before["optimizer"], everything(run)["optimizer"])
    same(kept, theirs)
    train_step(model, optimizer, image_batch(24))
    assert ast.step == 25


def test_a_version_in_the_middle_of_a_pass_is_refused() -> None:
    (model, _, ast), _, _ = early()

    def look(*_: Any) -> None:
        with ast.version("early"):
            pass

    handle = model.conv2.register_forward_hook(look)
    with pytest.raises(ActivationError, match="in the middle of a forward or backward pass"):
        model.train()(image_batch(0)[0])
    handle.remove()
    handle = model.conv2.register_full_backward_hook(look)
    loss = functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1])
    with pytest.raises(ActivationError, match="in the middle of a forward or backward pass"):
        loss.backward()
    handle.remove()


def test_a_backward_pass_through_a_forward_before_the_block_is_refused_by_autograd() -> None:
    (model, optimizer, ast), _, _ = early()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model.train()(image_batch(24)[0]), image_batch(24)[1])
    with ast.version("early"):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    train_step(model, optimizer, image_batch(24))
    assert ast.step == 25


def test_gradients_that_wait_for_their_step_are_left_alone() -> None:
    plain = wrapped()
    run, _, _ = early()
    train(*plain[:2], range(25))
    model, optimizer, ast = run
    optimizer.zero_grad()
    functional.cross_entropy(model.train()(image_batch(24)[0]), image_batch(24)[1]).backward()
    with ast.version("early"), torch.no_grad():
        model.eval()(image_batch(0)[0])
    optimizer.step()
    assert_same(everything(plain)["model"], everything(run)["model"])


# ---------------------------------------------------------------- moves, formats, what a version lies in


def test_a_version_of_another_type_is_put_on_and_stays_as_it_is() -> None:
    (model, _, ast), version, _ = early()
    wide = Version({key: value.double() for key, value in version.weights.items()}, version.masks, version.private)
    kept, before = copied(wide), snapshot(model)
    ast.add_version("wide", lambda: wide)
    with ast.version("wide"):
        assert torch.equal(model.conv2.weight, kept.weights["conv2.weight"].float())
    assert_same(before, snapshot(model))
    same(wide, kept)


@pytest.mark.parametrize("kind", ["expanded", "twice", "inference", "the model's own"])
def test_tensors_that_cannot_hold_a_value_alone_are_copied(kind: str) -> None:
    model, _, ast = wrapped(mlp(), method="static")
    weight = torch.full((16, 16), 0.5)
    if kind == "expanded":
        weights = {"2.weight": torch.tensor(0.5).expand(16, 16)}
    elif kind == "twice":
        weights = {"2.bias": weight[0], "2.weight": weight}
    elif kind == "inference":
        with torch.inference_mode():
            weights = {"2.weight": weight.clone()}
    else:
        weights = {"2.weight": model.get_parameter("2.weight")}
    expected = weights["2.weight"].detach().clone()
    version = Version(weights, {}, {})
    before = snapshot(model)
    ast.add_version("odd", lambda: version)
    with ast.version("odd"):
        assert torch.equal(model.get_parameter("2.weight"), expected)
        with torch.no_grad():
            model.get_parameter("2.weight").add_(1)  # is lost, as what is done to a sub-net in its block
    assert_same(before, snapshot(model))


def test_a_model_that_is_converted_inside_keeps_its_own_values() -> None:
    (model, _, ast), _, _ = early()
    expected = {key: value.double() if value.is_floating_point() else value for key, value in snapshot(model).items()}
    with ast.version("early"):
        model.double()
    assert_same(expected, snapshot(model))


def test_tied_weights_change_places_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    _, _, ast = wrapped(model, method="static", sparsities=(0.5,), include=("*",))
    version = Version({"0.weight": torch.ones(6, 6)}, {}, {})
    before = snapshot(model)
    ast.add_version("ones", lambda: version)
    with ast.version("ones"):
        assert torch.equal(model[2].weight, torch.ones(6, 6))
    assert_same(before, snapshot(model))
    assert torch.equal(version.weights["0.weight"], torch.ones(6, 6))


def test_a_compiled_model_computes_as_the_version() -> None:
    model = mlp()
    run = wrapped(torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), 0.1), method="static")
    called, optimizer, ast = run
    train(called, optimizer, range(3), vector_batch)
    weights = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    ast.add_version("nothing", lambda: Version(weights, {}, {}))
    with torch.no_grad():
        inputs = vector_batch(9)[0]
        before = called.eval()(inputs)
        with ast.version("nothing"):
            assert not called(inputs).any()
        assert torch.equal(called(inputs), before)


def test_a_copy_of_the_model_inside_is_one_of_the_version() -> None:
    (model, _, ast), _, nets = early()
    with ast.version("early"), ast.sub_net("s80"):
        taken = copy.deepcopy(model)
    assert_same(dict(taken.state_dict()), nets["s80"])


# ---------------------------------------------------------------- figures and files


def test_metrics_are_those_of_the_version_they_were_measured_on(tmp_path: Path) -> None:
    (model, _, ast), _, _ = early()
    ast.add_report_metric("accuracy", 0.5, sub_net="s80")
    with ast.version("early"):
        assert ast.metrics == {"s50": {}, "s80": {}, "s90": {}}
        ast.add_report_metric("accuracy", 0.75, sub_net="s80")
        assert ast.metrics["s80"] == {"accuracy": 0.75}
        record = {net.name: net for net in Report.from_training(ast).sub_nets}["s80"]
        assert record.metrics == {"accuracy": 0.75}
    assert ast.metrics["s80"] == {"accuracy": 0.5}
    _, _, other = wrapped()
    other.load_state_dict(ast.state_dict(full=True))
    other.add_version("early", lambda: present(model, ast))
    assert other.metrics["s80"] == {"accuracy": 0.5}
    with other.version("early"):
        assert other.metrics["s80"] == {"accuracy": 0.75}


def test_the_preferred_version_is_what_is_saved_unless_told_otherwise(tmp_path: Path) -> None:
    (_, _, ast), _, nets = early()
    last = of(ast)
    with ast.version("early"):
        ast.add_report_metric("accuracy", 0.75, sub_net="s80")
    ast.add_report_metric("accuracy", 0.5, sub_net="s80")
    assert ast.versions == ("last", "early")
    assert ast.preferred_version == "early"
    files: dict[str, Callable[[Path], None]] = {
        "unless told": lambda path: ast.save(path),
        "by name": lambda path: ast.save(path, version="early"),
        "last": lambda path: ast.save(path, version="last"),
    }
    for name, write in files.items():
        path = tmp_path / f"{name}.safetensors"
        with pytest.warns(UserWarning, match="is saved with sparsity"):
            write(path)
        contents = read_elastic(path)
        is_last = name == "last"
        for sub_net in ast.sub_nets:
            expected = (last if is_last else nets)[sub_net]
            assert_same({key: contents.tensor(sub_net, key) for key in expected}, expected)
        assert contents.metrics["s80"] == {"accuracy": 0.5 if is_last else 0.75}
        assert contents.header.get("version") == (None if is_last else "early")
    assert_same(of(ast), last)
    with ast.version("last"), pytest.warns(UserWarning, match="is saved with sparsity"):
        ast.save(tmp_path / "inside.safetensors")  # what is on, not what is preferred
    assert read_elastic(tmp_path / "inside.safetensors").metrics["s80"] == {"accuracy": 0.5}


def test_a_twin_is_written_with_the_masks_of_the_last_version(tmp_path: Path) -> None:
    (model, _, ast), _, _ = early(24)
    twin = ast.twin(copy.deepcopy(model))
    ast.save(tmp_path / "twin.safetensors", twin=twin)
    contents = read_elastic(tmp_path / "twin.safetensors")
    assert torch.equal(contents.masks.get("s80", "conv2.weight"), ast.masks.get("s80", "conv2.weight"))
    for given in ({"version": "early"}, {}):
        block = ast.version("last" if given else "early")
        with block, pytest.raises(ConfigError, match="a twin has the masks of the last version"):
            ast.save(tmp_path / "twin.safetensors", twin=twin, **given)


# ---------------------------------------------------------------- what is refused


def test_a_version_is_there_when_its_provider_says_so() -> None:
    _, _, ast = wrapped()
    held: list[Version] = []
    ast.add_version("later", lambda: held[-1] if held else None, preferred=True)
    assert (ast.versions, ast.preferred_version) == (("last",), "last")
    with (
        pytest.raises(ConfigError, match=r"there is no version 'later' yet, or any more: .*Known: last"),
        ast.version("later"),
    ):
        pass
    with pytest.raises(ConfigError, match="there is no version 'latr': "):
        ast.save("nowhere.safetensors", version="latr")
    held.append(Version({}, {}, {}))
    assert (ast.versions, ast.preferred_version) == (("last", "later"), "later")
    ast.add_version("best", lambda: held[-1], preferred=True)
    assert ast.preferred_version == "best"  # the last one that was added


def test_names_and_providers_that_cannot_be_are_refused() -> None:
    _, _, ast = wrapped()
    ast.add_version("mean", lambda: None)
    for name in ("last", "mean", "", 3):
        with pytest.raises(ConfigError, match="must be a non-empty string other than 'last', 'mean', got"):
            ast.add_version(name, lambda: None)
    with pytest.raises(ConfigError, match="provider must be a function that returns a Version or None"):
        ast.add_version("other", Version({}, {}, {}))
    ast.add_version("odd", lambda: {"weights": {}})
    with pytest.raises(ConfigError, match="the provider of version 'odd' must return a Version or None, got dict"):
        _ = ast.versions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": {"conv9.weight": torch.ones(1)}},
            r"weights of version 'bad' names 'conv9\.weight'.* did you mean",
        ),
        ({"weights": {"conv1.weight": torch.ones(3)}}, r"'conv1\.weight'\] must be a tensor of shape \(16, 8, 3, 3\)"),
        ({"weights": {"norm1.weight": torch.ones(16)}}, r"names 'norm1\.weight', which has no place here"),
        ({"masks": {"s70": {}}}, "masks of version 'bad' are for 's70', which is no sub-net: did you mean"),
        ({"masks": [1]}, "masks of version 'bad' must be a mapping from names of sub-nets, got list"),
        ({"masks": {"s80": {}}}, "masks of 's80' in version 'bad' lacks"),
        ({"private": {"s80": {}}}, "private tensors of 's80' in version 'bad' lacks"),
        ({"private": {"s80": {"norm1.weight": torch.ones(3)}}}, "private tensors of 's80' in version 'bad' lacks"),
    ],
)
def test_a_version_that_does_not_fit_is_refused_and_nothing_changes(change: dict[str, Any], message: str) -> None:
    run, _, _ = early()
    ast = run[2]
    version = Version(**{"weights": {}, "masks": {}, "private": {}, **change})
    ast.add_version("bad", lambda: version)
    before = everything(run)
    with pytest.raises(ConfigError, match=message), ast.version("bad"):
        pass
    assert_same(before["model"], everything(run)["model"])
    assert_same(before["optimizer"], everything(run)["optimizer"])
    train_step(run[0], run[1], image_batch(24))


def test_versions_of_a_model_without_batch_norm() -> None:
    model, optimizer, ast = wrapped(plain_conv_net())
    train(model, optimizer, range(6))
    version, nets = present(model, ast), of(ast)
    train(model, optimizer, range(6, 12))
    ast.add_version("early", lambda: version)
    with ast.version("early"):
        assert_same(of(ast), nets)


def test_after_detach_versions_can_still_be_looked_at_until_the_model_is_wrapped_anew() -> None:
    (model, optimizer, ast), _, nets = early()
    ast.detach()
    with ast.version("early"):
        assert_same(of(ast), nets)
    wrapped(model, optimizer)
    with pytest.raises(ActivationError, match="wrapped anew"), ast.version("early"):
        pass
