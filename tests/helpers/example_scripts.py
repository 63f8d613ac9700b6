"""The scripts of examples/openclipart as modules: they are no package, and import each other by name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "examples" / "openclipart"


def script(name: str) -> ModuleType:
    """The module of `name`.py."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)
