"""`from_masks`: sub-nets that start from masks which are there already, and keep them or go on from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError, SelectionError, near_names
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.frameworks.selection import choices_of
from ast_plugin.methods import MaskInputs, Method
from ast_plugin.parameters import ParameterChoice
from ast_plugin.plugins import PluginRegistry
from ast_plugin.sub_nets import SubNetSpec

if TYPE_CHECKING:
    from ast_plugin.training import AlternatingSparseTraining

TakeOver = Callable[[torch.optim.Optimizer, nn.Module], Callable[[], None]]


def from_masks(
    masks: Mapping[str, Mapping[str, Tensor]], *, then: str | Method = "granet", fixed: bool = True
) -> MasksMethod:
    """Return a method by which sub-nets begin with given masks; the other sub-nets of the run go by another method.

    What the masks are of is what is pruned, one-dimensional parameters such as biases included.

    Args:
        masks: By sub-net name, bool masks by parameter name, of the parameters' shapes, True = kept; the same
            parameters for every sub-net.
        then: The method of the other sub-nets, and with ``fixed=False`` of the later updates of these: a name or a
            `ast_plugin.methods.Method`.
        fixed: Whether the given masks stay as they are.

    Returns:
        The method. Its ``sub_nets`` are what stands in ``sparsities`` for the given masks.

    Raises:
        ConfigError: If masks are missing, malformed or empty, or `then` cannot go on from them.

    Example:
        >>> method = from_masks({"pruned": masks})
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(*method.sub_nets, 0.9), method=method, total_steps=1000)
    """
    return masks_method(masks, then=then, fixed=fixed)


def masks_method(
    masks: Mapping[str, Mapping[str, Tensor]], *, then: str | Method, fixed: bool, take_over: TakeOver | None = None
) -> MasksMethod:
    """Return the method of `from_masks`.

    Args:
        masks: As for `from_masks`.
        then: As for `from_masks`.
        fixed: As for `from_masks`.
        take_over: `ast_plugin.methods.Method.take_over` of the method.

    Raises:
        ConfigError: As for `from_masks`.
    """
    checked = _checked(masks)
    if not isinstance(then, (str, Method)):
        raise ConfigError(f"then must be the name of a method or a Method, got {then!r}")
    base = then if isinstance(then, Method) else PluginRegistry().method(then)
    own = next((name for name in ("decide", "take_over", "sampler") if getattr(base, name) is not None), None)
    if own is not None:
        raise ConfigError(
            f"then={base.name!r} has a {own} of its own and cannot go on from given masks; choose a method of "
            "scores, such as 'rigl' or 'granet'"
        )
    if not fixed and base.initial_sparsity is not None:
        raise ConfigError(
            f"then={base.name!r} ramps the sparsity up from {base.initial_sparsity:g}, beyond which given masks are; "
            "choose 'rigl' or 'set', or leave the masks as they are with fixed=True"
        )

    def decide(inputs: MaskInputs) -> Mapping[str, Tensor] | None:
        given = checked.get(inputs.sub_net)
        if given is None:
            return None
        if inputs.masks is None:
            return {name: mask.to(inputs.weights[name].device) for name, mask in given.items()}
        return inputs.masks if fixed else None

    settings = {field.name: getattr(base, field.name) for field in dataclasses.fields(Method)}
    settings |= {
        "name": f"masks+{base.name}",
        "description": f"given masks, and beside them {base.name}",
        "decide": decide,
        "take_over": take_over,
    }
    return MasksMethod(**settings, given=checked)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MasksMethod(Method):
    """A method of which some sub-nets have their first masks given; also a plugin, which selects their parameters.

    Attributes:
        given: The masks by sub-net and parameter name.
    """

    given: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(repr=False)

    @property
    def sub_nets(self) -> tuple[SubNetSpec, ...]:
        """One entry for ``sparsities`` for each sub-net with given masks, of the sparsity that they have."""
        return tuple(SubNetSpec(name=name, sparsity=sparsity_of(masks)) for name, masks in self.given.items())

    @hookimpl
    def ast_select_parameters(
        self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]
    ) -> list[ParameterChoice]:
        """Select what the masks are of."""
        names = tuple(next(iter(self.given.values())))
        known = dict(model.named_parameters())
        unknown = [name for name in names if name not in known]
        if unknown:
            raise SelectionError(
                f"masks are given for {unknown[0]!r}, which is no parameter of this {type(model).__name__}; "
                f"{near_names(unknown[0], known) if len(known) < 50 else 'give those of the same model'}"
            )
        return choices_of(model, names, include, exclude, who="the given masks are for", why="no mask is given for it")

    @hookimpl
    def ast_sub_net_switched(self, training: AlternatingSparseTraining, sub_net: str) -> None:
        """Refuse, when the run begins, masks of a sub-net that it has not got."""
        del sub_net
        missing = [name for name in self.given if name not in training.sub_nets]
        if missing:
            raise ConfigError(
                f"masks are given for sub-net {missing[0]!r}, which sparsities has not: "
                f"{near_names(missing[0], training.sub_nets)}; write sparsities=(*method.sub_nets, ...)"
            )


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the share of zeros of all masks together, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def _checked(masks: Any) -> dict[str, dict[str, Tensor]]:
    if not isinstance(masks, Mapping) or not masks or not all(isinstance(one, Mapping) for one in masks.values()):
        raise ConfigError('masks must be a mapping of sub-net names to masks by parameter name, as {"pruned": masks}')
    first = next(iter(masks.values()))
    for sub_net, of in masks.items():
        if not of or set(of) != set(first):
            raise ConfigError(
                f"masks of sub-net {sub_net!r} are of {', '.join(sorted(of)) or 'no parameter'}; give each sub-net "
                "masks of the same parameters"
            )
        for name, mask in of.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ConfigError(f"mask of {name!r} in sub-net {sub_net!r} must be a torch.bool tensor, got {found}")
        if sparsity_of(of) >= 1:
            raise ConfigError(f"masks of sub-net {sub_net!r} keep nothing at all")
    return {sub_net: {name: of[name].detach().clone() for name in first} for sub_net, of in masks.items()}
