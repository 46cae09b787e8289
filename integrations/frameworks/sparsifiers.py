"""`from_sparsifier`: a sparsifier that was prepared on a model becomes the method of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ast_plugin.errors import ASTError, ConfigError, PluginError, StateError, WrapError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.frameworks.parametrizations import TakenOff
from ast_plugin.integrations.frameworks.selection import choices_of
from ast_plugin.integrations.frameworks.sparsifier_copies import SparsifierCopy, first_copy
from ast_plugin.integrations.frameworks.torch_ao import LevelRule, SetSparsity, schedule_of
from ast_plugin.methods import MaskDecision, MaskInputs, Method, SparsitySchedule
from ast_plugin.parameters import ParameterChoice

_NEAR = 0.01  # masks this near to a sub-net's sparsity are taken for masks of it


class Rule(Protocol):
    """How one family of sparsifiers is driven."""

    needs_gradient: bool
    grow_initialization: Literal["keep", "zero"]
    distribution: str
    initial_sparsity: float | None
    sparsity_schedule: SparsitySchedule

    @property
    def is_due(self) -> Callable[[int, int | None], bool] | None:
        """What says when updates are due, None where the run does."""

    def take_over(self) -> Callable[[], None]:
        """Take off what the sparsifier has put outside the model; return what puts it back."""

    def first(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Make the first masks of a sub-net in its copy of the sparsifier."""

    def renew(self, work: SparsifierCopy, inputs: MaskInputs) -> None:
        """Make the masks of an update in the sub-net's copy of the sparsifier."""


def from_sparsifier(
    sparsifier: Any,
    *,
    scheduler: Any = None,
    scheduler_interval: int = 1,
    set_sparsity: SetSparsity | None = None,
    see: Literal["kept", "all"] = "kept",
) -> SparsifierMethod:
    """Return a method by which a sparsifier decides the masks of every sub-net of a run.

    The sparsifier has been prepared on the model in its framework's own way, with an optimizer made before or after
    that. `ast_plugin.wrap` takes its parametrizations off again, which leaves the same parameters with their dense
    values; each sub-net is given a copy of the sparsifier, with the sub-net's own sparsity. What it was prepared on is
    what is pruned. If wrap fails, the model is as it was. Calls of ``sparsifier.step()`` and ``squash_mask()`` that
    stay in a training script do nothing any more.

    Args:
        sparsifier: A sparsifier of ``torch.ao.pruning``, of sparsimony, or of one's own after the same base class.
        scheduler: A scheduler of ``torch.ao.pruning`` on this sparsifier, whose ramp every sub-net follows up to its
            own sparsity, which it has by ``end_step``; None: every sub-net has its sparsity from the start. Not for
            sparsimony, whose schedulers are part of their sparsifiers.
        scheduler_interval: Optimizer steps of one ``scheduler.step()``, for example those of an epoch.
        set_sparsity: For a sparsifier whose config groups have no ``sparsity_level``: called with a group and the
            sparsity of its layer, in [0, 1], it writes the one into the other.
        see: ``kept``: the sparsifier sees the weights under the present masks, as in its framework, so that weights it
            drops do not return; ``all``: it sees all dense weights at each update. Not for sparsimony.

    Raises:
        ConfigError: If it is no sparsifier, or was not prepared, or an argument does not suit it.
        MissingExtraError: If sparsimony has another version than this was made for.

    Example:
        >>> sparsifier.prepare(model, config)
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.9, 0.95), method=from_sparsifier(sparsifier))
    """
    from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier

    if not isinstance(sparsifier, BaseSparsifier):
        raise ConfigError(
            f"sparsifier must be a BaseSparsifier of torch.ao.pruning or sparsimony, got {type(sparsifier).__name__}"
        )
    kind = type(sparsifier).__name__
    _check_prepared(sparsifier)
    rule: Rule
    if any(base.__module__.partition(".")[0] == "sparsimony" for base in type(sparsifier).__mro__):
        from ast_plugin.integrations.frameworks.sparsimony import StepRule

        for name, value, default in (
            ("scheduler", scheduler, None),
            ("set_sparsity", set_sparsity, None),
            ("see", see, "kept"),
        ):
            if value != default:
                raise ConfigError(
                    f"{name} is not for sparsimony's {kind}, which has all it needs in itself; leave it out"
                )
        rule = StepRule(sparsifier)
        family = "sparsimony"
    else:
        schedule = None if scheduler is None else schedule_of(scheduler, interval=scheduler_interval)
        rule = LevelRule(sparsifier, set_sparsity=set_sparsity, see=see, schedule=schedule)
        family = "torch.ao.pruning"
    adoption = _Adoption(sparsifier, rule)
    return SparsifierMethod(
        name=f"{family}:{kind}",
        description=f"masks decided by {kind} of {family}",
        needs_gradient=rule.needs_gradient,
        sparsity_schedule=rule.sparsity_schedule,
        initial_sparsity=rule.initial_sparsity,
        distribution=rule.distribution,
        grow_initialization=rule.grow_initialization,
        decide=adoption.decide,
        is_due=rule.is_due,
        take_over=adoption.take_over,
        adoption=adoption,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SparsifierMethod(Method):
    """A method whose masks a sparsifier decides; also a plugin, which selects the layers it was prepared on.

    Attributes:
        adoption: The sparsifier, and what became of it.
    """

    adoption: _Adoption = dataclasses.field(repr=False)

    @hookimpl
    def ast_select_parameters(
        self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]
    ) -> list[ParameterChoice]:
        """Select what the sparsifier was prepared on."""
        return self.adoption.select(model, include, exclude)

    def state_dict(self) -> dict[str, Any]:
        """Return what the copies of the sparsifier have come to know."""
        return self.adoption.state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another sparsifier; see `ast_plugin.errors.StateError`."""
        self.adoption.check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.adoption.load_state_dict(state)


class _Adoption:
    """A sparsifier on its way from a prepared model into a run."""

    def __init__(self, sparsifier: Any, rule: Rule) -> None:
        self._sparsifier = sparsifier
        self._kind = type(sparsifier).__name__
        self._rule = rule
        self._names: tuple[str, ...] = ()
        self._works: dict[str, SparsifierCopy] = {}
        self._template: SparsifierCopy | None = None
        self._present: dict[str, Tensor] | None = None

    def take_over(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Callable[[], None]:
        """Take the sparsifier off the model; return what puts it back.

        Raises:
            ConfigError: If it was prepared on another model, or is not on this one any more.
            WrapError: If its parametrizations are not alone on their tensors, its masks are of another shape, or it
                cannot be copied.
        """
        sparsifier = self._sparsifier
        _check_prepared(sparsifier)
        groups = sparsifier.groups
        names = self._find(model)
        self._names = names
        self._check_masks()
        self._template = first_copy(sparsifier, names)
        self._present = {
            name: _parametrization(group).mask.detach() != 0 for name, group in zip(names, groups, strict=True)
        }
        enabled = sparsifier.enable_mask_update
        tensors = [(group["module"], group["tensor_name"]) for group in groups]
        taken = TakenOff(tensors, owner=self._kind)
        undo_rule = self._rule.take_over()
        # What a training loop still calls finds nothing to do: step, the schedulers' too, and squash_mask.
        sparsifier.groups, sparsifier.enable_mask_update = [], False

        def undo() -> None:
            sparsifier.groups, sparsifier.enable_mask_update = groups, enabled
            undo_rule()
            taken.put_back()
            self._works.clear()
            self._template = self._present = None

        return undo

    def select(self, model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[ParameterChoice]:
        """Return the verdict on every parameter: those that the sparsifier was prepared on are pruned.

        Raises:
            SelectionError: If one of them cannot be pruned, or the user's globs choose others.
        """
        who, why = f"{self._kind} was prepared on", f"{self._kind} was not prepared on it"
        return choices_of(model, self._names, include, exclude, who=who, why=why)

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """Have the sub-net's copy of the sparsifier decide its masks."""
        if self._template is None:
            raise ConfigError(f"{self._kind} is in no run")
        first = inputs.masks is None
        if first:
            self._works[inputs.sub_net] = SparsifierCopy(self._template.sparsifier, self._names)
            taken = self._taken(inputs)
            if taken is not None:
                return MaskDecision(masks=taken)
        work = self._works[inputs.sub_net]
        rule = self._rule
        try:
            with _seeded(inputs), torch.no_grad():
                rule.first(work, inputs) if first else rule.renew(work, inputs)
            masks = work.masks()
            restarted = None
            if inputs.masks is not None:
                after = work.weights()
                restarted = {
                    name: mask & ~inputs.masks[name].to(mask.device) | mask & (after[name] != inputs.weights[name])
                    for name, mask in masks.items()
                }
            return MaskDecision(masks=masks, restarted=restarted)
        except ASTError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self._kind} failed to decide the masks of sub-net {inputs.sub_net!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            work.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's class and the state of each sub-net's copy."""
        return {"sparsifier": self._kind, "sub_nets": {name: work.state_dict() for name, work in self._works.items()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another sparsifier, of other layers or sub-nets.

        Raises:
            StateError: If it is one.
        """
        if state["sparsifier"] != self._kind:
            raise StateError(
                f"the saved run's masks were decided by {state['sparsifier']}, and this one's are by {self._kind}; "
                "prepare the same sparsifier"
            )
        if set(state["sub_nets"]) != set(self._works):
            raise StateError("the saved state of the sparsifier is of other sub-nets; resume with the same sparsities")
        for saved in state["sub_nets"].values():
            if set(saved["groups"]) != set(self._names):
                raise StateError(
                    f"the saved run's {self._kind} was prepared on other layers; prepare it on "
                    f"{', '.join(saved['groups'])}"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, saved in state["sub_nets"].items():
            self._works[name].load_state_dict(saved)

    def _find(self, model: nn.Module) -> tuple[str, ...]:
        """Return the parameters' names in `model`, without parametrizations, in the order of the config groups."""
        places = {id(module): name for name, module in model.named_modules()}
        names = []
        for group in self._sparsifier.groups:
            module, tensor = group["module"], group["tensor_name"]
            if id(module) not in places:
                raise ConfigError(
                    f"{self._kind} was prepared on another model: its layer {group['module_fqn']!r} is no module of "
                    f"this {type(model).__name__}; call sparsifier.prepare(model, config) with the model to wrap"
                )
            names.append(f"{places[id(module)]}.{tensor}".removeprefix("."))
            _check_untied(model, self._kind, names[-1], module.parametrizations[tensor].original)
        return tuple(names)

    def _check_masks(self) -> None:
        for name, group in zip(self._names, self._sparsifier.groups, strict=True):
            lists = group["module"].parametrizations[group["tensor_name"]]
            mask = getattr(lists[0], "mask", None)
            if not isinstance(mask, Tensor) or mask.shape != lists.original.shape:
                found = f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else "is none"
                raise WrapError(
                    f"the mask of {self._kind} on {name!r} {found}, and the weight's is {tuple(lists.original.shape)}; "
                    "only sparsifiers with one flag a weight can decide masks (for whole channels there is "
                    'pattern="channel")'
                )

    def _taken(self, inputs: MaskInputs) -> dict[str, Tensor] | None:
        """Return the masks that the sparsifier came with, for the first sub-net that asks for their sparsity."""
        present = self._present
        if present is None:
            return None
        total = sum(mask.numel() for mask in present.values())
        sparsity = 1 - sum(int(mask.sum()) for mask in present.values()) / total
        if not sparsity > 0 or not math.isclose(sparsity, inputs.sparsity, abs_tol=_NEAR):
            return None
        self._present = None
        return {name: mask.to(inputs.weights[name].device) for name, mask in present.items()}


def _check_prepared(sparsifier: Any) -> None:
    if not sparsifier.groups:
        raise ConfigError(
            f"{type(sparsifier).__name__} is prepared on no model (a run that takes it over ends that, too); call "
            "sparsifier.prepare(model, config) first"
        )
    for group in sparsifier.groups:
        if not parametrize.is_parametrized(group["module"], group["tensor_name"]):
            raise ConfigError(
                f"{type(sparsifier).__name__} is on {group['tensor_fqn']!r} no more: its masks were squashed into the "
                "weights; prepare a new sparsifier on the model"
            )


def _check_untied(model: nn.Module, kind: str, name: str, original: Tensor) -> None:
    uses = [other for other, parameter in model.named_parameters(remove_duplicate=False) if parameter is original]
    if len(uses) > 1:
        plain = next(other for other in uses if "parametrizations." not in other)
        raise ConfigError(
            f"{kind} was prepared on {name!r} and not where {plain!r} uses the same parameter, and a sub-net's mask is "
            "for both; untie them, or prepare the sparsifier on other layers"
        )


def _parametrization(group: Mapping[str, Any]) -> Any:
    return group["module"].parametrizations[group["tensor_name"]][0]


@contextlib.contextmanager
def _seeded(inputs: MaskInputs) -> Iterator[None]:
    """Have torch's global generators draw by the run's own chance for a while."""
    devices = {weight.device for weight in inputs.weights.values() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        torch.manual_seed(int(torch.randint(2**62, (), generator=inputs.generator)))
        yield
