"""Trains the GPT: `python train.py --preset demo`, or without a preset the reference run.

    for every update (an optimizer step over gradient_accumulation_steps iterations):
        for every pass (what goes through the device at once):
            forward, loss, backward: gradients add up
        clip them, set the learning rate, step

Around it: evaluation on fixed windows, whole-or-nothing checkpoints, a log, a plot. Every
random choice is a function of the seed and the place in the run, so that a run resumed
from `ckpt.pt` goes on as if it had never stopped, on one device or many.
"""

import contextlib
import csv
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import io
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from config import Config, Parser, UserError, add_config_flags, clear_partials, notice, one_line, run, whole_file
from model import GPT, config_of, load_file, load_model, load_weights, save_file
from prepare_data import END_OF_TEXT, load_meta, open_split, prepare, same_dataset, tokenizer
from sample import pick_device, pick_dtype, stories

# What a resumed run may change, since none of it changes what has been learnt so far.
MAY_CHANGE = {
    "max_iters", "lr_decay_iters", "eval_interval", "checkpoint_minutes", "device", "dtype", "compile",
    "device_batch_size", "data_dir", "out_dir", "plot_dir",
}  # fmt: skip
# What a model that a run starts from decides; block_size may be cut.
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu")
FILES = ("model.pt", "log.csv", "ckpt.pt")
MAX_SKIPPED = 10  # updates in a row without a finite gradient, after which a run cannot recover
REFERENCE_CURVE = Path(__file__).parent / "plots" / "published_reference.csv"

# ------------------------------------------------------------------------------------------
# Pure functions of the config and the place in the run


def learning_rate_at(config: Config, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0: linear warmup, then the decay.

    The cosine is PyTorch's SequentialLR of LinearLR and CosineAnnealingLR (Loshchilov and
    Hutter, 2017, equation 5) in closed form. min_lr from decay_iters on.
    """
    if iteration < config.warmup:
        start = config.warmup_start_factor
        return config.learning_rate * (start + (1 - start) * iteration / config.warmup)
    if iteration >= config.decay_iters:
        return config.min_lr
    progress = (iteration - config.warmup) / (config.decay_iters - config.warmup)
    left = 1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.learning_rate - config.min_lr) * left


def update_end(config: Config, iteration: int) -> int:
    """The iteration at which the update that holds `iteration` is done."""
    steps = config.gradient_accumulation_steps
    return min((iteration // steps + 1) * steps, config.max_iters)


def evaluation_at(config: Config, iteration: int) -> int | None:
    """The iteration whose evaluation falls on the update boundary `iteration`, if one does.

    Weights change only at updates, so the evaluation at iteration 500 scores them as the
    last whole update before it (32 x 15 = 480) left them. Before training there is none.
    """
    if iteration == config.max_iters:
        return iteration
    due = math.ceil(iteration / config.eval_interval) * config.eval_interval
    return due if iteration > 0 and due < update_end(config, iteration) else None


def random_state(seed: int, *place: int) -> np.random.SeedSequence:
    """Randomness for one place in the run; neither seeds nor places overlap."""
    return np.random.SeedSequence(seed, spawn_key=place)


CROPS, DROPOUT, WEIGHTS = range(3)  # the first number of every place


def seed_torch(seed: int, *place: int) -> None:
    torch.manual_seed(int(random_state(seed, *place).generate_state(1, np.uint64)[0]))


def crop_starts(config: Config, iteration: int, length: int) -> np.ndarray:
    """Where the iteration's sequences begin in a split of `length` tokens: (batch_size,)."""
    if config.crops == "random":
        rng = np.random.default_rng(random_state(config.seed, CROPS, iteration))
        return rng.integers(0, length - config.block_size, size=config.batch_size)
    count = max((length - config.block_size) // config.block_size, 1)
    numbers = range(iteration * config.batch_size, (iteration + 1) * config.batch_size)
    return np.array([window_starts(config.seed, i // count, count, length, config.block_size)[i % count] for i in numbers])


@functools.lru_cache(maxsize=2)
def window_starts(seed: int, epoch: int, count: int, length: int, block_size: int) -> np.ndarray:
    """Where the `count` windows of an epoch begin, shuffled: side by side from an offset drawn anew each epoch."""
    rng = np.random.default_rng(random_state(seed, CROPS, epoch))
    offset = rng.integers(0, min(block_size, length - block_size))
    return offset + block_size * rng.permutation(count)


def even_starts(config: Config, length: int) -> np.ndarray:
    """Where an evaluation's windows begin: up to eval_iters x batch_size, evenly spaced."""
    last = length - config.block_size - 1
    count = min(config.eval_iters * config.batch_size, last + 1)
    return np.linspace(0, last, count).round().astype(np.int64)


def in_passes(starts: np.ndarray, size: int) -> list[np.ndarray]:
    return [starts[i : i + size] for i in range(0, len(starts), size)]


def read_batch(split: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows at `starts` and the same one token on: ids (B, block_size), twice, on the device.

    To a GPU the copy is asynchronous (from pinned memory), as is everything launched after it:
    while the device works on one pass, this reads the next.
    """
    windows = torch.from_numpy(split[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------
# The command line, and what has to be there before a run


def parse_command_line(argv: list[str]) -> tuple[dict[str, Any], str]:
    """The Config fields that were typed, and which of resume, overwrite and eval_only was, if one was."""
    parser = Parser("Trains the GPT; every setting of config.py is a flag. The defaults shown are those of the reference preset.")
    parser.add_argument("--resume", action="store_true", help="go on from out_dir/ckpt.pt (or start, if there is none)")
    parser.add_argument("--overwrite", action="store_true", help="start again in an out_dir that holds a run, which is lost")
    parser.add_argument("--eval_only", action="store_true", help="score out_dir/model.pt, or init_from, on the whole validation split")
    add_config_flags(parser)
    typed = vars(parser.parse_args(argv))
    modes = [name for name in ("resume", "overwrite", "eval_only") if typed.pop(name)]
    if len(modes) > 1:
        raise UserError("--resume keeps the run in out_dir, --overwrite drops it, --eval_only only scores it: choose one")
    return typed, "".join(modes)


def folder_of(typed: dict[str, Any]) -> Path:
    return Path(typed.get("out_dir") or f"out/{typed.get('preset', 'reference')}")


def plan_run(typed: dict[str, Any], mode: str) -> tuple[Config, dict[str, Any], dict[str, Any] | None, GPT | None]:
    """The run's Config, the settings in it that are not its preset's, and the checkpoint it goes on from or the model it starts from."""
    path = folder_of(typed) / "ckpt.pt"
    if mode == "resume" and path.exists():
        saved = load_file(path)
        parts = {"typed", "state", "data", "optimizer", "scaler"}
        if not parts <= saved.keys() or saved["state"].keys() != {field.name for field in dataclasses.fields(State)}:
            raise UserError(f"{path} does not hold a run of this version to go on with: name another --out_dir")
        return resumed_config(typed, saved, path), typed, saved, None
    if not mode and (there := [name for name in (path, path.with_name("model.pt")) if name.exists()]):
        raise UserError(f"{there[0]} is there already: add --resume to go on with it, --overwrite to drop it, or name another --out_dir")
    source = load_model(typed["init_from"]) if "init_from" in typed else None
    settings = typed | architecture(source.config, typed["init_from"], typed) if source else typed
    config = Config.from_preset(**settings)
    if mode == "resume":
        others = ", ".join(str(other.parent) for other in sorted(Path("out").glob("*/ckpt.pt")))
        notice(f"there is no {path} yet: starting from the beginning" + (f" (runs to resume: {others})" if others else ""))
    return config, settings, None, source


def architecture(source: Config, path: str, typed: dict[str, Any]) -> dict[str, Any]:
    """The settings that come with the model in `path`, its context cut if that was typed. UserError if another one was typed."""
    taken = {name: getattr(source, name) for name in ARCHITECTURE}
    if other := [f"{name} {value}, not {typed[name]}" for name, value in taken.items() if typed.get(name, value) != value]:
        raise UserError(f"the model in {path} has {', '.join(other)}: its weights fit no other, so leave that out")
    size = typed.get("block_size", source.block_size)
    if size > source.block_size:
        raise UserError(f"block_size {size} is too long: the model in {path} has learnt positions for {source.block_size} tokens only")
    return taken | {"block_size": size}


def resumed_config(typed: dict[str, Any], saved: dict[str, Any], path: Path) -> Config:
    """The checkpoint's Config with what was typed now, if that may change. UserError if not."""
    old = config_of(saved, path)
    differs = {name: value for name, value in typed.items() if getattr(old, name) != value}
    if "dataset" in differs and same_dataset(old.dataset, differs["dataset"]):
        del differs["dataset"]
    if refused := [f"{name} {getattr(old, name)} -> {value}" for name, value in differs.items() if name not in MAY_CHANGE]:
        raise UserError(f"a resumed run cannot change {', '.join(refused)}; train anew in another --out_dir")
    now, then = Config.from_preset(old.preset), dataclasses.asdict(old)
    untyped = [name for name in then if name not in {*saved["typed"], *typed, "dataset", "data_dir", "out_dir"}]
    edited = [f"{name} {then[name]} -> {getattr(now, name)}" for name in untyped if then[name] != getattr(now, name)]
    if edited:
        notice(f"config.py has changed since ({', '.join(edited)}): the run keeps the checkpoint's values")
    config = dataclasses.replace(old, **differs | {"dataset": old.dataset, "out_dir": str(path.parent)})
    if (config.warmup, config.decay_iters) != (old.warmup, old.decay_iters):
        was, is_now = (f"warmup {c.warmup} and decay until iteration {c.decay_iters}" for c in (old, config))
        notice(f"warning: the learning rate's schedule changes: {is_now}, not {was}")
    return config


def prepared_data(config: Config, typed: dict[str, Any], may_prepare: bool) -> dict[str, Any]:
    """The meta.json of the run's data, which is prepared if it is not there and may be. UserError if it does not suit."""
    folder = Path(config.data_dir)
    if config.vocab_size != END_OF_TEXT + 1:  # seen before anything is prepared
        raise UserError(f"vocab_size {config.vocab_size} is not that of GPT-2's tokenizer, {END_OF_TEXT + 1}")
    if not any((folder / name).exists() for name in ("meta.json", "train.bin", "val.bin")):
        if not may_prepare:
            raise UserError(f"there is no prepared data in {folder}: run prepare_data.py before, or name another --data_dir")
        notice(f"no prepared data in {folder}: preparing {config.dataset}")
        prepare(config.dataset, config.data_dir)
    meta = load_meta(config.data_dir)
    if "dataset" in typed and not same_dataset(meta["dataset"], typed["dataset"]):
        raise UserError(f"{folder} holds {meta['dataset']}, not {typed['dataset']}: name another --data_dir, or leave --dataset out")
    for name, split in meta["splits"].items():
        if split["tokens"] < config.block_size + 1:
            least = config.block_size + 1
            raise UserError(f"the {name} split in {folder} has {split['tokens']} tokens: block_size {config.block_size} needs {least}")
    return meta


def should_compile(name: str) -> bool:
    """Whether to torch.compile; auto: where there is a C++ compiler to do it with."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name == "true" and compiler is None:
        raise UserError("compile true needs a C++ compiler (Debian and Colab: apt-get install g++); use --compile false or auto")
    return name == "true" or (name == "auto" and compiler is not None)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed. It would give large blocks back to the system, and every pass
    would pay for fresh pages again: a fifth of the time on a CPU, half where pages are scarce.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # only glibc has it
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def lock_folder(folder: Path) -> None:
    """Holds `folder` for this process until it ends. UserError if another one holds it."""
    handle = os.open(folder, os.O_RDONLY)  # left open: the lock lives as long as the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another train.py is at work in {folder}: name another --out_dir") from None
    except OSError:
        pass  # a file system without locks (some network drives)


# ------------------------------------------------------------------------------------------
# The first embeddings

# What a token's first vector is made of besides its own random one, as shares of its squared
# length: "dog" and "Dog" begin with a cosine of 0.9, "dog" and "dogs" of 0.16.
SPELLING = {"word": 0.5, "letters": 0.4}


def spelling_of(token: bytes) -> dict[str, list[str]]:
    """A token's word, without case and space, and that word's groups of 3 to 5 letters, its ends marked.

    " Dogs": the word dogs; the groups <do, dog, ogs, gs>, <dog, dogs, ogs>, <dogs, dogs>.
    """
    word = (token.strip().lower() or token).decode("latin-1")  # a token may be a part of a letter only
    marked = f"<{word}>"
    return {"word": [word], "letters": [marked[i : i + size] for size in (3, 4, 5) for i in range(len(marked) - size + 1)]}


@torch.no_grad()
def spell(embedding: torch.nn.Embedding) -> None:
    """Lets those of GPT-2's tokens (V, C) that are spelled alike begin with like vectors: rare ones near their relatives.

    The direction of each becomes a sum of random ones: its own, its word's (the same for " Dog"
    and "dog"), and those of its word's letter groups ("dogs" has three of "dog"'s six); the
    length stays. The groups are nearly those of Bojanowski et al., 2017, section 3.2, where they
    stay part of the vector; here they are where it begins. Draws go on from those of the weights.
    """
    own = embedding.weight.cpu()
    traits = [spelling_of(tokenizer().decode_single_token_bytes(token)) for token in range(len(own))]
    total = F.normalize(own) * math.sqrt(1 - sum(SPELLING.values()))
    for kind, share in SPELLING.items():
        numbers: dict[str, int] = {}  # of the traits, in the order they appear
        members = torch.tensor([numbers.setdefault(trait, len(numbers)) for of in traits for trait in of[kind]])
        lengths = torch.tensor([len(of[kind]) for of in traits])
        vectors = torch.randn(len(numbers), own.size(1))
        means = F.embedding_bag(members, vectors, lengths.cumsum(0) - lengths)  # of each token's traits
        total += F.normalize(means) * math.sqrt(share)
    embedding.weight.copy_(F.normalize(total) * own.norm(dim=1, keepdim=True))


# ------------------------------------------------------------------------------------------
# Several devices, and being stopped


class Ranks:
    """The processes of a run: one, or those torchrun started. Each works on its share of every update."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if "RANK" not in os.environ:
            return
        if device.type == "cuda":
            self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(self.device)
        # Gloo carries what the hosts tell each other; gradients on GPUs go through NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))

    def share(self, items: np.ndarray) -> np.ndarray:
        """This rank's part of the items, divided as evenly as can be; some get none if they are few."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def sum(self, tensor: torch.Tensor) -> None:
        """Adds the tensor up over the ranks, in place. UserError if one of them has gone."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as problem:
                raise UserError(f"lost the other ranks ({one_line(problem)[:80]}): start again with --resume") from None

    def add_up(self, parameters: list[torch.nn.Parameter], loss: torch.Tensor) -> None:
        """Sums gradients and loss in one go. A rank that had no work joins with zeros."""
        if self.size == 1:
            return
        flat = torch.cat([*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters), loss.view(1)])
        self.sum(flat)
        *gradients, total = flat.split([*(p.numel() for p in parameters), 1])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.view_as(p)
        loss.copy_(total[0])

    def agree(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        values = torch.zeros(self.size, dtype=torch.int64)
        values[self.rank] = value
        self.sum(values)
        return int(values.max())

    def check_same(self, facts: Any) -> None:
        """UserError unless all ranks have the same facts (on several machines, files may differ)."""
        if self.size > 1:
            everyone: list[Any] = [None] * self.size
            dist.all_gather_object(everyone, facts)
            if any(other != facts for other in everyone):
                raise UserError("the ranks differ in data, checkpoint or settings: out_dir and data_dir must be the same files for all")


class Stopped(Exception):
    """A signal has come: what was begun is dropped."""


class StopSignal:
    """SIGINT and SIGTERM as a wish to stop: the first is noted, the second ends the process at once."""

    def __init__(self, several_ranks: bool):
        self.caught = 0
        self.at = 0.0
        # Under torchrun a Ctrl-C arrives twice, from the terminal and from torchrun.
        self.echo_seconds = 2.0 if several_ranks else 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number: int, frame: Any) -> None:
        if not self.caught:
            self.note(number)
            os.write(2, b"\nstopping after the pass at hand (again: at once)\n")
        elif time.monotonic() - self.at > self.echo_seconds:
            os._exit(128 + number)

    def note(self, number: int) -> None:
        if number and not self.caught:
            self.caught, self.at = number, time.monotonic()

    def release(self) -> None:
        """From here on the signals act as usual: there is nothing left to save."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------
# One run


@dataclasses.dataclass
class State:
    """Where a run is, apart from weights and optimizer: what goes into a checkpoint besides them."""

    iteration: int = 0
    best_val_loss: float = math.inf
    seconds: float = 0.0
    grad_norm: float = 0.0
    skipped_updates: int = 0
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Run:
    """A model being trained: the state of the loop, and the steps it is made of."""

    def __init__(self, config: Config, typed: dict[str, Any], meta: dict[str, Any], dtype: torch.dtype, ranks: Ranks):
        self.config, self.typed, self.meta, self.dtype = config, typed, meta, dtype
        device = self.device = ranks.device
        self.out_dir = Path(config.out_dir)
        self.ranks = ranks
        self.stop = StopSignal(ranks.size > 1)
        self.splits = {name: open_split(config.data_dir, name) for name in ("train", "val")}
        self.state = State()
        seed_torch(config.seed, WEIGHTS)
        self.model = GPT(config).to(device)  # drawn on the CPU: the same weights on every device
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=device))  # makes its scale, which a rank without work needs too
        if should_compile(config.compile):
            self.model.compile_parts()
        # Kept on the device until somebody asks, since reading stalls a GPU: loss and gradient norm
        # of the last update; updates skipped, how many in a row, and since which iteration.
        self.loss, self.grad_norm, self.skipped, self.streak, self.skipping_since = torch.zeros(5, device=device).unbind()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def stop_together(self) -> None:
        """Raises Stopped on every rank if a signal has come to any."""
        self.stop.note(self.ranks.agree(self.stop.caught))
        if self.stop.caught:
            raise Stopped

    def update(self, end: int) -> None:
        """One optimizer step over the iterations from the state's up to `end`. Stopped if a signal comes first."""
        config, begin = self.config, self.state.iteration
        starts = np.concatenate([crop_starts(config, i, len(self.splits["train"])) for i in range(begin, end)])
        passes = in_passes(self.ranks.share(starts), config.pass_sequences)
        self.loss = torch.zeros((), device=self.device)
        for number, some in enumerate(passes):
            seed_torch(config.seed, DROPOUT, begin, number, self.ranks.rank)
            x, y = read_batch(self.splits["train"], some, config.block_size, self.device)
            with self.autocast():
                loss = self.model(x, y) * (len(some) / len(starts))
            self.scaler.scale(loss).backward()
            self.loss += loss.detach()
            if self.stop.caught:
                break
        self.stop_together()
        self.ranks.add_up(list(self.model.parameters()), self.loss)
        self.step(learning_rate_at(config, end - 1))
        self.state.iteration = end

    def step(self, learning_rate: float) -> None:
        """Clips the gradient, steps, clears it. A gradient that is not finite changes no weight.

        The fused optimizer looks at `found_inf` on the device (GradScaler's own way of skipping
        a step), so nobody waits for the answer.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        skip = (~self.grad_norm.isfinite()).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["multiple"]
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = skip
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += skip
        self.streak = (self.streak + 1) * skip
        self.skipping_since = torch.where(self.streak == 1, self.state.iteration, self.skipping_since)

    @torch.no_grad()
    def loss_over(self, split: str, starts: np.ndarray) -> float:
        """The mean loss of the split's windows at `starts`, dropout off. Stopped if a signal comes first."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for some in in_passes(self.ranks.share(starts), self.config.pass_sequences):
            x, y = read_batch(self.splits[split], some, self.config.block_size, self.device)
            # An odd last batch is not worth compiling for.
            stance = "default" if len(some) == self.config.pass_sequences else "force_eager"
            with self.autocast(), torch.compiler.set_stance(stance):
                total += self.model(x, y).double() * len(some)
            if self.stop.caught:
                break
        self.stop_together()
        self.model.train()
        self.ranks.sum(total)
        return total.item() / len(starts)

    def whole_split_loss(self, split: str) -> float:
        """The mean loss over every token of the split but the first, each scored once."""
        size, tokens = self.config.block_size, len(self.splits[split]) - 1
        starts = np.arange(0, tokens - size + 1, size)
        total = self.loss_over(split, starts) * len(starts) * size
        if rest := tokens % size:
            x, y = read_batch(self.splits[split], np.array([tokens - rest]), rest, self.device)
            self.model.eval()
            with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"):
                total += self.model(x, y).item() * rest
        return total / tokens

    def evaluate(self, label: int, tokens_per_second: float, seconds: float) -> dict[str, float]:
        """Scores both splits on their fixed windows, and appends the row to the log."""
        losses = {name: self.loss_over(name, even_starts(self.config, len(split))) for name, split in self.splits.items()}
        self.settle()
        if not all(map(math.isfinite, losses.values())):
            raise UserError(f"the loss at iteration {label} is not finite: try a lower learning_rate; {self.last_checkpoint()}")
        row = dict(
            iteration=label,
            tokens=self.state.iteration * self.config.tokens_per_iteration,
            train_loss=losses["train"],
            val_loss=losses["val"],
            val_bits_per_byte=bits_per_byte(losses["val"], self.meta["splits"]["val"]),
            learning_rate=learning_rate_at(self.config, max(self.state.iteration - 1, 0)),
            grad_norm=self.state.grad_norm,
            skipped_updates=self.state.skipped_updates,
            tokens_per_second=tokens_per_second,
            seconds=seconds,
        )
        self.state.log.append(row)
        return row

    def settle(self) -> None:
        """Brings the device's figures into the state. UserError if no update gets through any more."""
        self.state.grad_norm = self.grad_norm.item()
        self.state.skipped_updates += int(self.skipped.item())
        self.skipped.zero_()
        if self.streak.item() >= MAX_SKIPPED:
            since = int(self.skipping_since.item())
            raise UserError(f"the gradient is not finite since iteration {since}: try a lower learning_rate; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        path = self.out_dir / "ckpt.pt"
        return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"

    def save_evaluated(self, row: dict[str, float]) -> None:
        """After an evaluation: model.pt if it is the best so far, then log.csv, then ckpt.pt."""
        best = row["val_loss"] < self.state.best_val_loss
        self.state.best_val_loss = min(row["val_loss"], self.state.best_val_loss)
        if self.ranks.rank == 0:
            if best:
                save_file(self.out_dir / "model.pt", self.config, self.model, **row)
            write_log(self.out_dir / "log.csv", self.state.log)
        self.save(row["seconds"])

    def save(self, seconds: float) -> None:
        """Writes ckpt.pt: all it takes to go on from here. Every rank waits until it is there."""
        self.settle()
        self.state.seconds = seconds
        if self.ranks.rank == 0:
            self.write_checkpoint()
        self.ranks.agree(0)

    def write_checkpoint(self) -> None:
        save_file(
            self.out_dir / "ckpt.pt", self.config, self.model,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), state=dataclasses.asdict(self.state),
            typed=self.typed, data=data_hashes(self.meta),
        )  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """The inverse of `save`. UserError if the data is not the data the run began with."""
        if saved["data"] != data_hashes(self.meta):
            raise UserError(f"the data in {self.config.data_dir} has changed since this run began: resume with the data it was trained on")
        path = self.out_dir / "ckpt.pt"
        load_weights(self.model, saved["model"], path)
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.scaler.is_enabled() and saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            self.state = State(**saved["state"])
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise UserError(f"{path} does not hold a run of this version ({one_line(problem)[:80]})") from None
        self.grad_norm = torch.tensor(self.state.grad_norm, device=self.device)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), decaying matrices and embeddings, not biases and LayerNorms.

    A group's `multiple` is its rate as a multiple of the learning rate.
    """
    embeddings = {"params": [], "weight_decay": config.weight_decay, "multiple": config.embedding_lr}
    matrices = {"params": [], "weight_decay": config.weight_decay, "multiple": 1.0}
    mlp_out = {"params": [], "weight_decay": config.weight_decay, "multiple": config.mlp_out_lr}
    vectors = {"params": [], "weight_decay": 0.0, "multiple": config.vector_lr}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            vectors["params"].append(p)
        elif name.endswith(("wte.weight", "wpe.weight")):
            embeddings["params"].append(p)
        elif name.endswith("mlp.c_proj.weight"):
            mlp_out["params"].append(p)
        else:
            matrices["params"].append(p)
    groups = [embeddings, matrices, mlp_out, vectors]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def data_hashes(meta: dict[str, Any]) -> dict[str, str]:
    return {name: split["sha256"] for name, split in meta["splits"].items()}


def bits_per_byte(loss: float, split: dict[str, Any]) -> float:
    """A loss in nats per token as bits per UTF-8 byte of the split's text: comparable between vocabularies."""
    return loss / math.log(2) * split["tokens"] / split["bytes"]


def write_log(path: Path, log: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(log[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: round(value, 6 if name != "learning_rate" else 12) for name, value in row.items()} for row in log)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())


def draw_curves(path: Path, config: Config, log: list[dict[str, float]]) -> None:
    """Losses over iterations, the learning rate below; for the reference preset the published curve behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if config.preset == "reference" and REFERENCE_CURVE.exists():
        with open(REFERENCE_CURVE, newline="") as file:
            points = [(int(row["iteration"]), float(row["val_loss"])) for row in csv.DictReader(file)]
        losses.plot(*zip(*points, strict=True), color="0.7", linewidth=5, label="validation, published reference run")
    at = [row["iteration"] for row in log]
    losses.plot(at, [row["train_loss"] for row in log], "o-", markersize=3, label="train")
    losses.plot(at, [row["val_loss"] for row in log], "o-", markersize=3, label="validation")
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(f"{config.out_dir}: {config.tokens_per_iteration:,} tokens an iteration")
    losses.legend()
    losses.grid(alpha=0.3)
    steps = np.unique(np.linspace(0, at[-1] - 1, 500).astype(int))
    rate.plot(steps, [learning_rate_at(config, int(i)) for i in steps], color="tab:green")
    rate.plot(at, [row["learning_rate"] for row in log], "o", markersize=3, color="tab:green")  # off the line where a longer run is resumed
    rate.set_ylabel("learning rate")
    rate.set_xlabel("iteration")
    rate.grid(alpha=0.3)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


# ------------------------------------------------------------------------------------------
# The loop


class Clock:
    """Measures a run: its speed without evaluations, its age, the time it still needs."""

    def __init__(self, config: Config, state: State, val_tokens: int):
        self.config, self.val_tokens = config, val_tokens
        self.drawn = time.monotonic()
        self.born = self.drawn - state.seconds
        self.training = 0.0  # seconds and iterations of training that have been measured
        self.iterations = 0
        self.restart(state.iteration)

    def time_to_draw(self) -> bool:
        """Whether the last plot is more than 10 s old (drawing one takes half a second)."""
        old = time.monotonic() - self.drawn > 10
        self.drawn = time.monotonic() if old else self.drawn
        return old

    def restart(self, iteration: int) -> None:
        self.since, self.mark = time.monotonic(), iteration

    def stop(self, iteration: int) -> float:
        """Tokens per second since `restart`."""
        seconds, done = time.monotonic() - self.since, iteration - self.mark
        self.training += seconds
        self.iterations += done
        return done * self.config.tokens_per_iteration / seconds

    def seconds(self) -> float:
        return time.monotonic() - self.born

    def seconds_left(self, iteration: int) -> float:
        """Training, evaluations and the last scoring; a forward pass is a third of an iteration."""
        config = self.config
        training = self.training + time.monotonic() - self.since
        iterations = self.iterations + iteration - self.mark
        evaluations = math.ceil((config.max_iters - iteration) / config.eval_interval)
        forwards = evaluations * 2 * config.eval_iters + self.val_tokens / config.tokens_per_iteration
        return (config.max_iters - iteration + forwards / 3) * training / max(iterations, 1)


def train(run: Run) -> bool:
    """Updates until max_iters, with an evaluation where one is due and a checkpoint when it is time.

    Returns whether it got there; if not, it was stopped, and has written a checkpoint.
    """
    config, state = run.config, run.state
    clock = Clock(config, state, run.meta["splits"]["val"]["tokens"])
    saved_at = looked_at = time.monotonic()
    compiled = False
    with progress_bar(config, state.iteration, run.ranks.rank == 0) as bar:
        try:
            while not is_finished(config, state):
                run.stop_together()
                if not evaluated(config, state):
                    evaluate(run, clock)
                    saved_at = time.monotonic()
                    continue
                begin = state.iteration
                run.update(update_end(config, begin))
                bar.update(state.iteration - begin)
                if not compiled and evaluated(config, state):  # the first update is no measure of the others
                    run.loss.item()
                    clock.restart(state.iteration)
                elif time.monotonic() - looked_at > 1:  # at most once a second: looking makes a GPU wait
                    run.settle()
                    show_progress(bar, run, clock)
                    looked_at = time.monotonic()
                compiled = True
                if run.ranks.agree(time.monotonic() - saved_at > 60 * config.checkpoint_minutes):
                    run.save(clock.seconds())
                    saved_at = time.monotonic()
        except Stopped:
            run.optimizer.zero_grad(set_to_none=True)
            run.save(clock.seconds())
            return False
    return True


def evaluate(run: Run, clock: Clock) -> None:
    """An evaluation, and what comes of it: a line, the files, the plot."""
    run.loss.item()  # wait for the device, so that the speed is true
    label = evaluation_at(run.config, run.state.iteration)
    row = run.evaluate(label, clock.stop(run.state.iteration), clock.seconds())
    run.save_evaluated(row)
    if run.ranks.rank == 0:
        tqdm.write(evaluation_line(row), file=sys.stderr)
        if clock.time_to_draw():
            draw_curves(plot_path(run.config), run.config, run.state.log)
    clock.restart(run.state.iteration)


def evaluated(config: Config, state: State) -> bool:
    """Whether the log has the evaluation that falls on this boundary, if one does."""
    label = evaluation_at(config, state.iteration)
    return label is None or any(row["iteration"] == label for row in state.log)


def is_finished(config: Config, state: State) -> bool:
    return state.iteration > config.max_iters or (state.iteration == config.max_iters and evaluated(config, state))


def progress_bar(config: Config, done: int, show: bool) -> tqdm:
    return tqdm(
        total=config.max_iters, initial=done, disable=not show, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} iterations{postfix}",
    )  # fmt: skip


def show_progress(bar: tqdm, run: Run, clock: Clock) -> None:
    iteration = run.state.iteration
    loss = run.loss.item()
    speed = (clock.iterations + iteration - clock.mark) / (clock.training + time.monotonic() - clock.since)
    left = tqdm.format_interval(clock.seconds_left(iteration))
    rate = learning_rate_at(run.config, iteration - 1)
    speed *= run.config.tokens_per_iteration
    bar.set_postfix_str(f"{left} left, loss {loss:.3f}, lr {rate:.2e}, {speed:,.0f} tokens/s", refresh=False)


def evaluation_line(row: dict[str, float]) -> str:
    return (
        f"iteration {row['iteration']:,}: train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f} "
        f"({row['val_bits_per_byte']:.3f} bits per byte), {row['tokens_per_second']:,.0f} tokens/s"
    )


def plot_path(config: Config) -> Path:
    return Path(config.plot_dir) / f"{Path(config.out_dir).resolve().name}.png"


def describe(run: Run) -> None:
    """What is about to run, in a few lines."""
    config = run.config
    update = config.tokens_per_iteration * config.gradient_accumulation_steps
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    updates = math.ceil(config.max_iters / config.gradient_accumulation_steps)
    parameters = run.model.parameter_count()
    compiled = "compiled" if should_compile(config.compile) else "not compiled"
    notice(f"{config.preset}: {parameters / 1e6:.1f} M parameters on {device}, {str(run.dtype).removeprefix('torch.')}, {compiled}")
    if config.init_from:
        notice(f"first weights: {config.init_from}")
    notice(f"data: {config.data_dir} ({run.meta['dataset']}), {run.meta['splits']['train']['tokens']:,} training tokens")
    notice(
        f"{config.max_iters:,} iterations in {updates:,} updates of {update:,} tokens: "
        f"{config.max_iters * config.tokens_per_iteration:,} tokens in all"
    )
    if run.state.iteration:
        notice(f"going on from iteration {run.state.iteration:,}")


def score(run: Run) -> str:
    """The whole validation split, scored: a line."""
    loss = run.whole_split_loss("val")
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return f"validation loss {loss:.4f}, perplexity {perplexity:.2f}, {bits_per_byte(loss, run.meta['splits']['val']):.4f} bits per byte"


def score_only(typed: dict[str, Any]) -> None:
    """--eval_only: a model's score on stdout. Writes nothing, so that the run in out_dir may be going on."""
    path = typed.get("init_from", str(folder_of(typed) / "model.pt"))
    if "init_from" not in typed and not Path(path).is_file():
        raise UserError(f"there is no {path} to score: name its --out_dir, or a model with --init_from")
    source = load_model(path)
    # The run's own data; the device at hand, which need not be the run's. To compile for one pass over a split does not pay.
    wanted = dict(device="auto", dtype="auto", compile="false", device_batch_size=None)
    if "preset" in typed and "init_from" in typed:
        wanted["dataset"] = Config.from_preset(typed["preset"]).dataset
    wanted |= {name: value for name, value in typed.items() if name in {"data_dir", "dataset", *wanted}}
    if "dataset" in wanted:  # its folder, unless one was typed
        wanted.setdefault("data_dir", None)
    wanted |= architecture(source.config, path, typed)
    config = dataclasses.replace(source.config, **wanted)
    with told_of_memory(config):
        run = start(config, typed, None, source, may_prepare=False)
        line = score(run)
    if run.ranks.rank == 0:
        tokens = run.meta["splits"]["val"]["tokens"]
        notice(f"{path} on the whole validation split of {config.data_dir} ({tokens:,} tokens), {config.block_size} at once:")
        print(line)


def finish(run: Run) -> None:
    """The plot, the best weights scored on the whole validation split, a short story."""
    path = run.out_dir / "model.pt"
    best = load_file(path)
    load_weights(run.model, best["model"], path)
    if run.ranks.rank == 0:
        draw_curves(plot_path(run.config), run.config, run.state.log)
        notice(f"wrote {path} (the best weights, iteration {best['iteration']:,}) and {plot_path(run.config)}")
        tokens = run.meta["splits"]["val"]["tokens"]
        notice(f"scoring it on the whole validation split ({tokens:,} tokens), as --eval_only does at any time:")
    line = score(run)
    if run.ranks.rank != 0:
        return
    notice(line)
    notice("a story from it:\n")
    prompt = "Once upon a time"
    with torch.compiler.set_stance("force_eager"):  # every step of a story has a shape of its own
        print(prompt + "".join(stories(run.model.eval(), prompt, max_new_tokens=150, seed=run.config.seed)))


def start(
    config: Config, typed: dict[str, Any], saved: dict[str, Any] | None, source: GPT | None = None, may_prepare: bool = True
) -> Run:
    """The run, fresh, from the weights of `source`, or as its checkpoint left it.

    Refuses what cannot be before anything is made or lost.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    should_compile(config.compile)
    if device.type == "cpu":
        keep_freed_memory()
    for folder in map(Path, (config.out_dir, config.plot_dir)):
        if blocked := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
            raise UserError(f"{folder} cannot be a folder: {blocked[0]} is a file")
    meta = prepared_data(config, typed, may_prepare and "RANK" not in os.environ)
    typed = {**(saved["typed"] if saved else {}), **typed}
    run = Run(dataclasses.replace(config, dataset=meta["dataset"]), typed, meta, dtype, Ranks(device))
    if saved:
        run.restore(saved)
    elif source:  # with as many of its positions as this context has
        positions = {"transformer.wpe.weight": source.transformer.wpe.weight[: config.block_size]}
        load_weights(run.model, source.state_dict() | positions, "the model to start from")
    elif config.embedding_init == "spelling":
        spell(run.model.transformer.wte)
    bits = run.model.transformer.wte.weight.detach().view(torch.int32).sum().item()  # whole numbers add up the same everywhere
    run.ranks.check_same((run.state.iteration, data_hashes(meta), config.seed, config.max_iters, bits))
    return run


@contextlib.contextmanager
def told_of_memory(config: Config) -> Iterator[None]:
    """Memory that runs out, the device's or the machine's, becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        half = max(config.pass_sequences // 2, 1)
        raise UserError(f"CUDA is out of memory: try --device_batch_size {half} (the result stays the same)") from None
    except (MemoryError, RuntimeError) as problem:
        if isinstance(problem, MemoryError) or "can't allocate memory" in str(problem):
            raise UserError("the machine is out of memory: try a smaller --device_batch_size or model") from None
        raise


def main(argv: list[str]) -> None:
    typed, mode = parse_command_line(argv)
    if mode == "eval_only":
        score_only(typed)
        return
    config, typed, saved, source = plan_run(typed, mode)
    if saved and is_finished(config, State(**saved["state"])):
        done = saved["state"]["iteration"]
        notice(f"the run in {config.out_dir} is finished: {done:,} iterations are done, max_iters is {config.max_iters:,}; "
               f"to score it again: python train.py --eval_only --out_dir {config.out_dir}")  # fmt: skip
        return
    with told_of_memory(config):
        run = start(config, typed, saved, source)
        run.stop.listen()
        if run.ranks.rank == 0:
            plot_path(config).parent.mkdir(parents=True, exist_ok=True)
            run.out_dir.mkdir(parents=True, exist_ok=True)
            lock_folder(run.out_dir)
            clear_partials(run.out_dir, FILES)
            for name in FILES[1:] if mode == "overwrite" else ():  # model.pt, which may be init_from, until there is a new one
                (run.out_dir / name).unlink(missing_ok=True)
            describe(run)
        if not train(run):
            if run.ranks.rank == 0:
                notice(f"stopped at iteration {run.state.iteration:,}; go on with: python train.py --resume --out_dir {config.out_dir}")
            sys.exit(128 + run.stop.caught)
        run.stop.release()
        finish(run)


if __name__ == "__main__":
    run(main)
