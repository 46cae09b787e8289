"""The rows of `accuracy.py`: what is compared, in words and in settings."""

from __future__ import annotations

from typing import Any

from accuracy_row import ALTERNATING, Row, Table
from accuracy_row import options as _options
from accuracy_rows_mixed import MIXED, WITH_DENSE
from accuracy_rows_tickets import rows_of_tickets
from accuracy_runs import AVERAGE, RECALIBRATED

SEPARATE = "separate"
SHARE = "separate-share"
DENSE = "dense"
CHANNELS = (0.5, 0.75, 0.9)


TABLES = {
    "baselines": Table(title="{measure}: mean ± standard deviation over the seeds", absolute=True),
    "goal": Table(title="{measure}: difference from separate training at three times the cost", absolute=False),
    "settings": Table(title="{measure}: difference from the alternating row", absolute=False),
    "mechanisms": Table(title="{measure}: difference from the alternating row", absolute=False),
    "separate": Table(title="{measure}: the same given to separate training", absolute=False),
    "channels": Table(
        title="{measure} of channel sub-nets: mean ± standard deviation over the seeds",
        absolute=True,
        sparsities=CHANNELS,
    ),
    "tickets": Table(title="{measure}: mean ± standard deviation over the seeds", absolute=True),
    "ticket_gains": Table(title="{measure}: difference from the same run without cycles", absolute=False),
    "mixed": Table(
        title="{measure} of sub-nets with different patterns: mean ± standard deviation over the seeds",
        absolute=True,
        sparsities=WITH_DENSE,
    ),
}


def _cycle(*stages: tuple[float, tuple[int, ...]]) -> dict[str, Any]:
    return {"options": {"alternation": "cycle"}, "mechanisms": {"cycle": [[s, list(c)] for s, c in stages]}}


def _hook(**mechanism: Any) -> dict[str, Any]:
    """Return changes that bring in a plugin of the correction hook, called at every step."""
    return {"options": {"correction": {"scope": "layer", "first_step": True}}, "mechanisms": mechanism}


def _channels(**options: Any) -> dict[str, Any]:
    return {"sparsities": CHANNELS, "options": {"pattern": "channel", **options}}


def _importance(kind: str, base: str = "granet", **options: Any) -> dict[str, Any]:
    """Return changes by which an importance of torch-pruning scores the channels."""
    return _channels(method={"importance": kind, "base": base}, **options)


_SPARSEST_FIRST = _cycle((0, (2,)), (0.2, (2, 1)), (0.35, (2, 1, 0)))

_LIST = (
    Row(name=ALTERNATING, table="baselines", text="one alternating run"),
    Row(name=SEPARATE, table="baselines", alone=True, text="trained separately, all the steps each"),
    Row(name=SHARE, table="baselines", alone=True, share=None, text="trained separately, a third of the steps each"),
    Row(name="joint", table="baselines", changes={"joint": True}, text="joint training, all the steps"),
    Row(
        name="joint-share",
        table="baselines",
        changes={"joint": True},
        share=None,
        text="joint training, a third of the steps",
    ),
    Row(
        name="joint-alternation",
        table="baselines",
        changes=_options(alternation="joint"),
        text='the same through `alternation="joint"` and a closure',
    ),
    Row(name="alternating-2x", table="baselines", share=2.0, text="one alternating run, twice the steps"),
    Row(name="alternating-3x", table="baselines", share=3.0, text="one alternating run, three times the steps"),
    Row(name=DENSE, table="baselines", changes={"sparsities": (0.0,), **_options(method="static")}, text="dense"),
    Row(name="goal-alternating", table="goal", reference=SEPARATE, text="one alternating run"),
    Row(name="goal-2x", table="goal", reference=SEPARATE, share=2.0, text="one alternating run, twice the steps"),
    Row(name="goal-3x", table="goal", reference=SEPARATE, share=3.0, text="one alternating run, three times the steps"),
    Row(name="goal-joint", table="goal", reference=SEPARATE, changes={"joint": True}, text="joint training"),
    Row(
        name="goal-late-decay",
        table="goal",
        reference="separate-late-decay",
        changes={"schedule": "late", **_SPARSEST_FIRST},
        text="alternating, late decay and sparsest first, against separate with late decay",
    ),
    Row(name="correction-off", table="settings", changes=_options(correction="off"), text="correction off"),
    Row(
        name="correction-global",
        table="settings",
        changes=_options(correction="global"),
        text="correction over all layers together",
    ),
    Row(
        name="correction-first-step",
        table="settings",
        changes=_options(correction={"scope": "layer", "first_step": True}),
        text="correction at every step, the first of a group too",
    ),
    Row(name="freeze", table="settings", changes=_options(inactive="freeze"), text="inactive weights frozen"),
    Row(name="drop-0", table="settings", changes=_options(drop_fraction=0.0), text="drop fraction 0: no regrowth"),
    Row(name="drop-.5", table="settings", changes=_options(drop_fraction=0.5), text="drop fraction .5"),
    Row(name="interval-.02", table="settings", changes=_options(update_interval=0.02), text="update interval .02"),
    Row(name="interval-.1", table="settings", changes=_options(update_interval=0.1), text="update interval .1"),
    Row(name="ramp-.3", table="settings", changes=_options(end_step=0.3), text="ramp ends at .3"),
    Row(name="ramp-.7", table="settings", changes=_options(end_step=0.7), text="ramp ends at .7"),
    Row(name="reverse", table="settings", changes=_cycle((0, (2, 1, 0))), text="sparsest sub-net first in a group"),
    Row(name="random", table="settings", changes=_options(alternation="random"), text="random order"),
    Row(
        name="sparsest-twice",
        table="settings",
        changes=_cycle((0, (0, 2, 1, 2))),
        text="half of the steps for the sparsest sub-net",
    ),
    Row(name="rate-2x", table="mechanisms", changes={"learning_rate_times": 2.0}, text="twice the learning rate"),
    Row(
        name="decay-1/3", table="mechanisms", changes={"weight_decay_times": 1 / 3}, text="a third of the weight decay"
    ),
    Row(
        name="recalibrated",
        table="mechanisms",
        readout=RECALIBRATED,
        tasks=("digits",),
        text="BatchNorm statistics estimated anew at the end",
    ),
    Row(name="average", table="mechanisms", readout=AVERAGE, text="weights averaged over the last fifth of the steps"),
    Row(
        name="rates",
        table="mechanisms",
        changes={"mechanisms": {"rates": [0.6, 1.0, 2.0]}},
        text="learning rate x .6 / 1 / 2, the sparsest highest",
    ),
    Row(
        name="sparsest-first",
        table="mechanisms",
        changes=_SPARSEST_FIRST,
        text="sparsest sub-net first: alone until .2, with the second until .35, then all",
    ),
    Row(
        name="late-decay",
        table="mechanisms",
        changes={"schedule": "late"},
        text="learning rate constant until .6, then a line to 0",
    ),
    Row(
        name="late-decay-sparsest-first",
        table="mechanisms",
        changes={"schedule": "late", **_SPARSEST_FIRST},
        text="both: constant until .6, and sparsest first",
    ),
    Row(
        name="densest-first",
        table="mechanisms",
        changes=_cycle((0, (0,)), (0.2, (0, 1)), (0.35, (0, 1, 2))),
        text="the densest alone until .2, with the second until .35, then all",
    ),
    Row(
        name="reference-mean",
        table="mechanisms",
        changes=_hook(averaged_reference={"decay": 0.9, "others": "all"}),
        text="correction against running means of all other sub-nets' gradients",
    ),
    Row(
        name="owner-scaling",
        table="mechanisms",
        changes=_hook(owner_scaling=0.5),
        text="gradients of weights that k of N sub-nets keep, times sqrt(N / k); no correction",
    ),
    Row(
        name="sparsest-owns",
        table="mechanisms",
        changes=_hook(sparsest_owns=[0.7, 0.3]),
        text="from .7 on, weights of a sparser sub-net take .3 of the denser ones' gradients; no correction",
    ),
    Row(
        name="private-norms",
        table="mechanisms",
        changes={"mechanisms": {"private_parameters": ["*norm*", "*.bias"]}},
        tasks=("bytes",),
        text="private LayerNorms and biases",
    ),
    Row(
        name="split",
        table="mechanisms",
        changes={"mechanisms": {"split": 0.7}, **_options(correction="off")},
        text="from .7 on, nothing is shared; correction off",
    ),
    Row(
        name="beyond-the-mask",
        table="mechanisms",
        changes={"mechanisms": {"shared_backward": [1.0, 0.5]}, **_options(correction="off")},
        text="during the ramp, dropped weights that another sub-net keeps learn too; correction off",
    ),
    Row(
        name="separate-rate-2x",
        table="separate",
        alone=True,
        reference=SEPARATE,
        changes={"learning_rate_times": 2.0},
        text="twice the learning rate",
    ),
    Row(
        name="separate-late-decay",
        table="separate",
        alone=True,
        reference=SEPARATE,
        changes={"schedule": "late"},
        text="learning rate constant until .6, then a line to 0",
    ),
    Row(
        name="separate-average",
        table="separate",
        alone=True,
        reference=SEPARATE,
        readout=AVERAGE,
        text="weights averaged over the last fifth of the steps",
    ),
    Row(
        name="separate-recalibrated",
        table="separate",
        alone=True,
        reference=SEPARATE,
        readout=RECALIBRATED,
        tasks=("digits",),
        text="BatchNorm statistics estimated anew at the end",
    ),
    Row(name="channels", table="channels", changes=_channels(), text="one alternating run, granet with its ramp"),
    Row(
        name="channels-from-start",
        table="channels",
        changes=_channels(initial_sparsity=0.9),
        text="granet, at the targets from the start",
    ),
    Row(
        name="channels-short-ramp",
        table="channels",
        changes=_channels(end_step=0.25),
        text="granet, ramp over a quarter of the run",
    ),
    Row(name="channels-gmp", table="channels", changes=_channels(method="gmp"), text="gmp: no regrowth"),
    Row(name="channels-rigl", table="channels", changes=_channels(method="rigl"), text="rigl"),
    Row(name="channels-static", table="channels", changes=_channels(method="static"), text="random channels, fixed"),
    Row(
        name="channels-global",
        table="channels",
        changes=_channels(distribution="global"),
        text="one threshold over all groups",
    ),
    Row(
        name="channels-correction-off",
        table="channels",
        changes=_channels(correction="off"),
        text="correction off",
    ),
    Row(
        name="channels-separate",
        table="channels",
        alone=True,
        changes=_channels(),
        text="trained separately, all the steps each",
    ),
    Row(
        name="channels-separate-share",
        table="channels",
        alone=True,
        share=None,
        changes=_channels(),
        text="trained separately, a third of the steps each",
    ),
    *(
        Row(
            name=name,
            table="mixed",
            text=text,
            changes={"sparsities": sub_nets, **_options(**options)},
            tasks=("digits",),
            **fields,
        )
        for name, (text, sub_nets, options, fields) in MIXED.items()
    ),
    Row(
        name="channels-taylor",
        table="channels",
        changes=_importance("TaylorImportance"),
        text="granet, channels by torch-pruning's Taylor importance",
    ),
    Row(
        name="channels-taylor-gmp",
        table="channels",
        changes=_importance("TaylorImportance", "gmp"),
        text="gmp, channels by torch-pruning's Taylor importance",
    ),
    Row(
        name="channels-importance",
        table="channels",
        changes=_importance("MagnitudeImportance"),
        text="granet, channels by torch-pruning's magnitude importance",
    ),
    Row(
        name="channels-lamp-global",
        table="channels",
        changes=_importance("LAMPImportance", distribution="global"),
        text="granet, channels by torch-pruning's LAMP importance, one threshold over all groups",
    ),
)


ROWS: dict[str, Row] = {row.name: row for row in (*_LIST, *rows_of_tickets())}
