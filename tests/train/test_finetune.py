"""Fine-tuning: rates layer by layer, drop path, mixing, resume, what it learns, and what it refuses."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from timm.layers.drop import DropPath
from torch import nn

from image_folders import encoded, write_folders
from labels.settings import Features, Optimizer, Runtime
from labels.storage import UserError
from run_factory import VIT, write_hf, write_run
from train.cli import cli
from train.distributed import World
from train.encoders.encoder import EncoderSpec, ImageForm
from train.encoders.load import load_encoder
from train.evals.data.sets import DataSet, load_data
from train.evals.features import Extractor
from train.evals.kinds import finetune
from train.evals.kinds.finetune import (
    FineTune,
    Finetune,
    FineTuned,
    LabelledBatch,
    Mixing,
    batch_size,
    cropped_batches,
    layers,
    make_layer_decayed,
    set_drop_path,
    train_settings,
    train_what_is_read,
)
from train.loop import Stopped
from trainer_process import train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HERE = World(0, 1, CPU)
QUICK = Finetune(epochs=6, batch_size=8, base_lr=0.1, warmup_epochs=1, drop_path=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue images, a run's checkpoint."""
    folder = tmp_path_factory.mktemp("finetune")
    random = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 4)):
        write_folders(folder / "data" / part, {"blue": count, "red": count})
        for file in sorted((folder / "data" / part).rglob("*.png")):
            shade = random.integers(0, 120, 3) + 120 * np.array(
                [file.parent.name == colour for colour in ("red", "none", "blue")]
            )
            file.write_bytes(encoded(tuple(int(value) for value in shade)))
    write_run(folder / "run", 3)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    return load_data(f"folders:{folder}/data")


def extractor(cache: Path | None = None) -> Extractor:
    return Extractor(CPU, Features(batch_size=4, threads=2), cache)


def rates(trunk: nn.Module, side: int, decay: float = 0.5) -> dict[str, float]:
    """The factor on the rate of every trained parameter."""
    with torch.inference_mode():
        width = trunk(torch.zeros(1, 3, side, side)).shape[1]
    model = FineTuned(trunk, width, 3)
    train_what_is_read(model, side)
    optimizer = make_layer_decayed(decay)(model, Optimizer(weight_decay=0.05))
    name = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name[id(one)]: group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
    undecayed = {
        name[id(one)] for group in optimizer.param_groups for one in group["params"] if group["weight_decay"] == 0
    }
    for key, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(word in key for word in ("pos_embed", "position_embeddings", "cls_token"))
        assert not parameter.requires_grad or exempt == (key in undecayed), key
    return found


def mae_layer(name: str, depth: int) -> int:
    """util/lr_decay.py of MAE: what a parameter of its ViT belongs to."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def test_rates_of_maes_vit_are_maes() -> None:
    """MAE's own fine-tuning model pools by the mean and has its norm behind the pool."""
    net = timm.create_model(
        "vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=32, global_pool="avg", num_classes=0
    )
    found = rates(net, 32)
    assert found["head.weight"] == found["trunk.fc_norm.weight"] == 1
    for name, factor in found.items():
        if name.startswith("trunk."):
            assert factor == 0.5 ** (4 - mae_layer(name.removeprefix("trunk."), 3)), name


def test_rates_of_nets_that_do_not_group_themselves(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VIT))
    encoder = load_encoder(f"hf:{write_hf(tmp_path / 'dino', model)}")
    found = rates(encoder.net, 32)
    assert (
        found["trunk.net.embeddings.cls_token"] == 0.5**3
        and found["trunk.net.layernorm.weight"] == found["head.bias"] == 1
    )
    assert {value for name, value in found.items() if "layer.0." in name} == {0.5**2}
    assert {value for name, value in found.items() if "layer.1." in name} == {0.5}


def test_a_projection_that_open_clip_lists_first_is_no_stem() -> None:
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    tower = open_clip.CLIP(12, vision, text).visual  # type: ignore[arg-type]
    numbers = layers(tower)
    assert numbers["proj"] == numbers["ln_post.weight"] == 3 == max(numbers.values())
    assert numbers["class_embedding"] == numbers["conv1.weight"] == numbers["ln_pre.weight"] == 0
    assert numbers["transformer.resblocks.1.ln_1.weight"] == 2


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_the_last_block_that_is_read_is_next_to_the_head(tmp_path: Path, kind: str) -> None:
    """Rates and drop path as of a net that ends there."""
    if kind == "timm":
        file = tmp_path / "v.safetensors"
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
        requested, block = EncoderSpec("timm:test_vit", str(file)), "trunk.net.blocks"
    else:
        folder = write_hf(tmp_path / "dino", transformers.Dinov2Model(transformers.Dinov2Config(**VIT)))
        requested, block = EncoderSpec(f"hf:{folder}"), "trunk.net.encoder.layer"
    encoder = load_encoder(requested._replace(layer=-2))
    found = rates(encoder.net, encoder.images.side)
    depth = int(str(encoder.describe()["layer"]).partition(" of ")[0])
    numbers = {name: int(name.removeprefix(f"{block}.").partition(".")[0]) for name in found if name.startswith(block)}
    assert max(numbers.values()) == depth - 1
    assert all(found[name] == 0.5 ** (depth - number) for name, number in numbers.items())
    if kind == "timm":
        set_drop_path(encoder.net, 0.3)
        dropped = {name: one.drop_prob for name, one in encoder.net.named_modules() if isinstance(one, DropPath)}
        last = {rate for name, rate in dropped.items() if f"blocks.{depth - 1}." in name}
        assert depth == 1 or last == {0.3}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_drop_path_is_timms(name: str) -> None:
    def dropped(net: nn.Module) -> dict[str, float]:
        return {key: round(module.drop_prob, 6) for key, module in net.named_modules() if isinstance(module, DropPath)}

    plain, expected = timm.create_model(name), timm.create_model(name, drop_path_rate=0.3)
    took = set_drop_path(plain, 0.3)
    if (
        name == "test_efficientnet"
    ):  # counts blocks that have no residual branch, too: places are the same, not the rates
        assert took == 0.3 and dropped(plain)
        return
    assert dropped(plain) == dropped(expected) and took == 0.3 and len(dropped(plain)) >= 1
    assert set_drop_path(nn.Linear(2, 2), 0.3) == 0.0


def test_what_nothing_reads_is_not_trained(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "v.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    encoder = load_encoder(EncoderSpec("timm:test_vit", str(file), layer=1, pool="cls"))
    model = FineTuned(encoder.net, encoder.width, 2)
    train_what_is_read(model, encoder.images.side)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        "trunk.net.blocks.0.attn.qkv.weight" in trained
        and "trunk.net.norm.weight" in trained
        and "head.bias" in trained
    )
    assert not any(name.startswith("trunk.net.blocks.1.") for name in trained)


def batch(numbers: list[int], classes: list[int]) -> LabelledBatch:
    images = torch.randint(
        0, 256, (len(numbers), 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return LabelledBatch(images, torch.tensor(classes), np.array(numbers))


def test_mixing_is_a_function_of_seed_and_batch() -> None:
    form = ImageForm(8, (0.5,) * 3, (0.25,) * 3)
    mixing = Mixing(QUICK, 3, form, 0, CPU)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    one, again, other = (mixing(batch(numbers, [0, 1, 2, 2])) for numbers in ([7, 1, 2, 3], [7, 1, 2, 3], [8, 1, 2, 3]))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[arg-type]
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1]) and not torch.equal(one[0], other[0])
    assert torch.allclose(one[1].sum(1), torch.ones(4))
    kinds = set()
    for number in range(40):  # both kinds come, and the targets have the shares of the pixels
        source = batch([number, 0, 0, 0], [0, 1, 2, 2])
        images, targets = mixing(source)
        plain = (source.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        share = float((targets[0, 0] - 0.1 / 3) / 0.9)
        cut = bool(((images[0] == plain[0]) | (images[0] == plain[3])).all())
        kinds.add(cut)
        if cut:
            left = (images[0] == plain[0]).all(0) & ~(plain[0] == plain[3]).all(0)
            assert float(left.float().mean()) == pytest.approx(share, abs=1e-5)
        else:
            assert torch.allclose(images[0], plain[0] * share + plain[3] * (1 - share), atol=1e-4)
    assert kinds == {True, False}


def test_without_mixing_labels_are_smoothed_alone() -> None:
    settings = QUICK.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    source = batch([0, 1, 2], [0, 2, 1])
    images, targets = Mixing(settings, 4, ImageForm(8, (0.0,) * 3, (1.0,) * 3), 0, CPU)(source)
    assert torch.allclose(images, source.images.permute(0, 3, 1, 2) / 255)
    smooth = nn.functional.cross_entropy(torch.tensor([[1.0, -2, 0.5, 3]] * 3), source.classes, label_smoothing=0.1)
    ours = -(targets * torch.tensor([[1.0, -2, 0.5, 3]] * 3).log_softmax(1)).sum(1).mean()
    assert torch.allclose(smooth, ours)


def test_every_image_once_an_epoch_and_ranks_share_batches(data: DataSet) -> None:
    def numbers(world: World, first: int = 0) -> np.ndarray:
        made = [one.numbers.copy() for one in cropped_batches(data.train, 8, 6, 3, 2, world, first, 6)]
        return np.stack(made)

    alone = numbers(HERE)
    assert (
        sorted(alone.ravel()[:18] % 18) == list(range(18))
        and (np.sort(alone.ravel() // 18) == alone.ravel() // 18).all()
    )
    assert np.array_equal(numbers(HERE, 4), alone[4:])
    assert np.array_equal(np.concatenate([numbers(World(rank, 2, CPU)) for rank in (0, 1)], axis=1), alone)
    first = next(iter(cropped_batches(data.train, 8, 6, 3, 2, HERE, 0, 6)))
    assert first.classes.tolist() == data.train.targets[alone[0] % 18].tolist()


def test_budget_and_batch() -> None:
    settings = Finetune()
    train = train_settings(settings, Runtime(device="cpu"), 1_281_167, HERE)
    assert train.batch_size == 1024 and train.optimizer.lr == 4e-3 and train.samples == 50 * 1_281_167 // 1024 * 1024
    assert train.optimizer.warmup_samples == 5 * 1_281_167
    assert (
        batch_size(101, settings, ranks=1) == 100
        and batch_size(101, settings.model_copy(update={"accumulation": 4}), ranks=2) == 96
    )
    with pytest.raises(UserError, match=r"training part has 3 images[\s\S]*finetune\.accumulation=1"):
        batch_size(3, settings.model_copy(update={"accumulation": 4}), ranks=1)


def test_it_learns_and_the_same_seed_gives_the_same(folder: Path, data: DataSet) -> None:
    encoder = load_encoder(f"run:{folder}/run")
    before = encoder.describe()["weights"]
    one, other = (FineTune().scores(encoder, data, QUICK, extractor(), [seed])[0] for seed in (0, 1))
    again = FineTune().scores(encoder, data, QUICK, extractor(), [0])[0]
    assert one.metrics["top1"] == 1.0 and one.metrics["top5"] is None and other.metrics["top1"] is not None
    assert one == again and one.detail["batch_size"] == 8 and one.detail["steps"] == 6 * 18 // 8
    assert load_encoder(f"run:{folder}/run").describe()["weights"] == before and not any(
        p.requires_grad for p in encoder.net.parameters()
    )


def weights(cache: Path) -> dict[str, torch.Tensor]:
    [checkpoint] = (cache / "finetune").glob("*/checkpoints/samples-*")
    return {
        name: tensor
        for part in ("trunk", "head")
        for name, tensor in load_file(checkpoint / f"{part}.safetensors").items()
    }


def test_a_stopped_run_resumes_to_the_same_weights(folder: Path, data: DataSet, tmp_path: Path, monkeypatch) -> None:
    encoder = load_encoder(f"run:{folder}/run")
    whole = FineTune().scores(encoder, data, QUICK, extractor(tmp_path / "whole"), [0])
    real = finetune.train_model

    def stopped_after_five(*arguments: Any) -> bool:
        steps = iter(range(5))
        return real(*arguments[:7], lambda: next(steps, None) is None, *arguments[8:])

    monkeypatch.setattr(finetune, "train_model", stopped_after_five)
    with pytest.raises(Stopped):
        FineTune().scores(encoder, data, QUICK, extractor(tmp_path / "cut"), [0])
    monkeypatch.setattr(finetune, "train_model", real)
    assert FineTune().scores(encoder, data, QUICK, extractor(tmp_path / "cut"), [0]) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_is_the_same_step(folder: Path, data: DataSet, tmp_path: Path) -> None:
    """Without mixing, whose partners change with the part."""
    found = []
    for parts in (1, 2):
        settings = Finetune(
            epochs=2, batch_size=8, warmup_epochs=1, mixup=0.0, cutmix=0.0, drop_path=0.0, accumulation=parts
        )
        FineTune().scores(load_encoder(f"run:{folder}/run"), data, settings, extractor(tmp_path / str(parts)), [0])
        found.append(weights(tmp_path / str(parts)))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-4) for name in found[0])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.json"
    options = [
        "--set",
        "finetune.epochs=2",
        "--set",
        "finetune.warmup_epochs=1",
        "--set",
        "finetune.batch_size=8",
        "--set",
        "features.threads=2",
    ]
    where = ["--data", f"folders:{folder}/data", "--out", str(out)]
    said = CliRunner().invoke(
        cli, ["finetune", *where, "--encoder", f"run:{folder}/run", *options], catch_exceptions=False
    )
    assert said.exit_code == 0, said.output
    found = json.loads(out.read_text())
    assert "layer decay 0.75" in found["protocol"] and found["settings"]["cutmix"] == 1.0
    assert [row["variant"] for row in found["results"]] == ["majority class", "fine-tuned"]
    assert found["results"][1]["seeds"][0]["drop_path"] == 0.2 and list(
        (tmp_path / "f.work" / "finetune").glob("*/checkpoints/*")
    )
    with pytest.raises(
        UserError,
        match=r"finetune cannot evaluate the encoder 'pixels:4': it has no weights to train; give run:",
    ):
        CliRunner().invoke(cli, ["finetune", *where, "--encoder", "pixels:4"], catch_exceptions=False)


def test_a_bad_image_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "3.png").write_bytes(b"no image")
    with pytest.raises(
        UserError,
        match=r"of the training part cannot be decoded: .*/train/red/3\.png \(Unidentified[\s\S]*fix or remove it",
    ):
        FineTune().scores(
            load_encoder(f"run:{folder}/run"), load_data(f"folders:{tmp_path}/data"), QUICK, extractor(), [0]
        )


def test_two_ranks_are_one(folder: Path, tmp_path: Path) -> None:
    """Two encoders use the process group, one after the other; no mixing, whose partners change with a rank's share."""
    keys = ["epochs=2", "warmup_epochs=1", "batch_size=8", "mixup=0", "cutmix=0", "drop_path=0"]
    losses = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        options = [option for key in keys for option in ("--set", f"finetune.{key}")]
        encoders = ["--encoder", f"run:{folder}/run", "--encoder", f"untrained:{folder}/run"]
        code, said = train(
            "finetune",
            "--data",
            f"folders:{folder}/data",
            *encoders,
            "--out",
            out,
            *options,
            output=tmp_path / "said",
            ranks=ranks,
        )
        assert code == 0, said
        assert [row["encoder"] for row in json.loads(out.read_text())["results"][1:]] == encoders[1::2]
        files = sorted((tmp_path / f"{ranks}.work").rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        losses.append(
            [json.loads(line)["loss"] for file in files for line in file.read_text().splitlines() if '"loss"' in line]
        )
    assert len(losses[0]) == 2 * (2 * 18 // 8) and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_another_encoders_state_is_not_resumed(folder: Path, data: DataSet, tmp_path: Path) -> None:
    """Whatever decides the result decides the folder."""
    for settings in (QUICK, QUICK.model_copy(update={"layer_decay": 0.9})):
        FineTune().scores(
            load_encoder(f"run:{folder}/run"), data, settings.model_copy(update={"epochs": 2}), extractor(tmp_path), [0]
        )
    assert len(list((tmp_path / "finetune").iterdir())) == 2


def test_other_images_of_the_same_size_are_other_data(folder: Path, tmp_path: Path) -> None:
    """The fingerprint has names and sizes alone: what was trained before an image changed is not taken for the new
    data's.
    """
    shutil.copytree(folder / "data", tmp_path / "data")
    settings, image = QUICK.model_copy(update={"epochs": 2}), tmp_path / "data" / "train" / "red" / "3.png"
    for when in (1_000_000_000, 2_000_000_000):
        os.utime(image, (4 * when, 4 * when))
        found = load_data(f"folders:{tmp_path}/data")
        FineTune().scores(load_encoder(f"run:{folder}/run"), found, settings, extractor(tmp_path / "cache"), [0])
    assert len(list((tmp_path / "cache" / "finetune").iterdir())) == 2
