"""The trainer as a user runs it: schedule, resume after kills, ranks, and mistakes it refuses."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from labels.config import load_pipeline
from labels.storage import UserError
from train.checkpoint import checkpoint_folders
from train.data.order import Order
from train.loop import STOPPED_EXIT_CODE
from train.trainer import train_run
from trainer_factory import SAMPLES, STEPS, assert_same_run, lines, losses, small_config, small_out
from trainer_process import free_port, start, train, wait_until


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def reference(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    code, said = train(*command(out, folder / "run", config), output=folder / "said")
    assert code == 0, said
    return folder / "run"


def command(out: Path, run: Path, config: Path, *overrides: str) -> list[object]:
    return [
        "run",
        "--beton",
        out,
        "--out",
        run,
        "--config",
        config,
        *(part for key in overrides for part in ("--set", key)),
    ]


def test_a_run_learns_and_writes_what_it_promises(reference: Path) -> None:
    found = losses(reference)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert np.mean([loss for _, loss, _ in found[-10:]]) < np.mean([loss for _, loss, _ in found[:10]]) - 0.2
    folders = checkpoint_folders(reference)
    assert [folder.name for folder in folders] == ["samples-000000001824", "samples-000000001920"]
    assert sorted(path.name for path in folders[-1].iterdir()) == [
        "head.safetensors",
        "optimizer.safetensors",
        "state.json",
        "trunk.safetensors",
    ]
    resolved = load_pipeline(reference / "config.yaml")
    assert (resolved.train.batch_size, resolved.train.optimizer.lr) == (16, 4e-3)
    throughput = [line for line in lines(reference) if "samples_per_s" in line][-1]
    assert (throughput["samples"], throughput["skipped_steps"], throughput["bad_images"]) == (1920, 0, 0)
    assert 0 <= throughput["data_wait"] <= 1
    assert throughput["memory_gib"] > 0.05 and "mfu" not in throughput, "a CPU's peak is not known"
    assert all(line["grad_norm"] > 0 for line in lines(reference) if "loss" in line)


def test_killed_at_twenty_random_moments_the_losses_are_the_same_floats(
    out: Path, config: Path, reference: Path, tmp_path: Path
) -> None:
    run, dice = tmp_path / "run", random.Random(0)
    for life in range(20):
        process = start(*command(out, run, config), output=tmp_path / "said")
        # Every life is let on a little further than the last one, so that the kills fall into steps, log lines and
        # checkpoints all along.
        wait_until(process, run, 1 + (STEPS - 10) * life // 20)
        time.sleep(dice.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
    code, said = train(*command(out, run, config), output=tmp_path / "last")
    assert code == 0, said
    assert "resumed at step" in said
    assert_same_run(reference, run)
    assert list((run / "checkpoints").glob("*.partial")) == []


def test_a_signal_saves_and_exits_with_its_own_code(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", 0
    rare = command(out, run, config, "train.checkpoint.every_samples=10M")
    for life, number in enumerate(
        [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM]
    ):
        said = tmp_path / f"said-{life}"
        process = start(*rare, output=said)
        wait_until(process, run, 1 + 18 * life)
        os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == STOPPED_EXIT_CODE, said.read_text()
        assert "stopped and saved; the same command resumes" in said.read_text()
        stopped_at = int(checkpoint_folders(run)[-1].name.removeprefix("samples-"))
        assert seen < stopped_at < 1920
        assert f"resumed at step {seen // 16}\n" in said.read_text() or life == 0
        seen = stopped_at
    assert train(*rare, output=tmp_path / "last")[0] == 0
    assert_same_run(reference, run)


@pytest.mark.parametrize(
    "spread",
    [["runtime.parallel=fsdp", "runtime.accumulation=2"], ["loss.split_vocabulary=true"]],
    ids=["fsdp in parts", "split head"],
)
def test_one_rank_then_two_then_one_see_every_sample_once_an_epoch(
    out: Path, config: Path, reference: Path, tmp_path: Path, spread: list[str]
) -> None:
    run, changed = tmp_path / "run", []
    for life, ranks in enumerate([1, 2, 1]):
        overrides = [] if ranks == 1 else [f"train.{key}" for key in spread]
        port, step = free_port(), [40, 80, STEPS][life]
        arguments = command(out, run, config, "train.checkpoint.every_samples=160", *overrides)
        parts = [(rank, ranks, port) if ranks > 1 else None for rank in range(ranks)]
        processes = [
            start(*arguments, output=tmp_path / f"said-{life}-{rank}", ranks=part) for rank, part in enumerate(parts)
        ]
        if step < STEPS:
            wait_until(processes[0], run, step)
            for process in processes:
                os.kill(process.pid or 0, signal.SIGTERM)
        for process in processes:
            process.join(60)
        assert {process.exitcode for process in processes} == {0 if step == STEPS else STOPPED_EXIT_CODE}
        changed.append((int(checkpoint_folders(run)[-1].name.removeprefix("samples-")) // 16, ranks))
    assert changed[0][0] >= 40 and changed[1][0] >= 80 and changed[2][0] == STEPS
    for (step, loss, lr), (other_step, other_loss, other_lr) in zip(losses(reference), losses(run), strict=True):
        assert (step, lr) == (other_step, other_lr)
        assert abs(loss - other_loss) <= 1e-5 * abs(loss)
    # What the loader was asked for in each part of the run: together, every sample of every whole epoch once.
    seen, first, by = [], 0, Order([SAMPLES], (1,), 64, 1024, 0)
    for last, ranks in changed:
        for step in range(first, last):
            seen += [by.batch(step, 16, rank, ranks)[0] for rank in range(ranks)]
        first = last
    order = np.concatenate(seen)
    for epoch in range(len(order) // SAMPLES):
        assert len(order) == STEPS * 16
        assert sorted(order[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


def test_under_torchrun_two_ranks_equal_one(out: Path, config: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
    ]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "train", *map(str, command(out, run, config))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    assert "ddp on 2 ranks: each sends" in result.stdout
    for (step, loss, lr), (other_step, other_loss, other_lr) in zip(losses(reference), losses(run), strict=True):
        assert (step, lr) == (other_step, other_lr)
        assert abs(loss - other_loss) <= 1e-5 * abs(loss)


def test_a_finished_run_is_reported_and_beton_alone_uses_the_configuration(
    out: Path, config: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.yaml").write_text(config.read_text() + f"paths: {{out: {out}, run: {reference}}}\n")
    monkeypatch.chdir(tmp_path)
    code, said = train("run", "--beton", "--config", tmp_path / "pipeline.yaml", output=tmp_path / "said")
    assert code == 0 and "is finished: 1,920 samples seen" in said
    code, said = train("run", "--beton", tmp_path, output=tmp_path / "wrong")
    assert code == 2
    assert said.startswith(f"error: {tmp_path} has no manifest.json") and "Traceback" not in said
    code, said = train("run", output=tmp_path / "none")
    assert code == 2 and "was given no betons" in said and "or --synthetic" in said


def refused(out: Path, run: Path, config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train_run(out, run, load_pipeline(config, overrides))
    return str(caught.value)


def test_another_configuration_or_other_labels_are_not_mixed_into_a_run(
    out: Path, config: Path, reference: Path, tmp_path: Path
) -> None:
    text = refused(out, reference, config, "train.optimizer.lr=5e-3")
    assert "was begun with another configuration: train.optimizer.lr was 0.004, is now 0.005\n" in text
    assert "config.yaml without --set and --recipe, or another --out" in text
    other = small_out(tmp_path)
    assert refused(other, reference, config, "train.optimizer.lr=5e-3") == text, (
        "the same labels made elsewhere are the same"
    )
    from beton_factory import build_out

    assert "was trained with other labels: fingerprint" in refused(
        build_out(tmp_path / "more", [30]), reference, config
    )


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["train.model.trunk_args.reg_tokens=4", "train.model.trunk_args.qk_norm=true"],
            ["model.trunk_args.reg_tokens was not set, is now 4", "model.trunk_args.qk_norm was not set, is now True"],
        ),
        (
            ["train.model.trunk_args={patch_size: 8, depth: 1, embed_dim: 24}"],
            ["model.trunk_args.num_heads was 2, is now not set"],
        ),
        (["train.data.mean=[0.5, 0.25, 0.125]"], ["data.mean was [0.48145466, 0.4578275, 0.40821073], is now [0.5,"]),
        (["train.data.color_jitter=[0.1, 0.2, 0.3, 0.4]"], ["data.color_jitter was [0.32, 0.32, 0.32, 0.08], is now"]),
        (["train.loss={name: bce, gamma_negative: 2.0}"], ["loss.name was 'softmax', is now 'bce'", "loss.gamma_neg"]),
    ],
)
def test_every_changed_key_is_named_and_no_other(
    out: Path, config: Path, reference: Path, overrides: list[str], named: list[str]
) -> None:
    problem = refused(out, reference, config, *overrides).splitlines()[0]
    for text in named:
        assert f"train.{text}" in problem
    assert problem.count(" was ") == len(named) + 1, problem


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["train.optimizer.lr=1e30"],
            "the last 9 steps were skipped at step 10 of 10; no checkpoint of it was written",
        ),
        (["train.optimizer.lr=1e30", "train.samples=48"], "the last 2 steps were skipped at step 3 of 3"),
        (["train.optimizer.lr=1e300", "train.samples=16"], "weights or moments are not finite at step 1 of 1"),
        (["train.optimizer.lr=1e300", "train.checkpoint.every_samples=16"], "are not finite at step 1 of 10"),
        (["train.optimizer.lr=1e30", "train.optimizer.ema_decay=0.5"], "the last 9 steps were skipped"),
    ],
)
def test_a_run_that_ends_in_infinities_fails_and_leaves_no_checkpoint_of_them(
    out: Path, config: Path, tmp_path: Path, overrides: list[str], problem: str
) -> None:
    few = ["train.samples=160", "train.optimizer.warmup_samples=0", "train.checkpoint.every_samples=48"]
    text = refused(out, tmp_path / "run", config, *few, *overrides)
    assert problem in text and "fix: lower train.optimizer.lr" in text and "with another --out" in text
    assert checkpoint_folders(tmp_path / "run") == []


def test_steps_that_are_not_finite_end_the_run_and_leave_the_last_good_checkpoint(
    out: Path, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = ["train.optimizer.lr=1e30", "train.optimizer.warmup_samples=0", "train.runtime.max_skipped_steps=12"]
    text = refused(out, run, config, *overrides)
    assert "were skipped: their loss or gradient is not finite" in text
    assert "fewer than train.runtime.max_skipped_steps = 12 in a row" in text
    assert "lower train.optimizer.lr" in text
    assert checkpoint_folders(run) == []
    found = [line for line in lines(run) if "loss" in line]
    assert len(found) >= 13
    assert all(line["loss"] is None and line["skipped"] for line in found[-12:])


def test_shares_that_do_not_come_out_even_are_refused(
    out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.trainer
    from train.distributed import World

    class Pretended:
        def __enter__(self) -> World:
            return World(0, 3, torch.device("cpu"))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(train.trainer, "distributed_world", lambda _: Pretended())
    text = refused(out, tmp_path / "run", config, "train.runtime.accumulation=2")
    assert "train.batch_size is 16, the number of ranks 3, train.runtime.accumulation 2" in text
    assert "a multiple of 6" in text


def test_cuda_that_is_not_there(out: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in refused(out, tmp_path / "a", config, "train.runtime.device=cuda")


def test_synthetic_runs_need_no_data_and_leave_no_checkpoint(config: Path, tmp_path: Path) -> None:
    arguments = ["run", "--synthetic", "--out", tmp_path / "run", "--config", config, "--set", "train.samples=160"]
    code, said = train(*arguments, output=tmp_path / "said")
    assert code == 0, said
    assert "random images, 49,408 classes" in said and "data wait 0." in said
    found = losses(tmp_path / "run" / "synthetic")
    assert len(found) == 10 and found[-1][1] < found[0][1], "the same batch each time is learnt by heart"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_training_needs_no_package_for_text(out: Path, config: Path, tmp_path: Path) -> None:
    """A training node needs neither these packages nor those that only some options need."""
    absent = ["duckdb", "ftfy", "tokenizers", "regex", "fsspec", "upath", "rich", "psutil", "tensorboard", "open_clip"]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); from train.cli import main; main()"
    )
    words = map(str, command(out, tmp_path / "run", config, "train.samples=320", "train.model.image_size=8"))
    ended = subprocess.run([sys.executable, "-c", code, ",".join(absent), *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(losses(tmp_path / "run")) == 20
