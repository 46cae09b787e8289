from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_examples import run_report

from ast_plugin.errors import MissingExtraError, SaveError
from ast_plugin.report import Report

pytestmark = pytest.mark.extra("report")

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


REPORTS = {
    "run": run_report(),
    "eight": run_report((0.0, 0.3, 0.5, "2:4", 0.9, 0.95, 0.98, 0.995), blocks=12, metrics=("accuracy", "loss")),
    "nine": run_report(tuple(i / 10 for i in range(9)), blocks=3),
    "one": run_report((0.95,)),
    "bare": run_report((0.5, 0.9), metrics=(), history=False),
    "tall": run_report((0.5, 0.9), blocks=70),
    "many metrics": run_report((0.5, 0.9), blocks=2, metrics=tuple("abcdefgh")),
    "nothing": Report(title="nothing", sub_nets=()),
}


class Pages(dict[str, str]):
    """Pages by the names of `REPORTS`, made when they are first asked for."""

    def __missing__(self, name: str) -> str:
        self[name] = REPORTS[name].render_html()
        return self[name]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return Pages()


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_whole_and_needs_nothing_from_outside(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    page = Page(text)
    assert page.all("script") == []
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    references = [value for _, a in page.elements for key, value in a.items() if key in ("href", "src", "xlink:href")]
    assert all(value and value.startswith(("#", "data:,")) for value in references)


@pytest.mark.parametrize("name", REPORTS)
def test_ids_are_unique_and_every_reference_has_its_target(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]*)\)", pages[name])) | {
        str(a["href"])[1:] for _, a in page.elements if str(a.get("href", "")).startswith("#")
    }
    assert targets <= set(ids)


@pytest.mark.parametrize("name", REPORTS)
def test_colours_are_the_page_s_own_and_all_defined(pages: dict[str, str], name: str) -> None:
    styles, body = pages[name].split("</style>", 1)
    used = set(re.findall(r"var\(--([\w-]+)\)", pages[name])) - {"share"}
    light, dark = styles.split("prefers-color-scheme: dark", 1)
    for tints in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", tints))
    assert not re.search(r"(?:fill|stroke): ?#", body)


@pytest.mark.parametrize("name", REPORTS)
def test_pictures_and_tables_can_be_read_aloud(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    for attributes in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert all(a["aria-label"] for _, a in page.elements if a.get("role") == "region")


def test_page_of_a_run_shows_all_pictures_and_figures(pages: dict[str, str]) -> None:
    page = Page(pages["run"])
    labels = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    assert labels == [
        "accuracy against achieved sparsity, one point per sub-net",
        "Sparsity of every layer, one mark per sub-net",
        "Target and achieved sparsity over the optimizer steps",
        "Share of gradient checks that found a conflict, over the optimizer steps",
        "Mean cosine between gradient and reference over the optimizer steps",
    ]
    said = page.said()
    for figure in ("30,246", "of 302,464", "93.0 %", "2,604 of 8,400", "0.9270", "12.0 % of dense", "2 min 31 s"):
        assert figure in said
    assert "What is simulated." in said
    assert "saves no memory" in said
    assert "Not checked: s90, the first of every group." in said
    assert "Not at the target" not in said
    assert "layer2.3.conv2" in said


def test_every_sub_net_has_one_colour_in_all_pictures(pages: dict[str, str]) -> None:
    for svg in re.findall(r"<svg viewBox.*?</svg>", pages["run"], re.DOTALL):
        used = set(re.findall(r"--series-(\d)", svg))
        assert used == ({"2", "3"} if "gradient" in svg[:300] else {"1", "2", "3"})


def test_page_says_what_is_missing(pages: dict[str, str]) -> None:
    said = Page(pages["bare"]).said()
    assert "No metric is on record." in said
    assert "No mask update is on record." in said
    assert "No gradient check is on record." in said
    off = dataclasses.replace(REPORTS["bare"], settings={"correction": {"scope": "off", "first_step": False}})
    assert "Gradient correction was off." in Page(off.render_html()).said()


def test_one_sub_net_has_nothing_to_overlap_with(pages: dict[str, str]) -> None:
    assert "Overlap of the masks" not in Page(pages["one"]).said()
    assert "Overlap of the masks" in Page(pages["run"]).said()


def test_tall_pictures_scroll_and_spare_metrics_are_named(pages: dict[str, str]) -> None:
    assert "tall" in [a.get("class") for a in Page(pages["tall"]).all("div")]
    assert "tall" not in [a.get("class") for a in Page(pages["run"]).all("div")]
    assert "The first 6 of 8 metrics; all are in the table." in Page(pages["many metrics"]).said()


def test_same_report_gives_the_same_page(pages: dict[str, str]) -> None:
    assert REPORTS["eight"].render_html() == pages["eight"]


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    report = run_report((0.5, 0.9), blocks=2)
    evil = "</title></svg>'\"><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac{$ \\1 \x00\u202e准"
    names = {net.name: f"{evil}{i}" for i, net in enumerate(report.sub_nets)}
    hostile = dataclasses.replace(
        report,
        title=evil,
        example_input=evil,
        sub_nets=tuple(
            dataclasses.replace(net, name=names[net.name], pattern=evil, metrics={evil: 0.5}) for net in report.sub_nets
        ),
        layers=tuple(
            dataclasses.replace(layer, name=f"{i}{evil}", sparsity={names[k]: v for k, v in layer.sparsity.items()})
            for i, layer in enumerate(report.layers)
        ),
        sparsity_history=tuple(dataclasses.replace(p, sub_net=names[p.sub_net]) for p in report.sparsity_history),
        conflict_history=tuple(dataclasses.replace(p, sub_net=names[p.sub_net]) for p in report.conflict_history),
        settings={evil: evil, "method": evil},
        versions={evil: evil},
    )
    hostile.write_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.all("script") == []
    assert page.all("img") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "$\\frac{$ \\1" in page.said()
    assert "\u202e" not in page.said()


def test_unfinished_run_is_pointed_out() -> None:
    report = run_report(blocks=2)
    late = dataclasses.replace(report.sub_nets[2], achieved_sparsity=0.5)
    said = Page(dataclasses.replace(report, sub_nets=(*report.sub_nets[:2], late)).render_html()).said()
    assert "Not at the target. s98:" in said


def test_settings_that_differ_from_their_default_are_set_off(pages: dict[str, str]) -> None:
    changed = re.findall(r"<tr class=changed><th scope='row'>(\w+)</th>", pages["run"])
    assert changed == ["sparsities", "total_steps", "update_interval"]


def test_values_at_the_edges_are_drawn() -> None:
    report = run_report((0.5, 0.9), blocks=3)
    layers = tuple(
        dataclasses.replace(layer, sparsity={"s50": float(i % 2), "s90": 1.0}) for i, layer in enumerate(report.layers)
    )
    nets = tuple(dataclasses.replace(net, metrics={"same": 0.0, "absent": None}) for net in report.sub_nets)
    report = dataclasses.replace(
        report, layers=layers, sub_nets=nets, steps=0, conflict_history=report.conflict_history[:1]
    )
    page = Page(report.render_html())
    assert "100 %" in page.said()
    assert sum("against achieved" in str(a.get("aria-label")) for a in page.all("svg")) == 1


def test_long_histories_are_drawn_as_means_only() -> None:
    long, short = run_report(steps=60_000, window=60, blocks=2), run_report(steps=6_000, window=60, blocks=2)
    assert len(long.conflict_history) == 10 * len(short.conflict_history)
    assert len(long.render_html()) < 1.5 * len(short.render_html())


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingExtraError, match=r"the HTML report needs .*'matplotlib'.*pip install 'ast-plugin\[report\]'"
    ):
        run_report(blocks=2).write_html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_user_s_matplotlib_settings_neither_matter_nor_change(pages: dict[str, str]) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 40, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert REPORTS["run"].render_html() == pages["run"]
        assert dict(matplotlib.rcParams) == before


def test_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.mkdir()
    with pytest.raises(SaveError, match=r"page\.html"):
        run_report(blocks=2).write_html(path)
