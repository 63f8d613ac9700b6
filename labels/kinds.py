"""Kinds of a thing that are the files of one folder: losses, evaluators, families of tokenizers. A new file is a new kind.

Their names are known without an import: `labels` is below the packages that they are in, and `--help` must not wait for torch.
"""

import ast
import pkgutil
import sys
from pathlib import Path

LOSSES = "train.losses.kinds"
EVALUATORS = "train.evals.protocols.kinds"
TOKENIZERS = "labels.tokenizers.kinds"
_ROOT = Path(__file__).parent.parent


def names_in(package: str) -> list[str]:
    """The kinds of a package, in alphabetical order: its modules but for those that begin with `_`. None of them is imported."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(_folders(package)) if not name.startswith("_"))


def summary(package: str, name: str) -> str:
    """The first paragraph of a kind's docstring, without an import, which may take a second."""
    finder = next(finder for finder, found, _ in pkgutil.iter_modules(_folders(package)) if found == name)
    source = finder.find_spec(name, None).loader.get_source(name)  # type: ignore
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]


def _folders(package: str) -> list[str]:
    imported = sys.modules.get(package)
    return list(imported.__path__) if imported else [str(_ROOT / package.replace(".", "/"))]
