"""How the units of a space lie in its tensors: drafts of a channel group, the likeliest first.

The trace says which tensors belong together, not how indices correspond, and not which numbers of the modules count
units. Shapes settle most of it: a width of its own is one unit an index, twice that width is two parts, one attention
head is a block. What shapes leave open gives several drafts, and the proof (`ast_plugin.channel_search_proof`) decides.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ast_plugin.channel_search_copy import is_transposed_linear
from ast_plugin.channel_search_trace import CONVOLUTIONS, Space
from ast_plugin.channels import ChannelGroup, GroupAttribute, GroupAxis, Kind

Parts = tuple[tuple[int, int], ...]

_MOST_DRAFTS = 16
_HEAD_COUNTS = re.compile(r"^(?!.*(dim|size|group|idx|index|mask|channels)).*head", re.IGNORECASE)
_HEAD_WIDTHS = re.compile(
    r"^(all_head_size|all_head_dim|attn_dim|attention_dim|inner_dim|inner_size|split_size|kv_dim|q_dim|qkv_dim|q_size|"
    r"kv_size|query_dim|key_dim|value_dim|val_attn_dim|out_dim|proj_dim|projection_size)$"
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Obstacle(Exception):
    """Why no group can be made of a space."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Attention heads: `count` of queries, `shared` of keys and values, `size` indices each, `value` for values."""

    count: int
    shared: int
    size: int
    value: int


def drafts(model: nn.Module, space: Space) -> Iterator[ChannelGroup]:
    """Yield the groups that a space may be, the likeliest first.

    Args:
        model: The model (or a copy) with modules and shapes as they are sliced.
        space: With producers and consumers.

    Raises:
        Obstacle: If its tensors have no common unit.
    """
    return _Layout(model, space).drafts()


class _Layout:
    def __init__(self, model: nn.Module, space: Space) -> None:
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters())
        self._space = space
        self._rows = {path: self._width(path, "out") for path in space.producers}
        self._columns = {path: self._width(path, "in") for path in space.consumers}
        self._rows = {path: rows for path, rows in self._rows.items() if rows > 1}  # one row is broadcast
        self._columns = {path: columns for path, columns in self._columns.items() if columns > 1}
        if not self._rows or not self._columns:
            raise Obstacle("one channel only")
        self._heads = self._find_heads() if space.attention else None
        self._units = self._count_units()

    def drafts(self) -> Iterator[ChannelGroup]:
        kind: Kind = "heads" if self._heads else "hidden"
        if kind == "hidden" and any(isinstance(self._modules[path], CONVOLUTIONS) for path in self._rows):
            kind = "channels"
        choices = [
            *(self._of_producer(path) for path in self._rows),
            *(self._of_passing(path) for path in dict.fromkeys(self._space.passing)),
            *([self._of_tensor(name, self._parameters[name])] for name in self._space.parameters),
            *([self._of_tensor(name, tensor)] for name, tensor in self._loose_tensors()),
            *(self._of_consumer(path) for path in self._columns),
        ]
        # The same choice for all layers of one shape: what holds for one holds for its neighbours.
        most = max(len(choice) for choice in choices if choice)
        combinations = itertools.product(range(most), self._attributes())
        for number, attributes in itertools.islice(combinations, _MOST_DRAFTS):
            axes = [axis for choice in choices if choice for axis in choice[min(number, len(choice) - 1)]]
            yield ChannelGroup(
                name=next(iter(self._rows)),
                kind=kind,
                units=self._units,
                axes=tuple(dict.fromkeys(axes)),
                attributes=attributes,
            )

    def _width(self, path: str, side: str) -> int:
        weight = self._modules[path]._parameters.get("weight")
        if weight is None:
            raise Obstacle(f"{path} computes its weight from other tensors")
        return int(weight.shape[self._dim(path, side)])

    def _dim(self, path: str, side: str) -> int:
        module = self._modules[path]
        swapped = isinstance(module, _TRANSPOSED) or is_transposed_linear(module)
        return int((side == "in") != swapped)

    def _find_heads(self) -> Heads:
        count, size, value, shared = self._shapes_of_attention()
        width = max(self._columns.values())
        if count < 1 or width % count or any(other not in (width, count) for other in self._columns.values()):
            raise Obstacle("attention whose heads cannot be told from its shapes")
        value = value or width // count
        size = size or self._size_of_queries(count, value)
        usual = [{2 * size + value}, {size, value, size + value, 2 * size}, {size, value}][min(len(self._rows), 3) - 1]
        if any(rows not in {count, *(count * each for each in usual)} for rows in self._rows.values()):
            for fewer in (fewer for fewer in range(1, count) if count % fewer == 0):
                fused = count * size + fewer * (size + value)
                if any(rows in (fewer * size, fewer * value, fused) for rows in self._rows.values()):
                    shared = min(shared, fewer)
        if shared == 1 and count > 1:
            raise Obstacle("all of its heads share one key and value")
        return Heads(count, shared, size, value)

    def _size_of_queries(self, count: int, value: int) -> int:
        """Return the size of one head's query, where operations do not tell: from the rows that make queries."""
        rows = next(iter(self._rows.values()))
        per_head, rest = divmod(rows, count)
        if len(self._rows) == 1:
            per_head, odd = divmod(per_head - value, 2)
            rest += odd
        return per_head if per_head > 0 and not rest else value

    def _shapes_of_attention(self) -> tuple[int, int, int, int]:
        """Return heads, size of queries and of values (0: unknown), heads of keys, as the operations' tensors say."""
        for grad_fn in self._space.attention:
            if hasattr(grad_fn, "_saved_query"):
                query, key, value = grad_fn._saved_query, grad_fn._saved_key, grad_fn._saved_value
                if query.ndim == 4:
                    return query.shape[1], query.shape[-1], value.shape[-1], key.shape[1]
        for grad_fn in self._space.attention:
            if hasattr(grad_fn, "_saved_result") and grad_fn._saved_result.ndim == 4:
                count = grad_fn._saved_result.shape[1]
                return count, 0, 0, count
        counts = [value for _, name, value in self._numbers() if _HEAD_COUNTS.search(name)]
        return max(counts, default=0), 0, 0, max(counts, default=0)

    def _count_units(self) -> int:
        if self._heads:
            units = self._heads.shared
        else:
            blocks = [
                number
                for path in self._space.passing
                for number in (getattr(self._modules[path], name, 0) for name in ("groups", "num_groups"))
                if type(number) is int and number > 0
            ]
            widths = {*self._rows.values(), *self._columns.values()}
            units = math.gcd(min(widths), *blocks)
            if any(width % units for width in widths):
                raise Obstacle(f"widths {', '.join(map(str, sorted(widths)))} are no multiples of one another")
        if units < 2:
            raise Obstacle("nothing in it can be dropped by itself")
        return units

    def _of_producer(self, path: str) -> list[list[GroupAxis]]:
        dim, rows = self._dim(path, "out"), self._rows[path]
        if self._heads:
            options = _parts_of_heads(self._heads, rows, self._units)
        else:
            options = self._parts(rows, self._space.split)
        module = self._modules[path]
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        beside = [name for name, tensor in own if name != "weight" and tensor.shape[:1] == (rows,)]  # biases, gains
        return [
            [
                GroupAxis(tensor=f"{path}.weight", dim=dim, role="out", parts=parts),
                *(GroupAxis(tensor=f"{path}.{name}", dim=0, role="state", parts=parts) for name in beside),
            ]
            for parts in options
        ]

    def _of_consumer(self, path: str) -> list[list[GroupAxis]]:
        dim = self._dim(path, "in")
        options = [((0, self._columns[path] // self._units),)] if self._heads else self._parts(self._columns[path])
        return [[GroupAxis(tensor=f"{path}.weight", dim=dim, role="in", parts=parts)] for parts in options]

    def _of_passing(self, path: str) -> list[list[GroupAxis]]:
        module = self._modules[path]
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if isinstance(module, nn.Embedding) and (not self._heads or module.embedding_dim != self._heads.count):
            raise Obstacle(f"shares its channels with the embedding {path}")
        options: list[list[GroupAxis]] = [[], []]
        for name, tensor in own:
            full = f"{path}.{name}" if path else name
            for number, option in enumerate(options):
                option.extend(self._of_tensor(full, tensor, number))
        return options if options[0] != options[1] else options[:1]

    def _of_tensor(self, name: str, tensor: Tensor, option: int = 0) -> list[GroupAxis]:
        """Return the axis of a tensor in between: its last dimension that has a size which units have."""
        if not tensor.is_floating_point():
            return []
        dims = range(tensor.ndim)
        grouped = isinstance(self._modules[name.rpartition(".")[0]], CONVOLUTIONS)
        for dim in dims if grouped else reversed(dims):
            options = self._of_state(int(tensor.shape[dim]))
            if options:
                parts = options[min(option, len(options) - 1)]
                return [GroupAxis(tensor=name, dim=dim, role="state", parts=parts)]
        return []

    def _of_state(self, size: int) -> list[Parts]:
        if self._heads:
            heads = self._heads
            whole = {heads.count, heads.shared, *self._rows.values(), *self._columns.values()}
            fits = size in whole and size not in (heads.size, heads.value)
            return _parts_of_heads(heads, size, self._units) if fits else []
        if size in (*self._rows.values(), *self._columns.values()) or size == self._units:
            return self._parts(size, self._space.split)
        return []

    def _parts(self, size: int, split: bool = False) -> list[Parts]:
        """Return how `size` indices may hold the units: one after the other in parts, or in blocks."""
        times = size // self._units
        if times == 1:
            return [((0, 1),)]
        blocks: Parts = ((0, times),)
        narrow = min((*self._rows.values(), *self._columns.values()))
        if narrow == self._units or size == narrow:
            parts: Parts = tuple((number * self._units, 1) for number in range(times))
        else:  # grouped convolutions or norms, and parts
            parts = tuple((number * narrow, narrow // self._units) for number in range(size // narrow))
        return [parts, blocks] if split and size > narrow else [blocks, parts]

    def _loose_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers of attention modules that the trace does not show: biases put together."""
        if not self._heads:
            return
        home = self._home()
        widths = {*self._rows.values(), *self._columns.values(), self._heads.count * self._heads.size}
        for path, module in self._modules.items():
            if (
                not _within(path, home)
                or isinstance(module, (nn.Linear, *CONVOLUTIONS))
                or is_transposed_linear(module)
            ):
                continue
            if path in self._space.passing or not _holds_layers(module):
                continue
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                full = f"{path}.{name}" if path else name
                if full not in self._space.parameters and tensor.ndim == 1 and tensor.shape[0] in widths:
                    yield full, tensor

    def _home(self) -> str:
        """Return the path of the module that holds all layers of the group."""
        split = [path.split(".")[:-1] for path in (*self._rows, *self._columns)]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*split, strict=False))
        return ".".join(names[0] for names in shared)

    def _numbers(self) -> Iterator[tuple[str, str, int]]:
        """Yield path, name and value of the whole numbers that modules around the group's layers keep."""
        home = self._home()
        around = {path.rpartition(".")[0] for path in (*self._rows, *self._columns)} | {home}
        for path, module in self._modules.items():
            if not (_within(path, home) and (path in around or any(_within(inner, path) for inner in around))):
                continue
            for name, value in vars(module).items():
                if type(value) is int and value > 1 and not name.startswith("_"):
                    yield path, name, value

    def _attributes(self) -> list[tuple[GroupAttribute, ...]]:
        """Return sets of numbers that may have to follow the units, the likeliest first."""
        always = []
        for path in dict.fromkeys(self._space.passing):
            for name in ("groups", "num_groups"):
                value = getattr(self._modules[path], name, None)
                if type(value) is int and value > 1 and value % self._units == 0:
                    always.append(GroupAttribute(module=path, name=name, per_unit=value // self._units))
        for path, rows in self._rows.items():
            if is_transposed_linear(self._modules[path]):
                always.append(GroupAttribute(module=path, name="nf", per_unit=rows // self._units))
        widths = {*self._rows.values(), *self._columns.values()}
        counts: list[GroupAttribute] = []
        sizes: list[GroupAttribute] = []
        others: list[GroupAttribute] = []
        for path, name, value in self._numbers():
            attribute = GroupAttribute(module=path, name=name, per_unit=max(1, value // self._units))
            if value % self._units:
                continue
            if self._heads and value in (self._heads.count, self._heads.shared) and _HEAD_COUNTS.search(name):
                counts.append(attribute)
            elif value in widths:
                (sizes if self._heads and _HEAD_WIDTHS.search(name) else others).append(attribute)
        sets = [[*always, *counts, *sizes], [*always, *counts, *sizes, *others], [*always, *counts], always]
        return list(dict.fromkeys(tuple(dict.fromkeys(chosen)) for chosen in sets))


def _parts_of_heads(heads: Heads, size: int, units: int) -> list[Parts]:
    """Return how heads may lie in a dimension of `size`: queries, keys and values alone, or fused."""
    per_unit = heads.count // units
    query, key, value = per_unit * heads.size, heads.size, heads.value
    alone = (heads.count, heads.shared, *(units * block for block in (query, per_unit * value, key, value)))
    if size in alone:
        return [((0, size // units),)]
    for fused in ((query, key, value), (query, query, value), (key, value), (query, query)):
        if size == units * sum(fused):
            starts = [0, *itertools.accumulate(units * block for block in fused)]
            return [tuple(zip(starts, fused, strict=False)), ((0, size // units),)]
    if size % units:
        raise Obstacle(f"{units} heads in {size} rows")
    return [((0, size // units),)]


def _within(path: str, home: str) -> bool:
    return not home or path == home or path.startswith(f"{home}.")


def _holds_layers(module: nn.Module) -> bool:
    children: Sequence[Any] = list(module.children())
    return any(isinstance(child, (nn.Linear, *CONVOLUTIONS)) or is_transposed_linear(child) for child in children)
