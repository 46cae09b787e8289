"""Sup-tickets: the end of a run as a few cycles, whose ends are averaged into better sub-nets at the same sparsity.

Source: Yin et al.: "Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training",
UAI 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ast_plugin.errors import ConfigError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.integrations.family.sup_tickets_run import TicketRun
from ast_plugin.integrations.family.sup_tickets_settings import TicketSettings
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.recalibration import Forward
from ast_plugin.training import AlternatingSparseTraining

SUPERPOSED = "superposed"
"""Name of the version whose sub-nets are the averages."""


class SupTickets:
    """Turns the last share of a run into cycles and averages the sub-nets at their ends, the tickets.

    Give it to one run: ``wrap(..., sup_tickets=SupTickets())``. At the start of each cycle every sub-net explores once,
    at its own first step, with the method's rule; then its masks are fixed, while the learning rate goes from low to
    high and back in straight lines, instead of the user's own. At the end of each cycle the shared weights go into a
    running mean. After the last one the mean is pruned, for each sub-net, to the number of weights that it keeps: the
    superposed sub-nets, version ``"superposed"`` of the run, which ``save`` writes. The run itself goes on from the
    last ticket.

    Args:
        cycles: How many tickets, in [1, 255].
        share: Which last part of ``total_steps`` the cycles take, in (0, 1), in steps that `cycles` divides.
        lr: Low and high rate, 0 < low <= high, of the parameter group with the highest rate; other groups keep their
            proportion to it. None: 1 % and 5 % of the highest rate that each group had in the run.
        explore: Fraction of the kept weights that is dropped, and grown anew, at the start of each cycle, in [0, 1);
            0 leaves the masks alone.
        loader: Batches to estimate the BatchNorm statistics of the superposed sub-nets from when the last cycle ends;
            re-iterable. None: they are averages, like the weights.
        forward: How to run the model on a batch of `loader`, as in `AlternatingSparseTraining.recalibrate`.
        max_batches: How many batches to use for each sub-net; None takes all.

    Attributes:
        settings: The first four, checked.
        max_batches: As given.

    Raises:
        ConfigError: If a value is outside its range.

    Example:
        >>> tickets = SupTickets(cycles=3, share=0.1)
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.9, 0.95), total_steps=1000, sup_tickets=tickets)
    """

    def __init__(
        self,
        cycles: int = 3,
        *,
        share: float = 0.1,
        lr: tuple[float, float] | None = None,
        explore: float = 0.5,
        loader: Iterable[Any] | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
    ) -> None:
        self.settings = TicketSettings(cycles=cycles, share=share, lr=lr, explore=explore)
        if forward is not None and not callable(forward):
            raise ConfigError(f"forward of SupTickets must be a function of model and batch, got {forward!r}")
        if max_batches is not None and (
            isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1
        ):
            raise ConfigError(f"max_batches of SupTickets must be a number of batches, at least 1, got {max_batches!r}")
        if loader is not None and not any(hasattr(loader, name) for name in ("__iter__", "__getitem__")):
            raise ConfigError(f"loader of SupTickets must give batches, such as a DataLoader or a list, got {loader!r}")
        self.max_batches = max_batches
        self._loader = loader
        self._forward = forward
        self._run: TicketRun | None = None

    def __repr__(self) -> str:
        """Return the call that made it, without loader."""
        s = self.settings
        return f"SupTickets(cycles={s.cycles}, share={s.share:g}, lr={s.lr}, explore={s.explore:g})"

    @property
    def tickets(self) -> int:
        """How many tickets have been taken so far."""
        return 0 if self._run is None else self._run.average.tickets

    @property
    def rate(self) -> float | None:
        """The rate of the coming step, of the parameter group with the highest; None outside of the cycles."""
        return None if self._run is None else self._run.rate

    def statistics(self) -> dict[str, Any]:
        """Return where the run stands, for logs.

        Returns:
            ``tickets`` taken so far, of ``cycles``; ``begin``, the first step of the first cycle, and
            ``steps_per_cycle``; ``cycle``, from 1, and ``rate`` of the coming step, None outside of the cycles.

        Raises:
            ConfigError: If it has not been given to a run.
        """
        return self._present().statistics()

    @property
    def training(self) -> AlternatingSparseTraining | None:
        """The controller of its run; None before it has one."""
        return None if self._run is None else self._run.training

    @property
    def available(self) -> bool:
        """Whether the last cycle is over, so that there are superposed sub-nets."""
        return self._run is not None and self._run.is_complete

    @property
    def recomputed(self) -> bool:
        """Whether the BatchNorm statistics of the superposed sub-nets were estimated from data."""
        return self._run is not None and self._run.recomputed

    def recompute(
        self, loader: Iterable[Any], *, forward: Forward | None = None, max_batches: int | None = None
    ) -> None:
        """Estimate the BatchNorm statistics of the superposed sub-nets from data, instead of averages.

        In a run of several processes call it in all of them: what each finds in its own data is averaged.

        Args:
            loader: Batches; iterated once a sub-net.
            forward: How to run the model on a batch, as in `AlternatingSparseTraining.recalibrate`; None takes that of
                this object.
            max_batches: How many batches to use for each sub-net; None takes that of this object.

        Raises:
            ConfigError: If there are no superposed sub-nets yet, or the loader gives no batch.
        """
        run = self._present()
        with run.training.version(SUPERPOSED):
            run.training.recalibrate(
                loader,
                forward=self._forward if forward is None else forward,
                max_batches=self.max_batches if max_batches is None else max_batches,
            )
            run.training.synchronize_normalization()
        run.recomputed = True

    @hookimpl
    def ast_sub_net_switched(self, training: AlternatingSparseTraining, sub_net: str) -> None:
        """Begin, when this is told of a new run."""
        run = self._run
        if run is not None and run.training is training:
            return
        if run is not None and not run.ended:
            raise ConfigError(
                "sup_tickets: this SupTickets belongs to another run, which still trains; make one for each run, or "
                "call detach() on the other first"
            )
        if self._loader is not None:
            _check_loader(training, self._loader)
        self._run = run = TicketRun(training, self.settings)
        training.add_version(SUPERPOSED, run.version, preferred=True)

    @hookimpl
    def ast_step_finished(self, training: AlternatingSparseTraining, step: int) -> None:
        """Take a ticket where a cycle ends."""
        if self._run is not None and self._run.training is training:
            self._run.step_finished(step)

    @hookimpl
    def ast_training_finished(self, training: AlternatingSparseTraining) -> None:
        """Estimate BatchNorm statistics, where there are data for it."""
        if self._loader is not None and self.available:
            self.recompute(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """Return what the run goes on from: tensors and plain containers. It travels in the run's own state."""
        return self._present().state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Make sure that a state can be loaded; nothing is changed.

        Raises:
            StateError: If it is damaged, or of another run.
        """
        self._present().read_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: If it is damaged, or of another run; nothing is changed then.
        """
        self._present().load_state_dict(state)

    def _present(self) -> TicketRun:
        if self._run is None:
            raise ConfigError(
                "this SupTickets has no run yet; give it to one: wrap(..., total_steps=..., sup_tickets=SupTickets())"
            )
        return self._run


def _check_loader(training: AlternatingSparseTraining, loader: Iterable[Any]) -> None:
    """Refuse when a run begins what could not be recalibrated from when it is over.

    Raises:
        ConfigError: If it is used up after the first of several sub-nets, or these share their BatchNorm statistics.
    """
    count = len(training.sub_nets)
    if count == 1:
        return
    if isinstance(loader, Iterator):
        raise ConfigError(
            f"loader of SupTickets must be iterable once for each of {count} sub-nets, and a {type(loader).__name__} "
            "is used up after one; pass a DataLoader or a list"
        )
    if not training.config.private_normalization and batch_norm_modules(training.model):
        raise ConfigError(
            "loader of SupTickets is for BatchNorm statistics of each sub-net, and they share one set here, because "
            "private_normalization is False; leave loader out, and recalibrate for one sub-net right before it is used"
        )
