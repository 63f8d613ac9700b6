"""The grammar of build.caption_key: what it names, in which order, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.settings import Build
from labels.storage import UserError
from preprocess.readers.base import Choice, Item, column_choices, join_captions, parse_caption_key


def parsed(*keys: str) -> list[str]:
    return [str(choice) for choice in parse_caption_key(keys)]


def test_the_default_serves_tars_and_tables() -> None:
    choices = parse_caption_key(Build().caption_key)
    in_a_tar = [str(choice) for choice in choices if choice.items[0].kind in ("member", "json")]
    assert str(choices[0]) == "parquet:caption" and in_a_tar == ["txt", "json:caption"]
    for kind in ("parquet", "csv"):
        assert [choice.items[0].name for choice in column_choices(choices, kind)] == ["caption", "text", "txt", "title"]


@pytest.mark.parametrize(
    ("key", "items"),
    [
        ("txt", [("member", "txt")]),
        ("TXT", [("member", "txt")]),
        ("alt.txt", [("member", "alt.txt")]),
        ("json:alt text", [("json", "alt text")]),
        ("parquet:a:b", [("parquet", "a:b")]),
        ("csv:Título", [("csv", "Título")]),
        ("txt+json:alt", [("member", "txt"), ("json", "alt")]),
        (" txt + parquet:text ", [("member", "txt"), ("parquet", "text")]),
    ],
)
def test_an_item_names_a_field(key: str, items: list[tuple[str, str]]) -> None:
    (choice,) = parse_caption_key([key])
    assert [(item.kind, item.name) for item in choice.items] == items


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["json"], "'json' lacks the field: json:FIELD"),
        (["txt", "xml:title"], "'xml:title' names no caption"),
        (["json:"], "'json:' names no caption"),
        (["parquet: "], "'parquet:' names no caption"),
        ([""], "'' names no caption"),
        (["txt+"], "'' names no caption (in 'txt+')"),
        (["auto+txt"], "'auto' names no caption (in 'auto+txt')"),
        (["a/b"], "'a/b' names no caption"),
        ([".txt"], "'.txt' names no caption"),
        (["txt", "JPG"], "'JPG' is the suffix of an image"),
        ([], "is empty"),
    ],
)
def test_a_key_outside_of_the_grammar_is_refused(keys: list[str], problem: str) -> None:
    with pytest.raises(UserError) as error:
        parse_caption_key(keys)
    assert problem in str(error.value) and "allowed: auto, txt or another member suffix" in str(error.value)


def test_order_is_kept_and_repeats_are_dropped() -> None:
    assert parsed("json:alt", "txt", "json:alt") == ["json:alt", "txt"]
    assert parsed("csv:x", "auto")[:2] == ["csv:x", "parquet:caption"]


def test_a_table_sees_only_its_own_items() -> None:
    choices = parse_caption_key(["txt+parquet:a+csv:b+parquet:c", "json:d", "csv:b", "parquet:e"])
    assert [str(choice) for choice in column_choices(choices, "parquet")] == ["parquet:a+parquet:c", "parquet:e"]
    assert [str(choice) for choice in column_choices(choices, "csv")] == ["csv:b"]
    assert column_choices(parse_caption_key(["txt"]), "csv") == ()


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(["json", "parquet", "csv"]), st.from_regex(r"[a-z:é _]*[a-zé_]", fullmatch=True)),
            min_size=1,
        ),
        min_size=1,
    )
)
def test_a_printed_choice_reads_back(choices: list[list[tuple[str, str]]]) -> None:
    made = tuple(dict.fromkeys(Choice(tuple(Item(kind, name) for kind, name in choice)) for choice in choices))  # type: ignore[arg-type]
    assert parse_caption_key([str(choice) for choice in made]) == made


@given(st.text())
def test_any_text_is_a_choice_or_a_user_error(text: str) -> None:
    try:
        choices = parse_caption_key([text])
    except UserError:
        return
    assert choices and all(choice.items for choice in choices)


def test_several_captions_are_lines_of_one_text() -> None:
    assert join_captions(["a cat", "a dog"]) == "a cat\na dog" and join_captions(["a cat"]) == "a cat"
