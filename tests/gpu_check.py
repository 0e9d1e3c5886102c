"""Shows whether training works on your CUDA GPU, and how fast: `python -m tests.gpu_check`.

It prints a table of what is expected and what was measured, and writes the same to gpu_check.json.
It trains on the built-in toy stories, so it needs no network. Each row runs in a process of its
own: one that fails, or takes the GPU's state with it, does not end the others.
"""

import contextlib
import dataclasses
import gc
import io
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from config import Config, Parser, UserError, add_flag, atomic_write, cli, notice, one_line

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import model as gpt
import sample
import train
from prepare_data import prepare
from tests.benchmarks.bench_train import PUBLISHED_PEAK
from tests.benchmarks.harness import show

ROOT = Path(train.__file__).parent
# What is expected, and what was measured. Lines after the first are details.
Answer = tuple[str, str]
# The validation loss of row 5 on a CPU, at the last iteration. This command measures it:
# python train.py --preset full --dataset toy --max_iters 244 --device cpu --dtype bfloat16
CPU_LOSS = 0.2133
TOY_ITERATIONS = 244  # 2.0 M tokens
# Dense matrix products of 16-bit numbers, summed in float32, TFLOP/s, by the name of the card.
PEAK = PUBLISHED_PEAK | {"4090": 165}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row works: the device, a folder for what it writes, the folder of the prepared data,
    and settings to change. (The tests work on a CPU, with smaller models.)
    """

    device: str
    folder: Path
    data: Path
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self, name: str, **settings: Any) -> dict[str, Any]:
        """The settings of a run in the subfolder `name`."""
        paths = dict(data_dir=str(self.data), out_dir=str(self.folder / name),
                     plot_dir=str(self.folder / "plots"))
        return dict(device=self.device) | paths | settings | self.changes

    def flags(self, name: str, **settings: Any) -> list[str]:
        """The same for train.py's command line."""
        return [f"--{key}={value}" for key, value in self.settings(name, **settings).items()]

    def run(self, **settings: Any) -> train.Run:
        """A run that has not begun, and writes nothing."""
        return train.open_run(Config.from_preset(**self.settings("run", **settings)), {})

    def warm_run(self, **settings: Any) -> train.Run:
        """A compiled run after three steps: kernels are chosen, memory is allocated."""
        run = self.run(**settings)
        train.compile_model(run)
        timed_steps(run, 3)
        return run


def timed_steps(run: train.Run, count: int) -> float:
    """Takes so many steps; the seconds until the GPU has done them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------- The rows


def card(place: Place) -> Answer:
    """The card, its clocks, and the versions of what drives it."""
    found = torch.cuda.get_device_properties(place.device)
    lines = [f"{found.name}, capability {found.major}.{found.minor}",
             f"{found.total_memory / 1e9:.1f} GB, {found.multi_processor_count} multiprocessors"]
    asked = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--id=GPU-{found.uuid}", f"--query-gpu={asked}", "--format=csv"]
    with contextlib.suppress(OSError):  # it is not installed everywhere
        lines.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    versions = train.versions_of(torch.device(place.device)) | {"cuda": torch.version.cuda}
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "capability 7.0 or newer (torch.compile)", "\n".join(lines)


def gpu_tests(place: Place) -> Answer:
    """The tests that need a GPU; elsewhere they are skipped."""
    files = [f"tests/test_{name}.py" for name in ("model", "train", "survival")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda or skipped_float16", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1] if lines else f"pytest said nothing, status {done.returncode}"
    return "all pass (below capability 8.0: bfloat16 skipped)", "\n".join([last, *failed])


def synchronization(place: Place) -> Answer:
    """In a step the CPU never waits for the GPU. PyTorch raises an error where it would."""
    run = place.warm_run(preset="full")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "20 steps without synchronization", f"20 steps without synchronization{compiled(run)}"


def compiled(run: train.Run) -> str:
    return "" if run.compiled_shape else " (not compiled)"


def kernels(place: Place) -> Answer:
    """What a step launches, and how long the GPU is busy with it."""
    run, count = place.warm_run(preset="full"), 10
    seconds = timed_steps(run, count) / count  # without the profiler, which slows the launches
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        timed_steps(run, count)
    events = [event for event in profiler.events()
              if event.device_type == torch.autograd.DeviceType.CUDA
              and not event.is_user_annotation]  # such a range holds kernels, and is none
    return "about 350 launches, by a count on a CPU", kernel_report(events, count, seconds)


def kernel_report(events: Iterable[Any], steps: int, seconds: float) -> str:
    """The kernels and copies of so many steps, each of which takes so many seconds."""
    launches, times = Counter(), Counter()  # by name; times in microseconds
    for event in events:
        launches[event.name] += 1
        times[event.name] += event.time_range.elapsed_us()
    if not launches:
        raise RuntimeError("the profiler saw no kernel")
    busy = times.total() / 1e6 / steps / seconds
    lines = [f"{launches.total() / steps:.0f} launches a step, GPU busy {busy:.0%} of "
             f"{seconds * 1e3:.1f} ms"]
    for name, microseconds in times.most_common(10):
        each, often = microseconds / 1e3 / steps, launches[name] / steps
        lines.append(f"{each:.3f} ms a step, {often:.1f} times: {name[:100]}")
    return "\n".join(lines)


def speeds(place: Place) -> Answer:
    """The presets over 1 M tokens each. The minutes of a pass are plots/README.md's."""
    lines = [speed(place, preset="full"), speed(place, preset="full", batch_size=256),
             speed(place, preset="tuned"), speed(place, preset="reference")]
    expected = ("full, by arithmetic: T4 60,000 to 87,000 tokens/s, 2.0 GB\n"
                "RTX 4090 254,000 or more, H100 393,000 or more (472 M tokens in 31 and 20 min)\n"
                "MFU = 6 x parameters x tokens / seconds / published dense 16-bit peak")
    return expected, "\n".join(lines)


def speed(place: Place, tokens: int = 2**20, **settings: Any) -> str:
    """Tokens/s, peak memory and MFU of steps of a preset."""
    torch.compiler.reset()  # PyTorch keeps only eight compiled versions of a function
    gc.collect()  # the run before
    torch.cuda.reset_peak_memory_stats()
    name = " ".join(map(str, settings.values()))
    try:
        run = place.warm_run(**settings)
        size = run.config.tokens_per_iteration * run.config.gradient_accumulation_steps
        steps = max(tokens // size, 1)
        per_second = steps * size / timed_steps(run, steps)
    except torch.OutOfMemoryError:
        return f"{name}: out of memory"
    memory = torch.cuda.max_memory_allocated() / 1e9
    line = f"{name}: {per_second:,.0f} tokens/s, {memory:.1f} GB, {mfu(run, per_second)}"
    return line + compiled(run)


def mfu(run: train.Run, tokens_per_second: float) -> str:
    """Model FLOPs utilization (Chowdhery et al., 2022, appendix B), attention left out."""
    words = re.split(r"\W", torch.cuda.get_device_name())
    peak = next((PEAK[name] for name in PEAK if name in words), None)
    if peak is None or run.dtype == torch.float32:
        return "no MFU: peak unknown"
    flops = 6 * run.model.parameter_count() * tokens_per_second
    return f"MFU {flops / (peak * 1e12):.1%} of {peak} TFLOP/s"


def toy_loss(place: Place) -> Answer:
    """`full` on 2 M tokens in the GPU's fastest precision, against a CPU."""
    return f"validation loss {CPU_LOSS:.4f} within 0.02 (a CPU's)", toy_run(place, "auto")


def toy_loss_float16(place: Place) -> Answer:
    """The same in float16, whose loss scale falls at every step that it makes overflow."""
    return "loss of row 5 within 0.02, few skipped, scale at most 65,536", toy_run(place, "float16")


def toy_run(place: Place, dtype: str) -> str:
    """Trains `full` on toy stories by train.py, and reads its checkpoint."""
    name = f"toy_{dtype}"
    train.main(place.flags(name, preset="full", max_iters=TOY_ITERATIONS, dtype=dtype))
    checkpoint = gpt.load_file(place.folder / name / "ckpt.pt")
    row, scaler = checkpoint["state"]["log"][-1], checkpoint["scaler"]
    scale = f", scale {scaler['scale']:,g}" if scaler else ""
    return (f"validation loss {row['val_loss']:.4f} after {row['tokens']:,} tokens, "
            f"{row['skipped_updates']} steps skipped{scale}")


# train.py, but its process dies before the step at the iteration that comes first.
DIE = """
import os, sys, train
step, last = train.Run.step, int(sys.argv[1])
def step_or_die(run):
    if run.state.iteration == last:
        os._exit(9)
    step(run)
train.Run.step = step_or_die
train.main(sys.argv[2:])
"""


def resuming(place: Place, iterations: int = 200) -> Answer:
    """A run at once, and one killed at half and resumed: three processes, since another process
    may choose other kernels.
    """
    half = iterations // 2
    common = dict(preset="full", max_iters=iterations, eval_interval=half)
    files = [place.folder / name / "ckpt.pt" for name in ("whole", "killed")]
    run_process(0, "train.py", *place.flags("whole", **common))
    run_process(9, "-c", DIE, str(half), *place.flags("killed", **common))
    if gpt.load_file(files[1])["state"]["iteration"] != half:
        raise RuntimeError("it was not killed at half")
    run_process(0, "train.py", "--resume", f"--out_dir={files[1].parent}")
    return "bit-equal", comparison(*(gpt.load_file(file) for file in files))


def run_process(status: int, *command: str) -> None:
    """Runs Python in a process. RuntimeError if it does not end with this status."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != status:
        raise RuntimeError(f"status {done.returncode}, not {status}: {done.stderr[-300:]}")


def comparison(ours: dict, theirs: dict) -> str:
    """How far two checkpoints are apart: their weights, and the losses of their evaluations."""
    gaps = [(weight - theirs["model"][name]).abs().max() for name, weight in ours["model"].items()]
    gap = torch.stack(gaps).max().item()  # NaN if one is
    losses = [[row["val_loss"] for row in run["state"]["log"]] for run in (ours, theirs)]
    if gap == 0 and losses[0] == losses[1]:
        return f"bit-equal: weights, and {len(losses[0])} evaluations"
    return f"weights up to {gap:.1e} apart, validation losses {losses[0]} and {losses[1]}"


def repetitive_text(place: Place, steps: int = 20) -> Answer:
    """Eleven of twelve tokens alike, as in padding or tables: the head's gradient is a sum over
    thousands of like tokens, which float16 must hold.
    """
    other = "float32"
    if place.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        other = "bfloat16"
    results = [repetitive_run(place, dtype, steps) for dtype in ("float16", other)]
    return f"few skipped, loss as in {other}", "; ".join(results)


def repetitive_run(place: Place, dtype: str, steps: int) -> str:
    run = place.run(preset="full", dtype=dtype, compile="false")
    text = np.full(120_000, 220, dtype=np.uint16)  # spaces
    text[::12] = np.random.default_rng(0).integers(0, 50_000, size=10_000)
    run.tokens["train"] = text
    for _ in range(steps):
        run.step()
        run.check_gradients()  # ten skipped steps in a row end a run
    scale = f", scale {run.scaler.get_scale():,g}" if run.scaler.is_enabled() else ""
    skipped = int(run.state.skipped_updates)
    return f"{dtype}: loss {run.loss.item():.3f}, {skipped} of {steps} steps skipped{scale}"


def sampling(place: Place) -> Answer:
    """One seed tells one story, whatever the weights are: here the first ones."""
    run, file = place.run(preset="full"), place.folder / "first_weights.pt"
    gpt.save_file(file, run.config, run.model)
    results = []
    for count in (1, 4):
        texts = []
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as text:
                sample.main([f"--checkpoint={file}", f"--device={place.device}", "--seed=1",
                             f"--num_samples={count}", "--max_new_tokens=100"])
            texts.append(text.getvalue())
        results.append(f"{count} at once: {'the same' if texts[0] == texts[1] else 'different'}")
    return "the same text twice", ", ".join(results)


ROWS: list[tuple[str, Callable[[Place], Answer]]] = [
    ("the card", card),
    ("the GPU tests", gpu_tests),
    ("no synchronization in a step", synchronization),
    ("kernels of a step of full", kernels),
    ("speed and memory", speeds),
    ("full, 2 M toy tokens", toy_loss),
    ("the same in float16", toy_loss_float16),
    ("200 iterations, killed at 100 and resumed", resuming),
    ("repetitive text in float16", repetitive_text),
    ("sampling twice with one seed", sampling),
]

# --------------------------------------------------------------------------------------- The table


def main(argv: list[str]) -> None:
    parser = Parser("Checks training on a CUDA GPU, in some ten minutes and with 2 GB of disk.")
    names = ", ".join(f"{number} {name}" for number, (name, _) in enumerate(ROWS))
    add_flag(parser, "only", int, None, f"one row: {names}", low=0, high=len(ROWS) - 1)
    add_flag(parser, "out", str, "gpu_check.json", "the file to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here to check: see Troubleshooting in README.md")
    numbers, rows = range(len(ROWS)) if args.only is None else [args.only], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Place("cuda", Path(folder), Path(folder, "data"))
        prepare("toy", place.data)
        for number in numbers:
            notice(f"\nrow {number}: {ROWS[number][0]}")
            rows.append(in_own_process(number, place))
            with atomic_write(args.out) as partial:  # after each row: what is done is kept
                partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    report(rows)
    notice(f"wrote {args.out}")


def in_own_process(number: int, place: Place) -> dict[str, Any]:
    start, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            expected, measured = pool.submit(run_row, number, place).result()
        except BrokenProcessPool:
            expected, measured = "no failure", "FAILED: its process died"
    return dict(row=number, name=ROWS[number][0], expected=expected, measured=measured,
                seconds=round(time.monotonic() - start))


def run_row(number: int, place: Place) -> Answer:
    """A row's answer; one that fails says so in it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stories: stdout is for the table
            return ROWS[number][1](place)
    except (Exception, SystemExit) as problem:
        where = "".join(traceback.format_exception(problem)[-6:]).strip()
        line = f"FAILED: {type(problem).__name__}: {one_line(problem)[:100]}"
        return "no failure", f"{line}\n{where}"


def report(rows: list[dict[str, Any]]) -> None:
    """Prints a Markdown table of the first lines, and the details below it."""
    cells, details = [], []
    for row in rows:
        cell = [f"{row['row']} {row['name']}"]
        for column in ("expected", "measured"):
            first, _, rest = row[column].partition("\n")
            cell.append(first)
            if rest:
                details.append(f"\nRow {row['row']}, {column}:\n{rest}")
        cells.append([*cell, str(row["seconds"])])
    show("The GPU check", ["", "expected", "measured", "seconds"], cells)
    print("\n".join(details))


if __name__ == "__main__":
    cli(main)
