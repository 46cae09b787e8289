"""VR-PGE in an ordinary run: losses through the closure or `explore`, final masks with the exact budget, resume."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import networks
import pytest
import torch
import vr_pge_runs as runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ast_plugin
from ast_plugin.errors import ActivationError, ConfigError, StateError
from ast_plugin.vr_pge_method import ChannelSampler, VRPGEOptions, vr_pge

UNITS = 40


def sampler_of(ast: ast_plugin.AlternatingSparseTraining) -> ChannelSampler:
    assert isinstance(ast.sampler, ChannelSampler)
    return ast.sampler


def probabilities(ast: ast_plugin.AlternatingSparseTraining) -> Tensor:
    return torch.cat(list(sampler_of(ast).probabilities.values()))


def kept(ast: ast_plugin.AlternatingSparseTraining) -> Tensor:
    return torch.cat(list(ast.kept_channels("s50").values()))


def everything(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"mask {name}": mask for name, mask in ast.masks.of("s50").items()}
    return {**found, "probabilities": probabilities(ast), "chance": torch.get_rng_state()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


SLICINGS = pytest.mark.parametrize("slicing", ["off", "leaves", "gather"])


@SLICINGS
def test_a_closure_serves_as_it_is_and_is_the_same_as_explore(slicing: str) -> None:
    model, optimizer, ast = runs.wrapped(slicing=slicing)
    for step in range(25):
        runs.explored_step(model, optimizer, ast, step)
    explored = everything(model, ast)
    torch.manual_seed(0)
    model, optimizer, ast = runs.wrapped(slicing=slicing)
    for step in range(25):
        runs.closure_step(model, optimizer, step)
    assert_equal(everything(model, ast), explored)
    assert len(torch.unique(explored["probabilities"])) > 5
    assert explored["norm1.num_batches_tracked"] == 25


def test_smaller_weights_learn_what_masked_ones_learn() -> None:
    found = []
    for slicing in ("off", "leaves", "gather"):
        torch.manual_seed(0)
        model, optimizer, ast = runs.wrapped(slicing=slicing)
        for step in range(12):
            runs.closure_step(model, optimizer, step)
        found.append(probabilities(ast))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)


def test_probabilities_keep_the_budget_and_masks_are_drawn_anew_at_every_step() -> None:
    model, optimizer, ast = runs.wrapped()
    seen = set()
    for step in range(20):
        runs.closure_step(model, optimizer, step)
        assert float(probabilities(ast).sum()) <= UNITS / 2 + 1e-9
        assert all(float(part.sum()) >= 1 - 1e-9 for part in sampler_of(ast).probabilities.values())
        assert all(bool(flags.any()) for flags in ast.kept_channels("s50").values())
        seen.add(tuple(kept(ast).tolist()))
        assert not ast.at_target
    assert len(seen) == 20


def test_the_best_candidate_is_fixed_with_exactly_the_budget_and_no_loss_is_asked_for_any_more() -> None:
    told: list[Any] = []

    class Watcher:
        @ast_plugin.hookimpl
        def ast_masks_updated(self, sub_net: str, step: int) -> None:
            told.append((sub_net, step))

    model, optimizer, ast = runs.wrapped(plugins=[Watcher()])
    for step in range(20):
        runs.closure_step(model, optimizer, step)
    assert told == []
    assert not sampler_of(ast).is_final
    # The choice: four masks are compared on the data of step 20.
    found: list[tuple[float, Tensor]] = []

    def loss() -> Tensor:
        value = runs.loss_of(model, 20)
        found.append((float(value), kept(ast)))
        return value

    optimizer.zero_grad()
    ast.explore(loss)
    assert len(found) == 4
    assert all(int(flags.sum()) == UNITS // 2 for _, flags in found)
    runs.loss_of(model, 20).backward()
    optimizer.step()
    assert told == [("s50", 20)]
    assert ast.at_target
    assert torch.equal(kept(ast), min(found, key=lambda pair: pair[0])[1])
    assert ast.history["sparsity"][-1] == {"step": 20, "sub_net": "s50", "target": 0.5, "achieved": 0.5}
    fixed = kept(ast)
    for step in range(21, 30):
        ast.explore(lambda: pytest.fail("no loss is needed"))
        networks.train_step(model, optimizer, networks.image_batch(step))  # an ordinary loop again
    assert torch.equal(kept(ast), fixed)
    assert all(bool(flags.any()) for flags in ast.kept_channels("s50").values())


def test_a_run_without_the_losses_is_told_what_to_do_and_stays_as_it_was() -> None:
    model, optimizer, ast = runs.wrapped()
    before = networks.snapshot(model)
    with pytest.raises(ActivationError, match=r"give optimizer.step\(\) a closure .* or call ast.explore"):
        networks.train_step(model, optimizer, networks.image_batch(0))
    after = networks.snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    runs.closure_step(model, optimizer, 0)
    assert ast.step == 1


@SLICINGS
def test_extra_passes_leave_no_trace(slicing: str) -> None:
    model, optimizer, ast = runs.wrapped(slicing=slicing)
    runs.closure_step(model, optimizer, 0)
    model.train()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    before, modes = networks.snapshot(model), [module.training for module in model.modules()]
    chance = torch.get_rng_state()

    def loss() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = runs.loss_of(model, 1)
        if "handle_torch_function" in inspect.getsource(torch.autograd.backward):  # not in early releases
            torch.autograd.backward(value)
            torch.autograd.backward([value, value])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert not value.requires_grad
        return value

    ast.explore(loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks.snapshot(model).items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(torch.equal(gradients[name], copies[name]) for name in copies)
    assert torch.equal(torch.get_rng_state(), chance)
    assert [module.training for module in model.modules()] == modes
    value = runs.loss_of(model, 1)
    value.backward()  # backward is itself again
    assert value.requires_grad


def test_all_passes_see_the_same_dropout_that_the_training_forward_sees() -> None:
    model, optimizer, ast = runs.wrapped(sparsities=(0.0,))  # every mask keeps all: only chance could differ
    model.train()
    found: list[float] = []

    def loss() -> Tensor:
        found.append(float(runs.loss_of(model, 0)))
        return torch.tensor(found[-1])

    optimizer.zero_grad()
    ast.explore(loss)
    trained, next_one = (runs.loss_of(model, 0).item() for _ in range(2))
    assert len(found) == 2
    assert found == [trained] * 2
    assert next_one != trained


def test_micro_batches_of_a_step_try_the_same_masks_and_their_losses_are_averaged() -> None:
    model, optimizer, ast = runs.wrapped()
    seen: list[Tensor] = []
    heard: list[Tensor] = []
    learn = sampler_of(ast).learn
    sampler_of(ast).learn = lambda step, losses: (heard.append(losses), learn(step, losses))[1]  # type: ignore[method-assign]
    losses: list[float] = []

    def loss(batch: int) -> Tensor:
        seen.append(kept(ast))
        value = runs.loss_of(model, batch)
        losses.append(float(value))
        return value

    model.train()
    optimizer.zero_grad()
    trained = []
    for batch in range(3):
        ast.explore(lambda batch=batch: loss(batch))  # type: ignore[misc]
        (runs.loss_of(model, batch) / 3).backward()
        trained.append(kept(ast))
    optimizer.step()
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[:2] * 2, seen[2:], strict=True))
    assert all(torch.equal(a, seen[1]) for a in trained)  # the first mask, which is tried last
    assert not torch.equal(seen[0], seen[1])
    mean = torch.tensor(losses, dtype=torch.float64).view(3, 2).flip(1).mean(0)
    assert len(heard) == 1
    assert torch.allclose(heard[0], mean)


def test_gradients_reach_the_trained_mask_alone() -> None:
    model, _optimizer, ast = runs.wrapped()
    model.train()
    ast.explore(lambda: runs.loss_of(model, 0))
    runs.loss_of(model, 0).backward()
    for name, mask in ast.masks.of("s50").items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert not gradient[~mask].any()
        assert gradient[mask].any()


@pytest.mark.parametrize("at", [7, 20, 24])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(at: int) -> None:
    model, optimizer, ast = runs.wrapped()
    for step in range(at):
        runs.closure_step(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    for step in range(at, 28):
        runs.closure_step(model, optimizer, step)
    wanted = everything(model, ast)

    torch.manual_seed(99)
    model, optimizer, ast = runs.wrapped(runs.DroppingNet())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    for step in range(at, 28):
        runs.closure_step(model, optimizer, step)
    assert_equal(everything(model, ast), wanted)


def test_the_state_is_plain_and_one_of_another_method_is_refused(tmp_path: Any) -> None:
    model, optimizer, ast = runs.wrapped()
    runs.closure_step(model, optimizer, 0)
    torch.save(ast.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    _, _, fresh = runs.wrapped()
    fresh.load_state_dict(state)
    assert torch.equal(probabilities(fresh), probabilities(ast))
    _, _, other = runs.wrapped(method="set")
    _, _, fresh = runs.wrapped()
    with pytest.raises(StateError, match="another method than 'vr-pge'"):
        fresh.load_state_dict(other.state_dict())


def test_a_file_of_masks_that_are_still_drawn_comes_with_a_warning(tmp_path: Any) -> None:
    model, optimizer, ast = runs.wrapped(sparsities=(0.0,))
    runs.closure_step(model, optimizer, 0)
    assert not ast.is_near_target("s0")
    with pytest.warns(UserWarning, match="which the masks reach at step 20"):
        ast.save(tmp_path / "early.safetensors")
    for step in range(1, 21):
        runs.closure_step(model, optimizer, step)
    assert ast.is_near_target("s0")
    ast.save(tmp_path / "final.safetensors")


def test_a_run_that_ends_before_the_choice_keeps_the_most_probable_units() -> None:
    model, optimizer, ast = runs.wrapped(end_step=12, method=vr_pge(VRPGEOptions(rate=0.2)))
    for step in range(12):
        runs.closure_step(model, optimizer, step)
    assert not ast.at_target
    ast.finish()
    assert int(kept(ast).sum()) == UNITS // 2
    lowest = probabilities(ast)[kept(ast)].min()
    others = probabilities(ast)[~kept(ast)]
    assert (others <= lowest).all()
    assert ast.at_target


def test_with_one_candidate_the_most_probable_units_are_trained_at_once_without_any_loss() -> None:
    model, optimizer, ast = runs.wrapped(method=vr_pge(VRPGEOptions(candidates=1)), end_step=3)
    for step in range(3):
        runs.closure_step(model, optimizer, step)
    networks.train_step(model, optimizer, networks.image_batch(3))
    assert sampler_of(ast).is_final
    assert int(kept(ast).sum()) == UNITS // 2


def test_before_begin_step_masks_are_drawn_and_nothing_is_learned() -> None:
    model, optimizer, ast = runs.wrapped(begin_step=3)
    seen = set()
    for step in range(3):
        networks.train_step(model, optimizer, networks.image_batch(step))
        seen.add(tuple(kept(ast).tolist()))
    assert len(seen) == 3
    assert torch.equal(probabilities(ast), torch.full((UNITS,), 0.5, dtype=torch.float64))
    with pytest.raises(ActivationError, match="explore"):
        networks.train_step(model, optimizer, networks.image_batch(3))


def test_a_loss_that_is_not_finite_teaches_nothing() -> None:
    model, optimizer, ast = runs.wrapped()
    model.train()
    ast.explore(lambda: runs.loss_of(model, 0) * float("nan"))
    runs.loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(probabilities(ast), torch.full((UNITS,), 0.5, dtype=torch.float64))
    runs.closure_step(model, optimizer, 1)
    assert not torch.equal(probabilities(ast), torch.full((UNITS,), 0.5, dtype=torch.float64))


def test_a_step_that_a_gradient_scaler_skips_is_made_again_with_the_same_masks() -> None:
    model, optimizer, ast = runs.wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.train()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        ast.explore(lambda: runs.loss_of(model, 0))
        scaler.scale(runs.loss_of(model, 0) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        masks = kept(ast)
        if factor != 1:
            assert ast.step == 0
            first = masks
    assert ast.step == 1
    assert torch.equal(first, masks)


def test_a_line_search_tries_masks_once_a_step() -> None:
    torch.manual_seed(0)
    model = networks.plain_conv_net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    _, _, ast = runs.wrapped(model, optimizer, runs.PLAIN_GROUPS)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = runs.loss_of(model, 0)
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    optimizer.step(closure)
    assert calls[:2] == [False, False]
    assert all(calls[2:])
    assert ast.step == 1


def test_explore_does_nothing_for_other_methods() -> None:
    _, _, ast = networks.wrapped()
    ast.explore(lambda: pytest.fail("no loss is needed"))
    assert ast.sampler is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (0.5, 0.75)}, "learns one sub-net, and sparsities has 2"),
        ({"pattern": "unstructured", "groups": None}, "has pattern 'unstructured'; pass pattern='channel'"),
        ({"total_steps": None}, "total_steps"),
        ({"sparsities": (0.97,)}, "leaves nothing of channel group"),
    ],
)
def test_runs_that_it_cannot_make_are_refused_and_the_model_is_untouched(options: dict[str, Any], message: str) -> None:
    model = networks.conv_net()
    with pytest.raises(ConfigError, match=re.escape(message)):
        runs.wrapped(model, **options)
    assert not model._forward_pre_hooks
    runs.wrapped(model)


def test_losses_that_are_no_numbers_and_calls_at_the_wrong_moment_are_refused() -> None:
    model, optimizer, ast = runs.wrapped()
    model.train()
    with pytest.raises(ConfigError, match="must be one number, got NoneType"):
        ast.explore(lambda: None)
    with pytest.raises(ConfigError, match=r"got a tensor of shape \(16, 5\)"):
        ast.explore(lambda: model(networks.image_batch(0)[0]))
    with ast.sub_net("s50"), pytest.raises(ActivationError, match="leave the block"):
        ast.explore(lambda: runs.loss_of(model, 0))
    with pytest.raises(RuntimeError, match="broken"):
        ast.explore(broken)
    assert networks.nonzero(model, ast) == ast.masks.total()
    runs.explored_step(model, optimizer, ast, 0)
    assert ast.step == 1


def broken() -> Tensor:
    raise RuntimeError("broken")


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 2}, {"samples": 1}, {"samples": 2.0}, {"candidates": 0}])
def test_settings_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        VRPGEOptions(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own doing
def test_a_compiled_model_learns_what_the_plain_one_learns() -> None:
    found = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model = networks.conv_net()
        called: Any = torch.compile(model, backend=counter) if compiled else model
        _, optimizer, ast = runs.wrapped(called, networks.sgd(model), slicing="auto")
        for step in range(6):
            runs.closure_step(called, optimizer, step)
        found.append(probabilities(ast))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 2  # with gradients and without


def test_autocast_is_the_same_in_all_passes() -> None:
    model, optimizer, ast = runs.wrapped(sparsities=(0.0,))
    dtypes: list[torch.dtype] = []
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, labels = networks.image_batch(0)
            outputs = model(images)
        dtypes.append(outputs.dtype)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        losses.append(loss.item())
        loss.backward()
        return loss

    model.train()
    optimizer.step(closure)
    assert dtypes == [torch.bfloat16] * 3
    assert len(set(losses)) == 1
    assert ast.step == 1
