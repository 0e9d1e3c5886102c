"""Training speed and memory: `python -m tests.benchmarks.bench_train [--repeats N] [--batch_size N] [--dtype D]`.

An iteration of the reference recipe (forward, loss, backward; dropout on) by our loop and by what
a user would run instead, against the matrix products of that iteration alone: the ceiling.
"""

import functools
import re
import tempfile

import torch
import torch.nn.functional as F

import train
from config import Config, Parser, run
from model import CHUNK, GPT, to_hugging_face
from prepare_data import prepare
from sample import pick_dtype
from tests.benchmarks.harness import Works, add_dtype_flag, machine, measure, show

# Dense matrix products of 16-bit numbers, TFLOP/s, from the makers' data sheets.
PUBLISHED_PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65}


def random_batch(config: Config, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(config.vocab_size, (config.batch_size, config.block_size + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(batch_size: int, device: str, dtype: str, folder: str) -> Works:
    """train.py with its defaults, on the toy corpus."""
    prepare("toy", f"{folder}/data")
    places = dict(data_dir=f"{folder}/data", out_dir=f"{folder}/out", plot_dir=folder)
    config = Config(batch_size=batch_size, device=device, dtype=dtype, **places)
    run = train.start(config, {}, None)
    run.out_dir.mkdir()
    split = run.splits["train"]
    starts = train.crop_starts(config, 0, len(split))
    some = train.even_starts(config, len(run.splits["val"]))[:batch_size]
    x, y = train.read_batch(split, starts, config.block_size, run.device)

    def iteration() -> None:
        with run.autocast():
            loss = run.model(x, y)
        run.scaler.scale(loss).backward()

    def zero() -> None:
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)

    def step() -> None:
        zero()
        run.step(1e-4)

    return {
        "": iteration,
        "step": step,
        "zero gradients": zero,  # after the step, which leaves none: 31 of 32 iterations add to what is there
        "batch": lambda: train.read_batch(split, train.crop_starts(config, 0, len(split)), config.block_size, run.device),
        "evaluation pass": lambda: run.loss_over("val", some),
        "checkpoint": run.write_checkpoint,
    }


def hugging_face(batch_size: int, device: str, dtype: torch.dtype) -> Works:
    config = Config(batch_size=batch_size)
    model = to_hugging_face(GPT(config)).to(device).train()
    x, _ = random_batch(config, device)

    def iteration() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()

    return {"": iteration}


def full_logits(batch_size: int, device: str, dtype: torch.dtype, compiled: bool) -> Works:
    """The loop of the notebook: all logits at once, PyTorch's cross-entropy."""
    config = Config(batch_size=batch_size)
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


def products(batch_size: int, device: str, dtype: torch.dtype) -> Works:
    """The matrix products of an iteration and nothing else, into memory that is there already."""
    config = Config(batch_size=batch_size)
    tokens, C, V = config.tokens_per_iteration, config.n_embd, config.vocab_size + -config.vocab_size % 64
    chunk = min(CHUNK[device], tokens)
    layers = [(tokens, C, width) for width in (3 * C, C, 4 * C, 4 * C)]
    jobs = [(config.n_layer, shape) for shape in layers] + [(tokens // chunk, (chunk, C, V))]
    plan = []
    for count, (n, k, m) in jobs:
        x, w, y = (torch.randn(shape, device=device).to(dtype) for shape in ((n, k), (m, k), (n, m)))
        plan.append((count, x, w, y, torch.empty_like(x), torch.empty_like(w)))

    def run() -> None:
        for count, x, w, y, dx, dw in plan:
            for _ in range(count):
                torch.mm(x, w.t(), out=y)
                torch.mm(y, w, out=dx)
                torch.mm(y.t(), x, out=dw)

    return {"": run}


def main(argv: list[str]) -> None:
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32, help="sequences of 128 tokens in an iteration; a large GPU wants 256 or more")
    add_dtype_flag(parser)
    args = parser.parse_args(argv)
    device = "cuda" if cuda else "cpu"
    fast = pick_dtype(args.dtype, torch.device(device))
    name = str(fast).removeprefix("torch.")
    setup = functools.partial
    folder = tempfile.TemporaryDirectory()
    contenders = {
        "ours": setup(ours, args.batch_size, device, args.dtype, folder.name),
        "Hugging Face, float32 (its default)": setup(hugging_face, args.batch_size, device, torch.float32),
        f"Hugging Face, {name} autocast": setup(hugging_face, args.batch_size, device, fast),
        "full logits, float32": setup(full_logits, args.batch_size, device, torch.float32, False),
        f"full logits, {name} autocast": setup(full_logits, args.batch_size, device, fast, False),
        f"matrix products alone, {name}": setup(products, args.batch_size, device, fast),
    }
    if fast == torch.float32:  # nothing to cast to
        contenders = {key: contender for key, contender in contenders.items() if "autocast" not in key}
    if cuda:
        contenders[f"full logits, {name}, compiled"] = setup(full_logits, args.batch_size, device, fast, True)
    with folder:
        timings = measure(contenders, args.repeats, cuda)
    report(timings, args.batch_size, cuda, fast)


def report(timings: dict, batch_size: int, cuda: bool, dtype: torch.dtype) -> None:
    config = Config(batch_size=batch_size)
    # 6 floating-point operations a parameter and token (Kaplan et al., 2020): the tied embedding counts once, as the head.
    with torch.device("meta"):
        flops = 6 * GPT(config).parameter_count() * config.tokens_per_iteration
    ours = timings["ours"]
    products = next(timing for name, timing in timings.items() if "products" in name)
    rows = []
    for name, timing in timings.items():
        if ":" in name:
            continue
        rows.append([
            name, f"{timing.median:.3g} s", timing.spread, f"{config.tokens_per_iteration / timing.median:,.0f}",
            f"{timing.median / ours.median:.2f}x", f"{timing.memory / 1e9:.2f} GB", f"{products.median / timing.median:.0%}",
        ])  # fmt: skip
    print(machine(cuda))
    speed = f"{flops / 1e9:,.0f} GFLOP; the products alone run at {flops / products.median / 1e9:,.0f} GFLOP/s"
    columns = ["", "median", "spread", "tokens/s", "time, ours 1", "peak memory", "of ceiling"]
    show(f"An iteration of {config.tokens_per_iteration:,} tokens, {speed}", columns, rows)
    peak = next((peak for card, peak in PUBLISHED_PEAK.items() if cuda and card in re.split(r"\W", torch.cuda.get_device_name())), None)
    if peak and dtype != torch.float32:
        print(f"\nours: {flops / ours.median / 1e12 / peak:.1%} of the published dense peak, {peak} TFLOP/s")
    # What train.py does besides iterations, as a share of what it accompanies.
    batch, step, zero, score, write = (
        timings[f"ours: {work}"].median for work in ("batch", "step", "zero gradients", "evaluation pass", "checkpoint")
    )
    between = config.eval_interval * ours.median
    parts = {
        "an update's clip, step, zero and learning rate": (step - zero, config.gradient_accumulation_steps * ours.median),
        "reading a batch, of its iteration": (batch, ours.median),
        "an evaluation (two splits), of the iterations between two": (2 * config.eval_iters * score, between),
        "writing a checkpoint, of the iterations between two": (write, between),
    }
    show("Beside the iterations", ["", "median", "share"], [[name, f"{a:.3g} s", f"{a / b:.2%}"] for name, (a, b) in parts.items()])


if __name__ == "__main__":
    run(main)
