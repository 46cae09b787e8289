"""Exact selection of the largest of many scores, without sorting them.

All functions share one order of scores: larger is better, equal scores go to the lower index (so counts are always
exact, which a threshold alone cannot promise), -0.0 equals 0.0, and NaN is worse than everything, -inf included.

On the CPU a small sample gives a bracket around the wanted rank; one pass in cache-sized blocks counts what lies above
the bracket and gathers the few scores inside it, among which the threshold is then found. The sample decides only how
much is gathered, never the result: a bracket that misses is widened. For the 23.4 million prunable weights of a
ResNet-50 this costs a twentieth of what torch.kthvalue does (see benchmarks/mask_update.py). Other devices sort.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ast_plugin.errors import ConfigError

_Scores = NDArray[np.floating]
_Flags = NDArray[np.bool_]

_BLOCK = 1 << 17  # scores per block: with its flags well inside a level-2 cache
_GATHER_ALL = 1 << 13  # fewer scores than this are not worth a sample
_LEAST_SAMPLE = 1 << 10
_SAMPLE_SCALE = 1.5  # times n^(2/3), where drawing the sample and gathering the bracket cost about the same
_GOLDEN = (math.sqrt(5) - 1) / 2
_WIDTHS = (3.0, 12.0, math.inf)  # half-widths to try for the bracket, in standard deviations of the sample's rank


def keep_largest(scores: Tensor, count: int, *, among: Tensor | None = None) -> Tensor:
    """Mark the `count` largest scores.

    Args:
        scores: Any floating dtype, 1-D (n,), any values. Not changed.
        count: How many to mark, in [0, n], or in [0, number of True in `among`].
        among: Bool (n,); only these may be marked. None: all of them.

    Returns:
        Bool (n,), on the device of `scores`, exactly `count` True.

    Raises:
        ConfigError: If `scores` is not a floating vector, or `count` is out of range.
    """
    _check_scores(scores)
    total = scores.numel() if among is None else count_kept(among)
    _check_count(count, total)
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count == total:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device) if among is None else among.clone()
    if scores.device.type != "cpu":
        return _keep_largest_sorted(scores, count, among)
    array, flags = _as_array(scores), None if among is None else among.detach().numpy()
    cut = _cut([array], count, total, flags)
    return torch.from_numpy(_flags_above(array, flags, cut, count))


def kth_largest(chunks: Sequence[Tensor], count: int) -> tuple[float, int]:
    """Find the `count`-th largest score of several vectors taken together.

    Args:
        chunks: Floating vectors, of any lengths, all on one device. Not changed.
        count: Rank from 1, at most the number of scores in all.

    Returns:
        The score of that rank (NaN if all better ones are used up), and how many scores are strictly better.

    Raises:
        ConfigError: If a chunk is not a floating vector, or `count` is out of range.
    """
    cut = _cut_of(chunks, count, least=1)
    return float(cut.value), sum(cut.better)


def counts_above_global_threshold(chunks: Sequence[Tensor], count: int) -> list[int]:
    """Return how many of the `count` largest scores of all vectors together lie in each of them.

    Args:
        chunks: Floating vectors, of any lengths, all on one device. Not changed.
        count: How many scores to take in all, in [0, number of scores].

    Returns:
        One number a chunk, `count` in sum; equal scores go to the earlier chunk.

    Raises:
        ConfigError: If a chunk is not a floating vector, or `count` is out of range.
    """
    if count == 0:
        return [0] * len(chunks)
    if count == sum(chunk.numel() for chunk in chunks):
        return [chunk.numel() for chunk in chunks]
    cut = _cut_of(chunks, count)
    counts, left = [], count - sum(cut.better)
    for better, equal in zip(cut.better, cut.equal, strict=True):
        ties = min(equal, left)
        left -= ties
        counts.append(better + ties)
    return counts


def count_kept(mask: Tensor) -> int:
    """Return the number of True in a bool tensor, several times faster on the CPU than ``mask.sum()``."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.detach().numpy()))
    return int(mask.sum())


def ordered_keys(scores: Tensor) -> Tensor:
    """Turn scores into integers in the order of this module, so that plain comparisons see no NaN and no -0.0.

    Args:
        scores: Any floating dtype, any shape. Not changed.

    Returns:
        int32 (int64 for float64), same shape. The least two integers are special: NaN gets the second, and the
        least itself stays free for "not to be chosen at all".
    """
    wide = scores.detach()
    wide = wide if wide.dtype in (torch.float32, torch.float64) else wide.float()
    integer = torch.int32 if wide.dtype == torch.float32 else torch.int64
    least = torch.iinfo(integer)
    # + 0.0 turns -0.0 into 0.0. Negative floats count downwards in their bits, so all but the sign is flipped.
    bits = (wide + 0.0).view(integer)
    keys = bits ^ ((bits >> (least.bits - 1)) & least.max)
    return keys.masked_fill_(wide.isnan(), least.min + 1)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Where the wanted rank lies: its score, and how many scores of each chunk are better or equal."""

    value: np.floating | float
    better: list[int]
    equal: list[int]


def _cut_of(chunks: Sequence[Tensor], count: int, least: int = 0) -> _Cut:
    for chunk in chunks:
        _check_scores(chunk)
    total = sum(chunk.numel() for chunk in chunks)
    _check_count(count, total, least)
    if any(chunk.device.type != "cpu" for chunk in chunks):
        return _cut_sorted(chunks, count)
    return _cut([_as_array(chunk) for chunk in _alike(chunks)], count, total)


def _cut(arrays: Sequence[_Scores], count: int, total: int, flags: _Flags | None = None) -> _Cut:
    """Find the cut below the `count` largest of `total` scores (those flagged, where there is one array with flags)."""
    for width in _WIDTHS if total > _GATHER_ALL else _WIDTHS[-1:]:
        low, high = _bracket(arrays, count / total, width, total, flags)
        better, inside, gathered = _sift(arrays, low, high, flags)
        need = count - sum(better)
        if not 0 < need <= sum(inside):
            continue
        if low == high:
            return _Cut(low, better, inside)
        together = np.concatenate(gathered)
        value = np.partition(together, together.size - need)[together.size - need]
        equal = [int(np.count_nonzero(values == value)) for values in gathered]
        return _Cut(value, [b + int(np.count_nonzero(v > value)) for b, v in zip(better, gathered, strict=True)], equal)
    # The last bracket holds everything but NaN, and still was not enough.
    valid = [i + b for i, b in zip(inside, better, strict=True)]
    missing = [(a.size if flags is None else int(np.count_nonzero(flags))) for a in arrays]
    return _Cut(math.nan, valid, [m - v for m, v in zip(missing, valid, strict=True)])


def _bracket(
    arrays: Sequence[_Scores], share: float, width: float, total: int, flags: _Flags | None
) -> tuple[np.floating | float, np.floating | float]:
    """Return two scores that the cut most likely lies between, for the best `share` of all scores."""
    if width == math.inf:
        return -math.inf, math.inf
    sizes = [array.size for array in arrays]
    length = sum(sizes)
    wanted = max(_LEAST_SAMPLE, int(_SAMPLE_SCALE * total ** (2 / 3)))
    # One position from each of `drawn` equal stretches, at a place that shifts by the golden ratio: weights come in
    # rows and kernels, and a constant stride could meet always the same place of them.
    drawn = min(length, wanted * length // total)
    order = np.arange(drawn, dtype=np.float64)
    shift = order * _GOLDEN
    positions = ((order + shift - np.floor(shift)) * (length / drawn)).astype(np.int64)
    if flags is not None:
        positions = positions[flags[positions]]
    stops = np.searchsorted(positions, np.cumsum(sizes))
    parts, start, offset = [], 0, 0
    for array, stop in zip(arrays, stops, strict=True):
        parts.append(array[positions[start:stop] - offset])
        start, offset = stop, offset + array.size
    sample = np.concatenate(parts)
    sample[np.isnan(sample)] = -math.inf
    rank = share * sample.size
    reach = width * math.sqrt(sample.size * share * (1 - share)) + 2
    first, last = math.floor(rank - reach), math.ceil(rank + reach)
    ends = [sample.size - 1 - rank for rank in (last, first) if 0 <= rank < sample.size]
    if ends:
        sample.partition(ends)
    low = sample[sample.size - 1 - last] if last < sample.size else -math.inf
    high = sample[sample.size - 1 - first] if first >= 0 else math.inf
    return low, high


def _sift(
    arrays: Sequence[_Scores], low: np.floating | float, high: np.floating | float, flags: _Flags | None
) -> tuple[list[int], list[int], list[_Scores]]:
    """Count the scores above `high` and in [low, high] by array, and gather the latter unless they are all equal."""
    above_buffer, inside_buffer = np.empty(_BLOCK, dtype=np.bool_), np.empty(_BLOCK, dtype=np.bool_)
    better, inside_counts, gathered = [], [], []
    for array in arrays:
        above_count, inside_count = 0, 0
        values = [array[:0]]
        for start in range(0, array.size, _BLOCK):
            block = array[start : start + _BLOCK]
            above, inside = above_buffer[: block.size], inside_buffer[: block.size]
            np.greater(block, high, out=above)
            np.greater_equal(block, low, out=inside)
            if flags is not None:
                np.logical_and(above, flags[start : start + _BLOCK], out=above)
                np.logical_and(inside, flags[start : start + _BLOCK], out=inside)
            np.not_equal(inside, above, out=inside)
            above_count += int(np.count_nonzero(above))
            if low == high:
                inside_count += int(np.count_nonzero(inside))
            else:
                values.append(block[np.flatnonzero(inside)])
        better.append(above_count)
        gathered.append(np.concatenate(values))
        inside_counts.append(inside_count if low == high else gathered[-1].size)
    return better, inside_counts, gathered


def _flags_above(array: _Scores, flags: _Flags | None, cut: _Cut, count: int) -> _Flags:
    """Flag what is better than the cut, and of the scores equal to it the first ones, `count` in all."""
    ties = count - cut.better[0]
    nan = math.isnan(cut.value)
    if nan:
        chosen = ~np.isnan(array)
    elif ties == cut.equal[0]:
        chosen = array >= cut.value
    else:
        chosen = array > cut.value
    if flags is not None:
        np.logical_and(chosen, flags, out=chosen)
    if nan or ties < cut.equal[0]:
        for start in range(0, array.size, _BLOCK):
            block = array[start : start + _BLOCK]
            equal = np.isnan(block) if nan else block == cut.value
            if flags is not None:
                equal &= flags[start : start + _BLOCK]
            indices = np.flatnonzero(equal)[:ties]
            chosen[start + indices] = True
            ties -= indices.size
            if ties == 0:
                break
    return chosen


def _keep_largest_sorted(scores: Tensor, count: int, among: Tensor | None) -> Tensor:
    keys = ordered_keys(scores)
    if among is not None:
        keys.masked_fill_(~among, torch.iinfo(keys.dtype).min)
    # Sorting, because kthvalue refuses to run on CUDA where deterministic algorithms are asked for.
    value = torch.sort(keys).values[keys.numel() - count]
    chosen, equal = keys > value, keys == value
    return chosen | (equal & (equal.cumsum(0) <= count - chosen.sum()))


def _cut_sorted(chunks: Sequence[Tensor], count: int) -> _Cut:
    keys = [ordered_keys(chunk) for chunk in _alike(chunks)]
    together = torch.cat(keys)
    value, index = (found[together.numel() - count] for found in torch.sort(together))
    score = torch.cat([chunk.detach() for chunk in chunks])[index]
    counts = torch.stack([torch.stack([(key > value).sum(), (key == value).sum()]) for key in keys]).tolist()
    return _Cut(float(score), [better for better, _ in counts], [equal for _, equal in counts])


def _alike(chunks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the chunks in float64 if some of them are: others hold what float32 holds, so all can be compared."""
    double = [chunk.dtype == torch.float64 for chunk in chunks]
    return [chunk.double() for chunk in chunks] if any(double) and not all(double) else chunks


def _as_array(scores: Tensor) -> _Scores:
    wide = scores.detach()
    wide = wide if wide.dtype in (torch.float32, torch.float64) else wide.float()
    array: _Scores = np.ascontiguousarray(wide.numpy())
    return array


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ConfigError(
            f"scores must be a floating-point vector, got dtype {scores.dtype} and shape {tuple(scores.shape)}; "
            "flatten them, or cast them to float32"
        )


def _check_count(count: int, total: int, least: int = 0) -> None:
    if not least <= count <= total:
        raise ConfigError(f"count must lie in [{least}, {total}], the number of scores to choose from, got {count}")
