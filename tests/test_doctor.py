"""`preprocess doctor`: what is missing is seen, with its mend and exit code 1; no torch is loaded for it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from shard_factory import preprocess

from preprocess import doctor, machine


@pytest.fixture(autouse=True)
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_TRIAL_BYTES", 4 << 20)


def found(tmp_path: Path, code: int = 0) -> dict[str, dict[str, str]]:
    said = preprocess("doctor", "--out", tmp_path, "--json")
    assert said.code == code, said.err
    return {one["name"]: one for one in json.loads(said.out)}


def test_this_machine_is_fit(tmp_path: Path) -> None:
    told = found(tmp_path)
    assert {"python", "libraries", "libturbojpeg", "cores", "memory", "open files", "free disk", "disk speed"} <= told.keys()
    assert told["libraries"]["state"] == "good" and "duckdb" in told["libraries"]["value"]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "ftfy" else "1.0.0" if name == "duckdb" else version(name))
    told = found(tmp_path, code=1)["libraries"]
    assert told["state"] == "missing" and "ftfy not installed" in told["value"] and "duckdb 1.0.0" in told["value"]
    assert "'ftfy<7,>=6.3'" in told["mend"]


def test_what_an_extra_asks_for_is_not_needed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=2", 'no-such-tracker>=1; extra == "wandb"', 'no-such-thing>=1; extra == "not-known-here"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    told = found(tmp_path)
    assert told["libraries"]["state"] == "good" and "no-such" not in told["libraries"]["value"]
    assert told["[wandb]"]["state"] == "absent" and "no-such-tracker" in told["[wandb]"]["value"]
    assert "[wandb]" in preprocess("doctor", "--out", tmp_path).out


def test_every_extra_is_known() -> None:
    with open(Path(__file__).parent.parent / "pyproject.toml", "rb") as file:
        assert set(doctor._EXTRAS) == set(tomllib.load(file)["project"]["optional-dependencies"])


def test_the_trainers_decoder_is_needed_where_the_trainer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_library", lambda name: False)
    told = found(tmp_path, code=1)["libturbojpeg"]
    assert told["state"] == "missing" and told["mend"] == "apt-get install libturbojpeg0"
    monkeypatch.setattr(doctor, "installed_extras", list)
    assert found(tmp_path)["libturbojpeg"]["state"] == "absent"


def test_limits_are_weak_with_their_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "file_limits", lambda: (1024, 20_000))
    monkeypatch.setattr(doctor, "core_count", lambda: (16, 2.5))
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (1 << 31, 1 << 30))
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 1 << 30)
    told = found(tmp_path)
    assert {name: told[name]["mend"] for name in ("open files", "cores")} == {
        "open files": "ulimit -n 4096",
        "cores": "set build.workers to 2",
    }
    assert all(told[name]["state"] == "weak" for name in ("open files", "cores", "memory", "free disk"))


def test_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", lambda: ["NVIDIA H100, 81559 MiB, 580"])
    monkeypatch.setattr(doctor, "_installed", list)
    told = found(tmp_path)["cuda"]
    assert told["state"] == "weak" and "built without CUDA" in told["value"]

    def broken() -> list[str]:
        raise machine.MachineFault("nvidia-smi fails")

    monkeypatch.setattr(doctor, "cuda_devices", broken)
    assert found(tmp_path)["cuda"]["value"] == "nvidia-smi fails"


def test_for_people(tmp_path: Path) -> None:
    assert "everything that is needed is here" in preprocess("doctor", "--out", tmp_path).out


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from preprocess.cli import cli; cli(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "doctor", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
