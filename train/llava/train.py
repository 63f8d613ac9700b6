"""`train llava`: a projector between a frozen tower and a frozen language model, written as transformers and lmms-eval
load it.

tower, language model -> LlavaForConditionalGeneration -> loop (Projecting, AdamW) on LLaVA's records -> OUT, loaded back
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labels.settings import Llava, Optimizer, Pipeline, Train
from labels.storage import UserError, fingerprint, whole_folder, write_json
from train.checkpoint import weights_fingerprint
from train.distributed import World, distributed_world
from train.encoders.encoder import EncoderSpec
from train.evals.captioner import check_folder, load_language_model
from train.evals.features import Normaliser
from train.export.format import check_replaceable, share_like
from train.llava.data import IMAGE, Reader, Record, TalkBatch, conversation_ids, load_records, talk_batches
from train.llava.model import Assembled, Projecting, assemble, tower_folder
from train.loop import stop_signals
from train.optim import autocast_dtype
from train.trainer import train_model

MARK = "llava.json"
"""What a folder of ours holds: no other is ever replaced."""
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
"""The paper's ten benchmarks, and what lmms-eval calls them."""


def train_llava(
    asked: EncoderSpec, language: Path, data: str, images: Path | None, pipeline: Pipeline, out: Path
) -> bool:
    """Train a projector, or resume its training, and write the whole model into `out`.

    Args:
        asked: the tower. language: folder of a causal language model.
        data, images: see load_records.
        out: new, empty, or of an earlier `train llava`. Beside it lies <out>.work/ with metrics and checkpoints.

    Returns:
        False when a signal stopped it; what was trained so far is saved.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    check_replaceable(out, MARK, "train llava")
    check_folder(language)
    records = load_records(data, images)
    settings, folder = _trainer_settings(pipeline.train, pipeline.llava), out.with_name(f"{out.name}.work")
    with distributed_world(settings.runtime) as world, stop_signals() as stopping:
        dtype = autocast_dtype(settings.runtime.precision, world.device) if world.device.type == "cuda" else None
        tower = tower_folder(asked, folder if world.size == 1 else folder / f"rank-{world.rank}")
        held = load_language_model(language, dtype or torch.float32)
        weights = weights_fingerprint(held.model)  # before the image's token joins its embedding
        parts = assemble(tower, held, pipeline.llava, settings.runtime.seed)
        projecting = Projecting(parts.model.to(world.device))
        facts = {
            "language_model_weights": weights,
            **_facts(asked, language, data, records, parts, pipeline.llava, settings),
        }
        identity = fingerprint(facts)
        if not _train(
            projecting, parts, records, pipeline.llava, settings, folder / identity, identity, world, stopping
        ):
            return False
        if world.is_first:
            write_llava(parts, facts, out)
            print(
                f"{out}: loaded back by transformers, the same logits. The paper's ten benchmarks ({', '.join(TASKS)}):\n{command(out)}"
            )
    return True


def command(out: Path) -> str:
    """The command of lmms-eval for the paper's benchmarks."""
    words = [
        "python3",
        "-m",
        "lmms_eval",
        "--model",
        "llava_hf",
        "--model_args",
        f"pretrained={out}",
        "--tasks",
        ",".join(TASKS.values()),
    ]
    return shlex.join([*words, "--batch_size", "1", "--output_path", f"{out}.lmms-eval"])


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
        talk = [{"role": "user", "content": f"{IMAGE}\nWhat is this?"}]
        text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = processor.tokenizer(text.replace(IMAGE, IMAGE * model.config.image_seq_length), return_tensors="pt")[
            "input_ids"
        ]
        pixels = torch.randn(1, 3, parts.form.side, parts.form.side, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            wanted, found = (one(input_ids=ids, pixel_values=pixels).logits.float() for one in (model, read))
        difference = float((wanted - found).abs().max().nan_to_num(nan=float("inf")))
        if not difference <= 1e-4 * max(1.0, float(wanted.abs().max())):
            raise UserError(
                f"what transformers loads from {out} gives logits that differ by {difference:.1e}; nothing was written",
                fix="this is a fault of the writer: please report it",
            )
        files = sorted(path.name for path in folder.iterdir())
        write_json(folder / MARK, {**facts, "logits_differ_by": difference, "files": files})
        share_like(folder / MARK)


def _train(
    projecting: Projecting,
    parts: Assembled,
    records: list[Record],
    llava: Llava,
    settings: Train,
    run: Path,
    identity: str,
    world: World,
    stopping: Callable[[], bool],
) -> bool:
    tokenizer, config = parts.processor.tokenizer, parts.model.config

    most = min(llava.max_tokens, getattr(config.text_config, "max_position_embeddings", None) or llava.max_tokens)

    def tokens(turns: list[str]) -> tuple[list[int], list[int]]:
        return conversation_ids(turns, tokenizer, config.image_token_id, config.image_seq_length, most)

    read = Reader(parts.form, tokens, tokenizer.pad_token_id, settings.data.threads)
    normalise = Normaliser(parts.form, world.device)

    def inputs(batch: TalkBatch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), batch.talk.to(world.device, non_blocking=True)

    def batches(first_step: int, steps: int) -> Iterator[TalkBatch]:
        return talk_batches(records, read, settings.batch_size, settings.runtime.seed, world, first_step, steps)

    return train_model(projecting, batches, inputs, settings, run, identity, world, stopping)


def _trainer_settings(train: Train, llava: Llava) -> Train:
    optimizer = Optimizer(**llava.optimizer.model_dump())
    return train.model_copy(update={"samples": llava.samples, "batch_size": llava.batch_size, "optimizer": optimizer})


def _facts(
    asked: EncoderSpec,
    language: Path,
    data: str,
    records: list[Record],
    parts: Assembled,
    llava: Llava,
    settings: Train,
) -> dict[str, Any]:
    files = [[file.name, file.stat().st_size] for file in sorted(language.iterdir()) if file.is_file()]
    return {
        "tower": asked.name,
        "tower_weights": weights_fingerprint(parts.model.model.vision_tower),
        "language_model": str(language),
        "language_model_files": fingerprint(files),
        "data": data,
        "records": len(records),
        "records_fingerprint": fingerprint(
            [[record.name, record.place.size_bytes, record.turns] for record in records]
        ),
        "settings": llava.model_dump(),
        "seed": settings.runtime.seed,
        "lmms_eval": TASKS,
    }
