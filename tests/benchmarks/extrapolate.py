"""What more tokens may bring: `python -m tests.benchmarks.extrapolate RUN [RUN ...]`.

Fits L = a + b T^-c, a power law of the tokens T (Hoffmann et al., 2022, section 3.3), to the last
validation losses of runs of one recipe, each with a schedule of its own length, and extends it.
That is an extrapolation, not a measurement. Its band holds refits: without some of the runs, with
a given floor a, with noise added to the losses. Whether the law holds so far out nobody knows.
"""

from pathlib import Path

from config import Parser, UserError, add_flag, cli, notice

import numpy as np

from plots.loss_curve import picture_path, print_table, read_runs, write_figure

TARGETS = np.array([41e6, 472e6])  # tokens: the reference run, and one pass over TinyStories
FLOORS = (0.9, 1.0, 1.1, 1.2, 1.3)  # nats per token
Laws = dict[str, np.ndarray]  # a, b and c of laws (laws, 3), by what they were fitted to


def main(argv: list[str]) -> None:
    parser = Parser("Fits a power law to the last losses of runs of one recipe, and extends it.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or log.csv")
    add_flag(parser, "noise", float, 0.01, "standard deviation of a loss over seeds", low=0)
    add_flag(parser, "out", str, "plots/extrapolation.png", "the picture: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    out, points = picture_path(args.out), []
    for text, run in zip(args.runs, read_runs(args.runs), strict=True):
        if run.problem or run.diverged or not 0 < run.log[-1]["tokens"] < np.inf:
            raise UserError(f"{text} cannot be used: {run.problem or 'look at its last row'}")
        points.append((run.log[-1]["tokens"], run.log[-1]["val_loss"]))
    tokens, losses = np.array(sorted(points)).T
    if len(set(tokens)) < 4:
        raise UserError("a curve of three numbers needs runs of four lengths, or more")
    laws = refits(tokens, losses, args.noise)
    print_laws(tokens, losses, laws)
    draw_law(out, tokens, losses, laws)
    notice(f"wrote {out}")


def refits(tokens: np.ndarray, losses: np.ndarray, noise: float) -> Laws:
    """The laws of all runs, without those of one length, without the two shortest lengths (of five
    or more), of all runs with each of FLOORS, and with normal noise of so many nats added.
    """
    laws = {"all runs": fit(tokens, losses[None])}
    lengths = sorted(set(tokens))
    left_out = [[length] for length in lengths]
    if len(lengths) > 4:
        left_out.append(lengths[:2])
    for some in left_out:
        kept = ~np.isin(tokens, some)
        name = "without " + " and ".join(f"{length / 1e6:.2f} M" for length in some)
        laws[name] = fit(tokens[kept], losses[None, kept])
    for floor in FLOORS:
        laws[f"a = {floor}"] = fit(tokens, losses[None], floor)
    added = np.random.default_rng(0).normal(scale=noise, size=(2000, len(losses)))
    return laws | {"nine of ten draws of the noise": fit(tokens, losses + added)}


def fit(tokens: np.ndarray, losses: np.ndarray, floor: float | None = None) -> np.ndarray:
    """a, b and c (laws, 3) for losses (laws, runs): least squares, with a not below zero, or with
    `floor` as a. For a given c the problem is linear in a and b; c is the best of a fine grid.
    """
    best = np.full((len(losses), 4), np.inf)  # squared error, a, b, c
    for c in np.arange(0.02, 1.5, 0.001):
        power = (tokens / 1e6) ** -c
        a = np.linalg.pinv(np.stack([np.ones(len(tokens)), power], axis=1))[0] @ losses.T
        a = a.clip(min=0) if floor is None else np.full(len(losses), floor)
        b = (losses - a[:, None]) @ power / (power @ power)  # the best for this a
        errors = ((a[:, None] + b[:, None] * power - losses) ** 2).sum(axis=1)
        better = errors < best[:, 0]
        best[better] = np.stack([errors, a, b, np.full(len(a), c)], axis=1)[better]
    return best[:, 1:]


def predict(laws: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The losses (laws, counts) of laws (laws, 3) after so many tokens (counts,)."""
    a, b, c = laws.T[..., None]
    return a + b * (tokens / 1e6) ** -c


def bounds(laws: Laws, tokens: np.ndarray) -> np.ndarray:
    """The lowest and the highest losses by all laws, of the noise nine of ten: (2, counts)."""
    some = [np.quantile(predict(law, tokens), (0.05, 0.95), axis=0) for law in laws.values()]
    return np.array([np.min(some, axis=(0, 1)), np.max(some, axis=(0, 1))])


def print_laws(tokens: np.ndarray, losses: np.ndarray, laws: Laws) -> None:
    """The law of all runs beside what was measured, and all refits, for the longest run too."""
    law, counts = laws["all runs"], np.array([*sorted(set(tokens)), *TARGETS])
    print("L = {:.3f} + {:.3f} (T / 1 M)^-{:.3f}".format(*law[0]))
    table, ranges = [], [f"{low:.3f} to {high:.3f}" for low, high in bounds(laws, counts).T]
    for count, value, band in zip(counts, predict(law, counts)[0], ranges, strict=True):
        measured = ", ".join(f"{loss:.3f}" for loss in losses[tokens == count])
        table.append([f"{count / 1e6:.2f} M", measured or "-", f"{value:.3f}", band])
    print_table(["tokens", "measured", "fitted", "band"], table)
    print()
    counts, table = np.array([tokens.max(), *TARGETS]), []
    for name, law in laws.items():
        cells = [f"{number:.3f}" for number in (*law[0], *predict(law, counts)[0])]
        if len(law) > 1:
            ranges = [f"{low:.3f} to {high:.3f}" for low, high in bounds({name: law}, counts).T]
            cells = ["-"] * 3 + ranges
        table.append([name, *cells])
    print_table(["refit", "a", "b", "c", *[f"{count / 1e6:.2f} M" for count in counts]], table)


def draw_law(path: Path, tokens: np.ndarray, losses: np.ndarray, laws: Laws) -> None:
    """Writes a picture: the runs, the law of all of them, and the band."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    at = np.geomspace(tokens.min(), TARGETS.max())
    axes.fill_between(at, *bounds(laws, at), color="tab:blue", alpha=0.2, label="refits")
    inside = np.geomspace(tokens.min(), tokens.max())
    for some, style, label in ((inside, "-", "fitted"), (at, "--", "extrapolated, not run")):
        axes.plot(some, predict(laws["all runs"], some)[0], style, color="tab:blue", label=label)
    axes.plot(tokens, losses, "ko", label="runs")
    for target, low, high in zip(TARGETS, *bounds(laws, TARGETS), strict=True):
        axes.annotate(f"{target / 1e6:.0f} M: {low:.2f} to {high:.2f}", (target, low), ha="right",
                      xytext=(0, -14), textcoords="offset points")
    axes.set(xlabel="tokens", xscale="log", ylabel="validation loss (nats per token)", ymargin=0.1)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    write_figure(figure, path)


if __name__ == "__main__":
    cli(main)
