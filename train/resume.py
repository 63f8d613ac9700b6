"""Where a run goes on: its newest checkpoint, if the data and the configuration are those that it was begun with."""

from pathlib import Path

import yaml

from labels.config import load_pipeline
from labels.errors import UserError
from labels.files import fingerprint
from labels.settings import Train
from train.betons import BetonSet
from train.checkpoint import State, checkpoint_folders, read_state

# What may differ between the parts of one run: nothing of it changes what is computed, but for the order of additions.
_FREE = {
    "loss": {"memory", "split_vocabulary"},
    "model": {"grad_checkpointing", "compile"},
    "runtime": {"device", "threads", "accumulation", "parallel", "max_skipped_steps", "peak_tflops"},
    "data": {"threads", "prefetch", "verify", "cache", "cache_size"},
    "checkpoint": True,
    "log": True,
}


def beginning(betons: BetonSet, settings: Train) -> State:
    """The state of a run of which no step is done."""
    facts = {"samples_seen": 0, "number": 0, "options": options(settings), "vocabulary": betons.vocabulary}
    return State.model_validate(facts | betons.identity)


def resume_point(run: Path, betons: BetonSet, settings: Train) -> tuple[Path | None, State]:
    """The newest checkpoint of `run` and its state; None and the beginning where there is none.

    Raises:
        UserError: the run was begun with other data or another configuration.
    """
    folders = checkpoint_folders(run)
    if not folders:
        return None, beginning(betons, settings)
    state = read_state(folders[-1])
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
    if state.options != options(settings):
        before = load_pipeline(run / "config.yaml").train
        raise UserError(
            f"{run} was begun with another configuration: {'; '.join(_differences(before, settings))}",
            allowed="the configuration it was begun with",
            mend=f"take --config {run / 'config.yaml'}, or another --out",
        )
    return folders[-1], state


def options(settings: Train) -> str:
    """Fingerprint of what must stay the same of the configuration."""
    return fingerprint(settings.model_dump(exclude=_FREE))  # type: ignore[arg-type]


def _differences(before: Train, now: Train) -> list[str]:
    old, new = (yaml.safe_dump(part.model_dump(exclude=_FREE), default_flow_style=None) for part in (before, now))  # type: ignore[arg-type]
    return [
        f"was `{was.strip()}`, is now `{is_now.strip()}`"
        for was, is_now in zip(old.splitlines(), new.splitlines(), strict=False)
        if was != is_now
    ]
