"""Encoders by name: the right weights, the right layer and pool, errors that name the fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from labels.storage import UserError
from run_factory import MODEL, write_run
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder, pair_weights
from train.export.export import export_encoder
from train.model import build_trunk


def refusal(spec: str, **asked) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(EncoderSpec(spec, **asked))
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


def test_the_moving_average_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, 1000)
    average = build_trunk(MODEL).eval()
    folder = tmp_path / "run" / "checkpoints" / "samples-000000001000"
    save_file(average.state_dict(), folder / "trunk_ema.safetensors")
    images = torch.randn(2, 3, 32, 32)
    for path in (tmp_path / "run", folder):
        encoder = load_encoder(f"ema:{path}")
        assert torch.equal(encoder(images), average(images))
        assert encoder.describe()["checkpoint"] == "samples-000000001000, moving average"
    one, other = pair_weights([f"run:{tmp_path}/run", f"ema:{tmp_path}/run"], [])  # both in one table
    assert one.name != other.name
    block = load_encoder(EncoderSpec(f"ema:{tmp_path}/run", layer=1, pool="cls"))
    assert torch.equal(block(images), average.forward_features(images)[:, 0])  # type: ignore[operator]
    export_encoder(EncoderSpec(f"ema:{tmp_path}/run"), "timm", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[key], tensor) for key, tensor in average.state_dict().items())
    assert "`samples-000000001000, moving average`" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_moving_average(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9)
    text = refusal(f"ema:{tmp_path}/run")
    assert "has no moving average: train.optimizer.ema_decay was not set" in text
    fix = text.partition("fix: give ")[2].partition(",")[0]
    assert load_encoder(fix).describe()["checkpoint"] == "samples-000000000009"
    assert "nor is a folder at" in refusal(f"ema:{tmp_path}/gone")


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
    assert "trunk.safetensors cannot be read as weights" in text and f"fix: `rm -r {file.parent}`; then " in text
    wider = build_trunk(MODEL.model_copy(update={"image_size": 48})).state_dict()
    del wider["norm.bias"]
    save_file(wider | {"extra": torch.zeros(1)}, file)
    text = refusal(f"run:{tmp_path}/run")
    assert "pos_embed is [1, 10, 24], expected [1, 5, 24]" in text
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
    encoder = load_encoder(EncoderSpec(f"timm:{name}", str(file)))
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
    assert "entries that are not tensors: a" in refusal("timm:test_vit", weights=str(tmp_path / "odd.pth"))
    torch.save([1], tmp_path / "list.pth")
    assert "cannot be read as weights" in refusal("timm:test_vit", weights=str(tmp_path / "list.pth"))
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    text = refusal("timm:test_vit", weights=str(tmp_path / "other.safetensors"))
    assert "missing (" in text and "unexpected (" in text and "more" in text and "does not fit" in text


def test_specs_that_mean_nothing() -> None:
    for spec in ("resnet50", "timm:", "clip:ViT-B-32"):
        assert "is no known kind" in refusal(spec) and "pixels:SIDE" in refusal(spec)
    for spec in ("pixels:0", "pixels:big"):
        assert "has no whole number of pixels" in refusal(spec)
    assert "--weights with timm:NAME and open_clip:NAME only" in refusal("pixels:8", weights="w.pth")


def test_weights_go_to_the_encoders_that_take_some() -> None:
    asked = pair_weights(["run:a", "timm:x", "pixels:4", "open_clip:y"], ["1.pth", "2.pth"], layer=-1)
    assert [one.weights for one in asked] == [None, "1.pth", None, "2.pth"] and asked[0].layer == -1
    twins = pair_weights(["timm:x", "timm:x", "run:a"], ["1.pth", "2.pth"], pool="avg")
    assert [one.weights for one in twins] == ["1.pth", "2.pth", None]
    assert [one.name for one in twins] == ["timm:x, avg, 1.pth", "timm:x, avg, 2.pth", "run:a, avg"], (
        "tables tell them apart"
    )
    with pytest.raises(UserError, match=r"the encoder 'run:a' is given 2 times[\s\S]*allowed: each encoder"):
        pair_weights(["run:a", "pixels:4", "run:a"], [])
    for specs, weights, expected in (
        ([], [], "no encoder is named"),
        (["pixels:4"], ["w.pth"], "--weights was given 1 times for 0 timm and open_clip encoders (none)"),
        (["timm:a", "open_clip:b"], ["w.pth"], "one --weights for each timm:NAME and open_clip:NAME"),
    ):
        with pytest.raises(UserError) as caught:
            pair_weights(specs, weights)
        assert expected in str(caught.value)


def tokens_by_hand(net, images: torch.Tensor, blocks: int) -> torch.Tensor:
    """timm's own modules in a row: what a ViT's tokens are after some blocks and the final norm."""
    x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
    for block in net.blocks[:blocks]:
        x = block(x)
    return net.norm(x)


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of random weights for a timm model."""

    def write(name: str) -> Path:
        torch.manual_seed(1)
        file = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_file(timm.create_model(name, num_classes=0).state_dict(), file)
        return file

    return write


# test_vit: a class token, as MAE's and DINOv2's; test_vit4: class token and register, mean pool, its norm behind the
# pool
@pytest.mark.parametrize("name", ["test_vit", "test_vit4"])
def test_layers_and_pools_of_a_vit(weights_of, name: str) -> None:
    file = str(weights_of(name))
    net: Any = timm.create_model(name, num_classes=0, checkpoint_path=file).eval()
    images, depth, prefix = torch.randn(2, 3, 160, 160), len(net.blocks), net.num_prefix_tokens
    prints = {load_encoder(EncoderSpec(f"timm:{name}", file)).describe()["weights"]}
    for layer, block in ((1, 1), (-1, depth), (-2, depth - 1)):
        tokens = tokens_by_hand(net, images, block)
        expected = {"cls": net.fc_norm(tokens[:, 0]), "avg": net.fc_norm(tokens[:, prefix:].mean(1))}
        expected["cls+avg"] = torch.cat([expected["cls"], expected["avg"]], 1)
        for pool, features in expected.items():
            encoder = load_encoder(EncoderSpec(f"timm:{name}", file, layer, pool))
            assert torch.allclose(encoder(images), features, atol=1e-5) and encoder.width == features.shape[1]
            about = encoder.describe()
            assert (about["pool"], about["layer"]) == (pool, f"{block} of {depth}") and "final norm" in about["norm"]
            prints.add(about["weights"])
    assert len(prints) == 1  # the weights are the same, whatever is read
    last = load_encoder(EncoderSpec(f"timm:{name}", file, -1))
    assert torch.allclose(last(images), net(images), atol=1e-5)


def test_layers_that_are_not_there(weights_of) -> None:
    file = str(weights_of("test_vit4"))
    depth = len(timm.create_model("test_vit4").blocks)  # type: ignore[arg-type]
    for layer in (0, depth + 1, -depth - 1):
        text = refusal("timm:test_vit4", weights=file, layer=layer)
        assert f"has no layer {layer}: it has {depth}" in text and "-1 (the last)" in text
    assert "the pool 'max' is unknown" in refusal("timm:test_vit4", weights=file, pool="max")
    assert "has no class token to pool by 'cls'" in refusal("untrained:timm:test_resnet", pool="cls")
    assert "has no layers to choose from" in refusal("pixels:4", layer=1)


def test_a_runs_default_is_its_last_layer_pooled_by_the_mean(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1)
    images = torch.randn(2, 3, 32, 32)
    own = load_encoder(f"{tmp_path}/run")
    assert torch.allclose(
        own(images), load_encoder(EncoderSpec(f"{tmp_path}/run", layer=-1, pool="avg"))(images), atol=1e-6
    )
    cls = load_encoder(EncoderSpec(f"{tmp_path}/run", pool="cls"))
    assert not torch.allclose(own(images), cls(images), atol=1e-3) and own.checkpoint == cls.checkpoint


def test_stages_of_a_convolutional_net() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 160, 160)
    first, last = (load_encoder(EncoderSpec("untrained:timm:test_resnet", layer=layer)) for layer in (2, -1))
    maps = first.net.net.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator, union-attr]
    assert torch.allclose(first(images), maps[1].mean((2, 3)), atol=1e-5)
    assert torch.allclose(last(images), maps[-1].mean((2, 3)), atol=1e-5) and last.width > first.width
    assert torch.allclose(last(images), load_encoder("untrained:timm:test_resnet")(images), atol=1e-5)
