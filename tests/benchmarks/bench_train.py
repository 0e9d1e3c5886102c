"""Training speed and memory.

`python -m tests.benchmarks.bench_train [--repeats N] [--batch_size N] [--dtype D]`

It times an iteration (forward, loss, backward) of the reference recipe, which has dropout, by our
loop and by what a user would run instead. The matrix products of that iteration alone are the
ceiling. Beside it stands an iteration of `tuned`, without dropout on either side.
"""

import dataclasses
import functools
import re
import subprocess
import sys
import tempfile

from config import Config, add_flag, cli

import torch
import torch.nn.functional as F

import train
from model import GPT, HEAD_TOKENS, pick_dtype, to_hugging_face
from prepare_data import prepare
from tests.benchmarks.harness import Works, bench_parser, machine, measure, show

BUSY = "beside another job"
# Dense matrix products of 16-bit numbers, TFLOP/s, from the makers' data sheets.
PUBLISHED_PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65}


def random_batch(config: Config, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.batch_size, config.block_size + 1)
    ids = torch.randint(config.vocab_size, shape, device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(config: Config, device: str, dtype: str, folder: str) -> Works:
    """train.py with this config, on the toy corpus."""
    prepare("toy", f"{folder}/data")
    places = dict(data_dir=f"{folder}/data", out_dir=f"{folder}/out", plot_dir=folder)
    config = dataclasses.replace(config, device=device, dtype=dtype, **places)
    run = train.open_run(config, {})
    train.compile_model(run)
    run.folder.path.mkdir()
    tokens, length = run.tokens["train"], len(run.tokens["train"])
    windows = train.even_starts(config, len(run.tokens["val"]))[: config.batch_size]

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        starts = train.crop_starts(config, 0, length)
        return train.read_batch(tokens, starts, config.block_size, run.device)

    x, y = read()

    def iteration() -> None:
        with run.arithmetic():
            loss = run.model(x, y)
        run.scaler.scale(loss).backward()

    def beside_another_job() -> None:
        """The same while another process keeps a core busy. (It starts in a few milliseconds.)"""
        busy = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
        try:
            iteration()
        finally:
            busy.kill()
            busy.wait()

    def zero() -> None:
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)

    def step() -> None:
        zero()
        run.update_weights(1e-4)

    return {
        "": iteration,
        BUSY: beside_another_job,
        "step": step,
        # A step leaves no gradients, but 31 of 32 iterations add to gradients that are there.
        "zero gradients": zero,
        "batch": read,
        "evaluation micro-batch": lambda: run.mean_loss(run.tokens["val"], windows),
        "checkpoint": lambda: train.save_checkpoint(run),
    }


def tuned(config: Config, device: str, dtype: str, folder: str) -> Works:
    return {"": ours(config, device, dtype, f"{folder}/tuned")[""]}


def hugging_face(config: Config, device: str, dtype: torch.dtype) -> Works:
    model = to_hugging_face(GPT(config)).to(device).train()
    x, _ = random_batch(config, device)

    def iteration() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()

    return {"": iteration}


def full_logits(config: Config, device: str, dtype: torch.dtype, compiled: bool) -> Works:
    """The loop of the notebook: all logits at once, PyTorch's cross-entropy."""
    model = GPT(config).to(device).train()
    x, y = random_batch(config, device)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def iteration() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(x, y)
        loss.backward()

    return {"": iteration}


def products(config: Config, device: str, dtype: torch.dtype) -> Works:
    """The matrix products of an iteration and nothing else, into memory that is there already."""
    tokens, C = config.tokens_per_iteration, config.n_embd
    V = config.vocab_size + -config.vocab_size % 64
    chunk = min(HEAD_TOKENS[device], tokens)
    layers = [(tokens, C, width) for width in (3 * C, C, 4 * C, 4 * C)]
    jobs = [(config.n_layer, shape) for shape in layers] + [(tokens // chunk, (chunk, C, V))]
    plan = []
    for count, (n, k, m) in jobs:
        shapes = ((n, k), (m, k), (n, m))
        x, w, y = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        plan.append((count, x, w, y, torch.empty_like(x), torch.empty_like(w)))

    def work() -> None:
        for count, x, w, y, dx, dw in plan:
            for _ in range(count):
                torch.mm(x, w.t(), out=y)
                torch.mm(y, w, out=dx)
                torch.mm(y.t(), x, out=dw)

    return {"": work}


def main(argv: list[str]) -> None:
    cuda = torch.cuda.is_available()
    parser = bench_parser(__doc__, 5)
    help = "sequences of 128 tokens in an iteration; a large GPU wants 256 or more"
    add_flag(parser, "batch_size", int, 32, help, low=1)
    args = parser.parse_args(argv)
    device = "cuda" if cuda else "cpu"
    fast = pick_dtype(args.dtype, torch.device(device))
    name = str(fast).removeprefix("torch.")
    setup, folder = functools.partial, tempfile.TemporaryDirectory()
    recipe, other = Config(batch_size=args.batch_size), Config.from_preset("tuned")
    contenders = {
        "ours": setup(ours, recipe, device, args.dtype, folder.name),
        "Hugging Face, float32 (its default)": setup(hugging_face, recipe, device, torch.float32),
        f"Hugging Face, {name} autocast": setup(hugging_face, recipe, device, fast),
        "full logits, float32": setup(full_logits, recipe, device, torch.float32, False),
        f"full logits, {name} autocast": setup(full_logits, recipe, device, fast, False),
        f"matrix products alone, {name}": setup(products, recipe, device, fast),
        "tuned, ours": setup(tuned, other, device, args.dtype, folder.name),
        "tuned, Hugging Face, float32": setup(hugging_face, other, device, torch.float32),
        f"tuned, Hugging Face, {name} autocast": setup(hugging_face, other, device, fast),
    }
    if fast == torch.float32:  # nothing to cast to
        contenders = {key: contenders[key] for key in contenders if "autocast" not in key}
    if cuda:
        label = f"full logits, {name}, compiled"
        contenders[label] = setup(full_logits, recipe, device, fast, True)
    with folder:
        timings = measure(contenders, args.repeats, cuda)
    report({name: timings[name] for name in timings if "tuned" not in name}, recipe, cuda, fast)
    tokens, first = other.tokens_per_iteration, timings["tuned, ours"].median
    rows = [t.cells(name, tokens, first, 0)[:6] for name, t in timings.items() if "tuned" in name]
    columns = ["", "median", "spread", "tokens/s", "time, ours 1", "peak memory"]
    show(f"An iteration of tuned, {tokens:,} tokens, no dropout", columns, rows)


def report(timings: dict, config: Config, cuda: bool, dtype: torch.dtype) -> None:
    # 6 floating-point operations a parameter and token (Kaplan et al., 2020): the tied embedding
    # counts once, as the head.
    with torch.device("meta"):
        flops = 6 * GPT(config).parameter_count() * config.tokens_per_iteration
    ours, tokens = timings["ours"], config.tokens_per_iteration
    products = next(timing for name, timing in timings.items() if "products" in name)
    rows = [timing.cells(name, tokens, ours.median, products.median)
            for name, timing in timings.items() if ":" not in name]
    print(machine(cuda))
    rate = flops / products.median / 1e9
    speed = f"{flops / 1e9:,.0f} GFLOP; the products alone run at {rate:,.0f} GFLOP/s"
    columns = ["", "median", "spread", "tokens/s", "time, ours 1", "peak memory", "of ceiling"]
    show(f"An iteration of {config.tokens_per_iteration:,} tokens, {speed}", columns, rows)
    card = re.split(r"\W", torch.cuda.get_device_name()) if cuda else []
    peak = next((PUBLISHED_PEAK[name] for name in PUBLISHED_PEAK if name in card), None)
    if peak and dtype != torch.float32:
        share = flops / ours.median / 1e12 / peak
        print(f"\nours: {share:.1%} of the published dense peak, {peak} TFLOP/s")
    busy = timings[f"ours: {BUSY}"].median
    print(f"\nours, {BUSY} on one core: {config.tokens_per_iteration / busy:,.0f} tokens/s, "
          f"{ours.median / busy:.0%} of what it does alone")
    # What train.py does besides iterations, as a share of what it accompanies.
    works = ("batch", "step", "zero gradients", "evaluation micro-batch", "checkpoint")
    batch, step, zero, score, write = (timings[f"ours: {work}"].median for work in works)
    micro_batches = config.eval_windows / min(config.batch_size, config.eval_windows)
    between = config.eval_interval * ours.median
    parts = {
        "clipping, learning rate and AdamW, of the iterations of a step":
            (step - zero, config.gradient_accumulation_steps * ours.median),
        "reading a batch, of its iteration": (batch, ours.median),
        f"an evaluation (2 x {config.eval_windows} windows), of the iterations between two":
            (2 * micro_batches * score, between),
        "writing a checkpoint, of the iterations between two": (write, between),
    }
    rows = [[name, f"{part:.3g} s", f"{part / of:.2%}"] for name, (part, of) in parts.items()]
    show("Beside the iterations", ["", "median", "share"], rows)


if __name__ == "__main__":
    cli(main)
