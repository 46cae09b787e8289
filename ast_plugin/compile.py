"""One sub-net as a module of its own, in the form in which it runs fastest on the machine at hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroups
from ast_plugin.compile_layers import LayerForm, LayerInputs, compress_layers, reproducible
from ast_plugin.compile_semi_structured import two_of_four
from ast_plugin.compile_timing import call, first_call, interleaved
from ast_plugin.elastic_channels import CHANNEL
from ast_plugin.elastic_contents import StoredSubNet
from ast_plugin.errors import ASTError, ConfigError, near_names
from ast_plugin.patterns import BlockPattern, parse_pattern
from ast_plugin.plain_model import plain_copy
from ast_plugin.sliced_model import check_dropped, check_multiple, rounded_up, slice_model
from ast_plugin.slots import plain_name
from ast_plugin.sub_nets import check_sub_net, is_number

FORMS = ("auto", "dense", "sliced", "csr", "bsr", "2:4")
_BLOCK_SIZE = 8


class CompileSource(Protocol):
    """What is asked of an `Elastic`."""

    model: nn.Module
    records: dict[str, StoredSubNet]

    @property
    def groups(self) -> ChannelGroups | None:
        """The channel groups of the file."""

    def kept_channels(self, name: str) -> dict[str, Tensor]:
        """Return the units that a channel sub-net keeps."""

    def materialize(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of a sub-net."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How to compile.

    Attributes:
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or None.
        block_size: Edge of the blocks of ``bsr``.
        multiple: What the numbers of channels and hidden units of ``sliced`` are to be multiples of.
        seconds: How long to measure.
    """

    example_inputs: Any
    block_size: int
    multiple: int
    seconds: float


def compile_sub_net(
    source: CompileSource,
    name: str,
    form: str,
    example_inputs: Any,
    *,
    block_size: int | None,
    multiple: int,
    seconds: float,
) -> nn.Module:
    """Return one sub-net as a module of its own; `ast_plugin.Elastic.compile` describes it.

    Args:
        source: The loaded elastic file.
        name: The sub-net.
        form: One of `FORMS`.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or None.
        block_size: Edge of the blocks of ``bsr``; None: that of the sub-net's pattern, otherwise 8.
        multiple: What the numbers of channels and hidden units of ``sliced`` are to be multiples of.
        seconds: How long to measure, about.

    Raises:
        ConfigError: If there is no such sub-net or form, or the form does not fit the sub-net or the machine,
            or the model cannot be run on the example inputs.
        ActivationError: If a form changes the outputs on the example inputs, or would: weights of a channel sub-net
            were changed since it was loaded, and read dropped units.
    """
    check_sub_net(name, source.records)
    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}: {near_names(str(form), FORMS)}")
    check_multiple(multiple, form)
    if not is_number(seconds) or not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds must be a number above 0, got {seconds!r}")
    edge = _block_size(source.records[name]) if block_size is None else block_size
    if type(edge) is not int or edge < 2:
        raise ConfigError(f"block_size must be a whole number of at least 2, such as 4 or 8, got {block_size!r}")
    options = CompileOptions(example_inputs=example_inputs, block_size=edge, multiple=multiple, seconds=float(seconds))
    if form == "auto":
        return _fastest(source, name, options)
    module, told = _MAKERS[form](source, name, options)
    return _with_report(module, {"sub_net": name, "form": form, **told})


def _dense(source: CompileSource, name: str, options: CompileOptions) -> tuple[nn.Module, dict[str, Any]]:
    model = plain_copy(source.model, name, source.materialize(name)).eval()
    return model.requires_grad_(False), {}


def _sliced(source: CompileSource, name: str, options: CompileOptions) -> tuple[nn.Module, dict[str, Any]]:
    kept = source.kept_channels(name)  # raises where there are none
    groups = source.groups or ChannelGroups(groups=())
    kept = rounded_up(groups, kept, options.multiple)
    model, _ = _dense(source, name, options)
    check_dropped(name, groups, kept, {plain_name(key): tensor for key, tensor in model.state_dict().items()})
    inputs = LayerInputs(model, (), options.example_inputs)
    slice_model(model, groups, kept)
    inputs.check(model, "sliced")
    return model, {"units": {group: f"{int(flags.sum())} of {flags.numel()}" for group, flags in kept.items()}}


def _sparse(
    source: CompileSource, name: str, options: CompileOptions, *, layout: Any
) -> tuple[nn.Module, dict[str, Any]]:
    model, _ = _dense(source, name, options)
    model, layers = compress_layers(
        model, layout, options.example_inputs, block_size=options.block_size, seconds=options.seconds
    )
    return model, _layers_told(layers)


def _two_of_four(source: CompileSource, name: str, options: CompileOptions) -> tuple[nn.Module, dict[str, Any]]:
    model, _ = _dense(source, name, options)
    model, layers = two_of_four(model, options.example_inputs)
    return model, _layers_told(layers)


_Maker = Callable[[CompileSource, str, CompileOptions], tuple[nn.Module, dict[str, Any]]]
_MAKERS: Mapping[str, _Maker] = {
    "dense": _dense,
    "sliced": _sliced,
    "csr": functools.partial(_sparse, layout="csr"),
    "bsr": functools.partial(_sparse, layout="bsr"),
    "2:4": _two_of_four,
}


def _fastest(source: CompileSource, name: str, options: CompileOptions) -> nn.Module:
    if options.example_inputs is None:
        raise ConfigError(
            "form='auto' measures the forms, which takes example_inputs: pass a tensor, a tuple of arguments or a dict "
            "of keyword arguments as the model will get them, or choose a form: " + ", ".join(FORMS[1:])
        )
    candidates: dict[str, nn.Module] = {}
    told: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    part = dataclasses.replace(options, seconds=options.seconds / 4)
    for form, make in _MAKERS.items():
        if form == "sliced" and source.records[name].pattern != CHANNEL:
            left_out[form] = "not a channel sub-net"
            continue
        try:
            module, about = make(source, name, part)
        except ASTError as error:
            if form == "dense":
                raise
            left_out[form] = str(error)
            continue
        if "layers" in about and not any(layer["form"] == form for layer in about["layers"]):
            left_out[form] = "pays in no layer"
            continue
        if form == "dense":
            with reproducible():
                first_call(module, options.example_inputs)  # what is wrong with the inputs is no reason to leave out
        candidates[form], told[form] = module, about
    with torch.inference_mode():
        times = interleaved(
            {form: functools.partial(call, module, options.example_inputs) for form, module in candidates.items()},
            seconds=options.seconds / 2,
        )
    best = min(times, key=lambda form: times[form])
    report = {"sub_net": name, "form": best, **told[best], "measured_ms": times, "left_out": left_out}
    return _with_report(candidates[best], report)


def _with_report(module: nn.Module, report: dict[str, Any]) -> nn.Module:
    module.compiled_form = report  # type: ignore[assignment]  # plain containers, so that it pickles without us
    return module


def _layers_told(layers: list[LayerForm]) -> dict[str, Any]:
    return {"layers": [dataclasses.asdict(layer) for layer in layers]}


def _block_size(record: StoredSubNet) -> int:
    try:
        pattern = parse_pattern(record.pattern or "unstructured")
    except ConfigError:
        return _BLOCK_SIZE
    if isinstance(pattern, BlockPattern) and pattern.rows == pattern.columns:
        return pattern.rows
    return _BLOCK_SIZE
