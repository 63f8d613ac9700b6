"""The command `train` in processes of its own that start fast: forked from a server that has imported torch and timm
once.

torch._dynamo too, which the first optimiser imports: two seconds of every process otherwise. `_PATIENCE_S` is for
    machines that do other
work beside the tests.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_PATIENCE_S = 600
_server.set_forkserver_preload(["train.trainer", "train.cli", "torch._dynamo"])


def start(*arguments: object, said: Path, ranks: tuple[int, int, int] | None = None) -> ForkServerProcess:
    """Begin `train ARGUMENTS`; what it prints goes to the file `said`. `ranks`: rank, how many, port, as torchrun would
    say.
    """
    process = _server.Process(target=_command, args=([str(argument) for argument in arguments], said, ranks))
    process.start()
    return process


def train(*arguments: object, said: Path, ranks: int = 1) -> tuple[int | None, str]:
    """Run `train ARGUMENTS` to its end, as this many ranks: the first one's exit code, and what it said."""
    port = free_port()
    files = [said.with_name(f"{said.name}-{rank}") for rank in range(ranks)]
    processes = [
        start(*arguments, said=file, ranks=(rank, ranks, port) if ranks > 1 else None)
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.join(_PATIENCE_S)
        process.kill()
    return processes[0].exitcode, files[0].read_text()


def assert_ranks_succeed(function: Callable[..., Any], *arguments: object, ranks: int = 2) -> None:
    """Call `function(rank, *arguments)` as this many gloo ranks; an assertion that fails in one fails here."""
    port = free_port()
    processes = [
        _server.Process(target=_as_rank, args=(function, arguments, rank, ranks, port)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE_S)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(arguments: list[str], said: Path, ranks: tuple[int, int, int] | None) -> None:
    from train.cli import main

    if ranks:
        _tell_ranks(*ranks)
    sys.argv = ["train", *arguments]
    with (
        open(said, "a", buffering=1, encoding="utf8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        main()


def _as_rank(function: Callable[..., Any], arguments: tuple[object, ...], rank: int, ranks: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    _tell_ranks(rank, ranks, port)
    function(rank, *arguments)


def _tell_ranks(rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
