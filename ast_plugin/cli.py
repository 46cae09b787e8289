"""`ast-plugin`: the command line. Each command is a module of its own; here are what they share and the exit codes.

Exit codes:

* 0: done.
* 1: it could not be done: a file is missing or damaged, a package is not installed, a plugin failed.
* 2: the command line is wrong: an unknown option, a value out of its range.
* 130: interrupted by Ctrl-C.
* 141: whoever read the output has gone, as in ``ast-plugin report FILE | head -1``.

Errors are one message on standard error, without a traceback; ``AST_PLUGIN_TRACEBACK=1`` shows it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

import torch

from ast_plugin import cli_demo, cli_files, cli_plugins, cli_profile
from ast_plugin.errors import ASTError, ConfigError
from ast_plugin.version import __version__

OK = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

TRACEBACK_VARIABLE = "AST_PLUGIN_TRACEBACK"

_DESCRIPTION = """\
Alternating sparse training: several sparse sub-nets of one network from one ordinary training run.

Train on real images and look at what comes out:
  ast-plugin demo
  ast-plugin report demo-run/elastic.safetensors
  ast-plugin export demo-run/elastic.safetensors --sub-net s95 --to s95.safetensors
"""

_EPILOG = """\
exit codes:
  0 done   1 it could not be done   2 the command line is wrong   130 interrupted

environment:
  AST_PLUGIN_TRACEBACK=1         show the traceback of an error
  AST_PLUGIN_DISABLE_AUTOLOAD=1  load no installed plugin
  AST_PLUGIN_BLOCK=name1,name2   leave these plugins out

'ast-plugin COMMAND --help' tells more about a command.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="ast-plugin",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ast-plugin {__version__} (torch {torch.__version__})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cli_demo.add_parser(commands)
    cli_files.add_parsers(commands)
    cli_profile.add_parser(commands)
    cli_plugins.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or a sign that the terminal cannot show is no reason to fail.
            stream.reconfigure(errors="replace")
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()  # here, so that a reader who has gone is noticed while it can be handled
        return code
    except SystemExit as error:  # argparse has printed the help or the error already
        return error.code if isinstance(error.code, int) else USAGE
    except BrokenPipeError:
        # What is still buffered has nowhere to go; the interpreter would complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted")
        return INTERRUPTED
    except ConfigError as error:
        _complain(f"error: {error}")
        return USAGE
    except ASTError as error:
        _complain(f"error: {error}")
        return FAILED
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)
        _complain(f"error: {what}")
        return FAILED


def _complain(message: str) -> None:
    if os.environ.get(TRACEBACK_VARIABLE, "").lower() in ("1", "true", "yes"):
        traceback.print_exc()
    print(f"ast-plugin: {message}", file=sys.stderr, flush=True)
