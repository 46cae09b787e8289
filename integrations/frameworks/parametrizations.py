"""Takes torch's parametrizations off tensors of a model, and puts the very same ones back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ast_plugin.errors import WrapError


@dataclasses.dataclass(frozen=True)
class _Before:
    """A module as it was."""

    module: nn.Module
    kind: type[nn.Module]
    parameters: dict[str, Any]
    modules: dict[str, Any]


class TakenOff:
    """Parametrizations that were taken off; the parameters below them are ordinary ones again, with dense values.

    The `torch.nn.Parameter` objects are those that were there before, so an optimizer that holds them goes on.

    Args:
        tensors: Module and name of each parametrized tensor, each with one parametrization alone.
        owner: Whose parametrizations these are, for messages.

    Raises:
        WrapError: If a tensor is not parametrized, or others than these are on it or on its module; nothing is changed.
    """

    def __init__(self, tensors: Sequence[tuple[nn.Module, str]], *, owner: str) -> None:
        by_module: dict[nn.Module, list[str]] = {}
        for module, name in tensors:
            by_module.setdefault(module, []).append(name)
        for module, names in by_module.items():
            _check(module, names, owner)
        self._before: list[_Before] = []
        for module, names in by_module.items():
            self._take_off(module, names)

    def put_back(self) -> None:
        """Have every module as it was before."""
        for before in self._before:
            before.module.__class__ = before.kind
            for present, then in (
                (before.module._parameters, before.parameters),
                (before.module._modules, before.modules),
            ):
                present.clear()
                present.update(then)
        self._before.clear()

    def _take_off(self, module: nn.Module, names: Sequence[str]) -> None:
        parameters, modules = dict(module._parameters), dict(module._modules)
        self._before.append(_Before(module, type(module), parameters, modules))
        lists = module._modules["parametrizations"]
        originals = {name: lists[name]._parameters["original"] for name in names}  # type: ignore[index]
        # torch made a subclass of the module's own class to hold a property for each tensor.
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        # Weights come first in torch's layers; parametrizing took them away from there.
        module._parameters.clear()
        module._parameters.update({**originals, **parameters})


def _check(module: nn.Module, names: Sequence[str], owner: str) -> None:
    lists: Any = module._modules.get("parametrizations")
    for name in names:
        if not parametrize.is_parametrized(module, name):
            raise WrapError(f"{name!r} of a {type(module).__name__} carries no parametrization of {owner}")
        if len(lists[name]) > 1:
            found = ", ".join(type(one).__name__ for one in lists[name])
            raise WrapError(
                f"{name!r} of a {type(module).__name__} carries several parametrizations ({found}); remove those that "
                f"are not of {owner} first"
            )
        if lists[name]._parameters.get("original") is None:
            raise WrapError(f"{name!r} of a {type(module).__name__} is no parameter, and only parameters can be pruned")
    others = [name for name in lists if name not in names]
    if others:
        raise WrapError(
            f"{others[0]!r} of a {type(module).__name__} carries a parametrization which is not of {owner}; remove it "
            "first"
        )
