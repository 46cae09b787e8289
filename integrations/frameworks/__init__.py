"""Other sparse-training frameworks: their rules as methods of a run, their masks as sub-nets.

Importing this package imports none of them; its names import what they need. A module that is a host of its own, such
as ``lightning``, is imported by its full path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast_plugin.integrations.frameworks.given_masks import from_masks
    from ast_plugin.integrations.frameworks.rigl import take_over
    from ast_plugin.integrations.frameworks.sparsifiers import from_sparsifier
    from ast_plugin.integrations.frameworks.torch_prune import from_pruned, take_masks, write_masks
    from ast_plugin.integrations.frameworks.torch_pruning import from_importance

__all__ = [
    "from_importance",
    "from_masks",
    "from_pruned",
    "from_sparsifier",
    "take_masks",
    "take_over",
    "write_masks",
]

_MODULES = {
    "from_importance": "torch_pruning",
    "from_masks": "given_masks",
    "from_pruned": "torch_prune",
    "from_sparsifier": "sparsifiers",
    "take_masks": "torch_prune",
    "take_over": "rigl",
    "write_masks": "torch_prune",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
