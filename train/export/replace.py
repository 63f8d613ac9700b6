"""Folders that are given away: which may be replaced (those with what a command of this project wrote alone), and who may read them."""

import json
import stat
from pathlib import Path

from labels.errors import UserError


def check_replaceable(out: Path, mark: str, command: str) -> None:
    """Refuse to write into `out` where it holds anything that `command` has not written: it would be lost.

    Args:
        mark: the file in which the command tells, as `files`, what else it has written.
        command: e.g. `train export`, for the message.

    Raises:
        UserError: naming what would be lost.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    mend = "give another --out, or move that away yourself"
    try:
        files = set(json.loads((out / mark).read_bytes())["files"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"--out {out} exists and is not of `{command}`: it has no {mark} of ours",
            allowed=f"a new or empty folder, or one that `{command}` has written",
            mend=mend,
        ) from None
    others = sorted(path.name for path in out.iterdir() if path.name not in files | {mark})
    if others:
        raise UserError(
            f"--out {out} holds what `{command}` has not written there, and replacing the folder would remove it: {', '.join(others[:4])}",
            allowed=f"a new or empty folder, or one as `{command}` has written it",
            mend=mend,
        )


def share_like(file: Path) -> None:
    """Give all files beside `file` its rights: safetensors writes for its owner alone, whatever the umask says."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for other in file.parent.iterdir():
        if other.is_file():
            other.chmod(mode)
