"""Sparsifiers of torch.ao.pruning as methods: adoption, masks as in the framework alone, errors, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import assert_same, mlp, sgd, snapshot, train, vector_batch
from torch import Tensor, nn
from torch.ao.pruning import BaseSparsifier, CubicSL, LambdaSL, NearlyDiagonalSparsifier, WeightNormSparsifier
from torch.nn import functional
from torch.nn.utils import parametrize

import ast_plugin
from ast_plugin.errors import ConfigError, PluginError, SelectionError, StateError, WrapError
from ast_plugin.integrations.frameworks import from_sparsifier

LAYERS = ["0.weight", "2.weight"]
CONFIG = [{"tensor_fqn": name} for name in LAYERS]


def weight_norm(**options: Any) -> WeightNormSparsifier:
    return WeightNormSparsifier(**{"sparsity_level": 0.5, "sparse_block_shape": (1, 1), **options})


def prepared(sparsifier: BaseSparsifier | None = None, config: Any = CONFIG) -> tuple[nn.Sequential, BaseSparsifier]:
    model = mlp()
    sparsifier = weight_norm() if sparsifier is None else sparsifier
    sparsifier.prepare(model, copy.deepcopy(config))
    return model, sparsifier


def wrapped(model: nn.Module, sparsifier: BaseSparsifier, optimizer: Any = None, **options: Any) -> Any:
    settings = {"sparsities": (0.5, 0.75), "total_steps": 40, "update_interval": 4, **options}
    method = settings.pop("method", None) or from_sparsifier(sparsifier)
    return ast_plugin.wrap(sgd(model) if optimizer is None else optimizer, model, method=method, **settings)


@pytest.mark.parametrize("early", [True, False], ids=["optimizer first", "optimizer last"])
def test_the_model_is_an_ordinary_one_again_with_the_same_parameters(early: bool) -> None:
    model = mlp()
    plain, weight = snapshot(model), model[0].weight
    optimizer = sgd(model) if early else None
    sparsifier = weight_norm()
    sparsifier.prepare(model, copy.deepcopy(CONFIG))
    optimizer = sgd(model) if optimizer is None else optimizer
    ast = wrapped(model, sparsifier, optimizer)
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert_same(snapshot(model), plain)
    assert model[0].weight is weight
    assert type(model[0]) is nn.Linear
    assert ast.masks.parameters == tuple(LAYERS)
    train(model, optimizer, range(8), vector_batch)
    assert ast.step == 8


def test_each_sub_net_has_its_own_sparsity() -> None:
    ast = wrapped(*prepared())
    for name, sparsity in (("s50", 0.5), ("s75", 0.75)):
        for parameter in LAYERS:
            assert ast.masks.sparsity(name, parameter) == pytest.approx(sparsity, abs=0.01)
            weights, mask = ast.model.get_parameter(parameter).abs(), ast.masks.get(name, parameter)
            assert weights[mask].min() >= weights[~mask].max()


def test_calls_that_stay_in_the_loop_do_nothing_any_more() -> None:
    model, sparsifier = prepared()
    scheduler = CubicSL(sparsifier)
    ast = wrapped(model, sparsifier)
    for step in range(4):
        train(model, ast.optimizer, range(step, step + 1), vector_batch)
        before = ast.masks.checksum()
        sparsifier.step()
        scheduler.step()
        assert ast.masks.checksum() == before
    sparsifier.squash_mask()
    assert ast.masks.checksum() == before


def framework_alone(sparsifier: BaseSparsifier, steps: int, interval: int) -> list[dict[str, Tensor]]:
    """Train as the framework does, stepping it between backward and the optimizer; return the masks of each step."""
    model, sparsifier = prepared(sparsifier)
    optimizer = sgd(model)
    sparsifier.step()
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        functional.cross_entropy(model(inputs), labels).backward()
        if step % interval == 0:
            sparsifier.step()
        optimizer.step()
        found.append({n: model.get_submodule(n[0]).parametrizations.weight[0].mask != 0 for n in LAYERS})
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_the_masks_are_bit_for_bit_those_of_the_framework_alone(shape: tuple[int, int]) -> None:
    alone = framework_alone(weight_norm(sparse_block_shape=shape, zeros_per_block=None), 20, 4)
    model, sparsifier = prepared(weight_norm(sparse_block_shape=shape, zeros_per_block=None))
    ast = wrapped(
        model, sparsifier, sparsities=(0.5,), correction="off", update_interval=4, total_steps=20, end_step=19
    )
    for step, masks in enumerate(alone):
        train(model, ast.optimizer, range(step, step + 1), vector_batch)
        assert_same(ast.masks.of("s50"), masks)


def test_only_that_all_weights_are_seen_lets_dropped_ones_return() -> None:
    for see, returns in (("kept", False), ("all", True)):
        model, sparsifier = prepared()
        ast = wrapped(model, sparsifier, method=from_sparsifier(sparsifier, see=see), sparsities=(0.5, 0.8))
        before = ast.masks.of("s80")
        with torch.no_grad():
            for name in LAYERS:  # a weight that no sub-net keeps becomes the largest
                model.get_parameter(name)[~before[name]] += 10
        train(model, ast.optimizer, range(4), vector_batch)
        grown = sum(int((ast.masks.get("s80", name) & ~before[name]).sum()) for name in LAYERS)
        assert (grown > 0) is returns


def test_masks_that_the_sparsifier_has_made_are_the_first_of_the_sub_net_of_that_sparsity() -> None:
    model, sparsifier = prepared()
    sparsifier.step()
    with torch.no_grad():
        for name in LAYERS:  # so that masks made anew would be others
            model.get_submodule(name[0]).parametrizations.weight.original.copy_(
                torch.randn(16, 12 if name[0] == "0" else 16)
            )
    present = {name: model.get_submodule(name[0]).parametrizations.weight[0].mask != 0 for name in LAYERS}
    ast = wrapped(model, sparsifier)
    assert_same(ast.masks.of("s50"), present)


def test_blocks_of_which_some_weights_are_zeros_reach_their_share_and_no_more() -> None:
    options = {"sparse_block_shape": (1, 4), "zeros_per_block": 2}
    ast = wrapped(*prepared(weight_norm(**options)), sparsities=(0.25, "2:4"))
    assert ast.masks.sparsity("s25") == pytest.approx(0.25, abs=0.01)
    blocks = ast.masks.get("2:4", "0.weight").view(16, 3, 4).sum(dim=2)
    assert (blocks == 2).all()
    model, sparsifier = prepared(weight_norm(**options))
    with pytest.raises(ConfigError, match=r"zeros_per_block=2 in blocks of \(1, 4\) allows a sparsity of at most 0\.5"):
        wrapped(model, sparsifier, sparsities=(0.75,))


def test_diagonals_are_as_many_as_the_sparsity_asks_for() -> None:
    ast = wrapped(*prepared(NearlyDiagonalSparsifier(nearliness=1), CONFIG[1:]), sparsities=(0.82,))
    mask = ast.masks.get("s82", "2.weight")
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(mask, (rows - columns).abs() <= 1)
    model, sparsifier = prepared(NearlyDiagonalSparsifier(nearliness=1), CONFIG[1:])
    with pytest.raises(PluginError, match=r"with a sparsity of 0\.9375, and 0\.88 was asked for"):
        wrapped(model, sparsifier, sparsities=(0.88,))


def test_levels_of_single_layers_are_not_followed_without_a_word() -> None:
    config = [{"tensor_fqn": "0.weight", "sparsity_level": 0.25}, {"tensor_fqn": "2.weight"}]
    with pytest.warns(UserWarning, match=r"sparsity_level of their own \(0\.25 to 0\.5\).*distribution="):
        ast = wrapped(*prepared(config=config))
    assert ast.masks.sparsity("s75", "0.weight") == pytest.approx(0.75, abs=0.01)


def test_a_tied_layer_is_refused() -> None:
    model = mlp()
    model[4] = nn.Linear(16, 16)
    model[4].weight = model[2].weight
    sparsifier = weight_norm()
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    with pytest.raises(ConfigError, match=r"'2\.weight' and not where '4\.weight' uses the same parameter"):
        wrapped(model, sparsifier)


def test_biases_that_were_prepared_are_pruned() -> None:
    Bias = type("Bias", (BaseSparsifier,), {"update_mask": half_of})
    model, sparsifier = prepared(Bias({"sparsity_level": 0.5}), [{"tensor_fqn": "0.bias"}, {"tensor_fqn": "0.weight"}])
    ast = wrapped(model, sparsifier, sparsities=(0.5,))
    assert ast.masks.get("s50", "0.bias").tolist() == [False] * 8 + [True] * 8
    train(model, ast.optimizer, range(3), vector_batch)


def half_of(self: BaseSparsifier, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
    """Drop the first half of a tensor."""
    mask = module.parametrizations[tensor_name][0].mask
    mask.view(-1)[: mask.numel() // 2] = 0


def test_layers_follow_the_distribution() -> None:
    ast = wrapped(*prepared(), sparsities=(0.5,), distribution={"0.weight": 0.25})
    assert ast.masks.sparsity("s50", "0.weight") == pytest.approx(0.25, abs=0.01)
    assert ast.masks.sparsity("s50") == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda sparsifier: CubicSL(sparsifier, init_sl=0.0, delta_t=1, total_t=4),
        lambda sparsifier: LambdaSL(sparsifier, lambda epoch: 1 - 0.5**epoch),
    ],
    ids=["CubicSL", "LambdaSL"],
)
def test_every_sub_net_follows_the_schedulers_ramp_to_its_own_sparsity(make: Callable[[Any], Any]) -> None:
    model, sparsifier = prepared()
    scheduler = make(sparsifier)
    method = from_sparsifier(sparsifier, scheduler=scheduler, scheduler_interval=6)
    ast = wrapped(model, sparsifier, method=method, update_interval=2, end_step=36)
    reached: dict[str, list[float]] = {"s50": [], "s75": []}
    for step in range(40):
        train(model, ast.optimizer, range(step, step + 1), vector_batch)
        name = ast.sub_nets[step % 2]
        reached[name].append(ast.masks.sparsity(name))
    for name, target in (("s50", 0.5), ("s75", 0.75)):
        epochs = [steps // 6 for steps in range(40)]
        asked = {"CubicSL": lambda e: min(1, 1 - (1 - e / 4) ** 3) if e < 4 else 1, "LambdaSL": lambda e: 1 - 0.5**e}
        share = asked[type(scheduler).__name__]
        for index in range(3, 18):  # the sub-net's steps 6 to 35
            assert reached[name][index] == pytest.approx(target * share(epochs[2 * index]), abs=0.02)
        assert reached[name][-1] == pytest.approx(target, abs=0.01)


def test_a_sparsifier_of_ones_own_says_how_it_is_told_a_sparsity() -> None:
    class Rows(BaseSparsifier):
        """Keep the first weights of each row."""

        def __init__(self) -> None:
            super().__init__(defaults={"share": 1.0})

        def update_mask(self, module: nn.Module, tensor_name: str, share: float, **kwargs: Any) -> None:
            mask = module.parametrizations[tensor_name][0].mask
            mask.zero_()
            mask[:, : round(share * mask.shape[1])] = 1

    model, sparsifier = prepared(Rows())
    with pytest.raises(ConfigError, match=r"Rows has no 'sparsity_level'.*set_sparsity=lambda group, sparsity"):
        from_sparsifier(sparsifier)
    method = from_sparsifier(sparsifier, set_sparsity=lambda group, sparsity: group.update(share=1 - sparsity))
    ast = wrapped(model, sparsifier, method=method)
    assert ast.masks.get("s75", "2.weight")[:, :4].all()
    assert not ast.masks.get("s75", "2.weight")[:, 4:].any()


def test_what_fails_in_the_sparsifier_names_it_and_leaves_the_model_as_it_was() -> None:
    class Broken(WeightNormSparsifier):
        def update_mask(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of luck")

    model, sparsifier = prepared(Broken(sparse_block_shape=(1, 1)))
    names = list(model.state_dict())
    with pytest.raises(PluginError, match=r"Broken failed to decide.*'s50'.*out of luck"):
        wrapped(model, sparsifier)
    assert list(model.state_dict()) == names


@contextlib.contextmanager
def restored(model: nn.Module, sparsifier: BaseSparsifier) -> Iterator[None]:
    """Assert that a block leaves the prepared model as it was."""
    kinds = [type(module) for module in model.modules()]
    before, names = snapshot(model), list(model.state_dict())
    identities = [id(parameter) for parameter in model.parameters()]
    yield
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert_same(snapshot(model), before)
    sparsifier.step()
    assert (model[0].weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert sparsifier.enable_mask_update


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsities": (0.5, 0.9999)}, ConfigError, "allow_empty_layers"),
        ({"sparsities": (0.5,), "total_steps": 2, "update_interval": 9}, ConfigError, "total_steps|update_interval"),
        ({"pattern": "4x4"}, PluginError, "pattern '4x4'"),
        ({"include": ("2.*",)}, SelectionError, "missing: 0.weight; leave both out, or write include="),
        ({"exclude": ("0.*",)}, SelectionError, "too many: 4.weight; missing: 0.weight"),
        ({"initial_sparsity": 0.3}, ConfigError, "initial_sparsity=0.3 has no meaning"),
    ],
)
def test_a_failing_wrap_leaves_the_prepared_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, sparsifier = prepared()
    with restored(model, sparsifier), pytest.raises(error, match=message):
        wrapped(model, sparsifier, **options)
    ast = wrapped(model, sparsifier, sgd(model))  # and it can be wrapped afterwards
    assert ast.masks.sparsity("s50") == pytest.approx(0.5, abs=0.01)


def test_include_that_chooses_the_same_layers_is_accepted() -> None:
    assert wrapped(*prepared(), include=("0.*", "2.*")).masks.parameters == tuple(LAYERS)
    assert wrapped(*prepared(), exclude=("4.*",)).masks.parameters == tuple(LAYERS)


def test_layers_that_could_not_be_pruned_by_themselves_are_when_they_were_prepared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    sparsifier = weight_norm()
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    ast = wrapped(model, sparsifier, sparsities=(0.5,))
    assert "WeightNormSparsifier was not prepared on it" in str(ast.describe())


def test_a_frozen_layer_is_refused() -> None:
    model, sparsifier = prepared()
    model[0].parametrizations.weight.original.requires_grad_(False)
    with pytest.raises(SelectionError, match=r"0\.weight.*frozen"):
        wrapped(model, sparsifier)


def never_prepared() -> Any:
    return mlp(), weight_norm()


def of_another_model() -> Any:
    return mlp(), prepared()[1]


def squashed() -> Any:
    model, sparsifier = prepared()
    sparsifier.step()
    sparsifier.squash_mask()
    return model, sparsifier


def taken_off_before() -> Any:
    model, sparsifier = prepared()
    wrapped(model, sparsifier).detach()
    return model, sparsifier


def with_small_masks() -> Any:
    model, sparsifier = prepared()
    model[0].parametrizations.weight[0].mask = torch.ones(16)
    return model, sparsifier


def with_another_parametrization() -> Any:
    model, sparsifier = prepared()
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    return model, sparsifier


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (never_prepared, ConfigError, r"is prepared on no model.*call sparsifier\.prepare\(model, config\) first"),
        (of_another_model, ConfigError, "prepared on another model: its layer '0' is no module of this Sequential"),
        (squashed, ConfigError, "on '0.weight' no more: its masks were squashed into the weights"),
        (taken_off_before, ConfigError, "a run that takes it over ends that, too"),
        (with_small_masks, WrapError, r"on '0.weight' has the shape \(16,\), and the weight's is \(16, 12\)"),
        (with_another_parametrization, WrapError, "not of WeightNormSparsifier; remove it first"),
        (
            lambda: (mlp(), "magnitude"),
            ConfigError,
            "must be a BaseSparsifier of torch.ao.pruning or sparsimony, got str",
        ),
    ],
)
def test_a_sparsifier_that_does_not_fit_is_refused_with_a_remedy(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model, sparsifier = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        wrapped(model, sparsifier)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"see": "some"}, "see must be one of kept, all, got 'some'"),
        ({"scheduler": "cubic"}, r"scheduler must be one of torch\.ao\.pruning, got str"),
        ({"scheduler": CubicSL, "scheduler_interval": 0}, "scheduler_interval must be a positive number"),
        ({"scheduler": lambda s: LambdaSL(s, [lambda e: 1.0, lambda e: 0.5])}, "another schedule for each layer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    _, sparsifier = prepared()
    if callable(options.get("scheduler")):
        options["scheduler"] = options["scheduler"](sparsifier)
    with pytest.raises(ConfigError, match=message):
        from_sparsifier(sparsifier, **options)


class Watching:
    """Holds what cannot be copied, and counts calls of a layer."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def test_hooks_of_the_layers_stay_with_the_model_alone() -> None:
    model, sparsifier = prepared()
    watching = Watching()
    model[0].register_forward_hook(watching)
    ast = wrapped(model, sparsifier)
    train(model, ast.optimizer, range(8), vector_batch)
    assert watching.calls == 8


def test_a_sparsifier_that_cannot_be_copied_is_refused_and_stays_on_the_model() -> None:
    model, sparsifier = prepared()
    sparsifier.watching = Watching()
    before = snapshot(model)
    with pytest.raises(
        WrapError, match=r"a copy of WeightNormSparsifier, which cannot be copied.*lock.*keep open files"
    ):
        wrapped(model, sparsifier)
    assert_same(snapshot(model), before)
    assert parametrize.is_parametrized(model[0], "weight")


class Remembering(WeightNormSparsifier):
    """Count updates, and remember a mean of the weights of each layer."""

    def __init__(self) -> None:
        super().__init__(sparse_block_shape=(1, 1))
        self.updates = 0

    def update_mask(self, module: nn.Module, tensor_name: str, tensor_fqn: str, **kwargs: Any) -> None:
        self.updates += 1
        state = self.state[tensor_fqn]
        weight = module.parametrizations[tensor_name].original
        state["mean"] = 0.9 * state.get("mean", torch.zeros_like(weight)) + 0.1 * weight.abs()
        mask = module.parametrizations[tensor_name][0].mask
        kept = state["mean"].flatten().topk(round((1 - kwargs["sparsity_level"]) * mask.numel())).indices
        mask.zero_().view(-1)[kept] = 1


def test_a_resumed_run_goes_on_bit_for_bit_with_what_the_sparsifier_remembers() -> None:
    whole = wrapped(*prepared(Remembering()))
    train(whole.model, whole.optimizer, range(30), vector_batch)
    half = wrapped(*prepared(Remembering()))
    train(half.model, half.optimizer, range(13), vector_batch)
    saved = copy.deepcopy({"model": half.model.state_dict(), "optimizer": half.optimizer.state_dict()})
    assert set(saved["optimizer"]["ast_plugin"]["plugins"]["method"]["sub_nets"]) == {"s50", "s75"}
    rest = wrapped(*prepared(Remembering()))
    rest.model.load_state_dict(saved["model"])
    rest.optimizer.load_state_dict(saved["optimizer"])
    train(rest.model, rest.optimizer, range(13, 30), vector_batch)
    assert_same(snapshot(rest.model), snapshot(whole.model))
    for name in whole.sub_nets:
        assert_same(rest.masks.of(name), whole.masks.of(name))
    assert_same(rest.optimizer.state_dict(), whole.optimizer.state_dict())


def test_the_state_of_another_sparsifier_or_of_other_layers_is_refused() -> None:
    state = wrapped(*prepared()).optimizer.state_dict()
    for sparsifier, config, message in (
        (Remembering(), CONFIG, "were decided by WeightNormSparsifier, and this one's are by Remembering"),
        (weight_norm(), CONFIG[1:], "parameter|layers"),
    ):
        other = wrapped(*prepared(sparsifier, config))
        with pytest.raises(StateError, match=message):
            other.optimizer.load_state_dict(copy.deepcopy(state))


def test_what_comes_out_is_an_ordinary_file(tmp_path: Any) -> None:
    model, sparsifier = prepared()
    ast = wrapped(model, sparsifier)
    train(model, ast.optimizer, range(4), vector_batch)
    ast.save(tmp_path / "elastic.safetensors")
    elastic = ast_plugin.load(tmp_path / "elastic.safetensors", mlp())
    inputs = vector_batch(0)[0]
    for name in ast.sub_nets:
        with elastic.sub_net(name), ast.sub_net(name):
            assert torch.equal(elastic.model(inputs), model(inputs))
