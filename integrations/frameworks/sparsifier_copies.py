"""A copy of a sparsifier that works on copies of the layers it was prepared on, one a sub-net."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import StateError, WrapError

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (bool, int, float, str, type(None))
_LEFT_OUT = ("defaults", "groups", "state", "config", "model", "optimizer", "enable_mask_update")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLACES = ("module", "module_fqn", "tensor_name", "tensor_fqn")


class SparsifierCopy:
    """A sparsifier with layers of its own, which hold weights, masks and gradients only while it decides.

    Args:
        sparsifier: The sparsifier; not changed. It must be prepared on all of `names`.
        names: The parameters' names in the run, one a config group, in the groups' order.

    Attributes:
        sparsifier: The copy. What it was prepared on are copies, its optimizer is the original's.
        groups: Its config groups by parameter name.
    """

    def __init__(self, sparsifier: Any, names: tuple[str, ...]) -> None:
        memo: dict[int, Any] = {}
        for group in sparsifier.groups:  # the large tensors are not copied: `load` brings others
            lists = group["module"].parametrizations[group["tensor_name"]]
            memo[id(lists.original)] = nn.Parameter(torch.empty(0), requires_grad=False)
            for tensor in (lists[0].mask, getattr(lists[0], "dense_grad", None)):
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = tensor.new_empty(0)
            for module in group["module"].modules():  # no copy is called, and a hook may hold anything
                hooks = [vars(module)[name] for name in _HOOKS if name in vars(module)]
                memo.update((id(one), type(one)()) for one in hooks if one is not None)
        for group in sparsifier.groups:
            memo[id(group["module"])] = copy.deepcopy(group["module"], memo)
        for whole in ("model", "optimizer"):
            if hasattr(sparsifier, whole):
                memo.setdefault(id(getattr(sparsifier, whole)), getattr(sparsifier, whole))
        attributes = dict(vars(sparsifier))
        attributes.pop("step", None)  # where a scheduler counts the original's steps
        self.sparsifier = object.__new__(type(sparsifier))
        for name, value in attributes.items():
            self.sparsifier.__dict__[name] = copy.deepcopy(value, memo)
        self.sparsifier.enable_mask_update = True
        self.groups: dict[str, dict[str, Any]] = dict(zip(names, self.sparsifier.groups, strict=True))
        # Half precision counts the flags of a mask wrongly, and some sparsifiers count by their sum.
        kinds = {name: self._parametrization(name).mask.dtype for name in names}
        self._dtypes = {name: torch.float32 if kind in _HALF else kind for name, kind in kinds.items()}

    def load(
        self,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        gradients: Mapping[str, Tensor] | None,
    ) -> None:
        """Give the layers copies of weights, masks (None: everything is kept) and gradients (None: zeros)."""
        for name, weight in weights.items():
            lists, parametrization = self._lists(name), self._parametrization(name)
            dtype = self._dtypes[name]
            mask = torch.ones_like(weight, dtype=dtype) if masks is None else masks[name].to(weight.device, dtype)
            lists._parameters["original"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self._set_mask(name, mask)
            if hasattr(parametrization, "dense_grad"):
                gradient = None if gradients is None else gradients.get(name)
                parametrization.dense_grad = (
                    torch.zeros_like(weight) if gradient is None else gradient.detach().to(weight.device)
                )

    def masks(self) -> dict[str, Tensor]:
        """Return the masks as they are now: bool, by parameter name."""
        return {name: self._parametrization(name).mask != 0 for name in self.groups}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as they are now: a sparsifier may have given some a new start."""
        return {name: self._lists(name).original.detach() for name in self.groups}

    def release(self) -> None:
        """Let go of the tensors that `load` brought."""
        for name in self.groups:
            lists, parametrization = self._lists(name), self._parametrization(name)
            lists._parameters["original"] = nn.Parameter(torch.empty(0), requires_grad=False)
            self._set_mask(name, torch.empty(0, dtype=self._dtypes[name]))
            if hasattr(parametrization, "dense_grad"):
                parametrization.dense_grad = torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Return what the copy has come to know, but for masks and weights: tensors and plain containers."""
        sparsifier = self.sparsifier
        own = {name: value for name, value in vars(sparsifier).items() if name not in _LEFT_OUT and _is_plain(value)}
        groups = {
            name: {key: value for key, value in group.items() if key not in _PLACES and _is_plain(value)}
            for name, group in self.groups.items()
        }
        state = {
            name: {
                key: value
                for key, value in sparsifier.state.get(group["tensor_fqn"], {}).items()
                if key != "mask" and _is_plain(value)
            }
            for name, group in self.groups.items()
        }
        return copy.deepcopy({"attributes": own, "groups": groups, "state": state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: If it is of a sparsifier that was prepared on other layers.
        """
        if set(state["groups"]) != set(self.groups):
            raise StateError("the saved state is of a sparsifier that was prepared on other layers")
        state = copy.deepcopy(dict(state))
        vars(self.sparsifier).update(state["attributes"])
        for name, group in self.groups.items():
            group.update(state["groups"][name])
            self.sparsifier.state[group["tensor_fqn"]].update(state["state"][name])

    def _lists(self, name: str) -> Any:
        group = self.groups[name]
        return group["module"].parametrizations[group["tensor_name"]]

    def _parametrization(self, name: str) -> Any:
        return self._lists(name)[0]

    def _set_mask(self, name: str, mask: Tensor) -> None:
        self._parametrization(name).mask = mask
        self.sparsifier.state[self.groups[name]["tensor_fqn"]]["mask"] = mask


def first_copy(sparsifier: Any, names: tuple[str, ...]) -> SparsifierCopy:
    """Return a copy of what a user has made, of which nobody knows yet whether it can be copied.

    Args:
        sparsifier: As for `SparsifierCopy`.
        names: As for `SparsifierCopy`.

    Raises:
        WrapError: If it cannot.
    """
    try:
        return SparsifierCopy(sparsifier, names)
    except Exception as error:
        raise WrapError(
            f"each sub-net is given a copy of {type(sparsifier).__name__}, which cannot be copied with its layers: "
            f"{type(error).__name__}: {error}; keep open files, locks and the like out of both"
        ) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor) or type(value) in _PLAIN
