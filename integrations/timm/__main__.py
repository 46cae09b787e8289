"""``python -m ast_plugin.integrations.timm``, which torchrun can start too."""

import sys

from ast_plugin.integrations.timm.launcher import main

if __name__ == "__main__":
    sys.exit(main())
