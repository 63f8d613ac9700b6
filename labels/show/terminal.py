"""What both programs print: counts of things, text from data, errors as messages, on a terminal of any encoding.

main of preprocess and train -> run_command -> a command; a UserError -> `error: ... allowed: ... fix: ...`, exit code 2
"""

import errno
import io
import os
import re
import resource
import sys
from collections.abc import Callable

from labels.storage import UserError

# Control characters (C0, DEL, C1), separators of lines, and what changes the direction of the text that follows.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`1 shard`, `1,200 shards`; `plural` where it is more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def visible(text: str) -> str:
    """Text without control characters, which become symbols: an escape becomes ␛, a right-to-left override ⟨202E⟩."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨{code:04X}⟩"

    return _INVISIBLE.sub(symbol, text)


def run_command(command: Callable[[], object]) -> None:
    """Run a program's command: a character that the terminal's encoding lacks becomes `?`, and errors of users and
    limits of the system become a message and exit code 2, never a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # standard error writes \u732b by default
    try:
        command()
    except UserError as error:
        _report(error)
    except Exception as error:
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        fix = "`ulimit -n 4096`" if hard > soft else "raise `nofile` in /etc/security/limits.conf"
        _report(UserError(f"more files are needed at once than the {soft:,} that this process may open", fix=fix))


def _report(error: UserError) -> None:
    text = "\n".join(visible(line) for line in str(error).split("\n"))
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
