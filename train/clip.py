"""`train clip`, the CLIP baseline, and what `train lit` (train/evals/lit.py) shares with it: two towers as a Method
of train/trainer.py. Loader, loop, metrics and checkpoints are those of `train run`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labels.settings import Pipeline, TextTower, Train
from labels.storage import UserError
from train.costs.flops import Costs, tower_costs, trunk_costs
from train.data.dataset import BetonSet
from train.data.open import Chosen
from train.distributed import World, spread
from train.loop import TrainState
from train.model import build_trunk, feature_width, set_up_trunk
from train.text_tower import Contrastive, Specials, TextInput, build_text_tower, specials_of
from train.trainer import Method, as_train_state, train_run

CLIP, LIT = "clip", "lit"


def train_clip(chosen: Chosen, run: Path, pipeline: Pipeline) -> bool:
    """Train the trunk of `train.model`, a text tower and the images' projection; returns and raises like train_run."""
    check_whole_batches(pipeline.train, "train clip")
    tower = pipeline.text_tower

    def build(settings: Train, betons: BetonSet, world: World) -> TrainState:
        torch.manual_seed(settings.runtime.seed)
        trunk: Any = build_trunk(settings.model)  # first, so that it has the initial weights of `train run`
        text, specials = text_side(tower, betons)
        model = Contrastive(trunk, feature_width(trunk), text, specials, locked=False).to(world.device)
        set_up_trunk(trunk, settings.model)
        return make_two_tower_state(model, settings, world)

    def costs(settings: Train, betons: BetonSet) -> Costs:
        with torch.device("meta"):
            trunk = trunk_costs(build_trunk(settings.model), settings.model.image_size, trained=True)
            return tower_costs(trunk, text_side(tower, betons)[0], tower)

    return train_run(chosen, run, pipeline, method=two_tower_method(CLIP, tower, build, costs, {}))


def check_whole_batches(settings: Train, command: str) -> None:
    """Refuse gradient accumulation: a part compared with itself alone is a smaller batch."""
    if settings.runtime.accumulation > 1:
        raise UserError(
            f"`{command}` compares every image with all captions of its batch, but train.runtime.accumulation "
            f"{settings.runtime.accumulation} splits the batch",
            allowed="1",
            fix="save memory by train.model.grad_checkpointing=true, train.runtime.parallel=fsdp or more ranks",
        )


def two_tower_method(
    name: str,
    tower: TextTower,
    build: Callable[[Train, BetonSet, World], TrainState],
    costs: Callable[[Train, BetonSet], Costs],
    facts: dict[str, Any],
) -> Method:
    """The Method `name`; `facts` for data.json, of which `encoder` names a frozen trunk."""
    kept = {"text_tower": tower.model_dump()}
    if "encoder" in facts:
        kept["encoder"] = facts["encoder"]["fingerprint"]
    return Method(
        name,
        f"train {name}",
        "token_ids",
        build,
        costs,
        inputs=lambda images, betons: TextInput(images, specials_of(betons.labels.tokenizer), tower.context),
        kept=kept,
        facts={"method": name, "kept": kept, **facts},
    )


def text_side(tower: TextTower, betons: BetonSet) -> tuple[nn.Module, Specials]:
    """A new text tower for the tokenizer of the labels, and its special tokens."""
    specials = specials_of(betons.labels.tokenizer)
    return build_text_tower(tower, specials.vocabulary), specials


def make_two_tower_state(model: Contrastive, settings: Train, world: World) -> TrainState:
    """Both towers with what trains them; the scale is clamped after every step."""
    model.text.set_grad_checkpointing(settings.model.grad_checkpointing)  # type: ignore[operator]
    train_state = as_train_state(model, spread(model, settings.runtime.parallel, world), settings, world)
    train_state.optimizer.register_step_post_hook(lambda *_: model.joint.clamp())
    return train_state
