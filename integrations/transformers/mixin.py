"""The same for people who write a Trainer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.transformers.callback import ASTCallback


class ASTTrainerMixin:
    """Gives a Trainer an argument ``ast`` for alternating sparse training; put it before the Trainer's class.

    Args:
        *args: Arguments of the Trainer.
        ast: The settings: an `ASTConfig`, a mapping of its settings by name, or an `ASTCallback`. None trains without
            sub-nets.
        **kwargs: Arguments of the Trainer.

    Attributes:
        ast_callback: The callback, which has the controller once training has begun; None without `ast`.

    Raises:
        ConfigError: If `ast` is something else, a setting is out of range or unknown, and as `ASTCallback.bind`.
        WrapError: As `ASTCallback.bind`.
        SelectionError: As `ASTCallback.bind`.

    Example:
        >>> class MyTrainer(ASTTrainerMixin, Trainer): ...
        >>> trainer = MyTrainer(model=model, args=args, ast={"sparsities": (0.9, 0.95)})
    """

    def __init__(
        self, *args: Any, ast: ASTConfig | Mapping[str, Any] | ASTCallback | None = None, **kwargs: Any
    ) -> None:
        self.ast_callback = _callback(ast)
        super().__init__(*args, **kwargs)
        if self.ast_callback is not None and isinstance(self, Trainer):
            self.ast_callback.bind(self)


def _callback(ast: object) -> ASTCallback | None:
    if ast is None or isinstance(ast, ASTCallback):
        return ast
    if isinstance(ast, ASTConfig):
        return ASTCallback(ast)
    if isinstance(ast, Mapping):
        return ASTCallback(**ast)
    raise ConfigError(
        f"ast must be an ASTConfig, a mapping of its settings or an ASTCallback, got {type(ast).__name__}; for example "
        'ast={"sparsities": (0.9, 0.95)}'
    )
