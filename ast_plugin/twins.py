"""Another model of the same architecture, such as an average of weights, computing as the sub-nets of a run.

Averages (`torch.optim.swa_utils.AveragedModel`, exponential moving averages) and copies hold dense weights, because the
model is dense whenever anybody looks, and they hold the default's BatchNorm alone. A twin puts the run's masks on
them, and keeps a BatchNorm state for every other sub-net.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ast_plugin.activation import MaskedActivation
from ast_plugin.attachment import is_attached
from ast_plugin.errors import ActivationError, ConfigError, StateError, WrapError
from ast_plugin.masks import MaskStore
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.recalibration import Forward, recalibrate_each
from ast_plugin.slots import ParameterSlots, bare_model
from ast_plugin.sub_nets import check_sub_net, is_number

if TYPE_CHECKING:
    from ast_plugin.training import AlternatingSparseTraining

Average = Callable[[Tensor, Tensor, int], Tensor]


class Twin:
    """A model beside the one that is trained; `AlternatingSparseTraining.twin` makes it.

    The masks are always the run's present ones. Outside of ``with sub_net(...)`` the model is dense and nothing watches
    it: whoever calls it then evaluates dense weights, which were not trained as a network.

    Attributes:
        model: The model as it was given.
    """

    def __init__(self, model: nn.Module, run: AlternatingSparseTraining, normalization: PrivateNormalization) -> None:
        if not isinstance(model, nn.Module):
            raise WrapError(f"a twin must be a torch.nn.Module, got {type(model).__name__}")
        if is_attached(model):
            raise WrapError(
                "the model is being trained by a run itself: use `with sub_net(...)` of its controller, or give twin() "
                "a copy.deepcopy of it"
            )
        self.model = model
        self._run = run
        self._followed = normalization
        self._bare = _matching_part(model, run.masks.shapes)
        self._parameters = ParameterSlots(self._bare, run.masks.parameters)
        self._masks = MaskStore(run.sub_nets, run.masks.shapes)
        self._normalization = PrivateNormalization(
            self._bare, run.sub_nets, run.default_sub_net, enabled=run.config.private_normalization
        )
        self._activation = MaskedActivation(PackedMasks(self._parameters, self._masks), self._normalization)
        self._revisions: dict[str, int] = {}  # of the run's masks, when they were taken over
        self._chosen: list[str] = []
        self._updates = 0
        for name in self._others():
            self._normalization.load(name, run.private_state(name))

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets, in training order."""
        return self._run.sub_nets

    @contextlib.contextmanager
    def sub_net(self, name: str) -> Iterator[nn.Module]:
        """Put a sub-net on the twin for the length of a ``with`` block; what was there before comes back afterwards.

        Do not update an average inside the block: what is written to masked weights is lost at its end.

        Args:
            name: One of `sub_nets`.

        Yields:
            The model, computing as that sub-net.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        check_sub_net(name, self.sub_nets)
        self._chosen.append(name)
        try:
            self._put_on(name)
            yield self.model
        finally:
            self._chosen.pop()
            self._activation.take_off()
            if self._chosen:
                self._put_on(self._chosen[-1])

    def update(self, average: Average | None = None, *, decay: float | None = None) -> None:
        """Let the BatchNorm of the sub-nets other than the default follow the run; the default's is in the model.

        Call it whenever the average itself is updated.

        Args:
            average: From the averaged tensor, the present one and the number of updates before to the new average: what
                ``get_ema_avg_fn`` and ``get_swa_avg_fn`` of `torch.optim.swa_utils` return. The first call takes the
                run's state over, as `torch.optim.swa_utils.AveragedModel` does. None: the present state.
            decay: Instead of a function, the share in [0, 1] that an exponential moving average keeps of itself, from
                the first call on; all tensors are averaged together, which takes a small part of the time.

        Raises:
            ConfigError: If both are given, or `decay` is no such share.
        """
        if decay is not None:
            if average is not None or not is_number(decay) or not 0 <= decay <= 1:
                raise ConfigError(
                    f"decay must lie in [0, 1] and stand alone, got decay={decay!r}, average={average!r}; give either "
                    "a decay or a function"
                )
            for name in self._others():
                self._normalization.move_towards(self._followed, name, 1 - decay)
            self._updates += 1
            return
        with torch.no_grad():
            for name in self._others():
                kept = self._normalization.state(name)
                for key, present in self._run.private_state(name).items():
                    present = present.to(kept[key].device, kept[key].dtype)
                    averaged = average is not None and self._updates > 0 and present.is_floating_point()
                    kept[key] = average(kept[key], present, self._updates) if averaged and average else present
                self._normalization.load(name, kept)
        self._updates += 1

    def recalibrate(
        self,
        loader: Iterable[Any],
        *,
        sub_nets: Iterable[str] | None = None,
        forward: Forward | None = None,
        max_batches: int | None = None,
    ) -> None:
        """Estimate the twin's BatchNorm statistics anew from data, each sub-net's own; the run is left alone.

        Statistics of an average are no average of statistics, so do this before evaluating one.

        Args:
            loader: Batches; iterated once a sub-net, so it must be re-iterable.
            sub_nets: Which ones, or the name of one; None takes all.
            forward: How to run the model on a batch, as in `AlternatingSparseTraining.recalibrate`.
            max_batches: How many batches to use for each; None takes all.

        Raises:
            ConfigError: As `AlternatingSparseTraining.recalibrate`.
        """
        recalibrate_each(
            self.model,
            loader,
            sub_nets=sub_nets,
            known=self.sub_nets,
            put_on=self.sub_net,
            private=self._run.config.private_normalization,
            forward=forward,
            max_batches=max_batches,
        )

    def private_state(self, sub_net: str) -> dict[str, Tensor]:
        """Return copies of a sub-net's BatchNorm tensors by their names in the run's model.

        Args:
            sub_net: One of `sub_nets`.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        check_sub_net(sub_net, self.sub_nets)
        return self._normalization.state(sub_net)

    def dense_state(self) -> dict[str, Tensor]:
        """Return the state dict of the model inside its wrappers: dense weights, the default's BatchNorm.

        Raises:
            ActivationError: Inside ``with sub_net(...)``.
        """
        if self._chosen:
            raise ActivationError(f"the twin is sub-net {self._chosen[-1]!r} now; leave `with sub_net(...)` first")
        return self._bare.state_dict()

    def materialize(self, name: str) -> dict[str, Tensor]:
        """Return one sub-net of the twin as an ordinary state dict, as `AlternatingSparseTraining.materialize` does.

        Args:
            name: One of `sub_nets`.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        with self.sub_net(name):
            return {key: value.detach().clone() for key, value in self._bare.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what the twin keeps beside its model: plain containers and tensors, to resume an average with."""
        return {"private": {name: self.private_state(name) for name in self._others()}, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            StateError: If it belongs to other sub-nets or another network; nothing has been changed then.
        """
        try:
            private, updates = {name: state["private"][name] for name in self._others()}, int(state["updates"])
            fits = all(
                tuple(tensors[key].shape) == tuple(tensor.shape)
                for name, tensors in private.items()
                for key, tensor in self._normalization.state(name).items()
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(f"this is no state of a twin with the sub-nets {', '.join(self.sub_nets)}") from error
        if not fits:
            raise StateError("the state belongs to a twin of another network: its BatchNorm has other shapes")
        for name, tensors in private.items():
            self._normalization.load(name, tensors)
        self._updates = updates

    def _others(self) -> list[str]:
        return [name for name in self.sub_nets if name != self._run.default_sub_net]

    def _put_on(self, name: str) -> None:
        revision = self._run.masks.revision(name)
        if self._revisions.get(name) != revision:
            # A store of its own: a twin on another device must not draw the run's masks there.
            for parameter, mask in self._run.masks.of(name).items():
                self._masks.set(name, parameter, mask)
            self._revisions[name] = revision
        self._activation.put_on(name)


def _matching_part(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return the module inside the wrappers of `model` that has the parameters `shapes`.

    Averages hold the network as ``module``, as data-parallel wrappers do.

    Raises:
        WrapError: If there is none.
    """
    part: Any = bare_model(model)
    first_missing = ""
    while isinstance(part, nn.Module):
        parameters = dict(part.named_parameters(remove_duplicate=False))
        missing = [n for n, shape in shapes.items() if n not in parameters or tuple(parameters[n].shape) != shape]
        if not missing:
            return part
        first_missing = first_missing or missing[0]
        inner = getattr(part, "module", None)
        part = bare_model(inner) if isinstance(inner, nn.Module) else None
    raise WrapError(
        f"{type(model).__name__} is no twin of the model that is trained: it has no parameter {first_missing!r} of "
        f"shape {shapes[first_missing]}; give a copy or an average of that model"
    )
