"""The state of the global random generators: Python's, NumPy's, torch's, and those of CUDA devices in use.

The package itself draws nothing from them (`seeded_generator`); dropout, augmentation and the order of a shuffled
loader do.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


class RandomState:
    """Saves and restores the global generators, in the manner of anything that has a ``state_dict``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors and plain containers."""
        version, numbers, gauss = random.getstate()
        return {
            "python": [version, list(numbers), gauss],
            "numpy": _plain(numpy.random.get_state(legacy=False)),
            "torch": torch.get_rng_state(),
            # Asking for the state of a device that nobody used would start CUDA.
            "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; CUDA devices that were not there, or are not here, are left alone."""
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator, device)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic)) else value


def seeded_generator(seed: int, sub_net: str, step: int, parameter: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments, so that no generator state need be saved."""
    digest = hashlib.blake2b(f"{seed}/{sub_net}/{step}/{parameter}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    return generator
