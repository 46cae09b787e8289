"""Proof by numbers: a network without some units computes what the masked network computes.

Nothing that the trace or the layout says is believed. Half of the units of groups are dropped at random, once by zeros
in rows and columns of the weights, once by smaller tensors; both networks must give the same outputs, and dropping
must change them. Norms, biases and everything that training starts at zero or one are random here, so that nothing is
hidden behind a neutral value.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.channel_search_copy import Call, first_line, tensors
from ast_plugin.channels import ChannelGroup, ChannelGroups, attribute_values, slices

_CLOSE = 1e-3  # of the change that dropping makes: wrong slices differ by about as much as it, rounding by 1e-4 of it
_VISIBLE = 1e-6  # of the outputs: below that, a change cannot be told from rounding

DIFFERENT = "the sliced network computes something else than the masked one"
INVISIBLE = "dropping its channels changes no output on the example inputs"


class Proof:
    """Checks groups on a copy of the model, whose values it changes.

    Args:
        model: A copy in eval mode, on the CPU, in float32.
        call: What it is run with.
        prunable: Names of the weights that are masked.
        seed: Of the random values for norms, biases and the scale of weights; None: the model's own.
    """

    def __init__(self, model: nn.Module, call: Call, prunable: Collection[str], *, seed: int | None = 0) -> None:
        self._model = model
        self._call = call
        self._held: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._shapes = {name: self._held[name].shape for name in prunable if name in self._held}
        with torch.enable_grad():
            if seed is None:
                self._whole = self._run_tracked()
            else:
                generator = torch.Generator().manual_seed(seed)
                _randomise(model, generator)
                with _calibrated(model, generator) as runs:
                    self._whole = self._run_tracked()
                if any(count > 1 for count in runs.values()):  # the first of them ran with other statistics
                    self._whole = self._run_tracked()

    @property
    def finite(self) -> bool:
        """Return whether the outputs are finite numbers, which random values of the weights may have spoilt."""
        return all(bool(output.isfinite().all()) for output in self._whole)

    def failure(self, groups: Sequence[ChannelGroup]) -> str:
        """Return what is wrong with these groups taken together; empty if nothing is."""
        kept = {group.name: _half(group) for group in groups}
        try:
            for group in groups:
                for axis in group.axes:
                    axis.check(group.units, self._held[axis.tensor].shape)
            cuts = slices(groups, kept)
            with self._numbers(attribute_values(groups, kept)):
                sliced = self._run({name: cut.take(self._held[name].detach()) for name, cut in cuts.items()})
        except Exception as error:
            return f"the sliced network does not run: {first_line(error)}"
        masks = ChannelGroups(groups=tuple(groups)).masks(kept, {n: s for n, s in self._shapes.items() if n in cuts})
        masked = self._run({name: self._held[name].detach() * mask for name, mask in masks.items()})
        if len(sliced) != len(masked):
            return DIFFERENT
        visible = False
        whole_outputs = [output.detach() for output in self._whole]
        for small, zeroed, whole in zip(sliced, masked, whole_outputs, strict=True):
            if small.shape != zeroed.shape or small.isnan().any() != zeroed.isnan().any():
                return DIFFERENT
            change = _largest(zeroed - whole)
            if change <= _VISIBLE * _largest(whole):
                change = _largest(whole) * _VISIBLE * 100
            else:
                visible = True
            if not _largest(small - zeroed) <= _CLOSE * change:
                return DIFFERENT
        return "" if visible else INVISIBLE

    def proven(self, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], dict[str, str]]:
        """Return the largest part of the groups that holds together, and why each of the others does not."""
        failure = self.failure(groups) if groups else ""
        if not failure:
            return list(groups), {}
        if len(groups) == 1:
            return [], {groups[0].name: failure}
        middle = len(groups) // 2
        first, wrong = self.proven(groups[:middle])
        second, wrong_too = self.proven(groups[middle:])
        wrong = wrong | wrong_too
        if not first or not second or not self.failure([*first, *second]):
            return [*first, *second], wrong
        held = list(first)
        for group in second:
            failure = self.failure([*held, group])
            if failure:
                wrong[group.name] = f"together with other groups, {failure}"
            else:
                held.append(group)
        return held, wrong

    def unseen(self, groups: Sequence[ChannelGroup]) -> set[str]:
        """Return the names of groups on whose weights no output depends, as far as one backward pass shows."""
        if not groups:
            return set()
        axes = [(group.name, axis.tensor) for group in groups for axis in group.axes_of("in")]
        generator = torch.Generator().manual_seed(1)
        outputs = [output for output in self._whole if output.requires_grad]
        weighted = [(output * torch.randn(output.shape, generator=generator)).sum() for output in outputs]
        names = list(dict.fromkeys(name for _, name in axes))
        found = torch.autograd.grad(weighted, [self._held[name] for name in names], allow_unused=True)
        self._whole = [output.detach() for output in self._whole]
        moves = {
            name: gradient is not None and bool(gradient.any()) for name, gradient in zip(names, found, strict=True)
        }
        return {group.name for group in groups} - {group for group, tensor in axes if moves[tensor]}

    def _run(self, tensors_by_name: Mapping[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(0)  # the same draws in every run, should the network draw any
        with torch.no_grad():
            output = torch.func.functional_call(
                self._model, dict(tensors_by_name), self._call.args, self._call.kwargs, strict=False
            )
        return self._outputs(output)

    def _run_tracked(self) -> list[Tensor]:
        torch.manual_seed(0)
        return self._outputs(self._call.of(self._model))

    def _outputs(self, output: Any) -> list[Tensor]:
        return [tensor for tensor in tensors(output) if tensor.is_floating_point()]

    @contextlib.contextmanager
    def _numbers(self, values: Mapping[tuple[str, str], int]) -> Iterator[None]:
        held = {}
        try:
            for (path, name), value in values.items():
                module = self._model.get_submodule(path)
                held[path, name] = module.__dict__[name]
                module.__dict__[name] = value
            yield
        finally:
            for (path, name), value in held.items():
                self._model.get_submodule(path).__dict__[name] = value


def _half(group: ChannelGroup) -> Tensor:
    """Return flags that keep a random half of a group's units, the same ones at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    kept = torch.zeros(group.units, dtype=torch.bool)
    kept[torch.randperm(group.units, generator=generator)[: max(1, group.units // 2)]] = True
    return kept


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give norms and biases random values, and all weights a size at which they matter."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.ndim < 2:
                if parameter.ndim:
                    parameter.fill_(float("bias" not in name))
                parameter.add_(0.3 * noise(parameter))
                continue
            embedding = isinstance(module, nn.Embedding)
            layer = name == "weight" and not embedding
            read = parameter[0].numel() if layer else parameter.shape[-1]
            spread = 0.5 if embedding else min(0.5, 1 / math.sqrt(max(1, read)))  # outputs of the size of inputs
            deviation, middle = torch.std_mean(parameter)
            if deviation > 1e-8:
                parameter.sub_(middle).mul_(spread / deviation)
            else:
                parameter.copy_(spread * noise(parameter))
            if not layer:
                parameter.add_(middle)


@contextlib.contextmanager
def _calibrated(model: nn.Module, generator: torch.Generator) -> Iterator[dict[nn.Module, int]]:
    """Set running statistics near those of what norms read as they run, so that signals neither fade nor grow.

    Yields how often each of the norms has run.
    """
    runs: dict[nn.Module, int] = {}

    @torch.no_grad()
    def near(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        runs[norm] = runs.get(norm, 0) + 1
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
        if mean is None or variance is None or args[0].shape[1] != len(mean):
            return
        values = args[0].transpose(0, 1).flatten(1)
        overall = values.var(correction=0).clamp(min=1e-3)
        own = values.var(1, correction=0) + 0.25 * overall if values.shape[1] > 1 else overall
        mean.copy_(values.mean(1) + 0.2 * overall.sqrt() * torch.randn(mean.shape, generator=generator))
        variance.copy_(own * (0.5 + torch.rand(mean.shape, generator=generator)))

    hooks = [
        module.register_forward_pre_hook(near)
        for module in model.modules()
        if module._buffers.get("running_mean") is not None and module._buffers.get("running_var") is not None
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()
