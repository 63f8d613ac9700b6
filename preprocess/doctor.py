"""`preprocess doctor`: what this machine has, what is missing, and how to fix it.

    examine: Python, libraries, CUDA, cores, memory, open files, disk -> Findings -> print_findings, or JSON

States: good; weak: there, but slow or small; missing: needed, but not installed (exit code 1); absent: not needed by
the installed extras. Versions come from package metadata and the GPUs from nvidia-smi: no heavy library is loaded.
"""

import math
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from labels import __version__
from labels.settings import Pipeline

State = Literal["good", "weak", "absent", "missing"]
_PACKAGE = "superclass-lean"
_CGROUP = Path("/sys/fs/cgroup")
_OPEN_FILES, _MIB_PER_WORKER, _MIB_PER_SECOND, _FREE_GIB = 4_096, 512, 100, 10
_TEST_BYTES, _BLOCK_BYTES, _CUDA_S = 64 << 20, 4 << 20, 20
_CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
_COLOURS = {"good": "green", "weak": "yellow", "absent": "dim", "missing": "bold red"}
_EXTRAS = ("train", "evals", "onnx", "ffcv", "ray", "s3", "wandb", "sentencepiece", "demo", "dev")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    value: str
    fix: str = ""


def _finding(name: str, value: str, fix: str, otherwise: State = "weak") -> Finding:
    """`otherwise` is the state if there is something to fix."""
    return Finding(name, otherwise if fix else "good", value, fix)


def examine(out: Path, settings: Pipeline) -> list[Finding]:
    """All checks. The disk of `out`, a folder or a path for one, is timed with a file that is removed again."""
    python = Finding("python", "good", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")
    return [python, *_libraries(), *_native_libraries(), *_cuda(), *_limits(settings), *_disk(out)]


def _requirements() -> dict[str, list[Requirement]]:
    """The requirements of the package, under "", and those that each extra adds."""
    groups: dict[str, list[Requirement]] = {"": []}
    with suppress(metadata.PackageNotFoundError):
        for requirement in map(Requirement, metadata.requires(_PACKAGE) or []):
            for extra in ("", *_EXTRAS):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    groups.setdefault(extra, []).append(requirement)
                    break
    return groups


def installed_extras() -> list[str]:
    """Extras of which all packages are installed, in any version."""
    groups = _requirements()
    return [extra for extra in groups if extra and all(_version(package.name) for package in groups[extra])]


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _fits(package: Requirement, version: str | None) -> bool:
    return bool(version) and package.specifier.contains(version, prereleases=True)


def _libraries() -> Iterator[Finding]:
    groups, extras = _requirements(), installed_extras()
    value = __version__ + ("" if groups[""] else ", not installed: its requirements are not known")
    yield _finding(_PACKAGE, value, "" if groups[""] else "pip install . in the repository")
    for extra, needed in groups.items():
        versions = {package.name: _version(package.name) for package in needed}
        wrong = [package for package in needed if not _fits(package, versions[package.name])]
        if extra and extra not in extras:
            missing = ", ".join(name for name, version in versions.items() if not version)
            yield Finding(f"[{extra}]", "absent", f"not installed: {missing}", f"pip install '{_PACKAGE}[{extra}]'")
            continue
        value = ", ".join(f"{package.name} {versions[package.name] or 'not installed'}" for package in wrong or needed)
        fix = " ".join(["pip install", *(f"'{package.name}{package.specifier}'" for package in wrong)]) if wrong else ""
        yield _finding(f"[{extra}]" if extra else "libraries", value, fix, "missing")


def _native_libraries() -> Iterator[Finding]:
    if version := _version("ffcv"):
        missing = ", ".join(f"lib{name}" for name in ("opencv_core", "turbojpeg") if not find_library(name))
        value = f"{version}; the trainer does not need it" + (f"; not found: {missing}" if missing else "")
        yield _finding("ffcv", value, "apt-get install libopencv-dev libturbojpeg0-dev" if missing else "")
    fix = "" if find_library("turbojpeg") else "apt-get install libturbojpeg0"
    value = f"{'not found; ' if fix else ''}the trainer decodes images with it"
    yield _finding("libturbojpeg", value, fix, "missing" if "train" in installed_extras() else "absent")
    with suppress(ImportError):  # without numba, which `libraries` reports
        from labels.native import TEMPORARY_CACHE, cache_folder  # LAZY: numba

        folder, fix = cache_folder(), "set NUMBA_CACHE_DIR to a folder that can be written and is kept"
        value = f"in {folder}" if folder else "no folder can be written: every process compiles it again"
        yield _finding("compiled code", value, "" if folder and TEMPORARY_CACHE not in folder else fix)


def _cuda() -> Iterator[Finding]:
    if not (torch := _version("torch")):
        return
    try:  # name, memory and driver of every GPU, and in the usual table the newest CUDA that the driver supports
        listed = _nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").strip()
        driver = re.search(r"CUDA (?:\w+ )?Version\s*:\s*((\d+)\.\d+)", _nvidia_smi())
    except OSError as error:
        yield Finding("cuda", "weak", str(error), "run nvidia-smi; a reboot after a driver update often helps")
        return
    devices = ", ".join(re.sub(r"(?m), ([\d.]+)$", r", driver \1", listed).splitlines())
    tag, runtime = re.search(r"\+cu(\d+)(\d)$", torch), next(filter(None, map(_version, _CUDA_RUNTIMES)), "")
    built = f"{tag[1]}.{tag[2]}" if tag else "" if "+cpu" in torch else runtime  # 2.9.0+cu128: 12.8
    install = "see pytorch.org/get-started"
    if not devices:
        yield Finding("cuda", "absent", f"no GPU; torch {torch} trains on the CPU")
    elif not built:
        value = f"{devices}; but torch {torch} is built without CUDA"
        yield Finding("cuda", "weak", value, f"install a torch with CUDA: {install}")
    else:
        old = driver and int(driver[2]) < int(built.split(".")[0])
        value = f"{devices}; torch {torch} for CUDA {built}" + (f", the driver supports {driver[1]}" if driver else "")
        yield _finding("cuda", value, f"update the driver, or {install} for an older CUDA" if old else "")


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; empty without a CUDA driver. OSError: the driver finds no working GPU."""
    try:
        command = ["nvidia-smi", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_CUDA_S, check=False)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi does not answer within {_CUDA_S} seconds") from None
    if answer.returncode:
        raise OSError(f"nvidia-smi fails: {(answer.stdout or answer.stderr).strip()}")
    return answer.stdout


def _control_group(file: str, unlimited: list[float]) -> list[float]:
    """The numbers in a file of the container's control group, which psutil does not read, or `unlimited`."""
    try:
        return [float(word) for word in (_CGROUP / file).read_text().replace("max", "inf").split()]
    except OSError:
        return unlimited


def _limits(settings: Pipeline) -> Iterator[Finding]:
    process, memory = psutil.Process(), psutil.virtual_memory()
    cores = len(process.cpu_affinity() or [])
    quota, period = _control_group("cpu.max", [math.inf, 1])
    value = f"{cores}; build.workers {settings.build.workers or 'one per core'}"
    value += f"; the container's quota is {quota / period:g}" if quota / period < cores else ""
    fix = f"set build.workers to {max(int(quota / period), 1)}" if quota / period < cores else ""
    yield _finding("cores", value, fix)

    [limit], [used] = _control_group("memory.max", [math.inf]), _control_group("memory.current", [0])
    total, available = min(memory.total, limit), min(memory.available, max(limit - used, 0))
    workers = settings.build.workers or cores
    value = f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} available"
    value += f"; {workers} workers need {_MIB_PER_WORKER} MiB each"
    yield _finding("memory", value, "use fewer --workers" if available < workers * _MIB_PER_WORKER * 2**20 else "")

    soft, hard = (limit if limit >= 0 else sys.maxsize for limit in process.rlimit(psutil.RLIMIT_NOFILE))
    fix = f"ulimit -n {min(_OPEN_FILES, hard)}" if hard > soft else "raise the hard limit (limits.conf)"
    value = f"at most {soft:,} at once; a large output folder has thousands of betons"
    yield _finding("open files", value, fix if soft < _OPEN_FILES else "")


def _disk(out: Path) -> Iterator[Finding]:
    folder = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.is_dir())
    free = psutil.disk_usage(str(folder)).free / 2**30
    fix = "free space, or give another --out; `preprocess plan DATA` estimates how much is needed"
    yield _finding("free disk", f"{free:,.1f} GiB in {folder}", fix if free < _FREE_GIB else "")
    try:
        write, read = write_and_read_speed(folder)
    except OSError as error:
        fix = "give another --out, or the permission to write there"
        yield Finding("disk speed", "missing", f"{folder} cannot be written: {error.strerror}", fix)
        return
    fix = "build to and train from a local disk" if min(write, read) < _MIB_PER_SECOND else ""
    yield _finding("disk speed", f"writes {write:,.0f}, reads {read:,.0f} MiB/s in {folder}", fix)


def write_and_read_speed(folder: Path) -> tuple[float, float]:
    """MiB/s of a file of 64 MiB: written and synced, dropped from the page cache, read back. OSError: not writable."""
    path = folder / f".{secrets.token_hex(6)}.partial"
    block = secrets.token_bytes(_BLOCK_BYTES)  # not compressible
    try:
        with open(path, "w+b", buffering=0) as file:
            begin = time.perf_counter()
            for _ in range(_TEST_BYTES // _BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(_BLOCK_BYTES):
                pass
            read = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return _TEST_BYTES / 2**20 / (written - begin), _TEST_BYTES / 2**20 / (read - written)


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a table with the number of missing things."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        # Text: rich would take the name of an extra, [train], for a style.
        table.add_row(Text(finding.name), Text(finding.state, _COLOURS[finding.state]), Text(finding.value))
        if finding.fix:
            table.add_row("", "", Text(f"fix: {finding.fix}", "yellow" if finding.state != "absent" else "dim"))
    console.print(table)
    missing = sum(finding.state == "missing" for finding in findings)
    console.print(f"needed, but missing: {missing}" if missing else "everything that is needed is installed")
