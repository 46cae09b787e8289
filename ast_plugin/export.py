"""One sub-net as something that needs this package no more: a state dict, a model, sparse tensors.

Whatever can materialize a sub-net serves as source: a training, a loaded `Elastic`, or the contents of an elastic file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ast_plugin.checkpoint import save_archive
from ast_plugin.errors import ConfigError
from ast_plugin.export_sliced import check_form, check_trained, sizes_path, sliced_copy, sliced_state, write_sizes
from ast_plugin.files import atomic_write, file_path
from ast_plugin.plain_model import plain_copy
from ast_plugin.slots import plain_name

SUFFIXES = (".safetensors", ".pt", ".pth")


class SubNetSource(Protocol):
    """What an export asks of its source."""

    def materialize(self, name: str) -> Mapping[str, Tensor]:
        """Return the state dict of the sub-net `name`, with zeros at dropped weights."""


def export_state_dict(
    source: SubNetSource,
    name: str,
    path: str | os.PathLike[str],
    *,
    form: str = "dense",
    multiple: int = 1,
    allow_untrained: bool = False,
) -> None:
    """Write one sub-net as an ordinary state dict, which loads in the same architecture without this package.

    ``.safetensors`` files load with ``model.load_state_dict(safetensors.torch.load_file(path))``: tied tensors are
    stored under each of their names, since that format cannot share. ``.pt`` and ``.pth`` files load with
    ``torch.load(path, weights_only=True)``. Zeros are stored like other numbers: the file is as large as a dense one.

    In the form ``sliced`` the dropped units of a channel sub-net are left out. What became smaller is then written
    beside it, with the suffix ``.json``; `ast_plugin.export_sliced.shrink`, a few lines of plain torch to copy, makes a
    freshly built model fit.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        path: Where to write; the suffix ``.safetensors``, ``.pt`` or ``.pth`` chooses the format.
        form: ``dense`` or ``sliced``.
        multiple: In the form ``sliced``, leave as many channels and hidden units of each group as make a multiple of
            this; those that are added have zeros as weights. Runtimes compute 8 or 16 at a time.
        allow_untrained: Whether to write a sub-net that no step has trained.

    Raises:
        ConfigError: If the suffix is another one, an argument is of another kind, there is no such sub-net or form, or
            the sub-net was never trained or is none of pattern ``channel`` and to be sliced.
        ActivationError: If it is to be sliced, and its weights were changed so that they read dropped units.
        SaveError: If the file cannot be written; what stood at `path` is untouched.
    """
    suffix = file_path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"path must end in .safetensors, .pt or .pth, got {os.fspath(path)!r}; the suffix chooses the format"
        )
    check_form(form, multiple)
    check_trained(source, name, allow_untrained)
    state = {plain_name(key): tensor.detach() for key, tensor in source.materialize(name).items()}
    sizes: dict[str, Any] | None = None
    if form == "sliced":
        state, sizes = sliced_state(source, name, state, multiple)
    state = {key: tensor.cpu() for key, tensor in state.items()}
    fill: Callable[[Path], None]
    if suffix != ".safetensors":

        def fill(temporary: Path) -> None:
            save_archive(state, temporary)

    else:

        def fill(temporary: Path) -> None:
            # Fresh memory for each, because safetensors refuses tensors that share it. Transformers wants the format.
            plain = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
            save_file(plain, temporary, metadata={"format": "pt", "sub_net": name})

    def write(temporary: Path) -> None:
        fill(temporary)
        if sizes is not None:  # as late as possible: the older pair of files stays together if something fails
            write_sizes(sizes_path(path), sizes)

    atomic_write(path, write)


def export_model(
    source: SubNetSource,
    name: str,
    model: nn.Module,
    *,
    form: str = "dense",
    multiple: int = 1,
    allow_untrained: bool = False,
) -> nn.Module:
    """Return an independent copy of a model that holds one sub-net and nothing of this package.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        model: The architecture, for example the model that was trained. It is not changed; wrappers for compilation
            and data-parallel use are left out of the copy.
        form: ``dense``, or ``sliced``: the dropped units of a channel sub-net are cut out of the copy.
        multiple: In the form ``sliced``, leave as many channels and hidden units of each group as make a multiple of
            this; those that are added have zeros as weights. Runtimes compute 8 or 16 at a time.
        allow_untrained: Whether to return a sub-net that no step has trained.

    Returns:
        The copy, in the training mode, on the devices and of the dtypes that `model` has.

    Raises:
        ConfigError: If an argument is of another kind, there is no such sub-net or form, or the sub-net was never
            trained or is none of pattern ``channel`` and to be sliced.
        ElasticFileError: If the sub-net does not fit the model.
        ActivationError: If it is to be sliced, and its weights were changed so that they read dropped units.
    """
    check_form(form, multiple)
    check_trained(source, name, allow_untrained)
    plain = plain_copy(model, name, source.materialize(name))
    return sliced_copy(source, name, plain, multiple) if form == "sliced" else plain


def sparse_state_dict(
    source: SubNetSource, name: str, *, minimum_sparsity: float = 0.8, layout: str = "csr"
) -> dict[str, Tensor]:
    """Return one sub-net with its sparse matrices as sparse tensors.

    On a CPU, ``weight @ x.T`` is faster than a dense product from about 80 % zeros on (``F.linear`` with such a weight
    is several times slower; docs/elastic-file.md has figures). Modules need adapting: ``nn.Linear`` does not multiply
    that way round.

    Args:
        source: A training, an `Elastic` or `ElasticContents`.
        name: The sub-net.
        minimum_sparsity: Fraction of zeros in [0, 1] from which on a matrix is made sparse.
        layout: ``csr``, compressed sparse rows with 32-bit indices, the one that torch multiplies fastest.

    Returns:
        The state dict: two-dimensional floating-point tensors with enough zeros are sparse, all others as they were.

    Raises:
        ConfigError: If an argument is out of range, or there is no such sub-net.
    """
    if layout != "csr":
        raise ConfigError(f"layout must be 'csr', got {layout!r}")
    if not isinstance(minimum_sparsity, (int, float)) or not 0 <= minimum_sparsity <= 1:
        raise ConfigError(f"minimum_sparsity must lie in [0, 1], got {minimum_sparsity!r}")
    state = {plain_name(key): tensor for key, tensor in source.materialize(name).items()}
    made: dict[int, Tensor] = {}  # tied matrices stay one tensor
    for tensor in state.values():
        if id(tensor) not in made:
            made[id(tensor)] = _as_csr(tensor) if _is_sparse_matrix(tensor, minimum_sparsity) else tensor
    return {key: made[id(tensor)] for key, tensor in state.items()}


def _is_sparse_matrix(tensor: Tensor, minimum_sparsity: float) -> bool:
    if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
        return False
    return 1 - int(torch.count_nonzero(tensor)) / tensor.numel() >= minimum_sparsity


def _as_csr(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    rows = torch.zeros(matrix.shape[0] + 1, dtype=torch.int32, device=matrix.device)
    torch.cumsum(torch.count_nonzero(matrix, dim=1), dim=0, dtype=torch.int32, out=rows[1:])
    places = matrix.nonzero(as_tuple=True)
    with warnings.catch_warnings():
        # Torch says once that sparse layouts are in beta; whoever calls for one knows.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            rows, places[1].to(torch.int32), matrix[places], tuple(matrix.shape), check_invariants=True
        )
