"""Many output folders as one set: what `--beton` names, what has to agree, mixtures, subsets, remote betons."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import train.cli
from beton_factory import build_out, write_shards
from labels.config import load_pipeline
from labels.settings import Data
from labels.storage import Layout, UserError
from preprocess.counts import sum_idf
from shard_factory import build
from train.data.dataset import BetonSet
from train.data.files import Cache
from train.data.loader import Loader
from train.data.mixture import DataSource, Mixture, parse_sources
from train.data.open import Chosen, data_facts, make_loader, open_data
from train.distributed import World

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folders a/out (35 samples in 3 betons) and b/out (24 in 2; other captions), and both/idf.parquet."""
    folder = tmp_path_factory.mktemp("set")
    build_out(folder / "a", [13, 5, 17])
    shards = write_shards(folder / "b" / "all", [13, 5, 17, 16, 8])
    (folder / "b" / "shards").mkdir()
    for tar in sorted(shards.iterdir())[3:]:
        tar.rename(folder / "b" / "shards" / tar.name)
    build(folder / "b" / "shards", folder / "b" / "out", "--set", "build.beton_samples=16")  # a beton a shard
    sum_idf([folder / "a" / "out", folder / "b" / "out"], folder / "both" / "idf.parquet")
    return folder


def opened(folder: Path, *betons: str, **settings: object) -> BetonSet:
    """What `--beton ... --idf both/idf.parquet` opens; names are below `folder`."""
    chosen = Chosen([str(folder / name) for name in betons], (), folder / "both" / "idf.parquet")
    found = open_data(chosen, Data.model_validate(settings), HERE, lambda: False)
    assert found is not None
    return found


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def seen(betons: BetonSet, steps: int, batch: int = 10, **settings: object) -> list[int]:
    """Positions of the label rows of all samples of this many steps."""
    options = Data.model_validate({"shuffle_block": 4, "shuffle_window": 3} | settings)
    loader = Loader(betons, options, image_size=16, batch_size=batch, seed=2, first_step=0, last_step=steps)
    found = []
    for step, _ in enumerate(loader):
        samples = betons.file_samples(loader.order.batch(step, batch, 0, 1)[0])
        found += [betons.span(int(sample)).row for sample in samples]
    return found


def test_what_beton_may_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folder / "a" / "out", folder / "b" / "out"
    assert parse_sources([str(a)]) == parse_sources([str(a / "manifest.json")]) == Mixture((DataSource(a),))
    assert (
        parse_sources([str(a), str(b)])
        == parse_sources([str(folder / "?" / "out")])
        == Mixture((DataSource(a), DataSource(b)))
    )
    some = parse_sources([str(a / "beton" / "0000[02].beton")]).sources
    assert [(source.out, source.numbers) for source in some] == [(a.resolve(), (0, 2))]
    assert parse_sources([f"{a}=0.7", f"{b}=0.3"]) == Mixture((DataSource(a, group=0), DataSource(b, group=1)), (7, 3))
    assert parse_sources([f"{a}=1/3", f"{b}=2"]).quotas == (1, 6)
    monkeypatch.chdir(folder)
    assert parse_sources(["a/out"]) == Mixture((DataSource(Path("a/out")),))
    assert "--beton b/out has no share, others have" in refusal(lambda: parse_sources(["a/out=2", "b/out"]))
    assert "--beton c* matches nothing" in refusal(lambda: parse_sources(["c*"]))
    assert "--beton names a/out twice" in refusal(lambda: parse_sources(["a/out", "a/out"]))
    assert "the share is 0" in refusal(lambda: parse_sources(["a/out=0", "b/out=1"]))
    assert "repeat only every 1,000,000,000 samples" in refusal(
        lambda: parse_sources(["a/out=0.999999999", "b/out=0.000000001"])
    )
    assert "1 --labels for 2 output folders" in refusal(lambda: parse_sources(["a/out", "b/out"], [a]))
    assert "is not a beton of an output folder" in refusal(
        lambda: parse_sources([str(folder / "x.beton")]) if touch(folder / "x.beton") else None
    )
    strange = Mixture((DataSource(a, numbers=(1, 9)),))
    assert "beton 00009 is not in the manifest" in refusal(lambda: BetonSet(strange))


def touch(path: Path) -> bool:
    path.touch()
    return True


def test_one_set_of_two_output_folders_holds_every_sample_once(folder: Path) -> None:
    betons = opened(folder, "a/out", "b/out")
    assert (betons.samples, betons.sizes, len(betons.paths)) == (59, [59], 5)
    assert sorted(seen(betons, 59, batch=4)) == sorted(list(range(59)) * 4)
    whole = seen(betons, 1, batch=59)
    assert sorted(whole) == list(range(59))
    assert [row < 35 for row in whole] != sorted(row < 35 for row in whole)
    some = opened(folder, "a/out/beton/0000[02].beton", "b/out")
    assert sorted(seen(some, 1, batch=54)) == [row for row in range(59) if not 13 <= row < 18]
    assert (
        len(
            {
                one.identity["betons"]
                for one in (betons, some, opened(folder, "a/out"), opened(folder, "a/out=1", "b/out=1"))
            }
        )
        == 4
    )
    facts = data_facts(betons)
    assert [source["betons"] for source in facts["sources"]] == [3, 2]
    assert facts["captions"] == 59


def test_a_mixture_has_exact_shares_and_labels_of_each_output_folder(folder: Path) -> None:
    betons = opened(folder, "a/out=0.25", "b/out=0.75")
    rows = seen(betons, 24, batch=8)
    for begin in range(0, len(rows), 4):
        assert sum(row < 35 for row in rows[begin : begin + 4]) == 1
    assert sorted(row for row in rows if row >= 35) == sorted(list(range(35, 59)) * 6)
    labels = [
        row
        for out in ("a/out", "b/out")
        for path in sorted((folder / out / "labels").glob("*"))
        for row in pq.read_table(path)["label_ids"].to_pylist()
    ]
    loader = Loader(
        betons, Data(shuffle_block=4, shuffle_window=3), image_size=16, batch_size=8, seed=2, first_step=0, last_step=24
    )
    found = [[label for label in row if label >= 0] for batch in loader for row in batch.label_ids.tolist()]
    assert found == [labels[row] for row in rows]


def test_what_does_not_agree_is_refused_with_its_fix(folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a" / "out", folder / "b" / "out"
    text = refusal(lambda: BetonSet(parse_sources([str(a), str(b)])))
    assert f"{a} {b} have different IDF tables" in text
    assert f"run `preprocess idf {a} {b} --out idf.parquet`, then give --idf idf.parquet" in text
    betons = BetonSet(parse_sources([str(a), str(b)]), idf=a)
    assert np.array_equal(betons.idf, BetonSet(a).idf)
    assert not np.array_equal(opened(folder, "a/out", "b/out").idf, betons.idf)
    build(folder / "b" / "shards", tmp_path / "short", "--set", "labels.context=2")
    text = refusal(lambda: BetonSet(parse_sources([str(a), str(tmp_path / "short")]), idf=a))
    assert f"{a} and {tmp_path / 'short'} differ in the label limit: 75 and 2" in text
    table = pq.read_table(Layout(a).idf_parquet)
    pq.write_table(table.slice(0, 100), tmp_path / "few.parquet")
    assert "is the table of other tokens" in refusal(lambda: BetonSet(a, idf=tmp_path / "few.parquet"))


def test_a_subset_by_uids_or_by_sql(folder: Path, tmp_path: Path) -> None:
    uids = np.array([(0, number) for number in (3, 7, 7, 40, 10**6)], "u8,u8")
    np.save(tmp_path / "uids.npy", uids)
    betons = opened(folder, "a/out", "b/out", subset=str(tmp_path / "uids.npy"))
    assert sorted(seen(betons, 1, batch=4)) == [3, 7, 7, 40]
    pq.write_table(pa.table({"uid": [f"{number:032x}" for number in (1, 2, 58)]}), tmp_path / "uids.parquet")
    assert sorted(seen(opened(folder, "a/out", "b/out", subset=str(tmp_path / "uids.parquet")), 2, batch=3)) == [
        1,
        1,
        2,
        2,
        58,
        58,
    ]
    few = opened(folder, "a/out=1", "b/out=2", subset="len(label_ids) < 4 AND width > 0")
    rows = {row: len(labels) for row, labels in enumerate(all_labels(folder))}
    assert set(seen(few, 60)) == {row for row, count in rows.items() if count < 4}
    pq.write_table(
        pa.table({"uid": [f"{number:032x}" for number in range(59)], "score": np.arange(59) / 59}),
        tmp_path / "scores.parquet",
    )
    good = opened(folder, "a/out", subset="score > 0.5", metadata=str(tmp_path / "scores.parquet"))
    assert sorted(seen(good, 1, batch=5)) == [30, 31, 32, 33, 34]
    assert good.identity != opened(folder, "a/out").identity


def all_labels(folder: Path) -> list[list[int]]:
    files = [path for out in ("a", "b") for path in sorted((folder / out / "out" / "labels").glob("*"))]
    return [row for path in files for row in pq.read_table(path)["label_ids"].to_pylist()]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("false", "selects no sample"),
        ("colour = 3", "train.data.subset 'colour = 3' cannot be used: .*colour"),
        ("true) ; DROP TABLE firsts; SELECT (true", "cannot be used"),
        ("nowhere.npy", "train.data.subset: nowhere.npy does not exist"),
        ("row >= 35", "leaves no sample of a --beton"),
    ],
)
def test_a_wrong_subset_is_refused(folder: Path, subset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(
            folder,
            "a/out=1",
            "b/out=1",
            subset=subset if subset != "row >= 35" else "uid > '00000000000000000000000000000022'",
        )


def test_verify_compares_whole_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a" / "out", tmp_path / "out")
    beton = tmp_path / "out" / "beton" / "00001.beton"
    data = bytearray(beton.read_bytes())
    data[len(data) // 2] ^= 1
    beton.write_bytes(data)
    BetonSet(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"00001\.beton is damaged: SHA-256 \w{16}\.\.\., in the manifest(.|\n)*preprocess verify"
    ):
        open_data(Chosen([str(tmp_path / "out")]), Data(verify=True), HERE, lambda: False)


@pytest.fixture
def remote(folder: Path) -> str:
    """a/out in an object store."""
    store = fsspec.filesystem("memory")
    store.put(str(folder / "a" / "out"), "/pool/out", recursive=True)
    yield "memory://pool/out"  # type: ignore[misc]
    store.rm("/pool", recursive=True)


def test_remote_betons_are_fetched_into_a_bounded_cache(folder: Path, remote: str, tmp_path: Path) -> None:
    parts = BetonSet(folder / "a" / "out").parts
    room = 2 * max(part.bytes for part in parts)
    settings = {"cache": str(tmp_path / "cache"), "cache_size": room, "shuffle_block": 12, "shuffle_window": 1}
    betons = open_data(Chosen([remote]), Data.model_validate(settings | {"cache_size": 2**40}), HERE, lambda: False)
    assert betons is not None
    assert list((tmp_path).iterdir()) == []
    loaders = [
        Loader(
            one,
            Data(shuffle_block=12, shuffle_window=1),
            image_size=16,
            batch_size=5,
            seed=1,
            first_step=0,
            last_step=21,
            threads=2,
        )
        for one in (
            BetonSet(parse_sources([remote]), cache=Cache(tmp_path / "cache", room)),
            BetonSet(folder / "a" / "out"),
        )
    ]
    most = 0
    for batch, same in zip(*loaders, strict=True):
        assert torch.equal(batch.images, same.images)
        assert torch.equal(batch.label_ids, same.label_ids)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.beton*")))
    assert 0 < most <= room
    assert len(list((tmp_path / "cache").glob("*.beton"))) == 2
    text = refusal(
        lambda: open_data(Chosen([remote]), Data.model_validate(settings | {"shuffle_window": 50}), HERE, lambda: False)
    )
    assert "two windows of 50 blocks of 12 samples touch 3 remote betons" in text
    assert "--set train.data.shuffle_block=11 --set train.data.shuffle_window=1" in text
    text = refusal(lambda: BetonSet(parse_sources([remote]), cache=Cache(tmp_path, 1000)))
    assert "train.data.cache_size is 1,000 bytes, the largest beton" in text


def test_remote_betons_are_checked(remote: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    data = bytearray(store.cat("/pool/out/beton/00001.beton"))
    data[-100] ^= 1
    store.pipe("/pool/out/beton/00001.beton", bytes(data))
    betons = BetonSet(parse_sources([remote]), cache=Cache(tmp_path, 2**40))
    with pytest.raises(
        UserError,
        match=r"memory://\S*pool/out/beton/00001\.beton has \d+ bytes and SHA-256 \w{16}\.\.\., in the manifest",
    ):
        list(Loader(betons, Data(), image_size=16, batch_size=35, seed=0, first_step=0, last_step=1))
    store.rm("/pool/out/beton/00001.beton")
    with pytest.raises(UserError, match=r"00001\.beton is missing"):
        list(Loader(betons, Data(), image_size=16, batch_size=35, seed=0, first_step=0, last_step=1))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("call", ["stat", "unlink"])
def test_a_copy_may_be_finished_while_the_cache_is_counted(
    call: str, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.beton.partial").write_bytes(b"12345")
    original = getattr(Path, call)

    def finished_just_before(path: Path, **how: bool) -> object:
        if path.name == "other.beton.partial" and os.path.exists(path):
            path.rename(tmp_path / "other.beton")
        return original(path, **how)

    monkeypatch.setattr(Path, call, finished_just_before)
    betons = BetonSet(parse_sources([remote]), cache=Cache(tmp_path / "first", 2**40))
    part = betons.parts[0]
    with Cache(tmp_path, part.bytes).open(betons.paths[0], part) as copy:
        assert copy.stat().st_size == part.bytes
    assert not (tmp_path / "other.beton").exists()  # it was counted, and had to make room


def test_the_command_takes_several_and_paths_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Chosen] = []
    monkeypatch.setattr("train.trainer.train_run", lambda chosen, run, pipeline, **_: taken.append(chosen) or True)
    monkeypatch.chdir(tmp_path)
    for words in (["--beton"], ["--beton", "a=0.5", "--beton", "b=0.5", "--idf", "x.parquet"]):
        result = CliRunner().invoke(train.cli.cli, ["run", *words], catch_exceptions=False)
        assert result.exit_code == 0
    assert taken == [Chosen(["out"], [], None), Chosen(["a=0.5", "b=0.5"], [], Path("x.parquet"))]


def test_a_loader_is_made_from_the_settings(folder: Path) -> None:
    pipeline = load_pipeline(
        overrides=[
            "train.samples=24",
            "train.batch_size=8",
            "train.model.image_size=16",
            "train.optimizer.warmup_samples=8",
        ]
    )
    betons = opened(folder, "b/out")
    assert [batch.images.shape for batch in make_loader(betons, pipeline.train, 0, 3, HERE)] == [(8, 16, 16, 3)] * 3
