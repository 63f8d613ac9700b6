"""Two writers: the error names the holder of the output folder, a dead holder gives way, members of an array job write
at once.
"""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labels import locks
from labels.locks import Holder, leased, one_of_many, only_writer
from labels.storage import UserError

PATIENCE_S = 60
MEMBERS = (0, 4), (1, 4), (3, 4)


@contextmanager
def holding(path: Path, member: tuple[int, int] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed, or its standard input ends."""
    call = f"one_of_many(path, *{member})" if member else "only_writer(path)"
    script = (
        "import sys; from pathlib import Path; from labels.locks import one_of_many, only_writer\n"
        f"path = Path({str(path)!r})\nwith {call}:\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.communicate(timeout=PATIENCE_S)


def leave_dead(path: Path, member: tuple[int, int] | None = None) -> int:
    """A lock file whose holder was killed; the number of its process."""
    with holding(path, member) as process:
        process.kill()
        process.wait(PATIENCE_S)
    return process.pid


def take(path: Path) -> None:
    with only_writer(path):
        pass


def test_the_error_of_a_second_writer_names_the_first_and_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / ".lock"
    with holding(path) as process:
        holder = (
            f"another process is writing to {path.parent} (host {socket.gethostname()}, process {process.pid}), for "
        )
        with pytest.raises(UserError, match=re.escape(holder) + r"\d+ s\n  fix: wait for it, or stop it"):
            take(path)
        with pytest.raises(UserError, match=re.escape(holder)), one_of_many(path, 0, 4):
            pass
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 12 * 60)
        with pytest.raises(UserError, match=re.escape(holder + "12 min")):
            take(path)
    take(path)
    assert path.read_bytes() == b""


def test_a_dead_holder_is_taken_over_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ".lock"
    pid = leave_dead(path)
    with only_writer(path):
        assert json.loads(path.read_bytes())["process"] == os.getpid()
    holder = f"(host {socket.gethostname()}, process {pid})"
    note = f"note: {path} was left by a process that ended without releasing it {holder}"
    assert note in capsys.readouterr().err
    take(path)
    assert capsys.readouterr().err == ""


def test_members_hold_their_locks_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holding(path, MEMBERS[0]) as first, holding(path, MEMBERS[1]), one_of_many(path, 2, 4):
        with (
            pytest.raises(UserError, match=rf"another process is writing .*process {first.pid}\), for"),
            one_of_many(path, 0, 4),
        ):
            pass
        with pytest.raises(UserError, match=r"is writing .*process") as refused, one_of_many(path, 0, 5):
            pass
        assert "as 0-of-4" in str(refused.value) and "members of 5 next to this one (0 of 5)" in str(refused.value)
        with pytest.raises(UserError, match=rf"process {first.pid}\)"):
            take(path)
    assert [found.name for found in tmp_path.iterdir()] == [".lock"], "members remove their files"
    take(path)


def test_a_dead_member_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ".lock"
    pids = [leave_dead(path, member) for member in MEMBERS]
    with one_of_many(path, 0, 4):
        assert f"process {pids[0]})" in capsys.readouterr().err
    with one_of_many(path, 0, 7):  # dead members of another n are no hindrance
        pass
    take(path)
    said = capsys.readouterr().err
    assert f"process {pids[1]})" in said and f"process {pids[2]})" in said
    assert [found.name for found in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_or_empty_lock_file_is_no_hindrance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"\n", b"{", b"[1]", b'{"host": "a"}', b"\xff\xfe"):
        (tmp_path / ".lock").write_bytes(content)
        take(tmp_path / ".lock")
        assert ("host unknown" in capsys.readouterr().err) == bool(content.strip())


def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks, "REFRESH_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 30.0)


def age(path: Path, seconds: float) -> None:
    """Make the lease at `path` that much older."""
    values = json.loads(path.read_bytes())
    path.write_text(
        json.dumps({**values, "started": values["started"] - seconds, "refreshed": values["refreshed"] - seconds})
    )


def test_without_kernel_locks_there_are_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_kernel_locks(monkeypatch)
    path = tmp_path / ".lock"
    with only_writer(path):
        for second in (only_writer(path), one_of_many(path, 0, 2)):
            with (
                pytest.raises(UserError, match=rf"another process is writing .*process {os.getpid()}\), for \d+ s"),
                second,
            ):
                pass
    with one_of_many(path, 0, 2), one_of_many(path, 1, 2):
        for second in (only_writer(path), one_of_many(path, 0, 2), one_of_many(path, 0, 3)):
            with pytest.raises(UserError, match="another process is writing"), second:
                pass
    assert not list(tmp_path.iterdir())
    for name in (".lock", ".lock-0-of-2"):
        (tmp_path / name).write_bytes(Holder.me().raw)
        age(tmp_path / name, 3 * 3600)
    take(path)
    said = capsys.readouterr().err
    assert said.count("was left by a process") == 2 and said.count("for 3 h; taken over") == 2
    assert not list(tmp_path.iterdir())


def test_a_lease_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "REFRESH_S", 0.02)
    with leased(tmp_path / "lease"):
        before = Holder.read(tmp_path / "lease")
        assert before
        end = time.monotonic() + PATIENCE_S
        while (now := Holder.read(tmp_path / "lease")) is None or now.refreshed == before.refreshed:
            assert time.monotonic() < end
        assert (now.token, now.started) == (before.token, before.started)


def test_a_live_holder_whose_clock_is_behind_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "REFRESH_S", 0.5)
    path, ended = tmp_path / "lease", threading.Event()
    path.write_bytes(Holder.me().raw)
    age(path, 3600)

    def rewrite() -> None:
        while not ended.wait(0.05):
            holder = Holder("other", 1, 0.0, time.time(), "other")
            path.with_name("new").write_bytes(holder.raw)
            path.with_name("new").replace(path)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        with pytest.raises(UserError, match="host other, process 1"), leased(path):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_run_that_loses_its_lease_stops_and_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "REFRESH_S", 0.05)
    path = tmp_path / "lease"
    other = Holder("other", 1, time.time(), time.time(), "other").raw

    def be_robbed() -> None:
        with leased(path):
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:  # a refresh that has just looked may write over it once
                (tmp_path / "new").write_bytes(other)  # whole at any moment: the loser is interrupted anywhere
                os.replace(tmp_path / "new", path)
                time.sleep(0.01)

    with pytest.raises(UserError, match=r"was taken over by another process \(host other, process 1\)"):
        be_robbed()
    assert path.read_bytes() == other


def test_a_users_interrupt_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), leased(tmp_path / "lease"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_lease_has_one_winner(tmp_path: Path) -> None:
    won, barrier = [], threading.Barrier(8)

    def contend(number: int) -> None:
        barrier.wait()
        try:
            with leased(tmp_path / "lease"):
                won.append(number)
                barrier.wait()
        except UserError:
            barrier.wait()

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(won) == 1
