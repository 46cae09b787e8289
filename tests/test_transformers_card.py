"""The model card: our section and front matter are added, and everything else in it stays."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from torch import nn
from transformers_saved import SavedModels, train

import ast_plugin
from ast_plugin.errors import ConfigError, SaveError
from ast_plugin.export_card import CITATION
from ast_plugin.integrations.transformers.card import TAGS, write_card
from ast_plugin.integrations.transformers.saving import save_sub_nets

pytestmark = pytest.mark.extra("hf")

BODY = "\n# My model\n\nMy words, with *stars* and a\nline break.\n"
RESULTS = """\
model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: words
      type: words
      odd_field: kept
    metrics:
    - type: loss
      value: 1.5
"""


@pytest.fixture(scope="module")
def ast() -> ast_plugin.AlternatingSparseTraining:
    return train("gpt2")


def front(text: str) -> dict[str, Any]:
    _, block, _ = text.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(block)
    return values


def card(ast: ast_plugin.AlternatingSparseTraining, folder: Path, before: str | None = None) -> str:
    if before is not None:
        (folder / "README.md").write_bytes(before.encode())
    assert write_card(ast, folder) == folder / "README.md"
    return (folder / "README.md").read_bytes().decode()


def test_a_new_card_names_the_model_and_its_sub_nets(tmp_path: Path) -> None:
    ast = train("gpt2", sparsities=(0.5, "2:4"))
    ast.model.save_pretrained(tmp_path)
    save_sub_nets(ast, tmp_path)
    text = card(ast, tmp_path)
    assert front(text) == {"library_name": "transformers", "tags": list(TAGS)}
    assert "\n# GPT2LMHeadModel\n" in text
    kept, total = ast.masks.kept("s50"), ast.masks.total()
    assert "| sub-net | pattern | sparsity | weights kept | loss |\n" in text
    assert f"| `s50` | `unstructured` | 50.00 % | {kept:,} | 1.500 |\n" in text
    assert f"| `2:4` | `2:4` | 50.00 % | {kept:,} | 2.500 |\n" in text
    assert f"the {total:,} prunable weights" in text
    assert CITATION in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.tags == list(TAGS)


def test_the_ways_to_load_that_it_shows_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ast_plugin.cli import main

    one = SavedModels(tmp_path).of("resnet")
    text = card(one.ast, one.folder)
    python = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(one.folder))
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["elastic"].active == "s80"
    command = text.split("```bash\nast-plugin ")[1].split("\n")[0].split()
    there = {"path/to/this/folder": str(one.folder), "path/to/new/folder": str(tmp_path / "out")}
    assert main([there.get(word, word) for word in command]) == 0
    assert one.stock(tmp_path / "out").num_parameters() == one.ast.model.num_parameters()


def test_without_the_elastic_file_no_way_to_load_it_is_shown(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path
) -> None:
    text = card(ast, tmp_path)
    assert "| `s80` |" in text
    assert "ast_plugin.load" not in text
    assert "ast-plugin export" not in text


def test_writing_again_replaces_the_section_and_nothing_else(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path
) -> None:
    before = f"---\nlicense: mit\n---\n{BODY}"
    first = card(ast, tmp_path, before)
    assert card(ast, tmp_path) == first
    behind = first + "\n## More of mine\n"
    again = train("gpt2")
    again.add_report_metric("loss", 0.125, sub_net="s50")
    text = card(again, tmp_path, behind)
    assert text == behind.replace(" 1.500 |", " 0.125 |")
    assert BODY in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("license: mit", {"license": "mit", "library_name": "transformers", "tags": list(TAGS)}),
        ("", {"library_name": "transformers", "tags": list(TAGS)}),
        (
            "library_name: peft\ntags: [a, sparse]",
            {"library_name": "peft", "tags": ["a", "sparse", "ast-plugin", "pruning"]},
        ),
        ("tags: generated_from_trainer", {"library_name": "transformers", "tags": ["generated_from_trainer", *TAGS]}),
        ("tags:", {"library_name": "transformers", "tags": list(TAGS)}),
    ],
)
def test_front_matter_gets_what_it_lacks(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path, given: str, expected: dict[str, Any]
) -> None:
    text = card(ast, tmp_path, f"---\n{given}\n---\n{BODY}")
    assert front(text) == expected
    assert BODY in text
    assert text.count("---\n") == 3 - 1


def test_results_and_their_order_in_the_front_matter_are_kept(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path
) -> None:
    given = f"zeta: 1\nlicense: mit\n{RESULTS}base_model: other\nlanguage:\n- en\n"
    found = front(card(ast, tmp_path, f"---\n{given}---\n{BODY}"))
    assert {key: found[key] for key in yaml.safe_load(given)} == yaml.safe_load(given)
    assert list(found) == [*yaml.safe_load(given), "tags", "library_name"]


def test_front_matter_that_has_everything_stays_byte_by_byte(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path
) -> None:
    given = f"---\n# a comment\ntags:  [ast-plugin, 'sparse', pruning, x]\nlibrary_name:   timm\n---\n{BODY}"
    assert card(ast, tmp_path, given).startswith(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "language:\n- no\n# mine\nversion: 1.10  # of two\n",
            "language:\n- no\n# mine\nversion: 1.10  # of two\ntags:\n- ast-plugin\n- sparse\n- pruning\n",
        ),
        (
            "tags:\n  - b # why\n  # and\n  - a\nlicense: mit\n",
            "tags:\n  - b # why\n  # and\n  - a\n  - ast-plugin\n  - sparse\n  - pruning\nlicense: mit\n",
        ),
        (
            "tags: [b, sparse]  # why\nlicense: mit\n",
            "tags: [b, sparse, ast-plugin, pruning]  # why\nlicense: mit\n",
        ),
        (
            "\n# A heading between two rules\n\n",
            "\n# A heading between two rules\n\ntags:\n- ast-plugin\n- sparse\n- pruning\n",
        ),
    ],
)
def test_what_front_matter_has_stays_as_it_is_written(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path, given: str, expected: str
) -> None:
    text = card(ast, tmp_path, f"---\n{given}---\n{BODY}")
    assert text.startswith(f"---\n{expected}library_name: transformers\n---\n{BODY}")
    assert set(TAGS) <= set(ModelCard(text).data.tags)
    assert card(ast, tmp_path) == text


def test_text_without_front_matter_is_kept_below_a_new_one(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = card(ast, tmp_path, BODY)
    assert front(text)["library_name"] == "transformers"
    assert BODY in text
    assert caplog.records == []


@pytest.mark.parametrize(
    "damaged",
    [
        "---\nlicense: [mit\n---\n",
        "---\n- a\n- list\n---\n",
        "---\ntags: {a: b}\n---\n",
        "---\n1: number as key\n---\n",
        "---\n{license: mit}\n---\n",
        "---\ntags: [a]\ntags: [b]\n---\n",
        "---\nlicense: mit\n\n",
    ],
)
def test_damaged_front_matter_is_left_alone_with_a_warning(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ast_plugin.transformers"):
        text = card(ast, tmp_path, damaged + BODY)
    assert text.startswith(damaged + BODY)
    assert "## Sub-nets" in text
    ours = [record.getMessage() for record in caplog.records if record.name == "ast_plugin.transformers"]
    assert len(ours) == 1
    assert "front matter of README.md is left as it is" in ours[0]


def test_line_ends_and_byte_order_mark_are_kept(ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path) -> None:
    given = f"\ufeff---\nlicense: mit\n---\n{BODY}".replace("\n", "\r\n")
    text = card(ast, tmp_path, given)
    assert text.startswith("\ufeff---\r\nlicense: mit\r\n")
    assert text.replace("\r\n", "").count("\n") == 0
    assert BODY.replace("\n", "\r\n") in text
    assert card(ast, tmp_path) == text


def test_a_card_that_is_no_utf8_is_left_alone_with_a_warning(
    ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    assert write_card(ast, tmp_path) is None
    assert (tmp_path / "README.md").read_bytes() == b"caf\xe9"
    assert "it is no UTF-8, and is left as it is" in caplog.text


def test_a_run_that_has_not_ended_says_so(ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path) -> None:
    assert "had not ended" not in card(ast, tmp_path)
    early = train("gpt2", steps=1, initial_sparsity=0.0)
    text = card(early, tmp_path)
    assert (
        "The run had not ended when this was written, at step 1: `s50` is to reach 50 %, `s80` is to reach 80 %."
        in text
    )


class Own(nn.Module):
    """No model of transformers: it can be trained by a Trainer too, and is built anew for loading."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


def test_a_model_of_ones_own_is_built_and_one_sub_net_stands_alone(tmp_path: Path) -> None:
    import torch

    model = Own()
    ast = ast_plugin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, sparsities=(0.5,), total_steps=4)
    with pytest.warns(UserWarning, match="its target is"):
        save_sub_nets(ast, tmp_path)
    text = card(ast, tmp_path)
    assert "model = Own(...)  # as it was built for training" in text
    assert "from transformers" not in text
    assert "This model holds a sparse sub-net" in text


def test_bad_folders_are_refused(ast: ast_plugin.AlternatingSparseTraining, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path must be the path of a file"):
        write_card(ast, "")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="a part of the path is a file"):
        write_card(ast, tmp_path / "file")
    (tmp_path / "README.md").mkdir()
    with pytest.raises(SaveError, match="the path is a folder"):
        write_card(ast, tmp_path)
