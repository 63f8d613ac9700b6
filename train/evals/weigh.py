"""`train weigh`: the visual weights of a run, measured on samples that it has not seen.

RUN/config.yaml, data.json, newest checkpoint -> Classifier
held-out samples of the run, or --on OTHER_OUT -> HeldOut -> Sums -> calibrate -> visual.parquet
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from labels.config import load_pipeline
from labels.idf import FREQUENT_SHARE, calibrate, write_visual
from labels.storage import UserError
from train.checkpoint import checkpoint_folders, load_exactly, read_state, read_weights
from train.data.dataset import BetonSet
from train.data.open import Chosen, open_data
from train.distributed import distributed_world
from train.encoders.load import newest_checkpoint
from train.held_out import HeldOut, facts_of, hold_out, open_other, read_tokens
from train.losses.head import HeadLoss
from train.model import Classifier, build_trunk
from train.trainer import SUPERCLASS

_SHOWN = 10


def weigh(run: Path, out: Path, *, on: str | None, samples: int, stopping: Callable[[], bool]) -> dict[str, Any]:
    """Measure the gain of each token by the newest checkpoint of a run, and write visual.parquet to `out`.

    `on`: another output folder; None takes what the run itself has held out. At most `samples` samples are taken.
    Returns `samples`, `tokens` (measured), `visible` (gain above 0), and the `most` and `least` visible of the frequent
    tokens: (token, document frequency, IDF, calibrated gain). UserError: the run is none of `train run`, its data has
    changed, or the samples were trained on.
    """
    path = run.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    folder, state = checkpoint.parent.parent, read_state(checkpoint)
    if state.method != SUPERCLASS:
        raise UserError(f"{run} was trained by `train {state.method}`", allowed="a run of `train run`")
    settings = load_pipeline(folder / "config.yaml").train
    with distributed_world(settings.runtime) as world:
        betons = open_data(_trained_on(folder), settings.data, world, stopping)
        held = hold_out(betons, settings, world, stopping) if betons else None
        if betons is not None and betons.identity["betons"] != state.betons:
            raise UserError(
                f"{betons.out} is not what {run} was trained on: fingerprint {betons.identity['betons']}, then "
                f"{state.betons}",
                fix="put the output folder back that the run was trained on",
            )
        if betons is not None and on is not None:
            held = open_other(on, betons, settings, world, stopping)
        if betons is None or held is None:
            raise UserError(
                f"{run} has no held-out samples: it was trained on all of {_trained_on(folder).betons[0]}",
                allowed="samples that were not trained on: memorised captions look visible",
                fix="give --on OTHER_OUT, or set train.validation.held_out=0.02 for a new run",
            )
        model = Classifier(build_trunk(settings.model), HeadLoss(settings.loss, torch.from_numpy(betons.idf)))
        for name, part in (("trunk", model.trunk), ("head", model.head)):
            file = checkpoint / f"{name}.safetensors"
            load_exactly(part, read_weights(file), file)
        model = model.to(world.device)
        sums = HeldOut(held, settings, world).gains(model, model, samples)
        tokens = read_tokens(betons)
        gains = calibrate(sums, tokens["document_frequency"].to_numpy())
        if world.is_first:
            write_visual(out, tokens, betons.idf, sums, gains, facts_of(betons, state.samples_seen))
    return {
        "samples": sums.samples,
        "tokens": int((sums.count > 0).sum()),
        "visible": int((gains.visual_gain > 0).sum()),
        **_extremes(betons, tokens, gains.visual_gain),
    }


def _trained_on(folder: Path) -> Chosen:
    """The output folders of a run's data.json."""
    facts = json.loads((folder / "data.json").read_bytes())
    sources = facts.get("sources") or [facts]
    labels = [source["labels"] for source in sources]
    betons = [source["beton"] for source in sources]
    return Chosen(betons, [] if labels == betons else [Path(label) for label in labels])


def _extremes(betons: BetonSet, tokens: Any, visual_gain: Any) -> dict[str, list[tuple[str, int, float, float]]]:
    """Of the tokens in at least two of a thousand captions, those with the largest and the smallest gains."""
    captions = sum(opened.labels.captions for opened in betons.opened)
    rows = zip(
        tokens["token"].to_pylist(),
        tokens["document_frequency"].to_pylist(),
        betons.idf.tolist(),
        visual_gain.tolist(),
        strict=True,
    )
    frequent = sorted((row for row in rows if row[1] >= FREQUENT_SHARE * captions), key=lambda row: -row[3])
    return {"most": frequent[:_SHOWN], "least": frequent[-_SHOWN:]}
