"""What every sub-net costs on this machine, in every form, beside how good it is.

A *form* is a way to compute a sub-net: dense, sliced, as sparse matrices. Latency is measured, on one example input;
FLOPs are counted on the network as it is in that form; sizes are those of its tensors, and of a file of its state
dict.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ast_plugin.compile import FORMS as KNOWN_FORMS
from ast_plugin.compile_timing import describe_inputs
from ast_plugin.elastic_contents import StoredSubNet
from ast_plugin.errors import ASTError, ConfigError, near_names
from ast_plugin.profiles_measure import (
    Clock,
    Runnable,
    file_bytes,
    measure_latency,
    median,
    memory_bytes,
    percentile,
    threads,
)
from ast_plugin.profiles_records import LeftOut, Profile, ProfileRecord
from ast_plugin.report_flops import count_flops
from ast_plugin.report_format import clean
from ast_plugin.sub_nets import check_names, check_sub_net
from ast_plugin.version import __version__

FORMS = ("dense", "sliced", "csr", "bsr")
_MOST_THREADS = 256

Build = Callable[[str, str], Runnable]


class SubNets(Protocol):
    """What a profile asks of an `Elastic`."""

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets."""

    @property
    def records(self) -> Mapping[str, StoredSubNet]:
        """What the file says about each of them, by name."""


def profile(
    elastic: SubNets,
    example_inputs: Any,
    *,
    forms: Sequence[str] = FORMS,
    sub_nets: Sequence[str] | None = None,
    runs: int = 20,
    warmup: int = 3,
    num_threads: int | None = None,
    build: Build | None = None,
    clock: Clock = time.perf_counter,
) -> Profile:
    """Measure every sub-net in every form that it can have.

    The forms of one sub-net are in memory together, and their calls alternate. Nothing of the loaded model changes.

    Args:
        elastic: What `ast_plugin.load` returned.
        example_inputs: What the network takes: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments, on the network's device. Latency and FLOPs hold for inputs of these shapes.
        forms: Which ones, as `Elastic.compile` knows them; those that a sub-net cannot have are listed as left out.
        sub_nets: Which ones; None takes all.
        runs: Timed calls of each, at least 1.
        warmup: Calls of each before, at least 0.
        num_threads: Threads for torch to use; None leaves that as it is.
        build: Makes the network from the names of sub-net and form, instead of ``elastic.compile``; an `ASTError`
            means that there is no such form.
        clock: Seconds that pass.

    Returns:
        The profile; ``print`` shows it as a table.

    Raises:
        ConfigError: If an argument is out of range, a sub-net is unknown, the network cannot be run on the example, or
            nothing is left to measure.
    """
    for what, names in (("forms", forms), ("sub_nets", sub_nets)):
        check_names(what, names)
    chosen = tuple(dict.fromkeys(elastic.sub_nets if sub_nets is None else sub_nets))
    for name in chosen:
        check_sub_net(name, elastic.sub_nets)
    for form in forms if build is None else ():
        if form not in KNOWN_FORMS:
            raise ConfigError(f"unknown form {form!r}: {near_names(str(form), KNOWN_FORMS)}")
    check_counts(runs=runs, warmup=warmup, num_threads=num_threads)
    check_functions(build=build, clock=clock)
    make = build or compiler(elastic, example_inputs)
    records: list[ProfileRecord] = []
    left_out: list[LeftOut] = []
    with threads(num_threads):
        for sub_net in chosen:
            made: dict[str, Runnable] = {}
            for form in dict.fromkeys(forms):
                try:
                    made[form] = make(sub_net, form)
                except ASTError as error:
                    left_out.append(LeftOut(sub_net=sub_net, form=form, reason=str(error)))
            records += measured(
                elastic,
                [(sub_net, form, network) for form, network in made.items()],
                example_inputs,
                runs=runs,
                warmup=warmup,
                clock=clock,
            )
        if not records:
            reasons = "; ".join(f"{entry.sub_net} as {entry.form}: {entry.reason}" for entry in left_out[:2])
            raise ConfigError(f"forms={tuple(forms)!r} leave nothing to measure ({reasons}); add 'dense'")
        return profile_of(elastic, records, left_out, example_inputs, runs)


def profile_of(
    elastic: SubNets, records: Sequence[ProfileRecord], left_out: Sequence[LeftOut], example_inputs: Any, runs: int
) -> Profile:
    """Return a profile with what is known about the file and the machine.

    Args:
        elastic: Where the sub-nets come from.
        records: What was measured.
        left_out: What was not.
        example_inputs: What it was measured on.
        runs: Timed calls of each.
    """
    path = getattr(elastic, "path", None)
    return Profile(
        records=tuple(records),
        left_out=tuple(left_out),
        example_input=clean(describe_inputs(example_inputs)),
        runs=runs,
        threads=torch.get_num_threads(),
        elastic_bytes=os.path.getsize(path) if path is not None and os.path.isfile(path) else None,
        versions={"ast_plugin": __version__, "torch": str(torch.__version__)},
    )


def measured(
    elastic: SubNets,
    networks: Sequence[tuple[str, str, Runnable]],
    example_inputs: Any,
    *,
    runs: int,
    warmup: int,
    clock: Clock,
    latency_alone: bool = False,
) -> list[ProfileRecord]:
    """Measure networks that are built already, their calls in turn.

    Args:
        elastic: Where the sub-nets come from.
        networks: Names of sub-net and form, and the network.
        example_inputs: What they take.
        runs: Timed calls of each.
        warmup: Calls of each before.
        clock: Seconds that pass.
        latency_alone: Whether to leave out FLOPs and the size of the file, which take time of their own.

    Raises:
        ConfigError: If a network cannot be run on the example.
    """
    times = measure_latency(
        [network for _, _, network in networks], example_inputs, runs=runs, warmup=warmup, clock=clock
    )
    return [
        ProfileRecord(
            sub_net=sub_net,
            form=form_of(network, form),
            sparsity=elastic.records[sub_net].sparsity,
            metrics=dict(elastic.records[sub_net].metrics),
            latency_ms=median(found),
            p95_ms=percentile(found, 0.95),
            memory_bytes=memory_bytes([network]) if isinstance(network, nn.Module) else None,
            file_bytes=None if latency_alone else file_bytes(network),
            flops=None if latency_alone else _flops(network, example_inputs),
        )
        for (sub_net, form, network), found in zip(networks, times, strict=True)
    ]


def compiler(elastic: Any, example_inputs: Any) -> Build:
    """Return what makes a sub-net in a form with ``elastic.compile``.

    Args:
        elastic: What `ast_plugin.load` returned.
        example_inputs: What the network takes; for forms that measure.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs

    def build(sub_net: str, form: str) -> Runnable:
        try:
            network: Runnable = elastic.compile(sub_net, form, inputs)
        except ASTError:
            raise
        except Exception as error:
            raise ConfigError(
                f"sub-net {sub_net!r} cannot be made {form!r} on example_inputs ({describe_inputs(example_inputs)}): "
                f"{type(error).__name__}: {error}; give inputs that the network accepts, or another form"
            ) from error
        layers = _told(network).get("layers")
        if layers is not None and not any(layer["form"] == form for layer in layers) and form != "auto":
            raise ConfigError("it pays in no layer, so the network would be the dense one")
        return network

    return build


def form_of(network: Runnable, form: str) -> str:
    """Return the form that a network has: what was chosen for ``auto``, else the one that was asked for.

    Args:
        network: What a `Build` returned.
        form: What it was asked for.
    """
    return str(_told(network).get("form", form))


def _told(network: Runnable) -> Mapping[str, Any]:
    told = getattr(network, "compiled_form", None)
    return told if isinstance(told, Mapping) else {}


def _flops(network: Runnable, example_inputs: Any) -> int | None:
    if not isinstance(network, nn.Module):
        return None
    try:
        return count_flops(network, (), example_inputs).total
    except ConfigError:  # it has run before: something in it cannot be watched, such as a graph
        return None


def check_functions(**functions: Callable[..., Any] | None) -> None:
    """Refuse what cannot be called.

    Args:
        **functions: By the name of the parameter; `build` may be None.

    Raises:
        ConfigError: If one is something else.
    """
    for name, value in functions.items():
        if not callable(value) and not (value is None and name == "build"):
            raise ConfigError(f"{name} must be a function, got {value!r}")


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are none.

    Args:
        **counts: By the name of the parameter; None passes. `warmup` may be 0, all others are at least 1. `num_threads`
            is at most what torch can surely start.

    Raises:
        ConfigError: If one is no whole number or too small.
    """
    for name, value in counts.items():
        least = 0 if name == "warmup" else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
        most = max(_MOST_THREADS, os.cpu_count() or 1)
        if name == "num_threads" and value is not None and value > most:  # torch would end the process
            raise ConfigError(
                f"num_threads must be at most {most}, got {value!r}; this machine has {os.cpu_count()} cores"
            )
