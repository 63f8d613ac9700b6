"""The scripts of examples/ as modules: they are no packages, and import each other by name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = EXAMPLES / "openclipart"


def script(name: str) -> ModuleType:
    """The module of `name`.py."""
    for folder in (SCRIPTS, EXAMPLES / "scenes"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)
