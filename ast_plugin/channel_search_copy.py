"""A copy of a model to search on: on the CPU, in float32, without hooks; and what it is run with.

The model itself is only read: everything that traces or slices works on the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, model: nn.Module) -> Any:
        """Return what `model` makes of it."""
        return model(*self.args, **self.kwargs)


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def search_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode on the CPU, floating-point numbers as float32, all of its parameters trainable.

    Hooks are left out, but for those by which torch computes weights (``torch.nn.utils``).

    Raises:
        ConfigError: If the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = _plain(parameter)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=data.is_floating_point())
    for buffer in model.buffers():
        memo[id(buffer)] = _plain(buffer)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that a hook has computed
                memo[id(value)] = _plain(value)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be copied, which the search for channel groups needs "
            f"({first_line(error)}); pass groups=..., found by find_groups before what hinders copying, or by hand"
        ) from error
    for module in twin.modules():
        for name in _HOOKS:
            hooks: dict[int, Any] = getattr(module, name, None) or {}
            for key in [key for key, hook in hooks.items() if not _computes_weights(hook)]:
                del hooks[key]
    return twin.eval()


def example_call(example_inputs: Any) -> Call:
    """Return example inputs as positional and keyword arguments, copied to the CPU, in float32.

    Raises:
        ConfigError: If they are neither a tensor, a tuple or list of arguments, nor a dict of keyword arguments.
    """
    remedy = "pass a tensor, a tuple of positional arguments or a dict of keyword arguments that the model takes"
    if isinstance(example_inputs, Tensor):
        found = Call((_copied(example_inputs),), {})
    elif isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        found = Call((), {key: _copied(value) for key, value in example_inputs.items()})
    elif isinstance(example_inputs, (tuple, list)):
        found = Call(tuple(_copied(value) for value in example_inputs), {})
    else:
        raise ConfigError(f"example_inputs is {type(example_inputs).__name__}; {remedy}")
    if not any(True for _ in tensors((found.args, found.kwargs))):
        raise ConfigError(f"example_inputs holds no tensor; {remedy}")
    return found


def of_one_example(call: Call) -> Call:
    """Return the call with the first example alone, where all tensors agree on how many there are."""
    sizes = {tensor.shape[:1] for tensor in tensors((call.args, call.kwargs))}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        return call
    return Call(*_mapped((call.args, call.kwargs), lambda tensor: tensor[:1]))


def with_values(call: Call) -> Call:
    """Return the call with random numbers in place of constants: images or vectors of zeros or ones hide much."""
    generator = torch.Generator().manual_seed(0)

    def filled(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or not tensor.is_floating_point() or not bool((tensor == tensor.flatten()[:1]).all()):
            return tensor
        return torch.randn(tensor.shape, generator=generator)

    kwargs = {name: value if "mask" in name else _mapped(value, filled) for name, value in call.kwargs.items()}
    return Call(_mapped(call.args, filled), kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, model outputs of Hugging Face too, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def differentiable(call: Call) -> Call:
    """Return the call with floating-point tensors that carry gradients and are no leaves."""

    def tracked(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() * 1 if tensor.is_floating_point() else tensor

    return Call(*_mapped((call.args, call.kwargs), tracked))


@contextmanager
def linear_stand_ins(model: nn.Module) -> Iterator[frozenset[str]]:
    """Put linear layers in the places of Hugging Face's ``Conv1D``, whose weight is (in, out); yields their paths."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    paths = set()
    stand_ins: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if is_transposed_linear(module):
            parent, _, attribute = path.rpartition(".")
            holder = model.get_submodule(parent)
            if module not in stand_ins:
                stand_ins[module] = _as_linear(module)
            swapped.append((holder, attribute, module))
            holder._modules[attribute] = stand_ins[module]
            paths.add(path)
    try:
        yield frozenset(paths)
    finally:
        for holder, attribute, module in swapped:
            holder._modules[attribute] = module


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's ``Conv1D``: by name, so that transformers is not needed."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    weight = module._parameters.get("weight")
    return "Conv1D" in kinds and not isinstance(module, nn.Conv1d) and weight is not None and weight.ndim == 2


def _as_linear(module: nn.Module) -> nn.Linear:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:  # `is_transposed_linear` has seen to it
        raise TypeError
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.eval()


def _computes_weights(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils") or getattr(hook, "__module__", "").startswith(
        "torch.nn.utils"
    )


def _plain(tensor: Tensor) -> Tensor:
    data = tensor.detach().to("cpu", copy=True)
    return data.float() if data.is_floating_point() else data


def _copied(value: Any) -> Any:
    return _mapped(value, _plain)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value) if type(value) in (tuple, list) else value
    return value
