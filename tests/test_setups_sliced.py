"""Channel sub-nets computed with smaller weights: the same runs as with masked weights, in every training setup."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from channel_networks import BUSY, NETWORKS, Tokens, Witness, groups_of, sliced_run, tokens
from networks import OPTIMIZERS, adamw, conv_net, image_batch, mlp, plain_conv_net, sgd, snapshot, vector_batch
from setup_runs import Step, batch_for, plain_step
from test_setups_accumulation import accumulating_step
from test_setups_checkpointing import CheckpointedConvNet, checkpointed
from test_setups_errors import BREAKS, Planned, raising
from test_setups_formats import channels_last_net, channels_last_step
from test_setups_modes import PLAIN, Outer, WithLoss, outer
from test_setups_precision import autocast_step, scaling_step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import ast_plugin

pytestmark = pytest.mark.matrix

ROUTES = ("leaves", "gather")
TWICE = "gradient penalty"  # BatchNorm has no second derivative in these kernels


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Both computations round differently, and only in double precision can that be told from a mistake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def first_weight(model: nn.Module) -> str:
    """Return the first module whose rows are dropped."""
    return groups_of(model).groups[0].axes[0].tensor.rpartition(".")[0]


def trained(
    step: Step,
    slicing: str,
    *,
    net: Callable[[], nn.Module] = conv_net,
    build: Callable[..., torch.optim.Optimizer] = sgd,
    prepare: Callable[[nn.Module], Any] = lambda model: model,
    steps: int = 21,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining, Witness]:
    model = net()
    witness = Witness(model, [first_weight(model)])
    optimizer = build(model)
    ast = sliced_run(model, optimizer, slicing, **options)
    called = prepare(model)
    torch.manual_seed(7)
    for number in range(steps):
        step(called, optimizer, number)
    return model, optimizer, ast, witness


def assert_as_masked(
    step: Step | Callable[[], Step],
    *,
    routes: Sequence[str] = ROUTES,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    fresh: bool = False,
    **options: Any,
) -> None:
    """Train three channel sub-nets in a setup with smaller weights and with masked ones, and compare everything.

    Args:
        step: Makes one optimizer step; with `fresh`, makes such a function for each run.
        routes: The values of ``slicing`` to compare with masked computation.
        rtol: Tolerance of weights, optimizer state and private BatchNorm parameters; masks are equal bit for bit.
        atol: Tolerance.
        fresh: See `step`.
        options: As for `trained`.
    """
    results = []
    for slicing in ("off", *routes):
        model, optimizer, ast, witness = trained(step() if fresh else step, slicing, **options)  # type: ignore[operator,arg-type,call-arg]
        assert ast.step > 0
        assert (witness.sliced > 0) == (slicing != "off")
        results.append(compared(model, optimizer, ast))
    for other in results[1:]:
        assert other["masks"] == results[0]["masks"]
        assert other["conflicts"] == results[0]["conflicts"]
        torch.testing.assert_close(other["tensors"], results[0]["tensors"], rtol=rtol, atol=atol)
    assert options.get("method") == "static" or results[0]["conflicts"] > 0


def compared(
    model: nn.Module, optimizer: torch.optim.Optimizer, ast: ast_plugin.AlternatingSparseTraining
) -> dict[str, Any]:
    """Return what two runs have in common.

    Running statistics of dropped channels are without meaning: masked, they follow zeros. Where units come back, they
    are left out altogether; training does not read them.
    """
    statistics = ast.config.method == "static"
    state = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                state[f"optimizer/{name}/{key}"] = value
    for sub_net in ast.sub_nets:
        units = {}
        if sub_net.startswith("s"):
            flags = ast.kept_channels(sub_net)
            units = {axis.tensor: flags[group.name] for group in groups_of(model).groups for axis in group.axes}
        for name, tensor in ast.private_state(sub_net).items():
            if "running" not in name:
                state[f"{sub_net}/{name}"] = tensor
            elif statistics:
                state[f"{sub_net}/{name}"] = tensor[units[name]] if name in units else tensor
    return {"masks": ast.masks.checksum(), "conflicts": ast.statistics()["conflicts"], "tensors": state}


@pytest.mark.parametrize("build", sorted(OPTIMIZERS))
@pytest.mark.parametrize("net", sorted(NETWORKS))
def test_every_kind_of_network_trains_as_with_masked_weights(net: str, build: str) -> None:
    assert_as_masked(plain_step, net=NETWORKS[net], build=OPTIMIZERS[build], steps=24)


@pytest.mark.parametrize("method", ["granet", "rigl", "set", "gmp", "static"])
def test_every_method_trains_as_with_masked_weights(method: str) -> None:
    assert_as_masked(plain_step, method=method)


@pytest.mark.parametrize(
    "options",
    [
        {"inactive": "freeze"},
        {"grow_initialization": "zero"},
        {"private_normalization": False},
        {"correction": "off", "method": "static"},
        {"correction": "global", "method": "static"},
        {"alternation": "random"},
    ],
    ids=str,
)
def test_every_setting_trains_as_with_masked_weights(options: dict[str, Any]) -> None:
    assert_as_masked(plain_step, **options)


def test_masked_and_sliced_sub_nets_share_a_run() -> None:
    specs = (
        ast_plugin.SubNetSpec(name="s50", sparsity=0.5),
        ast_plugin.SubNetSpec(name="free", sparsity=0.8, pattern="unstructured"),
        ast_plugin.SubNetSpec(name="dense", sparsity=0.0, pattern="unstructured"),
    )
    assert_as_masked(plain_step, sparsities=specs, net=mlp)


def test_the_dense_gradient_at_a_mask_update_is_that_of_the_whole_rows() -> None:
    # Written by hand: whole rows, and zeros in the columns that read dropped units.
    for slicing in ("off", *ROUTES):
        model = mlp()
        optimizer = sgd(model)
        ast = sliced_run(model, optimizer, slicing, update_interval=1)
        kept = ast.kept_channels(ast.active)
        alone = mlp()
        with torch.no_grad():
            alone[2].weight[:, ~kept["a"]] = 0
            alone[4].weight[:, ~kept["b"]] = 0
        inputs, labels = vector_batch(0)
        functional.cross_entropy(alone(inputs), labels).backward()
        functional.cross_entropy(model(inputs), labels).backward()
        captured = ast._parts.gradients.dense()
        assert captured["2.weight"][:, ~kept["a"]].abs().sum() > 0
        for name in ast.masks.parameters:
            torch.testing.assert_close(captured[name], alone.get_parameter(name).grad)
            masked = alone.get_parameter(name).grad * ast.masks.get(ast.active, name)
            torch.testing.assert_close(model.get_parameter(name).grad, masked)


@pytest.mark.parametrize("net", [conv_net, mlp])
def test_accumulation_is_that_of_masked_weights(net: Any) -> None:
    assert_as_masked(accumulating_step, net=net)


@pytest.mark.parametrize("clip", [lambda p: clip_grad_norm_(p, 0.5), lambda p: clip_grad_value_(p, 0.01)])
def test_clipping_sees_the_gradients_of_the_sub_net_alone(clip: Any) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        clip(model.parameters())
        optimizer.step()

    assert_as_masked(step)


def test_autocast_is_that_of_masked_weights() -> None:
    torch.set_default_dtype(torch.float32)
    assert_as_masked(autocast_step, method="static", correction="off", steps=4, rtol=2e-2, atol=2e-3)


def test_loss_scaling_and_overflows_are_those_of_masked_weights() -> None:
    assert_as_masked(lambda: scaling_step((0, 4, 5, 9, 13)), fresh=True, net=mlp)
    assert_as_masked(lambda: scaling_step((4,), clip=0.5), fresh=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_after_wrapping_goes_on(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    model, optimizer, ast, witness = trained(plain_step, "leaves", steps=4)
    model.to(dtype)
    sliced = witness.sliced
    for number in range(4, 8):
        inputs, labels = image_batch(number)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs.to(dtype)), labels).backward()
        for name in ast.masks.parameters:
            gradient = model.get_parameter(name).grad
            assert gradient.dtype == dtype
            assert not gradient[~ast.masks.get(ast.active, name)].any()
        optimizer.step()
    assert witness.sliced > sliced
    assert ast.step == 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_are_recomputed_as_the_sub_net(reentrant: bool) -> None:
    assert_as_masked(plain_step, net=checkpointed(reentrant))
    assert issubclass(CheckpointedConvNet, type(conv_net()))


@pytest.mark.parametrize("net", [plain_conv_net, mlp])
def test_a_checkpoint_around_the_whole_model_is_that_of_masked_weights(net: Any) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        functional.cross_entropy(checkpoint(model, inputs, use_reentrant=False), labels).backward()
        optimizer.step()

    assert_as_masked(step, net=net)


@pytest.mark.parametrize(
    ("setup", "net"),
    [(setup, net) for setup in sorted(PLAIN) for net in (conv_net, mlp) if net is mlp or setup != TWICE],
)
def test_calling_the_model_otherwise_is_that_of_masked_weights(setup: str, net: Any) -> None:
    assert_as_masked(PLAIN[setup], net=net)


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass", "tensor"])
def test_a_loss_computed_inside_the_model_is_that_of_masked_weights(form: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        net = WithLoss()
        net.form = form
        return net

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = image_batch(number)
        optimizer.zero_grad()
        output = model(inputs, labels=labels)
        loss = {"tuple": lambda: output[0], "dict": lambda: output["loss"], "dataclass": lambda: output.loss}
        loss.get(form, lambda: output)().backward()
        optimizer.step()

    assert_as_masked(step, net=build)


def test_channels_last_is_that_of_masked_weights() -> None:
    assert_as_masked(channels_last_step, net=channels_last_net)


def test_smaller_weights_and_gradients_have_the_memory_format_of_the_whole_ones() -> None:
    model = channels_last_net()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    seen = []
    model.conv2.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    inputs, labels = image_batch(0)
    functional.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels).backward()
    assert seen[0].shape[0] < 16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.conv2.weight.grad.stride() == model.conv2.weight.stride()
    assert ast.active == "s25"


def test_frozen_weights_stay_frozen() -> None:
    def build() -> nn.Module:
        net = conv_net()
        net.norm1.weight.requires_grad_(False)
        net.norm2.bias.requires_grad_(False)
        return net

    assert_as_masked(plain_step, net=build)
    model, _, _, _ = trained(plain_step, "leaves", net=build, steps=3)
    assert model.norm1.weight.grad is None
    assert torch.equal(model.norm1.weight, conv_net().norm1.weight)


def test_a_layer_frozen_during_the_run_is_as_with_masked_weights() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        model.conv2.weight.requires_grad_(number < 5)
        plain_step(model, optimizer, number)

    assert_as_masked(step, method="static")


def test_functional_call_with_the_models_own_parameters_trains_as_with_masked_weights() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        output = functional_call(model, dict(model.named_parameters()), (inputs,))
        functional.cross_entropy(output, labels).backward()
        optimizer.step()

    assert_as_masked(step)


@pytest.mark.parametrize("moment", ["at rest", "between forward and backward", "in a block"])
def test_functional_call_with_other_weights_computes_with_them_as_they_are(moment: str) -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    inputs, labels = image_batch(0)
    weights = {name: (2 * p).detach() for name, p in model.named_parameters()}
    expected = functional_call(conv_net(), weights, (inputs,))
    if moment == "in a block":
        with ast.sub_net("s50"):
            chosen = model(inputs)
            assert torch.equal(functional_call(model, weights, (inputs,)), expected)
            torch.testing.assert_close(model(inputs), chosen)
        return
    loss = functional.cross_entropy(model(inputs), labels) if moment != "at rest" else None
    assert torch.equal(functional_call(model, weights, (inputs,)), expected)
    if loss is not None:
        loss.backward()
        alone = conv_net()
        alone.load_state_dict(ast.materialize("s25"))
        functional.cross_entropy(alone(inputs), labels).backward()
        mask = ast.masks.get("s25", "conv2.weight")
        torch.testing.assert_close(model.conv2.weight.grad, alone.conv2.weight.grad * mask)


@pytest.mark.parametrize("slicing", ROUTES)
def test_a_graph_from_before_a_step_or_a_change_is_refused_as_without_sub_nets(slicing: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, slicing, method="static")

    def loss(step: int) -> Tensor:
        return functional.cross_entropy(model(vector_batch(step)[0]), vector_batch(step)[1])

    first, second = loss(0), loss(1)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    changed = loss(2)
    with torch.no_grad():
        dict(model.named_parameters())["2.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.backward()
    masked = loss(3)
    model.state_dict()
    ast.masks.set(ast.active, "2.weight", ast.masks.get(ast.active, "2.weight").roll(1, dims=0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        masked.backward()


def test_gradients_taken_with_respect_to_parameters_need_the_gather() -> None:
    model = mlp()
    sliced_run(model, sgd(model), "gather", method="static")
    loss = functional.cross_entropy(model(vector_batch(0)[0]), vector_batch(0)[1])
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    model = mlp()
    sliced_run(model, sgd(model), "leaves", method="static")
    loss = functional.cross_entropy(model(vector_batch(0)[0]), vector_batch(0)[1])
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, list(model.parameters()))


def test_hooks_on_a_parameters_gradient_are_called() -> None:
    seen: dict[str, list[float]] = {}

    def prepare(model: nn.Module) -> nn.Module:
        model.conv2.weight.register_hook(lambda g: seen.setdefault("hook", []).append(float(g.abs().sum())))
        model.conv1.weight.register_post_accumulate_grad_hook(
            lambda p: seen.setdefault("accumulated", []).append(float(p.grad.abs().sum()))
        )
        return model

    assert_as_masked(plain_step, prepare=prepare, method="static")
    for values in seen.values():
        assert len(values) == 3 * 21
        torch.testing.assert_close(values[21:42], values[42:])


@pytest.mark.parametrize("where", sorted(BREAKS))
@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
def test_a_batch_that_raises_leaves_the_model_whole_and_no_trace(where: str, error: type[BaseException]) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        if number in (0, 4, 5, 9):
            before = snapshot(model)
            with pytest.raises(error):
                BREAKS[where](model, number + 300, error)
            if where == "forward hook" and error is KeyboardInterrupt:
                model.state_dict()
            for name, tensor in snapshot(model).items():
                assert torch.equal(tensor, before[name]), name
            assert all("weight" not in module.__dict__ for module in model.modules())
        plain_step(model, optimizer, number)

    assert_as_masked(step, net=mlp)


def test_an_error_in_attention_restores_the_number_of_heads() -> None:
    model = tokens()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    handle = model.attn.register_forward_hook(raising(Planned))
    with pytest.raises(Planned):
        model(vector_batch(0)[0])
    handle.remove()
    assert (model.attn.num_heads, model.attn.attn_dim) == (4, 16)
    with ast.sub_net("s50"):
        assert (model.attn.num_heads, model.attn.attn_dim) == (2, 8)
        model(vector_batch(0)[0])
    assert (model.attn.num_heads, model.attn.attn_dim) == (4, 16)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "a layer alone"])
@pytest.mark.parametrize("moment", ["between forward and backward", "in a block"])
def test_copies_are_whole_networks(how: str, moment: str) -> None:
    model = conv_net()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static")
    inputs, labels = image_batch(0)
    copies: list[nn.Module] = []

    def take(*_: Any) -> None:
        part = model.conv2 if how == "a layer alone" else model
        copies.append(pickle.loads(pickle.dumps(part)) if how == "pickle" else copy.deepcopy(part))

    loss = functional.cross_entropy(model(inputs), labels)
    if moment == "in a block":
        with ast.sub_net("s50"):
            take()
    else:
        take()
    loss.backward()
    alone = conv_net()
    alone.load_state_dict(ast.materialize("s25"))
    functional.cross_entropy(alone(inputs), labels).backward()
    for name in ast.masks.parameters:
        expected = alone.get_parameter(name).grad * ast.masks.get("s25", name)
        torch.testing.assert_close(model.get_parameter(name).grad, expected)
    weight = (copies[0] if how == "a layer alone" else copies[0].conv2).weight
    assert weight.shape == (16, 16, 3, 3)
    if moment == "in a block":
        assert torch.equal(weight != 0, ast.masks.get("s50", "conv2.weight"))
    else:
        assert torch.equal(weight, conv_net().conv2.weight)
    assert (copies[0](inputs.new_ones(1, 16, 8, 8)) if how == "a layer alone" else copies[0](inputs)).isfinite().all()


def test_a_copy_made_inside_the_models_own_forward_is_refused() -> None:
    model = tokens()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    before = snapshot(model)
    handle = model.attn.register_forward_hook(lambda *_: copy.deepcopy(model))
    with pytest.raises(ast_plugin.ActivationError, match="copied inside its own forward"):
        model(vector_batch(0)[0])
    handle.remove()
    assert model.attn.num_heads == 4
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name])
    plain_step(model, ast.optimizer, 0)
    assert ast.step == 1


def test_a_state_dict_in_a_block_is_that_of_the_sub_net_with_its_statistics() -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "leaves", method="static")
    plain_step(model, ast.optimizer, 0)
    with ast.sub_net("s50"), torch.no_grad():
        first = model(image_batch(1)[0])  # moves the running statistics, in train mode
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name in ast.masks.parameters:
            assert torch.equal(state[name] != 0, ast.masks.get("s50", name))
        again = model(image_batch(1)[0])
    torch.testing.assert_close(first, again)
    alone = conv_net()
    alone.load_state_dict(state)
    kept = ast.kept_channels("s50")["conv1"]
    expected = conv_net()
    expected.load_state_dict(ast.materialize("s50"))
    assert (state["norm1.running_mean"][kept] != 0).all()
    assert not torch.equal(state["norm1.running_mean"], ast.materialize("s50")["norm1.running_mean"])  # moved since
    torch.testing.assert_close(alone(image_batch(1)[0]), first)


@pytest.mark.parametrize("net", [conv_net, tokens])
def test_evaluation_is_sliced_and_computes_as_the_materialized_network(net: Any) -> None:
    model, _, ast, witness = trained(plain_step, "leaves", net=net, steps=9)
    model.eval()
    inputs = batch_for(model, 40)[0]
    sliced = witness.sliced
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for name in (*ast.sub_nets, None):
            alone = net()
            alone.load_state_dict(ast.materialize(name or ast.default_sub_net))
            with context():
                if name is None:
                    found = model(inputs)
                else:
                    with ast.sub_net(name):
                        found = model(inputs)
                torch.testing.assert_close(found, alone.eval()(inputs))
    assert witness.sliced == sliced + 12


def test_averages_and_twins_see_whole_weights_at_any_moment() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" not in name}
        loss = functional.cross_entropy(model(inputs), labels)
        average = AveragedModel(model)
        for name, tensor in before.items():
            assert torch.equal(average.module.get_parameter(name), tensor)
        loss.backward()
        average.update_parameters(model)
        optimizer.step()

    assert_as_masked(step, method="static")
    model, _, ast, _ = trained(plain_step, "leaves", steps=6)
    twin = ast.twin(copy.deepcopy(model))
    inputs = image_batch(3)[0]
    for name in ast.sub_nets:
        with twin.sub_net(name), ast.sub_net(name), torch.no_grad():
            torch.testing.assert_close(twin.model.eval()(inputs), model.eval()(inputs))


def test_a_closure_is_evaluated_as_with_masked_weights() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)

    assert_as_masked(step)


def test_parts_called_between_forward_and_backward_are_of_the_sub_net() -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss = loss + model.attn(inputs.new_ones(2, 3, 16)).square().mean()
        loss.backward()
        optimizer.step()

    assert_as_masked(step, net=tokens)


def test_a_wrapped_part_of_the_model_trains_as_with_masked_weights() -> None:
    found = []
    for slicing in ("off", *ROUTES):
        model = outer()
        optimizer = sgd(model)
        options = {**BUSY, "groups": groups_of(model.backbone), "slicing": slicing}
        ast = ast_plugin.wrap(optimizer, model.backbone, **options)
        for number in range(12):
            plain_step(model, optimizer, number)
        assert ast.step == 12
        found.append([p.detach() for p in model.parameters()])
    assert issubclass(Outer, nn.Module)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("slicing", ROUTES)
def test_a_run_goes_on_from_its_checkpoint(slicing: str) -> None:
    model, optimizer, ast, _ = trained(plain_step, slicing, build=adamw, steps=7)
    again, its_optimizer, resumed, _ = trained(plain_step, slicing, build=adamw, steps=0)
    again.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(7, 14):
        plain_step(model, optimizer, number)
        plain_step(again, its_optimizer, number)
    assert resumed.step == ast.step
    assert resumed.masks.checksum() == ast.masks.checksum()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_heads_are_really_fewer_and_tokens_are_a_network_with_attention() -> None:
    model, _, ast, witness = trained(plain_step, "auto", net=tokens, steps=3)
    assert isinstance(model, Tokens)
    assert witness.sliced > 0
    with ast.sub_net("s75"):
        assert model.attn.qkv.weight.shape == (12, 16)
        assert model.attn.proj.weight.shape == (16, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["compile, then wrap", "wrap, then compile", "model.compile()", "a function"])
def test_compiled_networks_are_masked_and_train_in_one_graph(how: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiled in (False, True):
        model: Any = mlp()
        witness = Witness(model, ["2"] if not compiled else [])
        optimizer = sgd(model)
        called: Any = model
        if compiled and how == "compile, then wrap":
            called = torch.compile(model, backend=counter)
        ast = ast_plugin.wrap(optimizer, called, **{**BUSY, "groups": groups_of(model), "slicing": "auto"})
        if compiled and how == "wrap, then compile":
            called = torch.compile(model, backend=counter)
        elif compiled and how == "model.compile()":
            model.compile(backend=counter)
        elif compiled and how == "a function":
            called = torch.compile(lambda inputs, model=model: model(inputs), backend=counter)
        for number in range(15):
            inputs, labels = vector_batch(number)
            optimizer.zero_grad()
            functional.cross_entropy(called(inputs), labels).backward()
            if number == 7:
                with ast.sub_net("s75"), torch.no_grad():
                    chosen = called(inputs)
                    torch.testing.assert_close(called(inputs), chosen)
            optimizer.step()
        assert (witness.sliced > 0) != compiled
        found.append([chosen, *(parameter.detach() for parameter in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.slow
def test_smaller_weights_are_refused_where_the_network_is_compiled() -> None:
    torch._dynamo.reset()
    for slicing in ROUTES:
        model = mlp()
        sliced_run(model, sgd(model), slicing, method="static")
        before = snapshot(model)
        with pytest.raises(ast_plugin.ActivationError, match=f'slicing="{slicing}" cannot be used in compiled'):
            torch.compile(model, backend="aot_eager")(vector_batch(0)[0])
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, before[name])
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_gradients_asked_for_by_parameter_are_not_lost_without_a_word(how: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    sliced_run(model, optimizer, "auto", method="static")
    inputs, labels = vector_batch(0)
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    loss = functional.cross_entropy(model(inputs), labels)
    if how == "backward":
        loss.backward(inputs=parameters)
    else:
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
    with pytest.raises(ast_plugin.ActivationError, match='pass slicing="gather" to'):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_gradients_of_inputs_may_be_taken_before_a_step() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = sliced_run(model, optimizer, "leaves", method="static")
    inputs, labels = vector_batch(0)
    inputs.requires_grad_()
    loss = functional.cross_entropy(model(inputs), labels)
    (slope,) = torch.autograd.grad(loss, [inputs])
    functional.cross_entropy(model((inputs + 0.1 * slope.sign()).detach()), labels).backward()
    optimizer.step()
    assert ast.step == 1
