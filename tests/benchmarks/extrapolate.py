"""What more tokens may bring: `python -m tests.benchmarks.extrapolate RUN [RUN ...]`.

Fits L = a + b T^-c, a power law of the tokens T (Hoffmann et al., 2022, section 3.3), to the last
validation losses of runs of one recipe, each with a schedule of its own length, and extends it.
That is an extrapolation, not a measurement. Its interval says what the noise of the losses does
to it, not whether the law holds so far out.
"""

from pathlib import Path

from config import Parser, UserError, add_flag, cli, notice

import numpy as np

from plots.loss_curve import print_table, read_run, write_figure

TARGETS = (41e6, 472e6)  # tokens: the reference run, and one pass over TinyStories
DRAWS = 2000  # of the noise


def main(argv: list[str]) -> None:
    parser = Parser("Fits a power law to the last losses of runs of one recipe, and extends it.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or log.csv")
    add_flag(parser, "noise", float, 0.01, "standard deviation of a loss, from seed to seed",
             at_least=0)
    add_flag(parser, "out", str, "plots/extrapolation.png", "the PNG to write")
    args = parser.parse_args(argv)
    last = [read_run(run).log[-1] for run in args.runs]
    points = np.array(sorted((row.get("tokens", 0), row["val_loss"]) for row in last))
    if not (np.isfinite(points) & (points > 0)).all():
        raise UserError("a last row without tokens, or without a finite loss, cannot be used")
    tokens, losses = points.T
    if len(set(tokens)) < 4:
        raise UserError("a curve of three numbers needs runs of four lengths, or more")
    law = fit(tokens, losses[None])
    noise = np.random.default_rng(0).normal(scale=args.noise, size=(DRAWS, len(losses)))
    draws = fit(tokens, losses + noise)
    a, b, c = law[0]
    print(f"L = {a:.3f} + {b:.3f} (T / 1 M)^-{c:.3f}")
    table = []
    for count in [*sorted(set(tokens)), *TARGETS]:
        low, high = np.quantile(predict(draws, count), (0.05, 0.95))
        measured = ", ".join(f"{loss:.3f}" for loss in losses[tokens == count])
        table.append([f"{count / 1e6:.2f} M", measured or "-", f"{predict(law, count)[0]:.3f}",
                      f"{low:.3f} to {high:.3f}"])
    print_table(["tokens", "measured", "fitted", "nine of ten draws of the noise"], table)
    longest = tokens.max()
    if len(set(tokens)) > 4:  # the law is tried where the answer is known
        shorter = tokens < longest
        said = predict(fit(tokens[shorter], losses[None, shorter]), longest)[0]
        print(f"from the shorter runs alone, for {longest / 1e6:.2f} M: {said:.3f}")
    draw(Path(args.out), tokens, losses, law, draws)
    notice(f"wrote {args.out}")


def fit(tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """a, b and c (draws, 3) for losses (draws, runs): least squares, with a not below zero.

    For a given c this is a linear problem in a and b; c is the best of a fine grid.
    """
    best = np.full((len(losses), 4), np.inf)  # squared error, a, b, c
    for c in np.arange(0.02, 1.5, 0.001):
        power = (tokens / 1e6) ** -c
        a, b = np.linalg.pinv(np.stack([np.ones(len(tokens)), power], axis=1)) @ losses.T
        b = np.where(a < 0, losses @ power / (power @ power), b)  # the best without an a
        a = a.clip(min=0)
        errors = ((a[:, None] + b[:, None] * power - losses) ** 2).sum(axis=1)
        better = errors < best[:, 0]
        best[better] = np.stack([errors, a, b, np.full(len(a), c)], axis=1)[better]
    return best[:, 1:]


def predict(laws: np.ndarray, tokens: float) -> np.ndarray:
    a, b, c = laws.T
    return a + b * (tokens / 1e6) ** -c


def draw(path: Path, tokens: np.ndarray, losses: np.ndarray, law: np.ndarray,
         draws: np.ndarray) -> None:
    """Writes a PNG: the runs, the law, and the band of nine draws in ten."""
    from matplotlib.figure import Figure

    at = np.sort([*np.geomspace(tokens.min(), max(TARGETS)), tokens.max()])
    low, high = np.transpose([np.quantile(predict(draws, t), (0.05, 0.95)) for t in at])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(at, low, high, color="tab:blue", alpha=0.2)
    inside = at <= tokens.max()
    line = np.array([predict(law, t)[0] for t in at])
    axes.plot(at[inside], line[inside], color="tab:blue", label="fitted")
    outside = at >= tokens.max()
    axes.plot(at[outside], line[outside], "--", color="tab:blue", label="extrapolated, not run")
    axes.plot(tokens, losses, "ko", label="runs")
    for target in TARGETS:
        value, top = predict(law, target)[0], np.quantile(predict(draws, target), 0.95)
        axes.plot(target, value, "o", color="tab:blue", markerfacecolor="white")
        axes.annotate(f"{target / 1e6:.0f} M: {value:.2f}", (target, top), xytext=(0, 6),
                      textcoords="offset points", ha="center")
    axes.set(xlabel="tokens", xscale="log", ylabel="validation loss (nats per token)")
    axes.margins(x=0.07)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    write_figure(figure, path)


if __name__ == "__main__":
    cli(main)
