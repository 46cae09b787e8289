"""Whole runs whose channel sub-nets are chosen by importances of torch-pruning, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from typing import Any

import numpy
import pytest
import torch
import torch_pruning as tp
from networks import image_batch, sgd, train
from residual_networks import residual_groups, residual_net, token_groups, token_net
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.frameworks.torch_pruning import from_importance
from ast_plugin.methods import GMP, SET
from ast_plugin.sub_nets import SubNetSpec

pytestmark = pytest.mark.extra("channels")


CASES = {"residual": (residual_net, residual_groups), "tokens": (token_net, token_groups)}
IMPORTANCES = {
    "magnitude": lambda: tp.importance.MagnitudeImportance(p=1),
    "lamp": lambda: tp.importance.LAMPImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(),
    "taylor": lambda: tp.importance.TaylorImportance(),
    "random": lambda: tp.importance.RandomImportance(),
}


def wrapped(case: str, method: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    network, groups = CASES[case]
    model = network()
    optimizer = sgd(model)
    settings = {
        "sparsities": (0.25, 0.5, 0.75),
        "pattern": "channel",
        "total_steps": 40,
        "update_interval": 4,
        "groups": groups(),
    }
    return model, optimizer, ast_plugin.wrap(optimizer, model, method=method, **{**settings, **options})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_run_ends_with_the_asked_shares_nested_and_goes_on_from_a_checkpoint_bit_by_bit(
    case: str, importance: str
) -> None:
    def method() -> Any:
        return from_importance(IMPORTANCES[importance]())

    model, optimizer, ast = wrapped(case, method())
    train(model, optimizer, range(22))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(22, 40))
    kept = {name: ast.kept_channels(name) for name in ast.sub_nets}
    for name, sparsity in zip(ast.sub_nets, (0.25, 0.5, 0.75), strict=True):
        for group in ast.groups.groups:
            assert int(kept[name][group.name].sum()) == round((1 - sparsity) * group.units)
    for denser, sparser in (("s25", "s50"), ("s50", "s75")):
        assert not any((kept[sparser][name] & ~flags).any() for name, flags in kept[denser].items())

    again, other, resumed = wrapped(case, method())
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    train(again, other, range(22, 40))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(flags, resumed.kept_channels(n)[g]) for n in kept for g, flags in kept[n].items())


def test_the_units_of_the_last_update_are_those_that_the_package_ranks_highest() -> None:
    """One sub-net, no regrowth: at its updates the four best of 16 and three of 12 are kept, by dense gradients."""
    model, optimizer, ast = wrapped(
        "residual",
        from_importance(tp.importance.TaylorImportance(), base="gmp"),
        sparsities=(0.75,),
        total_steps=12,
        update_interval=5,
        end_step=10,
        correction="off",
    )
    train(model, optimizer, range(10))
    twin = copy.deepcopy(model)  # before the last update: the dense network
    with ast.sub_net("s75"):
        masked = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = image_batch(10)
    twin.train()
    loaded = copy.deepcopy(twin)
    loaded.load_state_dict({**twin.state_dict(), **masked})  # gradients are those of the masked network
    functional.cross_entropy(loaded(images), labels).backward()
    graph = tp.DependencyGraph().build_dependency(loaded, images[:1], verbose=False)
    loaded.load_state_dict(twin.state_dict())  # and scores those of the dense weights
    expected = {}
    for i, units in enumerate((16, 12)):
        conv = loaded.get_submodule(f"blocks.{i}.conv1")
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(units)))
        best = tp.importance.TaylorImportance()(group).topk(units // 4).indices
        expected[f"blocks.{i}.conv1"] = sorted(best.tolist())
    train(model, optimizer, range(10, 11))
    found = {name: flags.nonzero().flatten().tolist() for name, flags in ast.kept_channels("s75").items()}
    assert found == expected


def test_every_sub_net_is_scored_by_its_own_batch_norm_scales() -> None:
    model, optimizer, ast = wrapped(
        "residual",
        from_importance(tp.importance.BNScaleImportance(), base="gmp"),
        sparsities=(0.25, SubNetSpec(name="plain", sparsity=0.5, pattern="unstructured")),
        total_steps=20,
        update_interval=1,
        end_step=14,
    )
    train(model, optimizer, range(10))
    state = ast.private_state("s25")
    state["blocks.0.bn1.weight"][:4] = torch.tensor([1e-3, 1e-4, 1e-2, 1e-5])
    ast._parts.normalization.load("s25", state)
    train(model, optimizer, range(10, 20))
    dropped = (~ast.kept_channels("s25")["blocks.0.conv1"]).nonzero().flatten().tolist()
    assert dropped == [0, 1, 2, 3]
    assert ast.masks.sparsity("plain") == pytest.approx(0.5, abs=1e-3)


def shuffled(group: Any) -> Tensor:
    """Return ranks drawn with Python's generator, as torch-pruning 1.5 does."""
    ranks = list(range(len(group[0].idxs)))
    random.shuffle(ranks)
    return torch.tensor(ranks)


def of_numpy(group: Any) -> Tensor:
    return torch.from_numpy(numpy.random.rand(len(group[0].idxs)))


@pytest.mark.parametrize("importance", [tp.importance.RandomImportance(), shuffled, of_numpy])
def test_chance_is_drawn_from_the_seed_alone(importance: Any) -> None:
    def kept(seed: int, disturbed: int) -> list[list[bool]]:
        base = dataclasses.replace(GMP, initial_sparsity=0.5)
        for seeded in (torch.manual_seed, random.seed, numpy.random.seed):
            seeded(disturbed)
        _, _, ast = wrapped("residual", from_importance(importance, base=base), sparsities=(0.5,), seed=seed)
        found = [flags.tolist() for flags in ast.kept_channels("s50").values()]
        drawn = (random.random(), float(numpy.random.rand()))
        for seeded in (random.seed, numpy.random.seed):
            seeded(disturbed)
        assert drawn == (random.random(), float(numpy.random.rand()))  # the run has drawn nothing
        return found

    assert kept(0, 1) == kept(0, 2) != kept(3, 1)


def test_anything_that_scores_a_group_of_the_package_will_do() -> None:
    def last_first(group: Any) -> Tensor:
        return torch.arange(len(group[0].idxs))

    _, _, ast = wrapped("tokens", from_importance(last_first, base=dataclasses.replace(GMP, initial_sparsity=0.75)))
    assert ast.kept_channels("s75")["blocks.0.attn"].tolist() == [False, False, False, True]
    assert ast.config.method == "gmp+last_first"


def test_moments_without_gradient_are_scored_by_magnitude_or_what_was_given() -> None:
    """First masks of a base that starts sparse, and completed ones of a run that ends early."""
    taylor, base = tp.importance.TaylorImportance, dataclasses.replace(GMP, initial_sparsity=0.5)
    by_magnitude = wrapped("residual", from_importance(tp.importance.MagnitudeImportance(), base=base))[2]
    first = wrapped("residual", from_importance(taylor(), base=base))[2]
    given = wrapped(
        "residual", from_importance(taylor(), base=base, without_gradient=lambda g: torch.arange(len(g[0].idxs)))
    )[2]
    for name, flags in by_magnitude.kept_channels("s50").items():
        assert torch.equal(first.kept_channels("s50")[name], flags)
        assert given.kept_channels("s50")[name].tolist() == [False] * (len(flags) // 2) + [True] * (len(flags) // 2)

    options = {"sparsities": (0.25, 0.75), "total_steps": None, "begin_step": 0, "end_step": 10}
    model, optimizer, ast = wrapped("residual", from_importance(taylor()), **options)
    train(model, optimizer, range(11))  # s75 was trained before step 10 for the last time
    assert sum(int((~flags).sum()) for flags in ast.kept_channels("s75").values()) < 21
    ast.finish()
    assert [int((~flags).sum()) for flags in ast.kept_channels("s75").values()] == [12, 9]


def test_units_that_grow_back_are_the_base_methods_choice() -> None:
    model, optimizer, ast = wrapped(
        "residual", from_importance(tp.importance.LAMPImportance(), base=SET), sparsities=(0.5,), drop_fraction=0.5
    )
    first = ast.kept_channels("s50")["blocks.0.conv1"].clone()
    train(model, optimizer, range(20))
    assert int(first.sum()) == int(ast.kept_channels("s50")["blocks.0.conv1"].sum()) == 8
    assert not torch.equal(first, ast.kept_channels("s50")["blocks.0.conv1"])


def refused(method: Any, match: str, **options: Any) -> None:
    model = residual_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = sgd(model)
    settings = {"sparsities": (0.5,), "pattern": "channel", "total_steps": 20, "groups": residual_groups()}
    with pytest.raises(ConfigError, match=match):
        ast_plugin.wrap(optimizer, model, method=method, **{**settings, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_what_an_importance_cannot_score_is_refused_before_the_first_step() -> None:
    only_linear = tp.importance.MagnitudeImportance(target_types=[nn.Linear])
    refused(
        from_importance(only_linear),
        r"MagnitudeImportance goes by nothing that channel group 'blocks\.0\.conv1' has \(layers blocks\.0\.conv1, "
        r"blocks\.0\.bn1, blocks\.0\.conv2\), .* exclude its weights",
    )
    refused(from_importance(lambda _: torch.zeros(3)), r"returned \(3,\) for channel group .*shape \(16,\)")
    refused(from_importance(lambda _: [0.0]), r"returned list for channel group")
    refused(
        from_importance(tp.importance.LAMPImportance()),
        r"'granet\+LAMPImportance' scores whole channels, and no sub-net drops any: .* unstructured",
        pattern="unstructured",
        groups=None,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tp.importance.HessianImportance(), "HessianImportance needs the squared gradient of every sample"),
        (lambda: tp.importance.OBDCImportance(), "OBDCImportance needs inputs and output gradients"),
        (lambda: tp.importance.ActivationImportance(), "ActivationImportance needs activations"),
        (lambda: tp.importance.TaylorImportance(bias=True), r"TaylorImportance\(bias=True\) needs gradients of biases"),
        (lambda: tp.importance.MagnitudeImportance(group_reduction=None), "returns one row a layer"),
        (lambda: tp.importance.LAMPImportance, r"is a class; give an object: LAMPImportance\(\)"),
        (lambda: "lamp", "must be an importance of torch-pruning.*got 'lamp'"),
    ],
)
def test_importances_that_training_cannot_serve_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_importance(make())


def test_options_that_contradict_one_another_are_refused() -> None:
    magnitude, taylor = tp.importance.MagnitudeImportance(), tp.importance.TaylorImportance()
    with pytest.raises(ConfigError, match="without_gradient has no use: MagnitudeImportance needs no gradient"):
        from_importance(magnitude, without_gradient=magnitude)
    with pytest.raises(ConfigError, match="without_gradient=TaylorImportance needs a gradient itself"):
        from_importance(taylor, without_gradient=taylor)
    with pytest.raises(ConfigError, match="TaylorImportance reads gradients, and needs_gradient=False keeps none"):
        from_importance(taylor, needs_gradient=False)
    with pytest.raises(ConfigError, match="base='static' chooses channels without scores"):
        from_importance(magnitude, base="static")
    with pytest.raises(ConfigError, match="base='vr-pge' chooses channels without scores"):
        from_importance(magnitude, base="vr-pge")
    with pytest.raises(ConfigError, match="did you mean 'granet'"):
        from_importance(magnitude, base="granett")
    with pytest.raises(ConfigError, match="base must be the name of a method or a Method, got 3"):
        from_importance(magnitude, base=3)
