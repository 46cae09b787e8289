"""What `test_ddp.py` runs on two ranks: DistributedDataParallel against one process on the same global batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from channel_networks import mlp_groups
from checkpoints import App
from global_batches import CLIP, OPTIONS, STEPS, Batch, clipped_step, close, mine, same_masks, single
from networks import adamw, assert_same, conv_net, image_batch, mlp, sgd, snapshot, vector_batch, wrapped
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.distributed import average_over_ranks, check_same_on_all_ranks, ranks


class Branches(nn.Module):
    """An MLP whose second branch is used only where the first input is positive on average."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: Tensor, branch: str) -> Tensor:
        hidden = functional.relu(self.first(inputs))
        return self.head(functional.relu(getattr(self, branch)(hidden)))


def branches() -> Branches:
    torch.manual_seed(0)
    return Branches()


def parallel(
    make: Callable[[], nn.Module],
    batch: Batch,
    *,
    inside: bool = True,
    parts: int = 1,
    no_sync: bool = True,
    optimizer: Callable = sgd,
    around: Callable[[nn.Module], nn.Module] = lambda model: model,
    within: Callable[[nn.Module], nn.Module] = lambda model: model,
    ddp: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, ast_plugin.AlternatingSparseTraining]:
    """Train this rank's halves under DDP: `inside` wraps the plain model before, otherwise the DDP module after."""
    bare = make()
    optimizer = optimizer(bare)
    if inside:
        _, _, ast = wrapped(bare, optimizer, **{**OPTIONS, **options})
    module = DistributedDataParallel(within(bare), **(ddp or {}))
    model = around(module)
    if not inside:
        _, _, ast = wrapped(model, optimizer, **{**OPTIONS, **options})

    def synchronise(last: bool) -> None:
        module.require_backward_grad_sync = not no_sync or last

    for step in range(STEPS):
        inputs, labels = batch(step)
        clipped_step(model, optimizer, (mine(inputs), mine(labels)), parts, synchronise)
    return bare, ast


def train_halves(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train on this rank's halves of batches of images."""
    for step in steps:
        images, labels = image_batch(step)
        clipped_step(model, optimizer, (mine(images), mine(labels)))


def same_on_all_ranks(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining, *, buffers: bool = False) -> None:
    """Compare weights, masks and private affine parameters of all ranks, bit for bit."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ast.sub_nets:
        tensors |= {f"{name}/{key}": mask for key, mask in ast.masks.of(name).items()}
        private = ast.private_state(name)
        tensors |= {f"{name}/{key}": t for key, t in private.items() if buffers or "running" not in key}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tensors)
    for other in everyone:
        assert_same(everyone[0], other)


def two_ranks_equal_one_process(folder: Path) -> Iterator[None]:
    cases: dict[str, tuple[Callable, Batch, dict[str, Any], dict[str, Any]]] = {
        "mlp": (mlp, vector_batch, {}, {}),
        "mlp, DDP wrapped": (mlp, vector_batch, {}, {"inside": False}),
        "mlp, adamw, freeze": (mlp, vector_batch, {"optimizer": adamw, "inactive": "freeze"}, {}),
        "mlp, rigl, global": (mlp, vector_batch, {"method": "rigl", "correction": "global"}, {}),
        "mlp, bucket views": (mlp, vector_batch, {}, {"ddp": {"gradient_as_bucket_view": True}}),
        "mlp, static graph": (mlp, vector_batch, {}, {"ddp": {"static_graph": True}, "inside": False}),
        "mlp, find unused": (mlp, vector_batch, {}, {"ddp": {"find_unused_parameters": True}}),
    }
    expected = {}
    for label, (make, batch, options, _) in cases.items():
        expected[label] = single(make, batch, **options)
        assert expected[label][1].statistics()["conflicts"] > 0, label
    yield
    for label, (make, batch, options, how) in cases.items():
        model, ast = parallel(make, batch, **options, **how)
        close(model, expected[label][0])
        same_masks(ast, expected[label][1])
        assert ast.statistics()["conflicts"] == expected[label][1].statistics()["conflicts"], label
        same_on_all_ranks(model, ast)


def two_ranks_with_batch_norm_equal_two_micro_batches(folder: Path) -> Iterator[None]:
    # BatchNorm normalises each rank's part by itself, as it does with micro-batches.
    expected, expected_ast = single(conv_net, image_batch, parts=2)
    yield
    for inside in (True, False):
        model, ast = parallel(conv_net, image_batch, inside=inside)
        close(model, expected)
        same_masks(ast, expected_ast)
        for name in ast.sub_nets:
            theirs = expected_ast.private_state(name)
            for key, tensor in ast.private_state(name).items():
                if key in dict(model.named_parameters()):
                    torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5)
        same_on_all_ranks(model, ast)
        ast.synchronize_normalization()
        same_on_all_ranks(model, ast, buffers=True)


def accumulation_with_and_without_synchronising_micro_batches(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch, method="rigl")
    yield
    for how in (
        {},
        {"no_sync": False},
        {"ddp": {"gradient_as_bucket_view": True}},
        {"ddp": {"gradient_as_bucket_view": True}, "no_sync": False, "inside": False},
    ):
        model, ast = parallel(mlp, vector_batch, parts=2, method="rigl", **how)
        same_masks(ast, expected_ast)
        close(model, expected)
        same_on_all_ranks(model, ast)


def channel_sub_nets_with_gathered_weights(folder: Path) -> Iterator[None]:
    options = {"pattern": "channel", "groups": mlp_groups(), "method": "rigl", "sparsities": (0.25, 0.5, 0.75)}
    expected, expected_ast = single(mlp, vector_batch, slicing="leaves", **options)
    assert expected_ast.statistics()["conflicts"] > 0
    yield
    for how in (
        {},
        {"inside": False},
        {"slicing": "gather", "parts": 2},
        {"ddp": {"gradient_as_bucket_view": True}},
        {"ddp": {"static_graph": True}, "inside": False},
        {"ddp": {"find_unused_parameters": True}},
    ):
        seen: list[torch.Size] = []

        def watched(seen: list[torch.Size] = seen) -> nn.Module:
            net = mlp()
            net[2].register_forward_pre_hook(lambda module, _: seen.append(module.weight.shape))
            return net

        model, ast = parallel(watched, vector_batch, **{**options, **how})
        close(model, expected)
        same_masks(ast, expected_ast)
        same_on_all_ranks(model, ast)
        assert {(12, 12), (8, 8), (4, 4)} <= set(map(tuple, seen)), how
    with pytest.raises(ast_plugin.ActivationError, match=r'slicing="leaves" gives gradients to tensors'):
        parallel(mlp, vector_batch, slicing="leaves", **options)


def compiled_models(folder: Path) -> Iterator[None]:
    expected, expected_ast = single(mlp, vector_batch)
    yield

    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")

    for how in ({"within": compiled}, {"around": compiled, "inside": False}):
        torch.compiler.reset()
        model, ast = parallel(mlp, vector_batch, **how)
        close(model, expected)
        same_masks(ast, expected_ast)
        same_on_all_ranks(model, ast)


def a_rank_with_an_empty_micro_batch_does_not_hang(folder: Path) -> Iterator[None]:
    # 16 samples a step: rank 0 has all of them, rank 1 none.
    def loss(model: nn.Module, inputs: Tensor, labels: Tensor, world: int) -> Tensor:
        return functional.cross_entropy(model(inputs), labels, reduction="sum") * world / 16

    def run(inside: bool, half: Callable[[Tensor], Tensor], ddp: bool) -> tuple[nn.Module, Any]:
        bare = mlp()
        optimizer = sgd(bare)
        model: nn.Module = bare
        if inside:
            _, _, ast = wrapped(bare, optimizer, **OPTIONS, method="rigl")
        if ddp:
            model = DistributedDataParallel(bare)
        if not inside:
            _, _, ast = wrapped(model, optimizer, **OPTIONS, method="rigl")
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, labels = (half(tensor) for tensor in vector_batch(step))
            loss(model, inputs, labels, 2 if ddp else 1).backward()
            optimizer.step()
        return bare, ast

    expected, expected_ast = run(True, lambda tensor: tensor, ddp=False)
    yield
    empty = dist.get_rank() == 1
    for inside in (True, False):
        model, ast = run(inside, lambda tensor: tensor[:0] if empty else tensor, ddp=True)
        assert ast.step == STEPS
        close(model, expected)
        same_masks(ast, expected_ast)
        same_on_all_ranks(model, ast)


def unused_parameters_that_differ_between_ranks(folder: Path) -> Iterator[None]:
    # One process sees both halves of the batch, each through its own branch; so do the two ranks.
    def run(ddp: bool) -> tuple[nn.Module, Any]:
        bare = branches()
        _, optimizer, ast = wrapped(bare, sgd(bare), **OPTIONS, method="rigl")
        model = DistributedDataParallel(bare, find_unused_parameters=True) if ddp else bare
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, labels = vector_batch(step)
            halves = list(zip(inputs.chunk(2), labels.chunk(2), ("left", "right"), strict=True))
            if ddp:
                part, target, branch = halves[dist.get_rank()]
                functional.cross_entropy(model(part, branch), target).backward()
            else:
                for part, target, branch in halves:
                    (functional.cross_entropy(model(part, branch), target) / 2).backward()
            optimizer.step()
        return bare, ast

    expected, expected_ast = run(ddp=False)
    yield
    model, ast = run(ddp=True)
    same_masks(ast, expected_ast)
    close(model, expected)
    same_on_all_ranks(model, ast)


def an_overflow_on_one_rank_is_skipped_on_both(folder: Path) -> Iterator[None]:
    def run(ddp: bool, overflow: set[int]) -> tuple[nn.Module, Any]:
        bare = mlp()
        _, optimizer, ast = wrapped(bare, sgd(bare), **OPTIONS, method="rigl")
        model = DistributedDataParallel(bare) if ddp else bare
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6, backoff_factor=0.5)
        for attempt in range(STEPS + len(overflow)):
            optimizer.zero_grad()
            inputs, labels = vector_batch(ast.step)
            if ddp:
                inputs, labels = mine(inputs), mine(labels)
            loss = functional.cross_entropy(model(inputs), labels)
            if attempt in overflow and (not ddp or dist.get_rank() == 1):
                loss = loss * torch.tensor(float("inf"))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
        assert ast.step == STEPS
        return bare, ast

    overflow = {3, 8, 9, 14}  # plain steps and mask updates
    expected, expected_ast = run(False, overflow)
    undisturbed, _ = run(False, set())
    assert_same(snapshot(expected), snapshot(undisturbed))
    yield
    model, ast = run(True, overflow)
    close(model, expected)
    same_masks(ast, expected_ast)
    same_on_all_ranks(model, ast)


def rank_0_alone_saves_and_both_resume(folder: Path) -> Iterator[None]:
    yield

    def start(seed: int, inside: bool) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
        bare = conv_net(seed)
        optimizer = sgd(bare)
        if inside:
            _, _, ast = wrapped(bare, optimizer, **OPTIONS)
        model = DistributedDataParallel(bare)
        if not inside:
            _, _, ast = wrapped(model, optimizer, **OPTIONS)
        return bare, model, optimizer, ast

    for inside in (True, False):
        bare, model, optimizer, ast = start(0, inside)
        train_halves(model, optimizer, range(10))
        path = folder / f"checkpoint{inside}.pt"
        if dist.get_rank() == 0:  # anything that waited for rank 1 here would run into the timeout
            torch.save({"model": bare.state_dict(), "optimizer": optimizer.state_dict()}, path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                ast.save(folder / f"elastic{inside}.safetensors")
            ast.state_dict()
            bare.eval()
            with ast.sub_net("s80"), torch.no_grad():
                bare(image_batch(0)[0])
            bare.train()
        dist.barrier()
        train_halves(model, optimizer, range(10, STEPS))

        again, model_again, optimizer_again, ast_again = start(7 + dist.get_rank(), inside)
        checkpoint = torch.load(path, weights_only=True)
        again.load_state_dict(checkpoint["model"])
        optimizer_again.load_state_dict(checkpoint["optimizer"])
        train_halves(model_again, optimizer_again, range(10, STEPS))
        same_on_all_ranks(again, ast_again)
        same_masks(ast, ast_again)
        if dist.get_rank() == 0:  # the statistics in the checkpoint are those of rank 0
            assert_same(snapshot(bare), snapshot(again))
            for name in ast.sub_nets:
                assert_same(ast.private_state(name), ast_again.private_state(name))
        else:
            close(bare, again)


def a_distributed_checkpoint_brings_both_ranks_back(folder: Path) -> Iterator[None]:
    yield

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        bare = conv_net(seed)
        optimizer = adamw(bare)
        _, _, ast = wrapped(bare, optimizer, **OPTIONS)
        return DistributedDataParallel(bare), optimizer, ast

    model, optimizer, ast = start(0)
    train_halves(model, optimizer, range(11))
    dcp.save({"app": App(model, optimizer), "ast": ast}, checkpoint_id=folder / "dcp")
    train_halves(model, optimizer, range(11, STEPS))
    again, optimizer_again, ast_again = start(9)
    dcp.load({"app": App(again, optimizer_again), "ast": ast_again}, checkpoint_id=folder / "dcp")
    assert ast_again.step == 11
    train_halves(again, optimizer_again, range(11, STEPS))
    same_masks(ast, ast_again)
    same_on_all_ranks(again, ast_again)
    parameters = dict(model.named_parameters())  # statistics may be those of either rank
    assert_same({n: p.detach() for n, p in parameters.items()}, {n: p.detach() for n, p in again.named_parameters()})


def first_masks_are_those_of_rank_0(folder: Path) -> Iterator[None]:
    yield
    bare = conv_net(seed=dist.get_rank())
    with torch.no_grad():
        bare.norm1.weight.add_(dist.get_rank())
    _, _, ast = wrapped(bare, method="static")
    model = DistributedDataParallel(bare)
    same_on_all_ranks(bare, ast, buffers=True)
    functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()


def ranks_that_differ_are_noticed_at_the_first_step(folder: Path) -> Iterator[None]:
    model, optimizer, ast = wrapped(conv_net(), method="static")
    state = ast.state_dict()
    yield
    if dist.get_rank() == 1:
        mask = ast.masks.get("s80", "conv1.weight").clone()
        mask.view(-1)[:2] ^= True
        ast.masks.set("s80", "conv1.weight", mask)
    functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()
    with pytest.raises(ast_plugin.StateError, match="masks differ between ranks"):
        optimizer.step()
    ast.load_state_dict(state)
    functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()
    optimizer.step()
    assert ast.step == 1


def join_is_refused_unless_it_ends_all_ranks(folder: Path) -> Iterator[None]:
    yield
    for inside in (True, False):
        bare = mlp()
        optimizer = sgd(bare)
        if inside:
            _, _, ast = wrapped(bare, optimizer, **OPTIONS)
        model = DistributedDataParallel(bare)
        if not inside:
            _, _, ast = wrapped(model, optimizer, **OPTIONS)
        inputs, labels = (mine(tensor) for tensor in vector_batch(0))
        with pytest.raises(ast_plugin.ActivationError, match="throw_on_early_termination=True"), model.join():
            model(inputs)
        assert ast.step == 0
        done = 0
        ended = pytest.raises(RuntimeError, match="exhausted")
        with ended, model.join(throw_on_early_termination=True):
            for _ in range(3 + dist.get_rank()):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                done += 1
        assert done == ast.step == 3
        same_on_all_ranks(bare, ast)


def a_part_of_the_ranks_as_a_group(folder: Path) -> Iterator[None]:
    yield
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    bare = mlp(seed=dist.get_rank())
    _, _, ast = wrapped(bare, sgd(bare), **OPTIONS)
    model = DistributedDataParallel(bare, process_group=alone)
    inputs, labels = vector_batch(dist.get_rank())
    with pytest.raises(ast_plugin.ActivationError, match="give the DistributedDataParallel module to wrap"):
        model(inputs)
    ast.detach()
    optimizer = sgd(bare)
    _, _, ast = wrapped(model, optimizer, **OPTIONS)
    assert ranks(model) == 1
    for step in range(STEPS if dist.get_rank() else 3):  # the other rank's run is another run
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def averages_are_completed_and_made_in_buckets(folder: Path) -> Iterator[None]:
    yield
    rank = dist.get_rank()
    like = {"a": torch.empty(2, 3), "b": torch.empty(4, dtype=torch.bfloat16), "c": torch.empty(2), "d": torch.empty(1)}
    tensors = {"c": torch.tensor([1.0, 3.0 * rank])}
    if rank == 0:
        tensors["a"] = torch.arange(6.0).reshape(3, 2).t()  # another memory layout than the other rank's
        tensors["b"] = torch.ones(4, dtype=torch.bfloat16)
    average_over_ranks(tensors, like)
    assert list(like) == sorted(tensors)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        average_over_ranks(dict.fromkeys("abcd", torch.ones(8)), dict.fromkeys("abcd", torch.ones(8)))
        assert all_reduce.call_count == 1
        with mock.patch("ast_plugin.distributed.BUCKET_BYTES", 64):
            average_over_ranks(dict.fromkeys("abcde", torch.ones(8)), dict.fromkeys("abcde", torch.ones(8)))
        assert all_reduce.call_count == 1 + 3
    assert tensors["a"].tolist() == [[0.0, 1.0, 2.0], [0.5, 1.5, 2.5]], tensors
    assert tensors["b"].dtype == torch.bfloat16
    assert tensors["b"].tolist() == [0.5] * 4
    assert tensors["c"].tolist() == [1.0, 1.5]
    assert tensors["d"].tolist() == [0.0]
    check_same_on_all_ranks("masks", lambda argument: argument, "same")
    with pytest.raises(ast_plugin.StateError, match=r"of 's90' differ between ranks: \['differs0', 'differs1'\]"):
        check_same_on_all_ranks("the masks of 's90'", lambda argument: argument + str(rank), "differs")


CHECKS = {
    check.__name__: check
    for check in (
        averages_are_completed_and_made_in_buckets,
        two_ranks_equal_one_process,
        two_ranks_with_batch_norm_equal_two_micro_batches,
        accumulation_with_and_without_synchronising_micro_batches,
        channel_sub_nets_with_gathered_weights,
        compiled_models,
        a_rank_with_an_empty_micro_batch_does_not_hang,
        unused_parameters_that_differ_between_ranks,
        an_overflow_on_one_rank_is_skipped_on_both,
        rank_0_alone_saves_and_both_resume,
        a_distributed_checkpoint_brings_both_ranks_back,
        first_masks_are_those_of_rank_0,
        ranks_that_differ_are_noticed_at_the_first_step,
        a_part_of_the_ranks_as_a_group,
        join_is_refused_unless_it_ends_all_ranks,
    )
}
