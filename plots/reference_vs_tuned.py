"""Draws plots/reference_vs_tuned.png from the log.csv files in plots/logs: `python plots/reference_vs_tuned.py`."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
CURVES = {
    "reference recipe, published (full TinyStories)": ("published_reference.csv", dict(color="0.7", linewidth=5)),
    "reference recipe, ours": ("logs/reference.csv", dict(color="tab:blue", marker="o", markersize=3)),
    "tuned, 1.3 M tokens": ("logs/tuned_1.3M.csv", dict(color="tab:purple", marker="o", markersize=3)),
    "tuned, 1.95 M tokens": ("logs/tuned_2M.csv", dict(color="tab:red", marker="o", markersize=3)),
    "tuned, 4 M tokens": ("logs/tuned_4M.csv", dict(color="tab:orange", marker="o", markersize=3)),
    "tuned, 39 M tokens, early form (32 sequences, dropout 0.2)": ("logs/tuned_41M.csv", dict(color="tab:green", marker="o", markersize=3)),
}


def read(name: str) -> tuple[list[float], list[float]]:
    """Tokens trained on and validation loss of each row of a log."""
    with open(HERE / name, newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [float(row.get("tokens") or int(row["iteration"]) // 32 * 32 * 4096) for row in rows]  # whole updates of 32
    return tokens, [float(row["val_loss"]) for row in rows]


def main() -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for label, (name, style) in CURVES.items():
        axes.plot(*read(name), label=label, **style)
    axes.axhline(2.9633, color="0.5", linewidth=1, linestyle=":")
    axes.annotate("2.963: the published run's last point", (1.1e5, 2.9633), (1.1e5, 2.72), color="0.4", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(1e5, 6e7)
    axes.set_ylim(2, 10)
    axes.set_xlabel("tokens trained on, repeats counted (logarithmic)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("The same model: the reference recipe and ours")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(HERE / "reference_vs_tuned.png", dpi=120)


if __name__ == "__main__":
    main()
