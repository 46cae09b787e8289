"""timm: a training flag for its script, and the same as a library.

Importing this package imports nothing of timm: the launcher first puts the folder of the user's script where Python
looks for modules, as ``python train.py`` does, and a timm that lies there is to be the one that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast_plugin.integrations.timm.library import wrap
    from ast_plugin.integrations.timm.selection import TimmSelection

__all__ = ["TimmSelection", "wrap"]

_MODULES = {"TimmSelection": "selection", "wrap": "library"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
