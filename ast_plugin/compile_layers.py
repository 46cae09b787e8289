"""Which linear layers of a network to hold compressed: those where it was measured to pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.compile_linear import DTYPES, Layout, LinearLayer, SparseLinear, linear_layers, replace
from ast_plugin.compile_timing import call, first_call, interleaved, same_outputs
from ast_plugin.errors import ActivationError, ConfigError

_WORTH_TRYING = 0.3  # share of zeros below which sparse products never pay
_PAYS_UNMEASURED = {"csr": 0.85, "bsr": 0.75}  # share of zeros from which on they do at any number of tokens
_FASTER = 0.97  # a layer that gains less stays dense: that much is noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerForm:
    """What became of a linear layer.

    Attributes:
        layer: Its path, the first one where it stands at several places.
        form: ``dense``, ``csr``, ``bsr`` or ``2:4``.
        zeros: The share that the form can leave out, in [0, 1].
        dense_ms: Median time of the dense layer on the example inputs; None where it was not measured.
        ms: The same in the compressed form.
        reason: Why it stays dense, empty where it does not.
    """

    layer: str
    form: str
    zeros: float
    dense_ms: float | None = None
    ms: float | None = None
    reason: str = ""


class LayerInputs:
    """What the linear layers of a model were given in one run on example inputs, and what came out of it.

    Args:
        model: The network; nothing stays on it.
        layers: Its linear layers.
        example_inputs: What it is called with; None for no run.

    Attributes:
        known: Whether there was a run.
        output: The output of the model.

    Raises:
        ConfigError: If the model cannot be run on the example inputs.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LinearLayer], example_inputs: Any) -> None:
        self.known = example_inputs is not None
        self.output: Any = None
        self._example_inputs = example_inputs
        self._inputs: dict[str, Tensor] = {}
        if not self.known:
            return
        handles = [
            layer.module.register_forward_pre_hook(self._recorder(layer.paths[0]), with_kwargs=True) for layer in layers
        ]
        try:
            with reproducible():
                self.output = first_call(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()

    def get(self, layer: LinearLayer) -> Tensor | None:
        """Return the input of a layer's first call, None if it was not called."""
        return self._inputs.get(layer.paths[0])

    def check(self, model: nn.Module, form: str) -> None:
        """Make sure that another form of the model has the same outputs. Without a run, nothing is checked.

        Raises:
            ActivationError: If they differ.
        """
        if not self.known:
            return
        with reproducible():
            output = call(model, self._example_inputs)
        if not same_outputs(self.output, output):
            raise ActivationError(
                f"form {form!r} gives other outputs than the dense form on example_inputs, so it is not used; choose "
                "form='dense', and report this with the model's name"
            )

    def _recorder(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor):
                self._inputs.setdefault(path, given.detach())

        return record


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute without gradients and with fixed random numbers, and leave the generators as they were."""
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def compress_layers(
    model: nn.Module, layout: Layout, example_inputs: Any, *, block_size: int, seconds: float
) -> tuple[nn.Module, list[LayerForm]]:
    """Replace linear layers by compressed ones, in place, where that is faster on the machine at hand.

    Without example inputs a layer is taken by its share of zeros alone.

    Args:
        model: The network with the sub-net's values.
        layout: ``csr`` or ``bsr``.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or None.
        block_size: Edge of the blocks of ``bsr``.
        seconds: How long to measure, all layers together.

    Returns:
        The model (another module if it is a linear layer itself) and what became of each linear layer.

    Raises:
        ConfigError: If there is no linear layer that could be held compressed, or `example_inputs` are none.
        ActivationError: If the outputs change.
    """
    layers = linear_layers(model)
    inputs = LayerInputs(model, layers, example_inputs)
    found: list[LayerForm] = []
    refusals: list[LayerForm] = []
    taken: list[SparseLinear] = []
    for layer in layers:
        refused = _refused(layer, layout, block_size, inputs)
        if refused is not None:
            found.append(refused)
            refusals.append(refused)
            continue
        sparse = SparseLinear(
            layer.weight, layer.bias, layout=layout, block_size=block_size, contiguous=not inputs.known
        )
        form = _decided(layer, sparse, inputs.get(layer), seconds / len(layers))
        found.append(form)
        if form.form == layout:
            taken.append(sparse)
            model = replace(model, layer, sparse)
    if len(refusals) == len(layers):
        raise ConfigError(_no_layer(layout, refusals))
    if taken:
        _check(model, layout, inputs, taken)
    return model, found


def _refused(layer: LinearLayer, layout: Layout, block_size: int, inputs: LayerInputs) -> LayerForm | None:
    edge = block_size if layout == "bsr" else 1
    shape = tuple(layer.weight.shape)
    reason = ""
    if layer.weight.dtype not in DTYPES:
        reason = f"weights of {str(layer.weight.dtype).removeprefix('torch.')}; sparse products take float32"
    elif shape[0] % edge or shape[1] % edge:
        reason = f"{shape[0]} x {shape[1]} is not made of blocks of {edge}x{edge}"
    elif inputs.known and inputs.get(layer) is None:
        reason = "not called with the example inputs"
    return LayerForm(layer=layer.paths[0], form="dense", zeros=0.0, reason=reason) if reason else None


def _decided(layer: LinearLayer, sparse: SparseLinear, given: Tensor | None, seconds: float) -> LayerForm:
    zeros = 1 - sparse.values.numel() / max(1, layer.weight.numel())
    form = LayerForm(layer=layer.paths[0], form=sparse.layout, zeros=zeros)
    if zeros < _WORTH_TRYING:
        return dataclasses.replace(form, form="dense", reason="too few zeros")
    if given is None:
        least = _PAYS_UNMEASURED[sparse.layout]
        if zeros >= least:
            return form
        return dataclasses.replace(form, form="dense", reason=f"fewer than {least:.0%} zeros, and nothing measured")
    with torch.inference_mode():
        times = interleaved({"dense": lambda: layer.module(given), "sparse": lambda: sparse(given)}, seconds=seconds)
    form = dataclasses.replace(form, dense_ms=times["dense"], ms=times["sparse"])
    if times["sparse"] <= _FASTER * times["dense"]:
        return form
    return dataclasses.replace(form, form="dense", reason="measured not to pay")


def _check(model: nn.Module, layout: Layout, inputs: LayerInputs, taken: Sequence[SparseLinear]) -> None:
    try:
        inputs.check(model, layout)
    except RuntimeError as error:
        if isinstance(error, ActivationError) or taken[0].contiguous:
            raise
        # Some code views outputs in ways that need the usual layout.
        for sparse in taken:
            sparse.contiguous = True
        inputs.check(model, layout)


def _no_layer(layout: Layout, found: Sequence[LayerForm]) -> str:
    if not found:
        return (
            f"form {layout!r} is for linear layers, and the model has none that can be replaced; choose form='dense', "
            "or form='sliced' for sub-nets of pattern 'channel'"
        )
    return (
        f"form {layout!r} fits none of the {len(found)} linear layers: {found[0].layer}: {found[0].reason}; choose "
        "another form or block_size, or convert the model before it is compiled"
    )
