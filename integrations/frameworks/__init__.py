    from ast_plugin.integrations.frameworks.sparsifiers import from_sparsifier
    from ast_plugin.integrations.frameworks.torch_pruning import from_importance
from __future__ import annotations
from typing import TYPE_CHECKING, Any

__all__ = [
    "from_importance",
    "from_sparsifier",
]

_MODULES = {
    "from_importance": "torch_pruning",
    "from_sparsifier": "sparsifiers",
