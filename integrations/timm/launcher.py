"""``ast-timm TRAIN_SCRIPT ...``: timm's own train.py, unmodified, trains sub-nets.

The script is imported as a module, its functions are wrapped, and its ``main`` is called. It is never run as
``__main__``: its functions would be out of reach then.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ast_plugin.errors import ASTError, ConfigError

_NAME = "ast_timm_train_script"

_USAGE = """\
usage: ast-timm TRAIN_SCRIPT [the script's own arguments] --ast-sparsities S [S ...] [--ast-...]
       torchrun --nproc-per-node N -m ast_plugin.integrations.timm TRAIN_SCRIPT ...

Runs a training script of timm, unmodified, so that one run yields a sparse sub-net for each sparsity.

  ast-timm train.py --data-dir images --model resnet18 --num-classes 10 --ast-sparsities 0.9 0.95 0.98

'ast-timm TRAIN_SCRIPT --help' shows the script's arguments with the --ast group. Without --ast flags the script
runs as it is.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 2 after an error in what was asked for, which stands on standard error in one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    before = list(sys.argv), list(sys.path)
    try:
        _launch(given[0], given[1:])
    except ASTError as error:
        print(f"ast-timm: error: {_rank()}{error}", file=sys.stderr)
        return 2
    finally:
        sys.argv[:], sys.path[:] = before
        sys.modules.pop(_NAME, None)
    return 0


def _launch(path: str, arguments: Sequence[str]) -> None:
    if path.startswith("-"):
        raise ConfigError(
            f"the first argument must be the path of timm's train.py, got {path!r}; put it before all flags"
        )
    script = Path(path).resolve()
    if not script.is_file():
        raise ConfigError(f"there is no training script {path}; clone timm's repository, or check the path")
    # As `python train.py` does: a timm that lies beside the script is the one it runs with.
    sys.path.insert(0, str(script.parent))
    sys.argv[:] = [str(path), *arguments]
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("timm is not installed; install it: pip install 'ast-plugin[timm]'")
    module = _imported(script)
    from ast_plugin.integrations.timm.cpu_ddp import data_parallel_on_cpu
    from ast_plugin.integrations.timm.seams import Script

    wrapped = Script(module)
    with data_parallel_on_cpu():
        wrapped.main()


def _imported(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, script)
    if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        raise ConfigError(f"{script} is no Python script; give ast-timm the path of timm's train.py")
    try:
        spec.loader.get_code(_NAME)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{script} is no Python script: {error}; give ast-timm the path of timm's train.py"
        ) from error
    module = importlib.util.module_from_spec(spec)
    # Worker processes look for what they are sent under this name.
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        from ast_plugin.integrations.timm.seams import timm_version

        raise ConfigError(
            f"{script} cannot be imported: {error}; install what it needs, and the version of timm that it is of "
            f"(timm {timm_version()} is here)"
        ) from error
    return module


def _rank() -> str:
    rank = os.environ.get("RANK")
    return f"rank {rank}: " if rank is not None else ""
