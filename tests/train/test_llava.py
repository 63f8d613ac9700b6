"""`train llava` with a tiny tower and a tiny Llama: the projector learns, what is written loads as lmms-eval loads it,
errors name the fix.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from caption_factory import COLOURS, coloured_pairs, language_model_folder
from labels.config import dump_yaml
from labels.settings import Model, Pipeline, Train
from labels.storage import UserError
from train.checkpoint import weights_fingerprint
from train.cli import cli
from train.evals.captioner import load_language_model
from train.llava.data import IGNORED, TEMPLATE, conversation_ids, conversation_text, read_records
from train.llava.train import TASKS
from train.model import build_trunk

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (
    "llava.samples=320",
    "llava.batch_size=8",
    "llava.max_tokens=512",
    "llava.optimizer={lr: 1e-2, warmup_samples: 16}",
    "train.runtime={device: cpu, precision: fp32}",
    "train.log={tensorboard: false}",
)
TURNS = ["<image>\nWhat colour is it?", "It is red.", "Are you sure?", "Yes."]


@pytest.fixture(scope="module")
def trunk(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny ViT of the paper's kind: four patches."""
    run = tmp_path_factory.mktemp("llava") / "run"
    settings = Model(
        trunk="vit_b16", trunk_args={"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}, image_size=16
    )
    (run / "checkpoints" / "samples-000000000016").mkdir(parents=True)
    dump_yaml(run / "config.yaml", Pipeline(train=Train(model=settings)))
    torch.manual_seed(0)
    save_file(build_trunk(settings).state_dict(), run / "checkpoints" / "samples-000000000016" / "trunk.safetensors")
    return run


@pytest.fixture(scope="module")
def language(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model_folder(tmp_path_factory.mktemp("lm") / "llama", [*TURNS, *COLOURS, TEMPLATE], positions=512)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's json and its images; one record has none."""
    folder = tmp_path_factory.mktemp("talks")
    records: list[dict[str, Any]] = [{"id": "text", "conversations": []}]
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        Image.new("RGB", (20, 16 + number), COLOURS[colour]).save(folder / f"{number}.png")
        turns = [TURNS[0], f"It is {colour}.", *TURNS[2:]]
        turns_json = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns_json})
    (folder / "talks.json").write_text(json.dumps(records))
    return folder / "talks.json"


def run(data: Path | str, trunk: Path, language: Path, out: Path, *more: str) -> str:
    sets = [word for key in TINY for word in ("--set", key)]
    words = [
        "llava",
        "--data",
        str(data),
        "--encoder",
        f"run:{trunk}",
        "--language-model",
        str(language),
        "--out",
        str(out),
        *sets,
        *more,
    ]
    result = CliRunner().invoke(cli, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_projector_learns_and_the_model_loads(talks: Path, trunk: Path, language: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    out = tmp_path / "llava"
    output = run(talks, trunk, language, out)
    assert "1 of 13 records have no image and are skipped" in output
    assert (
        f"lmms_eval --model llava_hf --model_args pretrained={out} --tasks vqav2_val,gqa,vizwiz_vqa_val," in output
        and len(TASKS) == 10
    )
    (work,) = (tmp_path / "llava.work").glob("*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in work.read_text().splitlines() if "loss" in json.loads(line)]
    assert len(losses) == 40 and losses[-1] < 0.9 * losses[0]
    # As lmms-eval's llava_hf does it.
    model, info = LlavaForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.chat_template == TEMPLATE
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": TURNS[0]}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(images=[Image.new("RGB", (30, 20), COLOURS["red"])], text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 == model.config.image_seq_length
    assert torch.isfinite(model(**inputs).logits).all()
    found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found.shape[1] <= inputs["input_ids"].shape[1] + 3
    # What was frozen is as it was, what is written is what was trained.
    trained = load_file(next(work.parent.glob("checkpoints/samples-000000000320/projector.safetensors")))
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, trained[name])
    before = load_file(language / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight, before)
    facts = json.loads((out / "llava.json").read_text())
    assert facts["records"] == 12 and facts["lmms_eval"]["SciQA"] == "scienceqa_img"
    # Again: nothing is trained.
    lines = work.read_text()
    run(talks, trunk, language, out)
    assert work.read_text() == lines
    # Another language model, even with files of the same sizes, does not resume what was trained with the first.
    other = shutil.copytree(language, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    own, others = (weights_fingerprint(load_language_model(folder).model) for folder in (language, other))
    assert facts["language_model_weights"] == own != others


def test_captioned_pairs_are_records(trunk: Path, language: Path, tmp_path: Path) -> None:
    data = coloured_pairs(tmp_path / "pairs", train=6, test=0)
    run(f"pairs:{data}", trunk, language, tmp_path / "out", "--set", "llava.samples=24")
    assert json.loads((tmp_path / "out" / "llava.json").read_text())["records"] == 6


def test_training_and_evaluation_use_the_same_prompt(language: Path) -> None:
    """The prompt of an evaluation is the beginning of a training text; labels are gpt's turns, token by token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(TURNS)]
    text, spans = conversation_text(TURNS, tokenizer.eos_token)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    assert text.startswith(tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == tokenizer.apply_chat_template(
        chat[:1], tokenize=False
    )
    assert [text[first:last] for first, last in spans] == [
        f" It is red.{tokenizer.eos_token}",
        f" Yes.{tokenizer.eos_token}",
    ]
    mark = tokenizer.convert_tokens_to_ids("<image>")
    ids, labels = conversation_ids(TURNS, tokenizer, mark, 4, 500)
    assert ids.count(mark) == 4 and len(ids) == len(labels)
    assert (
        tokenizer.decode([token for token in labels if token != IGNORED])
        == f" It is red.{tokenizer.eos_token} Yes.{tokenizer.eos_token}"
    )
    assert tokenizer.decode(ids).replace("<image>" * 4, "<image>") == text
    cut, _ = conversation_ids(TURNS, tokenizer, mark, 4, 2)
    assert cut.count(mark) == 4 and cut == ids[: len(cut)]


def test_errors_name_the_fix(talks: Path, trunk: Path, language: Path, tmp_path: Path) -> None:
    def refusal(*more: str, data: Path = talks, model: Path = language, out: Path = tmp_path / "out") -> str:
        with pytest.raises(UserError) as caught:
            run(data, trunk, model, out, *more)
        return str(caught.value)

    def record(**changed: Any) -> str:
        whole = json.loads(talks.read_text())[1]
        (tmp_path / "x.json").write_text(json.dumps([{**whole, **changed}]))
        with pytest.raises(UserError) as caught:
            read_records(tmp_path / "x.json", talks.parent)
        return str(caught.value)

    assert "no language model at" in refusal(model=tmp_path / "nowhere")
    assert "no file at" in refusal(data=tmp_path / "none.json")
    assert "no folder of images at" in refusal("--images", str(tmp_path / "none"))
    assert "12 of 12 images are missing, the first" in refusal("--images", str(tmp_path))
    assert "llava.max_tokens is 9, an image takes 4" in refusal("--set", "llava.max_tokens=9")
    assert "has no answer within its first" in refusal("--set", "llava.max_tokens=60")
    assert "the record 'r0' has no conversations with turns of human and gpt" in record(conversations=[])
    assert "has the mark <image> 0 times in turn 1; it must be in turn 1, once" in record(
        conversations=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    )
    assert "has in turn 1 `from` 'gpt'" in record(
        conversations=[{"from": "gpt", "value": ""}, {"from": "human", "value": ""}]
    )
    assert "not one file" in record(image=["a.png", "b.png"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "is not of `train llava`: it has no llava.json" in refusal(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    broken = json.loads(talks.read_text())[1:3]
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "0.png").write_bytes((talks.parent / "0.png").read_bytes())
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    message = refusal(data=tmp_path / "broken.json")
    assert (
        "the image of the record 'r1'" in message and "cannot be decoded" in message and "remove the record" in message
    )
