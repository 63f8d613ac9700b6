"""`train clip` and `train lit` as methods of train/trainer.py: the same loader, loop, metrics and checkpoints as `train
run`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from labels.settings import Pipeline, TextTower, Train
from labels.storage import UserError
from train.costs import Costs, tower_costs, trunk_costs
from train.data.dataset import BetonSet
from train.data.open import Chosen
from train.distributed import World, spread
from train.loop import TrainState
from train.model import build_trunk, set_up_trunk
from train.text_tower import Contrastive, Specials, TextInput, build_text_tower, specials_of
from train.trainer import Method, as_train_state, train_run

CLIP, LIT = "clip", "lit"


def train_clip(chosen: Chosen, run: Path, pipeline: Pipeline) -> bool:
    """The CLIP baseline: the trunk of `train.model`, a text tower and the images' projection, all trained.

    Returns, Raises:
        as train_run; UserError also where a batch is to be taken in parts.
    """
    check_whole_batches(pipeline.train, "train clip")
    tower = pipeline.text_tower

    def build(settings: Train, betons: BetonSet, world: World) -> TrainState:
        torch.manual_seed(settings.runtime.seed)
        trunk: Any = build_trunk(settings.model)  # first, so that it begins as that of `train run`
        made = Contrastive(trunk, int(trunk.num_features), *_text(tower, betons), locked=False).to(world.device)
        set_up_trunk(trunk, settings.model)
        return make_two_tower_state(made, settings, world)

    def costs(settings: Train, betons: BetonSet) -> Costs:
        with torch.device("meta"):
            trunk = trunk_costs(build_trunk(settings.model), settings.model.image_size)
            return tower_costs(trunk, _text(tower, betons)[0], tower)

    return train_run(chosen, run, pipeline, method=_method(CLIP, tower, build, costs, {}))


def check_whole_batches(settings: Train, command: str) -> None:
    """Refuse gradient accumulation: each part would be compared with itself alone, which is a smaller batch, not the
    same one.
    """
    if settings.runtime.accumulation > 1:
        raise UserError(
            f"`{command}` compares every image with all captions of its batch, and train.runtime.accumulation "
            f"{settings.runtime.accumulation} never has them together",
            allowed="1",
            fix="save memory by train.model.grad_checkpointing=true, train.runtime.parallel=fsdp or more ranks",
        )


def _method(name: str, tower: TextTower, build: Any, costs: Any, facts: dict[str, Any]) -> Method:
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


def _text(tower: TextTower, betons: BetonSet) -> tuple[nn.Module, Specials]:
    specials = specials_of(betons.labels.tokenizer)
    return build_text_tower(tower, specials.vocabulary), specials


def make_two_tower_state(model: Contrastive, settings: Train, world: World) -> TrainState:
    """Both towers with what trains them; no scale above 100 after any step."""
    model.text.set_grad_checkpointing(settings.model.grad_checkpointing)  # type: ignore[operator]
    train_state = as_train_state(model, spread(model, settings.runtime.parallel, world), settings, world)
    train_state.optimizer.register_step_post_hook(lambda *_: model.joint.clamp())
    return train_state
