"""What `inference.py` measures: networks as PyTorch, ONNX Runtime and OpenVINO run them, in turn on one thread."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.compile_linear import SparseLinear
from ast_plugin.export import SubNetSource
from ast_plugin.export_graph import export_onnx

EAGER, ONNX, OPENVINO = "PyTorch", "ONNX Runtime", "OpenVINO"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One network in one engine.

    Attributes:
        engine: What runs it.
        name: What it is.
        run: Computes one batch.
        dense: Whether it is dense in float32: the fastest of these in an engine is what all others there are compared
            with.
        at_least: The factor that is wanted, None where none is.
    """

    engine: str
    name: str
    run: Callable[[], Any]
    dense: bool = False
    at_least: float | None = None


def eager(
    name: str, model: nn.Module, inputs: Tensor, *, dense: bool = False, at_least: float | None = None
) -> Contender:
    """Return a module as PyTorch runs it."""

    def run() -> object:
        with torch.inference_mode():
            return model(inputs)

    return Contender(engine=EAGER, name=name, run=run, dense=dense, at_least=at_least)


def exported(
    source: SubNetSource,
    sub_net: str,
    model: nn.Module,
    inputs: Tensor,
    path: Path,
    *,
    form: str = "dense",
    multiple: int = 1,
) -> Path:
    """Write a sub-net as ONNX, its outputs compared with the model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter and its packages speak about themselves
        export_onnx(source, sub_net, model, inputs, path, form=form, multiple=multiple)
    return path


def onnx_runtime(
    name: str, path: Path, inputs: Tensor, *, dense: bool = False, at_least: float | None = None
) -> Contender:
    """Return an ONNX file as ONNX Runtime runs it on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: inputs.numpy()}
    return Contender(engine=ONNX, name=name, run=lambda: session.run(None, given), dense=dense, at_least=at_least)


def openvino(name: str, path: Path, inputs: Tensor, *, dense: bool = False) -> list[Contender]:
    """Return an ONNX file as OpenVINO runs it on one thread; none where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return []
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    given = inputs.numpy()
    return [Contender(engine=OPENVINO, name=name, run=lambda: compiled(given), dense=dense)]


class WrongWayRound(nn.Module):
    """A linear layer as ``F.linear`` with a compressed weight, which is what not to do."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer returns, in more time."""
        tokens = input.reshape(-1, input.shape[-1])
        with torch.inference_mode(False), torch.no_grad():  # it transposes the weight, which torch refuses otherwise
            output = functional.linear(tokens.clone(), self.layer.weight, self.layer.bias)
        return output.view(*input.shape[:-1], -1)


def wrong_way_round(model: nn.Module) -> nn.Module:
    """Turn all compressed layers of a model round, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, WrongWayRound(module))
    return model


def measure(contenders: Sequence[Contender], *, rounds: int, warmup: int = 2) -> list[dict[str, Any]]:
    """Run all contenders in turn, the order rotated, and return medians of processor time.

    Args:
        contenders: What to measure; in each engine at least one is dense.
        rounds: Runs of each that count.
        warmup: Runs of each before those.

    Returns:
        For each, engine by engine: ``engine``, ``name``, ``ms``, and ``factor``, the median over the rounds of the time
        of the engine's fastest dense contender by its own, with the quartiles ``low`` and ``high``; ``at_least``, None
        where nothing is wanted.
    """
    times: dict[int, list[float]] = {index: [] for index in range(len(contenders))}
    gc.collect()
    for number in range(warmup + rounds):
        for step in range(len(contenders)):
            index = (number + step) % len(contenders)
            began = time.process_time()
            contenders[index].run()
            took = time.process_time() - began
            if number >= warmup:
                times[index].append(took)
    best = {
        engine: min(
            (index for index, other in enumerate(contenders) if other.engine == engine and other.dense),
            key=lambda index: statistics.median(times[index]),
        )
        for engine in dict.fromkeys(contender.engine for contender in contenders)
    }
    rows = []
    for index, contender in enumerate(contenders):
        ratios = [dense / own for dense, own in zip(times[best[contender.engine]], times[index], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (ratios[0],) * 3
        rows.append(
            {
                "engine": contender.engine,
                "name": contender.name,
                "ms": 1000 * statistics.median(times[index]),
                "factor": statistics.median(ratios),
                "low": low,
                "high": high,
                "at_least": contender.at_least,
            }
        )
    engines = list(best)
    return sorted(rows, key=lambda row: engines.index(row["engine"]))
