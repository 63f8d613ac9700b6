"""pipeline.yaml: its values are the defaults, every key has a comment, and every mistake is reported."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from labels.config import dump_yaml, load_pipeline
from labels.settings import Pipeline, Train
from labels.storage import UserError
from shard_factory import preprocess
from train.evals.protocol import load_protocol, protocol_names
from train.losses.kinds import check_accumulation

PIPELINE = Path(__file__).parents[2] / "pipeline.yaml"


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys that hold a value."""
    found = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += leaves(section, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "p.yaml"
    file.write_text(text, encoding="utf8")
    return file


def message(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_pipeline(written(tmp_path, text), overrides)
    return str(caught.value)


def value_at(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def test_the_file_holds_the_defaults() -> None:
    pipeline = load_pipeline(PIPELINE)
    assert (
        pipeline.model_copy(update={"evaluators": {}}) == Pipeline() and sorted(pipeline.evaluators) == protocol_names()
    )
    for evaluation in map(load_protocol, protocol_names()):
        assert evaluation.settings(pipeline) == evaluation.settings(Pipeline())


def test_the_file_names_every_key_and_comments_it() -> None:
    at: list[str] = []
    found = []
    for line in PIPELINE.read_text(encoding="utf8").partition("\nrecipes:\n")[0].splitlines():
        match = re.fullmatch(r"( *)(\w+):\s*([^#]*?)\s*(# \S.*)?", line)
        if match is None:
            assert not line.strip() or line.lstrip().startswith("#"), line
            continue
        indent, key, value, comment = match.groups()
        at = [*at[: len(indent) // 2], key]
        if value:
            found.append(".".join(at))
            assert comment, f"{'.'.join(at)} has no comment"
    sections = {name: type(load_protocol(name).settings(Pipeline())) for name in protocol_names()}
    for name, section in sections.items():
        assert [key for key in found if key.startswith(f"{name}.")] == leaves(section, f"{name}.")
    others = [key for key in found if key.partition(".")[0] not in sections]
    assert [*others, "evaluators", "recipes"] == leaves(Pipeline), "the recipes are read by tests/test_recipes.py"


def test_an_evaluator_names_the_mistakes_in_its_own_section(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, "knn: {kk: [1], temperature: 0.0}"))
    with pytest.raises(UserError) as caught:
        load_protocol("knn").settings(pipeline)
    assert "knn.kk: unknown key; did you mean 'k'? allowed: k, temperature, seeds" in str(caught.value)
    assert "knn.temperature: 0.0 is not allowed: Input should be greater than 0" in str(caught.value)


def test_sections_of_evaluators_are_laid_over_each_other(tmp_path: Path) -> None:
    """`evaluators.NAME` is their older name, still used in the configurations saved next to results."""
    pipeline = load_pipeline(
        written(tmp_path, "evaluators: {knn: {k: [3], temperature: 0.5}}\nprobe:\n"), ["knn.k=[7]"]
    )
    assert pipeline.evaluators == {"knn": {"k": [7], "temperature": 0.5}, "probe": {}}
    dump_yaml(tmp_path / "again.yaml", pipeline)
    assert load_pipeline(tmp_path / "again.yaml") == pipeline


def test_a_loss_of_whole_batches_refuses_accumulation() -> None:
    settings = load_pipeline(PIPELINE, ["train.loss.name=two_way", "train.runtime.accumulation=2"]).train
    with pytest.raises(UserError, match=r"loss.name is two_way(.|\n)*accumulation 2(.|\n)*allowed: 1"):
        check_accumulation(settings)
    check_accumulation(Train())


def test_precedence_is_defaults_then_file_then_set(tmp_path: Path) -> None:
    file = written(tmp_path, "build: {workers: 3, jpeg_quality: 80}")
    settings = load_pipeline(file, ["build.workers=4", "build.workers=5"])
    assert (settings.build.workers, settings.build.jpeg_quality, settings.build.max_bad_fraction) == (5, 80, 0.1)


def test_the_file_in_the_working_directory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_pipeline() == Pipeline()
    (tmp_path / "pipeline.yaml").write_text("paths: {out: elsewhere}")
    assert load_pipeline().paths.out == "elsewhere"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimizer.lr=1e-3", 1e-3),
        ("train.optimizer.lr=2E-4", 2e-4),
        ("train.optimizer.lr=1", 1.0),
        ("train.samples=512M", 512_000_000),
        ("train.samples=1.28B", 1_280_000_000),
        ("train.samples=700k", 700_000),
        ("train.samples=1_000_000", 1_000_000),
        ("train.model.trunk_args={patch_size: 8, depth: 6}", {"patch_size": 8, "depth": 6}),
        ("train.data.crop_scale=[0.4, 1.0]", [0.4, 1.0]),
        ("train.data.flip=true", True),
        ("labels.idf=none", "none"),
        ("paths.out=a=b", "a=b"),
    ],
)
def test_forms_of_set(tmp_path: Path, override: str, expected: object) -> None:
    key = override.partition("=")[0]
    found = value_at(load_pipeline(written(tmp_path, ""), [override, "train.optimizer.warmup_samples=0"]), key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("labels: {idf: smooth, idf: paper}", ["'idf' is given twice", "line 1"]),
        ("labels:\n  idf: smooth\nlabels:\n  idf: paper", ["'labels' is given twice", "line 3"]),
        (
            "labels: {idff: smooth}",
            ["labels.idff: unknown key", "did you mean 'idf'?", "allowed: tokenizer, context, idf"],
        ),
        ("train: {model: {trnk: x}}", ["train.model.trnk: unknown key", "did you mean 'trunk'?"]),
        (
            "lables: {}",
            ["lables: unknown key", "did you mean 'labels'?", "allowed: paths, labels, build, train, text_tower"],
        ),
        ("zzz: 1", ["zzz: unknown key; allowed:"]),
        ("labels: {context: many}", ["labels.context: 'many' is not allowed", "valid integer"]),
        ("labels: {context: 7.5}", ["labels.context: 7.5 is not allowed"]),
        ("labels: {context: true}", ["labels.context: True is not allowed"]),
        ("labels: {context: 0}", ["labels.context: 0 is not allowed", "greater than 0"]),
        ("labels: {idf: tfidf}", ["labels.idf: 'tfidf' is not allowed", "'smooth', 'paper' or 'none'"]),
        ("labels: 3", ["labels: 3 is not allowed"]),
        ("build: {max_bad_fraction: 1.5}", ["build.max_bad_fraction: 1.5 is not allowed", "less than or equal to 1"]),
        ("build: {duckdb_memory: lots}", ["build.duckdb_memory: 'lots' is not allowed"]),
        ("train: {samples: infM}", ["train.samples: 'infM' is not allowed"]),
        ("train: {samples: 1.2345678k}", ["train.samples: '1.2345678k' is not allowed"]),
        ("train: {optimizer: {lr: .nan}}", ["train.optimizer.lr: nan is not allowed"]),
        ("train: {data: {std: [1.0, 0.0, 1.0]}}", ["train.data.std.1: 0.0 is not allowed"]),
        ("train: {optimizer: {betas: [0.9, 1.0]}}", ["train.optimizer.betas.1: 1.0 is not allowed"]),
        (
            "train: {samples: 1000, batch_size: 100, optimizer: {warmup_samples: 1000}}",
            ["warmup_samples is 1000", "only 1000 samples"],
        ),
        ("train: {samples: 10, batch_size: 20, optimizer: {warmup_samples: 0}}", ["samples is 10", "batch_size 20"]),
        (
            "train: {runtime: {accumulation: 3}}",
            ["batch_size is 1024", "runtime.accumulation 3", "a divisor of batch_size"],
        ),
        (
            "train: {loss: {name: sofmax}}",
            ["train.loss.name: 'sofmax' is not allowed: Input should be 'asl', 'bce', ", " or 'two_way'"],
        ),
        ("train: {loss: {name: 3}}", ["train.loss.name: 3 is not allowed", "valid string"]),
        ("knm: {k: [1]}", ["knm: unknown key", "did you mean 'knn'?"]),
        ("evaluators: {km: {k: [1]}}", ["there is no evaluator 'km'; allowed: caption, "]),
        ("evaluators: 3", ["evaluators: 3 is not allowed"]),
        ("probe: 3", ["  probe: 3 is not allowed"]),
        ("train: {checkpoint: {every_samples: 0}}", ["train.checkpoint.every_samples: 0 is not allowed"]),
        ("train: {data: {crop_scale: [0.9, 0.5]}}", ["train.data: crop_scale is [0.9, 0.5]", "0 < low <= high <= 1"]),
        ("train: {data: {crop_ratio: [2.0, 1.0]}}", ["crop_ratio is [2.0, 1.0]"]),
        ("[1, 2]", ["holds a list", "sections with keys"]),
        ("1: 2", ["the key 1 is not a word"]),
        ("? [1, 2]\n: 3", ["the key [1, 2] is not a word"]),
        ("labels: {", ["is not readable as YAML"]),
        ("a: &a [*a]", ["is not readable as YAML"]),
    ],
)
def test_every_mistake_in_the_file_is_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = message(tmp_path, text)
    assert all(part in found for part in expected), found
    assert "p.yaml" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("labels.idf", "'labels.idf' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form section.key=value"),
        ("labels..idf=paper", "is not of the form section.key=value"),
        ("labels.idf.x=3", "labels.idf is a value, not a section"),
        ("labels.idf=[", "the value is not YAML"),
        ("labels.idf=", "labels.idf: None is not allowed"),
        ("labels.idff=paper", "did you mean 'idf'?"),
    ],
)
def test_every_mistake_in_set_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(tmp_path, "labels: {idf: smooth}", override)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    found = message(tmp_path, "labels: {context: many, idf: x}\nnew: 1")
    assert len(found.splitlines()) == 4


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration file at .*none\.yaml"):
        load_pipeline(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"paths: {out: \xe9}")
    with pytest.raises(UserError, match=r"latin\.yaml is not readable"):
        load_pipeline(tmp_path / "latin.yaml")


def test_a_dumped_configuration_can_be_read_again(tmp_path: Path) -> None:
    settings = load_pipeline(PIPELINE, ["train.optimizer.lr=3e-7", "labels.idf=paper"])
    dump_yaml(tmp_path / "new" / "config.yaml", settings)
    assert load_pipeline(tmp_path / "new" / "config.yaml") == settings


def test_the_command_reports_a_mistake_with_exit_code_2(tmp_path: Path) -> None:
    ran = preprocess("build-labels", tmp_path, "--out", tmp_path / "out", "--set", "build.wokers=2")
    assert ran.code == 2
    assert (
        ran.err.startswith("error: the configuration")
        and "did you mean 'workers'?" in ran.err
        and "Traceback" not in ran.err
    )
    assert preprocess("build-labels", tmp_path, "--workers", -1).err.startswith("error: the configuration")
    assert preprocess("build-labels").code == 2


def test_yaml_numbers_are_numbers() -> None:
    assert isinstance(yaml.safe_load("1e-3"), str), "YAML 1.1 itself takes it for a string: which our loader fixes"
