"""benchmarks/accuracy.py: which runs a row makes, its statistics by hand, what it tries, and that it goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import ast_plugin
from ast_plugin.hookspecs import hookimpl
from ast_plugin.wrapping import settings_of

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "evidence.md"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402  # it lies beside the benchmark, not on the path
import accuracy_forks  # noqa: E402
import accuracy_gradients as gradients  # noqa: E402
import accuracy_joint  # noqa: E402
import accuracy_mechanisms as mechanisms  # noqa: E402
import accuracy_rows  # noqa: E402
import accuracy_runs  # noqa: E402
import accuracy_tasks as tasks  # noqa: E402

sys.path.remove(str(BENCHMARKS))


class Toy:
    """A task of a few microseconds a step: two classes of random points, with BatchNorm."""

    name = "toy"
    decimals = 2
    measures: ClassVar[dict[str, str]] = {"accuracy": "%"}
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 60,
        "sparsities": (0.25, 0.5, 0.75),
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "options": {"end_step": 0.5, "update_interval": 0.1},
    }

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def batch(self, step: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        points = torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
        return points, (points.sum(1) > 0).long()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def measure(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        points, labels = self.batch(0, seed=999)
        return {"accuracy": 100 * float((model(points).argmax(1) == labels).float().mean())}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "toy", Toy)


def settings(**changes: Any) -> accuracy_runs.Settings:
    return accuracy_runs.Settings(**{"task": "toy", "seed": 0, **Toy.defaults, **changes})


def row(**fields: Any) -> accuracy_rows.Row:
    return accuracy_rows.Row(**{"name": "row", "text": "a row", "table": "settings", "tasks": ("toy",), **fields})


def test_every_sub_net_is_trained_alone_for_all_and_for_its_share_of_the_steps() -> None:
    both, third = row(alone=True), row(alone=True, share=None)
    assert [(s.sparsities, s.steps) for s in both.runs("toy", 3)] == [((0.25,), 60), ((0.5,), 60), ((0.75,), 60)]
    assert [(s.sparsities, s.steps) for s in third.runs("toy", 3)] == [((0.25,), 20), ((0.5,), 20), ((0.75,), 20)]
    assert {s.seed for s in both.runs("toy", 3)} == {3}


def test_changes_replace_settings_and_are_merged_into_options() -> None:
    changes = {"momentum": 0.5, "options": {"correction": "off"}, "learning_rate_times": 2}
    (changed,) = row(changes=changes).runs("toy", 0)
    assert (changed.momentum, changed.learning_rate) == (0.5, 0.2)
    assert changed.options == {"end_step": 0.5, "update_interval": 0.1, "correction": "off"}
    assert Toy.defaults["options"] == {"end_step": 0.5, "update_interval": 0.1}


def by_importance(name: str) -> bool:
    """Tell whether a row's method is made with torch-pruning, which is in an extra."""
    return isinstance(accuracy_rows.ROWS[name].changes.get("options", {}).get("method"), dict)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.extra("channels")) if by_importance(n) else n for n in accuracy_rows.ROWS],
)
def test_every_row_can_be_built(name: str) -> None:
    found = accuracy_rows.ROWS[name]
    assert found.table in accuracy_rows.TABLES
    assert found.reference in accuracy_rows.ROWS
    for task in found.tasks:
        for run in found.runs(task, 0):
            settings = {"sparsities": run.sub_nets(), "total_steps": run.steps, "seed": 0, **run.ast_options()}
            assert settings_of(None, settings).total_steps == run.steps
            for mechanism, argument in run.mechanisms.items():
                assert mechanisms.build_mechanism(mechanism, argument, run) is not None


def test_paired_differences_have_their_standard_error_and_a_star_where_it_is_clear() -> None:
    # Differences 1, 2, 3: mean 2, sample deviation 1, error 1 / sqrt(3) = .577; t = 3.46 is below 4.30 for 2 degrees.
    assert accuracy.difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == "+2.00 ± 0.58"
    # Differences 2, 2.1, 2.2: error .1 / sqrt(3) = .0577, t = 36.
    assert accuracy.difference([2.0, 2.1, 2.2], [0.0, 0.0, 0.0]) == "+2.10 ± 0.06*"
    assert accuracy.difference([1.0], [2.0]) == "-1.00"
    # Two equal differences are chance.
    assert accuracy.difference([1.0, 2.0], [2.0, 3.0]) == "-1.00 ± 0.00"


def entry(settings: accuracy_runs.Settings, seconds: float, **figures: float) -> dict[str, Any]:
    return {
        "settings": settings.to_dict(),
        "figures": {"final": {name: {"accuracy": value} for name, value in figures.items()}},
        "seconds": seconds,
    }


def test_tables_give_spread_or_paired_difference_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    base = row(name=accuracy_rows.ALTERNATING, text="alternating", table="baselines")
    alone = row(name="separate", text="separate", table="baselines", alone=True)
    off = row(name="off", text="off", changes={"options": {"correction": "off"}})
    unfinished = row(name="never", text="never", changes={"momentum": 0.1})
    rows = {r.name: r for r in (base, alone, off, unfinished)}
    monkeypatch.setattr(accuracy, "ROWS", rows)
    results = {}
    for seed in (0, 1):
        runs = [*base.runs("toy", seed), *alone.runs("toy", seed), *off.runs("toy", seed)]
        found = [
            entry(runs[0], 10.0, s25=90.0 + 2 * seed, s50=80.0, s75=70.0),
            *[entry(s, 8.0, **{f"s{100 * s.sparsities[0]:g}": 95.0}) for s in runs[1:4]],
            entry(runs[4], 9.0, s25=89.0 + 2 * seed, s50=81.0 + seed, s75=70.0),
        ]
        results |= {accuracy.key(s): e for s, e in zip(runs, found, strict=True)}
    # s25 90 and 92: deviation sqrt(2). Alone: three runs, each as long as the alternating one.
    assert accuracy.table("toy", "baselines", [0, 1], results).rows == (
        ("alternating", "91.00 ± 1.41", "80.00 ± 0.00", "70.00 ± 0.00", "1.00", "1.00", "2"),
        ("separate", "95.00 ± 0.00", "95.00 ± 0.00", "95.00 ± 0.00", "3.00", "2.40", "2"),
    )
    # s50: differences 1 and 2, error .5, t = 3 below 12.7. A row without runs is left out.
    assert accuracy.table("toy", "settings", [0, 1], results).rows == (
        ("off", "-1.00 ± 0.00", "+1.50 ± 0.50", "+0.00 ± 0.00", "1.00", "0.90", "2"),
    )


def test_a_run_measures_every_sub_net_in_every_way_and_repeats_itself() -> None:
    first, again = accuracy_runs.run(settings()), accuracy_runs.run(settings())
    assert first["figures"] == again["figures"]
    assert list(first["figures"]) == ["final", "recalibrated", "average 0.2"]
    assert all(list(found) == ["s25", "s50", "s75"] for found in first["figures"].values())
    assert first["steps"] == {"s25": 20, "s50": 20, "s75": 20}
    assert first["sparsity"] == pytest.approx({"s25": 0.25, "s50": 0.5, "s75": 0.75}, abs=0.02)
    assert first["figures"]["final"]["s25"]["accuracy"] > 75
    assert accuracy_runs.run(settings(seed=1))["figures"] != first["figures"]


@pytest.mark.slow
def test_runs_with_tickets_go_on_from_a_fork_and_come_to_what_they_come_to_without(tmp_path: Path) -> None:
    plain = settings(steps=200)
    tickets = settings(steps=200, mechanisms={"sup_tickets": {"cycles": 2}})
    expected = accuracy_runs.run(tickets)["figures"]
    assert set(expected) == {"final", "recalibrated", "superposed", "superposed, recalibrated"}
    base = accuracy_runs.run(plain)["figures"]
    assert accuracy_runs.run(plain, tmp_path)["figures"] == base
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    assert accuracy_runs.run(tickets, tmp_path)["figures"] == expected
    assert kept.stat().st_mtime_ns == before
    kept.unlink()
    assert accuracy_runs.run(tickets, tmp_path)["figures"] == expected  # and leaves it to others
    assert accuracy_runs.run(plain, tmp_path)["figures"] == base
    early = settings(steps=200, mechanisms={"sup_tickets": {"cycles": 2, "share": 0.3}})
    assert accuracy_forks.Fork.of(early, tmp_path) is None
    assert accuracy_forks.Fork.of(plain, None) is None


def test_joint_training_of_one_sub_net_is_ordinary_training_of_it() -> None:
    one = {"sparsities": (0.5,), "options": {**Toy.defaults["options"], "drop_fraction": 0.3}}
    alone, joint = accuracy_runs.run(settings(**one)), accuracy_runs.run(settings(**one, joint=True))
    assert joint["figures"]["final"] == alone["figures"]["final"]
    assert joint["sparsity"] == alone["sparsity"]


def test_joint_training_adds_up_the_gradients_of_all_sub_nets() -> None:
    torch.manual_seed(0)
    task, model = Toy(), Toy().model()
    training = accuracy_joint.JointTraining(
        model, sparsities=(0.0, 0.5), steps=60, seed=0, options={"method": "static", "end_step": 0.5}
    )
    batch = task.batch(0, seed=0)
    training.backward(task, batch, 1)
    found = model[3].weight.grad
    # The same by hand: one ordinary backward pass a sub-net, with zeros in place of dropped weights.
    wanted = torch.zeros_like(model[3].weight)
    for sub_net in training.sub_nets:
        masked = torch.nn.Sequential(*[type(m)(4, 16) if i == 0 else m for i, m in enumerate(Toy().model())])
        masked.load_state_dict(model.state_dict())
        with torch.no_grad():
            for name in training.masks.parameters:
                masked.get_parameter(name).mul_(training.masks.get(sub_net, name))
        task.loss(masked, batch).backward()
        wanted += masked[3].weight.grad * training.masks.get(sub_net, "3.weight")
    assert torch.allclose(found, wanted, atol=1e-6)


def test_both_ways_of_joint_training_are_the_same_while_masks_stay() -> None:
    fixed = {**Toy.defaults["options"], "method": "static"}
    ours = accuracy_runs.run(settings(options={**fixed, "alternation": "joint"}))
    theirs = accuracy_runs.run(settings(options=fixed, joint=True))
    assert ours["figures"]["final"] == theirs["figures"]["final"]
    assert ours["steps"] == theirs["steps"] == {"s25": 60, "s50": 60, "s75": 60}
    assert accuracy.passes(ours["settings"]) == accuracy.passes(theirs["settings"]) == 180


def test_sub_nets_of_different_patterns_are_rows_too() -> None:
    mixed = accuracy_rows.ROWS["mixed-pivot"]
    (found,) = mixed.runs("digits", 0)
    assert [str(getattr(s, "name", s)) for s in found.sub_nets()] == ["0.0", "0.9", "2:4", "c50"]
    kept = {accuracy.key(found): entry(found, 10.0, **{"s0": 99.0, "s90": 98.0, "2:4": 97.0, "c50": 96.0})}
    for base in accuracy_rows.ROWS["alternating"].runs("digits", 0):
        kept[accuracy.key(base)] = entry(base, 10.0, s90=90.0)
    shown = accuracy.table("digits", "mixed", [0], kept)
    assert shown.columns == ("", "s0", "s90", "2:4", "c50", "passes", "time", "seeds")
    assert shown.rows == ((mixed.text, "99.00", "98.00", "97.00", "96.00", "1.00", "1.00", "1"),)


def controller(plugin: object, **options: Any) -> ast_plugin.AlternatingSparseTraining:
    torch.manual_seed(0)
    model = Toy().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"sparsities": (0.25, 0.5, 0.75), "total_steps": 60, "end_step": 0.5, **options}
    return ast_plugin.wrap(optimizer, model, plugins=[plugin], **given)


def train(training: ast_plugin.AlternatingSparseTraining, steps: int) -> list[str]:
    """Train; returns which sub-nets were trained."""
    trained = []
    for _ in range(steps):
        trained.append(training.active)
        training.optimizer.zero_grad()
        Toy().loss(training.model, Toy().batch(training.step, seed=0)).backward()
        training.optimizer.step()
    return trained


def test_the_late_average_is_the_mean_of_the_weights_after_the_last_steps() -> None:
    average = mechanisms.LateAverage(60, (0.1, 0.2))
    training = controller(average)
    train(training, 54)
    seen, norms = [], []
    for _ in range(6):
        name = training.active
        train(training, 1)
        seen.append(training.model[0].weight.detach().clone())
        norms += [training.private_state(name)["1.weight"]] if name == "s75" else []
    average.apply(training, 0.1)
    assert torch.allclose(training.model[0].weight, torch.stack(seen).mean(0), atol=1e-7)
    assert torch.allclose(training.private_state("s75")["1.weight"], torch.stack(norms).mean(0), atol=1e-7)
    average.apply(training, 0.2)
    assert not torch.allclose(training.model[0].weight, torch.stack(seen).mean(0), atol=1e-7)


def test_a_cycle_trains_the_sub_nets_that_it_lists_and_changes_its_list_on_time() -> None:
    training = controller(mechanisms.CyclePlugin([(0, (0,)), (0.1, (0, 2, 1, 2))], 60), alternation="cycle")
    assert train(training, 12) == ["s25"] * 6 + ["s25", "s75", "s50", "s75", "s25", "s75"]
    order = training._parts.alternation
    assert [order.is_group_start(step) for step in range(5, 12)] == [True, True, False, False, False, True, False]


def test_runs_are_added_to_those_that_others_have_stored_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    first, second = entry(settings(), 1.0, s25=90.0), entry(settings(seed=1), 1.0, s25=91.0)
    accuracy.store(path, first)
    accuracy.store(path, second)
    accuracy.store(path, {**first, "seconds": 2.0})
    found = accuracy.read(path)
    assert [found[accuracy.key(settings(seed=seed))]["seconds"] for seed in (0, 1)] == [2.0, 1.0]
    assert accuracy.key(settings(momentum=0.5)) not in found


def test_only_what_stands_between_the_markers_of_a_page_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = row(name=accuracy_rows.ALTERNATING, text="alternating", table="baselines")
    monkeypatch.setattr(accuracy, "ROWS", {base.name: base})
    (settings,) = base.runs("toy", 0)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: toy/baselines -->\nold\n<!-- end of table -->\nafter\n", encoding="utf-8")
    accuracy.write_tables(page, [0], {accuracy.key(settings): entry(settings, 1.0, s25=90.0, s50=80.0, s75=70.0)})
    assert page.read_text(encoding="utf-8").splitlines() == [
        "before",
        "<!-- table: toy/baselines -->",
        "",
        "|  | s25 | s50 | s75 | passes | time | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| alternating | 90.00 | 80.00 | 70.00 | 1.00 | 1.00 | 1 |",
        "",
        "<!-- end of table -->",
        "after",
    ]


def test_the_page_shows_what_is_on_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    results = accuracy.read(accuracy.RESULTS)
    shown = list(accuracy.MARKER.finditer(text))
    assert len(shown) >= 6
    for found in shown:
        wanted = accuracy.markdown(accuracy.table(found["task"], found["table"], range(accuracy.SEEDS), results))
        assert found.group(0).splitlines()[2:-2] == wanted.splitlines()


def test_bytes_come_from_the_standard_library_and_held_out_files_are_others(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text(f"<{number}>", encoding="utf-8")
    train, held_out = (bytes(part.tolist()).decode() for part in tasks.standard_library(tmp_path))
    numbers = [set(re.findall(r"<(\d+)>", text)) for text in (train, held_out)]
    assert numbers[0] | numbers[1] == {str(number) for number in range(40)}
    assert not numbers[0] & numbers[1]
    assert 0 < len(numbers[1]) < 12


def test_a_byte_is_predicted_from_those_before_it_alone() -> None:
    torch.manual_seed(0)
    net = tasks.ByteNet(16).eval()
    inputs = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 256
    before, after = net(inputs), net(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40], after[:, 40])


def test_a_batch_of_bytes_has_the_next_byte_as_target_and_depends_on_seed_and_step() -> None:
    task = tasks.Bytes()
    inputs, targets = task.batch(3, seed=1)
    assert inputs.shape == targets.shape == (8, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(task.batch(3, seed=1)[0], inputs)
    assert not torch.equal(task.batch(4, seed=1)[0], inputs)
    assert not torch.equal(task.batch(3, seed=2)[0], inputs)


def test_runs_on_file_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = row(
        name=accuracy_rows.DENSE,
        text="dense",
        table="baselines",
        changes={"sparsities": (0.0,), "options": {"method": "static"}},
    )
    base = row(name=accuracy_rows.ALTERNATING, text="alternating", table="baselines")
    monkeypatch.setattr(accuracy, "ROWS", {r.name: r for r in (base, dense)})
    monkeypatch.setattr(accuracy, "TASKS", {"toy": Toy})
    output = tmp_path / "accuracy.json"
    command = ["--steps", "40", "--seeds", "1", "--output", str(output), "--rows"]

    def run(*rows: str) -> str:
        assert accuracy.main([*command, *rows]) == 0
        return capsys.readouterr().out

    assert "[1/1] toy, seed 0: s0 " in run("dense")
    second = run("dense", "alternating")
    assert "[1/1] toy, seed 0: s25 " in second
    assert "\ndense  " in second
    assert "\nalternating  " in second
    assert "[1/" not in run("dense", "alternating")
    assert sorted(len(e["settings"]["sparsities"]) for e in accuracy.read(output).values()) == [1, 3]
    assert all(e["settings"]["steps"] == 40 for e in accuracy.read(output).values())


def test_a_mean_reference_takes_away_what_opposes_it_and_averages_what_came() -> None:
    plugin = gradients.AveragedReference(decay=0.5, others="all")
    options = ast_plugin.CorrectionOptions()

    def correct(values: list[float], sub_net: str) -> list[float]:
        gradient = torch.tensor(values)
        plugin.ast_correct_gradients([gradient], [], options, ["w"], sub_net)
        return gradient.tolist()

    assert correct([1.0, 0.0, 2.0], "a") == [1.0, 0.0, 2.0]
    assert correct([3.0, 0.0, 2.0], "a") == [3.0, 0.0, 2.0]
    # Mean of a: [2, 0, 2], inside b's mask [2, 0, 0]: the first weight opposes it and nothing of it is left.
    assert correct([-1.0, 4.0, 0.0], "b") == [0.0, 4.0, 0.0]
    # b's mean is its gradient as it came, [-1, 4, 0], so this agrees with it.
    assert correct([-2.0, 1.0, 1.0], "a") == [-2.0, 1.0, 1.0]


def test_weights_that_few_keep_get_larger_gradients_or_are_left_to_the_sparsest() -> None:
    training = controller(type("Nothing", (), {"ast_training_finished": hookimpl(lambda self: None)})())
    name = training.masks.parameters[0]
    shape = training.masks.get("s25", name).shape
    masks = {"s25": [1, 1, 1, 0], "s50": [1, 1, 0, 0], "s75": [1, 0, 0, 0]}
    for sub_net, kept in masks.items():
        full = torch.zeros(shape, dtype=torch.bool).flatten()
        full[:4] = torch.tensor(kept, dtype=torch.bool)
        training.masks.set(sub_net, name, full.view(shape))

    def scaled(plugin: Any, sub_net: str) -> list[float]:
        gradient = torch.ones(shape)
        plugin.ast_correct_gradients([gradient], [], ast_plugin.CorrectionOptions(), [name], sub_net)
        return gradient.flatten()[:3].tolist()

    owner = gradients.OwnerScaling(1.0)
    owner.ast_masks_updated(training, "s25", 0)
    assert scaled(owner, "s25") == [1.0, 1.5, 3.0]
    sparsest = gradients.SparsestOwns(first=5, factor=0.25)
    sparsest.ast_step_finished(training, 3, "s25")
    assert scaled(sparsest, "s25") == [1.0, 1.0, 1.0]
    sparsest.ast_step_finished(training, 4, "s25")
    assert scaled(sparsest, "s25") == [0.25, 0.25, 1.0]
    assert scaled(sparsest, "s50") == [0.25, 1.0, 1.0]
    assert scaled(sparsest, "s75") == [1.0, 1.0, 1.0]


def test_private_parameters_are_trained_by_their_own_sub_net_alone() -> None:
    private = mechanisms.PrivateParameters(["3.bias"], first=6)
    training = controller(private)
    bias = training.model[3].bias
    train(training, 7)  # the last of them begins the privacy and trains s25
    first = bias.detach().clone()
    trained = train(training, 2)
    assert trained == ["s50", "s75"]
    private.put(training, "s25")
    assert torch.equal(bias, first)
    private.put(training, "s50")
    assert not torch.equal(bias, first)


def test_gradients_beyond_the_mask_reach_weights_that_another_sub_net_keeps() -> None:
    torch.manual_seed(0)
    model = Toy().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = gradients.SharedBackward(1.0, until=4)
    plugin.before_wrap(model)
    training = ast_plugin.wrap(
        optimizer, model, sparsities=(0.25, 0.75), total_steps=60, method="static", end_step=0.5, plugins=[plugin]
    )
    plugin.after_wrap(training)
    name = training.masks.parameters[-1]
    dense, sparse = training.masks.get("s25", name), training.masks.get("s75", name)

    def moved() -> torch.Tensor:
        before = model.get_parameter(name).detach().clone()
        train(training, 1)
        return model.get_parameter(name).detach() != before

    # Step by step: s25, s75 with more than its own weights, s25, s75 likewise, s25, s75 with its own alone.
    train(training, 1)
    beyond = moved()
    assert (beyond & dense & ~sparse).any()
    assert not (beyond & ~dense & ~sparse).any()
    train(training, 3)
    assert training.active == "s75"
    assert not (moved() & ~sparse).any()


def test_the_learning_rate_follows_the_sub_net() -> None:
    training = controller(mechanisms.SubNetRates([0.5, 1.0, 2.0]))
    rates = []
    for _ in range(4):
        train(training, 1)
        rates.append((training.active, training.optimizer.param_groups[0]["rate"]))
    assert rates == [("s50", 1.0), ("s75", 2.0), ("s25", 0.5), ("s50", 1.0)]
