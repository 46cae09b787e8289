"""Error classes and the helpers of their messages."""

from __future__ import annotations

import pytest

from ast_plugin import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
KINDS.remove(errors.ASTError)


@pytest.mark.parametrize("kind", KINDS, ids=lambda c: c.__name__)
def test_every_error_is_ours_and_a_standard_one(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.ASTError)
    assert issubclass(kind, (ValueError, RuntimeError))


def test_near_names_offers_the_nearest_or_lists_all() -> None:
    assert errors.near_names("granett", ["rigl", "granet"]) == "did you mean 'granet'? Known: granet, rigl"
    assert errors.near_names("zzz", ["rigl", "granet"]) == "Known: granet, rigl"
    assert errors.near_names("zzz", []) == "Known: none"


def test_a_missing_extra_says_what_to_install() -> None:
    message = str(errors.missing_extra("the demo", "scikit-learn", "demo"))
    assert message == (
        "the demo needs the package 'scikit-learn', which is not installed; "
        "install it with: pip install 'ast-plugin[demo]'"
    )
