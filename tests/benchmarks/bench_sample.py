"""Sampling speed: `python -m tests.benchmarks.bench_sample [--repeats N] [--dtype D]`.

Tokens drawn by our `generate` and by Hugging Face's, with the same weights, and how long
`sample.py` takes to its first token. The ceiling is the time to multiply one vector with every
matrix.
"""

import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from config import Config, cli

import torch

from model import GPT, generate, pick_dtype, save_file, to_hugging_face
from tests.benchmarks.harness import Works, bench_parser, machine, measure, show

NEW, ACROSS = 120, 300  # new tokens that fit the context of 128, and that do not
PROMPT = [7454, 2402, 257, 640]  # "Once upon a time"


def ours(device: str, dtype: torch.dtype) -> Works:
    torch.manual_seed(0)
    model = GPT(Config()).eval().to(device, dtype)

    def work(rows: int, new: int) -> None:
        prompt = torch.tensor([PROMPT] * rows, device=device)
        for _ in generate(model, prompt, new, 0.8, 50):
            pass

    def window_per_token() -> None:
        """What the notebook did: the whole window again for every token."""
        ids = torch.tensor([PROMPT], device=device)
        with torch.inference_mode():
            for _ in range(ACROSS):
                logits = model(ids[:, -model.config.block_size :])[:, -1].float()
                ids = torch.cat([ids, torch.multinomial(logits.softmax(1), 1)], 1)

    return {
        f"1 story, {NEW} tokens": lambda: work(1, NEW),
        f"16 stories, {NEW} tokens": lambda: work(16, NEW),
        f"1 story, {ACROSS} tokens": lambda: work(1, ACROSS),
        f"the window again for every token, {ACROSS} tokens": window_per_token,
    }


def hugging_face(device: str, dtype: torch.dtype) -> Works:
    torch.manual_seed(0)
    model = to_hugging_face(GPT(Config())).to(device, dtype).eval()
    prompt = torch.tensor([PROMPT], device=device)
    options = dict(
        attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, top_k=50,
        min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=50256,
    )
    return {f"1 story, {NEW} tokens": lambda: model.generate(prompt, **options)}


def products(device: str, dtype: torch.dtype) -> Works:
    """One vector times each matrix of the model, for NEW tokens."""
    model = GPT(Config()).to(device, dtype)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = [layer.weight.t() for layer in layers]
    head = model.transformer.wte.weight.detach().t()
    if dtype == torch.float32 and device == "cpu":  # as in generate
        head = head.contiguous()
    matrices.append(head)
    torch.backends.mkldnn.enabled = dtype != torch.bfloat16  # for a single row, as in next_logits
    vectors = {len(m): torch.randn(1, len(m), device=device).to(dtype) for m in matrices}

    def work() -> None:
        with torch.inference_mode():
            for _ in range(NEW):
                for matrix in matrices:
                    torch.mm(vectors[len(matrix)], matrix)

    return {f"1 story, {NEW} tokens": work}


def first_token(path: Path, repeats: int) -> list[float]:
    """Seconds from starting sample.py to the first piece of the story behind the prompt."""
    flags = ["--checkpoint", str(path), "--prompt", "A", "--seed", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "sample.py", *flags], **pipes) as process:
            process.stdout.read(2)
            seconds.append(time.perf_counter() - start)
            process.kill()
    return seconds


def main(argv: list[str]) -> None:
    args = bench_parser(__doc__, 7).parse_args(argv)
    repeats, cuda = args.repeats, torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    fast = pick_dtype(args.dtype, torch.device(device))
    name, setup = str(fast).removeprefix("torch."), functools.partial
    contenders = {
        "ours": setup(ours, device, fast),
        "Hugging Face, float32 (its default)": setup(hugging_face, device, torch.float32),
        f"Hugging Face, {name}": setup(hugging_face, device, fast),
        f"matrix products alone, {name}": setup(products, device, fast),
    }
    if fast == torch.float32:  # the default again
        del contenders["Hugging Face, float32"]
    timings = measure(contenders, repeats, cuda)
    works = (f"1 story, {NEW} tokens", f"16 stories, {NEW} tokens", f"1 story, {ACROSS} tokens")
    one, sixteen, across = (timings[f"ours: {work}"].median for work in works)
    ceiling = next(t.median for name, t in timings.items() if "products" in name) / NEW
    rows = []
    for name, timing in timings.items():
        new = ACROSS if str(ACROSS) in name else NEW
        tokens = new * (16 if "16 stories" in name else 1)
        base = across / ACROSS if new == ACROSS else one / NEW
        rows.append(timing.cells(name, tokens, base * tokens, ceiling * new))
    print(machine(cuda))
    columns = ["", "median", "spread", "tokens/s", "time a token, ours 1", "peak memory",
               "of ceiling"]
    show("Tokens drawn, temperature 0.8, top-k 50", columns, rows)
    with tempfile.TemporaryDirectory() as folder:
        save_file(Path(folder, "model.pt"), Config(), GPT(Config()))
        seconds = sorted(first_token(Path(folder, "model.pt"), repeats))
    print(f"\nsample.py from start to first token: {seconds[repeats // 2]:.2f} s "
          f"({seconds[0]:.2f} to {seconds[-1]:.2f})")
    print(f"16 stories at once: {one * 16 / sixteen:.1f} times the tokens/s of one")


if __name__ == "__main__":
    cli(main)
