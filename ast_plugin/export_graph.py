"""One sub-net as a graph that runs without its Python code: ONNX, and torch's own exported program."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ast_plugin.compile_timing import call, first_call, output_tensors, same_outputs
from ast_plugin.errors import ConfigError, SaveError, missing_extra
from ast_plugin.export import SubNetSource, export_model
from ast_plugin.files import atomic_write, atomic_write_bytes, file_path

_ONNX_PACKAGES = ("onnx", "onnxscript")
_ONNX_RUNTIME = "onnxruntime"
_LARGEST_ONNX = 2_000_000_000  # bytes; protobuf ends a little above, at 2 GiB


def export_onnx(
    source: SubNetSource,
    name: str,
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    form: str = "dense",
    multiple: int = 1,
    check: bool = True,
    allow_untrained: bool = False,
) -> None:
    """Write one sub-net as an ONNX file, in eval mode.

    Runtimes multiply by the zeros like by other numbers, so in the form ``dense`` it runs as fast as the dense network.
    In the form ``sliced`` the dropped units of a channel sub-net are gone.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        model: The architecture; it is not changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments that the model accepts.
        path: Where to write, customarily with the suffix ``.onnx``.
        dynamic_shapes: Which axes may vary, as `torch.export.export` understands it; None fixes all of them.
        form: ``dense`` or ``sliced``.
        multiple: In the form ``sliced``, leave as many channels and hidden units of each group as make a multiple of
            this; those that are added have zeros as weights. ONNX Runtime computes 16 at a time.
        check: Whether to run the file with ONNX Runtime on the example inputs, and to write it only if its outputs are
            those of the model.
        allow_untrained: Whether to write a sub-net that no step has trained.

    Raises:
        MissingExtraError: If the packages of the extra ``onnx`` are not installed.
        ConfigError: If there is no such sub-net or form, the sub-net was never trained, is none of pattern ``channel``
            and to be sliced, or is too large for one ONNX file, or the network cannot be run on the example inputs.
        ElasticFileError: If the sub-net does not fit the model.
        ActivationError: If it is to be sliced, and its weights were changed so that they read dropped units.
        SaveError: If the network cannot be exported, its outputs differ, or the file cannot be written; what stood at
            `path` is untouched.
    """
    for package in (*_ONNX_PACKAGES, *([_ONNX_RUNTIME] if check else [])):
        if importlib.util.find_spec(package) is None:
            raise missing_extra("export_onnx", package, "onnx")
    plain = export_model(source, name, model, form=form, multiple=multiple, allow_untrained=allow_untrained).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in plain.state_dict().values())
    if size > _LARGEST_ONNX:
        raise ConfigError(
            f"sub-net {name!r} has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB; call export_model and "
            "torch.onnx.export(..., external_data=True) on what it returns"
        )
    with torch.no_grad():
        expected = first_call(plain, example_inputs)
    args, kwargs = _arguments(example_inputs)

    def write(temporary: Path) -> None:
        try:
            torch.onnx.export(
                plain,
                args,
                temporary,
                kwargs=kwargs or None,
                dynamo=True,
                external_data=False,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
            )
        except OSError:
            raise
        except Exception as error:  # of many kinds, as below
            raise _not_expressed("torch.onnx", name, error) from error
        if check:
            _check_onnx(temporary, expected, example_inputs)

    atomic_write(path, write)


def export_program(
    source: SubNetSource,
    name: str,
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    form: str = "dense",
    multiple: int = 1,
    allow_untrained: bool = False,
) -> None:
    """Write one sub-net as a program of `torch.export`, in eval mode.

    ``torch.export.load(path).module()`` runs it, with torch alone. Its outputs on the example inputs are compared with
    the model's before it is written.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        model: The architecture; it is not changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments that the model accepts.
        path: Where to write, with the suffix ``.pt2``.
        dynamic_shapes: Which axes may vary, as `torch.export.export` understands it; None fixes all of them.
        form: ``dense``, or ``sliced``: without the dropped units of a channel sub-net.
        multiple: In the form ``sliced``, leave as many channels and hidden units of each group as make a multiple of
            this; those that are added have zeros as weights. Runtimes compute 8 or 16 at a time.
        allow_untrained: Whether to write a sub-net that no step has trained.

    Raises:
        ConfigError: If the suffix is another one, there is no such sub-net or form, or the sub-net was never trained or
            is none of pattern ``channel`` and to be sliced, or the network cannot be run on the example inputs.
        ElasticFileError: If the sub-net does not fit the model.
        ActivationError: If it is to be sliced, and its weights were changed so that they read dropped units.
        SaveError: If the network cannot be exported, its outputs differ, or the file cannot be written; what stood at
            `path` is untouched.
    """
    if file_path(path).suffix.lower() != ".pt2":
        raise ConfigError(f"path must end in .pt2, as torch.export calls its programs, got {os.fspath(path)!r}")
    plain = export_model(source, name, model, form=form, multiple=multiple, allow_untrained=allow_untrained).eval()
    with torch.no_grad():
        expected = first_call(plain, example_inputs)
    args, kwargs = _arguments(example_inputs)
    file = io.BytesIO()
    try:
        program = torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic_shapes)
        torch.export.save(program, file)
    except Exception as error:  # of many kinds, none of them documented
        raise _not_expressed("torch.export", name, error) from error
    with torch.no_grad():
        if not same_outputs(expected, call(program.module(), example_inputs)):
            raise SaveError(f"the exported program of sub-net {name!r} gives other outputs than the model")
    atomic_write_bytes(path, file.getvalue())


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _not_expressed(exporter: str, name: str, error: Exception) -> SaveError:
    return SaveError(
        f"{exporter} cannot express sub-net {name!r}: {error}; change what this names in the model (in those of "
        "Hugging Face often the cache: model.config.use_cache = False)"
    )


def _check_onnx(file: Path, expected: Any, example_inputs: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = [tensor.detach().cpu().numpy() for tensor in output_tensors(example_inputs)]
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(given):
        raise ConfigError(
            f"the exported file has {len(names)} inputs and example_inputs {len(given)} tensors, so its outputs cannot "
            "be compared; pass check=False and compare them yourself"
        )
    outputs = [torch.from_numpy(found) for found in session.run(None, dict(zip(names, given, strict=True)))]
    if not same_outputs([tensor.cpu() for tensor in output_tensors(expected)], outputs):
        raise SaveError("ONNX Runtime gives other outputs than the model; nothing was written")
