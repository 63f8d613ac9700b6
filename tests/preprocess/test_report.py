"""`preprocess report`: a self-contained page with the numbers of the label dataset; shown in Chromium if installed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.show.html import Axis, Html, Series, html, line_chart, linear_ticks, log_ticks, table, tag
from page_checks import CHROMIUM, check_page, shown_in_chromium
from preprocess.inspect.report import summarise
from shard_factory import Built, preprocess, rows, write_shards


@pytest.fixture(scope="module")
def report(finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    said = preprocess("report", finished.out, "--out", path, "--pictures", 6)
    assert said.code == 0, said.err
    return path


def test_the_page_needs_no_other_file(report: Path) -> None:
    page = check_page(report.read_text("utf8"))
    assert page.ids >= {"spectrum", "labels", "quarantine", "gallery", "shards", "options"}
    assert page.images == 6
    for message in (
        "caption is not UTF-8",
        "000000100",
        "000000101",
        "rank by document frequency, log scale",
        "IDF (nats)",
        "犬と猫",
    ):
        assert message in page.text, message
    assert "All 3 files of the manifest exist" in page.text


def test_numbers_are_those_of_the_label_rows(finished: Built) -> None:
    summary = summarise(finished.out, 100)
    table = rows(finished.out)
    for labels, captions in enumerate(summary.labels_histogram):
        assert captions == sum(len(row["label_ids"]) == labels for row in table)
    assert {(reason.stage, reason.reason, reason.samples) for reason in summary.reasons} == {
        ("labels", "caption is not UTF-8", 1),
        ("images", "not an image", 1),
    }
    assert [shown.sample.key for shown in summary.gallery] == [row["key"] for row in table]
    assert sum(shown.image is None for shown in summary.gallery) == 1
    assert summary.median_size == (32, 32)


def test_missing_and_cut_files_are_reported(built: Built, tmp_path: Path) -> None:
    beton = built.out / "beton" / "00000.beton"
    beton.write_bytes(beton.read_bytes()[:-1])
    text = check_page_of(built.out, tmp_path / "x.html")
    assert "1 file is missing or damaged" in text and "beton/00000.beton has" in text and "preprocess verify" in text


def test_without_betons_there_are_no_pictures(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 1, 3)
    assert preprocess("build-labels", tmp_path / "data", "--out", tmp_path / "out", "--no-beton").code == 0
    text = check_page_of(tmp_path / "out", tmp_path / "x.html")
    assert "built without images" in text and "no image" in text


def check_page_of(out: Path, page: Path) -> str:
    said = preprocess("report", out, "--out", page)
    assert said.code == 0, said.err
    return check_page(page.read_text("utf8")).text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_shows_it_without_a_complaint(report: Path, tmp_path: Path) -> None:
    assert "CONSOLE" not in shown_in_chromium(report, tmp_path / "good")
    # The page's own policy refuses every request, and the refusal is a complaint: so silence means that there was none.
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        report.read_text("utf8").replace("</main>", '<img src="http://localhost:9/x.png" alt="x"></main>'), "utf8"
    )
    assert "CONSOLE" in shown_in_chromium(spoilt, tmp_path / "bad")


def test_text_is_escaped_and_markup_is_not() -> None:
    assert html("<a & b>") == "&lt;a &amp; b&gt;"
    assert tag("b", tag("i", "<"), title='"') == '<b title="&quot;"><i>&lt;</i></b>'
    assert isinstance(table(["x", "#n"], [["<script>", 3]]), Html)
    assert "<script>" not in table(["x", "#n"], [["<script>", 3]])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 9))
def test_linear_ticks_are_even_and_inside(low: float, width: float, count: int) -> None:
    ticks = linear_ticks(low, low + width, count)
    assert len(ticks) <= count + 1
    assert all(low - 1e-6 * width - 1e-9 <= tick <= low + width * (1 + 1e-6) + 1e-9 for tick in ticks)


def test_log_ticks_are_powers_of_ten() -> None:
    assert log_ticks(1, 4311) == [1, 10, 100, 1000]
    assert log_ticks(0.02, 1) == [0.1, 1]


def test_a_chart_of_one_point_and_one_without_spread() -> None:
    for series in (Series([1], [0]), Series([1, 10], [2, 2])):
        chart = line_chart("a chart", Axis("n", log=True), Axis("loss (nats)"), [series])
        assert "nan" not in chart.lower().replace("nats", "") and chart.count("<svg") == 2
