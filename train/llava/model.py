"""Tower, projector and language model as transformers' LLaVA with its processor, and the module that the loop trains.

B batch, T tokens, S image side.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labels.errors import UserError
from labels.settings import Llava
from train.encoders.encoder import EncoderSpec, ImageForm
from train.evals.encoders.hf_models import image_form
from train.export.export import export_encoder
from train.export.llava import build_llava, load_tower
from train.language_model import LanguageModel
from train.llava.data import IMAGE
from train.llava.prompt import TEMPLATE

_SHORTEST_TEXT = 32  # tokens beside the image's that a conversation has at the least


class Assembled(NamedTuple):
    """`model`: LlavaForConditionalGeneration, its projector alone trained. `processor`: LlavaProcessor. `form`: the tower's images."""

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
        raise UserError(f"the tokenizer in {language.name} has no tokenizer.json", mend="save it with transformers' AutoTokenizer")
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
        AutoImageProcessor.from_pretrained(tower, local_files_only=True), tokenizer, patch_size=net.config.patch_size,
        vision_feature_select_strategy=select, chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    return Assembled(model, processor, image_form(tower))
