"""Patterns: which masks are allowed, and how scores become one of them with an exact count.

A *unit* is the smallest thing that is kept or dropped: a weight, a block of weights, an output channel. Scores and
masks of a parameter are turned into one number or flag a unit, selection happens among units, and the result is
spread out again. Weights are laid out as PyTorch does: (out, in) for linear, (out, in, height, width) and the like for
convolutions; dimension 0 counts as the outputs and dimension 1 as the inputs, whatever the layer makes of them.
"""

from __future__ import annotations

import re

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.patterns_base import Pattern, UnstructuredPattern, nearest_count
from ast_plugin.patterns_blocks import BlockPattern, ChannelPattern
from ast_plugin.patterns_nm import NMPattern
from ast_plugin.patterns_sizes import level, weights_in
from ast_plugin.sub_nets import is_n_of_m, parse_n_of_m

__all__ = [
    "BlockPattern",
    "ChannelPattern",
    "NMPattern",
    "Pattern",
    "UnstructuredPattern",
    "level",
    "nearest_count",
    "parse_pattern",
    "weights_in",
]

_BLOCK_FORM = re.compile(r"^(\d+)x(\d+)$")


def parse_pattern(text: str) -> Pattern:
    """Build a pattern from its name.

    Args:
        text: ``unstructured``, ``channel``, ``"N:M"`` such as ``2:4``, or ``"RxC"`` such as ``4x4``.

    Raises:
        ConfigError: If the name is none of these, or its numbers are out of range; the message offers near names.
    """
    if text == "unstructured":
        return UnstructuredPattern()
    if text == "channel":
        return ChannelPattern()
    if is_n_of_m(text):
        n, m = parse_n_of_m("pattern", text)
        return NMPattern(n=n, m=m)
    block = _BLOCK_FORM.match(text)
    if block:
        return BlockPattern(rows=int(block[1]), columns=int(block[2]))
    raise ConfigError(
        f"unknown pattern {text!r}: {near_names(text, ['unstructured', 'channel', '2:4', '4x4'])}, "
        "with any numbers for N:M and rows x columns"
    )
