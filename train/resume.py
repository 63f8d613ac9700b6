"""Where a run goes on: its newest checkpoint, if the data and the configuration are those that it was begun with."""

import json
from pathlib import Path
from typing import Any

import yaml

from labels.config import load_pipeline
from labels.errors import UserError
from labels.files import fingerprint
from labels.settings import Train
from train.betons import BetonSet
from train.checkpoint import State, checkpoint_folders, read_state
from train.method import Method

# What may differ between the parts of one run: nothing of it changes what is computed, but for the order of additions.
_FREE = {
    "loss": {"memory", "split_vocabulary"},
    "model": {"grad_checkpointing", "compile"},
    "runtime": {"device", "threads", "accumulation", "parallel", "max_skipped_steps", "peak_tflops"},
    "data": {"threads", "prefetch", "verify", "cache", "cache_size"},
    "checkpoint": True,
    "log": True,
}


def beginning(betons: BetonSet, settings: Train, method: Method) -> State:
    """The state of a run of which no step is done."""
    facts = {"samples_seen": 0, "number": 0, "options": options(settings, method), "vocabulary": betons.vocabulary}
    return State.model_validate(facts | {"method": method.name} | betons.identity)


def resume_point(run: Path, betons: BetonSet, settings: Train, method: Method) -> tuple[Path | None, State]:
    """The newest checkpoint of `run` and its state; None and the beginning where there is none.

    Raises:
        UserError: the run was begun by another method, with other data or another configuration.
    """
    folders = checkpoint_folders(run)
    if not folders:
        return None, beginning(betons, settings, method)
    state = read_state(folders[-1])
    if state.method != method.name:
        raise UserError(f"{run} holds a run of the method {state.method}, not of `{method.command}`", mend="give another --out")
    told = {
        "labels": ("with other labels: fingerprint", betons.labels_out),
        "idf": ("with another IDF table: SHA-256", betons.labels_out),
        "betons": ("on other betons: fingerprint", betons.out),
    }
    for name, value in betons.identity.items():
        before = getattr(state, name)
        if before != value:
            what, where = told[name]
            raise UserError(
                f"{run} was trained {what} {before[:16]}, {where} has {value[:16]}",
                mend="give the --beton and --labels that the run was begun with, or another --out",
            )
    if state.options != options(settings, method):
        facts = run / "data.json"
        was = json.loads(facts.read_bytes()).get("kept", {}) if facts.is_file() else {}
        before = _kept(load_pipeline(run / "config.yaml").train, was)
        raise UserError(
            f"{run} was begun with another configuration: {'; '.join(_differences(before, _kept(settings, method.kept)))}",
            allowed="the configuration it was begun with",
            mend=f"take --config {run / 'config.yaml'}, or another --out",
        )
    return folders[-1], state


def options(settings: Train, method: Method) -> str:
    """Fingerprint of what must stay the same of the configuration."""
    return fingerprint(_kept(settings, method.kept))


def _kept(settings: Train, kept: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same: of `train`, and of the method beside it."""
    return settings.model_dump(exclude=_FREE) | kept  # type: ignore[arg-type]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = (yaml.safe_dump(part, default_flow_style=None) for part in (before, now))
    return [
        f"was `{was.strip()}`, is now `{is_now.strip()}`"
        for was, is_now in zip(old.splitlines(), new.splitlines(), strict=False)
        if was != is_now
    ]
