"""The recipes of pipeline.yaml: valid, commented, laid between file and --set, and the paper's numbers."""

import re
from pathlib import Path

import pytest

from labels.config import load_pipeline
from labels.settings import RECIPES, Pipeline
from labels.storage import UserError

PIPELINE = Path(__file__).parents[2] / "pipeline.yaml"
# Schedules as the method's authors give them: samples, batch, peak rate, warm-up steps, second moment's decay, smallest
# crop, and shares of jittered and grey images.
PAPER = {
    "superclass-512m": (512_000_000, 16_384, 5e-4, 500, 0.98, 0.9, 0, 0),
    "superclass-1.28b": (1_280_000_000, 16_384, 5e-4, 500, 0.98, 0.9, 0, 0),
    "superclass-12.8b": (12_800_000_000, 90_112, 1e-3, 10_000, 0.95, 0.4, 0.8, 0.2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_papers_schedule(name: str) -> None:
    train = load_pipeline(PIPELINE, recipe=name).train
    found = (train.samples, train.batch_size, train.optimizer.lr, train.optimizer.warmup_samples / train.batch_size)
    colour = train.data.color_jitter_probability, train.data.grey_probability
    assert (*found, train.optimizer.betas[1], train.data.crop_scale[0], *colour) == PAPER[name]
    assert train.data.color_jitter == [0.32, 0.32, 0.32, 0.08]
    assert (train.optimizer.betas[0], train.optimizer.eps, train.optimizer.weight_decay) == (0.9, 1e-6, 0.2)
    assert (train.optimizer.clip_norm, train.optimizer.ema_decay, train.data.flip) == (None, None, False)
    assert train.loss.name == "softmax" and train.loss.idf


def test_every_recipe_has_its_command_and_result_and_every_line_a_comment() -> None:
    text = PIPELINE.read_text(encoding="utf8").partition("\nrecipes:\n")[2]
    parts = re.split(r"^  ([\w.-]+):\n", text, flags=re.MULTILINE)
    assert parts[1::2] == list(RECIPES) == list(PAPER)
    for name, above in zip(parts[1::2], parts[0::2], strict=False):
        comment = [line for line in above.splitlines() if line.startswith("  #")]
        assert any("torchrun" in line and line.endswith(f"--recipe {name}") for line in comment), name
        assert any(re.search(r"B/16: \d\d\.\d|L/16: \d\d\.\d", line) for line in comment), name
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) == 18 and all(re.search(r"# \S", line) for line in lines)


def test_precedence_is_file_then_recipe_then_set(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("train: {samples: 1M, data: {threads: 7, flip: true}, optimizer: {lr: 1.0}}")
    train = load_pipeline(file, ["train.samples=600M"], "superclass-512m").train
    assert (train.samples, train.optimizer.lr, train.data.crop_scale) == (600_000_000, 5e-4, [0.9, 1.0])
    assert (train.data.threads, train.data.flip) == (7, True), "what the recipe does not say stays the file's"


def test_own_recipes_replace_the_built_in_ones(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("recipes: {short: {samples: 3M}, wrong: {samplse: 3M}}")
    assert load_pipeline(file, recipe="short").train.samples == 3_000_000
    with pytest.raises(UserError, match=r"train\.samplse: unknown key; did you mean 'samples'"):
        load_pipeline(file, recipe="wrong")
    with pytest.raises(UserError, match=r"no recipe named 'superclass-512m'\n  allowed: short, wrong"):
        load_pipeline(file, recipe="superclass-512m")


def test_a_budget_too_short_for_the_recipes_warm_up_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_samples is 8192000, the whole run only 1000000 samples"):
        load_pipeline(PIPELINE, ["train.samples=1M"], "superclass-512m")


def test_overrides_do_not_stay_in_the_built_in_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # without a pipeline.yaml the built-in recipes count
    load_pipeline(recipe="superclass-512m", overrides=["train.model.trunk=vit_s16", "train.optimizer.lr=1"])
    assert load_pipeline(recipe="superclass-1.28b").train.model.trunk == "vit_b16"
    assert load_pipeline().recipes == Pipeline().recipes
