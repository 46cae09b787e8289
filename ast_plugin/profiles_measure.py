"""What a ready network costs: time of a call, bytes in memory and in a file. And one memory for what is equal."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.compile_timing import describe_inputs
from ast_plugin.errors import ConfigError
from ast_plugin.report_flops import run_on

Runnable = Callable[..., Any]
Clock = Callable[[], float]


def measure_latency(
    functions: Sequence[Runnable], example_inputs: Any, *, runs: int, warmup: int, clock: Clock
) -> list[list[float]]:
    """Time calls of several networks in turn, so that a change of the machine's load meets all of them alike.

    A call is over when its answer is there: work on accelerators is waited for. Gradients are off (inference mode).

    Args:
        functions: The networks, in eval mode.
        example_inputs: As in `ast_plugin.report_flops.run_on`; on the networks' device.
        runs: Timed calls of each, at least 1.
        warmup: Calls of each before, at least 0.
        clock: Seconds that pass, such as `time.perf_counter`.

    Returns:
        The times of each network's calls in milliseconds, in order.

    Raises:
        ConfigError: If a network cannot be run on the example; its own error is chained.
    """
    finish = [waiting(function) for function in functions]
    times: list[list[float]] = [[] for _ in functions]
    try:
        with torch.inference_mode():
            for turn in range(warmup + runs):
                for function, finished, found in zip(functions, finish, times, strict=True):
                    started = clock()
                    run_on(function, example_inputs)
                    finished()
                    if turn >= warmup:
                        found.append(1000 * (clock() - started))
    except Exception as error:
        raise ConfigError(
            f"example_inputs ({describe_inputs(example_inputs)}) cannot be run through the network: "
            f"{type(error).__name__}: {error}; give a tensor, a tuple of arguments or a mapping of keyword arguments "
            "that it accepts, on its device"
        ) from error
    return times


def waiting(function: Runnable) -> Callable[[], None]:
    """Return what waits for the work that a network has queued on accelerators; nothing to do on the CPU.

    Args:
        function: The network; the devices of its tensors count.
    """
    devices = {tensor.device for _, tensor in _tensors(function) if tensor.device.type not in ("cpu", "meta")}
    if not devices:
        return _nothing

    def wait() -> None:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # other threads' streams are left alone
            else:
                torch.get_device_module(device).synchronize()

    return wait


def _nothing() -> None:
    """Do nothing."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of `values` that at least `share` of them do not exceed.

    Args:
        values: At least one.
        share: In (0, 1]; 0.5 of an even number of values gives the lower one of the two in the middle.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    return float(statistics.median(values))


def memory_bytes(networks: Iterable[Runnable]) -> int:
    """Return the bytes of all tensors of some networks; memory that several tensors use counts once.

    Args:
        networks: Modules; what is no module counts for nothing.
    """
    found: dict[tuple[torch.device, int], int] = {}
    for network in networks:
        for _, tensor in _tensors(network):
            for part in _parts(tensor):
                storage = part.untyped_storage()
                found[part.device, storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def file_bytes(network: Runnable) -> int | None:
    """Return the size of the file that `torch.save` makes of a network's state dict; None for what is no module."""
    if not isinstance(network, nn.Module):
        return None
    counter = _ByteCounter()
    torch.save(network.state_dict(), counter)  # type: ignore[arg-type]  # all it does is write
    return counter.count


def share_memory(networks: Iterable[Runnable]) -> None:
    """Let tensors of the same name and equal values in several modules use one memory.

    Every tensor stays an object of its own and points to the first network's memory from then on. So the networks must
    not be trained, and must not write into their tensors when they run.

    Args:
        networks: Modules with dense tensors, sparse ones being left as they are; what is no module is passed over.
    """
    first: dict[tuple[Any, ...], list[Tensor]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for network in networks:
            for name, tensor in _tensors(network):
                plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
                if not plain or tensor.is_inference() or tensor.is_meta:
                    continue
                known = first.setdefault((name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device), [])
                same = next((other for other in known if _identical(other, tensor)), None)
                if same is None:
                    known.append(tensor)
                elif same.data_ptr() != tensor.data_ptr():
                    tensor.data = same.data


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads for the length of a ``with`` block; None leaves it as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _identical(left: Tensor, right: Tensor) -> bool:
    """Return whether all values are equal, the sign of zeros included."""
    if not torch.equal(left, right):
        return False
    return not left.dtype.is_floating_point or torch.equal(torch.signbit(left), torch.signbit(right))


def _tensors(network: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module by name: parameters, buffers and plain attributes, each object once."""
    if not isinstance(network, nn.Module):
        return
    seen: set[int] = set()
    for path, module in network.named_modules():
        places: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, value in place.items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}", value


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor consists of."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [tensor]


class _ByteCounter(io.RawIOBase):
    """A file that only counts what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size
