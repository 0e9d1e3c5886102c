"""Shows what a model has learnt, by forced choices: `python -m plots.abilities`.

An item is a context and two continuations, of which one is right: "Lily saw a dog. Then" goes on
with "she", not "he". The model chooses the likelier one. Behind its twin's context ("Tom saw ...")
the two change places, so that a model that merely likes the word "she" has one of the twins right.
"""

import csv
import math
from collections import defaultdict
from pathlib import Path

from config import Parser, UserError, add_flag, cli, notice

import torch
import torch.nn.functional as F

from model import GPT, load_file, pick_device
from plots.loss_curve import model_names, picture_path, print_table, split_label, write_figure
from prepare_data import encode_text
from sample import newest_checkpoint, read_model

PAIRS = Path(__file__).with_name("pairs.csv")  # each row's twin stands beside it


def main(argv: list[str]) -> None:
    parser = Parser("Prints the share of forced choices that models get right, by category.")
    parser.add_argument("--checkpoint", nargs="+", metavar="PATH", help="models that "
                        "sample.py reads, or LABEL=PATH (default: the newest out/*/model.pt)")
    add_flag(parser, "out", str, None, "the picture to write; else plots/abilities.png for several")
    add_flag(parser, "device", str, "auto", "where to run: auto, cpu, mps, cuda or cuda:N")
    args = parser.parse_args(argv)
    out = picture_path(args.out or Path(__file__).with_suffix(".png"))
    device, header, columns, lines = pick_device(args.device), ["right (chance: 50%)"], [], {}
    checkpoints = args.checkpoint or [newest_checkpoint()]
    if not args.checkpoint:
        notice(f"reading {checkpoints[0]}")
    for name, short in zip(checkpoints, model_names(checkpoints), strict=True):
        label, path = split_label(name)
        if not Path(path).exists():  # the Hub's
            label, _, path = name.rpartition("=")
        model, path = read_model(path)
        facts = load_file(Path(path)) if Path(path).is_file() else {}
        shares = category_shares(choices(model.to(device), path))
        header.append(label or short)
        cells = [f"{mean:.1%} ± {error:.1%}" for mean, error in shares.values()]
        tokens, loss = (facts.get(fact, math.nan) for fact in ("tokens", "val_loss"))
        cells += [text.replace("nan", "-") for text in (f"{tokens:,.0f}", f"{loss:.4f}")]
        columns.append(cells)
        line = label or (model.config.preset if facts else Path(path).name)
        lines.setdefault(line, []).append((tokens, shares))
    rows = zip([*shares, "tokens", "val loss"], *columns, strict=True)
    print_table(header, [list(row) for row in rows])
    if args.out or len(columns) > 1:
        draw(out, lines)


def choices(model: GPT, name: str) -> list[dict]:
    """pairs.csv's rows, with "margin" (right less wrong, in nats). UserError if one is too long."""
    rows = list(csv.DictReader(PAIRS.read_text(encoding="utf-8").splitlines()))
    batches = defaultdict(list)  # of contexts of one length
    for row in rows:
        context = encode_text(row["context"]).tolist()
        ids = [context + encode_text(f" {row[side]}").tolist() for side in ("right", "wrong")]
        batches[len(context), len(ids[0])].append((row, ids))
    longest, size = max(length for _, length in batches) - 1, model.config.block_size
    if longest > size:
        raise UserError(f"{name} reads {size} tokens, an item of {PAIRS.name} has {longest}")
    for (start, _), batch in batches.items():
        items, ids = zip(*batch, strict=True)
        scores = log_probability(model, torch.tensor(ids).flatten(0, 1), start).view(-1, 2)
        for row, (right, wrong) in zip(items, scores.tolist(), strict=True):
            row["margin"] = right - wrong
    return rows


@torch.no_grad()
def log_probability(model: GPT, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The sums (B,) of the log-probabilities of ids (B, T) from token `start` on, in nats."""
    ids, head = ids.to(model.transformer.wte.weight.device), model.transformer.wte.weight
    logs = F.linear(model.features(ids[:, :-1])[:, start - 1 :], head).log_softmax(2)
    return logs.gather(2, ids[:, start:].unsqueeze(2)).sum((1, 2))


def category_shares(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Each category's share right and its standard error: twins are dependent, so over pairs."""
    shares = {}
    for category in dict.fromkeys(row["category"] for row in rows):
        margins = torch.tensor([row["margin"] for row in rows if row["category"] == category])
        twins = ((1 + margins.sign()) / 2).view(-1, 2).mean(1)  # an even choice is half right
        shares[category] = twins.mean().item(), twins.std().item() / math.sqrt(len(twins))
    return shares


def draw(path: Path, lines: dict[str, list[tuple[float, dict]]]) -> None:
    """Writes a picture: a panel for each category, its share right over tokens (NaN: not drawn)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.subplots(2, 5, sharex=True, sharey=True).flatten()
    for label, line in lines.items():
        tokens, shares = zip(*line, strict=True)
        for axes, category in zip(grid, shares[0], strict=True):
            means, errors = zip(*(each[category] for each in shares), strict=True)
            axes.errorbar(tokens, means, errors, fmt=".-", label=label)
            axes.axhline(0.5, color="0.5", linewidth=1, linestyle=":")
            axes.set_xscale("symlog", linthresh=1e5)  # shows an untrained model, at 0, too
            axes.set(title=category, ylim=(0, 1.05))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("tokens trained on")
    figure.supylabel("share right (dotted: chance)")
    write_figure(figure, path)
    notice(f"wrote {path}")


if __name__ == "__main__":
    cli(main)
