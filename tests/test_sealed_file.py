"""A sealed file notices every change, and names what a foreign file is."""

from __future__ import annotations

import errno
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ast_plugin import sealed_file
from ast_plugin.errors import ConfigError, ElasticFileError, SaveError
from ast_plugin.sealed_file import FORMAT, VERSION, read_sealed, write_sealed

TENSORS = {
    "weights": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bits": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sealed(tmp_path / "a.safetensors", TENSORS, {"name": "ä", "list": [1, 2.5, None, True]})
    return tmp_path / "a.safetensors"


def changed(path: Path, name: str, data: bytes) -> Path:
    other = path.with_name(name)
    other.write_bytes(data)
    return other


def test_gives_back_header_and_tensors(path: Path) -> None:
    header, tensors = read_sealed(path)
    assert header["name"] == "ä"
    assert header["list"] == [1, 2.5, None, True]
    assert (header["format"], header["version"]) == (FORMAT, VERSION)
    assert set(tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)


def test_is_a_safetensors_file_that_opens_without_this_package(path: Path) -> None:
    assert torch.equal(load_file(path)["weights"], TENSORS["weights"])
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[FORMAT])["name"] == "ä"


def test_equal_content_gives_equal_bytes(path: Path) -> None:
    write_sealed(path.with_name("b"), TENSORS, {"name": "ä", "list": [1, 2.5, None, True]})
    assert path.with_name("b").read_bytes() == path.read_bytes()


def test_tensors_do_not_depend_on_the_file(path: Path) -> None:
    _, tensors = read_sealed(path)
    path.write_bytes(b"\0" * 10)  # in place: a memory map would change or fault now
    assert torch.equal(tensors["weights"], TENSORS["weights"])
    tensors["weights"].zero_()


def test_any_flipped_byte_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 + position * 37 % 255
        other = changed(path, "flipped", bytes(flipped))
        with pytest.raises(ElasticFileError) as caught:
            read_sealed(other)
        assert str(other) in str(caught.value), position


def test_white_space_exchanged_for_white_space_is_noticed(path: Path) -> None:
    # safetensors pads its header with spaces; a line feed there is still valid JSON with the same meaning.
    for name in range(8):
        write_sealed(path, TENSORS, {"name": "n" * name})
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if data[end - 1 : end] == b" ":
            break
    else:
        pytest.fail("no header needed padding")
    other = changed(path, "flipped", data[: end - 1] + b"\n" + data[end:])
    load_file(other)
    with pytest.raises(ElasticFileError, match="does not match its digest"):
        read_sealed(other)


def test_every_truncation_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        other = changed(path, "short", data[:length])
        with pytest.raises(ElasticFileError, match=r"damaged|not an elastic file"):
            read_sealed(other)


def test_truncation_is_called_by_its_name(path: Path) -> None:
    data = path.read_bytes()
    with pytest.raises(ElasticFileError, match=rf"truncated: {len(data) - 3} of {len(data)} bytes; copy it"):
        read_sealed(changed(path, "short", data[:-3]))
    with pytest.raises(ElasticFileError, match="ends inside its header: 100 of at least"):
        read_sealed(changed(path, "short", data[:100]))


def test_appended_bytes_are_noticed(path: Path) -> None:
    with pytest.raises(ElasticFileError, match="1 bytes follow its end"):
        read_sealed(changed(path, "long", path.read_bytes() + b"x"))


def test_a_newer_format_version_asks_for_an_upgrade(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_file, "VERSION", VERSION + 6)
    write_sealed(path, TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(ElasticFileError, match=r"has format version 7, .* reads up to 1; upgrade it with: pip"):
        read_sealed(path)


@pytest.mark.parametrize("version", [0, "1", None])
def test_a_version_that_never_existed_is_damage(path: Path, version: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_file, "VERSION", version)
    write_sealed(path, TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(ElasticFileError, match="is damaged: its format is given as"):
        read_sealed(path)


def _shell(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _with_metadata(text: str) -> bytes:
    return _shell(json.dumps({"__metadata__": {FORMAT: text}}).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04rest", "a PyTorch or other zip archive; load it with torch.load"),
        (pickle.dumps({"a": 1}), "it is a pickle; pickles can run code"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"hello, this is a text file\n", "does not start like a safetensors file"),
        (b"abc", "does not start like a safetensors file"),
        (_shell(b"{not json"), "its header is no JSON"),
        (_shell(b"{" + b'"a":{' * 5000), "its header is no JSON"),
        (_shell(b"{}"), "safetensors file of another kind, with 0 tensors;"),
        (_with_metadata("not json"), "its elastic header is no JSON"),
        (_with_metadata("[1]"), "its elastic header is no JSON object"),
        (_with_metadata('{"format":"other","version":1}'), "its format is given as 'other'"),
        (_with_metadata(f'{{"format":"{FORMAT}","version":1}}'), "its digest is malformed"),
        (_with_metadata(f'{{"digest":"","format":"{FORMAT}","version":1}}'), "its digest is malformed"),
        (_with_metadata(f'{{"digest":"ä","format":"{FORMAT}","version":1}}'), "its digest is malformed"),
        (
            _with_metadata(f'{{"format":"{FORMAT}","version":1,"digest":"sha256:{64 * "0"}"}}'),
            "its digest is not where it belongs",
        ),
        (
            _shell(json.dumps({"__metadata__": {FORMAT: f'{{"format":"{FORMAT}","version":1}}'}, "a": 1}).encode()),
            "does not say where its tensors are",
        ),
    ],
)
def test_foreign_and_broken_files_are_refused_with_the_reason(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ElasticFileError) as caught:
        read_sealed(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_plain_safetensors_file_is_recognised(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ElasticFileError, match=r"another kind, with 1 tensors such as 'fc.weight'; load it with safe"):
        read_sealed(tmp_path / "plain.safetensors")


def test_a_forged_digest_over_bad_tensors_is_still_an_error_of_ours(path: Path) -> None:
    # Sealed again after the data type was made one that does not exist: the digest is right, the content is not.
    data = path.read_bytes().replace(b'"U8"', b'"X8"')
    start = data.index(b"sha256:") + 7
    path.write_bytes(data[:start] + 64 * b"0" + data[start + 64 :])
    sealed_file._seal(path)
    with pytest.raises(ElasticFileError, match="its tensors cannot be read"):
        read_sealed(path)


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    # Also of 128 bytes modulo 256, whose length begins like a pickle does.
    for padding in range(0, 256, 8):
        write_sealed(tmp_path / "a", TENSORS, {"padding": "x" * padding})
        assert read_sealed(tmp_path / "a")[0]["padding"] == "x" * padding


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ElasticFileError, match="No such file or directory; check the path"):
        read_sealed(tmp_path / "absent.safetensors")
    with pytest.raises(ElasticFileError, match="Is a directory"):
        read_sealed(tmp_path)


def test_header_text_that_looks_like_the_digest_does_no_harm(tmp_path: Path) -> None:
    text = '"digest":"sha256:' + 64 * "0" + '"'
    write_sealed(tmp_path / "a", TENSORS, {"note": text, text: {"digest": "sha256:" + 64 * "0"}})
    header, _ = read_sealed(tmp_path / "a")
    assert header["note"] == text


def test_json_keeps_what_strict_json_cannot_say(tmp_path: Path) -> None:
    header = {"metrics": {"nan": math.nan, "inf": math.inf, "low": -math.inf}, "pair": (1, 2), "big": 10**30}
    write_sealed(tmp_path / "a", TENSORS, header)
    read, _ = read_sealed(tmp_path / "a")
    assert math.isnan(read["metrics"]["nan"])
    assert read["metrics"]["inf"] == math.inf
    assert read["metrics"]["low"] == -math.inf
    assert read["pair"] == [1, 2]
    assert read["big"] == 10**30
    with safe_open(tmp_path / "a", "pt") as file:
        assert "NaN" not in file.metadata()[FORMAT]  # readers in other languages refuse it


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path: Path) -> None:
    header = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.int64(4), "d": torch.tensor([math.nan])}
    write_sealed(tmp_path / "a", TENSORS, header)
    read, _ = read_sealed(tmp_path / "a")
    assert (read["a"], read["b"], read["c"]) == (0.5, 3, 4)
    assert math.isnan(read["d"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [object()]}, r"header\['a'\]\[0\] cannot be stored: object"),
        ({"a": torch.zeros(2)}, r"header\['a'\] cannot be stored: Tensor"),
        ({"a": b"bytes"}, r"header\['a'\] cannot be stored: bytes"),
        ({"a": {1: 2}}, r"header\['a'\] has a key that is no string: 1"),
    ],
)
def test_what_json_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path, value: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write_sealed(tmp_path / "a", TENSORS, value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sealed_file, "save_file", full)
    with pytest.raises(SaveError, match="No space left on device; free some space"):
        write_sealed(path, TENSORS, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
