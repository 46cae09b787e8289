"""Hugging Face Trainer: a callback that trains sub-nets, evaluates each of them, and saves and resumes them.

Importing this package imports nothing of transformers; its names do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import missing_extra

if TYPE_CHECKING:
    from ast_plugin.integrations.transformers.arguments import ASTArguments
    from ast_plugin.integrations.transformers.binding import attach
    from ast_plugin.integrations.transformers.callback import ASTCallback
    from ast_plugin.integrations.transformers.mixin import ASTTrainerMixin
    from ast_plugin.integrations.transformers.saving import export_pretrained, save_sub_nets
    from ast_plugin.integrations.transformers.selection import TransformersSelection

__all__ = [
    "ASTArguments",
    "ASTCallback",
    "ASTTrainerMixin",
    "TransformersSelection",
    "attach",
    "export_pretrained",
    "save_sub_nets",
]

_HOSTS = ("accelerate", "huggingface_hub", "transformers")
_MODULES = {
    "ASTArguments": "arguments",
    "ASTCallback": "callback",
    "ASTTrainerMixin": "mixin",
    "TransformersSelection": "selection",
    "attach": "binding",
    "export_pretrained": "saving",
    "save_sub_nets": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in _HOSTS:
            raise
        raise missing_extra(name, str(error.name), "hf") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
