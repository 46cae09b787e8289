"""`wrap`: checks everything, then attaches alternating sparse training to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ast_plugin.activation import MaskedActivation, ShardedActivation
from ast_plugin.attachment import is_attached
from ast_plugin.config import ASTConfig, CorrectionOptions, LayerSparsity, Moment
from ast_plugin.distributed import from_first_rank
from ast_plugin.distributions import Distribution, ExplicitDistribution
from ast_plugin.errors import ConfigError, SelectionError, WrapError, near_names
from ast_plugin.gradients import GradientMasks
from ast_plugin.inactive import FrozenInactive
from ast_plugin.masks import MaskStore
from ast_plugin.methods import Method
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.optimizers import innermost_optimizer, refusal_of, trained_by
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.parameters import ParameterChoice
from ast_plugin.parts import RunParts
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.reference import GradientReference
from ast_plugin.rewinding import RewindableActivation
from ast_plugin.schedules import MaskCalendar, resolve_calendars
from ast_plugin.sharded_masks import ShardedMasks
from ast_plugin.sharded_slots import LocalSlots, ShardedSlots
from ast_plugin.sharding import Gathered, layout_of, reshard
from ast_plugin.slots import ParameterSlots, bare_model, tensor_slots
from ast_plugin.statistics import Statistics
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.updates import MaskUpdater

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
        **options: The settings of `ASTConfig` by name, for example ``sparsities=(0.9, 0.95)``, ``total_steps=1000``.
            ``method`` may also be a `Method` object.

    Returns:
        The controller: sub-nets to switch, figures to read, files to save.

    Raises:
        ConfigError: If a setting is out of range, unknown, or does not fit the model.
        SelectionError: If no parameter can be pruned, or one is missing from the optimizer.
        WrapError: If model or optimizer are wrapped already, or are of a kind that cannot be.
        PluginError: If a plugin fails to load or to answer.

    Example:
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.9, 0.95, 0.98), total_steps=1000)
    """
    method = options.get("method")
    settings = settings_of(config, dict(options))
    optimizer = innermost_optimizer(optimizer)
    _check_kind(optimizer, model)
    _check_outermost(outermost, model)
    registry = PluginRegistry(plugins)
    rule = method if isinstance(method, Method) else registry.method(settings.method)
    parts = _build(optimizer, model, settings, registry, rule, called=model if outermost is None else outermost)
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
        return ASTConfig.from_dict(options)
    if not isinstance(config, ASTConfig):
        raise ConfigError(f"config must be an ASTConfig, got {type(config).__name__}; pass settings by name otherwise")
    if options:
        raise ConfigError(
            f"config and single settings ({', '.join(options)}) exclude each other; use "
            "dataclasses.replace(config, ...)"
        )
    return config


def _check_kind(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise WrapError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; call wrap(optimizer, model, ...)"
        )
    reason = refusal_of(optimizer, model)
    if reason is not None:
        raise WrapError(reason)
    for name, thing in (("model", model), ("optimizer", optimizer)):
        if is_attached(thing):
            raise WrapError(
                f"the {name} is wrapped already; call detach() on its controller first, or go on using that one"
            )
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise WrapError(f"parameter {lazy[0]!r} has no shape yet; run one forward pass before wrapping the model")


def _check_outermost(outermost: object, model: nn.Module) -> None:
    if outermost is None:
        return
    if not isinstance(outermost, nn.Module):
        raise WrapError(f"outermost must be a torch.nn.Module around the model, got {type(outermost).__name__}")
    bare = bare_model(model)
    if not any(module is bare for module in outermost.modules()):
        raise WrapError(
            f"outermost, a {type(outermost).__name__}, does not hold the model, a {type(bare).__name__}; give the "
            "module that the training loop calls and that has this very model inside, or leave it out"
        )
    if is_attached(outermost):
        raise WrapError("outermost is wrapped already; call detach() on its controller first")


def _build(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    config: ASTConfig,
    registry: PluginRegistry,
    method: Method,
    *,
    called: nn.Module,
) -> RunParts:
    specs = config.sub_nets
    names = tuple(spec.name for spec in specs)
    # Where masks never change, a run needs no schedule, and so no total_steps.
    calendars = resolve_calendars(config, len(specs)) if method.updates else (_NO_UPDATES,) * len(specs)
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
    )
    bare = bare_model(model)
    reshard(bare)
    choices = tuple(registry.select_parameters(bare, include=config.include, exclude=config.exclude))
    prunable = [choice for choice in choices if choice.prunable]
    _check_in_optimizer(optimizer, bare, prunable)
    for choice in prunable:
        for pattern in patterns.values():
            pattern.check(choice.name, choice.shape)
    parameters = local = ParameterSlots(bare, [choice.name for choice in prunable])
    layouts = {name: layout_of(name, parameter) for name, parameter in parameters.items()}
    masks = local_masks = MaskStore(names, {choice.name: choice.shape for choice in prunable})
    is_sharded = any(layout is not None for layout in layouts.values())
    if is_sharded:
        _check_correction(registry)
        parameters, local = ShardedSlots(bare, parameters), LocalSlots(bare, parameters)
        masks = sharded_masks = ShardedMasks(names, parameters)
        local_masks = sharded_masks.local
    distribution = _distribution(config, names, [choice.name for choice in prunable], registry, method)
    updater = MaskUpdater(config, plans, method=method, distribution=distribution, masks=masks)
    normalization = PrivateNormalization(bare, names, default, enabled=config.private_normalization)
    _check_private_in_optimizer(optimizer, bare, normalization.parameter_names)
    _check_first_momentum(optimizer, normalization.parameter_names)
    normalization.adopt_optimizer_state(optimizer)
    packed = PackedMasks(local, local_masks)
    gradients = GradientMasks(local, local_masks, packed, owners=parameters)
    # No graph needs the number of batches.
    changing = [*parameters, *(n for n in normalization.names if not n.endswith("_batches_tracked"))]
    activation = RewindableActivation(
        ShardedActivation(packed, normalization, bare) if is_sharded else MaskedActivation(packed, normalization),
        tensor_slots(bare, () if is_sharded else changing),
        len(parameters) + len(normalization.parameter_names),
        local_masks.revision,
        sharded=is_sharded,
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
        parameters=parameters,
        local=local,
        layouts=layouts,
        method=method,
        alternation=alternation,
        masks=masks,
        local_masks=local_masks,
        updater=updater,
        normalization=normalization,
        activation=activation,
        gradients=gradients,
        reference=GradientReference(packed, gradients),
        inactive=FrozenInactive() if config.inactive == "freeze" else None,
        grow_initialization=config.grow_initialization or method.grow_initialization,
        statistics=Statistics(names, window=max(window, len(names))),
    )


def _check_correction(registry: PluginRegistry) -> None:
    if registry.extends("ast_correct_gradients"):
        raise WrapError(
            "a plugin corrects gradients (ast_correct_gradients), and this model's are spread over the ranks, of which "
            "it would see one part; train without the plugin, or with DistributedDataParallel"
        )


def _check_in_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, prunable: Sequence[ParameterChoice]
) -> None:
    trained = trained_by(optimizer)
    parameters = dict(model.named_parameters())
    missing = [choice.name for choice in prunable if id(parameters[choice.name]) not in trained]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise SelectionError(
            f"the optimizer does not train {len(missing)} of {len(prunable)} prunable parameters: {shown}; construct "
            "the optimizer from this model's parameters (after moving or converting it), freeze them, or name them in "
            "exclude"
        )


def _check_private_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, private: Sequence[str]) -> None:
    trained = trained_by(optimizer)
    for name in private:
        parameter = model.get_parameter(name)
        if parameter.requires_grad and id(parameter) not in trained:
            raise SelectionError(
                f"the optimizer does not train {name!r}, a BatchNorm parameter that every sub-net has its own of; "
                "train it with this optimizer, freeze it, or share BatchNorm with private_normalization=False"
            )


def _check_first_momentum(optimizer: torch.optim.Optimizer, private: Sequence[str]) -> None:
    """Refuse the one optimizer whose first step differs from a step with zeroed state, which fused ones are given."""
    for group in optimizer.param_groups:
        if private and group.get("fused") and group.get("momentum") and group.get("dampening"):
            raise WrapError(
                f"{type(optimizer).__name__} with fused=True and dampening={group['dampening']:g} would damp the first "
                "step of every sub-net's BatchNorm parameters, which no optimizer damps; use fused=False, dampening=0, "
                "or private_normalization=False"
            )


def _distribution(
    config: ASTConfig, names: Sequence[str], parameters: Sequence[str], registry: PluginRegistry, method: Method
) -> Distribution:
    wanted = config.distribution
    if not isinstance(wanted, Mapping):
        return registry.distribution(wanted or method.distribution)
    for glob, value in wanted.items():
        for name in value if isinstance(value, Mapping) else ():
            if name not in names:
                raise ConfigError(f"distribution[{glob!r}] names no sub-net: {name!r}; {near_names(name, names)}")
    return ExplicitDistribution(sparsities=wanted)
