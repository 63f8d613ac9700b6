"""An exported tower and a language model, put together as transformers' LLaVA, with a fresh projector as all that is trained.

The tower is a CLIPVisionModel or ViTModel (`train export --format hf`): LLaVA wants hidden states [B, 1 + N, W], class token first.
B batch, N patches, W width.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from labels.errors import UserError
from train.evals.encoders.hf_models import load_vision_model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedModel

TOWERS = ("CLIPVisionModel", "ViTModel")


def load_tower(folder: Path) -> "PreTrainedModel":
    """The tower of a folder that `train export --format hf` has written, or that holds another CLIP or plain ViT.

    Raises:
        UserError: there is none, weights are missing, or it is of a class whose hidden states LLaVA cannot take.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", allowed="a folder of `train export ENCODER --format hf`", mend="mend the path")
    tower = load_vision_model(folder)
    if type(tower).__name__ not in TOWERS:
        raise UserError(
            f"{folder} holds a {type(tower).__name__}, which transformers' LLaVA cannot take as its tower: it wants hidden states "
            "[images, 1 + patches, width], class token first",
            allowed=", ".join(TOWERS),
            mend="export a ViT with class token (train.model.trunk: vit_b16, vit_tiny_patch16_224, ...)",
        )
    return tower


def build_llava(
    tower: "PreTrainedModel",
    language_model: "PreTrainedModel",
    *,
    image_token_id: int,
    layer: int = -2,
    select: Literal["default", "full"] = "default",
) -> "LlavaForConditionalGeneration":
    """Tower, projector and language model as one. Only the projector, two linear layers drawn from torch's seed, takes gradients.

    Args:
        tower: CLIPVisionModel or ViTModel, see `load_tower`; taken as it is, not copied.
        language_model: a causal language model of transformers; taken as it is. Its embedding grows where `image_token_id` is beyond it.
        image_token_id: the token that stands for one patch; a prompt holds `config.image_seq_length` of them an image.
        layer: hidden states that are projected: -1 the last block's, -2 the one's before (LLaVA 1.5); without the tower's final norm.
        select: `default` leaves the class token out, `full` keeps it.

    Raises:
        UserError: another class of tower, or a layer that it does not have.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    depth = getattr(tower.config, "num_hidden_layers", 0)
    if type(tower).__name__ not in TOWERS:
        raise UserError(f"transformers' LLaVA cannot take a {type(tower).__name__} as its tower", allowed=", ".join(TOWERS))
    if not -depth - 1 <= layer <= depth:
        raise UserError(f"the tower has no hidden states {layer}", allowed=f"{-depth - 1} to {depth}: the embeddings, and {depth} blocks")
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    text_config = copy.deepcopy(language_model.config)
    decoder, head = language_model.get_decoder(), cast(torch.nn.Linear, language_model.get_output_embeddings())
    if text_config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        text_config.tie_word_embeddings = False  # LLaVA ties by LLaMA's names only: others' heads become tensors of their own
        head = copy.deepcopy(head)
    side = tower.config.image_size // tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config, text_config=text_config, image_token_index=image_token_id, vision_feature_layer=layer,
        image_seq_length=side**2 + (select == "full"), vision_feature_select_strategy=select,
    )  # fmt: skip
    with torch.device("meta"):  # no second copy of a large language model
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, decoder, head
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    if getattr(tower, "pooler", decoder) is None:
        tower.pooler = _unread_pooler(tower.config)
    model.generation_config = language_model.generation_config
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def _unread_pooler(config: Any) -> torch.nn.Module:
    """ViTModel's pooler, zeros: LLaVA's class builds one when it loads, though nothing reads it, and would tell of missing weights."""
    from transformers.models.vit.modeling_vit import ViTPooler

    pooler = ViTPooler(config)
    for parameter in pooler.parameters():
        torch.nn.init.zeros_(parameter)
    return pooler
