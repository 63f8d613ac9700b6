"""Word pairs and subsets through the whole command: what is chosen, what lands in the files, resume, verify, and
training on it.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from labels.manifest import read_manifest
from labels.tokenizers.kinds.clip import ClipTokenizer
from shard_factory import build, contents, flip_bit, jpeg, preprocess, rows, sample, write_tar

PAIRS = ("--set", "labels.ngrams=2", "--set", "labels.ngram_min_count=3", "--set", "labels.ngram_classes=2")
CAPTIONS = [
    "a red car",
    "the red car here",
    "red car and sea",
    "blue sky",
    "the blue sky",
    "a blue sky day",
    "a cat",
    "the dog",
    "red sea",
    "sky",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for shard in range(2):
        members = []
        for number, caption in enumerate(CAPTIONS):
            uid = f"{shard * 100 + number:032x}"
            members += sample(f"{shard}{number:04d}", caption, jpeg(number), uid=uid, width=32, height=32)
        write_tar(tmp_path / "data" / f"{shard:08d}.tar", members)
    return tmp_path / "data"


def test_pairs_are_classes_behind_the_tokens(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(data, out, *PAIRS)
    tokens = ClipTokenizer().tokens
    names = pq.read_table(out / "idf.parquet")["token"].to_pylist()
    assert names[: len(tokens)] == tokens and sorted(names[len(tokens) :]) == ["blue</w> sky</w>", "red</w> car</w>"]
    for row in rows(out):
        words = [tokens[token] for token in row["token_ids"]]
        pairs = {f"{first} {second}" for first, second in pairwise(words)} & set(names[len(tokens) :])
        assert [names[label] for label in row["label_ids"]] == [
            names[label] for label in sorted(map(names.index, {*words, *pairs}))
        ]
    frequency = dict(zip(names, pq.read_table(out / "idf.parquet")["document_frequency"].to_pylist(), strict=True))
    assert frequency["red</w> car</w>"] == frequency["blue</w> sky</w>"] == 6
    manifest = read_manifest(out)
    assert (manifest.tokenizer.vocabulary, manifest.label_limit) == (len(tokens) + 2, 149)
    assert preprocess("verify", out).code == 0


def test_pairs_with_any_workers_and_after_damage_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "one", *PAIRS)
    build(data, tmp_path / "two", *PAIRS, workers=2)
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    for name in ("pairs.parquet", "labels/00000001.parquet", "counts/00000000.parquet"):
        flip_bit(tmp_path / "two" / name)
        said = preprocess("verify", tmp_path / "two")
        assert said.code == 1 and str(tmp_path / "two" / name) in said.out
        build(data, tmp_path / "two", *PAIRS)
        assert contents(tmp_path / "two") == whole


def test_a_subset_repeats_leaves_out_and_is_verified(data: Path, tmp_path: Path) -> None:
    chosen = [3, 3, 7, 104]
    uids = np.array([(0, number) for number in chosen], np.dtype("u8,u8"))
    np.save(tmp_path / "chosen.npy", uids)
    out = tmp_path / "out"
    build(data, out, "--subset", tmp_path / "chosen.npy")
    assert [int(row["uid"], 16) for row in rows(out)] == chosen
    assert read_manifest(out).samples == len(chosen) and preprocess("verify", out).code == 0
    before = contents(out)
    flip_bit(out / "subset.npy", 0.99)
    assert "subset.npy: missing or changed" in preprocess("verify", out).out
    build(data, out, "--subset", tmp_path / "chosen.npy")
    assert contents(out) == before
    np.save(tmp_path / "chosen.npy", uids[:2])
    said = preprocess("build-labels", data, "--out", out, "--subset", tmp_path / "chosen.npy")
    assert said.code == 2 and "begun with other options: subset was" in said.err


def test_array_jobs_give_the_bytes_of_one_run(data: Path, tmp_path: Path) -> None:
    settings = (*PAIRS, "--set", "build.beton_samples=10")
    build(data, tmp_path / "whole", *settings)
    out = tmp_path / "shares"
    command = ["build-labels", data, "--out", out, "--workers", 1, *settings]
    assert "labels of 1 of 2 shards are done" in preprocess(*command, "--shard", "1/2").out
    assert "labels of all 2 shards are done; now run" in preprocess(*command, "--shard", "0/2").out
    assert preprocess(*command, "--no-beton").code == 0
    assert "1 of 2 betons are done" in preprocess(*command, "--shard", "0/2").out
    assert "2 of 2 betons are done; now run" in preprocess(*command, "--shard", "1/2").out
    assert preprocess(*command).code == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert "allowed: i/n with 0 <= i < n" in preprocess(*command, "--shard", "2/2").err
