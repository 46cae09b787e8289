"""Steps that train several sub-nets: the user's closure runs for each, gradients add up, the optimizer steps once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_reference import Reference, closure_of, cross_entropy, double_batch, train_jointly
from networks import adamw, conv_net, image_batch, mlp, nonzero, sgd, snapshot, train_step, vector_batch
from residual_networks import residual_groups, residual_net
from torch import Tensor, nn

import ast_plugin
from ast_plugin.alternation import AlternatingOrder
from ast_plugin.errors import ActivationError, ConfigError, PluginError, WrapError
from ast_plugin.hookspecs import AlternationRecord, hookimpl
from ast_plugin.integrations.family import plugin
from ast_plugin.preview import check_run
from ast_plugin.wrapping_checks import check_turns

pytestmark = pytest.mark.matrix

OPTIONS: dict[str, Any] = {"sparsities": (0.9, 0.5, 0.8), "total_steps": 40, "update_interval": 4}


class WholeNorm(torch.optim.Optimizer):
    """Gradient descent by the direction of the gradient of all parameters together; counts its steps in a group.

    Attributes:
        evaluations: How often a step calls the closure; it goes by the last gradient, as a line search would.
        broken: Whether a step raises after it has moved everything.
    """

    evaluations = 1
    broken = False

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        losses = []
        for _ in range(self.evaluations if closure is not None else 0):
            with torch.enable_grad():
                losses.append(closure())
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not trained:
            return None
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
        for group in self.param_groups:
            group["calls"] += 1
            for p in trained:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.5).add_(p.grad / norm)
                p.sub_(momentum, alpha=group["lr"] / group["calls"])
        if self.broken:
            raise RuntimeError("broken off")
        return losses[-1] if losses else None


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "nesterov": lambda model: sgd(model, nesterov=True),
    "adamw": adamw,
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),
    "whole norm": lambda model: WholeNorm(model.parameters()),
}


def wrapped(
    make: Callable[[Any], torch.optim.Optimizer] = sgd, model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = conv_net() if model is None else model
    optimizer = make(model)
    settings = {**OPTIONS, "alternation": "joint", "plugins": [plugin], **options}
    return model, optimizer, ast_plugin.wrap(optimizer, model, **settings)


@pytest.mark.parametrize("method", ["static", "granet", "rigl", "gmp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_that_of_gradients_added_by_hand(name: str, method: str) -> None:
    make, options = OPTIMIZERS[name], {"method": method, "grow_initialization": "keep"}
    reference = Reference(conv_net().double(), make, **OPTIONS, **options)
    model, optimizer, ast = wrapped(make, conv_net().double(), **options)
    for step in range(24):
        train_jointly(model, optimizer, [step], double_batch)
        reference.train([double_batch(step)])
    differences = reference.differences(model, ast)
    most = 1e-12 if name == "whole norm" else 0  # its sum runs over the parameters in another order
    assert {key: value for key, value in differences.items() if value > most} == {}
    assert len(differences) > 40


def test_momentum_of_every_sub_nets_batch_norm_is_its_own() -> None:
    reference = Reference(conv_net().double(), adamw, method="static", **OPTIONS)
    model, optimizer, _ = wrapped(adamw, conv_net().double(), method="static")
    for step in range(6):
        train_jointly(model, optimizer, [step], double_batch)
        reference.train([double_batch(step)])
    saved = optimizer.state_dict()["ast_plugin"]["normalization"]["optimizer"]
    assert set(saved) == {"s90", "s80"}  # the default's are the optimizer's own
    for sub_net, entries in saved.items():
        for name, entry in entries.items():
            expected = reference.optimizer.state[reference.nets[sub_net].get_parameter(name)]
            assert torch.equal(entry["exp_avg"], expected["exp_avg"]), (sub_net, name)
            assert float(entry["step"]) == 6
    assert len(optimizer.state) == len(list(model.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("default", ["s90", "s80"])
def test_another_default_sub_net_changes_nothing_but_what_is_at_rest(default: str) -> None:
    runs = []
    for chosen in (None, default):
        model, optimizer, ast = wrapped(adamw, conv_net().double(), default_sub_net=chosen)
        train_jointly(model, optimizer, range(9), double_batch)
        runs.append((ast, {name: ast.materialize(name) for name in ast.sub_nets}))
    for name in runs[0][0].sub_nets:
        for key, tensor in runs[0][1][name].items():
            assert torch.equal(tensor, runs[1][1][name][key]), (name, key)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_micro_batches_inside_the_closure_add_up_to_the_batch(make: Callable[..., Any]) -> None:
    def halves(step: int) -> list[tuple[Tensor, Tensor]]:
        inputs, labels = vector_batch(step)
        return list(zip(inputs.double().chunk(2), labels.chunk(2), strict=True))

    options: dict[str, Any] = {**OPTIONS, "method": "rigl", "grow_initialization": "keep"}
    reference = Reference(mlp().double(), make, **options)
    model, optimizer, ast = wrapped(make, mlp().double(), **options)
    for step in range(20):
        optimizer.step(closure_of(model.train(), optimizer, halves(step)))
        reference.train(halves(step))
    assert not any(reference.differences(model, ast).values())


def test_a_closure_may_leave_clearing_to_the_loop_and_may_clear_in_place() -> None:
    runs = []
    for way in ("inside", "outside", "in place"):
        model, optimizer, _ = wrapped(method="rigl")
        for step in range(10):
            model.train()
            closure = closure_of(model, optimizer, [image_batch(step)], clear=way == "inside")
            if way == "outside":
                optimizer.zero_grad()
            if way == "in place":
                plain = closure

                def closure(plain: Any = plain, optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad(set_to_none=False)
                    return plain()

            optimizer.step(closure)
        runs.append(snapshot(model))
    for other in runs[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in runs[0].items())


def test_clipping_inside_the_closure_clips_each_sub_nets_gradient() -> None:
    model, optimizer, ast = wrapped(lambda model: torch.optim.SGD(model.parameters(), lr=1.0), mlp(), method="static")
    before = snapshot(model)
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        inputs, labels = vector_batch(0)
        loss = cross_entropy(model, (100 * inputs, labels))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        assert not any((model.get_parameter(n).grad[~ast.masks.get(ast.active, n)]).any() for n in ast.masks.parameters)
        return loss

    optimizer.step(closure)
    assert norms == pytest.approx([0.1] * 3, rel=1e-3)
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()]).norm()
    assert 0.1 < moved.item() <= 0.3 + 1e-6


def test_frozen_weights_are_those_that_no_sub_net_keeps() -> None:
    model, optimizer, ast = wrapped(adamw, inactive="freeze", sparsities=(0.9, 0.7), method="set")
    for step in range(12):
        before = snapshot(model)
        state = {name: copy.deepcopy(optimizer.state[model.get_parameter(name)]) for name in ast.masks.parameters}
        train_jointly(model, optimizer, [step])
        for name in ast.masks.parameters:
            kept = ast.masks.get("s90", name) | ast.masks.get("s70", name)
            after = model.get_parameter(name).detach()
            assert torch.equal(after[~kept], before[name][~kept])
            if step > 0:
                for key in ("exp_avg", "exp_avg_sq"):
                    now = optimizer.state[model.get_parameter(name)][key]
                    assert torch.equal(now[~kept], state[name][key][~kept])
            assert (after != before[name])[kept].float().mean() > 0.5
        alone = ast.masks.get("s90", "conv2.weight") & ~ast.masks.get("s70", "conv2.weight")
        if step > 0 and alone.any():
            assert (model.conv2.weight.detach() != before["conv2.weight"])[alone].any()


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_run_is_resumed_bit_for_bit(make: Callable[..., Any]) -> None:
    straight = wrapped(make)
    train_jointly(straight[0], straight[1], range(24))
    for stop in (1, 5, 13):
        model, optimizer, _ = wrapped(make)
        train_jointly(model, optimizer, range(stop))
        buffer = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), buffer)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        model, optimizer, ast = wrapped(make, conv_net(seed=7))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train_jointly(model, optimizer, range(stop, 24))
        assert ast.masks.checksum() == straight[2].masks.checksum()
        assert ast.statistics() == straight[2].statistics()
        for name in ast.sub_nets:
            expected = straight[2].materialize(name)
            assert all(torch.equal(t, expected[key]) for key, t in ast.materialize(name).items()), (stop, name)


def test_the_step_is_counted_once_and_every_sub_net_is_told_of() -> None:
    finished, switched = [], []

    class Watcher:
        @hookimpl
        def ast_step_finished(self, training: Any, step: int, sub_net: str) -> None:
            finished.append((step, sub_net, training.sub_nets_at(step)))

        @hookimpl
        def ast_sub_net_switched(self, sub_net: str) -> None:
            switched.append(sub_net)

    model, optimizer, ast = wrapped(plugins=[plugin, Watcher()])
    worn = []

    def closure() -> Tensor:
        worn.append(ast.active)
        return closure_of(model, optimizer, [image_batch(0)])()

    losses = [optimizer.step(closure) for _ in range(3)]
    assert worn == ["s50", "s80", "s90"] * 3  # the densest first
    assert finished == [(step, "s50", ("s50", "s80", "s90")) for step in range(3)]
    assert switched == ["s50"]  # at the beginning of the run
    assert ast.step == ast.statistics()["steps"] == 3
    assert {name: figures["steps"] for name, figures in ast.statistics()["sub_nets"].items()} == {
        "s90": 3,
        "s50": 3,
        "s80": 3,
    }
    assert ast.statistics()["checks"] == 0
    assert ast.needs_closure
    assert ast.active == "s50"
    assert all(0 < float(loss) / 3 < 3 for loss in losses)


def test_the_loss_that_is_returned_is_the_sum() -> None:
    model, optimizer, ast = wrapped(method="static", total_steps=10)
    with torch.no_grad():
        expected = []
        for name in ("s50", "s80", "s90"):
            with ast.sub_net(name):
                expected.append(cross_entropy(copy.deepcopy(model).train(), image_batch(0)).item())
    model.train()
    assert float(optimizer.step(closure_of(model, optimizer, [image_batch(0)]))) == pytest.approx(sum(expected))
    plain = closure_of(model, optimizer, [image_batch(1)])
    assert isinstance(optimizer.step(lambda: plain().item()), float)
    assert optimizer.step(lambda: (plain(), "seen")[1]) == "seen"
    assert optimizer.step(lambda: (plain(), None)[1]) is None
    assert ast.step == 4


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_every_evaluation_of_a_step_runs_all_turns_and_updates_masks_once(method: str) -> None:
    options: dict[str, Any] = {"method": method, "grow_initialization": "keep"}
    reference = Reference(conv_net().double(), OPTIMIZERS["whole norm"], **OPTIONS, **options)
    model, optimizer, ast = wrapped(OPTIMIZERS["whole norm"], conv_net().double(), **options)
    optimizer.evaluations = reference.optimizer.evaluations = 3
    for step in range(12):
        train_jointly(model, optimizer, [step], double_batch)
        reference.train([double_batch(step)])
    assert max(reference.differences(model, ast).values()) < 1e-12


def test_an_optimizer_that_keeps_a_list_of_its_parameters_has_the_guests_in_it() -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    reference = Reference(conv_net().double(), make, method="static", **OPTIONS)
    model, optimizer, ast = wrapped(make, conv_net().double(), method="static")
    before = ast.private_state("s90")
    for step in range(4):
        train_jointly(model, optimizer, [step], double_batch)
        reference.train([double_batch(step)])
    assert max(reference.differences(model, ast).values()) < 1e-9
    assert (ast.private_state("s90")["norm1.weight"] - before["norm1.weight"]).abs().max() > 1e-3


def test_channel_sub_nets_stay_inside_denser_ones_and_compute_with_smaller_weights() -> None:
    runs = {}
    for slicing in ("auto", "off"):
        model, optimizer, ast = wrapped(
            sgd,
            residual_net().double(),
            sparsities=(0.75, 0.25, 0.5),
            pattern="channel",
            groups=residual_groups(),
            slicing=slicing,
            method="granet",
        )
        for step in range(40):
            train_jointly(model, optimizer, [step], double_batch)
            kept = {name: ast.kept_channels(name) for name in ast.sub_nets}
            for denser, sparser in (("s25", "s50"), ("s50", "s75")):
                assert all(not (kept[sparser][n] & ~kept[denser][n]).any() for n in kept[denser])
        assert ast.at_target
        private = {f"{name}/{key}": t for name in ast.sub_nets for key, t in ast.private_state(name).items()}
        runs[slicing] = ({**snapshot(model), **private}, ast.masks.checksum())
    assert runs["auto"][1] == runs["off"][1]
    for name, tensor in runs["auto"][0].items():
        if "running" not in name:  # those of dropped channels stand still in smaller weights
            assert torch.allclose(tensor, runs["off"][0][name], atol=1e-9), name


def test_a_compiled_model_trains_as_a_plain_one() -> None:
    runs = []
    for compiled in (False, True):
        model = conv_net()
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = sgd(model)
        ast = ast_plugin.wrap(optimizer, called, alternation="joint", plugins=[plugin], method="rigl", **OPTIONS)
        train_jointly(called, optimizer, range(8))
        runs.append((snapshot(model), ast.masks.checksum()))
    assert runs[0][1] == runs[1][1]
    assert all(torch.allclose(tensor, runs[1][0][name], atol=1e-5) for name, tensor in runs[0][0].items())


def test_grown_weights_start_at_zero_where_no_other_sub_net_keeps_them() -> None:
    model, optimizer, ast = wrapped(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), method="set", inactive="freeze"
    )
    assert ast.config.grow_initialization is None
    for step in range(12):
        before = {name: {p: m.clone() for p, m in ast.masks.of(name).items()} for name in ast.sub_nets}
        train_jointly(model, optimizer, [step])
        for parameter in ast.masks.parameters:
            was = torch.stack([before[name][parameter] for name in ast.sub_nets]).any(0)
            now = torch.stack([ast.masks.get(name, parameter) for name in ast.sub_nets]).any(0)
            fresh = model.get_parameter(parameter).detach()[now & ~was]
            assert not fresh.any()


# ---------------------------------------------------------------- orders that train now one, now several


class Pairs:
    """Even steps train the first and the last sub-net together, odd ones the middle one alone."""

    name = "pairs"

    def sub_net_at(self, step: int) -> int:
        raise AssertionError("not asked where sub_nets_at() answers")

    def sub_nets_at(self, step: int) -> list[int]:
        return [1] if step % 2 else [0, 2]

    def is_group_start(self, step: int) -> bool:
        return False


def offering(build: Callable[..., Any]) -> object:
    class Offer:
        @hookimpl
        def ast_alternations(self) -> list[AlternationRecord]:
            return [AlternationRecord(name="pairs", description="for tests", build=build)]

    return Offer()


def test_an_order_may_train_now_one_and_now_several_without_the_default() -> None:
    model, optimizer, ast = wrapped(
        adamw,
        conv_net().double(),
        alternation="pairs",
        plugins=[offering(Pairs)],
        default_sub_net="s50",
        method="rigl",
    )
    seen = []
    for step in range(20):
        seen.append(ast.sub_nets_at(step))
        assert ast.active == seen[-1][0]
        before = {name: ast.private_state(name) for name in ast.sub_nets}
        if step % 4 == 1:  # a step that trains one needs no closure
            train_step(model, optimizer, double_batch(step))
        else:
            train_jointly(model, optimizer, [step], double_batch)
        for name in ast.sub_nets:
            moved = any(not torch.equal(t, before[name][key]) for key, t in ast.private_state(name).items())
            assert moved == (name in seen[-1])
    assert seen[:2] == [("s80", "s90"), ("s50",)]
    figures = ast.statistics()
    assert figures["steps"] == 20
    assert {name: figures["sub_nets"][name]["steps"] for name in ast.sub_nets} == {"s90": 10, "s50": 10, "s80": 10}
    assert figures["checks"] == 0  # the step before a single one is one of several, which leaves no reference
    assert not model.training or nonzero(model, ast) > 0


def test_turns_of_one_sub_net_each_are_those_of_an_ordinary_order() -> None:
    class Singly(AlternatingOrder):
        def sub_nets_at(self, step: int) -> tuple[int, ...]:
            return (self.sub_net_at(step),)

    runs = []
    for options in (
        {"alternation": "pairs", "plugins": [offering(lambda *, count: Singly(count))]},
        {"alternation": "alternating"},
    ):
        model, optimizer, ast = wrapped(adamw, **options)
        for step in range(20):
            train_step(model, optimizer, image_batch(step))
        runs.append((snapshot(model), ast.masks.checksum(), ast.statistics()))
    assert all(torch.equal(tensor, runs[1][0][name]) for name, tensor in runs[0][0].items())
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], r"chose \[\] for step 0; sub_nets_at\(\) must return the indices of one or more sub-nets, each once"),
        ([1, 1], r"chose \[1, 1\] for step 0"),
        (2, "chose 2 for step 0"),
        ([0, 3], "chose 3 for step 0; it must return the index of one of the 3 sub-nets, from 0"),
        (["s50"], "chose 's50' for step 0"),
    ],
)
def test_a_bad_answer_of_an_order_is_refused(answer: Any, message: str) -> None:
    class Odd(Pairs):
        def sub_nets_at(self, step: int) -> Any:
            return answer

    with pytest.raises(PluginError, match=message):
        wrapped(alternation="pairs", plugins=[offering(Odd)])


# ---------------------------------------------------------------- what goes wrong


def test_a_training_forward_outside_of_a_closure_is_refused() -> None:
    model, optimizer, ast = wrapped()
    images, labels = image_batch(0)
    before = snapshot(model)
    with pytest.raises(ActivationError, match=r"'joint' trains 3 sub-nets in this step.*optimizer\.step\(closure\)"):
        model.train()(images)
    with pytest.raises(ActivationError, match="call optimizer"):
        train_step(model, optimizer, (images, labels))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ActivationError, match="call optimizer"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert ast.step == 0
    with torch.no_grad():
        model.eval()(images)  # evaluation goes on as ever
    optimizer.zero_grad()
    optimizer.step()  # nothing to step by
    assert ast.step == 0
    train_jointly(model, optimizer, range(2))
    assert ast.step == 2


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_an_exception_in_a_later_turn_leaves_the_model_dense_and_the_step_is_made_again(method: str) -> None:
    updates = []

    class Watcher:
        @hookimpl
        def ast_masks_updated(self, sub_net: str, step: int) -> None:
            updates.append((step, sub_net))

    straight = wrapped(adamw, method=method)
    model, optimizer, ast = wrapped(adamw, method=method, plugins=[plugin, Watcher()])
    for step in range(12):
        train_jointly(straight[0], straight[1], [step])
        plain, calls = closure_of(model.train(), optimizer, [image_batch(step)]), []

        def failing(plain: Any = plain, calls: Any = calls) -> Tensor:
            calls.append(None)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return plain()

        private = {name: ast.private_state(name) for name in ast.sub_nets}
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(failing)
        assert ast.step == step
        assert ast.active == "s50"
        assert nonzero(model, ast) > 0.9 * ast.masks.total()
        for name, state in private.items():
            ast._parts.normalization.load(name, state)  # running statistics of the turns that were over
        optimizer.step(plain)
    assert len(set(updates)) == len(updates)
    assert len(updates) == (0 if method == "static" else 9)
    for name in ast.sub_nets if method == "static" else ():
        expected = straight[2].materialize(name)
        assert all(torch.equal(t, expected[key]) for key, t in ast.materialize(name).items()), name


def test_an_optimizer_that_breaks_off_gives_its_guests_back() -> None:
    model, optimizer, ast = wrapped(OPTIMIZERS["whole norm"], inactive="freeze", method="static", sparsities=(0.9, 0.8))
    train_jointly(model, optimizer, range(2))
    before = snapshot(model)
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="broken off"):
        train_jointly(model, optimizer, [2])
    optimizer.broken = False
    state = optimizer.state_dict()
    count = len(list(model.parameters()))
    assert [len(group["params"]) for group in state["param_groups"]] == [count]
    assert len(state["state"]) == count
    assert ast.step == 2
    for name in ast.masks.parameters:
        kept = ast.masks.get("s90", name) | ast.masks.get("s80", name)
        assert torch.equal(model.get_parameter(name).detach()[~kept], before[name][~kept])
    train_jointly(model, optimizer, range(2, 5))
    assert ast.step == 5
    assert len(optimizer.state) == count


def test_states_that_are_read_in_the_middle_of_a_step_are_those_at_rest() -> None:
    model, optimizer, ast = wrapped(adamw)
    seen = []

    def look(*_: Any) -> None:
        seen.append((optimizer.state_dict(), ast.private_state("s90"), copy.deepcopy(model).state_dict()))

    optimizer.register_step_post_hook(look)
    straight = wrapped(adamw)
    for step in range(6):
        train_jointly(model, optimizer, [step])
        train_jointly(straight[0], straight[1], [step])
    count = len(list(model.parameters()))
    for state, _, weights in seen:
        assert [len(group["params"]) for group in state["param_groups"]] == [count]
        assert len(state["state"]) == count
        assert set(weights) == set(model.state_dict())
    for name in ast.sub_nets:
        expected = straight[2].materialize(name)
        assert all(torch.equal(t, expected[key]) for key, t in ast.materialize(name).items()), name


def test_a_closure_without_gradients_trains_nothing() -> None:
    model, optimizer, ast = wrapped()
    before = snapshot(model)
    optimizer.zero_grad()
    assert optimizer.step(lambda: 1.0) == 3.0
    assert ast.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_a_sub_net_whose_closure_gives_up_is_left_out_of_the_step() -> None:
    model, optimizer, ast = wrapped()
    plain = closure_of(model.train(), optimizer, [image_batch(0)])
    before = ast.private_state("s90")["norm0.weight"]

    def closure() -> Tensor:
        if ast.active == "s90":
            optimizer.zero_grad()
            return torch.zeros(())
        return plain()

    optimizer.step(closure)
    assert ast.step == 1
    assert {name: figures["steps"] for name, figures in ast.statistics()["sub_nets"].items()} == {
        "s90": 0,
        "s50": 1,
        "s80": 1,
    }
    assert torch.equal(ast.private_state("s90")["norm0.weight"], before)
    assert not torch.equal(ast.private_state("s80")["norm0.weight"], before)


def test_what_cannot_be_trained_together_is_refused() -> None:
    model = residual_net()
    optimizer = sgd(model)
    with pytest.raises(ConfigError, match=r"'vr-pge' draws the masks of one sub-net at every step.*'joint'"):
        ast_plugin.wrap(
            optimizer,
            model,
            sparsities=(0.5,),
            method="vr-pge",
            pattern="channel",
            total_steps=10,
            alternation="joint",
            groups=residual_groups(),
            plugins=[plugin],
        )
    assert not model._forward_pre_hooks
    with pytest.raises(WrapError, match="'pairs' trains several sub-nets in one step, and adds up gradients"):
        check_turns(Pairs(), samples=None, sharded=True)
    check_turns(AlternatingOrder(2), samples="vr-pge", sharded=True)
    config = ast_plugin.ASTConfig(sparsities=(0.5, 0.9), alternation="joint", total_steps=10)
    with pytest.raises(ConfigError, match=r"'joint' trains several .* this training loop calls optimizer\.step"):
        check_run(config, model, plugins=[plugin], closure=False)
    check_run(config, model, plugins=[plugin])


@pytest.mark.parametrize("step", [-1, 0.5, "3", True])
def test_no_step_is_refused(step: Any) -> None:
    _, _, ast = wrapped()
    with pytest.raises(ConfigError, match="step must be a whole number from 0"):
        ast.sub_nets_at(step)
