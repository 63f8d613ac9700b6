"""`train` in processes that start fast: forked from a server that has imported torch, timm and torch._dynamo once."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_PATIENCE_S = 600  # machines may be busy
_server.set_forkserver_preload(["train.trainer", "train.cli", "torch._dynamo"])


def start(*arguments: object, output: Path, ranks: tuple[int, int, int] | None = None) -> ForkServerProcess:
    """Start `train ARGUMENTS`, which prints into the file `output`. `ranks`: rank, world size and port."""
    process = _server.Process(target=_command, args=([str(argument) for argument in arguments], output, ranks))
    process.start()
    return process


def train(*arguments: object, output: Path, ranks: int = 1) -> tuple[int | None, str]:
    """Run `train ARGUMENTS` to its end, as this many ranks: exit code and output of the first one."""
    port = free_port()
    files = [output.with_name(f"{output.name}-{rank}") for rank in range(ranks)]
    processes = [
        start(*arguments, output=file, ranks=(rank, ranks, port) if ranks > 1 else None)
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


def steps_done(run: Path) -> int:
    """The number of losses that a run in another process has written; the last line may be incomplete."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.is_file() else 0


def wait_until(process: ForkServerProcess, run: Path, step: int) -> None:
    while process.is_alive() and steps_done(run) < step:
        time.sleep(0.002)
    assert process.is_alive(), f"the run ended before step {step}"


def _command(arguments: list[str], output: Path, ranks: tuple[int, int, int] | None) -> None:
    from train.cli import main

    if ranks:
        _set_rank(*ranks)
    sys.argv = ["train", *arguments]
    with (
        open(output, "a", buffering=1, encoding="utf8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        main()


def _as_rank(function: Callable[..., Any], arguments: tuple[object, ...], rank: int, ranks: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    _set_rank(rank, ranks, port)
    function(rank, *arguments)


def _set_rank(rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
