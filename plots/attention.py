"""Shows what a model's attention heads look at: `python -m plots.attention --data_dir data/toy`.

It draws the attention of every head over a prompt, or of one head, beside the tokens that the
model expects next. It prints a table of where each head looks and what it is worth, and a legend
that explains the columns. The first token of a text can only look at itself: its row is left out.
With `--layer 0 --head 1 --numbers` it prints the arithmetic of that head, and draws nothing. With
`--layer 0 --head 1 --stages out/a/model.pt out/b/model.pt` it draws that head of several models.
"""

import contextlib
import itertools
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from config import Parser, UserError, add_flag, cli, notice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import GPT, pick_device, pick_dtype
from plots.loss_curve import model_names, picture_path, print_table, write_figure
from prepare_data import load_meta, open_split, token_bytes
from sample import add_model_flags, prompt_ids, read_model, read_prompt

SHOWN = 4  # the tokens, and the numbers of each token's value, that --numbers prints
COVERED = 0.999  # the share of the model's probability that `silence_each` computes exactly
NAMES = {"first": "first token", "itself": "itself", "previous": "previous token",
         "same": "same token", "after": "induction"}
BROAD_FROM = 0.75  # of the entropy of even attention
LEGEND = f"""
back: how many tokens back the head looks, on average; bits: the entropy of its
attention; then its shares on the first token, on the token itself, on the one
before, and, where there are any, on earlier copies of the token and on what
followed those (induction). does: the largest of these shares, if it is half of
the attention, or twice the next (all other tokens count as one share); else
broad, if the entropy is at least {BROAD_FROM:.0%} of even attention's; else mixed. worth:
how much the validation loss rises when this head alone is silenced, and the
standard error of that; 0 if the rise is below two of these."""
Table = dict[str, Tensor]  # the figures of a column of the table, (blocks, heads)


def parse_command_line(argv: list[str]) -> Any:
    parser = Parser("Draws what a model's attention heads look at, and prints a table of them.")
    add_model_flags(parser)
    add_flag(parser, "layer", int, None, "with --head: the one head to draw, from 0", low=0)
    add_flag(parser, "head", int, None, "with --layer: the one head to draw, from 0", low=0)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--numbers", action="store_true", help="with --layer and --head: print "
                         f"its arithmetic for the last {SHOWN} tokens, and draw nothing")
    instead.add_argument("--stages", nargs="+", metavar="PATH", help="with --layer and --head: the "
                         "models whose maps of this head are drawn, side by side")
    default = str(Path(__file__).with_suffix(".png"))
    add_flag(parser, "out", str, default, "the picture to write: png, pdf or svg, by its ending")
    add_flag(parser, "data_dir", str, None, "prepared data: the table is about its validation "
             "split, and has what each head is worth (default: about the prompt)")
    add_flag(parser, "windows", int, 256, "windows of the validation split; fewer take "
             "less time", low=1)
    args = parser.parse_args(argv)
    if (args.layer is None) != (args.head is None):
        raise UserError("--layer and --head go together: they name one head")
    if (args.numbers or args.stages) and args.head is None:
        raise UserError("--numbers and --stages are about one head: add --layer and --head")
    return args


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    out = picture_path(args.out)
    models = [read_model(path) for path in args.stages or [args.checkpoint]]
    (model, checkpoint), one = models[-1], None
    size = model.config.block_size
    if not (args.checkpoint or args.stages):
        notice(f"reading {checkpoint}")
    if args.head is not None:
        one = args.layer, args.head
        for stage, path in models:
            check_head(stage, path, *one)
    ids = prompt_ids(read_prompt(args.prompt), model.to(pick_device(args.device)))
    if len(ids) < 2:
        raise UserError("the prompt is one token: give two or more, which can attend to each other")
    if args.numbers:
        print_numbers(model, ids, *one)
        return
    if args.stages:
        draw_stages(out, models, ids, *one)
        notice(f"wrote {out}")
        return
    windows = ids.unsqueeze(0)
    if args.data_dir:
        windows = validation_windows(args.data_dir, size, args.windows)
    table = head_table(model, windows[:, :size].to(ids.device))
    draw(out, model, ids, table, one)
    notice(f"wrote {out}")
    rises, where = None, f"the prompt's {len(ids)} tokens; --data_dir looks at validation text"
    if args.data_dir:
        loss, rises = silence_each(model, windows.to(ids.device), pick_dtype("auto", ids.device))
        count = "1 window" if len(windows) == 1 else f"{len(windows)} windows"
        where = f"{count} of {size} tokens of {args.data_dir}, loss {loss:.4f}"
    print_heads(table, rises)
    print(f"Over {where}.")


def check_head(model: GPT, checkpoint: str, layer: int, head: int) -> None:
    """UserError if the model has no such head."""
    blocks, heads = model.config.n_layer, model.config.n_head
    if layer >= blocks or head >= heads:
        raise UserError(f"{checkpoint} has layers up to {blocks - 1} and heads up to {heads - 1}")


def validation_windows(data_dir: str, size: int, most: int) -> Tensor:
    """Evenly spaced windows of the validation split, (W, size + 1). UserError if too short."""
    load_meta(data_dir)
    tokens = open_split(data_dir, "val")
    if len(tokens) <= size:
        raise UserError(f"the val split in {data_dir} is {len(tokens)} tokens, the context {size}")
    starts = np.linspace(0, len(tokens) - size - 1, min(most, (len(tokens) - 1) // size))
    windows = np.stack([tokens[start : start + size + 1] for start in starts.astype(int)])
    return torch.from_numpy(windows.astype("int64"))


def inputs_of(modules: list[nn.Module], model: GPT, ids: Tensor) -> list[Tensor]:
    """What each of these modules reads, (B, T, C), while the model reads ids (B, T)."""
    inputs: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            hooks.enter_context(hook)
        model.features(ids)
    return inputs


@torch.no_grad()
def attention_maps(model: GPT, ids: Tensor) -> Tensor:
    """The attention of queries (rows) to keys (columns) over ids (T,): (blocks, heads, T, T)."""
    layers = [block.attn for block in model.transformer.h]
    maps = []
    for layer, x in zip(layers, inputs_of(layers, model, ids.unsqueeze(0)), strict=True):
        q, k, _ = layer.queries_keys_values(x)
        maps.append(layer.weights(q, k))
    return torch.cat(maps)


def places(ids: Tensor) -> Table:
    """Masks (T, T) of what a key (column) is to a query (row); "back" is how far back it stands."""
    key = torch.arange(len(ids), device=ids.device)
    query = key.unsqueeze(1)
    same = ids == ids.unsqueeze(1)
    after = same.roll(1, dims=1) & (key > 0)  # the token before the key is the query's
    return {"back": (query - key).clamp(min=0), "first": (key == 0).expand_as(same),
            "itself": key == query, "previous": key == query - 1,
            "same": same & (key < query), "after": after & (key < query)}


def head_table(model: GPT, windows: Tensor) -> Table:
    """LEGEND's figures of every head over windows (W, T), as means over the queries that have such
    keys (NaN if none has); and "even bits", (1, 1), the entropy if attention were even.
    """
    T, sums, counts = windows.size(1), defaultdict(float), defaultdict(float)
    for ids in windows:
        maps = attention_maps(model, ids)
        sums["bits"] += torch.special.entr(maps[:, :, 1:]).sum((2, 3)) / math.log(2)
        counts["bits"] += T - 1
        for name, place in places(ids).items():
            sums[name] += (maps * place)[:, :, 1:].sum((2, 3))
            counts[name] += place[1:].any(1).sum()
    table = {name: (sums[name] / counts[name]).cpu() for name in sums}
    return table | {"even bits": torch.arange(2, T + 1).log2().mean().view(1, 1)}


def head_name(table: Table, layer: int, head: int) -> str:
    """What a head does, in one or two words, by the rules of LEGEND."""
    shares = {name: table[name][layer, head].nan_to_num().item() for name in NAMES}
    shares["all others"] = max(1 - sum(shares.values()), 0.0)
    best, second = sorted(shares, key=lambda name: shares[name], reverse=True)[:2]
    most = shares[best] >= 0.5 or shares[best] >= 2 * shares[second]
    if most and best in NAMES:
        return NAMES[best]
    return "broad" if table["bits"][layer, head] >= BROAD_FROM * table["even bits"] else "mixed"


def silenced(model: GPT, layer: int, head: int) -> Any:
    """A context in which the projection that mixes the heads reads zeros from one of them."""
    width = model.config.n_embd // model.config.n_head

    def zero(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        heads = inputs[0].clone()
        heads[..., head * width : (head + 1) * width] = 0
        return heads

    return model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(zero)


@torch.no_grad()
def silence_each(model: GPT, windows: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The loss over windows (W, T + 1), in nats per token, and how much the loss of each window
    rises without each head, (blocks, heads, W).

    In every batch, logits are computed for its targets and for the likeliest ids, which together
    have COVERED of the probability. All other ids count as one, whose logit, the log of the sum of
    theirs, is followed to first order in the features.
    """
    blocks, heads, weight = model.transformer.h, model.config.n_head, model.transformer.wte.weight
    losses, rises = [], []
    batches = windows.split(max(1, 512 // (windows.size(1) - 1)))  # all their logits are held
    for batch in tqdm(batches, desc="silencing each head", unit=" batches", leave=False):
        with torch.autocast(windows.device.type, dtype, enabled=dtype != torch.float32):
            inputs = inputs_of([*blocks, model.transformer.ln_f], model, batch[:, :-1])
            intact = model.transformer.ln_f(inputs[-1]).flatten(0, 1)  # (B x T, C)
            logits, targets = F.linear(intact, weight).float(), batch[:, 1:].flatten()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            share, ids = logits.softmax(1).mean(0).sort(descending=True)
            kept = torch.cat([ids[share.cumsum(0) - share < COVERED], targets]).unique()
            answers = torch.searchsorted(kept, targets).unsqueeze(1)
            logits[:, kept] = -1e9  # what remains are the logits of the others
            others, slope = logits.logsumexp(1), logits.softmax(1) @ weight
            few, silent = weight[kept].to(dtype), []
            for layer, head in itertools.product(range(len(blocks)), range(heads)):
                x = inputs[layer]
                with silenced(model, layer, head):
                    for block in blocks[layer:]:
                        x = block(x)
                x = model.transformer.ln_f(x).flatten(0, 1)
                logits, change = F.linear(x, few).float(), ((x - intact) * slope).sum(1)
                total = torch.logaddexp(logits.logsumexp(1), others + change)
                silent.append(total - logits.gather(1, answers).squeeze(1))
            rises.append(torch.stack(silent) - losses[-1])
    rise = torch.cat(rises, dim=1).view(len(blocks), heads, len(windows), -1).mean(-1)
    return torch.cat(losses).mean().item(), rise.cpu()


def print_heads(table: Table, rises: Tensor | None) -> None:
    rows = []
    for at in itertools.product(*map(range, table["back"].shape)):
        shares = [f"{table[name][at]:.0%}".replace("nan%", "-") for name in NAMES]
        back, bits, worth = f"{table['back'][at]:.1f}", f"{table['bits'][at]:.1f}", "-"
        if rises is not None and rises.size(-1) > 1:  # one window has no standard error
            mean, error = rises[at].mean(), rises[at].std() / math.sqrt(rises.size(-1))
            worth = f"{mean:.4f} ± {error:.4f}" if abs(mean) >= 2 * error else "0"
        does = head_name(table, *at).removesuffix(" token")
        rows.append([*map(str, at), back, bits, *shares, does, worth])
    columns = "block head back bits first itself prev same after does worth"  # in 79 characters
    print_table(columns.split(), rows, gap=" ")
    print(LEGEND)


@torch.no_grad()
def print_numbers(model: GPT, ids: Tensor, layer: int, head: int) -> None:
    """Prints how one head weighs the last SHOWN of ids (T,), and how it mixes their values."""
    attn = model.transformer.h[layer].attn
    (x,) = inputs_of([attn], model, ids.unsqueeze(0))
    q, k, v = attn.queries_keys_values(x)[:, 0, head].cpu()  # (T, width) each
    scores, weights = attn.scores(q, k), attn.weights(q, k)
    masked = scores.masked_fill(weights == 0, -math.inf)
    before = max(0, len(ids) - SHOWN)
    rows = columns = token_names(ids[before:])
    print(f"Block {layer}, head {head}. A row is the token that looks, a column one it looks at.")
    title = f"scores: query . key / sqrt({q.size(1)})"
    print_matrix(title, rows, columns, scores[before:, before:])
    print_matrix("after the mask: nobody sees the future", rows, columns, masked[before:, before:])
    if before:  # what is not shown becomes one column, with the sum of the weights ...
        columns = [f"{before} earlier", *columns]
        total = weights[:, :before].sum(1, keepdim=True)
        mean = weights[-1:, :before] @ v[:before] / total[-1].clamp(min=1e-30)  # ... and their mean
        weights, v = torch.cat([total, weights[:, before:]], 1), torch.cat([mean, v[before:]])
    title = "after the softmax: the weights; each row adds up to 1"
    print_matrix(title, rows, columns, weights[before:])
    parts = torch.column_stack([weights[-1], v[:, :SHOWN]])
    mix = torch.cat([weights[-1:].sum(1), weights[-1] @ v[:, :SHOWN]])
    names = ["weight", *(f"value[{i}]" for i in range(len(mix) - 1))]
    title = f"what {rows[-1]} reads: values times weights, added up (first {SHOWN} of {q.size(1)})"
    print_matrix(title, [*columns, "sum"], names, torch.vstack([parts, mix]))


def print_matrix(title: str, rows: list[str], columns: list[str], numbers: Tensor) -> None:
    cells = []
    for name, row in zip(rows, numbers.tolist(), strict=True):
        cells.append([name, *(f"{number:.2f}" for number in row)])
    print(f"\n{title}\n")
    print_table(["", *columns], cells)


def visible(token: bytes) -> str:
    """A token as it is drawn: a space as ␣, a line end as ↵, and as bytes what the font lacks."""
    from matplotlib.font_manager import findfont, get_font

    text = token.decode(errors="replace").replace(" ", "␣").replace("\n", "↵")
    font = get_font(findfont("DejaVu Sans"))
    if "\ufffd" in text or not all(font.get_char_index(ord(letter)) for letter in text):
        return "".join(f"<{byte:02X}>" for byte in token)
    return text


def token_names(ids: Tensor) -> list[str]:
    """Ids (T,) as they are drawn."""
    return [visible(token_bytes()[token]) for token in ids.tolist()]


def draw(path: Path, model: GPT, ids: Tensor, table: Table, one: tuple[int, int] | None) -> None:
    """Draws maps over ids (T,): of all heads, or of `one` (block, head) with its tokens."""
    from matplotlib.figure import Figure

    maps = attention_maps(model, ids).cpu()
    tokens = token_names(ids)
    blocks, heads = (1, 1) if one else maps.shape[:2]
    # Inches, of which ten can be read on a page. Beside one map, each token needs 0.15.
    width = max(7.5, 0.15 * len(tokens) + 1.5 if one else 1.1 * heads + 0.9)
    height = width - 0.5 if one else max(4.5, 1.25 * blocks + 1.5)
    figure = Figure(figsize=(width + 2.5, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(width, 2.5))
    grid = left.subplots(blocks, heads, squeeze=False, subplot_kw=dict(frame_on=False))
    cells = [one] if one else itertools.product(range(blocks), range(heads))
    for axes, (block, head) in zip(grid.flat, cells, strict=True):
        image = draw_map(axes, maps[block, head])
        axes.set_title(head_name(table, block, head), fontsize=8, pad=3)
        axes.set(xlabel=f"head {head}", ylabel=f"block {block}", xticks=[], yticks=[])
        axes.label_outer()
    if one:
        name_tokens(axes, tokens)
    text = textwrap.fill(" ".join(tokens), int(13 * width), max_lines=3)
    left.suptitle(text, fontsize=9, parse_math=False)
    bar = left.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "5%", "20%", "50%", "100%"])
    # As a label of the bar it would be cut off below a tall grid.
    left.supxlabel("how a token (row) shares its attention among itself and those before (columns)",
                   fontsize=10)
    draw_expected(right.subplots(), model, ids)
    write_figure(figure, path)


def draw_map(axes: Any, weights: Tensor) -> Any:
    """Draws one head's attention (T, T); what lies ahead is left white. Returns the image."""
    from matplotlib.colors import PowerNorm

    return axes.imshow(weights + torch.full_like(weights, math.nan).triu(1),
                       norm=PowerNorm(0.5, 0, 1))


def name_tokens(axes: Any, tokens: list[str]) -> None:
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8, parse_math=False)


def draw_stages(path: Path, models: list[tuple[GPT, str]], ids: Tensor, layer: int,
                head: int) -> None:
    """Draws one head's maps over ids (T,) in several models. UserError if one reads fewer."""
    from matplotlib.figure import Figure

    tokens = token_names(ids)
    figure = Figure(figsize=(3.3 * len(models), 3.6), layout="constrained")
    row = figure.subplots(1, len(models), squeeze=False)[0]
    names = model_names([checkpoint for _, checkpoint in models])
    for axes, name, (model, checkpoint) in zip(row, names, models, strict=True):
        if len(ids) > model.config.block_size:
            size = model.config.block_size
            raise UserError(f"{checkpoint} reads {size} tokens, the prompt has {len(ids)}")
        draw_map(axes, attention_maps(model.to(ids.device), ids)[layer, head].cpu())
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.set(frame_on=False)
        name_tokens(axes, tokens)
    write_figure(figure, path)


@torch.no_grad()
def draw_expected(axes: Any, model: GPT, ids: Tensor) -> None:
    """The ten likeliest tokens after ids (T,), as bars."""
    shares, best = model(ids.unsqueeze(0))[0, -1].softmax(0).cpu().topk(10)
    bars = axes.barh(range(10), shares)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=8, padding=2)
    labels = token_names(best)
    axes.set_yticks(range(10), labels, fontsize=9, parse_math=False)
    axes.set(title="expected next", xticks=[], frame_on=False)
    axes.invert_yaxis()


if __name__ == "__main__":
    cli(main)
