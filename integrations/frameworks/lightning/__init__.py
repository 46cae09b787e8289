"""Lightning: a callback that trains sub-nets, validates each of them, and saves and resumes them.

Importing this package imports nothing of Lightning; its names do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import missing_extra

if TYPE_CHECKING:
    from ast_plugin.integrations.frameworks.lightning.callback import ASTCallback

__all__ = ["ASTCallback"]

_MODULES = {"ASTCallback": "callback"}
_HOSTS = ("lightning", "pytorch_lightning")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _HOSTS:
            raise
        raise missing_extra(name, _HOSTS[0], "lightning") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
