"""Contenders side by side: each in a process of its own, in turns, so that what disturbs one
disturbs all.

A contender is a function that sets up and returns its works, `{name: function}`. It runs in a
fresh process, since allocators and thread pools are a process's own.
"""

import ctypes
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from config import DTYPES, Parser, add_flag

import torch

Works = dict[str, Callable[[], Any]]


class Timing(NamedTuple):
    """Seconds of a work's repeats, and the memory it took above the idle process, in bytes."""

    seconds: list[float]
    memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def cells(self, name: str, amount: float, ours: float, ceiling: float) -> list[str]:
        """A row of `show`: of `amount` tokens or MB, beside what `ours` and the ceiling took."""
        spread = f"{min(self.seconds):.3g} to {max(self.seconds):.3g}"
        speed = amount / self.median
        per_second = f"{speed:,.0f}" if speed > 100 else f"{speed:.1f}"
        return [
            name, f"{self.median:.3g} s", spread, per_second, f"{self.median / ours:.2f}x",
            f"{self.memory / 1e9:.2f} GB", f"{ceiling / self.median:.0%}",
        ]


def measure(
    contenders: dict[str, Callable[[], Works]], repeats: int, cuda: bool = False
) -> dict[str, Timing]:
    """Timings under `contender` or, where it has several works, `contender: work`."""
    processes = {name: Process(setup, cuda) for name, setup in contenders.items()}
    try:
        jobs = [(name, work) for name, process in processes.items() for work in process.answer()]
        for name, work in jobs:  # the first time is not kept: it compiles, and takes memory
            processes[name].ask("time", work)
        seconds = {job: [] for job in jobs}
        for _ in range(repeats):
            for name, work in jobs:
                seconds[name, work].append(processes[name].ask("time", work))
        memory = {job: processes[job[0]].ask("memory", job[1]) for job in jobs}
    finally:
        for process in processes.values():
            process.end()
    timings = {}
    for name, work in jobs:
        label = f"{name}: {work}" if work else name
        timings[label] = Timing(seconds[name, work], memory[name, work])
    return timings


class Process:
    """A contender in its process, doing what it is asked."""

    def __init__(self, setup: Callable[[], Works], cuda: bool):
        self.pipe, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=serve, args=(theirs, setup, cuda), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str, work: str) -> Any:
        self.pipe.send((what, work))
        return self.answer()

    def answer(self) -> Any:
        found = self.pipe.recv()
        if isinstance(found, str):
            raise SystemExit(found)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def serve(pipe: Any, setup: Callable[[], Works], cuda: bool) -> None:
    """The other side of `Process`."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    try:
        works = setup()
        pipe.send(list(works))
        while True:
            what, name = pipe.recv()
            if what == "memory":
                pipe.send(cuda_memory(works[name]) if cuda else host_memory(works[name]))
                continue
            wait()
            start = time.perf_counter()
            works[name]()
            wait()
            pipe.send(time.perf_counter() - start)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the one who asked is gone
        pass
    except BaseException:
        pipe.send(traceback.format_exc())


def host_memory(work: Callable[[], Any]) -> int:
    """Bytes by which the process grows, at most, while it works (Linux; elsewhere 0)."""
    if platform.system() != "Linux":
        return 0
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # what is free goes back first
    idle = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work()
    return status("VmHWM") - idle


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def cuda_memory(work: Callable[[], Any]) -> int:
    idle = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - idle


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table, ready for the README."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}\n")
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")


def bench_parser(description: str, repeats: int, dtype: bool = True) -> Parser:
    parser = Parser(description)
    add_flag(parser, "repeats", int, repeats, "times that each work is timed", low=1)
    if dtype:
        help = "of all but the rows of float32; auto is the device's fastest"
        add_flag(parser, "dtype", str, "auto", help, choices=DTYPES)
    return parser


def machine(cuda: bool = False) -> str:
    """What the figures were measured on: processor, threads, versions."""
    info, processor = Path("/proc/cpuinfo"), platform.machine()
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{[*names, processor][0]}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if cuda else processor
    packages = ("torch", "transformers", "tiktoken", "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{device}; Python {platform.python_version()}, {versions}"
