"""`wrap`: checks everything, then attaches alternating sparse training to a model and its optimizer."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from ast_plugin.activation import MaskedActivation, ShardedActivation
from ast_plugin.anchors import Anchors
from ast_plugin.channel_states import ChannelStates
from ast_plugin.channels import ChannelGroups
from ast_plugin.config import ASTConfig, CorrectionOptions, LayerSparsity, Moment
from ast_plugin.distributed import from_first_rank
from ast_plugin.distributions import Distribution, ExplicitDistribution
from ast_plugin.errors import ConfigError, near_names
from ast_plugin.gradients import GradientMasks
from ast_plugin.grouping import resolve_groups
from ast_plugin.inactive import FrozenInactive
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.optimizers import innermost_optimizer
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.parameters import ParameterChoice
from ast_plugin.parts import RunParts
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.plugins_discovery import plugin_keywords
from ast_plugin.reference import GradientReference
from ast_plugin.rewinding import RewindableActivation
from ast_plugin.sampling import SampledMasks, build_sampler
from ast_plugin.schedules import MaskCalendar, resolve_calendars
from ast_plugin.sharded_masks import ShardedMasks
from ast_plugin.sharded_slots import LocalSlots, ShardedSlots
from ast_plugin.sharding import Gathered, layout_of, reshard
from ast_plugin.sliced_activation import SlicedActivation
from ast_plugin.sliced_plans import SlicePlans
from ast_plugin.sliced_probes import ProbeMasks
from ast_plugin.sliced_routes import route_for
from ast_plugin.slots import ParameterSlots, bare_model, tensor_slots
from ast_plugin.statistics import Statistics
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.updates import MaskUpdater
from ast_plugin.wrapping_checks import (
    check_correction,
    check_first_momentum,
    check_in_optimizer,
    check_kind,
    check_outermost,
    check_private_in_optimizer,
    check_turns,
    taken_over,
)

_HISTORY_POINTS = 50
_NO_UPDATES = MaskCalendar(begin=0, end=1, interval=1, offset=0)


class ASTOptions(TypedDict, total=False):
    """The keyword arguments of `wrap`: the settings of `ASTConfig`, all but the sparsities optional."""

    sparsities: Sequence[float | str | SubNetSpec]
    total_steps: int | None
    method: str | Method
    pattern: str
    distribution: str | Mapping[str, LayerSparsity] | None
    alternation: str
    steps_per_epoch: int | None
    correction: str | CorrectionOptions
    inactive: Literal["coast", "freeze"]
    update_interval: Moment
    stagger: bool
    drop_fraction: float
    drop_fraction_end: float
    drop_schedule: Literal["cosine", "constant"]
    initial_sparsity: float | None
    begin_step: Moment
    end_step: Moment
    grow_initialization: Literal["keep", "zero"] | None
    slicing: Literal["auto", "leaves", "gather", "off"]
    allow_empty_layers: bool
    include: Sequence[str]
    exclude: Sequence[str]
    private_normalization: bool
    default_sub_net: str | None
    seed: int


def wrap(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    config: ASTConfig | None = None,
    *,
    outermost: nn.Module | None = None,
    plugins: Sequence[object] = (),
    example_inputs: Any = None,
    groups: ChannelGroups | None = None,
    **options: Unpack[ASTOptions],
) -> AlternatingSparseTraining:
    """Attach alternating sparse training to a model and its optimizer; the training loop stays as it is.

    Everything is checked before anything is touched: after an error the model is dense and carries no hook.

    Args:
        optimizer: The optimizer that trains `model`, any torch optimizer, constructed before this call.
        model: The network, which the training loop calls; where it is a wrapper for compilation or data-parallel use,
            parameters have the names that they have inside it.
        config: All settings as one object, instead of `options`.
        outermost: The module that the training loop calls, where that is one around `model` which does more than hold
            it: it adds the loss, or a teacher. Parameters, files and exports keep the names that they have in `model`.
        plugins: Plugin objects for this run alone, beside the installed ones.
        example_inputs: For channel sub-nets, what the model can be called with: a tensor, a tuple of arguments or a
            dict of keyword arguments, of one example; or a function that returns them, asked only if there are channel
            sub-nets. None: what the model says of itself, as those of timm and most of Hugging Face do.
        groups: Which channels belong together, instead of a search for it.
        **options: The settings of `ASTConfig` by name, for example ``sparsities=(0.9, 0.95)``, ``total_steps=1000``.
            ``method`` may also be a `Method` object. A plugin object under any other name takes part under that name.

    Returns:
        The controller: sub-nets to switch, figures to read, files to save.

    Raises:
        ConfigError: If a setting is out of range, unknown, or does not fit the model.
        SelectionError: If no parameter can be pruned, or one is missing from the optimizer.
        WrapError: If model or optimizer are wrapped already, or are of a kind that cannot be.
        PluginError: If a plugin fails to load or to answer.
        MissingExtraError: If the search for channel groups needs a package that is not installed.

    Example:
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.9, 0.95, 0.98), total_steps=1000)
    """
    given, keywords = plugin_keywords(options, ASTOptions.__annotations__)
    method = given.get("method")
    settings = settings_of(config, given)
    optimizer = innermost_optimizer(optimizer)
    check_kind(optimizer, model)
    check_outermost(outermost, model)
    if isinstance(method, Method):
        keywords |= plugin_keywords({"method": method}, ())[1]
    registry = PluginRegistry(plugins, keywords=keywords)
    rule = method if isinstance(method, Method) else registry.method(settings.method)
    called = model if outermost is None else outermost
    search = functools.partial(resolve_groups, example_inputs=example_inputs, groups=groups)
    with taken_over(rule, optimizer, model):
        parts = _build(optimizer, model, settings, registry, rule, called=called, search=search)
        parts.updater.initialize(Gathered(parts.parameters))
        if not parts.sharded:  # gathered weights are the same to all ranks
            _take_from_first_rank(parts)
        training = AlternatingSparseTraining(parts)
        training.attach()
    return training


def _take_from_first_rank(parts: RunParts) -> None:
    """Start every rank from the masks and BatchNorm states of the first, as DDP does with parameters and buffers."""

    def state() -> tuple[dict[str, Any], dict[str, Any]]:
        private = {name: parts.normalization.state(name) for name in parts.names if name != parts.default}
        return (
            {name: parts.masks.pack(name) for name in parts.names},
            {name: {key: tensor.cpu() for key, tensor in tensors.items()} for name, tensors in private.items()},
        )

    first = from_first_rank(state, parts.model)
    if first is not None:
        masks, private = first
        for name in parts.names:
            parts.masks.unpack(name, masks[name])
        for name, tensors in private.items():
            parts.normalization.load(name, tensors)


def settings_of(config: ASTConfig | None, options: dict[str, Any]) -> ASTConfig:
    """Return settings that were given as one object or by name.

    Args:
        config: One object, or None.
        options: By name; `method` may be a `Method`, whose name is taken.

    Raises:
        ConfigError: If both were given, or a setting is out of range or unknown.
    """
    if isinstance(options.get("method"), Method):
        options["method"] = options["method"].name
    if config is None:
        known = ASTConfig.__dataclass_fields__
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}: {near_names(unknown[0], known)} (a plugin that is given by keyword "
                "must be an object with hook functions)"
            )
        return ASTConfig.from_dict(options)
    if not isinstance(config, ASTConfig):
        raise ConfigError(f"config must be an ASTConfig, got {type(config).__name__}; pass settings by name otherwise")
    if options:
        raise ConfigError(
            f"config and single settings ({', '.join(options)}) exclude each other; use "
            "dataclasses.replace(config, ...)"
        )
    return config


def _build(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    config: ASTConfig,
    registry: PluginRegistry,
    method: Method,
    *,
    called: nn.Module,
    search: Callable[..., tuple[ChannelGroups | None, tuple[ParameterChoice, ...]]],
) -> RunParts:
    specs = config.sub_nets
    names = tuple(spec.name for spec in specs)
    # Where masks never change, or the method says when, a run needs no schedule, and so no total_steps.
    changes = (method.updates and method.is_due is None) or method.sampler is not None
    calendars = resolve_calendars(config, len(specs)) if changes else (_NO_UPDATES,) * len(specs)
    patterns = {spec.name: registry.pattern(spec.pattern or config.pattern) for spec in specs}
    plans = build_plans(config, patterns, calendars)
    default = config.default_sub_net or min(plans, key=lambda plan: plan.target_sparsity).name
    alternation = registry.alternation(
        config.alternation,
        count=len(specs),
        seed=config.seed,
        steps_per_epoch=config.steps_per_epoch,
        names=names,
        default=default,
        sparsities=[plan.target_sparsity for plan in plans],
    )
    bare = bare_model(model)
    reshard(bare)
    choices = tuple(registry.select_parameters(bare, include=config.include, exclude=config.exclude))
    groups, choices = search(bare, choices, patterns.values())
    prunable = [choice for choice in choices if choice.prunable]
    check_in_optimizer(optimizer, bare, prunable)
    for choice in prunable:
        for pattern in patterns.values():
            pattern.check(choice.name, choice.shape)
    parameters = local = ParameterSlots(bare, [choice.name for choice in prunable])
    layouts = {name: layout_of(name, parameter) for name, parameter in parameters.items()}
    masks = local_masks = MaskStore(names, {choice.name: choice.shape for choice in prunable})
    is_sharded = any(layout is not None for layout in layouts.values())
    check_turns(alternation, samples=method.name if method.sampler is not None else None, sharded=is_sharded)
    if is_sharded:
        check_correction(registry)
        parameters, local = ShardedSlots(bare, parameters), LocalSlots(bare, parameters)
        masks = sharded_masks = ShardedMasks(names, parameters)
        local_masks = sharded_masks.local
    layers, grouped = [choice.name for choice in prunable], [group.name for group in groups.groups] if groups else []
    normalization = PrivateNormalization(bare, names, default, enabled=config.private_normalization)
    updater = MaskUpdater(
        config,
        plans,
        method=method,
        distribution=_distribution(config, names, registry, method.distribution, layers, grouped),
        masks=masks,
        groups=groups,
        group_distribution=_distribution(config, names, registry, "uniform", grouped, layers),
        states=ChannelStates(bare, groups, normalization, masks.shapes) if groups else None,
    )
    sampler = build_sampler(method, config, plans, masks.shapes, groups=groups, sharded=is_sharded)
    check_private_in_optimizer(optimizer, bare, normalization.parameter_names)
    check_first_momentum(optimizer, normalization.parameter_names)
    normalization.adopt_optimizer_state(optimizer)
    packed = PackedMasks(local, local_masks)
    gradients = GradientMasks(local, local_masks, packed, owners=parameters)
    # No graph needs the number of batches.
    changing = [*parameters, *(n for n in normalization.names if not n.endswith("_batches_tracked"))]
    route = functools.partial(route_for, config.slicing, called, sharded=is_sharded)
    channels = [plan.name for plan in plans if plan.pattern.by_groups]
    inner = MaskedActivation(packed, normalization)
    if is_sharded:
        probes = ProbeMasks(groups, sharded_masks, channels, parameters, local) if groups is not None else None
        inner = ShardedActivation(packed, normalization, bare, probes)
    elif groups is not None:
        inner = SlicedActivation(
            packed,
            normalization,
            store=local_masks,
            plans=SlicePlans(bare, groups, local_masks),
            channels=channels,
            route=route,
            gradients=gradients,
        )
    if groups is not None:
        route()  # what cannot work is refused before anything is touched
    activation = RewindableActivation(
        inner,
        tensor_slots(bare, () if is_sharded else changing),
        len(parameters) + len(normalization.parameter_names),
        local_masks.revision,
        sharded=is_sharded,
        anchors=Anchors(bare, [*parameters, *normalization.names, *(groups.tensors if groups else ())]),
    )
    window = (config.total_steps or 50 * _HISTORY_POINTS) // _HISTORY_POINTS
    return RunParts(
        config=config,
        names=names,
        default=default,
        model=model,
        called=called,
        bare=bare,
        optimizer=optimizer,
        registry=registry,
        choices=choices,
        groups=groups,
        parameters=parameters,
        local=local,
        layouts=layouts,
        method=method,
        alternation=alternation,
        masks=masks,
        local_masks=local_masks,
        updater=updater,
        sampled=SampledMasks(sampler, plans[0], masks, method=method.name, model=model),
        normalization=normalization,
        activation=activation,
        gradients=gradients,
        reference=GradientReference(packed, gradients),
        inactive=FrozenInactive() if config.inactive == "freeze" else None,
        grow_initialization=config.grow_initialization or method.grow_initialization,
        statistics=Statistics(names, window=max(window, len(names))),
    )


def _distribution(
    config: ASTConfig,
    sub_nets: Sequence[str],
    registry: PluginRegistry,
    default: str,
    ours: Sequence[str],
    others: Sequence[str],
) -> Distribution:
    """Return the distribution over `ours`; globs that name `others` alone, of other sub-nets of the run, are theirs."""
    wanted = config.distribution
    if not isinstance(wanted, Mapping):
        return registry.distribution(wanted or default)
    for glob, value in wanted.items():
        for name in value if isinstance(value, Mapping) else ():
            if name not in sub_nets:
                raise ConfigError(f"distribution[{glob!r}] names no sub-net: {name!r}; {near_names(name, sub_nets)}")
    theirs = {glob for glob in wanted if not fnmatch.filter(ours, glob) and fnmatch.filter(others, glob)}
    return ExplicitDistribution(sparsities={glob: value for glob, value in wanted.items() if glob not in theirs})
