"""Facts of this machine, asked of the system itself: cores, memory, limits, disk, GPUs."""

import ctypes
import os
import resource
import secrets
import shutil
import subprocess
import time
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TRIAL_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20


class MachineFault(Exception):
    """Something is there, but does not answer."""


def core_count() -> tuple[int, float | None]:
    """Cores that this process may use, and its control group's quota in cores, None if it has none."""
    usable = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            return usable, int(quota) / int(period)
    return usable, None


def memory_bytes() -> tuple[int, int]:
    """Total and available, the control group's limit counted in."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    facts = {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
    total, available = facts["MemTotal"], facts["MemAvailable"]
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def file_limits() -> tuple[int, int]:
    """Files that a process may have open: now, and at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = 1 << 30
    return (soft if soft != resource.RLIM_INFINITY else unlimited), (hard if hard != resource.RLIM_INFINITY else unlimited)


def free_bytes(folder: Path) -> int:
    """What this user may still write in a folder."""
    return shutil.disk_usage(folder).free


def write_and_read_speed(folder: Path) -> tuple[float, float]:
    """MiB/s of a file of 64 MiB, written to the disk itself and read back without the system's cache, as far as it lets go of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / f".{secrets.token_hex(6)}.partial"
    block = secrets.token_bytes(_BLOCK_BYTES)  # not compressible
    mib = _TRIAL_BYTES / 2**20
    try:
        with open(path, "wb", buffering=0) as file:
            begin = time.perf_counter()
            for _ in range(_TRIAL_BYTES // _BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            while file.read(_BLOCK_BYTES):
                pass
            read = time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return mib / written, mib / read


def has_library(name: str) -> bool:
    """Whether the dynamic linker finds lib<name>."""
    return find_library(name) is not None


def cuda_devices() -> list[str]:
    """Name, memory and driver of every GPU that the CUDA driver offers, by nvidia-smi or, without it, by libcuda; empty if there is none.

    Raises:
        MachineFault: a driver is installed, and does not answer.
    """
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineFault(f"nvidia-smi does not answer: {error}") from None
        if ended.returncode == 0:
            return [line.strip() for line in ended.stdout.splitlines() if line.strip()]
        raise MachineFault(f"nvidia-smi fails: {(ended.stdout + ended.stderr).strip().splitlines()[-1:] or ['without a word']}")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        raise MachineFault("libcuda.so.1 is here, and finds no working driver")
    return [f"GPU {number}" for number in range(count.value)]
