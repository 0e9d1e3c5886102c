"""Draws the losses of runs: `python -m plots.loss_curve out/a out/b`, and prints a table of them.

A single run is drawn as train.py draws it, which calls `draw_run` at evaluations. Several runs
share one axis; behind their names stand the settings in which they differ, which the run.json
beside a log.csv holds. A run that cannot be drawn is listed last, with the reason.
"""

import csv
import json
import os
import textwrap
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from config import Parser, UserError, add_flag, atomic_write, cli, notice

os.environ["MPLBACKEND"] = "agg"  # only files are drawn, whatever a notebook has set
PUBLISHED = Path(__file__).with_name("published_reference.csv")
NOT_COMPARED = ("data_dir", "out_dir", "plot_dir", "checkpoint_minutes")  # they change no loss
DIVERGED = 12.0  # nats per token; a model that knows nothing is at ln 50,257 = 10.8
OTHER_DATA, OTHER_CONTEXT = "other data", "other context"  # marks of runs in a table
WIDTH = 100  # columns of a table
Log = list[dict[str, float]]  # the rows of a log.csv


class RunLog(NamedTuple):
    """What a run's log.csv says, and its run.json where there is one."""

    name: str
    problem: str = ""  # why the run cannot be drawn; without one, `log` is not empty
    log: Log = []  # its rows, without those whose validation loss is NaN or above DIVERGED
    diverged: bool = False  # whether the last row was such a one
    settings: dict[str, Any] = {}
    changed: list[str] = []  # the settings that are not those of its preset
    data: str | None = None  # SHA-256 of the validation split
    final: str = "-"  # its final score, as the table shows it


def main(argv: list[str]) -> None:
    parser = Parser("Draws the losses of runs, and prints a table of them, the best first.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or log.csv, or LABEL=RUN")
    add_flag(parser, "x", str, None, "what the losses are drawn over (default: tokens)",
             choices=("tokens", "iteration", "seconds"))
    parser.add_argument("--log", action="store_true", help="a logarithmic x axis")
    add_flag(parser, "level", float, None, "a loss at which to draw a line")
    add_flag(parser, "top", float, None, "the highest loss that is shown")
    add_flag(parser, "out", str, None, "the picture, .png, .pdf or .svg; else plots/<run>.png, or "
             "plots/runs.png for several")
    args = parser.parse_args(argv)
    label, place, _ = locate(args.runs[0])
    name = label.replace("/", "-") or picture_name(place)
    if len(args.runs) > 1:
        name = "runs"
    out = picture_path(args.out or Path(__file__).with_name(f"{name}.png"))
    runs = read_runs(args.runs, args.x or "tokens")
    good = [run for run in runs if not run.problem]
    if not good:
        reasons = [f"{text}: {run.problem}" for text, run in zip(args.runs, runs, strict=True)]
        raise UserError("; ".join(reasons))
    first = good[0]
    plain = args.level is None and args.top is None and not args.x and not args.log
    plain = plain and "learning_rate" in first.log[0]
    if len(runs) == 1 and plain:  # as train.py draws it
        draw_run(out, first.name, first.log, published=first.settings.get("preset") == "reference")
    else:
        draw_runs(out, good, args.x or "tokens", "log" if args.log else "linear", args.level,
                  args.top)
    notice(f"wrote {out}")
    print_runs(runs)


def split_label(text: str) -> tuple[str, str]:
    """The label, if any, and the path of [LABEL=]PATH, where both may have more = in them."""
    parts = text.split("=")
    for i in range(len(parts)):
        path = os.path.expanduser("=".join(parts[i:]))
        if Path(path).exists():
            return "=".join(parts[:i]), path
    return "", os.path.expanduser(text)


def locate(text: str) -> tuple[str, Path, Path]:
    """Of [LABEL=]PATH: the label, and the absolute paths of the run and of its log. The log of a
    run a/b is a/b/log.csv, or a/b.csv as plots/logs/ has them.
    """
    label, path = split_label(text)
    log = Path(os.path.abspath(path))
    if log.is_dir():
        log = log / "log.csv"
    if log.name == "log.csv":
        return label, log.parent, log
    return label, Path(str(log).removesuffix(".csv")), log


def read_runs(texts: list[str], x: str = "tokens") -> list[RunLog]:
    """The runs that texts of the form [LABEL=]PATH name. A log without a column `x` is a problem of
    its run, as is a file that is missing or damaged.
    """
    labels, places, logs = zip(*map(locate, texts), strict=True)
    runs = []
    for label, name, log in zip(labels, tell_apart(places), logs, strict=True):
        run = RunLog(label or name)
        try:
            run = read_run(run, log, x)
        except UserError as problem:
            run = run._replace(problem=str(problem))
        except OSError as problem:
            run = run._replace(problem=f"{log.name}: {problem.strerror}")
        runs.append(run)
    return runs


def tell_apart(places: tuple[Path, ...]) -> list[str]:
    """Each path's last part, behind as many of its parents as tell it from the other paths."""
    names = []
    for place in places:
        others = [other.parts for other in places if other != place]
        count = 1
        while place.parts[-count:] in [parts[-count:] for parts in others]:
            count += 1
        names.append(str(Path(*place.parts[-count:])))
    return names


def model_names(checkpoints: list[str]) -> list[str]:
    """Short names that tell checkpoints apart; a run's folder stands for the model.pt in it."""
    places = [os.path.abspath(name).removesuffix(f"{os.sep}model.pt") for name in checkpoints]
    return tell_apart(tuple(map(Path, places)))


def read_run(run: RunLog, path: Path, x: str) -> RunLog:
    """The run with what its log and its run.json say. UserError if it cannot be drawn."""
    record = path.with_name("run.json")
    if path.name == "log.csv" and record.exists() and not path.exists():
        raise UserError("no evaluation yet, or it diverged before the first")
    rows = read_log(path)
    log = [row for row in rows if row["val_loss"] <= DIVERGED]  # NaN is not
    if not log:
        raise UserError(f"it diverged: it has no validation loss below {DIVERGED:g}")
    if x not in log[0]:
        raise UserError(f"its log has no {x}: choose another --x")
    run = run._replace(log=log, diverged=rows[-1] is not log[-1])
    if path.name != "log.csv" or not record.exists():
        return run
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        settings, changed, final = dict(facts["settings"]), list(facts["differs"]), facts["final"]
        data, score = facts.get("data", {}).get("hashes", {}).get("val"), "-"
        if final:
            score = f"{final['val_loss']:.4f}"
            if final["tokens_scored"] < final["tokens"] - 1:  # nothing stands before the first
                score += f" on {final['tokens_scored'] / final['tokens']:.1%}"
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError("run.json is not a run.json of train.py") from None
    return run._replace(settings=settings, changed=changed, data=data, final=score)


def read_log(path: Path) -> Log:
    """The rows of a log.csv. UserError if it is none."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.append({name: float(value) for name, value in row.items()})
    except (ValueError, TypeError, csv.Error):  # not UTF-8, or a row is not one of numbers
        rows = []
    if not rows or not {"iteration", "train_loss", "val_loss"} <= rows[0].keys():
        raise UserError(f"{path.name} is not a log.csv of train.py")
    return rows


def best_row(run: RunLog) -> dict[str, float]:
    return min(run.log, key=lambda row: row["val_loss"])


def print_runs(runs: list[RunLog]) -> None:
    """Prints the table: the best run first, then those that diverged, then what is not drawn."""
    good = [run for run in runs if not run.problem]
    good.sort(key=lambda run: (run.diverged, best_row(run)["val_loss"]))
    rows = []
    for run in good:
        last, best = run.log[-1], best_row(run)
        counts = [f"{last[x]:,.0f}" if x in last else "-" for x in ("tokens", "seconds")]
        rows.append([run.name, f"{best['val_loss']:.4f}", run.final, f"{best['train_loss']:.4f}",
                     *counts, remarks(run, good) or "-"])
    for run in runs:
        if run.problem:
            rows.append([run.name, *"-----", f"not drawn: {run.problem}"])
    print_table(["run", "val loss", "final score", "train loss", "tokens", "seconds", "remarks"],
                rows)
    if any(mark in row[-1] for mark in (OTHER_DATA, OTHER_CONTEXT) for row in rows):
        notice("losses on other data, or with another context, do not compare")


def remarks(run: RunLog, runs: list[RunLog]) -> str:
    """What tells the run from the others: marks, and the settings that not all of them share. Of
    runs of several presets: the preset, and what the run changed of it.
    """
    marks = ["diverged"] if run.diverged else []
    if is_odd(run.data, [other.data for other in runs]):
        marks.append(OTHER_DATA)
    if is_odd(run.settings.get("block_size"), [r.settings.get("block_size") for r in runs]):
        marks.append(OTHER_CONTEXT)
    known = [other.settings for other in runs if other.settings]
    varied = []
    for name, value in run.settings.items():
        if name not in NOT_COMPARED and any(other.get(name) != value for other in known):
            varied.append(name)
    if "preset" in varied:
        varied = [name for name in varied if name == "preset" or name in run.changed]
    return ", ".join(marks + [f"{name} {run.settings[name]}" for name in varied])


def is_odd(value: Any, values: list[Any]) -> bool:
    """Whether a value is known and differs from the most common one, of a tie the first."""
    known = Counter(other for other in values if other is not None)
    return value is not None and value != known.most_common(1)[0][0]


def print_table(header: list[str], rows: list[list[str]], gap: str = "  ") -> None:
    """Columns on stdout, `gap` between them: words to the left, numbers to the right. Where they
    are wider than WIDTH, the widest columns of words are wrapped.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = []
    for place, (_, *cells) in enumerate(columns):
        if any(cell[:1].isalpha() or len(cell) > 20 for cell in cells):
            words.append(place)
    while words and sum(widths) + len(gap) * (len(widths) - 1) > WIDTH:
        widest = max(words, key=widths.__getitem__)
        if widths[widest] <= 8:  # what is narrower cannot be read: the table stays too wide
            break
        widths[widest] -= 1
    for row in [header, *rows]:
        wrapped = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*wrapped, fillvalue=""):
            cells = []
            for place, cell in enumerate(line):
                align = str.ljust if place in words else str.rjust
                cells.append(align(cell, widths[place]))
            print(printable(gap.join(cells).rstrip()))


def picture_name(out_dir: Path) -> str:
    """The name of a run's picture: the parts of `out_dir` below out/, joined by a hyphen, as in
    a-run for out/a/run; outside out/ the last part.
    """
    parts = Path(os.path.abspath(out_dir)).parts
    below = parts[-1:]
    for place, part in enumerate(parts[:-1]):
        if part == "out":
            below = parts[place + 1 :]
    return "-".join(below)


def draw_run(path: Path, title: str, log: Log, planned: list[tuple[int, float]] | None = None,
             published: bool = False) -> None:
    """Writes a picture: losses over iterations, and the learning rate below them.

    `planned` is the schedule, pairs of iteration and rate: a line behind the dots, which are the
    rates that were used. `published` draws the reference run's losses behind the others.
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


def draw_runs(path: Path, runs: list[RunLog], x: str, scale: str, level: float | None,
              top: float | None) -> None:
    """Writes a picture: the validation losses of all runs over `x`, a column of their logs.

    `scale` is that of the x axis, "linear" or "log"; `level` a loss at which to draw a line; `top`
    the highest loss that is shown.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure, published = Figure(figsize=(9, 5.5), layout="constrained"), read_log(PUBLISHED)
    axes = figure.subplots()
    for run in runs:
        label = textwrap.fill(f"{run.name}: {remarks(run, runs)}".removesuffix(": "), 70)
        # matplotlib hides a label that begins with "_", and reads "$a$" as a formula.
        label = " " + printable(label).replace("$", r"\$")
        style = {"color": "0.7", "linewidth": 5} if run.log == published else {"marker": "."}
        axes.plot([row[x] for row in run.log], [row["val_loss"] for row in run.log],
                  label=label, **style)
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, linestyle=":")
        axes.text(0.99, level, f"{level:g}", transform=axes.get_yaxis_transform(), va="top",
                  ha="right")
    axes.set(xlabel=x, xscale=scale, ylabel="validation loss (nats per token)")
    axes.set_ylim(top=top)
    axes.xaxis.set_major_formatter(EngFormatter())  # 10 M, not 1e7
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    write_figure(figure, path)


def printable(text: str) -> str:
    """The text with ? for what a file name may hold and no font can show."""
    return text.encode("utf-8", "replace").decode()


def picture_path(path: str | Path) -> Path:
    """The path. UserError if its ending is not that of a picture that can be written."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"the name of a picture ends in .png, .pdf or .svg, unlike {path}")
    return path


def write_figure(figure: Any, path: Path) -> None:
    """Writes the figure in the format that the path's ending names, see `picture_path`."""
    kind = picture_path(path).suffix.lower().removeprefix(".")
    with atomic_write(path) as partial:
        figure.savefig(partial, format=kind, dpi=120)


if __name__ == "__main__":
    cli(main)
