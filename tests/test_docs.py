"""What README and docs say is true: snippets run, names exist, documented arguments are the real ones.

The ``python`` blocks of one file run in sequence in one namespace and in an empty folder. A block with the
comment ``<!-- not executed: reason -->`` directly above is left out; how many there may be stands below.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ast_plugin
from ast_plugin.cli import build_parser

pytestmark = pytest.mark.extra("report")  # snippets show the report

ROOT = Path(__file__).resolve().parent.parent
INTEGRATIONS = sorted(path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py"))
SEVERAL_PAGES = ("family", "frameworks")  # integrations with a page for each of their parts
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
NOT_EXECUTED: dict[str, int] = {
    "README.md": 1,
    "docs/compile.md": 1,
    "docs/distributed.md": 4,
    "docs/elastic-file.md": 1,
    "docs/optimizers.md": 1,
    "docs/torch_pruning.md": 1,
}  # page: number of blocks marked as not executed

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not executed: (?P<reason>.+?) -->\s*\Z")
_SECTION = re.compile(r"^(?P<title>[A-Z]\w+):$")
_MADE_ELSEWHERE = re.compile(r"\b[Mm]ade by `|` makes it\b")  # a constructor that is not the reader's business
_ENTRY = re.compile(r"^ {4}(?P<names>\*{0,2}\w+(, \*{0,2}\w+)*)( \(.*\))?:")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` says why it is not executed, None where it is."""

    code: str
    line: int
    reason: str | None


def blocks_of(text: str, language: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] == language:
            mark = _MARK.search(text[: match.start()])
            line = text[: match.start("code")].count("\n") + 1
            found.append(Block(textwrap.dedent(match["code"]), line, mark["reason"] if mark else None))
    return found


def run_blocks(blocks: list[Block], page: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks:
        if block.reason is None:
            # blank lines in front make a traceback point at the line of the page
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
    return namespace


def documented_names(docstring: str | None, title: str) -> list[str] | None:
    """Return the names that the section `title` of a Google docstring describes; None without that section."""
    names: list[str] | None = None
    for line in inspect.cleandoc(docstring or "").splitlines():
        section = _SECTION.match(line)
        if section:
            if names is not None:
                break
            names = [] if section["title"] == title else None
        elif names is not None and (entry := _ENTRY.match(line)):
            names += [name.lstrip("*") for name in entry["names"].split(", ")]
    return names


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def function_faults(label: str, function: Callable[..., Any], *, args_required: bool) -> list[str]:
    if not (function.__doc__ or "").strip():
        return [f"{label} has no docstring"]
    real, documented = parameters_of(function), documented_names(function.__doc__, "Args")
    if documented is None:
        return [f"{label} does not document its arguments {real}"] if real and args_required else []
    return [] if documented == real else [f"{label} documents {documented} but takes {real}"]


def class_faults(label: str, cls: type) -> list[str]:
    if not (cls.__dict__.get("__doc__") or "").strip() or str(cls.__doc__).startswith(f"{cls.__name__}("):
        return [f"{label} has no docstring"]  # a dataclass without one gets its signature as docstring
    faults = []
    if dataclasses.is_dataclass(cls):
        real = [field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")]
        documented = documented_names(cls.__doc__, "Attributes") or documented_names(cls.__doc__, "Args") or []
        if documented != real:
            faults.append(f"{label} documents {documented} but has the fields {real}")
    elif "__init__" in cls.__dict__:
        real, constructor = parameters_of(cls.__init__), documented_names(cls.__doc__, "Args")
        documented = constructor or documented_names(cls.__init__.__doc__, "Args") or []
        made_elsewhere = constructor is None and _MADE_ELSEWHERE.search(str(cls.__doc__))
        if documented != real and not made_elsewhere:
            faults.append(f"{label} documents {documented} but is constructed from {real}")
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(function, property):
            faults += [] if function.__doc__ else [f"{label}.{name} has no docstring"]
        elif inspect.isfunction(function):
            faults += function_faults(f"{label}.{name}", function, args_required=False)
    return faults


def faults_of(label: str, thing: object) -> list[str]:
    if inspect.isclass(thing):
        return class_faults(label, thing)
    return function_faults(label, thing, args_required=True) if inspect.isfunction(thing) else []


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of((ROOT / page).read_text(encoding="utf-8"), "python")
    run_blocks(blocks, page)
    assert sum(block.reason is not None for block in blocks) == NOT_EXECUTED.get(page, 0)


def test_readme_has_snippets_to_run() -> None:
    assert len(blocks_of((ROOT / "README.md").read_text(encoding="utf-8"), "python")) >= 2


def test_shell_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    environments = set(re.findall(r"^\[testenv:(\w+)\]", (ROOT / "tox.ini").read_text(encoding="utf-8"), re.MULTILINE))
    unknown = []
    for page in PAGES:
        for block in blocks_of((ROOT / page).read_text(encoding="utf-8"), "bash"):
            unknown += [
                f"{page}: make {name}"
                for name in re.findall(r"^make (\w+)", block.code, re.MULTILINE)
                if name not in targets
            ]
            unknown += [
                f"{page}: -e {name}"
                for name in re.findall(r"tox.* -e (\w+)", block.code)
                if name not in environments | {"py"}
            ]
    assert unknown == []


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?^\s*```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!\w+://|#)([^)#\s]+)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_documented_commands_are_understood() -> None:
    lines = [
        (page, line)
        for page in PAGES
        for block in blocks_of((ROOT / page).read_text(encoding="utf-8"), "bash")
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.startswith("ast-plugin ") and "--help" not in line
    ]
    assert len(lines) >= 4
    for page, line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)  # "|", ">", "&&" become words of their own
        words.whitespace_split = True
        command = itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), words)
        try:
            build_parser().parse_args(list(command)[1:])
        except SystemExit:
            pytest.fail(f"{page}: the command line does not understand: {line}")


@pytest.mark.parametrize("name", sorted(ast_plugin.__all__))
def test_public_name_is_documented(name: str) -> None:
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES if page.startswith("docs/"))
    assert re.search(rf"\b{re.escape(name)}\b", pages), f"{name} does not occur in docs/"
    assert faults_of(name, getattr(ast_plugin, name)) == []


@pytest.mark.parametrize("package", INTEGRATIONS)
def test_public_names_of_an_integration_are_documented(package: str) -> None:
    module = importlib.import_module(f"ast_plugin.integrations.{package}")
    pages = [f"docs/{package}.md"]
    if package in SEVERAL_PAGES:
        pages = [page for page in PAGES if page.startswith("docs/") and page != "docs/api.md"]
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    for name in module.__all__:
        assert re.search(rf"\b{re.escape(name)}\b", text), f"{name} does not occur in {', '.join(pages)}"
        assert faults_of(name, getattr(module, name)) == []


def test_public_names_are_sorted() -> None:
    assert list(ast_plugin.__all__) == sorted(ast_plugin.__all__)


def test_every_module_has_a_place_in_the_api_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = [path.stem for path in (ROOT / "ast_plugin").glob("*.py") if not path.stem.startswith("_")]
    assert [
        name for name in sorted(modules) if not re.search(rf"automodule:: ast_plugin\.{name}$", reference, re.M)
    ] == []
    for package in INTEGRATIONS:
        modules = [path.stem for path in (ROOT / "integrations" / package).glob("*.py") if path.stem[0] != "_"]
        found = re.findall(rf"automodule:: ast_plugin\.integrations\.{package}\.(\w+)$", reference, re.M)
        assert sorted(found) == sorted(modules)


PAGE = """Text.

```python
a = 1
```

<!-- not executed: needs a cluster -->

```python
a = 2
```

```bash
make demo
```

- item

  ```python
  b = a + 1
  ```
"""


def test_blocks_share_a_namespace_and_marked_ones_are_left_out() -> None:
    blocks = blocks_of(PAGE, "python")
    assert [(block.line, block.reason) for block in blocks] == [(4, None), (10, "needs a cluster"), (20, None)]
    assert run_blocks(blocks, "page.md")["b"] == 2


def test_failing_block_points_at_the_line_of_the_page() -> None:
    blocks = blocks_of("one\n\n```python\nx = 1\nraise RuntimeError('here')\n```\n", "python")
    with pytest.raises(RuntimeError, match="here") as caught:
        run_blocks(blocks, "page.md")
    assert (str(caught.traceback[-1].path).endswith("page.md"), caught.traceback[-1].lineno + 1) == (True, 5)


def drifted(step: int, *, size: int) -> None:
    """Do something.

    Args:
        step: One.
        width: Renamed long ago:
            with a second line.

    Returns:
        nothing: at all.
    """


class Undocumented:
    """A class.

    Args:
        size: Its size.
    """

    def __init__(self, size: int, colour: str) -> None:
        self.size, self.colour = size, colour

    def grow(self) -> None:
        pass


@dataclasses.dataclass
class Bare:
    size: int


@pytest.mark.parametrize(
    ("thing", "faults"),
    [
        (drifted, ["x documents ['step', 'width'] but takes ['step', 'size']"]),
        (lambda: None, ["x has no docstring"]),
        (
            Undocumented,
            ["x documents ['size'] but is constructed from ['size', 'colour']", "x.grow has no docstring"],
        ),
        (Bare, ["x has no docstring"]),
        (blocks_of, ["x has no docstring"]),
        (textwrap.dedent, ["x does not document its arguments ['text']"]),
    ],
)
def test_check_finds_planted_faults(thing: object, faults: list[str]) -> None:
    assert faults_of("x", thing) == faults


def test_check_accepts_matching_arguments() -> None:
    def scaled(values: list[float], *rest: float, factor: float) -> None:
        """Scale values.

        Args:
            values: What is scaled.
            *rest: More of them.
            factor: By how much.
        """

    assert faults_of("x", scaled) == []
