"""Channel groups of any model: inner channels of blocks, hidden units, attention heads.

torch-pruning's dependency graph says which layers share their channels (`channel_search_trace`), shapes say how units
lie in the tensors (`channel_search_layout`), and every group is proven by running the network with some units gone
(`channel_search_proof`). What cannot be proven is left whole, with the reason. The residual stream is never touched: it
is where activations of different layers are added or concatenated.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ast_plugin.channel_search_copy import (
    Call,
    example_call,
    is_transposed_linear,
    linear_stand_ins,
    of_one_example,
    search_copy,
    with_values,
)
from ast_plugin.channel_search_layout import Obstacle, drafts
from ast_plugin.channel_search_proof import INVISIBLE, Proof
from ast_plugin.channel_search_trace import CONVOLUTIONS, Space, trace_spaces
from ast_plugin.channels import ChannelGroup, ChannelGroups, LeftWhole
from ast_plugin.errors import ConfigError
from ast_plugin.parameters import select_parameters
from ast_plugin.random_state import RandomState

_STREAM = "residual stream: activations of several layers are added"
_JOINED = "activations of several layers are concatenated"


def find_groups(model: nn.Module, example_inputs: Any, *, prunable: Collection[str] | None = None) -> ChannelGroups:
    """Return the groups of channels that can be dropped from a model, each of them proven by running it.

    The model is copied to the CPU in float32 and stays as it is: parameters, buffers, gradients, mode, hooks, and the
    states of the global random generators. It takes the memory of that copy and of one backward pass.

    Args:
        model: Any model that runs on the example inputs in eval mode.
        example_inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Values do not
            matter, shapes and types do; one example is enough.
        prunable: Names of the weights that sub-nets may mask. Groups with others are left whole. None: those that
            `ast_plugin.parameters.select_parameters` chooses.

    Returns:
        The groups in the order in which the model runs, and for each layer with prunable weights that is in none as a
        producer, why not.

    Raises:
        ConfigError: If the model does not run on the example inputs, cannot be copied, or cannot be traced.
        MissingExtraError: If torch-pruning is not installed.
        SelectionError: If `prunable` is None and nothing in the model can be pruned.
    """
    if prunable is None:
        prunable = [choice.name for choice in select_parameters(model) if choice.prunable]
    with _undisturbed():
        call = example_call(example_inputs)
        twin = search_copy(model)
        call, spaces = _traced(twin, call)
        return _Search(model, twin, with_values(call), spaces, frozenset(prunable)).result()


def example_inputs_of(model: nn.Module) -> Any | None:
    """Return example inputs that the model itself knows of: for `find_groups`, None if it knows none.

    Understood are ``dummy_inputs``, ``example_input_array`` and the input size in ``pretrained_cfg`` or
    ``default_cfg``, under which libraries of networks and of training keep them.
    """
    for name in ("example_input_array", "dummy_inputs"):
        try:
            known = getattr(model, name, None)
        except Exception:  # a property that fails for this model says nothing
            known = None
        if isinstance(known, (torch.Tensor, tuple, list, Mapping)) and len(known) and _is_for(model, known):
            return known
    for name in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, name, None)
        if isinstance(settings, Mapping):
            size = settings.get("input_size")
            if isinstance(size, (tuple, list)) and all(type(length) is int and length > 0 for length in size):
                return torch.zeros(1, *size)
    return None


def _is_for(model: nn.Module, known: Any) -> bool:
    """Return whether the main input is there: Hugging Face's networks for images and sounds also speak of tokens."""
    main = getattr(model, "main_input_name", None)
    return not isinstance(known, Mapping) or not isinstance(main, str) or main in known


def _traced(twin: nn.Module, call: Call) -> tuple[Call, list[Space]]:
    """Return the spaces of the model, found with the first example alone where it runs on that."""
    alone = of_one_example(call)
    with linear_stand_ins(twin):
        try:
            return alone, trace_spaces(twin, alone)
        except ConfigError:
            return call, trace_spaces(twin, call)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Trace with gradients, whatever the caller has set, and leave nothing of it behind."""
    randomness = RandomState()
    state = randomness.state_dict()
    fast = torch.backends.mha.get_fastpath_enabled()  # its attention may round in another way than that with gradients
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # those of models and of torch-pruning, about the copy
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        randomness.load_state_dict(state)


class _Search:
    def __init__(
        self, model: nn.Module, twin: nn.Module, call: Call, spaces: list[Space], prunable: frozenset[str]
    ) -> None:
        self._model = model
        self._twin = twin
        self._call = call
        self._spaces = spaces
        self._prunable = prunable
        self._owners: dict[int, list[str]] = {}
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            self._owners.setdefault(id(parameter), []).append(name)

    def result(self) -> ChannelGroups:
        reasons: dict[str, str] = {}
        ready: list[list[ChannelGroup]] = []
        for space in self._spaces:
            if not space.producers:
                continue
            try:
                self._look_at(space)
                ready.append(list(drafts(self._twin, space)))
            except Obstacle as obstacle:
                reasons = dict.fromkeys(space.passing, str(obstacle)) | reasons
                reasons.update(dict.fromkeys(space.producers, str(obstacle)))
        groups, failures = self._proven(ready)
        for options in ready:
            if options[0].name in failures:
                paths = [axis.tensor.rpartition(".")[0] for axis in options[0].axes_of("out", "state")]
                reasons.update(dict.fromkeys(paths, failures[options[0].name]))
        return ChannelGroups(groups=tuple(groups), left_whole=tuple(self._left_whole(groups, reasons)))

    def _look_at(self, space: Space) -> None:
        """Raise the obstacle that keeps a space whole, if there is one that needs no run to be seen."""
        if space.added:
            raise Obstacle(_STREAM)
        if space.concatenated:
            raise Obstacle(_JOINED)
        if space.ends:
            raise Obstacle(f"reaches {space.ends[0]}")
        if not space.consumers:
            raise Obstacle("no layer reads its channels")
        modules = dict(self._twin.named_modules())
        for path in space.passing:
            if isinstance(modules[path], nn.LayerNorm) and not space.attention:
                raise Obstacle("a layer norm takes its statistics over these channels")
        if space.computed:
            raise Obstacle("read by a layer that computes its weight from other tensors (standardized, normalized)")
        for path in dict.fromkeys((*space.producers, *space.consumers)):
            name = f"{path}.weight"
            names = self._owners.get(id(modules[path]._parameters.get("weight")), [])
            if not names:
                raise Obstacle(f"the weight of {path} is computed from other tensors")
            if len(names) > 1:
                raise Obstacle(f"{name} is tied to {next(other for other in names if other != name)}")
            if name not in self._prunable:
                raise Obstacle(f"{name} is not pruned")

    def _proven(self, ready: list[list[ChannelGroup]]) -> tuple[list[ChannelGroup], dict[str, str]]:
        """Return the drafts that hold, one a space at most, and why spaces have none, by the name of their group."""
        if not ready:
            return [], {}
        firsts = [options[0] for options in ready]
        proof, unseen = self._proof(firsts)
        failures = dict.fromkeys(unseen, INVISIBLE)
        chosen = [options for options in ready if options[0].name not in failures]
        firsts = [options[0] for options in chosen]
        if proof.failure(firsts):
            firsts = []
            for options, failure in _tried(proof, chosen):
                if failure:
                    failures[options[0].name] = failure
                else:
                    firsts.append(options[0])
            firsts, more = proof.proven(firsts)
            failures |= more
        return firsts, failures

    def _proof(self, groups: list[ChannelGroup]) -> tuple[Proof, set[str]]:
        """Return a proof with the values under which the fewest groups are without effect, and which these are."""
        best: tuple[Proof, set[str]] | None = None
        for seed in (0, 1, 2, None):  # a hidden unit of ReLU may rest with some values, a deep network overflow
            twin = self._twin if seed is not None else search_copy(self._model)
            proof = Proof(twin, self._call, self._prunable, seed=seed)
            if not proof.finite and seed is not None:
                continue
            unseen = proof.unseen(groups)
            if best is None or len(unseen) < len(best[1]):
                best = proof, unseen
            if not unseen:
                break
        if best is None:  # the model's own values come last, and are taken as they are
            raise ConfigError("no values to prove groups with")
        return best

    def _left_whole(self, groups: list[ChannelGroup], reasons: Mapping[str, str]) -> Iterator[LeftWhole]:
        sliced = {axis.tensor for group in groups for axis in group.axes if axis.role == "out"}
        between = {axis.tensor for group in groups for axis in group.axes if axis.role == "state"}
        torchs: list[str] = []
        for path, module in self._twin.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                torchs.append(f"{path}.")
            own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
            if not any(name in self._prunable for name in own) or any(name in sliced | between for name in own):
                continue
            if isinstance(module, nn.MultiheadAttention) or path.startswith(tuple(torchs)):
                yield LeftWhole(name=path, reason="nn.MultiheadAttention takes its head size from the width it reads")
            elif path in reasons:
                yield LeftWhole(name=path, reason=reasons[path])
            elif isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_transposed_linear(module):
                yield LeftWhole(name=path, reason="did not run on the example inputs, or not as a layer")
            else:
                yield LeftWhole(name=path, reason=f"weights of {type(module).__name__}, which is no layer known here")


def _tried(proof: Proof, chosen: list[list[ChannelGroup]]) -> Iterator[tuple[list[ChannelGroup], str]]:
    """Yield drafts, those first that hold for one group of their kind in the model, or the failure of the first one.

    Groups whose tensors have the same names but for numbers, in blocks that repeat, are of one kind.
    """
    known: dict[Any, tuple[int, str]] = {}
    for options in chosen:
        likeness = tuple(re.sub(r"\d+", "#", axis.tensor) for axis in options[0].axes)
        if likeness not in known:
            failures = []
            for draft in options:
                failures.append(proof.failure([draft]))
                if not failures[-1]:
                    break
            number = len(failures) - 1
            known[likeness] = (0, failures[0]) if failures[-1] else (number, "")
        number, failure = known[likeness]
        yield options[min(number, len(options) - 1) :], failure
