"""What is installed: package and mapped integrations, entry points, type marker, version; and the wheel itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ast_plugin
from ast_plugin.elastic_accessors import ENTRY_POINT_GROUP, accessor_names
from ast_plugin.plugins import PluginRegistry
from ast_plugin.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> list[str]:
    """Return the dotted names under which the folders with Python files are installed."""
    found = {"ast_plugin"}
    for path in (ROOT / "integrations").rglob("*.py"):
        found.add(".".join(["ast_plugin", *path.parent.relative_to(ROOT).parts]))
    return sorted(found)


def sources_on_disk() -> set[str]:
    """Return the paths inside a wheel that the source files must have."""
    files = [path for folder in ("ast_plugin", "integrations") for path in (ROOT / folder).rglob("*.py")]
    relative = [path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts]
    return {f"ast_plugin/{path}" if path.startswith("integrations/") else path for path in relative}


def test_integrations_are_installed_inside_the_package() -> None:
    module = importlib.import_module("ast_plugin.integrations")
    assert module.__name__ == "ast_plugin.integrations"
    assert Path(str(module.__file__)).parent.name == "integrations"


def test_every_folder_is_listed_for_the_build() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="ast-plugin")
    assert [script.value for script in scripts] == ["ast_plugin.cli:main"]
    assert all(callable(script.load()) for script in scripts)


def test_the_plugin_of_the_package_itself_is_installed() -> None:
    points = [e for e in importlib.metadata.entry_points(group="ast_plugin") if e.dist and e.dist.name == "ast-plugin"]
    assert {point.name: point.value for point in points} == PROJECT["project"]["entry-points"]["ast_plugin"]
    loaded = {plugin.name: plugin for plugin in PluginRegistry(autoload=True).loaded()}
    assert loaded["family"].version == __version__


def test_ensembles_are_installed_as_an_accessor() -> None:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="ensemble")
    assert [point.value for point in points] == ["ast_plugin.integrations.family.ensembles:ensemble"]
    assert "ensemble" in accessor_names()
    assert all(callable(point.load()) for point in points)


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("ast-plugin") == __version__
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_package_is_marked_as_typed() -> None:
    assert (Path(str(ast_plugin.__file__)).parent / "py.typed").is_file()


def test_core_dependencies_are_the_promised_four() -> None:
    names = {requirement.split(">")[0].strip() for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"numpy", "pluggy", "safetensors", "torch"}


def test_no_dependency_has_an_upper_bound() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    assert [line for group in groups for line in group if "<" in line or "==" in line or "~" in line] == []


def test_extra_all_covers_every_extra_for_users() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (line,) = extras["all"]
    assert set(line.removeprefix("ast-plugin[").rstrip("]").split(",")) == set(extras) - {
        "all",
        "dev",
        "docs",
        "test",
        "test-hosts",
    }


def build(kind: str, project: Path, destination: Path) -> Path:
    """Build `kind` ("wheel" or "sdist") of `project` with the setuptools at hand; return the archive."""
    destination.mkdir()
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(destination)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = destination.iterdir()
    return archive


@pytest.fixture(scope="module")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a copy: building leaves build/ and *.egg-info in the tree
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("ast_plugin", "integrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.mark.slow
def test_wheel_holds_every_source_and_the_type_marker(project_copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", project_copy, tmp_path / "wheel")) as wheel:
        names = set(wheel.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources_on_disk() | {"ast_plugin/py.typed"}
    assert f"ast_plugin-{__version__}.dist-info/licenses/LICENSE" in names


@pytest.mark.slow
def test_wheel_from_the_source_archive_is_the_same(project_copy: Path, tmp_path: Path) -> None:
    archive = build("sdist", project_copy, tmp_path / "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")) as wheel:
        assert sources_on_disk() <= set(wheel.namelist())
