"""`preprocess doctor` reports what is missing, how to fix it, and exit code 1; it does not import torch."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from labels import native
from preprocess import doctor
from shard_factory import preprocess


@pytest.fixture(autouse=True)
def small_test_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TEST_BYTES", 4 << 20)


def found(tmp_path: Path, code: int = 0) -> dict[str, dict[str, str]]:
    said = preprocess("doctor", "--out", tmp_path, "--json")
    assert said.code == code, said.err
    return {one["name"]: one for one in json.loads(said.out)}


def test_this_machine_is_fit(tmp_path: Path) -> None:
    reported = found(tmp_path)
    assert {
        "python",
        "libraries",
        "libturbojpeg",
        "cores",
        "memory",
        "open files",
        "free disk",
        "disk speed",
    } <= reported.keys()
    assert reported["libraries"]["state"] == "good" and "duckdb" in reported["libraries"]["value"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "state", "value"),
    [
        ("/srv/cache/labels_1", "good", "in /srv/cache/labels_1"),
        ("/tmp/superclass-numba-0/labels_1", "weak", "in /tmp/superclass-numba-0"),
        (None, "weak", "no folder can be written"),
    ],
)
def test_where_compiled_code_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None, state: str, value: str
) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: folder)
    reported = found(tmp_path)["compiled code"]
    assert reported["state"] == state and value in reported["value"]
    assert ("set NUMBA_CACHE_DIR to a folder" in reported["fix"]) == (state == "weak")


def test_a_missing_library_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "ftfy" else "1.0.0" if name == "duckdb" else version(name)
    )
    reported = found(tmp_path, code=1)["libraries"]
    assert (
        reported["state"] == "missing"
        and "ftfy not installed" in reported["value"]
        and "duckdb 1.0.0" in reported["value"]
    )
    assert "'ftfy<7,>=6.3'" in reported["fix"]


def test_what_an_extra_asks_for_is_not_needed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=2", 'no-such-tracker>=1; extra == "wandb"', 'no-such-thing>=1; extra == "not-known-here"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    reported = found(tmp_path)
    assert reported["libraries"]["state"] == "good" and "no-such" not in reported["libraries"]["value"]
    assert reported["[wandb]"]["state"] == "absent" and "no-such-tracker" in reported["[wandb]"]["value"]
    assert "[wandb]" in preprocess("doctor", "--out", tmp_path).out


def test_every_extra_is_known() -> None:
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        assert set(doctor._EXTRAS) == set(tomllib.load(file)["project"]["optional-dependencies"])


def test_the_trainers_decoder_is_needed_where_the_trainer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_library", lambda name: None)
    reported = found(tmp_path, code=1)["libturbojpeg"]
    assert reported["state"] == "missing" and reported["fix"] == "apt-get install libturbojpeg0"
    monkeypatch.setattr(doctor, "installed_extras", list)
    assert found(tmp_path)["libturbojpeg"]["state"] == "absent"


def test_limits_are_weak_with_their_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "rlimit", lambda _process, _limit: (1024, 20_000))
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _process: list(range(16)))
    monkeypatch.setattr(psutil, "disk_usage", lambda _folder: SimpleNamespace(free=1 << 30))
    group = tmp_path / "cgroup"
    monkeypatch.setattr(doctor, "_CGROUP", group)
    group.mkdir()
    for name, content in (("cpu.max", "250000 100000"), ("memory.max", f"{3 << 30}"), ("memory.current", f"{2 << 30}")):
        (group / name).write_text(f"{content}\n")
    reported = found(tmp_path)
    assert {name: reported[name]["fix"] for name in ("open files", "cores")} == {
        "open files": "ulimit -n 4096",
        "cores": "set build.workers to 2",
    }
    assert all(reported[name]["state"] == "weak" for name in ("open files", "cores", "memory", "free disk"))
    assert (
        reported["memory"]["value"].startswith("3.0 GiB, 1.0 available")
        and "quota is 2.5" in reported["cores"]["value"]
    )


def test_a_control_group_without_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    for name, content in (("cpu.max", "max 100000"), ("memory.max", "max"), ("memory.current", "4096")):
        (tmp_path / name).write_text(f"{content}\n")
    reported = found(tmp_path)
    total = psutil.virtual_memory().total / 2**30
    assert reported["cores"]["state"] == "good" and reported["memory"]["value"].startswith(f"{total:.1f} GiB, ")


GPU = """case "$*" in
*query-gpu*) echo 'NVIDIA H100, 81559 MiB, 550.54.15';;
*) echo '| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |';;
esac"""
NAME = "NVIDIA H100, 81559 MiB, driver 550.54.15"


def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, **versions: str | None) -> None:
    """The only program in PATH, and the versions of packages, with _ for -."""
    programs = tmp_path / "bin"
    programs.mkdir()
    if script:
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "nvidia-smi").chmod(0o755)
    version, given = doctor._version, {name.replace("_", "-"): value for name, value in versions.items()}
    monkeypatch.setattr(doctor, "_version", lambda name: given[name] if name in given else version(name))
    monkeypatch.setenv("PATH", str(programs))


@pytest.mark.parametrize(
    ("torch", "runtime", "state", "value", "fix"),
    [
        ("2.14.0+cpu", "12.8.90", "weak", "; but torch 2.14.0+cpu is built without CUDA", "a torch with CUDA"),
        ("2.14.0", None, "weak", "; but torch 2.14.0 is built without CUDA", "a torch with CUDA"),
        ("2.14.0", "13.0.48", "weak", "; torch 2.14.0 for CUDA 13.0.48, the driver supports 12.4", "update the driver"),
        ("2.14.0+cu130", None, "weak", "; torch 2.14.0+cu130 for CUDA 13.0, the driver supports 12.4", "update the"),
        ("2.14.0+cu128", "13.0.48", "good", "; torch 2.14.0+cu128 for CUDA 12.8, the driver supports 12.4", ""),
        ("2.14.0+cu118", None, "good", "; torch 2.14.0+cu118 for CUDA 11.8, the driver supports 12.4", ""),
    ],
)
def test_a_gpu_and_the_cuda_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, runtime: str | None, state: str, value: str, fix: str
) -> None:
    # Drivers run programs of all minor versions of their CUDA and of older ones.
    nvidia_smi(tmp_path, monkeypatch, GPU, torch=torch, nvidia_cuda_runtime=runtime, nvidia_cuda_runtime_cu12=None)
    reported = found(tmp_path)["cuda"]
    assert (reported["state"], reported["value"]) == (state, NAME + value)
    assert fix in reported["fix"] and bool(fix) == bool(reported["fix"])


@pytest.mark.parametrize(
    ("script", "state", "value"),
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.86.15'", "weak", "NVIDIA H200, 143771 MiB, driver 570.86.15; but torch"),
        ("echo 'No devices were found'; exit 6", "weak", "nvidia-smi fails: No devices were found"),
        (None, "absent", "no GPU; torch"),
    ],
)
def test_gpus_are_those_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, state: str, value: str
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script, torch="2.14.0+cpu")
    reported = found(tmp_path)["cuda"]
    assert reported["state"] == state and reported["value"].startswith(value)


def test_for_people(tmp_path: Path) -> None:
    assert "everything that is needed is installed" in preprocess("doctor", "--out", tmp_path).out


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from preprocess.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "doctor", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
