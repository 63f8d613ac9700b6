"""An explanation as a page that opens without a network."""

from typing import Any

from labels.html import Html, Section, join, page, paragraph, picture, table, tag, weights
from preprocess.show.explanation import Explanation, Label
from preprocess.show.thumbnails import thumbnail

_SIDE = 640


def explanation_page(told: Explanation) -> str:
    """The whole HTML file."""
    sample = told.sample
    size = f" {sample.width} × {sample.height} pixels." if sample.width and sample.height else ""
    uid = f" Uid {sample.uid}." if sample.uid else ""
    lead = paragraph(f"Shard {sample.shard.name}, row {sample.index:,} of {told.captions:,}.{size}{uid}", muted=True)
    sections = [Section("sample", "Image and caption", _sample(told)), Section("target", "What the loss aims at", _target(told))]
    if told.guesses:
        sections.append(Section("model", "What the model expects", _guesses(told)))
    return page(f"Sample {sample.key}", lead, sections)


def _sample(told: Explanation) -> Html:
    data = thumbnail(told.image, _SIDE) if told.image else None
    shown = picture(data, alt=told.caption, large=True) if data else paragraph("No image.", muted=True)
    parts = [tag("h3", "Caption"), paragraph(told.caption), paragraph(told.caption_from[:1].upper() + told.caption_from[1:], muted=True)]
    if told.cleaned is not None:
        parts += [tag("h3", "Cleaned"), paragraph(told.cleaned)]
    parts += [tag("h3", "Tokens, in order"), tag("p", join(tag("code", token) for token in told.tokens or ["none"]), class_="tokens")]
    notes = join(paragraph(tag("strong", "Note: "), note) for note in told.notes)
    return tag("div", join([tag("div", shown), tag("div", join([*parts, notes]))]), class_="columns")


def _target(told: Explanation) -> Html:
    if not told.labels:
        return paragraph("This caption has no labels; the sample's loss is 0.")
    text = (
        f"Each label's share of the target, t: its IDF ({told.formula}, over {told.captions:,} captions) divided by the sum over the "
        f"caption's labels. Tokenizer: {told.tokenizer}. “…” marks where a word goes on."
    )
    bars = weights((label.name, label.weight, f"{label.weight:.1%}") for label in told.labels)
    rows = [[*_cells(label), f"{label.idf:.3f}", f"{label.weight:.4f}"] for label in told.labels]
    numbers = table(["Token", "#Id", "#Captions", "#IDF (nats)", "#t"], rows, caption="Labels, by falling weight")
    return join([paragraph(text), tag("div", join([bars, numbers]), class_="columns")])


def _guesses(told: Explanation) -> Html:
    rows = []
    for guess in told.guesses:
        rows.append([*_cells(guess.label), f"{guess.probability:.4f}", f"{guess.label.weight:.4f}" if guess.hit else "no label"])
    hits = sum(guess.hit for guess in told.guesses)
    numbers = table(["Token", "#Id", "#Captions", "#Probability", "#t"], rows, caption="The model's likeliest tokens")
    bars = weights(
        (tag("strong", guess.label.name) if guess.hit else guess.label.name, guess.probability, f"{guess.probability:.1%}")
        for guess in told.guesses
    )
    text = f"Checkpoint {told.checkpoint}: {hits} of its {len(told.guesses)} likeliest tokens are labels of this caption (set in bold)."
    return join([paragraph(text), tag("div", join([bars, numbers]), class_="columns")])


def _cells(label: Label) -> list[Any]:
    return [tag("code", label.name), label.token_id, f"{label.document_frequency:,}"]
