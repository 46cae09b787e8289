"""What hosts know of linear and convolution layers beyond the core's rule, whichever library they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_STANDARDIZED = frozenset({"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"})  # timm's
_STANDARDIZED |= {"WeightStandardizedConv2d"}  # Hugging Face's


def outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of one kind in `model` by name, itself under "", without those that are part of another.

    Args:
        model: Any module.
        wanted: Returns whether a module is of the kind.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and wanted(module):
            found.append(name)
            yield name, module


def class_names(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's class and of all classes that it derives from."""
    return frozenset(kind.__name__ for kind in type(module).__mro__)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a convolution, Hugging Face's ``Conv1D`` included."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or "Conv1D" in class_names(module)


def convolution_reason(module: nn.Module) -> str:
    """Return why the weight of a convolution is not pruned by default, "" if it is or the module is none.

    Depthwise convolutions hold few weights, 9 or 25 a channel, and a channel whose few are dropped is gone. A layer
    that standardizes its weight subtracts the mean, so that zeros in the weight are no zeros where it is used.
    """
    if not isinstance(module, CONVOLUTIONS):
        return ""
    if is_standardized(module):
        return "standardized weight: zeros in it do not stay zeros"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise convolution"
    return "convolution of a single channel" if module.in_channels == module.out_channels == 1 else ""


def is_standardized(module: nn.Module) -> bool:
    """Return whether a convolution subtracts the mean from its weight when it uses it."""
    return bool(class_names(module) & _STANDARDIZED)
