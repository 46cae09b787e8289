"""``python -m ast_plugin``: the same as the command ``ast-plugin``."""

from __future__ import annotations

import sys

from ast_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
