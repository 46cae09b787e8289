"""What can be said of a run before it begins: hosts ask as soon as model and optimizer are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from ast_plugin.alternation import trains_several
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, WrapError
from ast_plugin.methods import Method
from ast_plugin.optimizers import innermost_optimizer, refusal_of
from ast_plugin.parameters import ParameterChoice
from ast_plugin.plans import target_of
from ast_plugin.plugins import PluginRegistry
from ast_plugin.plugins_discovery import plugin_keywords
from ast_plugin.slots import bare_model


def check_run(
    config: ASTConfig,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    plugins: Sequence[object] = (),
    keywords: Mapping[str, object] = MappingProxyType({}),
    method: Method | None = None,
    closure: bool = True,
) -> list[ParameterChoice]:
    """Refuse what `ast_plugin.wrap` would refuse later, as far as it can be seen now; nothing is touched.

    Args:
        config: The settings; `total_steps` may still be a guess.
        model: The model, possibly inside wrappers.
        optimizer: The optimizer, where there is one already.
        plugins: Plugin objects of the run.
        keywords: Plugin objects that `wrap` will be given by keyword.
        method: The method, where it is an object that `wrap` will be given: its name means nothing then. One that takes
            model and optimizer over does so for the length of this call, if there is an optimizer.
        closure: Whether the training loop can give ``optimizer.step`` a closure.

    Returns:
        The verdict on every parameter; none where a method that takes them over has no optimizer yet.

    Raises:
        ConfigError: If a name in the settings is unknown, or the alternation needs a closure and there is none.
        SelectionError: If no parameter can be pruned as asked.
        WrapError: If this optimizer cannot train sub-nets.
        PluginError: If a plugin fails to load or to answer.
    """
    if method is not None:
        keywords = {**keywords, **plugin_keywords({"method": method}, ())[1]}
    registry = PluginRegistry(plugins, keywords=keywords)
    if method is None:
        registry.method(config.method)
    patterns = {name: registry.pattern(name) for name in {spec.pattern or config.pattern for spec in config.sub_nets}}
    if isinstance(config.distribution, str):
        registry.distribution(config.distribution)
    names = [spec.name for spec in config.sub_nets]
    targets = [target_of(spec, patterns[spec.pattern or config.pattern]) for spec in config.sub_nets]
    order = registry.alternation(
        config.alternation,
        count=len(names),
        seed=config.seed,
        steps_per_epoch=config.steps_per_epoch or 1,  # hosts know it later
        names=names,
        default=config.default_sub_net or names[0],
        sparsities=targets,
    )
    if trains_several(order) and not closure:
        raise ConfigError(
            f"alternation {config.alternation!r} trains several sub-nets in each step and needs "
            "optimizer.step(closure), and this training loop calls optimizer.step() without one; use another "
            "alternation, such as 'alternating', or a loop of your own"
        )
    choices = _choices(config, model, registry, optimizer, method)
    for choice in choices:
        if choice.prunable:
            for pattern in patterns.values():
                pattern.check(choice.name, choice.shape)
    if optimizer is not None:
        refusal = refusal_of(innermost_optimizer(optimizer), model)
        if refusal is not None:
            raise WrapError(refusal)
    return choices


def _choices(
    config: ASTConfig,
    model: nn.Module,
    registry: PluginRegistry,
    optimizer: torch.optim.Optimizer | None,
    method: Method | None,
) -> list[ParameterChoice]:
    bare = bare_model(model)
    take_over = None if method is None else method.take_over
    if take_over is not None and optimizer is None:
        return []
    undo = None if take_over is None or optimizer is None else take_over(innermost_optimizer(optimizer), bare)
    try:
        return registry.select_parameters(bare, include=config.include, exclude=config.exclude)
    finally:
        if undo is not None:
            undo()
