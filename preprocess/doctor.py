"""`preprocess doctor`: what this machine has, what it lacks, and the mend; nothing heavy is imported for it.

good       as it should be            missing   needed, and not there: exit code 1
weak       there, but slow or small   absent    not needed for what is installed
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from labels import __version__
from labels.settings import Pipeline
from preprocess.machine import (
    MachineFault,
    core_count,
    cuda_devices,
    file_limits,
    free_bytes,
    has_library,
    memory_bytes,
    write_and_read_speed,
)

State = Literal["good", "weak", "absent", "missing"]
_PACKAGE = "superclass-lean"
_PYTHON = (3, 11)
_OPEN_FILES, _MIB_A_WORKER, _MIB_A_SECOND, _FREE_GIB = 4_096, 512, 100, 10
_COLOURS: dict[str, str] = {"good": "green", "weak": "yellow", "absent": "dim", "missing": "bold red"}
_EXTRAS = {
    "train": "the trainer", "ffcv": "FFCV's own loader", "ray": "build-labels --engine ray", "s3": "OUT and shards on s3://",
    "sentencepiece": "train-tokenizer --kind unigram", "wandb": "metrics to Weights & Biases", "demo": "the demo's plots",
    "evals": "encoders of open_clip and Hugging Face", "onnx": "train export --format onnx",
    "dev": "tests and checks",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, its state, what is there, and how to mend it."""

    name: str
    state: State
    value: str
    mend: str = ""

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def examine(out: Path, settings: Pipeline) -> list[Finding]:
    """Look at everything; nothing is changed but for a file that is written beside OUT to time the disk, and removed.

    Args:
        out: where OUT is, or is to be.
        settings: for the number of workers.
    """
    extras = installed_extras()
    findings = [_python(), *_libraries(extras)]
    findings += [*_ffcv(), _turbojpeg("train" in extras), *_cuda("train" in extras)]
    return [*findings, *_cores(settings), _memory(settings), _files(), *_disk(out)]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= _PYTHON
    return Finding("python", "good" if good else "missing", f"{version}, {sys.executable}", "" if good else "install Python 3.11 or newer")


def _requirements() -> dict[str, list[Requirement]]:
    """Extra -> what it needs; "" for what is always needed."""
    groups: dict[str, list[Requirement]] = {"": []}
    try:
        lines = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return groups
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            groups[""].append(requirement)
            continue
        for extra in _EXTRAS:
            if marker.evaluate({"extra": extra}):
                groups.setdefault(extra, []).append(requirement)
    return groups


def installed_extras() -> list[str]:
    """Extras whose every package is there, in whatever version."""
    return [name for name, needed in _requirements().items() if name and all(_version(one.name) for one in needed)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libraries(extras: list[str]) -> Iterator[Finding]:
    groups = _requirements()
    if not groups[""]:
        yield Finding(_PACKAGE, "weak", f"{__version__}, not installed: its needs are not known", "pip install . in the repository")
        return
    yield Finding(_PACKAGE, "good", __version__)
    for name, needed in groups.items():
        if name and name not in extras:
            lacking = [one.name for one in needed if not _version(one.name)]
            yield Finding(f"[{name}]", "absent", f"{_EXTRAS[name]}; not here: {', '.join(lacking)}", f"pip install '{_PACKAGE}[{name}]'")
            continue
        wrong = [one for one in needed if not (version := _version(one.name)) or not one.specifier.contains(version, prereleases=True)]
        told = ", ".join(f"{one.name} {_version(one.name) or 'not installed'}" for one in wrong or needed)
        if wrong:
            wanted = " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
            yield Finding(f"[{name}]" if name else "libraries", "missing", told, f"pip install {wanted}")
        else:
            yield Finding(f"[{name}]" if name else "libraries", "good", told)


def _ffcv() -> Iterator[Finding]:
    version = _version("ffcv")
    if version is None:
        return  # its extra says so
    lacking = [name for name in ("opencv_core", "turbojpeg") if not has_library(name)]
    mend = "apt-get install libopencv-dev libturbojpeg0-dev" if lacking else ""
    told = f"{version}; the trainer here does without it"
    yield Finding("ffcv", "weak" if lacking else "good", f"{told}; its {', '.join(lacking)} is not here" if lacking else told, mend)


def _turbojpeg(trainer: bool) -> Finding:
    if has_library("turbojpeg"):
        return Finding("libturbojpeg", "good", "the trainer's decoder")
    return Finding(
        "libturbojpeg", "missing" if trainer else "absent", "not here; the trainer decodes with it", "apt-get install libturbojpeg0"
    )


def _cuda(trainer: bool) -> Iterator[Finding]:
    torch = _version("torch")
    if torch is None:
        return  # its extra says so
    try:
        devices = cuda_devices()
    except MachineFault as fault:
        yield Finding("cuda", "weak", str(fault), "look at nvidia-smi; a reboot after a driver's update often helps")
        return
    if not devices:
        yield Finding("cuda", "absent", f"no GPU; torch {torch} trains on the CPU")
        return
    told = ", ".join(devices)
    built = "+cpu" not in torch and any(name.startswith("nvidia-") for name in _installed())
    mend = "" if built else "install a torch with CUDA: see pytorch.org/get-started"
    yield Finding("cuda", "good" if built else "weak", told if built else f"{told}; but torch {torch} is built without CUDA", mend)


def _installed() -> list[str]:
    return [name.lower() for one in metadata.distributions() if (name := one.metadata["Name"])]


def _cores(settings: Pipeline) -> Iterator[Finding]:
    usable, quota = core_count()
    if quota is not None and quota < usable:
        yield Finding("cores", "weak", f"{usable}, but the container's quota is {quota:g}", f"set build.workers to {max(int(quota), 1)}")
    else:
        yield Finding("cores", "good", f"{usable}; build.workers {settings.build.workers or 'one for each'}")


def _memory(settings: Pipeline) -> Finding:
    total, available = memory_bytes()
    workers = settings.build.workers or core_count()[0]
    told = f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of it free"
    if available < workers * _MIB_A_WORKER * 2**20:
        return Finding("memory", "weak", f"{told}; {workers} workers want {_MIB_A_WORKER} MiB each", "take fewer --workers")
    return Finding("memory", "good", told)


def _files() -> Finding:
    soft, hard = file_limits()
    told = f"{soft:,} may be open at once"
    if soft < _OPEN_FILES:
        mend = f"ulimit -n {min(_OPEN_FILES, hard)}" if hard > soft else "have the hard limit raised (limits.conf)"
        return Finding("open files", "weak", f"{told}; a large OUT has as many betons", mend)
    return Finding("open files", "good", told)


def _disk(out: Path) -> Iterator[Finding]:
    folder = next(place for place in (out.resolve(), *out.resolve().parents) if place.is_dir())
    free = free_bytes(folder) / 2**30
    small = free < _FREE_GIB
    mend = "free space, or give another --out; `preprocess plan DATA` says how much is needed" if small else ""
    yield Finding("free disk", "weak" if small else "good", f"{free:,.1f} GiB in {folder}", mend)
    try:
        write, read = write_and_read_speed(folder)
    except OSError as error:
        yield Finding(
            "disk speed", "missing", f"{folder} cannot be written: {error.strerror}", "give another --out, or the right to write there"
        )
        return
    slow = min(write, read) < _MIB_A_SECOND
    told = f"writes {write:,.0f}, reads {read:,.0f} MiB/s in {folder}"
    yield Finding(
        "disk speed", "weak" if slow else "good", told, "take a local disk for OUT while it is built and trained on" if slow else ""
    )


def print_findings(findings: list[Finding], console: Console) -> None:
    """For people."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        # Text: the name of an extra, [train], would be taken for a colour.
        table.add_row(Text(finding.name), Text(finding.state, _COLOURS[finding.state]), Text(finding.value))
        if finding.mend:
            table.add_row("", "", Text(f"mend: {finding.mend}", "yellow" if finding.state != "absent" else "dim"))
    console.print(table)
    missing = sum(finding.state == "missing" for finding in findings)
    console.print(f"{missing} things that are needed are missing" if missing else "everything that is needed is here")
