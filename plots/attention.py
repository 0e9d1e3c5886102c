"""Shows what a model's attention heads look at: `python -m plots.attention --data_dir data/toy`.

A picture of every head's attention over a prompt, or of one head's, beside the tokens that the
model expects next; and a table of where each head looks and what it is worth, which says below
it what its columns are. A text's first token can only look at itself: its row counts nowhere.
"""

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config import DEVICE, TEXT, Parser, UserError, add_flag, cli, notice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import GPT, load_model, pick_device, pick_dtype
from plots.loss_curve import print_table, write_figure
from prepare_data import END_OF_TEXT, load_meta, open_split, token_bytes, tokenizer
from sample import newest_checkpoint, read_prompt

WINDOWS = 256  # of the validation split
COVERED = 0.9999  # of the model's probability, see `silence_each`
NAMES = {"first": "first token", "itself": "itself", "previous": "previous token",
         "same": "same token", "after": "induction"}
NAMED_FROM, BROAD_FROM = 0.4, 0.75
LEGEND = f"""
back: how many tokens back the head looks, on average; bits: the entropy of its attention; then
the share of it on the first token, on the token itself, on the one before, and, where there are
any, on earlier copies of the token and on what followed those (induction).
does: the largest of these shares, from {NAMED_FROM:.0%} on; else broad, if the entropy is at least
{BROAD_FROM:.0%} of even attention's; else mixed.
worth: the rise of the validation loss when this head alone is silenced, and its standard error;
0 if below two of these."""
Table = dict[str, Tensor]  # figures of every head, each (blocks, heads)


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    prompt, device = read_prompt(args.prompt), pick_device(args.device)
    checkpoint = args.checkpoint or newest_checkpoint()
    model = load_model(checkpoint).to(device)
    config, one = model.config, None if args.layer is None else (args.layer, args.head)
    if config.vocab_size != END_OF_TEXT + 1:
        raise UserError(f"{checkpoint} has {config.vocab_size} token ids, not GPT-2's 50257")
    if one and (one[0] >= config.n_layer or one[1] >= config.n_head):
        raise UserError(f"there is no layer {one[0]}, head {one[1]}: {checkpoint} has layers up to "
                        f"{config.n_layer - 1} and heads up to {config.n_head - 1}")
    ids = torch.tensor(tokenizer().encode_ordinary(prompt) or [END_OF_TEXT], device=device)
    size = config.block_size
    if len(ids) > size:
        notice(f"warning: the prompt is {len(ids)} tokens: only its last {size}, a context, count")
        ids = ids[-size:]
    windows, rises = ids.unsqueeze(0), None
    if args.data_dir:
        windows = validation_windows(args.data_dir, size).to(device)
    table = head_table(model, windows[:, :size])
    draw(Path(args.out), model, ids, table, one)
    notice(f"wrote {args.out}")
    where = f"the prompt's {len(ids)} tokens; --data_dir looks at validation text"
    if args.data_dir:
        loss, rises = silence_each(model, windows, pick_dtype("auto", device))
        where = f"{len(windows)} windows of {size} tokens of {args.data_dir}, loss {loss:.4f}"
    print_heads(table, rises)
    print(f"Over {where}.")


def parse_command_line(argv: list[str]) -> Any:
    parser = Parser("Draws what a model's attention heads look at, and prints a table of them.")
    add_flag(parser, "checkpoint", str, None, "what sample.py takes; the newest out/*/model.pt if "
             "not given")
    add_flag(parser, "prompt", str, "Once upon a time", "what they look at; - reads standard input",
             form=TEXT)
    add_flag(parser, "layer", int, None, "with --head: the one head to draw, from 0", at_least=0)
    add_flag(parser, "head", int, None, "with --layer: the one head to draw, from 0", at_least=0)
    add_flag(parser, "out", str, str(Path(__file__).with_suffix(".png")), "the PNG to write")
    add_flag(parser, "device", str, "auto", DEVICE, form=DEVICE)
    add_flag(parser, "data_dir", str, None, "prepared data: the table is about its validation "
             "split, and has what each head is worth; about the prompt if not given")
    args = parser.parse_args(argv)
    if (args.layer is None) != (args.head is None):
        raise UserError("--layer and --head go together: they name one head")
    return args


def validation_windows(data_dir: str, size: int) -> Tensor:
    """Evenly spaced windows of the validation split, (W, size + 1). UserError if too short."""
    load_meta(data_dir)
    tokens = open_split(data_dir, "val")
    if len(tokens) <= size:
        raise UserError(f"the val split in {data_dir} has {len(tokens)} tokens: the model's "
                        f"context needs {size + 1}")
    starts = np.linspace(0, len(tokens) - size - 1, min(WINDOWS, (len(tokens) - 1) // size))
    return torch.from_numpy(tokens[starts.astype(int)[:, None] + np.arange(size + 1)].astype(int))


@contextlib.contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that grows by (what came in, what went out) whenever one of the modules runs."""
    calls: list[tuple[Tensor, Tensor]] = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(
                lambda module, inputs, output: calls.append((inputs[0], output))))
        yield calls


@torch.no_grad()
def attention_maps(model: GPT, ids: Tensor) -> Tensor:
    """The weights of queries (rows) for keys (columns), (blocks, heads, T, T), in float32, for ids
    (T,); for ids (B, T) they are (blocks, B, heads, T, T).
    """
    T, heads = ids.size(-1), model.config.n_head
    with recording(block.attn.c_attn for block in model.transformer.h) as calls:
        model.features(ids.view(-1, T))
    future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
    maps = []
    for _, qkv in calls:
        q, k, _ = qkv.float().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        maps.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    return torch.stack(maps).view(-1, *ids.shape[:-1], heads, T, T)


def places(ids: Tensor) -> Table:
    """Which keys (columns) are what to a query (row) of ids (B, T): 1 or 0; "back": how far."""
    key = torch.arange(ids.size(1), device=ids.device)
    query = key.unsqueeze(1)
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    after = same.roll(1, dims=2) & (key > 0)  # the token before the key is the query's
    found = {"back": (query - key).clamp(min=0), "first": key == 0, "itself": key == query,
             "previous": key == query - 1, "same": same & (key < query),
             "after": after & (key < query)}
    return {name: (place * (query > 0)).float().expand_as(same) for name, place in found.items()}


def head_table(model: GPT, windows: Tensor) -> Table:
    """LEGEND's figures of every head over windows (W, T), and "even", the ratio of its entropy to
    even attention's. Means over the queries that have such keys; NaN if none has.
    """
    T, sums = windows.size(1), dict.fromkeys(("bits", "back", *NAMES), 0.0)
    counts = dict.fromkeys(sums, 0.0)
    at_once = max(1, 2**24 // (model.config.n_layer * model.config.n_head * T * T))
    for ids in windows.split(at_once):
        maps = attention_maps(model, ids)
        bits = torch.special.entr(maps[..., 1:, :]).sum(-1) / math.log(2)
        sums["bits"] += bits.sum((1, 3)).cpu()
        counts["bits"] += len(ids) * (T - 1)
        for name, place in places(ids).items():
            sums[name] += torch.einsum("lbhij,bij->lh", maps, place).cpu()
            counts[name] += place.any(-1).sum().item()
    table = {name: sums[name] / torch.tensor(counts[name]) for name in sums}
    return table | {"even": table["bits"] / torch.arange(2, T + 1).log2().mean()}


def head_name(table: Table, layer: int, head: int) -> str:
    """What a head does, in a word or two, as LEGEND says."""
    shares = {name: table[name][layer, head].nan_to_num().item() for name in NAMES}
    most = max(shares, key=lambda name: shares[name])
    if shares[most] >= NAMED_FROM:
        return NAMES[most]
    return "broad" if table["even"][layer, head] >= BROAD_FROM else "mixed"


@contextlib.contextmanager
def silenced(model: GPT, layer: int, head: int) -> Iterator[None]:
    """Zeroes one head's output before the projection that mixes the heads of its block."""
    width = model.config.n_embd // model.config.n_head

    def zero(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        heads = inputs[0].clone()
        heads[..., head * width : (head + 1) * width] = 0
        return heads

    with model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(zero):
        yield


@torch.no_grad()
def silence_each(model: GPT, windows: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The loss over windows (W, T + 1), and by how much that of each rises without one head:
    (blocks, heads, W), in nats per token.

    What comes before a head's block is computed once. And of 50,257 ids a model expects a few: the
    logits of a batch are those of the ids that occur in it or hold COVERED of the probability; all
    others are one more, the logarithm of their sum, to first order in the features.
    """
    parts, heads = model.transformer, range(model.config.n_head)
    weight, losses, rises = parts.wte.weight, [], []
    autocast = torch.autocast(windows.device.type, dtype, enabled=dtype != torch.float32)
    batches = windows.split(max(1, 512 // (windows.size(1) - 1)))  # one holds all its logits
    for batch in tqdm(batches, desc="silencing each head", unit=" batches", leave=False):
        with autocast, recording(parts.h) as calls:
            intact = model.features(batch[:, :-1])
            logits = F.linear(intact, weight).float()
            losses.append(window_losses(logits, batch[:, 1:]))
            p = logits.softmax(-1)
            share, ids = p.mean((0, 1)).sort(descending=True)
            kept = torch.cat([ids[share.cumsum(0) - share < COVERED], batch.flatten()]).unique()
            p[..., kept] = 0
            others = p.sum(-1, keepdim=True) + 1e-30
            slope = p @ weight / others
            others = others.log() + logits.logsumexp(-1, keepdim=True)
            targets, some = torch.searchsorted(kept, batch[:, 1:].contiguous()), []
            for layer, head in itertools.product(range(len(parts.h)), heads):
                x = calls[layer][0]
                with silenced(model, layer, head):
                    for block in parts.h[layer:]:
                        x = block(x)
                x = parts.ln_f(x)
                change = ((x - intact) * slope).sum(-1, keepdim=True)
                logits = torch.cat([F.linear(x, weight[kept]).float(), others + change], dim=-1)
                some.append(window_losses(logits, targets) - losses[-1])
        rises.append(torch.stack(some).view(len(parts.h), len(heads), -1).cpu())
    return torch.cat(losses).mean().item(), torch.cat(rises, dim=-1)


def window_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of each window, (W,), from logits (W, T, V) and targets (W, T)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def print_heads(table: Table, rises: Tensor | None) -> None:
    rows = []
    for at in itertools.product(*map(range, table["back"].shape)):
        shares = [f"{table[name][at]:.0%}".replace("nan%", "-") for name in NAMES]
        measures = [f"{table['back'][at]:.1f}", f"{table['bits'][at]:.1f}"]
        worth = "-"
        if rises is not None:
            mean, error = rises[at].mean(), rises[at].std() / math.sqrt(rises.size(-1))
            worth = f"{mean:.4f} ± {error:.4f}" if abs(mean) >= 2 * error else "0"
        rows.append([*map(str, at), *measures, *shares, head_name(table, *at), worth])
    print_table(["block", "head", "back", "bits", *NAMES, "does", "worth"], rows)
    print(LEGEND)


def visible(token: bytes) -> str:
    """A token as it is drawn: a space as ␣, a line end as ↵, what the font lacks as bytes."""
    from matplotlib.font_manager import findfont, get_font

    text = token.decode(errors="replace").replace(" ", "␣").replace("\n", "↵")
    font = get_font(findfont("DejaVu Sans"))
    if "\ufffd" in text or not all(font.get_char_index(ord(letter)) for letter in text):
        return "".join(f"<{byte:02X}>" for byte in token)
    return text


def draw(path: Path, model: GPT, ids: Tensor, table: Table, one: tuple[int, int] | None) -> None:
    """Writes a PNG: maps over ids (T,) of all heads, or of `one` (block, head) with its tokens."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    maps = attention_maps(model, ids).cpu()
    maps.masked_fill_(torch.ones(maps.shape[-2:]).triu(1) > 0, math.nan)  # the triangle only
    tokens = [visible(token_bytes()[token]) for token in ids.tolist()]
    blocks, heads = (1, 1) if one else maps.shape[:2]
    # In inches, ten of which a page shows legibly. A map's tokens need 0.15 each.
    width = max(7.5, 0.15 * len(tokens) + 1.5 if one else 1.1 * heads + 0.9)
    height = width - 0.5 if one else max(4.5, 1.25 * blocks + 1.5)
    figure = Figure(figsize=(width + 2.5, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(width, 2.5))
    grid = left.subplots(blocks, heads, squeeze=False)
    for row, column in itertools.product(range(blocks), range(heads)):
        axes, at = grid[row, column], one or (row, column)
        image = axes.imshow(maps[at].numpy(), norm=PowerNorm(0.5, 0, 1), cmap="viridis")
        axes.set_title(head_name(table, *at), fontsize=8, pad=3)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if row == 0:
            grid[-1, column].set_xlabel(f"head {at[1]}", fontsize=9)
        if column == 0:
            axes.set_ylabel(f"block {at[0]}", fontsize=9)
    if one:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=8, parse_math=False)
    text = textwrap.fill(" ".join(tokens), int(13 * width), max_lines=3)
    left.suptitle(text, fontsize=9, parse_math=False)
    bar = left.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "5%", "20%", "50%", "100%"], fontsize=8)
    bar.set_label("how a token (row) shares its attention among itself and those before it "
                  "(columns)", fontsize=8)
    draw_expected(right.subplots(), model, ids)
    write_figure(figure, path)


@torch.no_grad()
def draw_expected(axes: Any, model: GPT, ids: Tensor) -> None:
    """The ten likeliest tokens after ids (T,), as bars."""
    shares, best = model(ids.unsqueeze(0))[0, -1].softmax(0).cpu().topk(10)
    bars = axes.barh(range(10), shares, color="tab:blue")
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=8, padding=2)
    labels = [visible(token_bytes()[token]) for token in best.tolist()]
    axes.set_yticks(range(10), labels, fontsize=9, parse_math=False)
    axes.set_title("expected next", fontsize=9)
    axes.set(xticks=[], xlim=(0, 1.3 * shares[0].item()), ylim=(9.6, -0.6))
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    cli(main)
