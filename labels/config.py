"""Loading the configuration: defaults < pipeline.yaml < `--recipe` < `--set section.key=value` and flags -> Pipeline.

Sections and defaults are in labels/settings.py. An evaluator's section is defined in the evaluator's own file, which
reads it with `own_section`. Every fault becomes a line of a UserError: key, value, what is allowed.
"""

import copy
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from labels.settings import EVALUATORS, RECIPES, Pipeline, Section, names_in
from labels.storage import UserError, write_whole

DEFAULT_FILE = Path("pipeline.yaml")
_Own = TypeVar("_Own", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML as users mean it: `1e-3` is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not a word", key_node.start_mark)
        if key in values:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_pipeline(file: Path | None = None, overrides: Iterable[str] = (), recipe: str | None = None) -> Pipeline:
    """The configuration of `file` (None: ./pipeline.yaml if it exists, else the defaults) with recipe and overrides.

    `overrides`: `section.key=value`, values in YAML, applied in order; `recipe`: an entry of `recipes`, merged into the
    section `train` before the overrides.
    """
    if file is None and DEFAULT_FILE.is_file():
        file = DEFAULT_FILE
    values: dict[str, Any] = read_yaml(file) if file else {}
    if recipe is not None:
        values["train"] = _merged(values.get("train") or {}, _recipe(values, recipe))
    for override in overrides:
        _apply(values, override)
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, f"({file or 'built-in defaults'} and --set) ", Pipeline)) from None


def own_section(pipeline: Pipeline, name: str, section: type[_Own]) -> _Own:
    """The section of an evaluator, validated by the class in the evaluator's file."""
    try:
        return section.model_validate(pipeline.evaluators.get(name, {}))
    except ValidationError as error:
        raise UserError(_explain(error, "", section, (name,))) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a file. UserError: it is missing, no YAML, no mapping, or repeats a key."""
    try:
        values = yaml.load(file.read_text(encoding="utf8"), _Loader)
    except FileNotFoundError:
        fix = "give --config an existing file, or omit it"
        raise UserError(f"no configuration file at {file}", fix=fix) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not readable as YAML: {error}", allowed="sections with keys") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}", allowed="sections with keys, as in pipeline.yaml")
    return values


def _recipe(values: dict[str, Any], name: str) -> dict[str, Any]:
    recipes = values.get("recipes") or RECIPES
    if not isinstance(recipes, dict) or not isinstance(recipes.get(name), dict):
        fix = "give --recipe one of these, or write it into pipeline.yaml"
        raise UserError(f"no recipe named {name!r}", allowed=", ".join(recipes), fix=fix)
    return copy.deepcopy(recipes[name])  # overrides change it, and RECIPES must not change


def _merged(below: Any, above: dict[str, Any]) -> Any:
    """`below` with the values of `above`, section by section; pydantic rejects what is no section."""
    if not isinstance(below, dict):
        return below
    nested = (key for key, value in above.items() if isinstance(below.get(key), dict) and isinstance(value, dict))
    return below | above | {key: _merged(below[key], above[key]) for key in nested}


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    names = path.strip().split(".")
    if not separator or not all(names):
        raise UserError(f"--set {override!r} is not of the form section.key=value", allowed="e.g. train.batch_size=256")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML: {error}", fix="correct or quote it") from None
    section = values
    for depth, name in enumerate(names[:-1]):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            problem = f"--set {override!r}: {'.'.join(names[: depth + 1])} is a value, not a section"
            raise UserError(problem, fix=f"--set {'.'.join(names[: depth + 1])}=VALUE")
    section[names[-1]] = value


def _explain(error: ValidationError, source: str, model: type[Section], path: tuple[str, ...] = ()) -> str:
    """One line per fault: key, value, what is allowed. `path`: of the model in the configuration."""
    lines = [f"the configuration {source}is not valid:"]
    for fault in error.errors(include_url=False):
        key = ".".join(map(str, (*path, *fault["loc"]))).removeprefix("evaluators.") or "(whole file)"
        if fault["type"] == "extra_forbidden":
            names = _keys_at(model, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"  {key}: unknown key; {hint}allowed: {', '.join(names)}")
        elif fault["type"] == "value_error":
            lines.append(f"  {key}: {fault['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {key}: {fault['input']!r} is not allowed: {fault['msg']}")
    return "\n".join(lines)


def _keys_at(model: Any, location: tuple[int | str, ...]) -> list[str]:
    for name in location:
        model = model.model_fields[name].annotation
    names = list(model.model_fields)
    return [name for name in names if name != "evaluators"] + names_in(EVALUATORS) if model is Pipeline else names


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key: {"a": {"b": 1}} -> {"a.b": 1}; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def dump_yaml(path: Path, settings: BaseModel, exclude: dict[str, Any] | None = None) -> None:
    """Write the resolved configuration, which --config reads again; `exclude`: as pydantic's, what had no effect."""
    text = yaml.safe_dump(settings.model_dump(exclude=exclude), sort_keys=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf8"))
