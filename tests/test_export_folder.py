"""A sub-net exported as a folder: the saved model's own files with other values, and nothing of the training."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_examples import SUB_NETS, expected, network, private_state, random_masks, same_state, write_example
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ast_plugin import cli, export_folder
from ast_plugin.cli import main
from ast_plugin.elastic_file import ELASTIC, read_elastic, write_elastic
from ast_plugin.errors import ConfigError, ElasticFileError, SaveError
from ast_plugin.export_card import CITATION, escaped, metrics_table, sub_net_section, with_section
from ast_plugin.export_folder import ExportedFolder
from ast_plugin.export_weights import INDEX, MODEL
from ast_plugin.masks import MaskStore

METADATA = {"format": "pt", "note": "kept", "another": "kept too"}
CARD = "---\nlicense: mit\n---\n\n# My model\n\nMy words.\n"


def export(folder: Path, name: str = "s80", target: Path | None = None) -> ExportedFolder:
    return export_folder.export_folder(folder, name, target or folder.parent / "out")


def save_model(folder: Path, state: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write a state dict as ``save_pretrained`` does: one file, or several and an index."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(dict(state), folder / MODEL, metadata=METADATA)
        return
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for part, (key, tensor) in zip(itertools.cycle(parts), state.items(), strict=False):
        part[key] = tensor
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, folder / name, metadata=METADATA)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {key: n for p, n in zip(parts, names, strict=True) for key in p},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def fill(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def want(name: str) -> dict[str, Tensor]:
    model = network()
    return expected(model, random_masks(model), private_state(model), name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the small network's dense weights and its elastic file."""
    folder = tmp_path / "saved"
    save_model(folder, network().state_dict())
    write_example(folder / ELASTIC, metrics={"s80": {"accuracy": 0.75}})
    (folder / "config.json").write_text('{"hidden_size": 7}')
    return folder


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", SUB_NETS)
def test_the_weights_file_holds_the_sub_net_and_is_the_saved_one_otherwise(
    saved: Path, tmp_path: Path, name: str
) -> None:
    done = export(saved, name)
    assert done == ExportedFolder(path=tmp_path / "out", weights=(MODEL,), copied=("config.json",), left_out=(ELASTIC,))
    assert files_of(tmp_path / "out") == ["README.md", "config.json", MODEL]
    state = load_file(tmp_path / "out" / MODEL)
    assert same_state({key: state[key] for key in want(name)}, want(name))
    assert header_of(tmp_path / "out" / MODEL) == header_of(saved / MODEL)
    with safe_open(tmp_path / "out" / MODEL, "pt") as file:
        assert file.metadata() == METADATA
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_keep_their_names_headers_and_index(saved: Path, tmp_path: Path) -> None:
    (saved / MODEL).unlink()
    save_model(saved, network().state_dict(), shards=3)
    done = export(saved)
    assert done.weights == tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert (tmp_path / "out" / INDEX).read_bytes() == (saved / INDEX).read_bytes()
    state: dict[str, Tensor] = {}
    for name in done.weights:
        assert header_of(tmp_path / "out" / name) == header_of(saved / name)
        state |= load_file(tmp_path / "out" / name)
    assert same_state({key: state[key] for key in want("s80")}, want("s80"))


def test_one_file_is_preferred_to_shards_of_an_earlier_save_as_in_stock_loading(saved: Path, tmp_path: Path) -> None:
    other = {key: torch.ones(2) for key in ("a", "b")}
    save_model(saved, other, shards=2)
    done = export(saved)
    assert done.weights == (MODEL,)
    assert {INDEX, "model-00001-of-00002.safetensors"} <= set(done.left_out)
    assert files_of(tmp_path / "out") == ["README.md", "config.json", MODEL]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_saved_models_type_is_kept(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = network().to(dtype).state_dict()
    save_model(saved, state)
    export(saved)
    found = load_file(tmp_path / "out" / MODEL)
    for key, tensor in want("s80").items():
        assert found[key].dtype == state[key].dtype
        assert torch.equal(found[key], tensor.to(state[key].dtype)), key
    assert found["norm.num_batches_tracked"].dtype == torch.int64


def test_tensors_of_every_type_and_size_come_through(tmp_path: Path) -> None:
    masks = MaskStore(("s50",), {"weight": (2, 2)})
    masks.set("s50", "weight", torch.tensor([[True, False], [False, True]]))
    state = {
        "weight": torch.tensor([[1.5, 2.5], [3.5, float("inf")]], dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([[1, 255]], dtype=torch.uint8),
        "small": torch.tensor([-3], dtype=torch.int8),
        "steps": torch.tensor(2**40),
        "short": torch.tensor([-2, 300], dtype=torch.int16),
        "whole": torch.tensor([7], dtype=torch.int32),
        "nothing": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 2j]),
        "half": torch.tensor([0.1], dtype=torch.float16),
        "brain": torch.tensor(0.1, dtype=torch.bfloat16),
    }
    save_model(tmp_path / "saved", state)
    write_elastic(tmp_path / "saved" / ELASTIC, state=state, masks=masks, private={}, header={})
    export(tmp_path / "saved", "s50")
    found = load_file(tmp_path / "out" / MODEL)
    assert found["weight"].tolist() == [[1.5, 0.0], [0.0, float("inf")]]
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items() if key != "weight")
    assert header_of(tmp_path / "out" / MODEL) == header_of(tmp_path / "saved" / MODEL)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight


@pytest.mark.parametrize("names", [("table",), ("head",), ("table", "head")])
def test_of_tied_weights_those_names_are_written_that_were_saved(tmp_path: Path, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Tied()
    masks = random_masks(model, ("hidden.weight",))
    folder = tmp_path / "saved"
    tied = {f"{name}.weight": model.table.weight.detach().clone() for name in names}
    save_model(
        folder, {**tied, "hidden.weight": model.hidden.weight.detach(), "hidden.bias": model.hidden.bias.detach()}
    )
    write_elastic(folder / ELASTIC, state=model.state_dict(), masks=masks, private={}, header={})
    export(folder)
    found = load_file(tmp_path / "out" / MODEL)
    assert sorted(found) == sorted([*tied, "hidden.weight", "hidden.bias"])
    assert all(torch.equal(found[key], tensor) for key, tensor in tied.items())
    assert torch.equal(found["hidden.weight"] != 0, masks.get("s80", "hidden.weight"))


def test_a_tie_that_the_elastic_file_does_not_know_is_refused(tmp_path: Path) -> None:
    model = Tied()
    folder = tmp_path / "saved"
    save_model(folder, {key: tensor for key, tensor in model.state_dict().items() if key != "head.weight"})
    model.head.weight = nn.Parameter(torch.randn(6, 4))  # in training apart, saved as one
    masks = random_masks(model, ("hidden.weight",))
    write_elastic(folder / ELASTIC, state=model.state_dict(), masks=masks, private={}, header={})
    with pytest.raises(ElasticFileError, match=r"the saved model lacks head\.weight\. Nothing was written"):
        export(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_names_of_compiled_parts_are_recognised(saved: Path, tmp_path: Path) -> None:
    state = {key.replace("hidden.", "hidden._orig_mod."): tensor for key, tensor in network().state_dict().items()}
    save_model(saved, state)
    export(saved)
    found = load_file(tmp_path / "out" / MODEL)
    assert torch.equal(found["hidden._orig_mod.weight"], want("s80")["hidden.weight"])


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    given = {key.replace("__", "."): tensor for key, tensor in changes.items()}
    return {key: tensor for key, tensor in {**state, **given}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra__weight": torch.ones(2)}, r"the elastic file lacks extra\.weight"),
        ({"hidden__weight": None}, r"the saved model lacks hidden\.weight"),
        ({"norm__running_mean": None}, r"the saved model lacks norm\.running_mean"),
        ({"head__bias": None}, r"the saved model lacks head\.bias"),
        (
            {"head__bias": torch.ones(6)},
            r"other shape: head\.bias is \(5,\) in the elastic file and \(6,\) in the model",
        ),
        (
            {"head__bias": torch.ones(5, dtype=torch.int8)},
            r"other type: head\.bias is float32 in the elastic file and int8 in the model",
        ),
        (
            {f"more{number}": torch.ones(1) for number in range(5)},
            "the elastic file lacks more0, more1, more2 and 2 more",
        ),
    ],
)
def test_a_model_that_is_not_the_elastic_files_is_refused_with_the_way_in_python(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_model(saved, changed(network().state_dict(), **changes))
    with pytest.raises(ElasticFileError, match=message) as caught:
        export(saved)
    assert "export_pretrained(ast_plugin.load(path, model), name, model, folder)" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_weights_of_a_quantized_type_are_refused(saved: Path) -> None:
    save_model(saved, changed(network().state_dict(), hidden__weight=torch.ones(7, 7).to(torch.float8_e4m3fn)))
    with pytest.raises(ElasticFileError, match=r"'hidden\.weight' in .* is of type F8_E4M3, as quantized models are"):
        export(saved)


# ------------------------------------------------------------------------------------------- names and values


class Alike(nn.Module):
    """Five layers of one shape, which names or values must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(5))


@pytest.fixture
def alike(tmp_path: Path) -> dict[str, Tensor]:
    """Save an elastic file of five layers of one shape and return the dense state dict."""
    torch.manual_seed(0)
    model = Alike()
    masks = random_masks(model, [f"layers.{number}.weight" for number in range(5)])
    (tmp_path / "saved").mkdir()
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    write_elastic(tmp_path / "saved" / ELASTIC, state=state, masks=masks, private={}, header={})
    return state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Backwards too, so that no order of names could tell.
    return {key.replace("layers.", "old.part.")[::-1]: tensor for key, tensor in reversed(state.items())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_under_other_names_are_known_by_their_values(
    alike: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    save_model(tmp_path / "saved", {key: tensor.to(dtype) for key, tensor in renamed(alike).items()}, shards=2)
    export(tmp_path / "saved")
    found = {key: t for path in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(path).items()}
    wanted = renamed(read_elastic(tmp_path / "saved").materialize("s80"))
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[key], tensor.to(dtype)) for key, tensor in wanted.items())


def test_names_that_changed_places_are_told_by_their_values(alike: dict[str, Tensor], tmp_path: Path) -> None:
    swapped = {**alike, "layers.0.weight": alike["layers.3.weight"], "layers.3.weight": alike["layers.0.weight"]}
    save_model(tmp_path / "saved", swapped)
    export(tmp_path / "saved")
    found = load_file(tmp_path / "out" / MODEL)
    wanted = read_elastic(tmp_path / "saved").materialize("s80")
    assert torch.equal(found["layers.0.weight"], wanted["layers.3.weight"])
    assert torch.equal(found["layers.3.weight"], wanted["layers.0.weight"])
    assert torch.equal(found["layers.1.weight"], wanted["layers.1.weight"])


@pytest.mark.parametrize(
    "change", [lambda weight: weight.T.contiguous(), lambda weight: weight.flip(0), torch.zeros_like]
)
def test_values_in_another_order_or_of_another_moment_are_refused(
    alike: dict[str, Tensor], tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    save_model(tmp_path / "saved", {**alike, "layers.2.weight": change(alike["layers.2.weight"])})
    with pytest.raises(ElasticFileError, match=r"there has it: other values: layers\.2\.weight\. Nothing was written"):
        export(tmp_path / "saved")


def test_dropped_weights_of_the_dense_model_do_not_matter(alike: dict[str, Tensor], tmp_path: Path) -> None:
    changed_weights = dict(alike)
    save_model(tmp_path / "saved", alike)
    contents = read_elastic(tmp_path / "saved")
    for name in contents.parameters:
        dropped = ~(contents.mask("s50", name) | contents.mask("s80", name))
        assert dropped.any()
        changed_weights[name] = torch.where(dropped, torch.full_like(alike[name], 9.0), alike[name])
    save_model(tmp_path / "saved", changed_weights)
    export(tmp_path / "saved")
    found = load_file(tmp_path / "out" / MODEL)
    assert all(torch.equal(found[key], tensor) for key, tensor in contents.materialize("s80").items())


def test_equal_values_that_a_sub_net_masks_in_different_ways_are_not_guessed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Alike()
    for layer in model.layers:
        layer.load_state_dict(model.layers[0].state_dict())
    names = [f"layers.{number}.weight" for number in range(5)]
    masks = random_masks(model, names)
    folder = tmp_path / "saved"
    save_model(folder, renamed({key: tensor.clone() for key, tensor in model.state_dict().items()}))
    write_elastic(folder / ELASTIC, state=model.state_dict(), masks=masks, private={}, header={})
    with pytest.raises(ElasticFileError, match="the elastic file lacks thgiew"):
        export(folder)
    for name in SUB_NETS:
        for parameter in names:  # the same masks: now it does not matter which is which
            masks.set(name, parameter, masks.get(name, names[0]))
    write_elastic(folder / ELASTIC, state=model.state_dict(), masks=masks, private={}, header={})
    export(folder)
    found = load_file(tmp_path / "out" / MODEL)
    wanted = read_elastic(folder).materialize("s80")["layers.0.weight"]
    assert sum(torch.equal(tensor, wanted) for tensor in found.values()) == 5


def test_normalization_state_that_was_estimated_anew_is_taken(saved: Path, tmp_path: Path) -> None:
    assert not torch.equal(network().norm.running_mean, want("s80")["norm.running_mean"])
    export(saved)
    assert torch.equal(load_file(tmp_path / "out" / MODEL)["norm.running_mean"], want("s80")["norm.running_mean"])


def test_values_that_are_no_numbers_are_compared_too(alike: dict[str, Tensor], tmp_path: Path) -> None:
    state = {key: torch.full_like(tensor, torch.nan) for key, tensor in alike.items()}
    masks = read_elastic(tmp_path / "saved").masks
    write_elastic(tmp_path / "saved" / ELASTIC, state=state, masks=masks, private={}, header={})
    save_model(tmp_path / "saved", state)
    export(tmp_path / "saved")
    found = load_file(tmp_path / "out" / MODEL)["layers.0.weight"]
    assert torch.equal(found.isnan(), masks.get("s80", "layers.0.weight"))


# ------------------------------------------------------------------------------------- what is there beside


TRAINING = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json"),
    *("training_args.bin", "ast_state.pt", "ast_config.json", "all_results.json", "optimizer.bin", ".gitattributes"),
    *("pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors", "model.onnx", "checkpoint-10/config.json"),
    *("runs/one/events.out.tfevents.1", "events.out.tfevents.2", "elastic_ema.safetensors"),
)
NEEDED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model"),
    *("preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_own.py"),
    *("special_tokens_map.json", "scheduler_config.json", "LICENSE"),
)


def test_what_loading_needs_is_copied_and_what_training_left_is_not(saved: Path, tmp_path: Path) -> None:
    fill(saved, (*TRAINING, *NEEDED))
    done = export(saved)
    assert files_of(tmp_path / "out") == sorted([*NEEDED, "README.md", "config.json", MODEL])
    assert sorted(done.copied) == sorted([*NEEDED, "config.json"])
    tops = {f"{name.split('/')[0]}/" if "/" in name else name for name in TRAINING}
    assert set(done.left_out) == {*tops, ELASTIC}
    for name in done.copied:
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()


def test_a_download_made_of_links_becomes_files(saved: Path, tmp_path: Path) -> None:
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in saved.iterdir():
        (links / path.name).symlink_to(path)
    (links / "gone.json").symlink_to(tmp_path / "nowhere")
    done = export(links)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert files_of(tmp_path / "out") == ["README.md", "config.json", MODEL]
    assert "gone.json" in done.left_out


def test_the_readme_has_a_section_on_this_sub_net_instead_of_all(saved: Path, tmp_path: Path) -> None:
    (saved / "README.md").write_text(with_section(CARD, "## All sub-nets\n\ns50 and s80"))
    export(saved)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(CARD)
    assert "All sub-nets" not in text
    assert "## Sub-net `s80`" in text
    assert "one of 2 sub-nets that share the weights of one network" in text
    record = read_elastic(saved).records["s80"]
    assert (
        f"Of {record.total} prunable weights {record.kept} are kept; the others, {100 * record.sparsity:.2f} %" in text
    )
    assert "| sub-net | accuracy |\n| --- | ---: |\n| `s80` | 0.7500 |" in text
    assert str(tmp_path) not in text


def test_a_readme_that_is_no_utf8_is_copied_as_it_is(saved: Path, tmp_path: Path) -> None:
    (saved / "README.md").write_bytes(b"caf\xe9")
    export(saved)
    assert (tmp_path / "out" / "README.md").read_bytes() == b"caf\xe9"


# ------------------------------------------------------------------------------------------ all or nothing


def test_a_folder_that_holds_files_is_never_written_to(saved: Path, tmp_path: Path) -> None:
    for target in (saved, tmp_path):
        before = files_of(tmp_path)
        with pytest.raises(SaveError, match="it is there and holds files; give another one"):
            export(saved, target=target)
        assert files_of(tmp_path) == before


def test_a_folder_inside_the_saved_one_may_be_written(saved: Path) -> None:
    export(saved, target=saved / "sub-nets" / "s80")
    assert files_of(saved / "sub-nets" / "s80") == ["README.md", "config.json", MODEL]


def test_a_disk_that_fills_up_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(SaveError, match="No space left on device; free some space, or give another path"):
        export(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_file_that_cannot_be_read_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openly = Path.open

    def locked(path: Path, mode: str = "r") -> Any:
        if path == saved / "config.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return openly(path, mode)

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(ElasticFileError, match=r"cannot read '.*config\.json': Permission denied"):
        export(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_unknown_sub_net_writes_nothing(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no sub-net 's8' in '.*': did you mean 's80'"):
        export(saved, "s8")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_without_a_saved_model_is_refused(saved: Path) -> None:
    (saved / MODEL).unlink()
    with pytest.raises(ElasticFileError, match="holds no saved model beside the elastic file: neither"):
        export(saved)
    fill(saved, ["pytorch_model-00001-of-00002.bin"])
    with pytest.raises(
        ElasticFileError, match=r"pytorch_model-00001-of-00002\.bin, a pickle.*save_pretrained\(folder\)"
    ):
        export(saved)


def test_a_folder_without_an_elastic_file_and_a_file_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder must be a folder with elastic\.safetensors and a saved model"):
        export(saved / ELASTIC)
    (saved / ELASTIC).unlink()
    with pytest.raises(
        ElasticFileError, match=r"holds no elastic\.safetensors; it holds config\.json, model\.safetensors"
    ):
        export(saved)


def test_adapters_are_refused_because_stock_loading_would_not_look_at_the_weights(saved: Path) -> None:
    fill(saved, ["adapter_config.json"])
    with pytest.raises(ElasticFileError, match=r"adapters \(adapter_config\.json\).*merge_and_unload\(\)"):
        export(saved)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_damaged_weights_file_is_refused(saved: Path, tmp_path: Path, cut: int) -> None:
    (saved / MODEL).write_bytes((saved / MODEL).read_bytes()[:cut])
    with pytest.raises(ElasticFileError, match=r"model\.safetensors' is damaged: .*; save the model again"):
        export(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged, or no index of weights"),
        ("[]", "is damaged, or no index of weights"),
        ("{}", "is damaged, or no index of weights: 'weight_map'"),
        ('{"weight_map": {}}', "its weight_map lists no files of this folder"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "its weight_map lists no files of this folder"),
        ('{"weight_map": {"a": 3}}', "is damaged, or no index of weights"),
        ('{"weight_map": {"a": "absent.safetensors"}}', r"cannot read .*absent\.safetensors"),
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "do not agree about a, b, c;"),
        ('{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}', "do not agree about a, b;"),
        ('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}', "the elastic file lacks a, b"),
    ],
)
def test_a_damaged_index_is_refused(saved: Path, index: str, message: str) -> None:
    (saved / MODEL).unlink()
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, saved / "one.safetensors")
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, saved / "two.safetensors")
    (saved / INDEX).write_text(index)
    with pytest.raises(ElasticFileError, match=message):
        export(saved)


# ------------------------------------------------------------------------------------------------- command


def test_the_command_says_what_it_wrote_and_what_it_left_out(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(saved, ["optimizer.pt"])
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(tmp_path / "out")]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: sub-net s80 in model.safetensors."
    assert lines[1] == "Copied: config.json."
    assert lines[2] == "Left out: elastic.safetensors, optimizer.pt."
    assert lines[4] == f'  model = AutoModel.from_pretrained("{tmp_path / "out"}")'
    assert files_of(tmp_path / "out") == ["README.md", "config.json", MODEL]


def test_the_command_counts_shards_instead_of_listing_them(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / MODEL).unlink()
    save_model(saved, network().state_dict(), shards=3)
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(tmp_path / "out")]) == cli.OK
    assert "sub-net s80 in model-00001-of-00003.safetensors and 2 more.\n" in capsys.readouterr().out


def test_a_folder_can_also_give_a_single_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "s80.safetensors"
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(target)]) == cli.OK
    state = load_file(target)
    assert same_state({key: state[key] for key in want("s80")}, want("s80"))


def test_the_command_refuses_what_the_function_refuses(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved), "--sub-net", "s8", "--to", str(tmp_path / "out")]) == cli.USAGE
    assert "did you mean 's80'" in capsys.readouterr().err
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(saved)]) == cli.FAILED
    assert "it is there and holds files" in capsys.readouterr().err
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(saved / ELASTIC)]) == cli.USAGE
    assert "is the file that is read" in capsys.readouterr().err


def test_a_file_does_not_take_the_place_of_the_dense_model(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (saved / "model.safetensors").read_bytes()
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(saved / "model.safetensors")]) == cli.USAGE
    assert "would take the place of the dense model" in capsys.readouterr().err
    assert (saved / "model.safetensors").read_bytes() == before
    assert main(["export", str(saved), "--sub-net", "s80", "--to", str(saved / "s80.safetensors")]) == cli.OK


@pytest.mark.slow
def test_the_command_needs_no_other_package(saved: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ast_plugin.cli import main\n"
        f"code = main(['export', {str(saved)!r}, '--sub-net', 's80', '--to', {str(tmp_path / 'out')!r}])\n"
        "sys.exit(code or bool({'transformers', 'huggingface_hub', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- README.md sections


def test_a_section_is_appended_once_and_then_replaced() -> None:
    once = with_section(CARD, "## First")
    assert once == CARD + "\n<!-- ast-plugin: begin -->\n## First\n<!-- ast-plugin: end -->\n"
    moved = once + "\nWords behind.\n"
    assert with_section(moved, "## Second\n\nmore\n") == moved.replace("## First", "## Second\n\nmore")
    assert with_section("", "## Only").startswith("<!-- ast-plugin: begin -->\n## Only\n")


def test_line_ends_of_windows_are_kept() -> None:
    text = with_section(CARD.replace("\n", "\r\n"), "## One\n\nmore")
    assert text.replace("\r\n", "").count("\n") == 0
    assert with_section(text, "## One\n\nmore") == text


def test_a_section_that_was_copied_is_left_once() -> None:
    twice = with_section("one", "## A") + "between\n" + with_section("", "## A") + "behind\n"
    text = with_section(twice, "## B")
    assert text.count("ast-plugin: begin") == text.count("## B") == 1
    assert "## A" not in text
    assert all(word in text for word in ("one", "between", "behind"))


def test_a_mark_without_its_partner_takes_no_text_with_it() -> None:
    for damaged in ("<!-- ast-plugin: begin -->\nmine\n", "mine\n<!-- ast-plugin: end -->\n"):
        text = with_section(damaged, "## A")
        assert text.startswith(damaged)
        again = with_section(text, "## B")
        assert again == text.replace("## A", "## B")


def test_what_a_section_says_of_a_sub_net(tmp_path: Path) -> None:
    contents = read_elastic(write_example(tmp_path / ELASTIC))
    section = sub_net_section(contents, "s50")
    assert section.startswith("## Sub-net `s50`\n")
    assert "| sub-net |" not in section  # nothing was measured
    assert section.endswith(CITATION)
    with pytest.raises(ConfigError, match="no sub-net 's5'"):
        sub_net_section(contents, "s5")


def test_tables_hold_what_was_measured_and_odd_names() -> None:
    table = metrics_table(
        ("s50", "a`b|c"), {"s50": {"loss": 0.5}, "a`b|c": {"loss": 1.25, "f1|macro": 1.0}}, {"kept": ["1", "2"]}
    )
    assert table.splitlines() == [
        "| sub-net | kept | loss | f1\\|macro |",
        "| --- | ---: | ---: | ---: |",
        "| `s50` | 1 | 0.500 | \N{EN DASH} |",
        "| a\\`b\\|c | 2 | 1.250 | 1 |",
    ]
    assert escaped("a_b<c>\n") == "a\\_b\\<c\\>\N{REPLACEMENT CHARACTER}"
