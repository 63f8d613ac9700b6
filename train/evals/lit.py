"""`train lit` (LiT, arXiv 2111.07991): a text tower and a projection are trained for a frozen encoder.

The encoder keeps its own pool, image size and normalisation, which become the run's configuration. The trunk stays in
evaluation mode and is copied into each checkpoint, so that the run is self-contained; an encoder that is not a run's
trunk is loaded again by its spec (data.json), and refused if its weights have changed (train/encoders/load.py).
"""

from pathlib import Path
from typing import Any

import torch

from labels.settings import Pipeline, Train
from labels.storage import local_path
from train.clip import LIT, check_whole_batches, make_two_tower_state, text_side, two_tower_method
from train.costs.flops import Costs, tower_costs, trunk_costs
from train.data.dataset import BetonSet
from train.data.open import Chosen
from train.distributed import World
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.libraries import HUB
from train.encoders.load import load_encoder, trained_model
from train.encoders.text import foreign_encoder
from train.loop import TrainState
from train.text_tower import Contrastive
from train.trainer import train_run


def train_lit(requested: EncoderSpec, chosen: Chosen, run: Path, pipeline: Pipeline) -> bool:
    """As train_run. `requested` has no layer and pool: the encoder's own features are projected."""
    check_whole_batches(pipeline.train, "train lit")
    encoder, tower = load_encoder(requested), pipeline.text_tower
    pipeline, trunk = _with_encoder(pipeline, encoder), trunk_costs(encoder.net, encoder.images.side, trained=False)

    def build(settings: Train, betons: BetonSet, world: World) -> TrainState:
        torch.manual_seed(settings.runtime.seed)
        model = Contrastive(encoder.net, encoder.width, *text_side(tower, betons), locked=True).to(world.device)
        if settings.model.compile:
            encoder.net.compile()
        return make_two_tower_state(model, settings, world)

    def costs(settings: Train, betons: BetonSet) -> Costs:
        with torch.device("meta"):
            return tower_costs(trunk, text_side(tower, betons)[0], tower, locked=True)

    method = two_tower_method(LIT, tower, build, costs, {"encoder": _encoder_facts(encoder)})
    return train_run(chosen, run, pipeline, method=method)


def _with_encoder(pipeline: Pipeline, encoder: Encoder) -> Pipeline:
    """The configuration with the encoder's own trunk, image size and normalisation."""
    train, form = pipeline.train, encoder.images
    kept = {key: getattr(train.model, key) for key in ("grad_checkpointing", "compile")}
    model = (trained_model(encoder) or train.model).model_copy(update={"image_size": form.side, **kept})
    data = train.data.model_copy(update={"mean": list(form.mean), "std": list(form.std)})
    return pipeline.model_copy(update={"train": train.model_copy(update={"model": model, "data": data})})


def _encoder_facts(encoder: Encoder) -> dict[str, Any]:
    """For data.json. `by_config`: RUN/config.yaml and trunk.safetensors hold the encoder; else `spec` loads it."""
    requested, description = encoder.requested, encoder.describe()
    kind, _, value = requested.spec.partition(":")
    named = value if kind in ("run", "untrained", "hf") else requested.spec  # the path of a run is a spec, too
    path = local_path(named)
    spec = requested.spec.removesuffix(named) + str(path.resolve()) if path.is_dir() else requested.spec
    weights = requested.weights if requested.weights in (None, HUB) else str(local_path(requested.weights).resolve())
    run = encoder.checkpoint.parent.parent if encoder.checkpoint else None
    if run and (foreign := foreign_encoder(run)):  # the encoder is itself a run of `train lit`
        spec, weights = foreign.spec, foreign.weights
    facts = {"spec": spec, "weights": weights, "fingerprint": description["weights"]}
    return {**facts, "by_config": trained_model(encoder) is not None, "description": description}
