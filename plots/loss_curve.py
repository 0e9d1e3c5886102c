"""Draws the losses of runs: `python -m plots.loss_curve out/a out/b`, and prints a table of them.

One run is drawn as train.py draws it, which calls `draw_run` at evaluations. Several share one
axis, and are named by the settings in which they differ, which run.json beside a log.csv holds.
"""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from config import Parser, UserError, add_flag, atomic_write, cli, notice

os.environ["MPLBACKEND"] = "agg"  # only files are drawn, whatever a notebook has set
PUBLISHED = Path(__file__).with_name("published_reference.csv")
NOT_COMPARED = ("out_dir", "plot_dir", "checkpoint_minutes")  # settings that make no other run
Log = list[dict[str, float]]  # the rows of a log.csv


class Run(NamedTuple):
    """A log, by its folder's name or the user's, and what run.json says, where there is one."""

    name: str
    log: Log
    settings: dict[str, Any]
    own: list[str]  # settings that are not its preset's
    final: str  # its final score, as the table shows it


def main(argv: list[str]) -> None:
    parser = Parser("Draws the losses of runs, and prints a table of them, the best first.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or log.csv, or LABEL=RUN")
    add_flag(parser, "x", str, None, "what the losses are drawn over (default: tokens)",
             one_of=("tokens", "iteration", "seconds"))
    parser.add_argument("--log", action="store_true", help="a logarithmic x axis")
    add_flag(parser, "level", float, None, "a loss at which to draw a line")
    add_flag(parser, "out", str, None, "the PNG; else plots/<run>.png, plots/runs.png for several")
    args = parser.parse_args(argv)
    runs = [read_run(text) for text in args.runs]
    first, single = runs[0], len(runs) == 1
    name = first.name.replace("/", "-") if single else "runs"
    out = Path(args.out or Path(__file__).with_name(f"{name}.png"))
    plain = args.level is None and not args.x and not args.log and "learning_rate" in first.log[0]
    if single and plain:  # as train.py draws it
        draw_run(out, first.name, first.log, published=first.settings.get("preset") == "reference")
    else:
        draw_runs(out, runs, args.x or "tokens", "log" if args.log else "linear", args.level)
    notice(f"wrote {out}")
    rows = []
    for run in sorted(runs, key=lambda run: min(row["val_loss"] for row in run.log)):
        last, best = run.log[-1], min(run.log, key=lambda row: row["val_loss"])
        counts = [f"{last[x]:,.0f}" if x in last else "-" for x in ("tokens", "seconds")]
        losses = [f"{best[name]:.4f}" for name in ("train_loss", "val_loss")]
        rows.append([run.name, differences(run, runs) or "-", *counts, *losses, run.final])
    print_table(["run", "differs in", "tokens", "seconds", "train loss", "val loss", "final score"],
                rows)


def read_run(text: str) -> Run:
    """The run that [LABEL=]PATH names. UserError if there is none, or it cannot be read."""
    label, _, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
    log = Path(path).expanduser()
    log = log / "log.csv" if log.is_dir() else log
    name = log.resolve().parent.name if log.name == "log.csv" else log.stem
    record, score = log.with_name("run.json"), "-"
    facts: dict[str, Any] = {"settings": {}, "differs": {}, "final": None}
    try:
        if log.name == "log.csv" and record.exists():
            facts = json.loads(record.read_text(encoding="utf-8"))
        settings, own, final = dict(facts["settings"]), list(facts["differs"]), facts["final"]
        if final:
            score = f"{final['val_loss']:.4f}"
            if final["tokens_scored"] < final["tokens"] - 1:  # nothing stands before the first
                score += f" on {final['tokens_scored']:,} of {final['tokens']:,} tokens"
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{record} is not a run.json of train.py") from None
    return Run(printable(label or name), read_log(log), settings, own, score)


def read_log(path: Path) -> Log:
    """The rows of a log.csv. UserError if it is none."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.append({name: float(value) for name, value in row.items()})
                if math.isnan(rows[-1]["val_loss"]):  # of a run that diverged: the worst there is
                    rows[-1]["val_loss"] = math.inf
    except (ValueError, TypeError, KeyError, csv.Error):  # not UTF-8, numbers, or these columns
        rows = []
    if not rows or not {"iteration", "train_loss"} <= rows[0].keys():
        raise UserError(f"{path} is not a log.csv of train.py")
    return rows


def differences(run: Run, runs: list[Run]) -> str:
    """The settings that the run does not share with all others, in words. Of runs of several
    presets: the preset, and what the run changed of it.
    """
    known = [other.settings for other in runs if other.settings]
    varied = []
    for name, value in run.settings.items():
        if name not in NOT_COMPARED and any(other.get(name) != value for other in known):
            varied.append(name)
    if "preset" in varied:
        varied = [name for name in varied if name == "preset" or name in run.own]
    return printable(", ".join(f"{name} {run.settings[name]}" for name in varied))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns on stdout: words to the left, numbers to the right."""
    columns = []
    for head, *cells in zip(header, *rows, strict=True):
        words = any(cell[:1].isalpha() for cell in cells)
        align, width = str.ljust if words else str.rjust, max(map(len, [head, *cells]))
        columns.append([align(cell, width) for cell in [head, *cells]])
    for row in zip(*columns, strict=True):
        print("  ".join(row).rstrip())


def draw_run(path: Path, title: str, log: Log, planned: list[tuple[int, float]] | None = None,
             published: bool = False) -> None:
    """Writes a PNG: losses over iterations, the learning rate below.

    `planned` is the schedule, (iteration, rate), a line behind the dots of the rates that were
    used. `published` puts the reference run's curve behind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if published:
        rows = read_log(PUBLISHED)
        losses.plot([row["iteration"] for row in rows], [row["val_loss"] for row in rows],
                    color="0.7", linewidth=5, label="validation, published reference run")
    at = [row["iteration"] for row in log]
    losses.plot(at, [row["train_loss"] for row in log], "o-", markersize=3, label="train")
    losses.plot(at, [row["val_loss"] for row in log], "o-", markersize=3, label="validation")
    losses.set_title(printable(title), parse_math=False)
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    if planned:
        rates.plot(*zip(*planned, strict=True), color="tab:green")
    rates.plot(at, [row["learning_rate"] for row in log], "o", markersize=3, color="tab:green")
    rates.set(xlabel="iteration", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    write_figure(figure, path)


def draw_runs(path: Path, runs: list[Run], x: str, scale: str, level: float | None) -> None:
    """Writes a PNG: the validation losses of all runs over `x`, a column of their logs."""
    from matplotlib.figure import Figure

    figure, published = Figure(figsize=(9, 5.5), layout="constrained"), read_log(PUBLISHED)
    axes = figure.subplots()
    for run in runs:
        if x not in run.log[0]:
            raise UserError(f"the log of {run.name} has no {x}: choose another --x")
        label = f" {run.name}: {differences(run, runs)}".removesuffix(": ").replace("$", r"\$")
        at, losses = [row[x] for row in run.log], [row["val_loss"] for row in run.log]
        style = {"color": "0.7", "linewidth": 5} if run.log == published else {"marker": "."}
        axes.plot(at, losses, label=label, **style)  # "_a" would be hidden, "$a$" a formula
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, linestyle=":")
        axes.text(0.01, level, f"{level:g}", transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(xlabel=x, xscale=scale, ylabel="validation loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    write_figure(figure, path)


def printable(text: str) -> str:
    """The text with ? for what a file name may hold and no font can show."""
    return text.encode("utf-8", "replace").decode()


def write_figure(figure: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


if __name__ == "__main__":
    cli(main)
