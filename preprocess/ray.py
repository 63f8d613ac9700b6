"""The engine for a Ray cluster: the same iterator as engine.run_tasks; tasks in, results out in any order.

A task whose worker or node is lost runs again elsewhere. The lost worker may still be alive behind a broken network, so
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

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_RETRIES = 5
_DECIDE_BYTES = ("superclass-lean", "ftfy", "numpy", "pillow", "pyarrow", "regex", "tokenizers")
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_STORE_BYTES = 100_000_000
_CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class _Failed:
    """A UserError returned as a value: Ray would wrap a raised one into an error of its own."""

    error: UserError


@dataclass(frozen=True)
class _Requirements:
    """What must be the same on every node, and what a node does before a task."""

    versions: dict[str, str]  # of the packages that decide the bytes
    shared: Path | None  # a file of the output folder
    content: bytes  # of that file
    prepare: Callable[[], None]


def run_on_ray(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    shared: Path | None,
    prepare: Callable[[], None],
) -> Iterator[Result]:
    """As engine.run_tasks, on the cluster of RAY_ADDRESS, else on the one that runs on this machine, else on one of
    `workers` CPUs, bound to 127.0.0.1, that is started for the time of the call.

    Each task takes one CPU, and at most twice the cluster's CPUs are submitted. `prepare` is called before each task.

    Raises:
        UserError: ray is not installed, the cluster is not reached, a node has other versions or another output folder,
            a task's worker was lost more than MAX_RETRIES times; or what a task raised as UserError.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, workers)
    try:
        required = _Requirements(_versions(), shared, shared.read_bytes() if shared else b"", prepare)
        yield from _results(ray, function, tasks, ray.put(required))
    finally:
        if started:
            ray.shutdown()


def _results(
    ray: ModuleType, function: Callable[[Task], Result], tasks: Sequence[Task], required: Any
) -> Iterator[Result]:
    run = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
    waiting, running = iter(tasks), []
    try:
        while True:
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            running += [run.remote(function, task, required) for _, task in zip(range(room), waiting, strict=False)]
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            for result in ray.get(done):
                if isinstance(result, _Failed):
                    raise result.error
                yield result
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"a shard's worker on the Ray cluster was lost {MAX_RETRIES + 1} times: {str(error).splitlines()[0]}",
            fix="look for nodes that run out of memory or disk (`ray status`), and run the same command again: "
            "finished shards are kept",
        ) from None
    finally:
        for task in running:
            ray.cancel(task)


def _run(function: Callable[[Task], Result], task: Task, required: _Requirements) -> Result | _Failed:
    """On a node: one task, if this node meets the requirements."""
    try:
        _check_node(required)
        required.prepare()
        with own_partials():
            return function(task)
    except UserError as error:
        return _Failed(error)


def _check_node(required: _Requirements) -> None:
    node, versions = f"the Ray node {socket.gethostname()}", _versions()
    differ = [f"{name} {versions[name]}, not {v}" for name, v in required.versions.items() if versions[name] != v]
    if differ:
        raise UserError(
            f"{node} would not give the same bytes: {'; '.join(differ)}",
            allowed="the versions of the machine that started the command, on every node",
            fix="install them there, e.g. pip install -r requirements.lock",
        )
    if required.shared is None:
        return
    try:
        same = required.shared.read_bytes() == required.content
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{node} does not see the output folder of this command: {required.shared} is missing there or differs",
            allowed="an output folder that all nodes share: a network file system under the same path, "
            "or a URL such as s3://bucket/out",
            fix="give another --out",
        )


def _versions() -> dict[str, str]:
    versions = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _DECIDE_BYTES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _import_ray() -> ModuleType:
    os.environ.update(_ENVIRONMENT | os.environ)  # Ray reads them while it is imported
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
        _check_address(address)
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


def _check_address(address: str) -> None:
    """Raise OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
