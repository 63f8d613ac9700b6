"""`train llava`: a projector between a frozen vision tower and a frozen language model.

    EncoderSpec -> _tower_folder: CLIPVisionModel or ViTModel -+
    a causal language model in a folder -----------------------+-> assemble -> transformers' LLaVA and its processor
    -> train_model (Projection, AdamW) on records of images and conversations (data.py)
    -> write_llava: a folder for transformers and lmms-eval, loaded back and compared

LLaVA takes hidden states [B, 1 + N, W] of the tower, class token first, and projects the N patches. Metrics and
checkpoints are in <out>.work/<fingerprint of all settings and data>/, which a second call resumes.
"""

import copy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from labels.settings import Llava, Optimizer, Pipeline, Train
from labels.storage import UserError, fingerprint, local_path, whole_folder, write_json
from train.checkpoint import weights_fingerprint
from train.distributed import World, distributed_world, only_run
from train.encoders.encoder import EncoderSpec, ImageForm
from train.encoders.libraries import flip_channels, image_form, load_vision_model
from train.evals.captioner import LanguageModel, check_folder, load_language_model
from train.evals.features import Normaliser
from train.export.export import export_encoder
from train.export.format import check_replaceable, share_like
from train.llava.data import (
    IMAGE,
    TEMPLATE,
    Reader,
    Record,
    RecordBatch,
    conversation_ids,
    load_records,
    record_batches,
)
from train.loop import stop_signals
from train.optim import autocast_dtype
from train.trainer import train_model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedModel

MARK = "llava.json"
TOWERS = ("CLIPVisionModel", "ViTModel")
TASKS = {
    "VQAv2": "vqav2_val",
    "GQA": "gqa",
    "VizWiz": "vizwiz_vqa_val",
    "TextVQA": "textvqa_val",
    "SciQA": "scienceqa_img",
    "MMBench": "mmbench_en_dev",
    "MME": "mme",
    "POPE": "pope",
    "MMMU": "mmmu_val",
    "SEED": "seedbench",
}
"""The paper's ten benchmarks, and their names in lmms-eval."""
_SHORTEST_TEXT = 32  # tokens of a conversation without the image's, at the least
_LOGITS_TOLERANCE = 1e-4  # of the largest logit


def train_llava(
    spec: EncoderSpec, language_folder: Path, data: str, images: Path | None, pipeline: Pipeline, out: Path
) -> bool:
    """Train a projector, or resume its training, and write the whole model into `out`.

    Args:
        spec: the tower.
        language_folder: of a causal language model.
        data, images: see load_records.
        out: new, empty, or of an earlier `train llava`.

    Returns:
        False when a signal stopped it; what was trained so far is saved.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    check_replaceable(out, MARK, "train llava")
    check_folder(language_folder)
    records = load_records(data, images)
    llava, work = pipeline.llava, out.with_name(f"{out.name}.work")
    budget = {"samples": llava.samples, "batch_size": llava.batch_size}
    settings = pipeline.train.model_copy(update={**budget, "optimizer": Optimizer(**llava.optimizer.model_dump())})
    with distributed_world(settings.runtime) as world, stop_signals() as stopping, only_run(work, world):
        dtype = autocast_dtype(settings.runtime.precision, world.device) if world.device.type == "cuda" else None
        tower = _tower_folder(spec, work if world.size == 1 else work / f"rank-{world.rank}")
        language = load_language_model(language_folder, dtype or torch.float32)
        weights = weights_fingerprint(language.model)  # before the image's token joins its embedding
        parts = assemble(tower, language, llava, settings.runtime.seed)
        files = [[file.name, file.stat().st_size] for file in sorted(language_folder.iterdir()) if file.is_file()]
        facts = {
            "tower": spec.name,
            "tower_weights": weights_fingerprint(parts.model.model.vision_tower),
            "language_model": str(language_folder),
            "language_model_files": fingerprint(files),
            "language_model_weights": weights,
            "data": data,
            "records": len(records),
            "records_fingerprint": fingerprint([[row.name, row.image.size_bytes, row.turns] for row in records]),
            "settings": llava.model_dump(),
            "seed": settings.runtime.seed,
            "lmms_eval": TASKS,
        }
        if not _train(parts, records, llava.max_tokens, settings, work, fingerprint(facts), world, stopping):
            return False
        if world.is_first:
            write_llava(parts, facts, out)
            print(f"{out}: loaded back by transformers, the same logits.")
            print(f"The paper's ten benchmarks ({', '.join(TASKS)}):\n{_lmms_eval_command(out)}")
    return True


def _tower_folder(spec: EncoderSpec, work: Path) -> Path:
    """The tower in Hugging Face's format: the folder of hf:DIR, or an export of any other encoder, made in `work`."""
    if spec.spec.startswith("hf:"):
        return local_path(spec.spec.removeprefix("hf:"))
    export_encoder(spec, "hf", work / "tower")
    return work / "tower"


class Projection(nn.Module):
    """Images and conversations -> loss. The projector is its only child, so that checkpoints hold nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._frozen = (model.eval(),)
        self.projector = model.model.multi_modal_projector

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S], tokens int [B, T, 2] of ids and labels -> mean cross-entropy of the learnt
        tokens. Padding comes last, so causal attention never sees it.
        """
        ids, labels = tokens.unbind(-1)
        return self._frozen[0](input_ids=ids, pixel_values=images, labels=labels, use_cache=False).loss


def _train(
    parts: "Assembled",
    records: list[Record],
    max_tokens: int,
    settings: Train,
    work: Path,
    identity: str,
    world: World,
    stopping: Callable[[], bool],
) -> bool:
    tokenizer, config = parts.processor.tokenizer, parts.model.config
    limit = min(max_tokens, getattr(config.text_config, "max_position_embeddings", None) or max_tokens)

    def tokens(turns: list[str]) -> tuple[list[int], list[int]]:
        return conversation_ids(turns, tokenizer, config.image_token_id, config.image_seq_length, limit)

    read = Reader(parts.form, tokens, tokenizer.pad_token_id, settings.data.threads)
    normalise = Normaliser(parts.form, world.device)

    def inputs(batch: RecordBatch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), batch.tokens.to(world.device, non_blocking=True)

    def batches(first_step: int, steps: int) -> Iterator[RecordBatch]:
        return record_batches(records, read, settings.batch_size, settings.runtime.seed, world, first_step, steps)

    model = Projection(parts.model.to(world.device))
    return train_model(model, batches, inputs, settings, work / identity, identity, world, stopping)


# -- assembly: tower, projector and language model as one transformers model


class Assembled(NamedTuple):
    """`model`: LlavaForConditionalGeneration. `processor`: LlavaProcessor. `form`: the tower's images."""

    model: Any
    processor: Any
    form: ImageForm


def assemble(tower: Path, language: LanguageModel, settings: Llava, seed: int) -> Assembled:
    """All parts as one, the projector drawn from `seed`.

    Raises:
        UserError: a tower that LLaVA cannot take, a tokenizer without offsets, too few positions.
    """
    from transformers import AutoImageProcessor, LlavaProcessor

    tokenizer = language.tokenizer
    if not tokenizer.is_fast:
        fix = "save it with transformers' AutoTokenizer"
        raise UserError(f"the tokenizer in {language.name} has no tokenizer.json", fix=fix)
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
    image_tokens = model.config.image_seq_length
    shortest = image_tokens + _SHORTEST_TEXT
    language.check_positions(shortest, "an image's tokens and a short conversation")
    if settings.max_tokens < shortest:
        problem = f"llava.max_tokens is {settings.max_tokens}, an image takes {image_tokens}"
        raise UserError(problem, allowed=f"at least {shortest}")
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(tower, local_files_only=True),
        tokenizer,
        patch_size=net.config.patch_size,
        vision_feature_select_strategy=select,
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    form, flips = image_form(tower)
    if flips:
        net.register_forward_pre_hook(flip_channels, with_kwargs=True)
    return Assembled(model, processor, form)


def load_tower(folder: Path) -> "PreTrainedModel":
    """The tower in a folder of `train export --format hf`, or of another CLIP or plain ViT.

    Raises:
        UserError: there is none, weights are missing, or it is of a class whose hidden states LLaVA cannot take.
    """
    if not (folder / "config.json").is_file():
        allowed = "a folder of `train export ENCODER --format hf`"
        raise UserError(f"{folder} has no config.json", allowed=allowed, fix="fix the path")
    tower = load_vision_model(folder)
    if type(tower).__name__ not in TOWERS:
        raise UserError(
            f"{folder} holds a {type(tower).__name__}, which transformers' LLaVA cannot take as its tower: it needs "
            "hidden states [images, 1 + patches, width], class token first",
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
    gradients; the tower and the language model are used as they are, not copied.

    Args:
        tower: CLIPVisionModel or ViTModel, see `load_tower`.
        language_model: a causal one of transformers. Its embedding grows if `image_token_id` is beyond it.
        image_token_id: the token that stands for one patch; a prompt holds `config.image_seq_length` of them an image.
        layer: hidden states that are projected: -1 the last block's, -2 the one's before (LLaVA 1.5); without the
            tower's final norm.
        select: `default` drops the class token, `full` keeps it.

    Raises:
        UserError: another class of tower, or a layer that it does not have.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    depth, name = getattr(tower.config, "num_hidden_layers", 0), type(tower).__name__
    if name not in TOWERS:
        raise UserError(f"transformers' LLaVA cannot take a {name} as its tower", allowed=", ".join(TOWERS))
    if not -depth - 1 <= layer <= depth:
        allowed = f"{-depth - 1} to {depth}: the embeddings, and {depth} blocks"
        raise UserError(f"the tower has no hidden states {layer}", allowed=allowed)
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    text_config = copy.deepcopy(language_model.config)
    decoder, head = language_model.get_decoder(), cast(nn.Linear, language_model.get_output_embeddings())
    if text_config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        # LLaVA ties by LLaMA's names only: other models' heads become tensors of their own.
        text_config.tie_word_embeddings = False
        head = copy.deepcopy(head)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=layer,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2 + (select == "full"),
        vision_feature_select_strategy=select,
    )
    with torch.device("meta"):  # no second copy of a large language model
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, decoder, head
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    if getattr(tower, "pooler", decoder) is None:
        tower.pooler = _zero_pooler(tower.config)
    model.generation_config = language_model.generation_config
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def _zero_pooler(config: Any) -> nn.Module:
    """ViTModel's pooler: LLaVA's class builds one that nothing reads, and would warn that its weights are missing."""
    from transformers.models.vit.modeling_vit import ViTPooler

    pooler = ViTPooler(config)
    for parameter in pooler.parameters():
        nn.init.zeros_(parameter)
    return pooler


# -- output


def write_llava(parts: Assembled, facts: dict[str, Any], out: Path) -> None:
    """Model, processor and facts into `out`, whole or not at all; what was written is loaded back and compared.

    Raises:
        UserError: what transformers loads gives other logits.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = parts.model.cpu().eval()
    with whole_folder(out.resolve()) as folder:
        model.save_pretrained(folder)
        parts.processor.save_pretrained(folder)
        options: dict[str, Any] = {"local_files_only": True, "weights_only": True, "dtype": "auto"}
        read: Any = LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        chat = [{"role": "user", "content": f"{IMAGE}\nWhat is this?"}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        text = text.replace(IMAGE, IMAGE * model.config.image_seq_length)
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        pixels = torch.randn(1, 3, parts.form.side, parts.form.side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            own, loaded = (net(input_ids=ids, pixel_values=pixels).logits.float() for net in (model, read))
        difference = float((own - loaded).abs().max().nan_to_num(nan=float("inf")))
        if not difference <= _LOGITS_TOLERANCE * max(1.0, float(own.abs().max())):
            raise UserError(
                f"what transformers loads from {out} gives logits that differ by {difference:.1e}; nothing was written",
                fix="this is a fault of the writer: please report it",
            )
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / MARK, {**facts, "logits_differ_by": difference, "files": files})
        share_like(folder / MARK)


def _lmms_eval_command(out: Path) -> str:
    words = ["python3", "-m", "lmms_eval", "--model", "llava_hf", "--model_args", f"pretrained={out}"]
    tasks, results = ",".join(TASKS.values()), f"{out}.lmms-eval"
    return shlex.join([*words, "--tasks", tasks, "--batch_size", "1", "--output_path", results])
