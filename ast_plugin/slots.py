"""Parameters addressed by name and looked up at every use.

Holding a Parameter object across steps goes wrong silently when it is replaced: by `fully_shard`, by
``load_state_dict(assign=True)``, by a conversion to another dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ast_plugin.errors import ActivationError


class ParameterSlots(Mapping[str, nn.Parameter]):
    """A read-only mapping from names to the parameters that the model holds right now.

    Args:
        model: The model whose ``named_parameters()`` the names come from.
        names: The parameters to address.

    Raises:
        KeyError: If the model has no such parameter.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in names:
            path, _, attribute = name.rpartition(".")
            if path not in modules or attribute not in modules[path]._parameters:
                raise KeyError(name)
            self._places[name] = (modules[path], attribute)

    def __getitem__(self, name: str) -> nn.Parameter:
        """Return the parameter of that name."""
        module, attribute = self._places[name]
        parameter = module._parameters.get(attribute)
        if parameter is None:
            raise ActivationError(
                f"parameter {name!r} is gone: it was a weight to prune when the model was wrapped, and is no parameter "
                "now; call detach() before taking parameters away, and register parametrizations (such as "
                "weight_norm) before wrap()"
            )
        return parameter

    def of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the parameters of these names; several times as fast as asking for one after the other."""
        places = self._places
        found = [module._parameters.get(attribute) for module, attribute in [places[name] for name in names]]
        present = [parameter for parameter in found if parameter is not None]
        return present if len(present) == len(found) else [self[name] for name in names]

    def lent(self) -> bool:
        """Return whether others stand in for the parameters: ``torch.func.functional_call`` with tensors of its own."""
        return any(
            type(parameter := module._parameters.get(attribute)) is not nn.Parameter
            and parameter is not None
            and not isinstance(parameter, nn.Parameter)
            for module, attribute in self._places.values()
        )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._places)


def tensor_slots(model: nn.Module, names: Iterable[str]) -> list[tuple[dict[str, Any], str]]:
    """Return where the model keeps parameters and buffers: the module's own dict and the key in it, by name.

    Reading through these takes a tenth of the time of resolving names.

    Args:
        model: The model.
        names: Names as in ``named_parameters()`` and ``named_buffers()``.
    """
    slots: list[tuple[dict[str, Any], str]] = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        slots.append((module._parameters if attribute in module._parameters else module._buffers, attribute))
    return slots


def plain_name(name: str) -> str:
    """Return the name that a tensor has when no part of the model is compiled."""
    return ".".join(segment for segment in name.split(".") if segment != "_orig_mod")


def bare_model(model: nn.Module) -> nn.Module:
    """Return the module that the caller built, inside wrappers for compilation and data-parallel use."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
