"""Tower, projector and language model as transformers' LLaVA with its processor, and the module that the loop trains.

B batch, T tokens, S image side.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from labels.storage import UserError
from train.encoders.libraries import load_vision_model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedModel
from typing import NamedTuple

from torch import Tensor, nn

from labels.settings import Llava
from train.encoders.encoder import EncoderSpec, ImageForm
from train.encoders.libraries import image_form
from train.evals.captioner import LanguageModel
from train.export.export import export_encoder
from train.llava.data import IMAGE, TEMPLATE

# ---- llava: An exported tower and a language model, put together as transformers' LLaVA, with a fresh projector as all
# that is trained.
#
# The tower is a CLIPVisionModel or ViTModel (`train export --format hf`): LLaVA wants hidden states [B, 1 + N, W],
# class token first. B batch, N patches, W width.


TOWERS = ("CLIPVisionModel", "ViTModel")


def load_tower(folder: Path) -> "PreTrainedModel":
    """The tower of a folder that `train export --format hf` has written, or that holds another CLIP or plain ViT.

    Raises:
        UserError: there is none, weights are missing, or it is of a class whose hidden states LLaVA cannot take.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json",
            allowed="a folder of `train export ENCODER --format hf`",
            fix="fix the path",
        )
    tower = load_vision_model(folder)
    if type(tower).__name__ not in TOWERS:
        raise UserError(
            f"{folder} holds a {type(tower).__name__}, which transformers' LLaVA cannot take as its tower: it wants hidden states "
            "[images, 1 + patches, width], class token first",
            allowed=", ".join(TOWERS),
            fix="export a ViT with class token (train.model.trunk: vit_b16, vit_tiny_patch16_224, ...)",
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
    """Tower, projector and language model as one. Only the projector, two linear layers drawn from torch's seed, takes
    gradients.

    Args:
        tower: CLIPVisionModel or ViTModel, see `load_tower`; taken as it is, not copied.
        language_model: a causal language model of transformers; taken as it is. Its embedding grows where
            `image_token_id` is beyond it.
        image_token_id: the token that stands for one patch; a prompt holds `config.image_seq_length` of them an image.
        layer: hidden states that are projected: -1 the last block's, -2 the one's before (LLaVA 1.5); without the
            tower's final norm.
        select: `default` leaves the class token out, `full` keeps it.

    Raises:
        UserError: another class of tower, or a layer that it does not have.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    depth = getattr(tower.config, "num_hidden_layers", 0)
    if type(tower).__name__ not in TOWERS:
        raise UserError(
            f"transformers' LLaVA cannot take a {type(tower).__name__} as its tower", allowed=", ".join(TOWERS)
        )
    if not -depth - 1 <= layer <= depth:
        raise UserError(
            f"the tower has no hidden states {layer}",
            allowed=f"{-depth - 1} to {depth}: the embeddings, and {depth} blocks",
        )
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    text_config = copy.deepcopy(language_model.config)
    decoder, head = language_model.get_decoder(), cast(torch.nn.Linear, language_model.get_output_embeddings())
    if text_config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        text_config.tie_word_embeddings = (
            False  # LLaVA ties by LLaMA's names only: others' heads become tensors of their own
        )
        head = copy.deepcopy(head)
    side = tower.config.image_size // tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=layer,
        image_seq_length=side**2 + (select == "full"),
        vision_feature_select_strategy=select,
    )
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
    """ViTModel's pooler, zeros: LLaVA's class builds one when it loads, though nothing reads it, and would tell of
    missing weights.
    """
    from transformers.models.vit.modeling_vit import ViTPooler

    pooler = ViTPooler(config)
    for parameter in pooler.parameters():
        torch.nn.init.zeros_(parameter)
    return pooler


_SHORTEST_TEXT = 32  # tokens beside the image's that a conversation has at the least


class Assembled(NamedTuple):
    """`model`: LlavaForConditionalGeneration, its projector alone trained. `processor`: LlavaProcessor. `form`: the
    tower's images.
    """

    model: Any
    processor: Any
    form: ImageForm


class Projecting(nn.Module):
    """Images and conversations -> loss. The projector is its only child, so that checkpoints hold nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._held = (model.eval(),)
        self.projector = model.model.multi_modal_projector

    def forward(self, images: Tensor, talk: Tensor) -> Tensor:
        """Mean cross-entropy over the learnt tokens.

        Args:
            images: normalised, [B, 3, S, S].
            talk: int [B, T, 2], ids and labels. Padding comes last, so causal attention never sees it.
        """
        ids, labels = talk.unbind(-1)
        return self._held[0](input_ids=ids, pixel_values=images, labels=labels, use_cache=False).loss


def tower_folder(asked: EncoderSpec, work: Path) -> Path:
    """The tower in Hugging Face's form: the folder of hf:DIR, or an export of any other encoder, made in `work`.

    Raises:
        UserError: it cannot be exported.
    """
    if asked.spec.startswith("hf:"):
        return Path(asked.spec.removeprefix("hf:"))
    export_encoder(asked, "hf", work / "tower")
    return work / "tower"


def assemble(tower: Path, language: LanguageModel, settings: Llava, seed: int) -> Assembled:
    """All parts as one, the projector drawn from `seed`.

    Raises:
        UserError: a tower that LLaVA cannot take, a tokenizer that does not tell where tokens stand, too few positions.
    """
    from transformers import AutoImageProcessor, LlavaProcessor

    tokenizer = language.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {language.name} has no tokenizer.json", fix="save it with transformers' AutoTokenizer"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    net = load_tower(tower)
    select = "full" if settings.class_token else "default"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        token = tokenizer.convert_tokens_to_ids(IMAGE)
        model = build_llava(net, language.model, image_token_id=token, layer=settings.layer, select=select)
    language.check_room(model.config.image_seq_length + _SHORTEST_TEXT, "an image's tokens and a short conversation")
    if settings.max_tokens < model.config.image_seq_length + _SHORTEST_TEXT:
        raise UserError(
            f"llava.max_tokens is {settings.max_tokens}, an image takes {model.config.image_seq_length}",
            allowed=f"at least {model.config.image_seq_length + _SHORTEST_TEXT}",
        )
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(tower, local_files_only=True),
        tokenizer,
        patch_size=net.config.patch_size,
        vision_feature_select_strategy=select,
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    return Assembled(model, processor, image_form(tower))
