"""Functions of installed packages as methods of `Elastic`: found by entry point, bound, imported when asked for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elastic_examples import network, write_example

from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_accessors import accessor_names
from ast_plugin.errors import PluginError

Install = Callable[..., None]


@pytest.fixture
def elastic(tmp_path: Path) -> Elastic:
    return load(write_example(tmp_path / "elastic.safetensors"), network(seed=5))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Yield what installs a distribution with a module of its own and accessors in it."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(distribution: str, code: str, **accessors: str) -> None:
        module = distribution.replace("-", "_")
        made.append(module)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        lines = [f"{name} = {module}:{target}" for name, target in accessors.items()]
        (info / "entry_points.txt").write_text("\n".join(["[ast_plugin.elastic]", *lines, ""]))

    yield make
    for module in made:
        sys.modules.pop(module, None)


def test_a_function_is_called_as_a_method(elastic: Elastic, install: Install) -> None:
    install(
        "my-summaries", "def summary(elastic, mark='.'):\n    return mark.join(elastic.sub_nets)\n", summary="summary"
    )
    assert elastic.summary() == "s50.s80"
    assert elastic.summary(mark="+") == "s50+s80"
    assert elastic.summary.__self__ is elastic


def test_they_are_listed_beside_what_is_there(elastic: Elastic, install: Install) -> None:
    before = set(dir(elastic))
    install("my-summaries", "", summary="summary", _private="summary")
    assert set(dir(elastic)) - before == {"summary"}
    assert "summary" in accessor_names()
    assert {"switch", "model", "_own"} <= before


def test_what_elastic_has_itself_stays(elastic: Elastic, install: Install) -> None:
    install("my-switches", "def switch(elastic, name):\n    raise RuntimeError\n", switch="switch", active="switch")
    elastic.switch("s80")
    assert elastic.active == "s80"


def test_an_unknown_attribute_is_one_and_offers_near_names(elastic: Elastic) -> None:
    assert not hasattr(elastic, "novelty")
    with pytest.raises(AttributeError, match=r"'Elastic' object has no attribute 'swich'; did you mean 'switch'"):
        elastic.swich("s80")


def test_private_names_are_never_looked_up(elastic: Elastic, install: Install) -> None:
    install("my-summaries", "raise RuntimeError\n", _repr_html_="summary")
    with pytest.raises(AttributeError, match=r"no attribute '_repr_html_'$"):
        elastic._repr_html_()
    assert copy.deepcopy(elastic).sub_nets == elastic.sub_nets


def test_a_name_that_two_distributions_offer(elastic: Elastic, install: Install) -> None:
    install("my-summaries", "", summary="summary")
    install("your-summaries", "", summary="summary")
    with pytest.raises(PluginError, match=r"Elastic\.summary is offered by .* 1\.5 and by .* 1\.5; uninstall one"):
        elastic.summary()


def test_one_that_cannot_be_imported(elastic: Elastic, install: Install) -> None:
    install("my-summaries", "import no_such_module\n", summary="summary")
    with pytest.raises(
        PluginError, match=r"Elastic\.summary of my-summaries 1\.5 could not be imported from .*no_such_module"
    ):
        elastic.summary()


def test_one_that_is_no_function(elastic: Elastic, install: Install) -> None:
    install("my-summaries", "summary = 3\n", summary="summary")
    with pytest.raises(PluginError, match=r"Elastic\.summary of my-summaries 1\.5 is a int, no function"):
        elastic.summary()
