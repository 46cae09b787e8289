"""Masks of ``torch.nn.utils.prune``: from a pruned model into a run, and from a sub-net onto a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ast_plugin.attachment import is_attached
from ast_plugin.elastic import Elastic
from ast_plugin.elastic_contents import ElasticContents
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ActivationError, ConfigError, WrapError
from ast_plugin.integrations.frameworks.given_masks import MasksMethod, masks_method
from ast_plugin.methods import Method
from ast_plugin.sharding import is_sharded
from ast_plugin.slots import bare_model, plain_name
from ast_plugin.sub_nets import check_sub_net
from ast_plugin.training import AlternatingSparseTraining


def from_pruned(
    model: nn.Module, name: str = "pruned", *, then: str | Method = "granet", fixed: bool = True
) -> MasksMethod:
    """Return a method by which the masks of a pruned model become those of one sub-net of a run.

    `ast_plugin.wrap` takes the pruning off the model: the same parameters, which the optimizer goes on with, under
    their ordinary names and with all their values. If wrap fails, the model is as it was. The parameters that were
    pruned are what the run prunes, biases included.

    Args:
        model: The model, pruned with ``torch.nn.utils.prune``; it is not changed before it is wrapped, and must not be
            pruned further.
        name: The sub-net's name.
        then: The method of the run's other sub-nets, and with ``fixed=False`` of this one's later mask updates.
        fixed: Whether the masks stay as they are.

    Returns:
        The method. Its ``sub_nets`` has the entry for ``sparsities``, with the sparsity that the masks have.

    Raises:
        ConfigError: If nothing of the model is pruned, or `then` cannot go on from its masks.
        WrapError: If what is pruned is sharded.

    Example:
        >>> method = from_pruned(model)
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(*method.sub_nets, 0.9), method=method, total_steps=1000)
    """
    found = _found(model)
    masks = _masks(bare_model(model), found)

    def take_over(optimizer: torch.optim.Optimizer, wrapped: nn.Module) -> Callable[[], None]:
        del optimizer
        found = _found(wrapped)
        present = _masks(wrapped, found)
        if set(present) != set(masks) or any(
            not torch.equal(present[name].cpu(), mask.cpu()) for name, mask in masks.items()
        ):
            raise ConfigError(
                f"the {type(wrapped).__name__} to wrap is not pruned as the one that from_pruned was given was then; "
                "wrap that, and call from_pruned after the last pruning"
            )
        return _take_off(found)

    return masks_method({name: masks}, then=then, fixed=fixed, take_over=take_over)


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """Take pruning off a model and return its masks.

    Args:
        model: The model, pruned with ``torch.nn.utils.prune``. Afterwards the parameters have their ordinary names and
            all their values, also those that were pruned away; they are the same objects.

    Returns:
        By parameter name, bool masks of the parameters' shapes, True = kept.

    Raises:
        ConfigError: If nothing is pruned, or one tied parameter has two masks.
        WrapError: If the model is being trained by `ast_plugin.wrap`, or sharded.
    """
    if is_attached(model):
        raise WrapError("the model is wrapped; its sub-nets' masks are in the controller's masks")
    found = _found(model)
    masks = _masks(bare_model(model), found)
    _take_off(found)
    return masks


def write_masks(source: AlternatingSparseTraining | Elastic | ElasticContents, sub_net: str, model: nn.Module) -> None:
    """Make a model a sub-net, with the masks as ``torch.nn.utils.prune`` has them.

    Its tensors become those of the sub-net; what the masks cover is kept in ``..._orig``: all dense values of a run,
    and of a file what other sub-nets keep.

    Args:
        source: A run, a loaded file, or the contents of one.
        sub_net: One of its sub-nets.
        model: A model of the same architecture, not the one that is trained and not pruned; changed in place.

    Raises:
        ConfigError: If there is no such sub-net, or the model does not fit; it is not changed then.
        ActivationError: If a sub-net is chosen in the run, so that dense values are out of reach.
        WrapError: If the model is being trained by `ast_plugin.wrap`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_attached(model):
        raise WrapError("the model is wrapped; give a copy of it, or detach() the run first")
    state, masks = _sub_net(source, sub_net)
    bare = bare_model(model)
    if _pruned(bare):
        raise ConfigError(f"the {type(bare).__name__} is pruned already; call take_masks(model) first")
    own = {plain_name(name): tensor for name, tensor in bare.state_dict(keep_vars=True).items()}
    for name in sorted({*state, *own}):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            here = tuple(own[name].shape) if name in own else "missing"
            there = tuple(state[name].shape) if name in state else "missing"
            raise ConfigError(
                f"the {type(bare).__name__} does not fit sub-net {sub_net!r}: {name!r} is {here} in it, and {there} in "
                "the sub-net; give a model of the same architecture"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in bare.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, attribute))
    for name, mask in masks.items():
        parameter = own[name]
        for module, attribute in places[id(parameter)]:
            prune.custom_from_mask(module, attribute, mask.to(parameter.device))


@dataclasses.dataclass(frozen=True)
class _Pruned:
    """One pruned tensor of a module."""

    module: nn.Module
    path: str
    name: str

    @property
    def original(self) -> Any:
        return self.module._parameters[f"{self.name}_orig"]

    @property
    def mask(self) -> Any:
        return self.module._buffers[f"{self.name}_mask"]

    @property
    def full_name(self) -> str:
        return plain_name(f"{self.path}.{self.name}").removeprefix(".")


def _pruned(model: nn.Module) -> list[_Pruned]:
    found = []
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                found.append(_Pruned(module, path, hook._tensor_name))
    return found


def _found(model: nn.Module) -> list[_Pruned]:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = _pruned(bare_model(model))
    if not found:
        raise ConfigError(
            f"nothing of this {type(bare_model(model)).__name__} is pruned with torch.nn.utils.prune (prune.remove "
            "makes it permanent, which leaves no masks); prune it first, or give masks to from_masks"
        )
    return found


def _masks(model: nn.Module, found: list[_Pruned]) -> dict[str, Tensor]:
    """Return the masks by the names that the parameters will have, in the order of the model's modules."""
    for one in found:
        if is_sharded(one.original):
            raise WrapError(
                f"{one.full_name!r} is sharded, and its pruning cannot be taken off any more; call take_masks(model) "
                "before fully_shard, and give its masks to from_masks"
            )
    masks: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for one in found:
        name = first.setdefault(id(one.original), one.full_name)
        mask = one.mask.detach() != 0
        if name in masks and not torch.equal(masks[name], mask):
            raise ConfigError(f"{name!r} and {one.full_name!r} are one parameter with two masks; prune them alike")
        masks[name] = mask.clone()
    places = {(one.module, f"{one.name}_orig") for one in found}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in first and (module, attribute) not in places:
                raise ConfigError(
                    f"{first[id(parameter)]!r} is pruned, and {f'{path}.{attribute}'!r}, the same parameter, is not; "
                    "prune both alike"
                )
    return masks


def _take_off(found: list[_Pruned]) -> Callable[[], None]:
    """Take the pruning off; return what puts the very same back."""
    undo: list[Callable[[], None]] = []
    by_module: dict[nn.Module, list[_Pruned]] = {}
    for one in found:
        by_module.setdefault(one.module, []).append(one)
    for module, ones in by_module.items():
        undo.append(_take_off_module(module, ones))

    def put_back() -> None:
        for one in reversed(undo):
            one()
        undo.clear()

    return put_back


def _take_off_module(module: nn.Module, ones: list[_Pruned]) -> Callable[[], None]:
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    hooks = dict(module._forward_pre_hooks)
    computed = {one.name: module.__dict__[one.name] for one in ones if one.name in module.__dict__}
    # Weights come before biases in torch's layers; pruning moved them behind.
    originals = {one.name: one.original for one in sorted(ones, key=lambda one: one.name.startswith("bias"))}
    for one in ones:
        del module._parameters[f"{one.name}_orig"], module._buffers[f"{one.name}_mask"]
        module.__dict__.pop(one.name, None)
    for key, hook in hooks.items():
        if isinstance(hook, prune.BasePruningMethod):
            del module._forward_pre_hooks[key]
    rest = dict(module._parameters)
    module._parameters.clear()
    for name, original in {**originals, **rest}.items():
        # By attribute: recurrent layers keep a list of their weights up to date so.
        setattr(module, name, original)

    def put_back() -> None:
        for name in originals:
            del module._parameters[name]
        before: Any = (
            (module._parameters, parameters),
            (module._buffers, buffers),
            (module._forward_pre_hooks, hooks),
        )
        for present, then in before:
            present.clear()
            present.update(then)
        for name, tensor in computed.items():
            setattr(module, name, tensor)

    return put_back


def _sub_net(source: Any, sub_net: str) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Return a sub-net's state dict, with the values that its masks cover, and its masks."""
    if isinstance(source, AlternatingSparseTraining):
        check_sub_net(sub_net, source.sub_nets)
        if source.chosen is not None:
            raise ActivationError(
                f"sub-net {source.chosen!r} is chosen in the run; call write_masks outside of its block"
            )
        state, masks = source.materialize(sub_net), source.masks.of(sub_net)
        dense = dict(bare_model(source.model).named_parameters(remove_duplicate=False))
        return {**state, **{name: dense[name].detach() for name in masks}}, masks
    if isinstance(source, Elastic):
        contents = read_elastic(source.path)
    elif isinstance(source, ElasticContents):
        contents = source
    else:
        raise ConfigError(
            f"source must be a run, a loaded elastic file or the contents of one, got {type(source).__name__}"
        )
    state = source.materialize(sub_net)
    masks = {name: contents.mask(sub_net, name) for name in contents.parameters}
    for name, mask in masks.items():
        values, places = contents.dense_values(name)
        if places is not None:
            whole = torch.zeros(places.numel(), dtype=values.dtype).masked_scatter_(places, values).view(mask.shape)
            state[name] = torch.where(mask, state[name].cpu(), whole.to(state[name].dtype))
    return state, masks
