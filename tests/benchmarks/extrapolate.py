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
    counts = np.array([*sorted(set(tokens)), *TARGETS])
    for count, value, low, high in zip(counts, *curve_and_band(law, draws, counts), strict=True):
        measured = ", ".join(f"{loss:.3f}" for loss in losses[tokens == count])
        table.append([f"{count / 1e6:.2f} M", measured or "-", f"{value:.3f}",
                      f"{low:.3f} to {high:.3f}"])
    print_table(["tokens", "measured", "fitted", "nine of ten draws of the noise"], table)
    longest = tokens.max()
    if len(set(tokens)) > 4:  # the law is tried where the answer is known
        shorter = tokens < longest
        said = predict(fit(tokens[shorter], losses[None, shorter]), tokens[-1:])
        print(f"from the shorter runs alone, for {longest / 1e6:.2f} M: {said.item():.3f}")
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


def predict(laws: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The losses (draws, counts) of laws (draws, 3) after so many tokens (counts,)."""
    a, b, c = laws.T[..., None]
    return a + b * (tokens / 1e6) ** -c


def curve_and_band(law: np.ndarray, draws: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """The law's losses, and the bounds of nine draws in ten, each (counts,)."""
    return [predict(law, tokens)[0], *np.quantile(predict(draws, tokens), (0.05, 0.95), axis=0)]


def draw(path: Path, tokens: np.ndarray, losses: np.ndarray, law: np.ndarray,
         draws: np.ndarray) -> None:
    """Writes a PNG: the runs, the law, and the band of nine draws in ten."""
    from matplotlib.figure import Figure

    at = np.sort([*np.geomspace(tokens.min(), max(TARGETS)), tokens.max()])
    line, low, high = curve_and_band(law, draws, at)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(at, low, high, color="tab:blue", alpha=0.2)
    inside, outside = at <= tokens.max(), at >= tokens.max()
    axes.plot(at[inside], line[inside], color="tab:blue", label="fitted")
    axes.plot(at[outside], line[outside], "--", color="tab:blue", label="extrapolated, not run")
    axes.plot(tokens, losses, "ko", label="runs")
    targets = np.array(TARGETS)
    for target, value, _, top in zip(targets, *curve_and_band(law, draws, targets), strict=True):
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
