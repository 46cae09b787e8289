"""Networks and inputs that are named on a command line: whatever can be imported and called makes the network.

So ``--model timm:create_model --model-argument model_name=resnet50`` and ``--model
transformers:AutoModelForImageClassification.from_pretrained --model-argument pretrained_model_name_or_path=folder``
need no code for their libraries here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError, near_names

_INPUT = re.compile(r"^(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?$")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--model-argument``, ``--input`` and ``--device`` to a parser.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="what makes the network, as it was built for training: a function, or a class, in a module that can be "
        "imported or lies in this folder. Only give code that you trust: it is run",
    )
    parser.add_argument(
        "--model-argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument for it, as often as needed; VALUE is JSON (10, true, null), or else a text",
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[NAME=]SHAPE[:TYPE]",
        help="shape of an input, such as 1x3x224x224, as often as the network has inputs; NAME for a keyword argument, "
        "TYPE float32 (the default, random values) or for example int64 (ones): input_ids=1x128:int64",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to run (default: %(default)s)")


def make_model(path: str, arguments: Sequence[str], device: str) -> nn.Module:
    """Return the network that a command line names, in eval mode.

    The folder that the command runs in is looked through as well, as ``python -m`` does.

    Args:
        path: ``module:name``; the name may have dots.
        arguments: ``NAME=VALUE`` each.
        device: Where the network goes.

    Raises:
        ConfigError: If the text is malformed, nothing of that name can be imported, or what was made is no network.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ConfigError(f"--model must have the form MODULE:NAME, such as my_package.networks:make, got {path!r}")
    values = dict(_argument(text) for text in arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"--model {path!r}: {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"--model {path!r}: there is no {part!r}; {near_names(part, _public(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"--model {path!r} is a {type(found).__name__}; name a function that returns the network")
    try:
        model = found(**values)
    except Exception as error:
        raise ConfigError(
            f"--model {path!r} called with {_shown(values)} failed: {type(error).__name__}: {error}; give what it "
            "needs with --model-argument NAME=VALUE"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {path!r} returned a {type(model).__name__}, not a torch.nn.Module")
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"--device {device!r} cannot be used: {error}") from error


def make_inputs(texts: Sequence[str], device: str) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Return the inputs that a command line describes; the same random values every time.

    Args:
        texts: ``[NAME=]SHAPE[:TYPE]`` each.
        device: Where they go.

    Returns:
        Positional arguments, or keyword arguments if the inputs have names.

    Raises:
        ConfigError: If a text is malformed, or only some inputs have names.
    """
    generator = torch.Generator().manual_seed(0)
    made: list[tuple[str | None, Tensor]] = []
    for text in texts:
        match = _INPUT.match(text)
        if not match or not all(sizes := [int(size) for size in match["shape"].split("x")]):
            raise ConfigError(
                f"--input {text!r} is not understood: write a shape such as 1x3x224x224, with a name or a type if "
                "needed: input_ids=1x128:int64"
            )
        kind = match["dtype"] or "float32"
        if kind not in _DTYPES:
            raise ConfigError(f"--input {text!r} has the unknown type {kind!r}; {near_names(kind, _DTYPES)}")
        if math.prod(sizes) > 2**32:
            raise ConfigError(f"--input {text!r} has {math.prod(sizes):,} values; give a smaller shape")
        dtype = _DTYPES[kind]
        tensor = torch.randn(sizes, generator=generator) if dtype.is_floating_point else torch.ones(sizes)
        made.append((match["name"], tensor.to(device, dtype)))
    names = [name for name, _ in made if name is not None]
    if not names:
        return tuple(tensor for _, tensor in made)
    if len(set(names)) != len(made):
        raise ConfigError(f"--input must have a name of its own for each input, or for none, got {' '.join(texts)}")
    return {name: tensor for name, tensor in made if name is not None}


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--model-argument must have the form NAME=VALUE, such as num_classes=10, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items()) or "no arguments"


def _public(thing: Any) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_") and callable(getattr(thing, name, None))][:200]
