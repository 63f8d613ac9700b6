"""The demo's last step: a short summary on the terminal and two plots.

OUT/idf.parquet    -> PLOTS/idf.png    IDF over rank, some tokens named
RUN/metrics.jsonl  -> PLOTS/loss.png   loss over samples
probe.json         -> the accuracies, as text
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq

mpl.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING_STEPS = 25
NAMED_TOKENS = 14
ACCENT, FAINT = "#1f5fa8", "#b8c7da"


def plot_loss(run: Path, path: Path) -> tuple[float, float]:
    """Draw the loss over samples; return the first and last smoothed values."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    samples = np.array([line["samples"] for line in steps])
    losses = np.array([line["loss"] for line in steps])
    width = min(SMOOTHING_STEPS, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    axes.plot(samples, losses, color=FAINT, linewidth=0.8, label="every step")
    axes.plot(
        np.convolve(samples, np.ones(width) / width, mode="valid"),
        smooth,
        color=ACCENT,
        linewidth=1.8,
        label=f"mean of {width} steps",
    )
    axes.set(xlabel="samples seen", ylabel="loss (nats)", title="Pre-training by classification: loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return float(smooth[0]), float(smooth[-1])


def plot_idf(out: Path, path: Path) -> None:
    """Draw IDF over the rank of all tokens that occur, naming some along the curve."""
    table = pq.read_table(out / "idf.parquet")
    frequency = table["document_frequency"].to_numpy()
    order = np.argsort(-frequency, kind="stable")[: int((frequency > 0).sum())]
    idf, tokens = table["idf"].to_numpy()[order], [table["token"][int(row)].as_py() for row in order]
    ranks = np.arange(1, len(order) + 1)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    axes.semilogx(ranks, idf, color=ACCENT, linewidth=1.8)
    # Whole words only, evenly spaced on the logarithmic axis, names above and below the curve in turn.
    words = [
        rank
        for rank in range(len(order))
        if tokens[rank].endswith("</w>") and tokens[rank][:-4].isascii() and tokens[rank][0].isalpha()
    ]
    wanted = np.geomspace(1, len(order), NAMED_TOKENS)
    for number, rank in enumerate(
        sorted({min(words, key=lambda word: abs(np.log((word + 1) / position))) for position in wanted})
    ):
        above = number % 2 == 0
        axes.plot(rank + 1, idf[rank], "o", color=ACCENT, markersize=3)
        axes.annotate(
            tokens[rank].removesuffix("</w>"),
            (rank + 1, idf[rank]),
            xytext=(-6, 9) if above else (6, -12),
            textcoords="offset points",
            ha="right" if above else "left",
            fontsize=8,
        )
    axes.set(
        xlabel="rank of the token by document frequency",
        ylabel="IDF (nats)",
        title="Inverse document frequency of caption tokens",
    )
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def print_probe(probe: Path) -> None:
    """The accuracies, one encoder a line."""
    result = json.loads(probe.read_text(encoding="utf8"))
    print(f"linear probe, {len(result['classes'])} classes, top-1 on {result['test']['samples']} held-out drawings:")
    for row in result["results"]:
        spread = f" +- {row['top1_std']:.1%} over seeds" if row["top1_std"] is not None else ""
        print(f"  {row['encoder']:<22} {row['top1']:.1%}{spread}  (test-size noise {row['top1_standard_error']:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in (
        ("out", "output folder of build-labels"),
        ("run", "folder of train run"),
        ("probe", "result of train probe"),
        ("plots", "folder of the plots"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=meaning)
    arguments = parser.parse_args()
    arguments.plots.mkdir(parents=True, exist_ok=True)
    first, last = plot_loss(arguments.run, arguments.plots / "loss.png")
    plot_idf(arguments.out, arguments.plots / "idf.png")
    print(f"loss: {first:.3f} -> {last:.3f} nats")
    print_probe(arguments.probe)
    print(f"plots: {arguments.plots / 'loss.png'}, {arguments.plots / 'idf.png'}")


if __name__ == "__main__":
    main()
