"""Checkpoints: which stay, when they are written, what damage and malice lead to, and that no code in them is run."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from labels.config import load_pipeline
from labels.settings import MACHINE, MAY_CHANGE, Train, marked_keys
from labels.storage import UserError, fingerprint, whole_folder
from loop_factory import VOCABULARY, settings, train_in_this_process
from train.checkpoint import CheckpointWriter, State, checkpoint_folders, load_checkpoint, read_state, snapshot
from train.distributed import World
from train.export.format import save_weights
from train.model import build_trunk
from train.trainer import make_train_state, train_run
from trainer_factory import losses, small_config, small_out
from trainer_process import train

ALONE = World(0, 1, torch.device("cpu"))
STATE = State(samples_seen=96, number=1, labels="l", idf="i", betons="b", options="o", vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last checkpoint is then taken away, so that there is something left to train."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = train("run", "--beton", out, "--out", folder / "run", "--config", config, output=folder / "said")
    assert code == 0, said
    shutil.rmtree(checkpoint_folders(folder / "run")[-1])
    return folder / "run"


@pytest.fixture
def spoilt(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def refused(out: Path, run: Path, config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, overrides))
    return str(caught.value)


def test_all_of_a_learner_comes_back(tmp_path: Path) -> None:
    chosen = settings("runtime.precision=fp16", "optimizer.ema_decay=0.9")
    train_state, tensors = train_in_this_process(tmp_path, chosen, ALONE)
    assert train_state.scale is not None
    with CheckpointWriter(tmp_path, keep=1, keep_every=0) as writer:
        writer.save(tensors, STATE.model_copy(update={"loss_scale": train_state.scale.state()}))
    folder = checkpoint_folders(tmp_path)[-1]
    assert sorted(path.stem for path in folder.iterdir()) == [
        "head",
        "head_ema",
        "optimizer",
        "state",
        "trunk",
        "trunk_ema",
    ]
    fresh = make_train_state(chosen, torch.ones(VOCABULARY), ALONE)
    load_checkpoint(folder, fresh, read_state(folder))
    again = snapshot(fresh, True)
    for file, named in tensors.items():
        for name, tensor in named.items():
            assert torch.equal(tensor, again[file][name]), (file, name)
    assert fresh.scale is not None and fresh.scale.state() == train_state.scale.state()


def test_trunk_keys_are_timms_own(finished: Path) -> None:
    for folder in checkpoint_folders(finished):
        saved = load_file(folder / "trunk.safetensors")
        build_trunk(load_pipeline(finished / "config.yaml").train.model).load_state_dict(saved)
        assert "blocks.0.attn.qkv.weight" in saved
        assert load_file(folder / "head.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_snapshot_does_not_change_with_the_weights(tmp_path: Path) -> None:
    train_state, tensors = train_in_this_process(tmp_path, settings(), ALONE)
    before = tensors["trunk"]["cls_token"].clone()
    with torch.no_grad():
        train_state.model.trunk.cls_token.add_(1.0)  # type: ignore[union-attr, operator]
    assert torch.equal(tensors["trunk"]["cls_token"], before)


def test_the_last_ones_and_every_nth_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "samples-000000000001.partial").mkdir(parents=True)
    with CheckpointWriter(tmp_path, keep=2, keep_every=4) as writer:
        for number in range(1, 12):
            writer.save(
                {"head": {"x": torch.zeros(1)}},
                STATE.model_copy(update={"samples_seen": 100 * number, "number": number}),
            )
    kept = [int(folder.name.removeprefix("samples-")) for folder in checkpoint_folders(tmp_path)]
    assert kept == [400, 800, 1000, 1100]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.checkpoint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoint, "save_file", full)
    writer = CheckpointWriter(tmp_path, keep=1, keep_every=0)
    writer.save({"head": {"x": torch.zeros(1)}}, STATE)
    with pytest.raises(UserError, match="No space left on device"):
        writer.save({"head": {"x": torch.zeros(1)}}, STATE)
    with pytest.raises(UserError, match="No space left on device"):
        writer.__exit__()
    assert checkpoint_folders(tmp_path) == []


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import train.checkpoint

    may_end, really = threading.Event(), train.checkpoint.save_file
    monkeypatch.setattr(train.checkpoint, "save_file", lambda *arguments: (may_end.wait(60), really(*arguments)))
    with CheckpointWriter(tmp_path, keep=1, keep_every=0) as writer:
        writer.save({"head": {"x": torch.zeros(1)}}, STATE)  # returns at once, or this test would wait for a minute
        assert not may_end.is_set() and checkpoint_folders(tmp_path) == []
        may_end.set()
    assert len(checkpoint_folders(tmp_path)) == 1


def test_minutes_make_checkpoints_too(out: Path, config: Path, tmp_path: Path) -> None:
    often = [
        "--set",
        "train.checkpoint.every_samples=10M",
        "--set",
        "train.checkpoint.every_minutes=1e-9",
        "--set",
        "train.checkpoint.keep=99",
    ]
    code, said = train(
        "run",
        "--beton",
        out,
        "--out",
        tmp_path / "run",
        "--config",
        config,
        "--set",
        "train.samples=160",
        *often,
        output=tmp_path / "s",
    )
    assert code == 0, said
    assert [int(folder.name.removeprefix("samples-")) for folder in checkpoint_folders(tmp_path / "run")] == list(
        range(16, 161, 16)
    )


MARK = "ran-code-of-a-checkpoint"


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (MARK,)


def test_malicious_files_run_no_code(
    out: Path, config: Path, spoilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_folders(spoilt)[-1]
    for name in ("trunk", "head", "optimizer"):
        file, whole = folder / f"{name}.safetensors", (folder / f"{name}.safetensors").read_bytes()
        torch.save({"weight": _Malice()}, file)  # a pickle in a zip, under a name that promises none
        assert f"{name}.safetensors cannot be read as weights" in refused(out, spoilt, config)
        for header in (2**62, 2**40, len(whole), 0):
            file.write_bytes(header.to_bytes(8, "little") + whole[8:])
            assert f"{name}.safetensors cannot be read as weights" in refused(out, spoilt, config)
        file.write_bytes(b"\x80\x04cos\nmkdir\n(V" + MARK.encode() + b"\ntR.")
        assert f"{name}.safetensors cannot be read as weights" in refused(out, spoilt, config)
        file.write_bytes(whole[: len(whole) // 2])
        assert f"{name}.safetensors cannot be read as weights" in refused(out, spoilt, config)
        tensors = load_file(folder / "trunk.safetensors") if name != "trunk" else {}
        save_file({"../../../" + MARK: torch.zeros(1)} | tensors, file)
        assert "does not fit the architecture" in refused(out, spoilt, config)
        file.write_bytes(whole)
    (folder / "extra.pkl").write_bytes(b"\x80\x04cos\nmkdir\n(V" + MARK.encode() + b"\ntR.")
    os.symlink("/etc", spoilt / "checkpoints" / "samples-..")
    assert train_run(out, spoilt, load_pipeline(config)), (
        "a complete checkpoint is resumed; other folders next to it are ignored"
    )
    assert not list(tmp_path.rglob(MARK)) and losses(spoilt)[-1][0] == 120


def test_a_foreign_or_damaged_state_is_an_error(out: Path, config: Path, spoilt: Path) -> None:
    file = checkpoint_folders(spoilt)[-1] / "state.json"
    state = json.loads(file.read_text())

    def reported(**changes: object) -> str:
        file.write_text(json.dumps(state | changes))
        return refused(out, spoilt, config)

    assert "was trained with another IDF table: SHA-256 0123456789012345, " in reported(idf="0123456789" * 6)
    assert "was trained with other labels: fingerprint other" in reported(labels="other")
    assert "was trained on other betons: fingerprint other" in reported(betons="other")
    assert "state.json has 1 samples seen, its folder is samples-" in reported(samples_seen=1)
    assert "state.json is not valid: samples_seen" in reported(samples_seen="many")
    assert "state.json is not valid: loss_scale" in reported(loss_scale={"__class__": "os.system"})
    assert "state.json is not valid: hook: Extra inputs" in reported(hook="os.system('true')")
    for text in ("{", "[" * 100_000, "null", '{"samples_seen": 1e999}'):
        file.write_text(text)
        assert "state.json is not" in refused(out, spoilt, config)
    assert f"fix: `rm -r {file.parent}`; then a run without a checkpoint starts again" in refused(out, spoilt, config)
    shutil.rmtree(file.parent)
    assert train_run(out, spoilt, load_pipeline(config)), "as it says: from the start"


@pytest.mark.parametrize("name", ["optimizer", "trunk", "head"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_the_error_of_a_damaged_file_names_the_checkpoint_to_remove(
    out: Path, config: Path, spoilt: Path, name: str, damage: str
) -> None:
    newest = checkpoint_folders(spoilt)[-1]
    file = newest / f"{name}.safetensors"
    content = {"cut": file.read_bytes()[:100], "empty": b""}.get(damage)
    file.unlink() if content is None else file.write_bytes(content)
    assert f"fix: `rm -r {newest}`; then a run without a checkpoint starts again" in refused(out, spoilt, config)
    (spoilt / "checkpoints" / "samples-000000000016").mkdir()
    fix = f"fix: `rm -r {newest}`; then samples-000000000016, the checkpoint before it, is taken"
    assert fix in refused(out, spoilt, config)


@pytest.fixture
def size_limit() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def checkpoint_of(folder: Path, net: torch.nn.Module) -> None:
    with CheckpointWriter(folder, keep=1, keep_every=0) as writer:
        writer.save({"head": dict(net.state_dict())}, STATE)


def export_of(folder: Path, net: torch.nn.Module) -> None:
    with whole_folder(folder / "export") as partial:
        save_weights(net, partial / "model.safetensors")


@pytest.mark.parametrize("write", [checkpoint_of, export_of])
def test_weights_that_exceed_the_limit_of_file_sizes_leave_nothing(
    tmp_path: Path, size_limit: None, write: Callable[[Path, torch.nn.Module], None]
) -> None:
    with pytest.raises(UserError, match=r"cannot be written: File too large") as caught:
        write(tmp_path, torch.nn.Linear(300, 100))
    assert "fix: raise the limit (`ulimit -f`)" in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not checkpoint_folders(tmp_path)


def test_weights_of_another_model_are_an_error(out: Path, config: Path, spoilt: Path) -> None:
    folder = checkpoint_folders(spoilt)[-1]
    whole = (folder / "trunk.safetensors").read_bytes()
    trunk = load_file(folder / "trunk.safetensors")
    trunk["pos_embed"] = torch.zeros(1, 2, 24)
    save_file(trunk, folder / "trunk.safetensors")
    assert "other shape (1): pos_embed is [1, 2, 24], expected [1, 5, 24]" in refused(out, spoilt, config)
    (folder / "trunk.safetensors").write_bytes(whole)
    moments = load_file(folder / "optimizer.safetensors")
    moments["exp_avg.head.9.weight"] = moments.pop("exp_avg.head.1.weight")
    save_file(moments, folder / "optimizer.safetensors")
    text = refused(out, spoilt, config)
    misfit = "missing (1): exp_avg.head.1.weight; unexpected (1): exp_avg.head.9"
    assert f"optimizer.safetensors does not fit the architecture: {misfit}" in text
    (folder / "head.safetensors").unlink()
    assert "no weight file at" in refused(out, spoilt, config)
    assert "was begun with another configuration" in refused(out, spoilt, config, "train.model.image_size=32")


def test_a_key_that_an_older_configuration_lacks_has_its_default(out: Path, config: Path, spoilt: Path) -> None:
    """The files as a version without `grey_probability` and `ema_decay` would have written them."""
    file, folder = spoilt / "config.yaml", checkpoint_folders(spoilt)[-1]
    older = yaml.safe_load(file.read_text())
    del older["train"]["data"]["grey_probability"], older["train"]["optimizer"]["ema_decay"]
    file.write_text(yaml.safe_dump(older))
    kept = load_pipeline(config).train.model_dump(exclude=marked_keys(Train, MAY_CHANGE, MACHINE))
    del kept["data"]["grey_probability"], kept["optimizer"]["ema_decay"]
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"options": fingerprint(kept)}))
    changed = refused(out, spoilt, config, "train.data.grey_probability=0.5")
    assert "was begun with another configuration: train.data.grey_probability was 0.0, is now 0.5\n" in changed
    assert train_run(out, spoilt, load_pipeline(config)) and losses(spoilt)[-1][0] == 120
    shutil.rmtree(checkpoint_folders(spoilt)[-1])
    assert train_run(out, spoilt, load_pipeline(config)), "and again"


def test_damaged_lines_of_metrics_are_named_and_removed_on_resume(
    out: Path, config: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = spoilt / "metrics.jsonl"
    texts = file.read_bytes().split(b"\n")
    number = next(number for number, text in enumerate(texts, start=1) if b'"step": 10,' in text and b'"loss"' in text)
    texts[number - 1] = texts[number - 1].replace(b'"loss"', b'"lo\xff\xfe"')
    file.write_bytes(b"\n".join([*texts[:4], b"[]", *texts[4:]]))
    assert train_run(out, spoilt, load_pipeline(config))
    assert f"{file}: damaged lines are removed: 5, {number + 1}\n" in capsys.readouterr().out
    assert [step for step, *_ in losses(spoilt)] == [*range(1, 10), *range(11, 121)]


def test_a_configuration_that_was_changed_in_the_run_folder_is_an_error(out: Path, spoilt: Path) -> None:
    file = spoilt / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.004", "lr: 0.002"))
    text = refused(out, spoilt, file)
    assert f"{file} was changed since" in text and f"undo the change of {file}" in text
