"""`train caption` on images of one colour: it learns to name them, resumes, and rejects bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from caption_factory import COLOURS, coloured_pairs, language_model_folder
from labels.config import load_pipeline
from labels.manifest import PAD_ID
from labels.storage import UserError
from train.cli import cli
from train.data.inputs import rows_of_steps
from train.distributed import World
from train.evals.captioner import Captioner, MlpMapper, TransformerMapper, load_language_model
from train.evals.kinds.caption import Captioning, pair_batches, tokenized
from train.evals.measure import read_results
from train.report.page import is_of

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (
    "caption.samples=1920",
    "caption.batch_size=16",
    "caption.prefix=2",
    "caption.max_tokens=12",
    "caption.mapper_layers=1",
    "caption.built_in={layers: 1, width: 32, vocabulary: 280}",
    "caption.beams=2",
    "caption.optimizer={lr: 1e-2, warmup_samples: 160}",
    "features.precision=fp32",
)


def run(data: str, out: Path, *more: str) -> str:
    """The command's output; a user error is raised."""
    sets = [word for key in TINY for word in ("--set", key)]
    result = CliRunner().invoke(
        cli, ["caption", "--data", data, "--encoder", "pixels:2", "--out", str(out), *sets, *more]
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_pairs(tmp_path_factory.mktemp("pairs"))


def test_it_learns_to_name_colours(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "caption.json"
    run(f"pairs:{pairs}", out)
    found = json.loads(out.read_text())
    (row,) = found["results"]
    assert row["cider_standard_error"] == pytest.approx(0) and found["train"]["samples"] == 24
    (seed,) = row["seeds"]
    captions = json.loads(Path(seed["captions"]).read_text())
    assert [one["caption"] for one in captions] == [
        f"A photo of something {list(COLOURS)[index % 3]}." for index in range(9)
    ]
    assert row["cider"] == pytest.approx(1000)  # all are right: 10 a scorer, times 100
    assert "built-in, 1,920 pairs, beam search of 2; CIDEr-D x 100" in found["protocol"] and found["part"] == "test"
    (read,) = read_results([out])
    assert read.main == "cider" and is_of(read, ["pairs"], "caption")
    # Again: nothing is trained, the result is the same.
    lines = (Path(seed["captions"]).parent / "metrics.jsonl").read_text()
    run(f"pairs:{pairs}", out)
    assert json.loads(out.read_text())["results"][0]["seeds"] == row["seeds"]
    assert (Path(seed["captions"]).parent / "metrics.jsonl").read_text() == lines
    assert {file.name for file in Path(seed["captions"]).parent.glob("checkpoints/*/*")} == {
        "mapper.safetensors",
        "decoder.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_a_folders_decoder_is_not_changed(pairs: Path, tmp_path: Path) -> None:
    folder = language_model_folder(tmp_path / "tiny-llama", ["A photo of something red."] * 9)
    out = tmp_path / "caption.json"
    run(
        f"pairs:{pairs}",
        out,
        "--decoder",
        str(folder),
        "--set",
        "caption.mapper=mlp",
        "--set",
        "caption.samples=160",
        "--set",
        "caption.optimizer.warmup_samples=16",
    )
    (row,) = json.loads(out.read_text())["results"]
    assert row["variant"] == "caption, tiny-llama"
    work = Path(row["seeds"][0]["captions"]).parent
    assert not list(work.rglob("decoder.safetensors")) and list(work.rglob("mapper.safetensors"))
    losses = [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_in_a_suite_with_others(pairs: Path, tmp_path: Path) -> None:
    """The figure of the command above, with retrieval skipped, as there is no text tower; overlapping parts are
    rejected at once.
    """
    keys = dict(key.removeprefix("caption.").split("=", 1) for key in TINY if key.startswith("caption."))
    chosen = {key: yaml.safe_load(value) for key, value in keys.items()}
    content = {
        "encoders": ["pixels:2"],
        "data": [f"pairs:{pairs}"],
        "protocols": [{"protocol": "caption", "set": chosen}, {"protocol": "retrieval", "set": {"k": [1]}}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    command = ["eval", "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "skipped: retrieval of pixels:2" in result.output, result.output
    (row,) = json.loads((tmp_path / "out" / "suite.json").read_text())["results"]
    assert (row["variant"], row["cider"]) == ("caption, built-in decoder", pytest.approx(1000))
    header, _, line = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "| caption, built-in decoder |" in header and line.endswith(" 1000.0 |")
    assert Path(row["seeds"][0]["captions"]).is_file() and row["seeds"][0]["test_images_in_train"] == 0
    double = coloured_pairs(tmp_path / "double")
    (double / "test" / "0.tar").write_bytes((double / "train" / "0.tar").read_bytes())
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({**content, "data": [f"pairs:{double}"], "protocols": ["caption"]})
    )
    with pytest.raises(UserError, match="24 of 24 test images are training images too"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    (double / "train" / "0.tar").unlink()
    with pytest.raises(
        UserError, match="has no training part; allowed: data with a part `train`".replace("; ", r"\s+")
    ):
        CliRunner().invoke(cli, command, catch_exceptions=False)


def test_a_trained_decoder_changes(pairs: Path, tmp_path: Path) -> None:
    language = load_language_model(language_model_folder(tmp_path / "lm", ["a photo"]))
    captioner = Captioner(MlpMapper(4, 2, language.width), language, train_decoder=True)
    assert any(name.startswith("decoder.") for name, _ in captioner.named_parameters())
    frozen = Captioner(MlpMapper(4, 2, language.width), language, train_decoder=False)
    assert {name.partition(".")[0] for name in frozen.state_dict()} == {"mapper"}
    assert not any(parameter.requires_grad for parameter in language.model.parameters())


def test_loss_is_that_of_each_caption_alone(tmp_path: Path) -> None:
    """Padding and neighbours in the batch change nothing: the sum over single captions, term by term."""
    language = load_language_model(language_model_folder(tmp_path / "lm", ["a photo of a dog"]))
    captioner = Captioner(TransformerMapper(4, 3, language.width, 2), language, train_decoder=False)
    dice = torch.Generator().manual_seed(0)
    features, rows = torch.randn(3, 4, generator=dice), [[5, 9, 0], [7, 0], [3, 4, 5, 6, 0]]
    ids = torch.full((3, 5), PAD_ID)
    for row, one in enumerate(rows):
        ids[row, : len(one)] = torch.tensor(one)
    total = 0.0
    for feature, one in zip(features, rows, strict=True):
        prefix = captioner.mapper(feature[None])
        for at, token in enumerate(one):
            words = language.model.get_input_embeddings()(torch.tensor([one[:at]], dtype=torch.long))
            logits = language.model(inputs_embeds=torch.cat([prefix, words], 1)).logits[0, -1]
            total -= logits.log_softmax(0)[token].item()
    assert captioner(features, ids).item() == pytest.approx(total / 10, rel=1e-5)


def test_every_pair_once_an_epoch() -> None:
    rows = np.concatenate(list(rows_of_steps(7, 4, 0, 0, 7)))
    assert all(sorted(rows[epoch * 7 : epoch * 7 + 7]) == list(range(7)) for epoch in range(4))
    assert not np.array_equal(rows[:7], rows[7:14])
    np.testing.assert_array_equal(np.concatenate(list(rows_of_steps(7, 4, 0, 3, 7))), rows[12:])


def test_ranks_share_a_batch(tmp_path: Path) -> None:
    tokenizer = load_language_model(language_model_folder(tmp_path / "lm", ["a dog and a cat"])).tokenizer
    pairs = tokenized([["a dog", "a cat and a dog and a cat"], ["cat"]], tokenizer, 4)
    assert list(pairs.image) == [0, 0, 1] and max(map(len, pairs.ids)) == 4
    assert all(one[-1] == tokenizer.eos_token_id for one in pairs.ids)
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    worlds = [World(rank, size, torch.device("cpu")) for rank, size in ((0, 1), (0, 2), (1, 2))]
    whole, *halves = [next(pair_batches(features, pairs, 4, 0, world, 0, 1)) for world in worlds]
    assert torch.equal(whole.features, torch.cat([half.features for half in halves]))
    assert all(row in features for row in whole.features.numpy())


def test_errors_name_the_fix(pairs: Path, tmp_path: Path) -> None:
    def error(*more: str, data: str = f"pairs:{pairs}") -> str:
        with pytest.raises(UserError) as caught:
            run(data, tmp_path / "x.json", *more)
        return str(caught.value)

    assert "no language model at" in error("--decoder", str(tmp_path / "nowhere"))
    folder = language_model_folder(tmp_path / "lm", ["a photo"], positions=8)
    assert "need 14 positions, the language model" in error("--decoder", str(folder))
    assert "lower caption.prefix and caption.max_tokens" in error("--decoder", str(folder))
    (folder / "model.safetensors").unlink()
    message = error("--decoder", str(folder))
    assert (
        f"{folder} has no weights" in message
        and "model.safetensors (or its parts)" in message
        and "git lfs pull" in message
    )
    assert "has the parts train, test; allowed: one named val; fix the data, or --part" in error(
        "--part", "val"
    ).replace("\n  fix:", ";").replace("\n ", ";")
    double = coloured_pairs(tmp_path / "double")
    (double / "test" / "0.tar").write_bytes((double / "train" / "0.tar").read_bytes())
    message = error(data=f"pairs:{double}")
    assert (
        "24 of 24 test images are training images too, the first: 0.tar/00001" in message
        and "remove them from one" in message
    )
    with pytest.raises(UserError, match="allowed: samples of one batch at least"):
        Captioning().settings(load_pipeline(None, ["caption.samples=10"]))
    assert not (tmp_path / "x.json").exists()
