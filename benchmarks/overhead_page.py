"""The figures of `overhead.py` as tables, and as the page ``docs/cost.md``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ast_plugin.report_text import TextTable, plain_table
from overhead_contenders import EIGHT, EIGHT_OFF, FREEZE, OFF, OURS, SINGLE
from overhead_limits import ABSENT, LIMITS, Results, added, growth, measured, summary
from overhead_memory import FINAL
from overhead_timing import EVENTS

_EVENT_NAMES = dict(
    zip(
        EVENTS,
        (
            "before forward: put the sub-net on",
            "after forward",
            "backward begins",
            "a gradient is accumulated (updates only)",
            "backward ends: sub-net off, gradients masked",
            "before the optimizer's step: correction",
            "after it: statistics, next sub-net",
        ),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        heading: Its title.
        text: What stands before the table, as Markdown.
        table: The figures.
        notes: Paragraphs after it.
    """

    heading: str
    text: str
    table: TextTable
    notes: tuple[str, ...] = ()


def sections(results: Results) -> list[Section]:
    """Return everything that was measured."""
    parts = [Section(heading="Limits", text=_LIMITS_TEXT, table=summary(results))]
    if "steps" in results:
        parts += [
            _steps(results["steps"], results.get("peers", {})),
            _events(results["steps"]),
            _growth(results["steps"]),
        ]
    if "memory" in results:
        parts.append(_memory(results["memory"]))
    if "mask_update" in results:
        parts.append(_mask_update(results["mask_update"]))
    if "runs" in results:
        parts.append(_runs([results[name] for name in ("runs", "short_runs") if name in results]))
    if {"frontier", "steps", "memory"} <= set(results):
        parts.append(_frontier(results))
    return parts


def _steps(steps: Results, peers: Mapping[str, str]) -> Section:
    names = list(dict.fromkeys(name for step in steps.values() for name in step["contenders"]))
    rows = []
    for name in names:
        cells = []
        for step in steps.values():
            found = step["contenders"].get(name)
            if found is None:
                cells.append(ABSENT)
                continue
            ratio = found["ratio"]
            inside = f"; {100 * added(step, name):.2f} %" if found["hooks_ms"] else ""
            cells.append(f"{ratio['cpu']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f}){inside}")
        rows.append((name, *cells))
    plain = tuple(f"{step['plain_ms']:.0f} ms" for step in steps.values())
    notes = tuple(dict.fromkeys(note for step in steps.values() for note in step["notes"]))
    if peers:
        shown = ", ".join(f"{package} {version}" for package, version in peers.items())
        notes = (f"Others: {shown}, installed by `pip install --no-deps {' '.join(peers)}`.", *notes)
    rounds = next(iter(steps.values()))["rounds"]
    return Section(
        heading="A step",
        text=_STEPS_TEXT.format(rounds=rounds),
        table=TextTable(title="A step", columns=("", *steps), rows=(("plain step", *plain), *rows)),
        notes=notes,
    )


def _events(steps: Results) -> Section:
    rows = []
    for event in (*EVENTS, "all"):
        shares = [step["contenders"][OURS]["hooks_ms"].get(event) for step in steps.values()]
        if any(shares):
            cells = [
                ABSENT if share is None else f"{1000 * share:.0f} µs ({100 * share / step['plain_ms']:.3f} %)"
                for share, step in zip(shares, steps.values(), strict=True)
            ]
            rows.append((_EVENT_NAMES.get(event, "in all"), *cells))
    return Section(
        heading="Where the time goes",
        text="Time inside real steps in each of the package's hooks, with three sub-nets and the correction on, and "
        "its share of the plain step.",
        table=TextTable(title="Where the time goes", columns=("", *steps), rows=tuple(rows)),
    )


def _growth(steps: Results) -> Section:
    rows = [
        (name, *(f"{100 * added(step, name):.3f} %" for step in steps.values()))
        for name in (SINGLE, EIGHT_OFF, EIGHT, OFF, OURS, FREEZE)
    ]
    rows.append(
        ("growth, 1 to 8 sub-nets, correction off", *(f"{100 * growth(step):.3f} %" for step in steps.values()))
    )
    rows.append(
        (
            "growth, 1 to 8 sub-nets, with what the correction takes",
            *(f"{100 * growth(step, EIGHT):.3f} %" for step in steps.values()),
        )
    )
    return Section(
        heading="More sub-nets",
        text=_GROWTH_TEXT,
        table=TextTable(title="More sub-nets", columns=("added to a plain step", *steps), rows=tuple(rows)),
    )


def _memory(memory: Results) -> Section:
    states = list(dict.fromkeys(state for found in memory.values() for state in found))
    rows = [
        (
            state,
            *(f"{found[state][kind]:.1f}" for found in memory.values() for kind in ("between", "peak")),
        )
        for state in states
    ]
    columns = [f"{network}, {kind}" for network in memory for kind in ("between steps", "at the peak")]
    return Section(
        heading="Memory",
        text=_MEMORY_TEXT,
        table=TextTable(title="Memory", columns=("bytes per prunable parameter", *columns), rows=tuple(rows)),
    )


def _mask_update(found: Results) -> Section:
    rows = [
        (sparsity, f"{parts['update']:.0f}", f"{parts['forms']:.0f}", f"{sum(parts.values()):.0f}")
        for sparsity, parts in found["ms"].items()
    ]
    return Section(
        heading="A mask update",
        text=_UPDATE_TEXT.format(millions=found["weights"] / 1e6),
        table=TextTable(
            title="A mask update", columns=("sparsity reached", "new masks", "their form", "in all"), rows=tuple(rows)
        ),
    )


def _runs(runs: Sequence[Results]) -> Section:
    rows = [
        (name, *(shown.format(found[key]) for found in runs))
        for name, key, shown in (
            ("three sub-nets / one sparse net", "ratio", "{:.4f}"),
            ("the same from the time in hooks alone", "by_hooks", "{:.4f}"),
            ("three sub-nets / one sparse net, computed for 10,000 steps", "long", "{:.4f}"),
            ("three sub-nets / dense training", "to_dense", "{:.4f}"),
            ("mask updates, three sub-nets", "updates", "{}"),
            ("mask updates, one sparse net", "updates_single", "{}"),
        )
    ]
    return Section(
        heading="A whole run",
        text=_RUNS_TEXT.format(batch=runs[0]["batch"]),
        table=TextTable(
            title="A whole run",
            columns=("ratio or count", *(f"{found['steps']} steps" for found in runs)),
            rows=tuple(rows),
        ),
    )


def _frontier(results: Results) -> Section:
    rows = []
    for label, forms in results["frontier"].items():
        step, network = results["steps"].get(label), label.partition(",")[0]
        rows += [
            (label, form, f"{100 * figures['added']:.2f} %", f"{figures['bytes']:.1f}")
            for form, figures in forms.items()
        ]
        states = results["memory"].get(network)
        if step is not None and states is not None:
            rows += [
                (label, name, f"{100 * added(step, contender):.2f} %", f"{states[state]['between']:.1f}")
                for name, contender, state in (
                    ("ours, correction off", OFF, "final masks, correction off"),
                    ("ours", OURS, FINAL),
                )
            ]
    return Section(
        heading="Time against memory",
        text=_missed(results) + _FRONTIER_TEXT,
        notes=(_REFERENCE,),
        table=TextTable(
            title="Time against memory",
            columns=("", "masks held as", "added to a step", "bytes per prunable parameter"),
            rows=tuple(rows),
        ),
    )


def _missed(results: Results) -> str:
    found = measured(results)
    missed = [
        f"{limit.measure} ({limit.shown(found[key])}, aim {'none' if limit.none else limit.shown(limit.aim)})"
        for key, limit in LIMITS.items()
        if key in found and found[key] > limit.aim
    ]
    return f"Aims not reached: {'; '.join(missed)}. {_WHY}\n\n" if missed else "All aims are reached.\n\n"


def text(results: Results) -> str:
    """Return all tables for the terminal, the limits last."""
    first, *rest = sections(results)
    return "\n\n".join(plain_table(section.table) for section in (*rest, first))


def page(results: Results) -> str:
    """Return ``docs/cost.md``."""
    head = _HEAD.format(torch=results["torch"])
    if results.get("quick"):
        head += "\n**A quick run with tiny shapes: these figures say nothing about real training.**\n"
    blocks = [
        f"## {section.heading}\n\n{section.text}\n\n{_markdown(section.table)}\n"
        + "".join(f"\n{note}\n" for note in section.notes)
        for section in sections(results)
    ]
    return head + "\n" + "\n".join(blocks)


def _markdown(table: TextTable) -> str:
    lines = [table.columns, ("---",) + ("---:",) * (len(table.columns) - 1), *table.rows]
    return "\n".join(f"| {' | '.join(_cells(line))} |" for line in lines)


def _cells(line: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in line]


_HEAD = """# What it costs

Written by `benchmarks/overhead.py --markdown` from `benchmarks/results/overhead.json`; do not edit. torch
{torch}, one thread, processor time, synthetic data. ResNet-32 has CIFAR's shape and batches of 128, ViT-tiny
pictures of 64 pixels and batches of 32. Sub-nets are 90, 95 and 98 % sparse, their masks final, the correction
on, unless a row says otherwise.
"""

_LIMITS_TEXT = """\
The worst of the optimizers stands here for steps, the worst of both networks between steps with final masks for
memory (ramps and peaks are in the table of memory), the worst point of the ramp for the mask update.
Time added to a step is what the package's hooks take inside real steps; a ratio of whole steps cannot resolve
tenths of a percent."""

_STEPS_TEXT = """\
All contenders step in turn within one process, the order rotated every round; medians over {rounds} rounds of
the ratio to the plain step of the same round, with quartiles; after the semicolon the time inside the package's
hooks as a share of the plain step. Clipped steps are compared with plain clipped steps. Networks of others are
90 % sparse. Their mask updates lie outside the measured steps, as ours do. `rigl-torch` also prunes what it
takes for layers, norms included; joint training sends the batch through all three sub-nets and shares
BatchNorm."""

_GROWTH_TEXT = """\
Eight sub-nets of 90 % each against one, so that nothing but their number differs. A single sub-net has no
previous gradient to correct against and no private BatchNorm state to exchange, so the limit is held against the
runs without correction. With it, eight sub-nets cost more than one by the whole correction; of eight steps seven are
corrected, of three two."""

_MEMORY_TEXT = """\
Three sub-nets. Between steps: the bytes of all tensors and arrays that are alive, less those of plain training;
gradients, optimizer state and the model are in both. At the peak: that, and the most that the package's hooks
have allocated at any moment within a step. SGD with momentum; BatchNorm's private copies are included. In a
mask update numpy's peak and torch's are added, an upper bound."""

_UPDATE_TEXT = """\
One update of one sub-net by GraNet, {millions:.1f} million prunable weights in the shapes of a ResNet-50, along
the ramp to 90 %; medians in ms. The second column is what the next step pays once to bring the new masks into the
form in which they are applied. `benchmarks/mask_update.py` takes the update apart."""

_RUNS_TEXT = """\
ResNet-32, SGD, batch {batch}, from the first step to the last, by the default schedule; the runs step in turn, and
their processor time is added up. The first column is held against the limit. The number of mask updates does not
depend on the length of the run, so a longer run pays less for them: the third row takes the measured cost of plain
steps, hooks and updates for as many updates in 10,000 steps."""

_WHY = """\
Steps are bound by memory, not by arithmetic: a sub-net is put on by reading the dense weights, writing them to a
copy and writing zeros, taken off by reading the copy and writing the weights, and its gradients are read and
written once. For the 5.3 million weights of ViT-tiny that is about 7 ms on a core that copies 21 MB in 1.7 ms,
3 % of a step, before any bookkeeping; the float masks of the table are as quick as it gets, at 16 bytes a
weight. In ResNet-32 the convolutions leave nothing of the package in the processor's caches, so that its calls
take two to three times what they take in a loop; a third of its time goes to the private state of 32
BatchNorms, 160 tensors that are exchanged four times a step. Within a ramp masks are bools and references whole
gradients, which takes more memory than final masks do. AdamW's own step takes longer on masked gradients than on
dense ones, with every way to mask, because the square root that torch uses here is five times slower on zeros;
`fused=True` is not affected."""

_REFERENCE = """\
For comparison, the method's published code on another machine: a step of ResNet-32 costs 1.017 plain steps (1.011
without its correction, which never fires), 16 bytes a weight between steps and 24 at the peak, and a mask update
at ResNet-50's size 6,696 ms."""

_FRONTIER_TEXT = """\
Each way to hold the masks of three sub-nets, timed inside real steps with the least around it: the dense
weights kept aside (4 of the bytes), weights masked, gradients masked. The rows of this package contain all the
rest too: private BatchNorm state, buffers, bookkeeping."""
