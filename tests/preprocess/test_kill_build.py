"""`build-labels` ended at any moment and run again: the same bytes as undisturbed. And workers that die."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from labels import storage
from labels.storage import UserError
from preprocess.engine import run_tasks, start_server
from shard_factory import Built, build, contents, end_without_a_word, preprocess, sample, write_shards, write_tar

ROOT = Path(__file__).parents[2]
IMPORT_PATH = [str(ROOT), str(ROOT / "tests" / "helpers")]  # for processes that unpickle functions of this file

KILLS = 20
PATIENCE_S = 300


class Command:
    """`preprocess build-labels` in a process group of its own.

    With several workers as a user starts it. With one worker it is forked from a server that has imported everything,
    since loading takes longer than what is to be interrupted; with one worker there is only this process.
    """

    def __init__(self, data: Path, out: Path, workers: int) -> None:
        arguments = ["build-labels", str(data), "--out", str(out), "--workers", str(workers)]
        if workers == 1:
            start_server()
            context = multiprocessing.get_context("forkserver")
            self._process = context.Process(target=run_as_command, args=(arguments,))
            self._process.start()
            self.pid = self._process.pid or 0
        else:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "preprocess", *arguments], start_new_session=True, **quiet
            )
            self.pid = self._process.pid
        wait_for(lambda: (out / ".lock").exists() or self.ended())

    def ended(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is not None
        return not self._process.is_alive()

    def wait(self) -> int | None:
        """The exit code, negative for a signal."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(PATIENCE_S)
        self._process.join(PATIENCE_S)
        return self._process.exitcode

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)


def run_as_command(arguments: list[str]) -> None:
    os.setsid()
    sys.exit(preprocess(*arguments).code)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s"
        time.sleep(0.002)


def test_killed_at_random_moments_and_run_again(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 6, 40)
    write_tar(data / "00000006.tar", [*sample("0"), *sample("1", None), *sample("2", "words", b"junk")])
    expected, lasts_s = None, {}
    for workers in (1, 2):
        command = Command(data, tmp_path / str(workers), workers)
        begun = time.monotonic()
        assert command.wait() == 0
        lasts_s[workers] = time.monotonic() - begun
        expected = expected or contents(tmp_path / str(workers))
        assert contents(tmp_path / str(workers)) == expected
    chance, killed = random.Random(7), 0
    for kill in range(KILLS):
        out, workers = tmp_path / f"killed {kill}", 2 if kill % 3 == 2 else 1
        command = Command(data, out, workers)
        time.sleep((kill + chance.random()) / KILLS * lasts_s[workers])
        with suppress(ProcessLookupError):  # it may have ended
            command.kill()
        killed += command.wait() == -signal.SIGKILL
        build(data, out)
        assert contents(out) == expected, f"kill {kill}"
    assert killed > KILLS // 4  # some have ended by then, on a machine whose speed changes


@pytest.mark.parametrize("number", range(17))
def test_stopped_at_every_single_rename(
    finished: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    renames = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames > number:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "replace", replace)
        stopped = preprocess("build-labels", finished.data, "--out", tmp_path / "out", "--workers", 1).code != 0
    # options, inputs; two label files, counts and markers; idf.parquet, idf.duckdb and marker; a beton and marker;
    # quarantine, config, manifest
    assert stopped == (number < 16)
    assert (tmp_path / "out" / "manifest.json").exists() == (not stopped)
    build(finished.data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.out)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_worker_that_dies_ends_the_run_with_a_reason(how: str) -> None:
    with pytest.raises(UserError, match="a worker process exited unexpectedly; finished shards are kept") as caught:
        list(run_tasks(end_without_a_word, ["fine", how, *["fine"] * 9], 2))
    assert "fewer --workers" in str(caught.value)


def test_an_error_in_a_worker_keeps_its_parts() -> None:
    with pytest.raises(UserError, match="this task is the user's mistake") as caught:
        list(run_tasks(end_without_a_word, ["fine", "raise", *["fine"] * 9], 2))
    assert (caught.value.allowed, caught.value.fix) == ("another", "fix it")


def test_all_results_come_once() -> None:
    tasks = [str(number) for number in range(11)]
    assert (
        sorted(run_tasks(end_without_a_word, tasks, 2))
        == sorted(run_tasks(end_without_a_word, tasks, 1))
        == sorted(tasks)
    )


def test_workers_end_when_the_run_alone_is_killed(tmp_path: Path) -> None:
    """As the out-of-memory killer does it: no orphan may write while the next run writes."""
    script = tmp_path / "script.py"
    script.write_text(
        "from shard_factory import leave_pid_and_sleep\n"
        "from preprocess.engine import run_tasks\n"
        f"if __name__ == '__main__':\n    list(run_tasks(leave_pid_and_sleep, [{str(tmp_path / 'pids')!r}] * 4, 2))\n"
    )
    (tmp_path / "pids").mkdir()
    path = os.pathsep.join([*IMPORT_PATH, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    finally:
        process.kill()
        process.wait()
    workers = [int(pid.name) for pid in (tmp_path / "pids").iterdir()]
    wait_for(lambda: not any(running(pid) for pid in workers))
    assert len(workers) == 2 and not any(map(running, workers))


def running(pid: int) -> bool:
    """Whether the process is there and no zombie that only waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
