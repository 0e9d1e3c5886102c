"""Draws the GPT as boxes, with shapes and names of model.py: `python -m plots.architecture`.

The sizes below the boxes are those of the demo preset.
"""

from pathlib import Path

from config import Config, Parser, add_flag, cli, notice

from plots.loss_curve import picture_path, write_figure

GREY, BLUE, ORANGE, GREEN = "#eeeeee", "#d3e5f8", "#fbdfc3", "#d8edd0"
# Frames around boxes: left, right, bottom, top, title.
FRAMES = [
    (0.1, 4.9, 3.05, 8.05, "Block.forward, {n_layer} times"),
    (5.2, 9.9, 3.55, 9.75, "Attention.forward, {n_head} heads side by side"),
    (5.2, 9.9, 0.8, 3.3, "MLP.forward"),
]
# Boxes: centre, width, colour, name in model.py, what it does.
BOXES = [
    (2.5, 9.5, 4.4, "white", "token ids", "the text, cut into pieces of words"),
    (2.5, 8.55, 4.4, GREEN, "GPT.features", "vector of each token + of its position"),
    (3.2, 7.15, 2.8, GREY, "make_norm", "ln_1: numbers of one size"),
    (3.2, 6.25, 2.8, BLUE, "Attention.forward", "reads from the tokens before"),
    (3.2, 4.95, 2.8, GREY, "make_norm", "ln_2: numbers of one size"),
    (3.2, 4.05, 2.8, ORANGE, "MLP.forward", "works on each token alone"),
    (2.5, 2.55, 4.4, GREY, "make_norm", "ln_f: numbers of one size"),
    (2.5, 1.6, 4.4, GREEN, "GPT.forward", "logits: a score for each possible next token"),
    (1.6, 0.5, 3.0, GREY, "fused_linear_cross_entropy", "training: the loss, one number"),
    (4.1, 0.5, 1.7, GREY, "draw_token", "writing: one id"),
    (7.55, 8.45, 4.2, BLUE, "Attention.queries_keys_values", "c_attn: three vectors a token"),
    (6.85, 6.75, 2.8, BLUE, "Attention.weights", "scores, mask, softmax"),
    (7.55, 5.3, 4.2, BLUE, "weights @ v", "the mix: values times weights, added up"),
    (7.55, 4.1, 4.2, BLUE, "c_proj", "joins the heads: what is added to the stream"),
    (7.55, 2.5, 4.2, ORANGE, "c_fc, F.gelu", "four times as wide, then what is negative fades"),
    (7.55, 1.3, 4.2, ORANGE, "c_proj", "back to C numbers, added to the stream"),
]
# Arrows: the points of each, and a shape or a word beside the last one but one.
ARROWS = [
    ([(2.5, 9.2), (2.5, 8.85)], "(B, T)"),
    ([(0.8, 8.25), (0.8, 2.85)], ""), ([(0.8, 7.15), (1.8, 7.15)], ""),
    ([(0.8, 4.95), (1.8, 4.95)], ""), ([(3.2, 6.85), (3.2, 6.55)], "(B, T, C)"),
    ([(3.2, 5.95), (3.2, 5.6), (0.95, 5.6)], "(B, T, C)"),
    ([(3.2, 4.65), (3.2, 4.35)], "(B, T, C)"),
    ([(3.2, 3.75), (3.2, 3.4), (0.95, 3.4)], "(B, T, C)"),
    ([(2.5, 2.25), (2.5, 1.9)], "(B, T, C)"),
    ([(1.6, 1.3), (1.6, 0.8)], "(B, T, V)"), ([(4.1, 1.3), (4.1, 0.8)], "(B, V)"),
    ([(7.55, 9.3), (7.55, 8.75)], "(B, T, C)"),
    ([(6.1, 8.15), (6.1, 7.05)], "query"), ([(7.6, 8.15), (7.6, 7.05)], "key"),
    ([(9.1, 8.15), (9.1, 5.6)], "value"),
    ([(6.85, 6.45), (6.85, 5.6)], "(B, heads, T, T)"),
    ([(7.55, 5.0), (7.55, 4.4)], "(B, heads, T, width)"),
    ([(7.55, 2.2), (7.55, 1.6)], "(B, T, 4C)"),
]
SIZES = ("demo: B = {batch_size} sequences of T = {block_size} tokens, C = {n_embd} numbers each, "
         "{n_head} heads of width {width}, V = {vocab_size:,} token ids\n"
         "queries, keys and values are (B, heads, T, width)")


def main(argv: list[str]) -> None:
    parser = Parser("Draws the GPT as boxes, with the shapes and the names of model.py.")
    default = str(Path(__file__).with_suffix(".png"))
    add_flag(parser, "out", str, default, "the picture to write: png, pdf or svg, by its ending")
    out = picture_path(parser.parse_args(argv).out)
    draw(out, Config.from_preset("demo"))
    notice(f"wrote {out}")


def draw(path: Path, config: Config) -> None:
    from matplotlib.figure import Figure

    sizes = vars(config) | {"width": config.n_embd // config.n_head}
    figure = Figure(figsize=(8, 8.2))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(-0.4, 10))
    axes.set_axis_off()
    for left, right, bottom, top, title in FRAMES:
        axes.fill([left, right, right, left], [bottom, bottom, top, top], "#fafafa", ec="0.6")
        axes.text(right - 0.1, top - 0.08, title.format(**sizes), ha="right", va="top", fontsize=9)
    for points, label in ARROWS:
        axes.plot(*zip(*points[:-1], strict=True), color="0.3")
        axes.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color="0.3"))
        x, y = points[-2][0] + 0.1, (points[0][1] + points[1][1]) / 2
        axes.text(x, y, label, va="center", fontsize=9, color="#a02020")
    for x, y, width, colour, name, words in BOXES:
        left, right, low, high = x - width / 2, x + width / 2, y - 0.3, y + 0.3
        axes.fill([left, right, right, left], [low, low, high, high], colour, ec="0.3")
        axes.text(x, y + 0.12, name, ha="center", va="center", fontsize=9.5, weight="bold")
        axes.text(x, y - 0.14, words, ha="center", va="center", fontsize=8.5)
    for y in (5.6, 3.4):  # where a block adds to the stream
        circle = dict(boxstyle="circle", facecolor="white", edgecolor="0.3")
        axes.text(0.8, y, "+", ha="center", va="center", fontsize=13, bbox=circle)
    axes.text(0.36, 5.5, "residual stream (B, T, C)", rotation=90, va="center", fontsize=9,
              color="#a02020")
    axes.text(5, -0.1, SIZES.format(**sizes), ha="center", va="center", fontsize=9)
    write_figure(figure, path)


if __name__ == "__main__":
    cli(main)
