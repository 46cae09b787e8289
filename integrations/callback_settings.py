"""What the callback of a host is given for its run: settings, a method that is an object, plugins by keyword."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ast_plugin.config import ASTConfig
from ast_plugin.methods import Method
from ast_plugin.plugins_discovery import plugin_keywords
from ast_plugin.wrapping import ASTOptions, settings_of


class CallbackSettings:
    """Keeps what was given until the host knows how long the run is.

    Args:
        config: All settings as one object, instead of `options`; None otherwise.
        options: The settings of `ASTConfig` by name, and plugin objects by other names, as in `ast_plugin.wrap`.

    Attributes:
        given: The settings, without what the host adds.
        method: The method, where it was given as an object; None otherwise.
        plugins: Plugin objects by keyword; a host may add its own.

    Raises:
        ConfigError: If a setting is out of range or unknown.
    """

    def __init__(self, config: ASTConfig | None, options: Mapping[str, Any]) -> None:
        settings, self.plugins = plugin_keywords(options, ASTOptions.__annotations__)
        method = settings.get("method")
        self.method = method if isinstance(method, Method) else None
        self.given = settings_of(config, settings)
        self._seeded = config is not None or "seed" in options

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return tuple(spec.name for spec in self.given.sub_nets)

    def config(self, *, seed: int, total_steps: int | None, steps_per_epoch: int | None) -> ASTConfig:
        """Return the settings of a run.

        Args:
            seed: The host's, taken where none was given.
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of an epoch.

        Raises:
            ConfigError: If they do not fit together.
        """
        seed = self.given.seed if self._seeded else seed
        return dataclasses.replace(self.given, seed=seed, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def options(self, config: ASTConfig) -> dict[str, Any]:
        """Return what `ast_plugin.wrap` is told of a run: its settings by name, the method object, plugins by keyword.

        Args:
            config: What `config` returned, or the settings of a run that goes on.
        """
        method = {} if self.method is None else {"method": self.method}
        return {**config.to_dict(), **self.plugins, **method}
