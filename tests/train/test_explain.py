"""`preprocess explain`, `train explain`: weights are the loss's, captions come from the shard or say that they are
decoded.
"""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from labels.config import dump_yaml, load_pipeline
from labels.idf import read_idf, target_weights
from labels.manifest import read_manifest
from labels.show.explanation import _blocks, describe, to_html, to_png, to_svg
from labels.storage import UserError, write_json
from labels.tokenizers.tokenizer import name_of, text_of
from page_checks import CHROMIUM, check_page, shown_in_chromium
from preprocess.inspect.explain import explain
from shard_factory import Built, build, healthy, preprocess, rows, sample, write_tar
from train.checkpoint import State, load_exactly, read_weights
from train.cli import cli
from train.encoders.load import load_encoder
from train.evals.features import decode
from train.evals.predict import explain_with_predictions, read_images
from train.losses.head import positives
from train.model import build_head, build_trunk


def test_weights_are_the_losss(finished: Built) -> None:
    idf = read_idf(finished.out / "idf.parquet")
    for row in rows(finished.out)[:6]:
        reported = {label.token_id: label.weight for label in explain(finished.out, row["key"]).labels}
        expected = positives(torch.tensor([row["label_ids"]]), torch.from_numpy(idf)).shares[0]
        assert np.allclose([reported[token] for token in row["label_ids"]], expected.numpy(), atol=1e-6)
    assert target_weights(np.zeros(3)).tolist() == [0, 0, 0]


def test_by_key_and_by_uid_with_the_image_of_its_row(finished: Built) -> None:
    by_key, by_uid = explain(finished.out, "000000013"), explain(finished.out, f"{13:032x}")
    assert by_key == by_uid
    assert by_key.caption == "two dogs, a cat and the sea 13" == by_key.cleaned
    assert by_key.image == healthy(1, first=13)[0][1]
    assert by_key.tokens[0] == "two" and by_key.sample.index == 13


def test_caption_and_cleaned_caption_differ_where_cleaning_did_something(finished: Built) -> None:
    reported = explain(finished.out, "000000002")
    assert reported.caption.startswith("Ünïcode &amp;amp;")
    assert reported.cleaned == 'ünïcode & "quotes" 2'
    assert reported.notes == ()


def test_without_the_shard_the_caption_is_decoded_and_says_so(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "data" / "0.tar", healthy(4))
    build(tmp_path / "data", tmp_path / "out")
    tar.rename(tmp_path / "elsewhere.tar")
    reported = explain(tmp_path / "out", "000000001")
    assert reported.caption == "two dogs , a cat and the sea 1"
    assert reported.caption_from == "decoded from the tokens: 0.tar is no longer where it was"
    assert reported.cleaned is None and reported.image is not None


def test_command_writes_page_and_pictures(finished: Built, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"x.{kind}" for kind in ("html", "svg", "png")}
    said = preprocess(
        "explain", finished.out, "000000003", *(word for kind, file in files.items() for word in (f"--{kind}", file))
    )
    assert said.code == 0, said.err
    assert "犬と猫" in said.out and "t_c" in said.out
    page = check_page(files["html"].read_text("utf8"))
    assert "犬と猫" in page.text and page.images == 1
    with Image.open(files["png"]) as picture:
        assert picture.format == "PNG" and picture.width == 1200
    svg = files["svg"].read_text("utf8")
    assert (
        "犬と猫" in svg
        and "data:image/jpeg;base64," in svg
        and not re.search(r"url\((?!#)|@import|@font-face|href=.http", svg)
    )
    ElementTree.fromstring(svg)


def test_captions_cannot_steer_the_terminal_or_the_page(tmp_path: Path) -> None:
    caption = '[red]a\x1b[31m\x07\x9b2Jcat\u202e <script>alert(1)</script> "style="color: #1f5fa8'
    write_tar(tmp_path / "data" / "0.tar", sample("7", caption))
    build(tmp_path / "data", tmp_path / "out")
    reported = explain(tmp_path / "out", "7")
    assert reported.caption == caption
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=200).print(describe(reported))
    printed = re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())
    assert (
        "[red]a␛[31m␇⟨009B⟩2Jcat⟨202E⟩ <script>" in printed
        and "\x1b" not in printed
        and "\x1b[31m" not in stream.getvalue()
    )
    page = check_page(to_html(reported))
    assert "[red]a␛[31m␇" in page.text and '"style="color: #1f5fa8' in re.sub(r"\s+", " ", page.text)
    ElementTree.fromstring(to_svg(reported))
    assert to_png(reported).startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_shows_the_page_without_a_complaint(finished: Built, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text(to_html(explain(finished.out, "000000003")), "utf8")
    assert "CONSOLE" not in shown_in_chromium(tmp_path / "x.html", tmp_path / "shown")


def test_a_quarantined_sample_says_why(finished: Built) -> None:
    said = preprocess("explain", finished.out, "000000100")
    assert said.code == 2
    assert "has no label row '000000100': it was rejected, caption is not UTF-8" in said.err
    assert "no image: not an image" in preprocess("explain", finished.out, "000000101").out


def test_a_key_in_two_shards_asks_which(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        write_tar(tmp_path / "data" / f"{shard}.tar", sample("7", f"a {shard} cat"))
    build(tmp_path / "data", tmp_path / "out")
    said = preprocess("explain", tmp_path / "out", "7")
    assert said.code == 2
    assert "'7' is in 2 shards" in said.err and "--shard NAME" in said.err
    assert explain(tmp_path / "out", "7", shard="b").caption == "a b cat"
    assert "allowed: a, b" in preprocess("explain", tmp_path / "out", "7", "--shard", "c").err


@pytest.mark.parametrize(
    ("tokens", "tokenizer", "text", "names"),
    [
        (["red</w>", "sno", "ws</w>", "Ã©</w>"], "clip", "red snows é", ["red", "sno…", "ws", "é"]),
        (["un", "##able", "to"], "wordpiece", "unable to", ["un", "…able", "to"]),
        (["▁un", "able", "▁to"], "unigram", "unable to", ["un", "able", "to"]),
        (["dog.n.01", "cat.n.01"], "catlip", "dog.n.01, cat.n.01", ["dog.n.01", "cat.n.01"]),
        (["Ġred", "Ġcat"], "bpe", "red cat", ["red", "cat"]),
    ],
)
def test_tokens_become_text(tokens: list[str], tokenizer: str, text: str, names: list[str]) -> None:
    assert text_of(tokens, tokenizer) == text
    assert [name_of(token, tokenizer) for token in tokens] == names


@pytest.fixture(scope="module")
def run(finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny net that was never trained, as `train run` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    small = {"patch_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = {"trunk_args": small, "trunk": "vit_tiny_patch16_224", "image_size": 32}
    pipeline = load_pipeline(overrides=[f"train.model={model}"])
    manifest = read_manifest(finished.out)
    vocabulary = manifest.tokenizer.vocabulary
    checkpoint = folder / "checkpoints" / "samples-000000000064"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(build_trunk(pipeline.train.model).state_dict(), checkpoint / "trunk.safetensors")
    save_file(build_head(32, vocabulary).state_dict(), checkpoint / "head.safetensors")
    state = State(samples_seen=64, number=1, labels="", idf="", betons="", options="", vocabulary=vocabulary)
    write_json(checkpoint / "state.json", state.model_dump())
    dump_yaml(folder / "config.yaml", pipeline)
    write_json(folder / "data.json", {"tokenizer_fingerprint": manifest.tokenizer.fingerprint})
    return folder


def train(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_likeliest_tokens_by_the_moving_average(finished: Built, run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "samples-000000000064"
    (tmp_path / "x.jpg").write_bytes(explain(finished.out, "000000003").image or b"")
    said = train("predict", f"ema:{run}", tmp_path / "x.jpg")
    assert "has no moving average" in str(said.exception)
    head = load_file(folder / "head.safetensors")
    save_file(load_file(folder / "trunk.safetensors"), folder / "trunk_ema.safetensors")
    save_file({**head, "1.bias": torch.linspace(0, 100, 49_408)}, folder / "head_ema.safetensors")
    answer = json.loads(train("predict", f"ema:{run}", tmp_path / "x.jpg", "--top", 1).output)
    assert answer["checkpoint"] == "samples-000000000064, moving average"
    assert answer["images"][0]["tokens"][0]["token_id"] > 48_000, "as the bias of the averaged head has it"
    said = train("explain", finished.out, "000000003", "--checkpoint", f"ema:{run}", "--top", 5)
    assert "likeliest tokens by samples-000000000064, moving average" in said.output
    for file in folder.glob("*_ema.safetensors"):
        file.unlink()


def test_a_runs_likeliest_tokens(finished: Built, run: Path, tmp_path: Path) -> None:
    reported = explain_with_predictions(finished.out, "000000003", run, top=5)
    file = run / "checkpoints" / reported.checkpoint / "head.safetensors"
    encoder, head = load_encoder(f"run:{run}"), build_head(32, 49_408)
    load_exactly(head, read_weights(file), file)
    pixels = torch.from_numpy(decode(reported.image or b"", 32).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in encoder.images[1:])
    with torch.no_grad():
        expected = head(encoder((pixels - mean) / std)).softmax(dim=1)[0].topk(5)
    assert [guess.label.token_id for guess in reported.guesses] == expected.indices.tolist()
    assert np.allclose([guess.probability for guess in reported.guesses], expected.values.numpy(), rtol=1e-5)
    assert reported.labels == explain(finished.out, "000000003").labels
    said = train("explain", finished.out, "000000003", "--checkpoint", run, "--top", 5, "--html", tmp_path / "x.html")
    assert said.exit_code == 0, said.output
    page = check_page((tmp_path / "x.html").read_text("utf8"))
    for text in (said.output, page.text):
        assert (
            f"likeliest tokens by {reported.checkpoint}" in text
            and reported.guesses[4].label.name in text
            and "decoded from the tokens" in text
        )
    assert page.images == 1
    (tmp_path / "x.jpg").write_bytes(reported.image or b"")
    answer = json.loads(train("predict", run, tmp_path / "x.jpg", "--top", 5).output)
    assert [row["token_id"] for row in answer["images"][0]["tokens"]] == expected.indices.tolist()
    assert answer["images"][0]["file"] == str(tmp_path / "x.jpg")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: softmax", "name: bce"))
    sigmoid = explain_with_predictions(finished.out, "000000003", run, top=1)
    assert 0.2 < sigmoid.guesses[0].probability < 1  # of this token alone
    write_json(run / "data.json", {"tokenizer_fingerprint": "0123"})
    said = train("explain", finished.out, "000000003", "--checkpoint", run)
    assert "was trained on other classes: 49,408 of tokenizer 0123" in str(
        said.exception
    ) and "give the output folder" in str(said.exception)


def test_mistakes_of_predictions_are_reported(finished: Built, tmp_path: Path) -> None:
    said = train("explain", finished.out, "000000003", "--checkpoint", tmp_path)
    assert "has no finished checkpoint" in str(said.exception)
    said = preprocess("explain", finished.out, "000000003", "--checkpoint", tmp_path)
    assert said.code == 2
    assert f"train explain {finished.out} 000000003 --checkpoint {tmp_path} --top 10" in said.err
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read"):
        list(read_images([tmp_path / "gone.jpg"]))


def test_the_terminal_shows_the_picture_in_blocks(finished: Built) -> None:
    blocks = _blocks(explain(finished.out, "000000003").image or b"", 48)
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", width=100).print(blocks)
    assert len(re.findall("▀", stream.getvalue())) == 40 * 20


def test_explain_loads_no_torch() -> None:
    modules = "preprocess.inspect.explain, labels.show.explanation, preprocess.cli"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
