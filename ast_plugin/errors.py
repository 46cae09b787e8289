"""Error classes and the helpers that make messages readable.

Every error raised on purpose by this package derives from `ASTError` and also from the
standard class (`ValueError` or `RuntimeError`) that a caller would catch without knowing us.
A message names the parameter, the value received and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ASTError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(ASTError, ValueError):
    """A setting is outside its legal range, or two settings contradict each other."""


class SelectionError(ASTError, ValueError):
    """The parameters to prune cannot be chosen as asked: nothing matched, or not trainable."""


class WrapError(ASTError, RuntimeError):
    """Model and optimizer cannot be taken over: wrapped already, mismatched or unsupported."""


class ActivationError(ASTError, RuntimeError):
    """A sub-net was put on, taken off or trained at a moment when that is not possible."""


class PluginError(ASTError, RuntimeError):
    """A plugin could not be loaded, or raised while one of its hooks ran."""


class StateError(ASTError, ValueError):
    """A saved training state does not fit this model or these sub-nets."""


class ElasticFileError(ASTError, ValueError):
    """An elastic file is damaged, foreign, too new, or made for another architecture."""


class SaveError(ASTError, RuntimeError):
    """A file could not be written; whatever stood in its place before is still there."""


class BudgetError(ASTError, RuntimeError):
    """No sub-net is fast enough for a latency budget."""


class MissingExtraError(ASTError, RuntimeError):
    """A feature needs a package that is not installed; the message names the extra."""


def near_names(name: str, choices: Iterable[str]) -> str:
    """Return a sentence that offers the nearest of `choices`, or lists all of them.

    Args:
        name: What was asked for.
        choices: What exists.

    Returns:
        For example ``did you mean 'granet'? Known: gmp, granet, rigl, set, static, vr-pge``.
    """
    known = sorted(choices)
    listing = f"Known: {', '.join(known) if known else 'none'}"
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if not near:
        return listing
    return f"did you mean {' or '.join(repr(n) for n in near)}? {listing}"


def missing_extra(feature: str, package: str, extra: str) -> MissingExtraError:
    """Return the error for an optional dependency that is not installed.

    Args:
        feature: What the user asked for, as the subject of the sentence.
        package: The package that is needed.
        extra: The extra of this distribution that installs it.
    """
    return MissingExtraError(
        f"{feature} needs the package {package!r}, which is not installed; "
        f"install it with: pip install 'ast-plugin[{extra}]'"
    )
