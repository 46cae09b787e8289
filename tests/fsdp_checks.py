"""What `test_fsdp.py` runs on two ranks: FSDP2's `fully_shard` against one process on the same global batch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from channel_networks import mlp_groups
from checkpoints import App
from global_batches import CLIP, OPTIONS, STEPS, Batch, clipped_step, close, mine, same_masks, single, whole
from networks import adamw, assert_same, conv_net, image_batch, mlp, sgd, vector_batch, wrapped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

import ast_plugin
from ast_plugin.integrations.transformers.saving import export_pretrained, save_sub_nets

SUB_NETS = ("s50", "s80", "s90")


def uneven(seed: int = 0) -> nn.Sequential:
    """Dimensions that two ranks cannot halve; the second weight has one row, so that one rank holds nothing of it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 9), nn.Linear(9, 4))


def large(seed: int = 0) -> nn.Sequential:
    """A weight whose two parts lie on either side of the size up to which tensors are packed together."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 437), nn.ReLU(), nn.Linear(437, 4))


def shard(model: nn.Module, **how: Any) -> nn.Module:
    for layer in list(model.children())[::2]:  # some layers by themselves, the others with the root
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **how)
    return fully_shard(model, **how)


def start(
    make: Callable[[], nn.Module],
    *,
    optimizer: Callable = sgd,
    how: dict[str, Any] | None = None,
    compiled: bool = False,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    model = shard(make(), **(how or {}))
    made = optimizer(model)
    if compiled:
        model = torch.compile(model, backend="eager")
    return wrapped(model, made, **{**OPTIONS, **options})


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batch: Batch,
    *,
    parts: int = 1,
    no_sync: bool = True,
    ahead: bool = False,
) -> None:
    def prepare(last: bool) -> None:
        if parts > 1 and no_sync:
            model.set_requires_gradient_sync(last)
        if ahead:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()

    for step in steps:
        inputs, labels = batch(step)
        clipped_step(model, optimizer, (mine(inputs), mine(labels)), parts, prepare)


def written(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def two_ranks_equal_one_process(folder: Path) -> Iterator[None]:
    cases: dict[str, tuple[Callable, Batch, dict[str, Any], dict[str, Any]]] = {
        "mlp": (mlp, vector_batch, {}, {}),
        "mlp, kept unsharded": (mlp, vector_batch, {}, {"how": {"reshard_after_forward": False}}),
        "mlp, adamw, freeze": (mlp, vector_batch, {"optimizer": adamw, "inactive": "freeze"}, {}),
        "mlp, rigl, global": (mlp, vector_batch, {"method": "rigl", "correction": "global"}, {}),
        "mlp, set, 2:4": (mlp, vector_batch, {"method": "set", "pattern": "2:4", "sparsities": ("2:4", "1:4")}, {}),
        "uneven": (uneven, vector_batch, {"sparsities": (0.3, 0.5)}, {}),
        "large": (large, vector_batch, {"optimizer": lambda model: sgd(model, lr=0.02)}, {}),
        "compiled": (mlp, vector_batch, {}, {"compiled": True}),
    }
    expected = {}
    for label, (make, batch, options, _) in cases.items():
        expected[label] = single(make, batch, **options)
        assert expected[label][1].statistics()["conflicts"] > 0, label
    yield
    for label, (make, batch, options, how) in cases.items():
        model, optimizer, ast = start(make, **options, **how)
        train(model, optimizer, range(STEPS), batch)
        same_masks(ast, expected[label][1])
        close(model, expected[label][0])
        assert ast.statistics()["conflicts"] == expected[label][1].statistics()["conflicts"], label


def mask_updates_of_a_rule_equal_those_of_one_process(folder: Path) -> Iterator[None]:
    def rule(sub_net: str, step: int, last_step: int | None) -> float | None:
        return 0.4 if step % 5 == 3 else None

    def explorer() -> object:
        class Explorer:
            @ast_plugin.hookimpl
            def ast_sub_net_switched(self, training: ast_plugin.AlternatingSparseTraining) -> None:
                if not training.attached:
                    training.add_mask_updates(rule)

        return Explorer()

    expected, expected_ast = single(uneven, vector_batch, method="rigl", sparsities=(0.3, 0.5), explorer=explorer())
    plain, _ = single(uneven, vector_batch, method="rigl", sparsities=(0.3, 0.5))
    assert not torch.equal(plain.get_parameter("0.weight"), expected.get_parameter("0.weight"))
    yield
    model, optimizer, ast = start(uneven, method="rigl", sparsities=(0.3, 0.5), explorer=explorer())
    train(model, optimizer, range(STEPS), vector_batch)
    same_masks(ast, expected_ast)
    close(model, expected)


def channel_sub_nets_are_masked(folder: Path) -> Iterator[None]:
    options = {"pattern": "channel", "groups": mlp_groups(), "sparsities": (0.25, 0.5, 0.75), "drop_fraction": 0.4}
    expected = {}
    for method in ("gmp", "rigl", "granet"):
        expected[method] = single(mlp, vector_batch, slicing="leaves", method=method, **options)
        assert expected[method][1].statistics()["conflicts"] > 0
    yield
    for method, (one, its_ast) in expected.items():
        model, optimizer, ast = start(mlp, method=method, **options)
        train(model, optimizer, range(STEPS), vector_batch)
        same_masks(ast, its_ast)
        close(model, one)
    for slicing in ("leaves", "gather"):
        with pytest.raises(ast_plugin.ActivationError, match="every rank holds a part"):
            start(mlp, slicing=slicing, **options)


def a_mesh_of_replicas_and_shards(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch, method="rigl")
    yield
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model, optimizer, ast = start(mlp, how={"mesh": mesh}, method="rigl")
        train(model, optimizer, range(STEPS), vector_batch)
        same_masks(ast, expected_ast)
        close(model, expected)


def every_rank_holds_its_part_of_the_masks(folder: Path) -> Iterator[None]:
    yield
    model, _, ast = start(uneven, sparsities=(0.3, 0.5))
    for name, parameter in model.named_parameters():
        if name in ast.masks.parameters:
            mask = ast.masks.get("s50", name)
            assert isinstance(mask, DTensor)
            assert mask.placements == parameter.placements == (Shard(0),)
            assert mask.shape == parameter.shape
            assert mask.to_local().shape == parameter.to_local().shape
            assert mask.to_local().untyped_storage().nbytes() == mask.to_local().numel()
    assert ast.masks.total() == sum(ast.masks.get("s50", name).numel() for name in ast.masks.parameters)
    shared = sum(
        int((whole(ast.masks.get("s30", n)) & whole(ast.masks.get("s50", n))).sum()) for n in ast.masks.parameters
    )
    assert ast.masks.overlap("s30", "s50") == shared / ast.masks.kept("s30")
    assert "s50" in str(ast.describe())


def batch_norm_equals_two_micro_batches(folder: Path) -> Iterator[None]:
    expected = {kind: single(conv_net, image_batch, parts=2, optimizer=kind) for kind in (sgd, adamw)}
    yield
    for kind, (other, other_ast) in expected.items():
        model, optimizer, ast = start(conv_net, optimizer=kind)
        train(model, optimizer, range(STEPS), image_batch)
        same_masks(ast, other_ast)
        close(model, other)
        for name in SUB_NETS:
            theirs, ours = other_ast.private_state(name), ast.private_state(name)
            for key in ("norm0.weight", "norm1.bias", "norm2.weight"):
                torch.testing.assert_close(whole(ours[key]), theirs[key], rtol=1e-5, atol=1e-5)
        ast.synchronize_normalization()
        model.eval()
        with ast.sub_net("s90"), torch.no_grad():
            output = model(image_batch(99)[0])
        outputs = [torch.empty_like(output) for _ in range(2)]
        dist.all_gather(outputs, output)
        assert torch.equal(*outputs)


def weights_gathered_ahead_of_the_forward_are_masked_too(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch)
    yield
    model, optimizer, ast = start(mlp)
    train(model, optimizer, range(STEPS), vector_batch, ahead=True)
    same_masks(ast, expected_ast)
    close(model, expected)


def accumulation_with_and_without_synchronising_micro_batches(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch, method="rigl")
    yield
    for no_sync in (True, False):
        model, optimizer, ast = start(mlp, method="rigl")
        train(model, optimizer, range(STEPS), vector_batch, parts=2, no_sync=no_sync)
        same_masks(ast, expected_ast)
        close(model, expected)


def one_whole_sub_net_is_bit_identical_to_plain_fsdp(folder: Path) -> Iterator[None]:
    yield
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # torch's own BatchNorm on a CPU refuses parameters of another dtype than its statistics.
    for make, batch, how in ((conv_net, image_batch, {}), (mlp, vector_batch, {"mp_policy": half})):
        plain = shard(make(), **how)
        plain_optimizer = adamw(plain)
        train(plain, plain_optimizer, range(8), batch)
        options = {"sparsities": (0.0,), "correction": "off", "method": "static"}
        model, optimizer, _ = start(make, optimizer=adamw, how=how, **options)
        train(model, optimizer, range(8), batch)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(one.to_local(), other.to_local())


def mixed_precision_masks_what_is_gathered(folder: Path) -> Iterator[None]:
    yield
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, ast = start(mlp, how={"mp_policy": half})
    seen: list[int] = []
    layer = model[2]
    layer.register_forward_hook(lambda module, *_: seen.append(int(module.weight.count_nonzero())))
    train(model, optimizer, range(STEPS), vector_batch)
    assert layer.weight.dtype == torch.float32
    assert ast.statistics()["conflicts"] > 0
    model(vector_batch(0)[0])
    assert seen[-1] <= ast.masks.kept(ast.active, "2.weight") < ast.masks.total("2.weight")


def frozen_weights_and_their_state_stay_on_every_rank(folder: Path) -> Iterator[None]:
    yield
    model, optimizer, ast = start(mlp, optimizer=adamw, inactive="freeze", method="static")
    train(model, optimizer, range(4), vector_batch)
    name = ast.active
    inactive = {n: ~ast.masks.get(name, n).to_local() for n in ast.masks.parameters}

    def picture() -> dict[str, Tensor]:
        found = {}
        for n, outside in inactive.items():
            parameter = model.get_parameter(n)
            found[n] = parameter.detach().to_local()[outside]
            found[f"{n}/exp_avg"] = optimizer.state[parameter]["exp_avg"].to_local()[outside].clone()
        return found

    before = picture()
    train(model, optimizer, range(4, 5), vector_batch)
    assert_same(before, picture())


def an_overflow_on_one_rank_is_skipped_on_both(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch, method="rigl")
    yield
    model, optimizer, ast = start(mlp, method="rigl")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    overflow = {3, 8, 9, 14}
    for attempt in range(STEPS + len(overflow)):
        optimizer.zero_grad()
        inputs, labels = (mine(tensor) for tensor in vector_batch(ast.step))
        loss = functional.cross_entropy(model(inputs), labels)
        if attempt in overflow and dist.get_rank() == 1:
            loss = loss * torch.tensor(float("inf"))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
    assert ast.step == STEPS
    same_masks(ast, expected_ast)
    close(model, expected)


def a_distributed_checkpoint_resumes_bit_for_bit(folder: Path) -> Iterator[None]:
    yield
    for stop in (5, 11):
        model, optimizer, ast = start(conv_net, optimizer=adamw)
        train(model, optimizer, range(stop), image_batch)
        path = folder / f"dcp{stop}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"app": App(model, optimizer), "ast": ast}, checkpoint_id=path)
            references = {n: t.to_local().clone() for n, t in ast.state_dict()["reference_gradients"].items()}
            assert any(bool(gradient.any()) for gradient in references.values())
            train(model, optimizer, range(stop, STEPS), image_batch)
            again, optimizer_again, ast_again = start(lambda: conv_net(9), optimizer=adamw)
            dcp.load({"app": App(again, optimizer_again), "ast": ast_again}, checkpoint_id=path)
        assert ast_again.step == stop
        loaded = ast_again.state_dict()["reference_gradients"]
        assert_same(references, {name: tensor.to_local() for name, tensor in loaded.items()})
        train(again, optimizer_again, range(stop, STEPS), image_batch)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.to_local(), again.get_parameter(name).to_local()), name
        for name in SUB_NETS:
            for parameter in ast.masks.parameters:
                mine_now, theirs = ast.masks.get(name, parameter), ast_again.masks.get(name, parameter)
                assert torch.equal(mine_now.to_local(), theirs.to_local())
            assert ast.masks.kept(name) == ast_again.masks.kept(name)
            for key, tensor in ast.private_state(name).items():
                if "running" not in key:
                    assert torch.equal(whole(tensor), whole(ast_again.private_state(name)[key])), key


def every_rank_may_keep_its_own_file(folder: Path) -> Iterator[None]:
    yield
    path = folder / f"own{dist.get_rank()}.pt"
    model, optimizer, ast = start(mlp)
    train(model, optimizer, range(10), vector_batch)
    if dist.get_rank() == 0:
        optimizer.state_dict()  # nothing in it waits for the other rank
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    train(model, optimizer, range(10, STEPS), vector_batch)
    again, optimizer_again, ast_again = start(lambda: mlp(9))
    checkpoint = torch.load(path, weights_only=True)
    again.load_state_dict(checkpoint["model"])
    optimizer_again.load_state_dict(checkpoint["optimizer"])
    assert ast_again.step == 10
    train(again, optimizer_again, range(10, STEPS), vector_batch)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), again.get_parameter(name).to_local()), name
    assert ast.statistics() == ast_again.statistics()


def a_full_state_goes_between_one_process_and_shards(folder: Path) -> Iterator[None]:
    model = conv_net()
    _, optimizer, ast = wrapped(model, sgd(model), **OPTIONS)
    for step in range(11):  # whole batches, as in `single`, but the loop below goes on from here
        clipped_step(model, optimizer, image_batch(step), parts=2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = torch.load(io.BytesIO(written(saved)), weights_only=True)
    expected, expected_ast = single(conv_net, image_batch, parts=2)
    fresh = conv_net(7)
    fresh_optimizer = sgd(fresh)
    _, _, fresh_ast = wrapped(fresh, fresh_optimizer, **OPTIONS)
    yield
    run_state = saved["optimizer"]["ast_plugin"]
    sharded, sharded_optimizer, sharded_ast = start(lambda: conv_net(7))
    options = StateDictOptions(full_state_dict=True)
    named = {name: saved["optimizer"]["state"][i] for i, (name, _) in enumerate(model.named_parameters())}
    groups = [{**saved["optimizer"]["param_groups"][0], "params": list(named)}]
    set_state_dict(
        sharded,
        sharded_optimizer,
        model_state_dict=saved["model"],
        optim_state_dict={"state": named, "param_groups": groups},
        options=options,
    )
    sharded_ast.load_state_dict(run_state)
    assert sharded_ast.step == 11
    back = sharded_ast.state_dict(full=True)
    fresh_ast.load_state_dict(back)
    assert fresh_ast.step == 11
    for name in SUB_NETS:
        assert_same(ast.masks.of(name), fresh_ast.masks.of(name))
        if name != ast.default_sub_net:
            assert_same(ast.private_state(name), fresh_ast.private_state(name))
    train(sharded, sharded_optimizer, range(11, STEPS), image_batch)
    same_masks(sharded_ast, expected_ast)
    close(sharded, expected)


def all_ranks_save_one_elastic_file(folder: Path) -> Iterator[None]:
    _, expected_ast = single(conv_net, image_batch, parts=2)
    yield
    model, optimizer, ast = start(conv_net)
    train(model, optimizer, range(STEPS), image_batch)
    ast.synchronize_normalization()
    ast.save(folder / "elastic.safetensors")
    dist.barrier()
    assert sorted(path.name for path in folder.glob("elastic*")) == ["elastic.safetensors"]
    elastic = ast_plugin.load(folder / "elastic.safetensors", conv_net(5))
    for name in SUB_NETS:
        elastic.switch(name)
        state, theirs = ast.materialize(name), expected_ast.materialize(name)
        for key, tensor in elastic.model.state_dict().items():
            assert torch.equal(tensor, state[key]), (name, key)
            if "running" not in key and "tracked" not in key:
                torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5)
    before = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}
    with ast.sub_net("s90"):
        assert int(whole(model.conv2.weight).count_nonzero()) == ast.masks.kept("s90", "conv2.weight")
        model.eval()(image_batch(0)[0])  # FSDP goes on showing what it gathered
    assert_same(before, {name: parameter.detach().to_local() for name, parameter in model.named_parameters()})


def all_ranks_save_the_files_beside_a_saved_model(folder: Path) -> Iterator[None]:
    yield
    model, optimizer, ast = start(mlp)
    train(model, optimizer, range(STEPS), vector_batch)
    place = folder / "saved"
    names = [file.name for file in save_sub_nets(ast, place)]
    assert names == (["elastic.safetensors", "ast_config.json"] if dist.get_rank() == 0 else ["elastic.safetensors"])
    dist.barrier()
    assert sorted(path.name for path in place.iterdir()) == ["ast_config.json", "elastic.safetensors"]
    assert ast_plugin.Report.from_elastic(ast_plugin.load(place, mlp(5))).title == "Sub-nets of Sequential"
    with pytest.raises(ast_plugin.ConfigError, match="ast-plugin export FOLDER --sub-net NAME --to OTHER"):
        export_pretrained(ast, "s90", Saveable(shard(mlp())), folder / "one")
    dist.barrier()
    save_sub_nets(ast, place, elastic=False)
    dist.barrier()
    assert [path.name for path in place.iterdir()] == ["ast_config.json"]


class Saveable(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def save_pretrained(self, folder: Path) -> None:
        pytest.fail("was called")


def what_cannot_work_is_refused(folder: Path) -> Iterator[None]:
    yield
    model = mlp()
    wrapped(model, sgd(model), **OPTIONS)
    shard(model)
    with pytest.raises(ast_plugin.ActivationError, match=r"fully_shard\(\) was applied to the model after wrap"):
        model(vector_batch(0)[0])

    _, _, ast = start(mlp)
    with pytest.raises(
        ast_plugin.ConfigError, match="version 'mean' would put whole weights on a model of which every"
    ):
        ast.add_version("mean", lambda: None)
    assert ast.versions == ("last",)

    class Correcting:
        @ast_plugin.hookimpl
        def ast_correct_gradients(self) -> None:
            return None

    model = shard(mlp())
    with pytest.raises(ast_plugin.WrapError, match="of which it would see one part"):
        ast_plugin.wrap(sgd(model), model, plugins=[Correcting()], **OPTIONS)
    _, _, ast = wrapped(model, sgd(model), **OPTIONS)
    with pytest.raises(ast_plugin.ConfigError, match=r"use torch.distributed.checkpoint: dcp.save"):
        ast.save_checkpoint(folder / "one.pt")
    mask = ast.masks.get("s50", "2.weight")
    with pytest.raises(ast_plugin.ConfigError, match="must be bool of shape"):
        ast.masks.set("s50", "2.weight", whole(mask).float())
    with pytest.raises(ast_plugin.ConfigError, match="there is no sub-net 'nope'"):
        ast.masks.kept("nope")
    state = ast.state_dict(full=True)
    with pytest.raises(ast_plugin.StateError, match="saved with another model"):
        ast.masks.unpack("s50", {**state["masks"]["s50"], "nope": torch.ones(1)})


def a_first_step_at_rate_zero_counts_on_all_ranks(folder: Path) -> Iterator[None]:
    # The one prunable weight of this model has a single row, so that the second rank holds nothing of it.
    yield
    model = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1))
    fully_shard(model)
    optimizer = sgd(model, lr=0.0)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.6), total_steps=9, include=("2.weight",))
    model(vector_batch(0)[0]).sum().backward()
    optimizer.step()
    assert ast.step == 1


CHECKS = {
    check.__name__: check
    for check in (
        two_ranks_equal_one_process,
        mask_updates_of_a_rule_equal_those_of_one_process,
        channel_sub_nets_are_masked,
        a_mesh_of_replicas_and_shards,
        every_rank_holds_its_part_of_the_masks,
        batch_norm_equals_two_micro_batches,
        weights_gathered_ahead_of_the_forward_are_masked_too,
        accumulation_with_and_without_synchronising_micro_batches,
        one_whole_sub_net_is_bit_identical_to_plain_fsdp,
        mixed_precision_masks_what_is_gathered,
        frozen_weights_and_their_state_stay_on_every_rank,
        an_overflow_on_one_rank_is_skipped_on_both,
        a_distributed_checkpoint_resumes_bit_for_bit,
        every_rank_may_keep_its_own_file,
        a_full_state_goes_between_one_process_and_shards,
        all_ranks_save_one_elastic_file,
        all_ranks_save_the_files_beside_a_saved_model,
        what_cannot_work_is_refused,
        a_first_step_at_rate_zero_counts_on_all_ranks,
    )
}
