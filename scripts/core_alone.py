"""Exit with an error when a host or another optional dependency is importable: then this is not the core alone."""

from __future__ import annotations

import importlib.util
import sys

OPTIONAL = ("accelerate", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn", "timm", "transformers")

if __name__ == "__main__":
    found = [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]
    sys.exit(f"installed besides the core: {', '.join(found)}" if found else 0)
