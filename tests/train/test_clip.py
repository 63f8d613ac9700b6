"""`train clip`: open_clip's loss over all ranks, captions joined by row position, runs as exact as `train run`'s."""

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file

from labels.arrays import rows_folder
from labels.config import load_pipeline
from labels.manifest import TokenizerPart, read_manifest
from labels.settings import Runtime, TextTower, Train
from labels.storage import UserError
from loader_batches import batches, order_of
from loop_factory import BATCH, settings
from train.checkpoint import checkpoint_folders, snapshot
from train.clip import make_two_tower_state, train_clip
from train.data.dataset import BetonSet
from train.data.open import Chosen, make_rows
from train.distributed import World, distributed_world
from train.encoders.load import load_encoder
from train.loop import Budget, run_loop
from train.losses.contrastive import contrastive_loss
from train.metrics import Metrics, Speed
from train.model import build_trunk
from train.optim import by_decay
from train.text_tower import Contrastive, Specials, build_text_tower, framed, is_pair, specials_of
from train.trainer import train_run
from trainer_factory import assert_same_run, lines, losses, small_config, small_out
from trainer_process import assert_ranks_succeed, train, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")
TOWER = TextTower(embed_dim=8, width=16, heads=2, layers=1, context=8)
TEXT = ["--set", "text_tower={embed_dim: 8, width: 16, heads: 2, layers: 1, context: 8}"]
ALONE = World(0, 1, torch.device("cpu"))
STEPS = 120


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_out(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("config"))


def command(out: Path, run: Path, config: Path) -> list[object]:
    return ["clip", "--beton", out, "--out", run, "--config", config, *TEXT]


@pytest.fixture(scope="module")
def reference(out: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    code, said = train(*command(out, folder / "run", config), output=folder / "said")
    assert code == 0, said
    assert "+ text tower 0.0M parameters" in said
    return folder / "run"


# -- the loss


def pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return tuple(torch.nn.functional.normalize(torch.randn(count, 6, generator=dice), dim=1) for _ in range(2))  # type: ignore[return-value]


def test_the_loss_and_its_gradients_are_open_clips() -> None:
    images, texts = (tensor.requires_grad_() for tensor in pairs(7))
    scale = torch.tensor(14.0, requires_grad=True)
    ours = contrastive_loss(images, texts, torch.ones(7, dtype=torch.bool), scale, None)
    theirs = ClipLoss()(images, texts, scale)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss, (images, texts, scale)) for loss in (ours, theirs)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_is_no_pair_is_nobodys_negative_and_a_batch_without_pairs_has_loss_0() -> None:
    images, texts = (tensor.requires_grad_() for tensor in pairs(7))
    valid = torch.tensor([True, False, True, True, False, True, True])
    ours = contrastive_loss(images, texts, valid, torch.tensor(9.0), None)
    assert torch.allclose(ours, ClipLoss()(images[valid], texts[valid], torch.tensor(9.0)), atol=1e-6)
    (gradient,) = torch.autograd.grad(ours, images)
    assert gradient.isfinite().all() and not gradient[~valid].any() and gradient[valid].any(1).all()
    none = contrastive_loss(images, texts, torch.zeros(7, dtype=torch.bool), torch.tensor(9.0), None)
    (gradient,) = torch.autograd.grad(none, images)
    assert none == 0 and not gradient.any()


# -- captions as the tower takes them


def test_frames_are_open_clips_tokens() -> None:
    texts = ["a red bird", "", "the cat " * 60]
    wanted = open_clip.get_tokenizer("ViT-B-32")(texts)
    part = TokenizerPart(name="clip", fingerprint="", path="fast", vocabulary=49_408 + 5, excluded=[49_406, 49_407])
    specials = specials_of(part)
    rows = torch.full((3, 75), -1, dtype=torch.int32)
    for row, found in zip(rows, wanted, strict=True):
        plain = found[(found != 0) & (found != 49_406) & (found != 49_407)]
        row[: len(plain)] = plain
    assert torch.equal(framed(rows, specials, 77), wanted) and specials.vocabulary == 49_408
    longer = torch.cat([rows, rows], dim=1)[2:]
    assert torch.equal(framed(longer, specials, 77), wanted[2:]), "cut, with its end token"


def test_other_tokenizers_have_two_ids_of_their_own() -> None:
    part = TokenizerPart(name="tokenizer.json", fingerprint="", path="fast", vocabulary=15, excluded=[0])
    specials = specials_of(part)
    rows = framed(torch.tensor([[3, 14, -1, -1], [-1, -1, -1, -1]]), specials, 6)
    assert rows.tolist() == [[15, 3, 14, 16, 0, 0], [15, 16, 0, 0, 0, 0]] and specials.vocabulary == 17
    assert is_pair(torch.cat([rows, torch.zeros(1, 6)]), specials).tolist() == [True, True, False]


def test_captions_are_joined_by_row_position(out: Path) -> None:
    list(make_rows(out, out, "token_ids"))
    table = pq.read_table(sorted((out / "labels").glob("*.parquet")), columns=["token_ids", "label_ids"])
    tokens, labels = table["token_ids"].to_pylist(), table["label_ids"].to_pylist()
    by_tokens, by_labels = BetonSet(out, column="token_ids"), BetonSet(out)
    order = order_of(by_labels)
    assert any(row != sorted(set(row)) for row in tokens), "order and repetition are what tells the columns apart"
    for betons, rows in ((by_tokens, tokens), (by_labels, labels)):
        found = [[number for number in row if number >= 0] for _, ids in batches(betons) for row in ids.tolist()]
        assert found == [rows[index] for index in order[: len(found)]]


# -- ranks


class _Made:
    """A batch of images and framed captions."""

    bad = 0

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.images, self.texts = images, texts


def _trained(run: Path, train: Train, world: World, *, locked: bool = False) -> dict[str, torch.Tensor]:
    specials = Specials(29, 30, 31)
    torch.manual_seed(0)
    trunk = build_trunk(train.model)
    model = Contrastive(trunk, 24, build_text_tower(TOWER, specials.vocabulary), specials, locked=locked)
    train_state = make_two_tower_state(model, train, world)
    share = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    made = []
    for step in range(4):
        dice = np.random.default_rng(step)
        images = torch.from_numpy(dice.standard_normal((BATCH, 3, 16, 16), np.float32))
        texts = framed(torch.from_numpy(dice.integers(0, 29, (BATCH, 5))), specials, TOWER.context)
        texts[3] = 0  # no pair
        made.append(_Made(images[share], texts[share]))
    run.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(run, world, train, steps=4, first_step=0, skipped=(0, 0), speed=Speed(1, 1e3), trackers=[])
    run_loop(
        made,
        lambda batch: (batch.images, batch.texts),
        train_state,
        train,
        Budget(4, 1, 0),
        world,
        metrics,
        lambda _: metrics.flush(),
        lambda: False,
    )
    metrics.close()
    tensors = snapshot(train_state, world.is_first)
    return {f"{file}.{key}": tensor for file, named in tensors.items() for key, tensor in named.items()}


CASES = {f"{way}-{locked}": (way, locked) for way in ("ddp", "fsdp") for locked in (False, True)}


def _as_rank(rank: int, folder: Path) -> None:
    with distributed_world(Runtime(device="cpu", threads=1)) as world:
        for name, (way, locked) in CASES.items():
            tensors = _trained(folder / name, settings(f"runtime.parallel={way}"), world, locked=locked)
            if rank == 0:
                save_file(tensors, folder / name / "all.safetensors")


def test_two_ranks_compare_with_the_whole_batch(tmp_path: Path) -> None:
    assert_ranks_succeed(_as_rank, tmp_path, ranks=2)
    for name, (_, locked) in CASES.items():
        alone = _trained(tmp_path / f"one-{name}", settings(), ALONE, locked=locked)
        found = load_file(tmp_path / name / "all.safetensors")
        for (_, one, _), (_, other, _) in zip(losses(tmp_path / f"one-{name}"), losses(tmp_path / name), strict=True):
            assert abs(one - other) < 1e-5, name
        assert found.keys() == alone.keys()
        for key, tensor in alone.items():
            assert torch.allclose(tensor, found[key], atol=2e-5), (name, key)


# -- the run


def test_a_clip_run_learns_and_keeps_the_trunk_by_timms_keys(reference: Path, out: Path) -> None:
    found = losses(reference)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert np.mean([loss for _, loss, _ in found[-10:]]) < np.mean([loss for _, loss, _ in found[:10]]) - 0.2
    folder = checkpoint_folders(reference)[-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "joint.safetensors",
        "optimizer.safetensors",
        "state.json",
        "text.safetensors",
        "trunk.safetensors",
    ]
    config = load_pipeline(reference / "config.yaml")
    assert load_file(folder / "trunk.safetensors").keys() == build_trunk(config.train.model).state_dict().keys()
    assert load_encoder(f"run:{reference}").width == 24
    assert (config.text_tower.embed_dim, config.text_tower.context) == (8, 8)
    assert load_file(folder / "text.safetensors")["token_embedding.weight"].shape == (17, 16)
    assert len(list(rows_folder(out).glob("*.tokens.npy"))) == len(read_manifest(out).shards)
    assert [line for line in lines(reference) if "samples_per_s" in line][-1]["bad_images"] == 0


def test_both_towers_have_a_moving_average(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    folder = checkpoint_folders(tmp_path / "run")[-1]
    for part in ("trunk", "text", "joint"):
        halved = {key: tensor / 2 for key, tensor in load_file(folder / f"{part}.safetensors").items()}
        save_file(halved, folder / f"{part}_ema.safetensors")
    own, average = (load_encoder(f"{kind}:{tmp_path / 'run'}") for kind in ("run", "ema"))
    assert own.text is not None and average.text is not None
    assert own.describe()["text_tower"] != average.describe()["text_tower"]
    for one, other in zip(own.text().modules, average.text().modules, strict=True):
        halves = {key: tensor / 2 for key, tensor in one.state_dict().items()}
        assert all(torch.equal(halves[key], tensor) for key, tensor in other.state_dict().items())


def test_killed_at_random_moments_the_losses_are_the_same_floats(
    out: Path, config: Path, reference: Path, tmp_path: Path
) -> None:
    from trainer_process import start

    run, dice = tmp_path / "run", random.Random(0)
    for life in range(3):
        process = start(*command(out, run, config), output=tmp_path / "said")
        wait_until(process, run, 1 + (STEPS - 20) * life // 3)
        time.sleep(dice.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
    code, said = train(*command(out, run, config), output=tmp_path / "last")
    assert code == 0 and "resumed at step" in said, said
    assert_same_run(reference, run)


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_methods_are_not_mixed(out: Path, config: Path, reference: Path) -> None:
    pipeline = load_pipeline(config, TEXT[1:])
    chosen = Chosen([str(out)])
    assert "holds a run of the method clip, not of `train run`" in refused(train_run, chosen, reference, pipeline)
    wider = load_pipeline(config, ["text_tower={embed_dim: 8, width: 32, heads: 2, layers: 1, context: 8}"])
    text = refused(train_clip, chosen, reference, wider)
    assert (
        "was begun with another configuration" in text
        and "text_tower.width was 16, is now 32" in text
        and "take --config" in text
    )


def test_parts_of_a_batch_are_refused(out: Path, config: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(config, [TEXT[1], "train.runtime.accumulation=2"])
    text = refused(train_clip, Chosen([str(out)]), tmp_path / "run", pipeline)
    assert "compares every image with all captions of its batch" in text and "train.runtime.accumulation 2" in text
    assert "grad_checkpointing" in text


def test_the_scale_is_never_above_100() -> None:
    """After a step of what the run trains with, from where the step alone would lead above it."""
    model = Contrastive(torch.nn.Flatten(), 12, build_text_tower(TOWER, 31), Specials(29, 30, 31), locked=True)
    assert model.joint.log_scale.item() == pytest.approx(np.log(1 / 0.07))
    train_state = make_two_tower_state(model, settings(), ALONE)
    model.joint.log_scale.data.fill_(np.log(100))
    model.joint.log_scale.grad = torch.tensor([-1.0])
    train_state.optimizer.param_groups[-1]["lr"] = 0.5
    train_state.optimizer.step()
    assert model.joint.log_scale.exp().item() == pytest.approx(100)


def test_what_weight_decay_spares_is_open_clips() -> None:
    """open_clip: single vectors, norms, biases and the scale; embeddings and projections are decayed."""
    model = Contrastive(
        build_trunk(settings().model), 24, build_text_tower(TOWER, 31), Specials(29, 30, 31), locked=False
    )
    decayed, exempt = by_decay(model)
    assert "joint.log_scale" in exempt and "trunk.cls_token" in exempt and "text.ln_final.weight" in exempt
    assert {
        "joint.projection.weight",
        "text.token_embedding.weight",
        "text.positional_embedding",
        "text.text_projection",
    } <= decayed.keys()
    for name, parameter in model.text.named_parameters():
        assert (f"text.{name}" in exempt) == (parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name), (
            name
        )


def test_a_locked_trunk_has_neither_dropout_nor_gradients() -> None:
    trunk = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(12, 6), torch.nn.BatchNorm1d(6)
    )
    model = Contrastive(trunk, 6, build_text_tower(TOWER, 31), Specials(29, 30, 31), locked=True).train()
    images, texts = torch.randn(4, 3, 2, 2), framed(torch.randint(0, 29, (4, 5)), Specials(29, 30, 31), TOWER.context)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    first, second = model(images, texts), model(images, texts)
    assert torch.equal(first, second) and model.text.training and not any(module.training for module in trunk.modules())
    first.backward()
    assert (
        all(parameter.grad is None for parameter in trunk.parameters())
        and model.joint.projection.weight.grad is not None
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.state_dict().items())
    open_trunk = Contrastive(trunk, 6, build_text_tower(TOWER, 31), Specials(29, 30, 31), locked=False).train()
    open_trunk(images, texts).backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters()) and trunk[1].training


def test_heads_that_do_not_divide_the_width() -> None:
    assert "width is 16, heads 3; allowed: a divisor of width" in refused(
        load_pipeline, None, ["text_tower={width: 16, heads: 3}"]
    )
