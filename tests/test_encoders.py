"""Encoders by name, and the features they give: the right weights, the right images, errors that name the fault."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_eval_data import encoded, write_folders

from labels.config import dump_yaml
from labels.errors import UserError
from labels.settings import Model, Pipeline, Train
from train.evals import features
from train.evals.datasets import LabelledImages, load_labelled
from train.evals.encoders import load_encoder
from train.evals.features import extract
from train.model import build_trunk

CPU = torch.device("cpu")
MODEL = Model(trunk="vit_tiny_patch16_224", trunk_args={"depth": 1, "embed_dim": 24, "num_heads": 2}, image_size=32)


def write_run(run: Path, *samples_seen: int) -> dict[int, torch.nn.Module]:
    """A run folder with one checkpoint a number, all of different weights."""
    run.mkdir()
    dump_yaml(run / "config.yaml", Pipeline(train=Train(model=MODEL)))
    trunks = {}
    for number in samples_seen:
        folder = run / "checkpoints" / f"samples-{number:012d}"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        trunks[number] = build_trunk(MODEL).eval()
        save_file(trunks[number].state_dict(), folder / "trunk.safetensors")
    return trunks


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(*arguments, **options)
    return str(caught.value)


def test_a_run_is_its_newest_finished_checkpoint(tmp_path: Path) -> None:
    trunks = write_run(tmp_path / "run", 9, 1000)
    (tmp_path / "run" / "checkpoints" / "samples-000000005000.partial").mkdir()
    images = torch.randn(2, 3, 32, 32)
    for spec, number in (
        (f"run:{tmp_path}/run", 1000),
        (f"{tmp_path}/run", 1000),
        (f"run:{tmp_path}/run/checkpoints/samples-000000000009", 9),
    ):
        encoder = load_encoder(spec)
        assert torch.equal(encoder(images), trunks[number](images)), spec
        assert encoder.describe()["checkpoint"] == f"samples-{number:012d}"
    assert encoder.describe() | {"weights": ""} == {
        "architecture": "vit_tiny_patch16_224",
        "architecture_args": MODEL.trunk_args,
        "checkpoint": "samples-000000000009",
        "pool": "avg",
        "layer": "last, before the classifier",
        "weights": "",
        "image_size": 32,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "width": 24,
    }


def test_untrained_is_drawn_from_its_seed_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    spec = f"untrained:{tmp_path}/run"
    state = torch.get_rng_state()
    prints = [load_encoder(spec, seed=seed).describe()["weights"] for seed in (0, 1, 0)]
    assert prints[0] == prints[2] != prints[1]
    assert torch.equal(state, torch.get_rng_state())
    assert load_encoder(spec).seeded


def test_runs_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    text = refusal("run:" + str(tmp_path / "gone"))
    assert "nor is a folder at" in text and "untrained:RUN" in text
    assert "no run folder at" in refusal(f"untrained:{tmp_path}/gone")
    (tmp_path / "bare" / "checkpoints" / "samples-000000000005.partial").mkdir(parents=True)
    text = refusal(f"run:{tmp_path}/bare")
    assert "has no finished checkpoint" in text and "train run" in text
    file = tmp_path / "run" / "checkpoints" / "samples-000000000010" / "trunk.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    text = refusal(f"run:{tmp_path}/run")
    assert "trunk.safetensors cannot be read as weights" in text and "fetch or write the file again" in text
    wider = build_trunk(MODEL.model_copy(update={"image_size": 48})).state_dict()
    del wider["norm.bias"]
    save_file(wider | {"extra": torch.zeros(1)}, file)
    text = refusal(f"run:{tmp_path}/run")
    assert "pos_embed is [1, 10, 24], wanted [1, 5, 24]" in text
    assert "missing (1): norm.bias" in text and "unexpected (1): extra" in text
    file.unlink()
    assert "no weight file at" in refusal(f"run:{tmp_path}/run")
    partial = file.parent.rename(file.parent.with_name(file.parent.name + ".partial"))
    assert "has no finished checkpoint" in refusal(f"run:{partial}")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_with_local_weights_drops_the_classifier(tmp_path: Path, name: str, ending: str) -> None:
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False).eval()
    file = tmp_path / f"weights.{ending}"
    save_file(model.state_dict(), file) if ending == "safetensors" else torch.save({"model": model.state_dict()}, file)
    encoder = load_encoder(f"timm:{name}", weights=str(file))
    images = torch.randn(2, 3, 160, 160)
    model.reset_classifier(0)  # type: ignore[operator]
    assert torch.allclose(encoder(images), model(images), atol=1e-6)
    assert encoder.images.side == 160 and encoder.describe()["pool"] == ("token" if name == "test_vit" else "avg")


class Payload:
    """What an untrusted pickle may hold: unpickling it would call a function."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the pickle was run",))


def test_timm_refusals(tmp_path: Path) -> None:
    text = refusal("timm:test_vit")
    assert "has no weights" in text and "--encoder timm:test_vit --weights hub" in text
    assert "timm has no model named 'test_vet'" in refusal("timm:test_vet")
    assert "no weight file at" in refusal("timm:test_vit", weights=str(tmp_path / "gone.pth"))
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    assert "cannot be read as weights" in refusal("timm:test_vit", weights=str(tmp_path / "evil.pth"))
    torch.save({"a": 3}, tmp_path / "odd.pth")
    assert "entries that are no tensors: a" in refusal("timm:test_vit", weights=str(tmp_path / "odd.pth"))
    torch.save([1], tmp_path / "list.pth")
    assert "cannot be read as weights" in refusal("timm:test_vit", weights=str(tmp_path / "list.pth"))
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    text = refusal("timm:test_vit", weights=str(tmp_path / "other.safetensors"))
    assert "missing (" in text and "unexpected (" in text and "more" in text and "does not fit" in text


def test_specs_that_mean_nothing() -> None:
    for spec in ("resnet50", "timm:", "open_clip:ViT-B-32"):
        assert "is no known kind" in refusal(spec) and "pixels:SIDE" in refusal(spec)
    for spec in ("pixels:0", "pixels:big"):
        assert "has no whole number of pixels" in refusal(spec)
    assert "--weights with timm:NAME only" in refusal("pixels:8", weights="w.pth")


@pytest.fixture
def parts(tmp_path: Path) -> tuple[LabelledImages, LabelledImages]:
    train_dir = write_folders(tmp_path / "train", {"a": 3, "b": 2})
    for index, file in enumerate(sorted(train_dir.rglob("*.png"))):
        file.write_bytes(encoded((index * 40, 255 - index, 7)))
    return load_labelled(train_dir, write_folders(tmp_path / "test", {"a": 2}, start=9))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_pixel_features_are_the_pixels_in_order(parts, batch_size: int) -> None:
    found = extract(load_encoder("pixels:4"), parts[0], batch_size=batch_size, device=CPU)
    assert found.shape == (5, 48) and found.dtype == np.float32
    expected = np.array([[index * 40, 255 - index, 7] for index in range(5)]) / 255
    assert np.allclose(found.reshape(5, 3, 16), expected[:, :, None], atol=1e-6)
    assert load_encoder("pixels:").images.side == 32


def test_features_are_the_trunks_on_normalised_images(tmp_path: Path, parts) -> None:
    trunks = write_run(tmp_path / "run", 1)
    found = extract(load_encoder(f"{tmp_path}/run"), parts[0], batch_size=2, device=CPU)
    image = torch.tensor([2 * 40, 253, 7]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (Train().data.mean, Train().data.std))
    with torch.no_grad():
        expected = trunks[1]((image - mean) / std)[0].numpy()
    assert np.allclose(found[2], expected, atol=1e-4)


def test_cached_features_are_taken_and_belong_to_one_encoder_and_data(tmp_path: Path, parts, monkeypatch) -> None:
    cache = tmp_path / "cache"
    first = extract(load_encoder("pixels:4"), parts[0], batch_size=2, device=CPU, cache=cache)
    extract(load_encoder("pixels:5"), parts[0], batch_size=2, device=CPU, cache=cache)
    extract(load_encoder("pixels:4"), parts[1], batch_size=2, device=CPU, cache=cache)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(features, "_run", lambda *_: pytest.fail("extracted again"))
    assert np.array_equal(extract(load_encoder("pixels:4"), parts[0], batch_size=3, device=CPU, cache=cache), first)


def test_unreadable_images_are_named_and_counted(parts) -> None:
    parts[0].places[1].path.write_bytes(b"no image at all")
    parts[0].places[4].path.write_bytes(encoded(size=(50, 50))[:-30])
    with pytest.raises(UserError) as caught:
        extract(load_encoder("pixels:4"), parts[0], batch_size=2, device=CPU)
    text = str(caught.value)
    assert "2 of 5 images" in text and "a/1.png (UnidentifiedImageError" in text and "b/1.png" in text and "mend or remove" in text


def test_features_that_are_not_finite_are_refused(tmp_path: Path, parts) -> None:
    write_run(tmp_path / "run", 1)
    encoder = load_encoder(f"{tmp_path}/run")
    encoder.net.state_dict()["norm.weight"].fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite, first for a/0\.png[\s\S]*earlier checkpoint"):
        extract(encoder, parts[0], batch_size=2, device=CPU)
