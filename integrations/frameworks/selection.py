"""The choice of parameters where it is known which: what a framework was prepared on, or has masks of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ast_plugin.errors import SelectionError
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.parameters import ParameterChoice, select_parameters

_NOT_INCLUDED = "not matched by include"


def choices_of(
    model: nn.Module, names: Sequence[str], include: Sequence[str], exclude: Sequence[str], *, who: str, why: str
) -> list[ParameterChoice]:
    """Return the verdict on every parameter of a model of which exactly `names` are to be pruned.

    Args:
        model: The model; only read.
        names: The parameters to prune, all of the model, one-dimensional ones too.
        include: The user's globs.
        exclude: The user's globs.
        who: What these names come from, for messages, up to the names: ``the given masks are for``.
        why: Why the others are not pruned.

    Raises:
        SelectionError: If one of `names` cannot be pruned, or the globs choose others among those of two dimensions.
    """
    known = dict(model.named_parameters())
    private = {id(one) for norm in batch_norm_modules(model).values() for one in norm.parameters(recurse=False)}
    wide = [name for name in names if known[name].ndim > 1]
    if include or exclude:
        found = select_parameters(model, include=include, exclude=exclude)
        chosen = {choice.name for choice in found if choice.prunable}
        if chosen != set(wide):
            raise SelectionError(
                f"include and exclude choose other parameters than {who}"
                f"{_listed('; too many', chosen - set(wide))}{_listed('; missing', set(wide) - chosen)}; leave both "
                f"out, or write include={tuple(wide)!r}"
            )
    verdicts = {choice.name: choice for choice in select_parameters(model, include=wide)} if wide else {}
    choices = []
    for name, parameter in known.items():
        verdict = verdicts.get(name) or ParameterChoice(
            name=name, shape=tuple(parameter.shape), prunable=False, reason=why
        )
        narrow = name in names and parameter.ndim <= 1
        if narrow and id(parameter) in private:
            raise SelectionError(
                f"{who} {name!r}, which cannot be pruned: BatchNorm, of which every sub-net has its own; leave it out"
            )
        if narrow and parameter.requires_grad and parameter.is_floating_point():
            verdict = dataclasses.replace(verdict, prunable=True, reason="")
        elif name in names and not verdict.prunable:
            raise SelectionError(f"{who} {name!r}, which cannot be pruned: {verdict.reason}")
        elif verdict.reason == _NOT_INCLUDED:
            verdict = dataclasses.replace(verdict, reason=why)
        choices.append(verdict)
    return choices


def _listed(what: str, names: set[str]) -> str:
    return f"{what}: {', '.join(sorted(names))}" if names else ""
