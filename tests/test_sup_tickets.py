"""Sup-tickets in whole runs: what is explored, averaged and pruned, and what a run refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_networks import mlp_groups
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, train_step, vector_batch, wrapped
from torch import Tensor, nn

import ast_plugin
from ast_plugin.errors import ConfigError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.family import SupTickets
from ast_plugin.integrations.family import plugin as family_plugin

pytestmark = pytest.mark.matrix

# Three cycles of 10 steps, from step 30 on.
CYCLES: dict[str, Any] = {"cycles": 3, "share": 0.5}
EARLY: dict[str, Any] = {"end_step": 0.4}


class Watcher:
    """Keeps the dense weights at the ends of cycles, the masks there, and the steps of mask updates."""

    def __init__(self, *ends: int) -> None:
        self.ends = ends
        self.weights: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, dict[str, Tensor]]] = []
        self.private: list[dict[str, dict[str, Tensor]]] = []
        self.updates: list[tuple[str, int]] = []
        self.rates: list[float | None] = []

    @hookimpl
    def ast_masks_updated(self, training: Any, sub_net: str, step: int) -> None:
        self.updates.append((sub_net, step))

    @hookimpl
    def ast_step_finished(self, training: Any, step: int) -> None:
        if step in self.ends:
            self.weights.append({n: t for n, t in snapshot(training.model).items() if t.is_floating_point()})
            self.masks.append({name: dict(training.masks.of(name)) for name in training.sub_nets})
            self.private.append({name: training.private_state(name) for name in training.sub_nets})


def run(
    tickets: SupTickets | None = None, *, steps: int = 60, model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining, Watcher]:
    watcher = Watcher(39, 49, 59)
    extra = {} if tickets is None else {"sup_tickets": tickets}
    model, optimizer, ast = wrapped(model, plugins=[watcher], **extra, **EARLY, **options)
    train(model, optimizer, range(steps))
    return model, optimizer, ast, watcher


def means(tickets: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([ticket[name] for ticket in tickets]).mean(dim=0) for name in tickets[0]}


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return masks of the `count` largest scores of all parameters together."""
    threshold = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values[count - 1]
    return {name: score >= threshold for name, score in scores.items()}


@pytest.mark.parametrize("method", ["granet", "rigl", "set", "gmp", "static"])
def test_one_net_is_the_mean_of_its_tickets_pruned_by_magnitude_to_its_own_number_of_weights(method: str) -> None:
    _, _, ast, seen = run(SupTickets(**CYCLES), sparsities=(0.8,), method=method)
    tickets = [
        {name: weight * masks["s80"][name] if name in masks["s80"] else weight for name, weight in weights.items()}
        for weights, masks in zip(seen.weights, seen.masks, strict=True)
    ]
    mean = means(tickets)
    kept = ast.masks.kept("s80")
    wanted = largest({name: mean[name].abs() for name in ast.masks.parameters}, kept)
    with ast.version("superposed"):
        found = ast.materialize("s80")
        assert ast.masks.kept("s80") == kept
    for name in ast.masks.parameters:
        torch.testing.assert_close(found[name], mean[name] * wanted[name], rtol=0, atol=1e-6)
    for name in ("stem.weight", "head.bias", "norm1.weight"):
        torch.testing.assert_close(found[name], mean[name], rtol=0, atol=1e-6)


def test_every_sub_net_of_an_alternating_run_is_pruned_from_one_mean_by_its_own_share_of_it() -> None:
    _, _, ast, seen = run(SupTickets(**CYCLES))
    prunable = ast.masks.parameters
    unions = [{p: torch.stack([m[n][p] for n in ast.sub_nets]).any(dim=0) for p in prunable} for m in seen.masks]
    mean = means([{p: w[p] * u[p] for p in prunable} for w, u in zip(seen.weights, unions, strict=True)])
    for name in ast.sub_nets:
        counts = {p: sum(masks[name][p].float() for masks in seen.masks) for p in prunable}
        by_any = {p: sum(union[p].float() for union in unions).clamp(min=1) for p in prunable}
        wanted = largest({p: mean[p].abs() * counts[p] / by_any[p] for p in prunable}, ast.masks.kept(name))
        private = means([{k: t for k, t in p[name].items() if t.is_floating_point()} for p in seen.private])
        with ast.version("superposed"):
            found = ast.materialize(name)
        for p in prunable:
            torch.testing.assert_close(found[p], mean[p] * wanted[p], rtol=0, atol=1e-6)
        for key, value in private.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        assert found["norm1.num_batches_tracked"] == seen.private[-1][name]["norm1.num_batches_tracked"]


def test_every_sub_net_explores_once_at_its_first_step_of_each_cycle_and_its_masks_are_fixed_otherwise() -> None:
    _, _, ast, seen = run(SupTickets(**CYCLES))
    in_cycles = [update for update in seen.updates if update[1] >= 30]
    # s50, s80 and s90 take turns from step 0 on, so the second cycle begins with s80.
    assert in_cycles == [
        *(("s50", 30), ("s80", 31), ("s90", 32)),
        *(("s80", 40), ("s90", 41), ("s50", 42)),
        *(("s90", 50), ("s50", 51), ("s80", 52)),
    ]
    targets = {"s50": 0.5, "s80": 0.8, "s90": 0.9}
    for name, target in targets.items():
        assert ast.masks.sparsity(name) == pytest.approx(target, abs=1e-3)


def test_exploration_exchanges_the_wanted_share_of_the_weights() -> None:
    model, optimizer, ast = wrapped(sparsities=(0.8,), sup_tickets=SupTickets(**CYCLES), method="set", **EARLY)
    train(model, optimizer, range(30))
    before = {name: mask.clone() for name, mask in ast.masks.of("s80").items()}
    train(model, optimizer, range(30, 31))
    for name in ("conv1.weight", "conv2.weight"):
        mask, kept = ast.masks.of("s80")[name], int(before[name].sum())
        gone = int((before[name] & ~mask).sum())
        # Half are dropped; some of them are among those that are grown at random.
        assert 0.4 * kept < gone <= 0.5 * kept
        assert int(mask.sum()) == kept


@pytest.mark.parametrize("options", [{"method": "static"}, {"explore": 0.0}])
def test_without_exploration_the_masks_stay_and_only_weights_are_averaged(options: dict[str, Any]) -> None:
    explore = options.pop("explore", 0.5)
    _, _, ast, seen = run(SupTickets(**CYCLES, explore=explore), **options)
    assert all(step < 30 for _, step in seen.updates)
    assert_same(seen.masks[0], seen.masks[2])
    for name in ast.sub_nets:
        with ast.version("superposed"):
            superposed = {key: mask.clone() for key, mask in ast.masks.of(name).items()}
        union = {key: ast.masks.union(key) for key in superposed}
        assert all(not bool((mask & ~union[key]).any()) for key, mask in superposed.items())


def test_the_run_itself_is_the_one_with_the_same_rates_given_by_hand() -> None:
    tickets = SupTickets(**CYCLES, lr=(0.001, 0.005), explore=0)
    model, _, ast, _ = run(tickets)
    by_hand, optimizer, _ = wrapped(**EARLY)
    rates: list[float] = []
    for step in range(60):
        place = (step - 30) % 10
        rates.append(0.1 if step < 30 else 0.001 + 0.004 * (1 - abs(2 * place / 9 - 1)))
        optimizer.param_groups[0]["lr"] = rates[-1]
        train_step(by_hand, optimizer, image_batch(step))
    for name, tensor in snapshot(model).items():
        torch.testing.assert_close(tensor, snapshot(by_hand)[name], rtol=1e-5, atol=1e-6)
    assert ast.versions == ("last", "superposed")
    assert max(rates[30:]) == pytest.approx(0.005, abs=5e-4)


def test_the_present_rate_and_the_place_in_the_cycles_can_be_logged() -> None:
    tickets = SupTickets(**CYCLES, lr=(0.001, 0.005))
    model, optimizer, _ = wrapped(sup_tickets=tickets, **EARLY)
    assert tickets.rate is None
    assert tickets.tickets == 0
    train(model, optimizer, range(44))
    assert optimizer.param_groups[0]["lr"] == 0.1
    rate = 0.001 + 0.004 * 8 / 9
    assert tickets.rate == pytest.approx(rate)
    assert tickets.statistics() == {
        "tickets": 1,
        "cycles": 3,
        "begin": 30,
        "steps_per_cycle": 10,
        "cycle": 2,
        "rate": tickets.rate,
    }
    train(model, optimizer, range(44, 60))
    assert (tickets.tickets, tickets.rate, tickets.statistics()["cycle"]) == (3, None, None)


def test_there_are_no_superposed_sub_nets_before_the_last_cycle_is_over() -> None:
    model, optimizer, ast = wrapped(sup_tickets=SupTickets(**CYCLES), **EARLY)
    train(model, optimizer, range(59))
    assert ast.versions == ("last",)
    with pytest.raises(ConfigError, match="superposed"), ast.version("superposed"):
        pass
    train(model, optimizer, range(59, 60))
    assert ast.versions == ("last", "superposed")


def test_the_file_holds_the_superposed_sub_nets_and_the_last_ones_on_request(tmp_path: Path) -> None:
    model, _, ast, _ = run(SupTickets(**CYCLES))
    before = snapshot(model)
    ast.save(tmp_path / "a.safetensors")
    ast.save(tmp_path / "b.safetensors", version="last")
    images = image_batch(99)[0]
    for file, version in (("a", "superposed"), ("b", "last")):
        other = conv_net(seed=5)
        elastic = ast_plugin.load(tmp_path / f"{file}.safetensors", other)
        for name in ast.sub_nets:
            with ast.version(version), ast.sub_net(name), torch.no_grad():
                wanted = model.eval()(images)
            with elastic.sub_net(name), torch.no_grad():
                torch.testing.assert_close(other.eval()(images), wanted, rtol=1e-5, atol=1e-6)
    assert_same(before, snapshot(model))


def test_training_goes_on_from_the_last_ticket_as_if_nobody_had_looked() -> None:
    def go(look: bool) -> dict[str, Tensor]:
        model, optimizer, ast, _ = run(SupTickets(**CYCLES))
        if look:
            with ast.version("superposed"), ast.sub_net("s90"):
                model.eval()(image_batch(0)[0])
        train(model, optimizer, range(60, 66))
        return snapshot(model)

    assert_same(go(True), go(False))


def test_detach_ends_the_cycles_and_the_superposed_sub_nets_can_still_be_saved(tmp_path: Path) -> None:
    _, optimizer, ast, _ = run(SupTickets(**CYCLES))
    ast.detach()
    assert not optimizer._optimizer_step_pre_hooks
    ast.save(tmp_path / "superposed.safetensors")
    assert ast.versions == ("last", "superposed")


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [image_batch(500 + index) for index in range(count)]


def test_batch_norm_of_the_superposed_sub_nets_is_estimated_from_data_where_there_are_any() -> None:
    averaged = run(SupTickets(**CYCLES))[2]
    given = run(SupTickets(**CYCLES, loader=batches()))[2]
    later = SupTickets(**CYCLES)
    ast = run(later)[2]
    later.recompute(batches())
    for name in ast.sub_nets:
        states = []
        for one in (averaged, given, ast):
            last = one.private_state(name)
            with one.version("superposed"):
                states.append(one.private_state(name))
            assert_same(last, averaged.private_state(name))  # the run's own is as it was
        assert_same(states[1], states[2])
        assert not torch.equal(states[0]["norm1.running_mean"], states[1]["norm1.running_mean"])
        assert torch.equal(states[0]["norm1.weight"], states[1]["norm1.weight"])
    assert later.recomputed
    with ast.version("superposed"), ast.sub_net("s90"), torch.no_grad():
        # The mean of what the first BatchNorm is fed: the stem's output, the same for all batches' sizes.
        features = torch.cat([ast.model.stem(images) for images, _ in batches()]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(ast.model.norm0.running_mean, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (iter(batches()), {}, "once for each of 3 sub-nets, and a list_iterator is used up after one"),
        (batches(), {"private_normalization": False}, "private_normalization is False; leave loader out"),
    ],
)
def test_a_loader_that_would_fail_when_the_run_is_over_is_refused_when_it_begins(
    loader: Any, options: dict[str, Any], message: str
) -> None:
    model = conv_net()
    optimizer = sgd(model)
    with pytest.raises(ConfigError, match=message):
        wrapped(model, optimizer, sup_tickets=SupTickets(**CYCLES, loader=loader), **EARLY, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loader_that_gives_no_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loader of SupTickets must give batches.*got 3"):
        SupTickets(loader=3)  # type: ignore[arg-type]


def test_a_model_without_batch_norm_and_one_whose_sub_nets_share_it() -> None:
    model = mlp()
    watcher = Watcher(39, 49, 59)
    _, optimizer, ast = wrapped(model, plugins=[watcher], sup_tickets=SupTickets(**CYCLES), **EARLY)
    train(model, optimizer, range(60), vector_batch)
    with ast.version("superposed"):
        torch.testing.assert_close(
            ast.materialize("s90")["4.bias"], means(list(watcher.weights))["4.bias"], rtol=0, atol=1e-6
        )
    _, _, shared, seen = run(SupTickets(**CYCLES), private_normalization=False)
    with shared.version("superposed"):
        found = shared.materialize("s80")
    for name in ("norm1.weight", "norm1.running_mean", "norm1.running_var"):
        torch.testing.assert_close(found[name], means(list(seen.weights))[name], rtol=0, atol=1e-6)
    assert found["norm1.num_batches_tracked"] == shared.model.norm1.num_batches_tracked


def test_superposed_sub_nets_keep_to_their_patterns() -> None:
    _, _, ast, _ = run(SupTickets(**CYCLES), sparsities=(0.5, "2:4", 0.9), method="rigl")
    with ast.version("superposed"):
        fourths = ast.masks.of("2:4")["conv2.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
        assert (fourths.sum(dim=1) == 2).all()
        assert ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)


def test_superposed_channel_sub_nets_lie_in_one_another_and_drop_whole_channels() -> None:
    _, optimizer, ast = wrapped(
        model := mlp(),
        sparsities=(0.25, 0.5, 0.75),
        pattern="channel",
        groups=mlp_groups(),
        sup_tickets=SupTickets(**CYCLES),
        **EARLY,
    )
    train(model, optimizer, range(60), vector_batch)
    last = {name: ast.kept_channels(name) for name in ast.sub_nets}
    with ast.version("superposed"):
        found = {name: ast.kept_channels(name) for name in ast.sub_nets}
    for name in ast.sub_nets:
        assert sum(int(u.sum()) for u in found[name].values()) == sum(int(u.sum()) for u in last[name].values())
    for denser, sparser in (("s25", "s50"), ("s50", "s75")):
        for group, units in found[sparser].items():
            assert not (units & ~found[denser][group]).any()


def test_steps_that_train_all_sub_nets_have_all_of_them_explore_at_once() -> None:
    watcher = Watcher(39, 49, 59)
    model, optimizer, ast = wrapped(
        alternation="joint",
        correction="off",
        plugins=[family_plugin, watcher],
        sup_tickets=SupTickets(**CYCLES),
        **EARLY,
    )
    model.train()
    for step in range(60):
        images, labels = image_batch(step)

        def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            found = nn.functional.cross_entropy(model(images), labels)
            found.backward()
            return found

        optimizer.step(loss)
    assert [update for update in watcher.updates if update[1] >= 30] == [
        (name, step) for step in (30, 40, 50) for name in ("s50", "s80", "s90")
    ]
    assert ast.versions == ("last", "superposed")


def test_optimizers_that_call_a_closure_have_the_cyclic_rate_too() -> None:
    def go(closure: bool) -> dict[str, Tensor]:
        model, optimizer, _ = wrapped(sup_tickets=SupTickets(**CYCLES), **EARLY)
        model.train()
        for step in range(60):
            images, labels = image_batch(step)

            def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                found = nn.functional.cross_entropy(model(images), labels)
                found.backward()
                return found

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        return snapshot(model)

    assert_same(go(True), go(False))


def test_steps_that_a_gradient_scaler_skips_move_nothing_and_no_cycle() -> None:
    def go(skipped: set[int]) -> tuple[dict[str, Tensor], SupTickets]:
        tickets = SupTickets(**CYCLES)
        model, optimizer, ast = wrapped(sup_tickets=tickets, **EARLY)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
        model.train()
        for step in range(60):
            for attempt in range(2 if step in skipped else 1):
                optimizer.zero_grad()
                images, labels = image_batch(step)
                loss = nn.functional.cross_entropy(model(images), labels)
                broken = step in skipped and attempt == 0
                scaler.scale(loss * float("inf") if broken else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                assert optimizer.param_groups[0]["lr"] == 0.1
        assert ast.step == 60
        return {n: t for n, t in snapshot(model).items() if "running" not in n and "tracked" not in n}, tickets

    plain, _ = go(set())
    skipping, tickets = go({30, 35, 39, 40, 59})
    assert_same(plain, skipping)
    assert tickets.tickets == 3


@pytest.mark.extra("timm")
def test_an_innermost_optimizer_steps_at_the_cyclic_rate() -> None:
    from timm.optim import Lookahead

    model = conv_net()
    inner = sgd(model)
    seen: list[float] = []
    ast = ast_plugin.wrap(
        Lookahead(inner), model, sparsities=(0.8,), total_steps=60, sup_tickets=SupTickets(**CYCLES), **EARLY
    )
    inner.register_step_pre_hook(lambda *_: seen.append(inner.param_groups[0]["lr"]))
    outer = Lookahead(inner)
    for step in range(60):
        train_step(model, outer, image_batch(step))
    assert seen[29] == 0.1
    assert seen[30] == pytest.approx(0.001)
    assert max(seen[30:]) < 0.0051
    assert "superposed" in ast.versions


Broken = tuple[dict[str, Any], dict[str, Any], str]
REFUSED: dict[str, Broken] = {
    "no total_steps": ({}, {"total_steps": None, "end_step": 10}, "total_steps is not given; pass total_steps"),
    "schedule too late": ({}, {"end_step": 0.9}, "end_step falls on step 54 .* begin at step 30.* lower end_step"),
    "share too short": ({"share": 0.1}, {}, "share=0.1 of total_steps=60 is 6 steps.*raise share or total_steps"),
    "a sub-net left out": ({}, {"alternation": "fixed:s90"}, "trains sub-net 's50' at no step"),
    "sampled masks": (
        {},
        {"method": "vr-pge", "sparsities": (0.5,), "pattern": "channel"},
        "averages networks whose masks change at the start of a cycle alone, and method='vr-pge' draws them",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.extra("channels")) if case == "sampled masks" else case
        for case in sorted(REFUSED)
    ],
)
def test_a_run_that_has_no_room_for_cycles_is_refused_and_the_model_untouched(case: str) -> None:
    settings, options, said = REFUSED[case]
    model = conv_net()
    optimizer = sgd(model)
    before = snapshot(model)
    extra = {"example_inputs": image_batch(0)[0][:1]} if case == "sampled masks" else {}
    options = {**EARLY, **options, **extra}
    with pytest.raises(ConfigError, match=said):
        wrapped(model, optimizer, sup_tickets=SupTickets(**{**CYCLES, **settings}), **options)
    assert_same(before, snapshot(model))
    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_pre_hooks
    wrapped(model, optimizer)  # and free for another try


@pytest.mark.extra("test")
def test_an_optimizer_that_averages_by_itself_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = conv_net()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="SGDScheduleFree keeps an average over all steps itself"):
        wrapped(model, optimizer, sup_tickets=SupTickets(**CYCLES), **EARLY)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: SupTickets(0), r"cycles of sup_tickets must be a number of tickets in \[1, 255\], got 0"),
    (lambda: SupTickets(256), "cycles of sup_tickets must be"),
    (lambda: SupTickets(2.5), "cycles of sup_tickets must be .* got 2.5"),
    (lambda: SupTickets(True), "cycles of sup_tickets must be .* got True"),
    (lambda: SupTickets(share=0), r"share of sup_tickets must lie in \(0, 1\), got 0"),
    (lambda: SupTickets(share=1.0), "share of sup_tickets must lie"),
    (lambda: SupTickets(share="much"), "share of sup_tickets must lie"),
    (lambda: SupTickets(lr=0.1), "lr of sup_tickets must be two rates, low and high, with 0 < low <= high, got 0.1"),
    (lambda: SupTickets(lr=(0.005, 0.001)), "lr of sup_tickets must be two rates"),
    (lambda: SupTickets(lr=(0.0, 0.001)), "lr of sup_tickets must be two rates"),
    (lambda: SupTickets(lr=(0.1, float("nan"))), "lr of sup_tickets must be two rates"),
    (lambda: SupTickets(lr=(0.1, float("inf"))), "lr of sup_tickets must be two rates"),
    (lambda: SupTickets(lr=(0.1, 0.2, 0.3)), "lr of sup_tickets must be two rates"),
    (lambda: SupTickets(explore=1), r"explore of sup_tickets must lie in \[0, 1\), got 1"),
    (lambda: SupTickets(explore=-0.1), "explore of sup_tickets must lie"),
    (lambda: SupTickets(forward=3), "forward of SupTickets must be a function of model and batch, got 3"),
    (lambda: SupTickets(max_batches=0), "max_batches of SupTickets must be a number of batches, at least 1, got 0"),
    (lambda: SupTickets().statistics(), "this SupTickets has no run yet"),
    (lambda: SupTickets().recompute([]), "this SupTickets has no run yet"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_settings_out_of_range_are_refused(index: int) -> None:
    call, said = WRONG[index]
    with pytest.raises(ConfigError, match=said):
        call()


def test_one_object_serves_one_run_at_a_time() -> None:
    tickets = SupTickets(**CYCLES)
    _, _, first = wrapped(sup_tickets=tickets, **EARLY)
    model = conv_net(seed=2)
    with pytest.raises(ConfigError, match="belongs to another run, which still trains; make one for each run"):
        wrapped(model, sup_tickets=tickets, **EARLY)
    first.detach()
    model, optimizer, ast = wrapped(model, sup_tickets=tickets, **EARLY)
    train(model, optimizer, range(60))
    assert ast.versions == ("last", "superposed")
    assert first.versions == ("last",)


def test_an_object_whose_run_was_refused_can_be_given_to_another() -> None:
    tickets = SupTickets(**CYCLES)
    with pytest.raises(ConfigError, match="end_step"):
        wrapped(sup_tickets=tickets, end_step=0.9)
    wrapped(sup_tickets=tickets, **EARLY)


def test_a_high_restart_is_warned_about_and_the_usual_one_is_not() -> None:
    with pytest.warns(UserWarning, match=r"77.87 to 10.37 %"):
        wrapped(sup_tickets=SupTickets(**CYCLES, lr=(0.001, 0.1)), **EARLY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(SupTickets(**CYCLES, explore=0.0))
