"""The engine for a Ray cluster: the same iterator as engine.run_tasks, tasks in, results out in any order.

A task whose worker or node is lost is run again elsewhere. The lost one may still be alive behind a broken network, so
workers give their temporary files names of their own (labels.storage.own_partials); what they rename has the same
bytes.
"""

import importlib.metadata
import logging
import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from labels.storage import UserError, own_partials
from preprocess.engine import one_core

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_RETRIES = 5
_DECIDE_BYTES = ("superclass-lean", "ftfy", "numpy", "pillow", "pyarrow", "regex", "tokenizers")
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_STORE_BYTES = 100_000_000
_PATIENCE_S = 10


@dataclass(frozen=True)
class _Told:
    """A UserError on its way back as a value: Ray would wrap it into an error of its own."""

    error: UserError


@dataclass(frozen=True)
class _Home:
    """What must be the same on every node: versions that decide the bytes, and a file of OUT with its content."""

    versions: dict[str, str]
    shared: Path | None
    content: bytes


def run_on_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, shared: Path | None
) -> Iterator[Result]:
    """Yield `function(task)` for every task as each ends, on the cluster of RAY_ADDRESS, else on the one that runs on
    this machine, else on one started here for the time of the call, bound to 127.0.0.1.

    Args:
        function: importable by name on every node.
        tasks: picklable; each takes one CPU, and at most twice the cluster's CPUs are under way.
        workers: CPUs of a cluster that has to be started.
        shared: a file of OUT that every node has to see as it is here; None if OUT is an object store.

    Raises:
        UserError: ray is not installed, the cluster is not reached, a node has other versions or another OUT, a task's
            worker was lost more than MAX_RETRIES times; or what a task raised as UserError.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, workers)
    try:
        home = _Home(_versions(), shared, shared.read_bytes() if shared else b"")
        yield from _results(ray, function, tasks, ray.put(home))
    finally:
        if started:
            ray.shutdown()


def _results(ray: ModuleType, function: Callable[[Task], Result], tasks: Sequence[Task], home: Any) -> Iterator[Result]:
    run = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
    waiting, running = iter(tasks), []
    try:
        while True:
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            running += [run.remote(function, task, home) for _, task in zip(range(room), waiting, strict=False)]
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            for result in ray.get(done):
                if isinstance(result, _Told):
                    raise result.error
                yield result
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"a shard's worker on the Ray cluster was lost {MAX_RETRIES + 1} times: {str(error).splitlines()[0]}",
            fix="look for nodes that run out of memory or disk (`ray status`), and run the same command again: finished shards are kept",
        ) from None
    finally:
        for task in running:
            ray.cancel(task)


def _run(function: Callable[[Task], Result], task: Task, home: _Home) -> Result | _Told:
    """On a node: one task, after a look whether this node can do it."""
    try:
        _check_node(home)
        one_core()
        with own_partials():
            return function(task)
    except UserError as error:
        return _Told(error)


def _check_node(home: _Home) -> None:
    here = _versions()
    others = [f"{name} {here[name]}, not {version}" for name, version in home.versions.items() if here[name] != version]
    if others:
        raise UserError(
            f"the Ray node {socket.gethostname()} would not give the same bytes: {'; '.join(others)}",
            allowed="the versions of the machine that started the command, on every node",
            fix="install them there, e.g. pip install -r requirements.lock",
        )
    if home.shared is None:
        return
    try:
        same = home.shared.read_bytes() == home.content
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"the Ray node {socket.gethostname()} does not see the OUT of this command: {home.shared} is not there or another file",
            allowed="an OUT that all nodes share: a network file system under the same path, or a URL such as s3://bucket/out",
            fix="give another --out",
        )


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _DECIDE_BYTES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _import_ray() -> ModuleType:
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
    )  # read while ray is imported
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(
            f"--engine ray needs the package ray: {error}",
            allowed="local, or ray where it is installed",
            fix="pip install 'ray>=2.50'",
        ) from None
    return ray


def _connect(ray: ModuleType, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:  # Ray's ConnectionError is an OSError
        if address != "auto":
            raise UserError(
                f"no Ray cluster is reached at RAY_ADDRESS={address}: {str(error).splitlines()[0]}",
                fix="start it (`ray start --head`), or unset RAY_ADDRESS to use this machine alone",
            ) from None
        ray.init(
            address="local",
            num_cpus=workers,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,  # only markers travel through it
            _node_ip_address="127.0.0.1",
            **quiet,
        )


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
