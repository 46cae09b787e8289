"""A compiled sub-net is a module of its own with the sub-net's outputs, in the form that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sliced_examples import HYBRID_GROUPS, hybrid, pictures, write_channels

from ast_plugin.elastic import Elastic, load


@pytest.fixture
def channels(tmp_path: Path) -> Elastic:
    return load(write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS), hybrid(seed=5))


@pytest.mark.parametrize("form", ["dense", "sliced", "csr", "bsr"])
@pytest.mark.parametrize("name", ["c50", "c75"])
def test_every_form_gives_the_outputs_of_the_sub_net(channels: Elastic, name: str, form: str) -> None:
    with channels.sub_net(name), torch.no_grad():
        expected = channels.model(pictures())
    for inputs in (None, pictures()):
        module = channels.compile(name, form, inputs, seconds=0.01)
        torch.testing.assert_close(module(pictures()), expected, rtol=1e-5, atol=1e-5)
        assert module.compiled_form["form"] == form
        assert module.compiled_form["sub_net"] == name
