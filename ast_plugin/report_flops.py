"""Theoretical floating-point operations of a network, with each prunable weight's share.

Counted by `torch.utils.flop_counter`: matrix products, convolutions and attention, two operations a multiply-add;
additions of biases, normalisation and activation functions count for nothing. A sub-net's figure scales every
prunable layer's share by that layer's density. It is what a runtime that skips every zero would do: masked dense
tensors do the dense work. Products with sparse tensors count what they store: two operations a stored value and column
of the other factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ast_plugin.compile_timing import describe_inputs
from ast_plugin.errors import ConfigError
from ast_plugin.slots import plain_name

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_SEMI_STRUCTURED = "torch.sparse.semi_structured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Operations of one forward pass.

    Attributes:
        total: Of the whole dense network.
        layers: Parameter name -> operations that read this parameter; 0 for one that the forward pass does not use.
    """

    total: int
    layers: dict[str, int]

    def at_sparsity(self, sparsity: Mapping[str, float]) -> int:
        """Return the operations left when each layer's share is scaled by its density.

        Args:
            sparsity: Parameter name -> fraction of zeros, in [0, 1]; parameters left out count as dense.
        """
        saved = sum(self.layers.get(name, 0) * value for name, value in sparsity.items())
        return round(self.total - saved)


def count_flops(model: nn.Module, parameters: Sequence[str], example_inputs: Any) -> FlopCount:
    """Run the model once in eval mode and without gradients, and count its operations.

    Training mode is restored module by module afterwards; nothing else of the model changes.

    Args:
        model: The network, with its parameters on the device of the example.
        parameters: Names of the parameters whose share is wanted.
        example_inputs: What the model takes: a tensor (or any single argument), a tuple or list of positional
            arguments, or a mapping of keyword arguments.

    Raises:
        ConfigError: If the model cannot be run on the example; the model's own error is chained.
    """
    named = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    # By storage: a transposed, chunked or reshaped view of a weight still reads that weight.
    owners = {
        named[plain_name(name)].untyped_storage().data_ptr(): name for name in parameters if plain_name(name) in named
    }
    owners.pop(0, None)
    counter = FlopCounterMode(display=False)
    attribution = _Attribution(counter, owners)
    try:
        with _evaluating(model), torch.no_grad(), counter, attribution:
            run_on(model, example_inputs)
    except Exception as error:
        raise ConfigError(
            f"example_inputs ({describe_inputs(example_inputs)}) cannot be run through the model: "
            f"{type(error).__name__}: {error}; give a tensor, a tuple of arguments or a mapping of keyword arguments "
            "that model(...) accepts, on the model's device"
        ) from error
    return FlopCount(
        total=counter.get_total_flops() - attribution.skipped,
        layers={name: attribution.layers.get(name, 0) for name in parameters},
    )


class _Attribution(TorchDispatchMode):
    """Assigns the growth of the counter's total during an operation to the parameter which that operation reads."""

    def __init__(self, counter: FlopCounterMode, owners: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.counter = counter
        self.owners = owners
        self.layers: dict[str, int] = {}
        self.skipped = 0  # what the counter, which looks at shapes alone, took for work with zeros that are not stored

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        grown = self.counter.get_total_flops() - before
        if grown:
            dense, grown = grown, round(grown * min((_stored_share(value) for value in args), default=1.0))
            self.skipped += dense - grown
            owner = self._owner((*args, *(kwargs or {}).values()))
            if owner is not None:
                self.layers[owner] = self.layers.get(owner, 0) + grown
        return result

    def _owner(self, values: Sequence[Any]) -> str | None:
        for value in values:
            # Exact classes only: other subclasses (nested, distributed) need not have a storage; sparse ones have none.
            if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
                owner = self.owners.get(value.untyped_storage().data_ptr())
                if owner is not None:
                    return owner
        return None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no compiled code and no fused attention path, both of which hide operations from the counter."""
    training = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # The counter's global module hooks fire once more for the compiled wrapper; that changes no count.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training:
            module.training = mode


def _stored_share(value: Any) -> float:
    """Return the share of a tensor's values that its layout stores; 1 for dense tensors and everything else."""
    if not isinstance(value, Tensor) or not value.numel():
        return 1.0
    if value.layout in _COMPRESSED:
        return value.values().numel() / value.numel()
    return 0.5 if type(value).__module__ == _SEMI_STRUCTURED else 1.0


def run_on(model: Callable[..., Any], example_inputs: Any) -> Any:
    """Call a model on an example.

    Args:
        model: The network.
        example_inputs: A tensor (or any single argument), a tuple or list of positional arguments, or a mapping of
            keyword arguments.

    Returns:
        What the model returns.
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)
