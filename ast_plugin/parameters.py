"""Which weights are pruned, and for the others why not.

The rules look at modules, not at names: a weight is prunable because a linear or convolution layer owns it.
Names come in through the user's globs alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import nn
from torch.nn.parameter import Parameter, UninitializedParameter

from ast_plugin.errors import SelectionError
from ast_plugin.slots import plain_name

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STEM_CHANNELS = 4  # grey, RGB, and RGB with alpha or depth
_LISTED = 20  # parameters named in an error; a message of a thousand lines helps nobody
_NO_REASONS: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterChoice:
    """One parameter of the model and the verdict on it.

    Attributes:
        name: Name in `model.named_parameters()`.
        shape: Shape of the parameter.
        prunable: Whether masks are made for it.
        reason: Why not, in words; empty when prunable.
    """

    name: str
    shape: tuple[int, ...]
    prunable: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A module that holds a parameter, under the name that the parameter has there."""

    name: str
    module: nn.Module
    attribute: str


def select_parameters(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    left_out: Mapping[str, str] = _NO_REASONS,
) -> list[ParameterChoice]:
    """Decide for every parameter of `model` whether it is pruned.

    Prunable are the weights of linear layers, convolutions (transposed ones too), the projections of
    `nn.MultiheadAttention` and classes named ``Conv1D`` (Hugging Face's linear layer), but for the input stem: the
    first convolution, if it reads at most four channels and no linear layer stands before it. Embeddings and weights
    tied to one are never pruned, nor frozen, one-dimensional and integer parameters.

    Args:
        model: Any module; it is only read.
        include: Globs on parameter names. When given, only matching parameters are pruned; the stem is when a glob
            matches it, and a weight of an unknown kind of layer when it is named in full.
        exclude: Globs on parameter names that are never pruned; stronger than `include`.
        left_out: For plugins that know the network: by parameter name, any of its names, why it is not pruned unless
            a glob of `include` asks for it as for the stem. Of what is out anyway, also of embeddings, it words the
            reason, but for what is frozen, of integers or tied to an embedding.

    Returns:
        One entry a parameter, in the order of `model.named_parameters()`; tied parameters have one entry, but globs
        match any of their names.

    Raises:
        SelectionError: If nothing is prunable, a glob matches nothing, a glob of `include` matches only parameters
            that can never be pruned, or `left_out` names no parameter.
    """
    owners = _owners(model)
    stem = _stem(model)
    names = dict(model.named_parameters())
    aliases = {name: _aliases(name, owners[id(parameter)]) for name, parameter in names.items()}
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(_matches(glob, known) for known in aliases.values()):
                raise SelectionError(_no_match(option, glob, aliases))
    unknown = set(left_out).difference(*aliases.values())
    if unknown:
        raise SelectionError(f"left_out names no parameter of {type(model).__name__}: {', '.join(sorted(unknown))}")
    told = {name: next((left_out[alias] for alias in aliases[name] if alias in left_out), "") for name in names}
    obstacles = {
        name: _obstacle(name, parameter, owners[id(parameter)], told[name]) for name, parameter in names.items()
    }
    for glob in include:
        matched = [name for name in names if _matches(glob, aliases[name])]
        if all(obstacles[name] for name in matched):
            seen = _listing(f"{name}: {obstacles[name]}" for name in matched)
            raise SelectionError(f"include glob {glob!r} matches no parameter that can be pruned:{seen}")
    choices = []
    for name, parameter in names.items():
        reason = obstacles[name] or _left_out(aliases[name], owners[id(parameter)], stem, include, exclude, told[name])
        choices.append(ParameterChoice(name=name, shape=tuple(parameter.shape), prunable=not reason, reason=reason))
    if not any(choice.prunable for choice in choices):
        seen = _listing(f"{choice.name} {choice.shape}: {choice.reason}" for choice in choices)
        raise SelectionError(
            f"no parameter of {type(model).__name__} can be pruned; check the model, include and exclude. "
            f"Seen:{seen or ' no parameter at all'}"
        )
    return choices


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    owners: dict[int, list[_Owner]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            owners.setdefault(id(parameter), []).append(_Owner(name, module, attribute))
    return owners


def _stem(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            return module if module.in_channels <= _STEM_CHANNELS else None
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or _is_conv1d(module):
            return None
    return None


def _obstacle(name: str, parameter: Parameter, owners: Sequence[_Owner], told: str) -> str:
    """Return why a parameter can never be pruned, in the words of `told` if there are any; "" if it can."""
    if isinstance(parameter, UninitializedParameter):
        raise SelectionError(f"parameter {name!r} has no shape yet: run the model once on real data before wrapping it")
    if not parameter.is_floating_point():
        return "not floating point"
    if not parameter.requires_grad:
        return "frozen"
    if parameter.ndim < 2:
        return told or ("bias or norm (1-D)" if parameter.ndim else "scalar")
    embeddings = [owner.name for owner in owners if _is_embedding(owner)]
    if name in embeddings:
        return told or "embedding"
    if embeddings:
        return f"tied to the embedding {embeddings[0]}"
    return ""


def _left_out(
    aliases: Sequence[str],
    owners: Sequence[_Owner],
    stem: nn.Module | None,
    include: Sequence[str],
    exclude: Sequence[str],
    told: str,
) -> str:
    """Return why a parameter that could be pruned is not, "" if it is."""
    for glob in exclude:
        if _matches(glob, aliases):
            return f"excluded by {glob!r}"
    other_kind = "" if any(map(_is_weight, owners)) else told or "not a linear or convolution weight"
    if include:
        if not any(_matches(glob, aliases) for glob in include):
            return "not matched by include"
        # A wide glob such as "blocks.*" means the layers in there, not every position table beside them.
        return "" if any(alias in include for alias in aliases) else other_kind
    if other_kind:
        return other_kind
    if any(owner.module is stem for owner in owners):
        return "input stem"
    return told


def _is_weight(owner: _Owner) -> bool:
    if isinstance(owner.module, nn.MultiheadAttention):
        return owner.attribute in _ATTENTION_WEIGHTS
    layer = isinstance(owner.module, (nn.Linear, *_CONVOLUTIONS)) or _is_conv1d(owner.module)
    return layer and owner.attribute == "weight"


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that Hugging Face's class is recognised without importing transformers.
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _is_embedding(owner: _Owner) -> bool:
    # By name too: parallel and quantised embeddings do not all derive from torch's.
    if isinstance(owner.module, nn.Linear) or owner.attribute != "weight":
        return False
    return any(kind.__name__.endswith(("Embedding", "EmbeddingBag")) for kind in type(owner.module).__mro__)


def _aliases(name: str, owners: Sequence[_Owner]) -> tuple[str, ...]:
    """Return every name under which a glob may find a parameter: of tied layers, and as before compile or DDP."""
    found = [name, *(owner.name for owner in owners)]
    found += [plain_name(alias).removeprefix("module.") for alias in found]
    return tuple(dict.fromkeys(found))


def _matches(glob: str, aliases: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(alias, glob) for alias in aliases)


def _no_match(option: str, glob: str, aliases: dict[str, tuple[str, ...]]) -> str:
    known = [alias for found in aliases.values() for alias in found]
    inside = next((alias for alias in known if alias.startswith(f"{glob}.")), None)
    if inside:
        return f"{option} glob {glob!r} matches no parameter: it names a module; write {glob + '.*'!r}"
    near = difflib.get_close_matches(glob, known, n=3, cutoff=0.5) or known[:3]
    return f"{option} glob {glob!r} matches no parameter; the nearest names are {', '.join(map(repr, near)) or 'none'}"


def _listing(lines: Iterator[str]) -> str:
    shown = list(lines)
    more = f"\n  and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return "".join(f"\n  {line}" for line in shown[:_LISTED]) + more
