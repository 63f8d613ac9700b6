"""train.evals.lit"""

from pathlib import Path
from typing import Any

import torch

from labels.settings import Pipeline, Train
from train.clip import LIT, _method, _text, check_whole_batches, make_two_tower_state
from train.costs import Costs, tower_costs, trunk_costs
from train.data.dataset import BetonSet
from train.data.open import Chosen
from train.distributed import World
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.load import load_encoder, trained_model
from train.encoders.text import foreign_encoder
from train.loop import TrainState
from train.text_tower import Contrastive
from train.trainer import train_run


def train_lit(requested: EncoderSpec, chosen: Chosen, run: Path, pipeline: Pipeline) -> bool:
    """A text tower and a projection for a frozen encoder (LiT, arXiv 2111.07991): its own pool, image size and
    normalisation.

    Args:
        requested: the encoder, without layer and pool: the features that it was trained for are what is projected.

    Returns, Raises:
        as train_run; UserError also where the encoder cannot be loaded, or a batch is to be taken in parts.
    """
    check_whole_batches(pipeline.train, "train lit")
    encoder, tower = load_encoder(requested), pipeline.text_tower
    pipeline, trunk = _as_encoder(pipeline, encoder), trunk_costs(encoder.net, encoder.images.side)

    def build(settings: Train, betons: BetonSet, world: World) -> TrainState:
        torch.manual_seed(settings.runtime.seed)
        made = Contrastive(encoder.net, encoder.width, *_text(tower, betons), locked=True).to(world.device)
        if settings.model.compile:
            encoder.net.compile()
        return make_two_tower_state(made, settings, world)

    def costs(settings: Train, betons: BetonSet) -> Costs:
        with torch.device("meta"):
            return tower_costs(trunk, _text(tower, betons)[0], tower, locked=True)

    return train_run(chosen, run, pipeline, method=_method(LIT, tower, build, costs, {"encoder": _told(encoder)}))


def _as_encoder(pipeline: Pipeline, encoder: Encoder) -> Pipeline:
    """The configuration with the encoder's own trunk, image size and normalisation, so that the run's folder describes
    it.
    """
    train, form = pipeline.train, encoder.images
    model = (trained_model(encoder) or train.model).model_copy(
        update={
            "image_size": form.side,
            "grad_checkpointing": train.model.grad_checkpointing,
            "compile": train.model.compile,
        }
    )
    data = train.data.model_copy(update={"mean": list(form.mean), "std": list(form.std)})
    return pipeline.model_copy(update={"train": train.model_copy(update={"model": model, "data": data})})


def _told(encoder: Encoder) -> dict[str, Any]:
    """What data.json says of a frozen encoder. `by_config`: RUN/config.yaml and trunk.safetensors are all of it; else
    `spec` finds it.
    """
    requested, fingerprint = encoder.requested, encoder.describe()["weights"]
    run = encoder.checkpoint.parent.parent if encoder.checkpoint else None
    spec, weights = _absolute(requested), requested.weights and str(Path(requested.weights).resolve())
    if run and (foreign := foreign_encoder(run)):  # a text tower for what another one was made for
        spec, weights = foreign.spec, foreign.weights
    by_config = trained_model(encoder) is not None
    return {
        "spec": spec,
        "weights": weights,
        "fingerprint": fingerprint,
        "by_config": by_config,
        "description": encoder.describe(),
    }


def _absolute(requested: EncoderSpec) -> str:
    """The spec, with the folder that it names found from anywhere."""
    kind, colon, value = requested.spec.rpartition(":")
    return f"{kind}{colon}{Path(value).resolve()}" if Path(value).is_dir() else requested.spec
