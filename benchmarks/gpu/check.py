"""Check and measure the trainer on one GPU, in one command that ends by itself within 8 minutes.

    bash benchmarks/gpu/pack.sh                      once, on a machine with the repository's .venv: makes gpu-kit/
    python benchmarks/gpu/check.py                   on the GPU machine: copy the repository with gpu-kit/ there first

Five phases, the most worth first, each in a process of its own with a time limit; what a phase does not use goes to the
next ones. Every finished measurement is in OUT/results.json and OUT/results.md within a second, so a run that is cut
keeps what it has. `--device cpu --small` runs everything that a CPU can, in a few minutes, to test the kit itself.

    a  correctness   losses, repeated steps, resume, DDP and FSDP2, resampling      correctness.py
    b  losses        time and memory of head and loss                              losses.py
    c  training      samples/s and MFU of ViT-B/16 and L/16, a profile             training.py
    d  loading       images/s by threads, data wait                                loading.py
    e  demo          a short training and its linear probe                         demo.py
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from summary import markdown

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PHASES = {"correctness": 130, "losses": 60, "training": 150, "loading": 80, "demo": 45}  # seconds, in order of worth
LIMIT_S = 475  # of all phases; within it, a phase ends GRACE_S after its time at the latest
GRACE_S = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU.")
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit", help="The folder of pack.sh.")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="Folder for the results.")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # inside a phase's process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        run_phase(arguments)
    else:
        run_all(arguments)


def run_phase(arguments: argparse.Namespace) -> None:
    """Inside a phase's process."""
    deadline = time.monotonic() + arguments.seconds
    import torch
    from kit import Kit

    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    kit = Kit(device, arguments.small, arguments.kit / "data", arguments.out, arguments.work, deadline)
    if arguments.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # at small sizes threads only wait for each other
    importlib.import_module(arguments.phase).run(kit)


def run_all(arguments: argparse.Namespace) -> None:
    begun, out = time.monotonic(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": arguments.device, "small": arguments.small, "machine": machine(), "phases": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name, open(out / "log.txt", "w", encoding="utf8") as log:
        work, planned = Path(name), 0.0
        for phase in arguments.phases:
            planned += PHASES[phase]
            seconds = min(planned, LIMIT_S - GRACE_S) - (time.monotonic() - begun)
            if seconds <= 0:
                report["phases"][phase] = {"state": "not started: no time left", "seconds": 0.0, "rows": []}
                continue
            report["phases"][phase] = watch(arguments, phase, seconds, work, out, report, log)
            write(report, out)
    report["seconds"] = round(time.monotonic() - begun, 1)
    write(report, out)
    print((out / "results.md").read_text(encoding="utf8"))


def watch(
    arguments: argparse.Namespace, phase: str, seconds: float, work: Path, out: Path, report: dict[str, Any], log: Any
) -> dict[str, Any]:
    """Run a phase in its own process, and write the results whenever it has a new row."""
    begun, rows = time.monotonic(), work / "rows.jsonl"
    rows.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--phase", phase, "--seconds", str(seconds), "--device", arguments.device]
    command += ["--kit", str(arguments.kit.resolve()), "--out", str(out), "--work", str(work)]
    command += ["--small"] if arguments.small else []
    log.write(f"\n== {phase}, {seconds:.0f} s\n")
    log.flush()
    process = subprocess.Popen(
        command, env=environment(arguments.kit.resolve(), work), stdout=log, stderr=log, start_new_session=True
    )
    state, size = "running", -1
    while state == "running":
        try:
            code = process.wait(timeout=0.5)
            state = "done" if code == 0 else f"failed: exit code {code}, see log.txt"
        except subprocess.TimeoutExpired:
            if time.monotonic() - begun > seconds + GRACE_S:
                os.killpg(process.pid, 9)  # with the processes that it started
                process.wait()
                state = "cut: out of time"
        written = rows.stat().st_size if rows.is_file() else 0
        if written != size or state != "running":
            size, lines = written, rows.read_text(encoding="utf8").splitlines() if written else []
            spent = round(time.monotonic() - begun, 1)
            report["phases"][phase] = {"state": state, "seconds": spent, "rows": [json.loads(line) for line in lines]}
            write(report, out)
    return report["phases"][phase]


def environment(kit: Path, work: Path) -> dict[str, str]:
    """For a phase's process: the project, the packed packages and library, and caches that all phases share (numba's is
    in the repository).
    """
    before = os.environ.get("PYTHONPATH"), os.environ.get("LD_LIBRARY_PATH")
    python = [str(ROOT), str(kit / "site"), *filter(None, before[:1])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(python),
        "LD_LIBRARY_PATH": os.pathsep.join([str(kit / "lib"), *filter(None, before[1:])]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for products that are repeatable to the bit
    }


def machine() -> dict[str, str]:
    """Date, processor, cores and versions; GPU and driver by nvidia-smi."""
    model = next((line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if "model name" in line), "?")
    facts = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": sys.version.split()[0]}
    facts |= {"cpu": f"{len(os.sched_getaffinity(0))} cores of {model}"}
    for package in ("torch", "triton", "timm", "numba", "open_clip_torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["gpu"] = "none by nvidia-smi"
    return facts


def read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write(report: dict[str, Any], out: Path) -> None:
    for name, text in (("results.json", json.dumps(report, indent=1)), ("results.md", markdown(report))):
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf8")
        partial.replace(out / name)


if __name__ == "__main__":
    main()
