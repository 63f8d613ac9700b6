"""Kinds of a thing that are the files of one folder: losses, evaluators, families of tokenizers. A new file is a new kind.

Their names, and the few words that are wanted before a kind is used, are read from the files: nothing is imported for them.
"""

import re
from pathlib import Path

LOSSES = "train.losses.kinds"
EVALUATORS = "train.evals.protocols.kinds"
TOKENIZERS = "labels.tokenizers.kinds"
_ROOT = Path(__file__).parent.parent


def names_in(package: str) -> list[str]:
    """The kinds of a package, in alphabetical order: its modules but for those that begin with `_`."""
    return sorted(file.stem for file in _folder(package).glob("*.py") if not file.stem.startswith("_"))


def summary(package: str, name: str) -> str:
    """The first paragraph of a kind's docstring."""
    found = re.match(r'"""(.+?)(?:\n\n|""")', _text(package, name), re.DOTALL)
    return found[1] if found else ""


def says(package: str, name: str, constant: str) -> bool:
    """Whether a kind's file has the line `constant = True`."""
    return re.search(rf"^{constant} = True\b", _text(package, name), re.MULTILINE) is not None


def _folder(package: str) -> Path:
    return _ROOT / package.replace(".", "/")


def _text(package: str, name: str) -> str:
    return (_folder(package) / f"{name}.py").read_text(encoding="utf8")
