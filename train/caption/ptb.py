"""Captions as COCO's evaluation splits them: PTB tokens in lower case, punctuation removed.

Source: pycocoevalcap's tokenizer, which calls Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) and drops a list of
tokens. Its quirks are kept where they decide a score: a bracket becomes the word `-lrb-`, since the list names brackets in capitals, and
`!!!` stays, since the list has the single mark alone. What captions hold is covered, not the whole grammar of newswire.
"""

import re

_REMOVED = {'"', "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELT = {
    "\u2018": "`", "\u2019": "'", "\u201c": "``", "\u201d": "''", "\u2013": "--", "\u2014": "--", "\u2026": "...", "\u00bd": "1/2",
    "\u00bc": "1/4", "\u00be": "3/4", "\u00a2": "cents", "\u00a3": "#", "\u20ac": "$", "\u00ad": "", "\u200b": "",
    "&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " ",
}  # fmt: skip
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|"
    "maj|sgt|cpl|pvt|capt|ste?|ave|pres|hon|brig|mt|inc|cos?|corp|ltd|assn|univ|sq|jr|sr|bros|blvd|rd|esq|vs|etc|al|ca|cf|ct|ft|nos?|oz|pp|figs?|"
    "prop|bldg|tel|tenn|wash|tex|calif|mass|conn|fla|ala|minn"
)
_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)*"
_TOKEN = re.compile(
    "|".join(
        (
            r"</?[a-z][^<>]*>",  # SGML
            r"https?://[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`]",  # addresses
            r"[\w.%+-]+@[\w-]+(?:\.[\w-]+)+|(?:[\w-]+\.)+(?:com|net|org|edu)\b(?:/[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`])?",
            r"[@#][a-z_]\w*|&#\d+;",
            r"'t(?=is\b|was\b)|can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|got|wan)(?=(?:na|ta)\b)",  # written as one word, split
            r"'n'|'em\b|(?<!\d)'\d\d(?:s\b|(?!\w))|o'clock\b|ma'am\b|[dlo]'(?!s\b)[^\W\d_]+",
            rf"{_LETTER}+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b",  # contractions
            rf"(?:{_ABBREVIATIONS})\.(?!\w)|{_LETTER}(?:\.{_LETTER})*\.(?!{_LETTER})",
            rf"{_LETTER}&{_LETTER}(?!\w)|(?:at&t|c\+\+|c#)(?!\w)",
            r"[:;=][-o*]?[()dp](?!\w)",  # faces
            r"[-+]?\d+:\d\d(?=[ap]m\b)|\d+(?:[-/]\d+)+(?![\w-])",  # times, spans, fractions
            r"[^\W_]+(?:[.,]\d+)?(?:[-_/][^\W_]+)*(?:[-_][^\W_]+)+",  # joined
            rf"{_WORD}(?:[/_][^\W_]+)*",
            r"\d+[^\W\d_][^\W_]*(?:/[^\W_]+)*|[-+]?(?:\d*(?:[.:,]\d+)+)|\d+(?:/[^\W_]+)*|\d",  # numbers
            r"\.\.+|!(?:[!?])+|\?(?:[!?])+|--+|\*+|``|''|[^\w\s]|\w",
        )
    )
)


def ptb_tokens(caption: str) -> list[str]:
    """The tokens of a caption that scores are counted over.

    Args:
        caption: one sentence or several; line breaks count as spaces.
    """
    text = caption.lower()
    for mark, spelt in _SPELT.items():
        text = text.replace(mark, spelt)
    # A tag may hold spaces; the scorer splits at them once more.
    found = (part for match in _TOKEN.finditer(text) for part in _told(match.group()).split())
    return [token for token in found if token not in _REMOVED]


def _told(token: str) -> str:
    if len(token) > 1 and set(token) == {"."}:
        return "..."
    if len(token) > 1 and set(token) == {"-"}:
        return "--"
    if len(token) <= 3 and token[0] in _BRACKETS | {":": "", ";": "", "=": ""}:
        return "".join(_BRACKETS.get(mark, mark) for mark in token)
    return token
