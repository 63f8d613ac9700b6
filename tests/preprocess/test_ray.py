"""The Ray engine: two nodes of a cluster on this machine, one killed in the middle; the same results as the local
engine.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from labels.storage import UserError
from preprocess import ray as ray_engine
from preprocess.engine import one_core, run_tasks
from shard_factory import contents, end_without_a_word, preprocess, write_shards

ROOT = Path(__file__).parents[2]
IMPORT_PATH = [str(ROOT), str(ROOT / "tests" / "helpers")]  # for processes that unpickle functions of this file

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read while ray is imported: 127.0.0.1 then stays 127.0.0.1
ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs that nobody can kill by accident, and one node of one CPU; found by RAY_ADDRESS."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([*IMPORT_PATH, os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
        cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        ray.init(
            address=cluster.address, log_to_driver=False
        )  # one connection for all tests but those that need their own
        yield cluster
    ray.shutdown()
    cluster.shutdown()


def touch_and_wait(task: tuple[str, int]) -> int:
    """A task that marks that it has begun, and on which node; it ends when it may."""
    folder, number = Path(task[0]), task[1]
    (folder / f"{number} {os.getpid()} {ray.get_runtime_context().get_node_id()}").touch()
    while not (folder / "go on").exists():
        time.sleep(0.01)
    return number


def fail(how: str) -> str:
    """A task that raises."""
    raise ZeroDivisionError(f"by {how}")


def started(folder: Path, nodes: int) -> set[str]:
    """Wait until tasks have begun on this many nodes; the nodes' ids."""
    end = time.monotonic() + 60
    while len(found := {path.name.split()[2] for path in folder.iterdir()}) < nodes:
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def test_a_node_killed_in_the_middle_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    lost = cluster.add_node(**NODE)
    tasks = [(str(tmp_path), number) for number in range(9)]
    results = iter_in_background(tasks)
    started(tmp_path, 2)
    cluster.remove_node(lost, allow_graceful=False)
    (tmp_path / "go on").touch()
    assert sorted(results()) == list(range(9))
    begun = [int(path.name.split()[0]) for path in tmp_path.iterdir() if path.name != "go on"]
    assert len(begun) > len(set(begun)) == 9, "the lost node's task was begun again"


def iter_in_background(tasks: list[tuple[str, int]]) -> Any:
    """Start the run in a thread; a function that waits for its results."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: list(run_tasks(touch_and_wait, tasks, 1, "ray")))
    return lambda: future.result(timeout=60)


def test_a_killed_worker_is_replaced(cluster: Any, tmp_path: Path) -> None:
    results = iter_in_background([(str(tmp_path), number) for number in range(3)])
    started(tmp_path, 1)
    os.kill(int(next(tmp_path.iterdir()).name.split()[1]), signal.SIGKILL)
    (tmp_path / "go on").touch()
    assert sorted(results()) == [0, 1, 2]


def test_a_task_that_always_kills_its_worker_ends_the_run(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "MAX_RETRIES", 1)
    with pytest.raises(UserError, match="a shard's worker on the Ray cluster was lost 2 times") as caught:
        list(run_tasks(end_without_a_word, ["kill"], 1, "ray"))
    assert "finished shards are kept" in str(caught.value)


def test_errors_come_back(cluster: Any) -> None:
    with pytest.raises(UserError, match="this task is the user's mistake") as caught:
        list(run_tasks(end_without_a_word, ["fine", "raise", "fine"], 1, "ray"))
    assert (caught.value.allowed, caught.value.fix) == ("another", "fix it")
    with pytest.raises(ZeroDivisionError, match=r"(?s)in fail.*raise ZeroDivisionError.*by zero"):
        list(run_tasks(fail, ["zero"], 1, "ray"))
    assert list(run_tasks(end_without_a_word, ["fine"], 1, "ray")) == ["fine"]
    assert list(run_tasks(end_without_a_word, [], 1, "ray")) == []


def test_a_node_with_other_versions_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ray_engine._versions()
    assert versions["ftfy"] != "none"
    monkeypatch.setattr(ray_engine, "_versions", lambda: {**versions, "ftfy": "1.0"})
    with pytest.raises(UserError, match=f"would not give the same bytes: ftfy {versions['ftfy']}, not 1.0"):
        list(run_tasks(end_without_a_word, ["fine"], 1, "ray"))


def test_a_node_that_does_not_see_the_output_folder_is_refused(cluster: Any, tmp_path: Path) -> None:
    shared = tmp_path / "options.json"
    shared.write_text("{}")
    assert list(run_tasks(end_without_a_word, ["fine"], 1, "ray", shared)) == ["fine"]
    required = ray_engine._Requirements(ray_engine._versions(), shared, b"another's", one_core)
    with pytest.raises(
        UserError, match=r"does not see the output folder of .*options.json is missing there or differs"
    ):
        ray_engine._check_node(required)
    shared.unlink()
    with pytest.raises(UserError, match="network file system under the same path, or a URL"):
        ray_engine._check_node(required)


def test_a_build_gives_the_same_bytes_though_a_node_is_killed(cluster: Any, tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 12, 8)
    ray.shutdown()  # the command finds the cluster by RAY_ADDRESS
    lost = cluster.add_node(**NODE)

    def run(engine: str) -> None:
        said = preprocess(
            "build-labels", data, "--out", tmp_path / engine, "--workers", 1, "--set", f"build.engine={engine}"
        )
        assert said.code == 0, said.err

    run("local")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, "ray")
        end = time.monotonic() + 60
        while not list((tmp_path / "ray").glob("done/labels/*.json")):
            assert time.monotonic() < end and not running.done(), running
            time.sleep(0.01)
        assert not list((tmp_path / "ray").glob("done/beton/*.json")), "killed in the middle"
        cluster.remove_node(lost, allow_graceful=False)
        running.result(timeout=60)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_an_address_without_a_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster is reached at RAY_ADDRESS=127.0.0.1:1"):
        list(run_tasks(end_without_a_word, ["fine"], 1, "ray"))


def test_without_ray_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray.*\n.*\n  fix: pip install 'ray>=2.50'"):
        list(run_tasks(end_without_a_word, ["fine"], 1, "ray"))


def test_without_a_cluster_one_is_started_for_the_run() -> None:
    """In a process of its own that neither reads of other clusters here nor looks for their processes: the other tests
    have one.
    """
    script = (
        "import functools, ray; from ray._private import services; services.find_gcs_addresses = functools.cache(set)\n"
        "from preprocess.engine import run_tasks; from shard_factory import end_without_a_word\n"
        "results = run_tasks(end_without_a_word, list('ba'), 3, 'ray'); first = next(results)\n"
        "cores = ray.cluster_resources()['CPU']\n"
        "print(sorted([first, *results]), cores, ray.is_initialized())\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([*IMPORT_PATH, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:  # a short path: for its sockets
        environment |= {
            "PYTHONPATH": path,
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        command = [sys.executable, "-c", script]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (said.stdout, said.returncode) == ("['a', 'b'] 3.0 False\n", 0), said.stderr
    assert said.stderr == ""
