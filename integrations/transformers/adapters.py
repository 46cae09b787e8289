"""Which parameters of a model belong to adapters of peft; peft itself is not imported."""

from __future__ import annotations

from torch import nn

# Children of peft's modules that are parts of the model which the adapters were put on.
_OF_THE_MODEL = frozenset({"base_layer", "base_model", "model", "original_module"})


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that peft added, by their first name: adapters, prompts, and trained copies of modules.

    A module is peft's by where its class comes from, or by the names of adapters that it lists.

    Args:
        model: Any module, a ``PeftModel`` or one with adapters added to it.
    """
    added: dict[int, nn.Parameter] = {}
    given: set[int] = set()
    _sort(model, False, added, given)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in added.keys() - given}


def _sort(module: nn.Module, inside: bool, added: dict[int, nn.Parameter], given: set[int]) -> None:
    of_peft = _is_of_peft(module)
    inside = inside or of_peft
    for parameter in module._parameters.values():
        if parameter is not None and inside:
            added[id(parameter)] = parameter
        elif parameter is not None:
            given.add(id(parameter))
    for name, child in module.named_children():
        _sort(child, inside and not (of_peft and name in _OF_THE_MODEL), added, given)


def _is_of_peft(module: nn.Module) -> bool:
    names = getattr(module, "adapter_layer_names", None)
    listed = isinstance(names, (tuple, list)) and len(names) > 0
    return listed or any(f"{kind.__module__}.".startswith("peft.") for kind in type(module).__mro__)
