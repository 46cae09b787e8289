"""What the demo can be told: frozen, keyword-only, checked when constructed, plain dicts in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ast_plugin.config import ASTConfig, Moment
from ast_plugin.demo_data import TRAIN_IMAGES
from ast_plugin.errors import ConfigError, StateError, near_names

# Above these the machine would run out of memory or threads before it said why.
_LARGEST = {"batch_size": TRAIN_IMAGES, "width": 512, "threads": 1024}
_REASONS = {"batch_size": ", which is more than the images there are to train on"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Everything that decides what a demo run computes: two runs with equal settings are bit-identical.

    Attributes:
        sparsities: One entry a sub-net, as `ASTConfig.sparsities`.
        steps: Optimizer steps of the whole run, over all sub-nets.
        method: Rule for mask updates.
        pattern: Which masks are allowed.
        distribution: How a sparsity is spread over the layers; None takes what the method prescribes.
        alternation: Which sub-net trains at a step.
        correction: ``layer``, ``global`` or ``off``.
        inactive: ``coast`` or ``freeze``.
        update_interval: Time between two mask updates of one sub-net, in steps (int) or as a fraction (float).
        end_step: When the targets are reached, in steps (int) or as a fraction (float).
        drop_fraction: Fraction of the kept weights that the first update replaces, in [0, 1).
        seed: Seed of the initial weights, the order and augmentation of the images, and the masks.
        learning_rate: At the start; it falls to zero along a cosine.
        weight_decay: On all parameters.
        batch_size: Images a step, at most as many as there are to train on.
        width: Channels of the network's first stage, at most 512.
        threads: Threads that compute, at most 1024. The tensors are small: two threads gain a third on an idle machine,
            but take several times as long as one where other programs use the cores.

    Raises:
        ConfigError: If a value is outside its range, or two contradict each other.
    """

    sparsities: tuple[float | str, ...] = (0.90, 0.95, 0.98)
    steps: int = 1800
    method: str = "granet"
    pattern: str = "unstructured"
    distribution: str | None = None
    alternation: str = "alternating"
    correction: str = "layer"
    inactive: str = "coast"
    update_interval: Moment = 0.05
    end_step: Moment = 0.5
    drop_fraction: float = 0.1
    seed: int = 0
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 64
    width: int = 24
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsities", tuple(self.sparsities))
        for field in ("steps", "batch_size", "width", "threads"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} must be a positive whole number, got {value!r}")
            if value > _LARGEST.get(field, value):
                raise ConfigError(f"{field} must be at most {_LARGEST[field]}, got {value!r}{_REASONS.get(field, '')}")
        for field, zero in (("learning_rate", False), ("weight_decay", True)):
            value = getattr(self, field)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise ConfigError(
                    f"{field} must be a {'number of at least' if zero else 'number above'} 0, got {value!r}"
                )
        self.ast_config()

    def ast_config(self) -> ASTConfig:
        """Return the part that `ast_plugin.wrap` is told."""
        return ASTConfig(
            sparsities=self.sparsities,
            total_steps=self.steps,
            method=self.method,
            pattern=self.pattern,
            distribution=self.distribution,
            alternation=self.alternation,
            steps_per_epoch=max(1, self.steps // 30),
            correction=self.correction,
            inactive=self.inactive,  # type: ignore[arg-type]  # ASTConfig checks it
            update_interval=self.update_interval,
            end_step=self.end_step,
            drop_fraction=self.drop_fraction,
            seed=self.seed,
        )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: half a cosine from `learning_rate` to zero."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain containers."""
        return {**dataclasses.asdict(self), "sparsities": list(self.sparsities)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DemoSettings:
        """Build settings from what `to_dict` returned.

        Raises:
            ConfigError: If a value is out of range.
            StateError: If a name is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise StateError(f"unknown setting {name!r} of a demo run: {near_names(str(name), known)}")
        return cls(**values)
