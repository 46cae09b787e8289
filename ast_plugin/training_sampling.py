"""What a run offers to methods that draw new masks at every step."""

from __future__ import annotations

from ast_plugin.exploration import Loss
from ast_plugin.samplers import Sampler
from ast_plugin.training_files import SavedRun


class SampledRun(SavedRun):
    """The part of a controller that a method which draws masks at every step (`vr-pge`) needs."""

    def explore(self, loss: Loss) -> None:
        """Compute the losses that a method which draws new masks at every step (`vr-pge`) learns from.

        Call it before the forward of every training batch, once a micro-batch where gradients are accumulated.
        ``optimizer.step(closure)`` calls it by itself. It does nothing for other methods, and when the masks are final.

        The loss is computed once for each of the drawn masks, without gradients; gradients, random generators, running
        statistics and other buffers are as before afterwards, and ``backward`` and ``zero_grad`` do nothing inside.

        Args:
            loss: Returns the loss of the batch, one number, by calling the model in training mode.

        Raises:
            ActivationError: If a sub-net is on, inside ``with sub_net(...)``.
            ConfigError: If `loss` returns something else.

        Example:
            >>> ast.explore(lambda: criterion(model(inputs), targets))
            >>> criterion(model(inputs), targets).backward()
            >>> optimizer.step()
        """
        self._events.explore(loss)

    @property
    def sampler(self) -> Sampler | None:
        """What draws new masks at every step, for example a `ast_plugin.vr_pge_method.ChannelSampler`; else None."""
        return self._parts.sampled.sampler
