"""The results of check.py as Markdown: the machine, then a table for each phase."""

from typing import Any

TITLES = {
    "correctness": "a. Correctness",
    "losses": "b. Head and loss",
    "training": "c. Training step",
    "loading": "d. Loader",
    "demo": "e. Demo",
}


def markdown(report: dict[str, Any]) -> str:
    """`report`: `machine` (facts by name), `phases` by name: `state`, `seconds` and `rows` (see kit.py)."""
    rows = [row for phase in report["phases"].values() for row in phase["rows"]]
    counts = {answer: sum(row["ok"] is value for row in rows) for answer, value in (("met", True), ("missed", False))}
    spent = f", {report['seconds']} s" if "seconds" in report else ", not finished"
    size = ", small sizes" if report["small"] else ""
    lines = [f"# Check on {report['device']}{size}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- goals: {counts['met']} met, {counts['missed']} missed{spent}", ""]
    for name, phase in report["phases"].items():
        lines += [f"## {TITLES[name]} ({phase['state']}, {phase['seconds']} s)", ""]
        if phase["rows"]:
            lines += ["| | result | goal | met | s |", "|---|---|---|---|---|", *map(row_line, phase["rows"]), ""]
    return "\n".join(lines)


def row_line(row: dict[str, Any]) -> str:
    met = {True: "yes", False: "**no**", None: ""}[row["ok"]]
    cells = (row["name"], row["text"], row["goal"], met, row["seconds"])
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
