"""Trains the GPT: `python train.py --preset demo`, or without a preset the reference run.

    until max_iters:
        once in a while: evaluate, save a checkpoint
        for every micro-batch of the step: forward, loss, backward; the gradients add up
        clip them, set the learning rate, step

`train` and `Run.step` are these lines. An iteration is batch_size sequences. An optimizer step
covers gradient_accumulation_steps iterations. Micro-batches cut a step into parts that fit the
device.

Every random choice is a function of the seed and the place in the run, and every file appears
whole or not at all. So a run that is resumed from its ckpt.pt goes on as if it had never stopped,
and any number of devices sees the same sequences. The sections below are in the order of a run.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from config import (  # first: it sets what torch reads when it is imported
    PRESETS,
    Config,
    Parser,
    UserError,
    add_config_flags,
    atomic_write,
    cli,
    is_out_of_memory,
    is_silent,
    lock_folder,
    nearest,
    notice,
    one_line,
    path_end,
    wrapped,
)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import model as gpt
import prepare_data as data
from plots.loss_curve import draw_run, picture_name

Row = dict[str, float]  # of log.csv

# Settings that a resumed run may change, since none of them changes what was learnt so far.
MAY_CHANGE = ("max_iters", "max_epochs", "lr_decay_iters", "eval_interval", "checkpoint_minutes",
              "device", "dtype", "compile", "device_batch_size", "data_dir", "out_dir", "plot_dir",
              "tensorboard")
# Settings that come from the model of --init_from, not from the preset. Only block_size may be
# smaller than the model's.
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu")
MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run cannot recover
MANY_EPOCHS = 20  # a run of more gets a warning
EXAMPLES = """examples:
  python train.py --preset demo
  python train.py --preset tuned --data_dir data/my_stories --max_iters 2000
  python train.py --resume --out_dir out/tuned --max_iters 4000"""


def main(argv: list[str]) -> None:
    overrides, mode = parse_command_line(argv)
    if mode == "eval_only":
        return score_only(overrides)
    folder = RunFolder(folder_of(overrides), mode)
    if mode == "resume" and folder.ckpt.exists():
        run = resumed_run(folder, overrides)
    else:
        run = new_run(folder, overrides)
    check_ranks_agree(run)
    flag = f"--out_dir {shlex.quote(run.config.out_dir)}"
    if is_finished(run.config, run.state):
        notice(f"the run in {folder.path} is finished, at iteration {run.state.iteration:,}; "
               f"to score it again:\n    python train.py --eval_only {flag}")
        return run.ranks.leave()
    for line in description(run):
        notice(line)
    compile_model(run)  # before the folder is taken: if it fails, nothing old was touched
    if run.is_main:
        folder.take(run)
    with run.stop:
        try:
            train(run)
            finish(run)
        except Stopped as stopped:
            run.stop.caught = stopped.args[0]  # by one rank at least
            if is_finished(run.config, run.state):
                notice(f"not scored; to score it:\n    python train.py --eval_only {flag}")
            elif folder.replaces:
                notice(f"stopped before the first checkpoint: the old run in {folder.path} stands")
            else:
                save_checkpoint(run)
                notice(f"stopped at iteration {run.state.iteration:,}; to go on:\n"
                       f"    {run.ranks.command} --resume {flag}")
    if run.is_main and not run.stop.caught:
        tell_story(run)
    run.ranks.leave()
    if run.stop.caught:
        sys.exit(128 + run.stop.caught)  # as a shell reports a signal


def parse_command_line(argv: list[str]) -> tuple[dict, str]:
    """The settings that were typed, and the mode: resume, overwrite, eval_only or ''."""
    parser = Parser(
        "Trains the GPT. Every setting of config.py is a flag.\n"
        "`--preset P --help` shows the defaults of the preset P.",
        usage="python train.py [--preset P] [--SETTING VALUE ...]\n"
              "                       [--resume | --overwrite | --eval_only]", epilog=EXAMPLES)
    modes = parser.add_mutually_exclusive_group()
    for mode, help in {
        "resume": "go on from out_dir/ckpt.pt, or begin if there is none",
        "overwrite": "begin again in an out_dir that holds a run, and replace its files",
        "eval_only": "score out_dir/model.pt, or the model of --init_from, on the whole validation "
                     "split, or on all stories of the file or folder that --dataset names",
    }.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=help)
    add_config_flags(parser, argv)
    overrides = vars(parser.parse_args(argv))
    mode = overrides.pop("mode") or ""
    if "max_iters" in overrides and "max_epochs" in overrides:
        raise UserError("--max_iters and --max_epochs both say how long to train: choose one")
    return overrides, mode


def folder_of(overrides: dict) -> Path:
    return Path(overrides.get("out_dir") or Config.from_preset(overrides.get("preset")).out_dir)


# -------------------------------------------------------------------------------------- A new run


def new_run(folder: "RunFolder", overrides: dict) -> "Run":
    """A run at its beginning. The model that it starts from, if any, is not kept in memory."""
    config, source = new_config(folder, overrides)
    run = open_run(config, overrides, source)
    run.folder = folder
    return run


def new_config(folder: "RunFolder", overrides: dict) -> tuple[Config, gpt.GPT | None]:
    """What a new run trains, and the model that it starts from, if any.

    UserError for impossible settings, and for a folder that holds another run.
    """
    folder.refuse_old_run()
    defaults = Config.from_preset(overrides.get("preset"))
    init_from = overrides.get("init_from", defaults.init_from)
    source = load_source(init_from) if init_from else None
    taken = architecture(source.config, overrides) if source else {}
    config = Config.from_preset(**overrides | taken)
    if folder.mode == "resume":
        others = ", ".join(str(other.parent) for other in sorted(Path("out").glob("*/ckpt.pt")))
        notice(f"there is no {folder.ckpt} yet: starting from the beginning"
               + (f" (runs to resume: {others})" if others else ""))
    return config, source


def load_source(path: str) -> gpt.GPT:
    if gpt.is_hub_name(path):
        notice(f"there is no {path} here: asking the Hugging Face Hub")
    return gpt.load_model(path)


def architecture(source: Config, overrides: dict) -> dict:
    """The settings a run takes from the model it starts from. UserError if others were typed."""
    taken = {name: getattr(source, name) for name in ARCHITECTURE}
    other = [f"{name} {value}, not {overrides[name]}" for name, value in taken.items()
             if overrides.get(name, value) != value]
    if other:
        raise UserError(f"the model to start from has {', '.join(other)}: leave that out")
    size = overrides.get("block_size", source.block_size)
    if size > source.block_size:
        raise UserError(f"block_size {size} is too long: the model to start from has learnt "
                        f"positions for {source.block_size} tokens only")
    return taken | {"block_size": size}


def open_run(config: Config, overrides: dict, source: gpt.GPT | None = None,
             resumed: bool = False) -> "Run":
    """A run at its beginning, on its device and its prepared data, which a new run may prepare.

    UserError if the device or the data is not there, or not what was asked for.
    """
    ranks = Ranks(prepare_device(config))
    if config.tensorboard:
        import_tensorboard()  # fails here if it does not work
    found = Path(config.data_dir, "meta.json").exists()
    if not found and not resumed:
        # A typed folder is not filled with a guess: `load_meta` will say how to prepare it.
        if "data_dir" in overrides and "dataset" not in overrides:
            prepared = [str(meta.parent) for meta in Path("data").glob("*/meta.json")]
            notice(f"nothing prepared in {config.data_dir}{nearest(config.data_dir, prepared)}")
        elif ranks.size == 1:  # several processes would all prepare it at once
            notice(f"no prepared data in {config.data_dir}: preparing {config.dataset}")
            data.prepare(config.dataset, config.data_dir)
    meta = open_data(config, overrides)
    if found and not resumed and "dataset" in overrides:
        data.check_unchanged(meta, config.data_dir)
    config = dataclasses.replace(config, dataset=meta["dataset"])
    if config.max_epochs is not None:
        tokens = config.max_epochs * meta["splits"]["train"]["tokens"]
        length = max(math.ceil(tokens / config.tokens_per_iteration), 1)
        # Config checks its schedule only where max_epochs is None.
        schedule = dataclasses.replace(config, max_iters=length, max_epochs=None)
        config = dataclasses.replace(schedule, max_epochs=config.max_epochs)
    return Run(config, meta, ranks, source)


def prepare_device(config: Config) -> torch.device:
    """The device of a run, its allocator set up for training. UserError if it is not there."""
    if config.vocab_size != data.END_OF_TEXT + 1:
        raise UserError(f"vocab_size {config.vocab_size} is not that of GPT-2's tokenizer, 50257")
    device = gpt.pick_device(config.device)
    gpt.pick_dtype(config.dtype, device)
    if device.type == "mps" and torch.__version__ < "2.13":  # its fused AdamW skips no step
        raise UserError("training on mps needs PyTorch 2.13: pip install -U torch, or --device cpu")
    # glibc would give large blocks back to the system, and every micro-batch would pay for fresh
    # pages: a fifth of the time on a CPU, half where they are scarce. So it keeps what is freed.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type == "cpu" and hasattr(libc, "mallopt"):  # musl has none
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return device


def open_data(config: Config, overrides: dict) -> dict:
    """meta.json of the prepared data. UserError if it is not there, or not what was asked for."""
    folder, meta = config.data_dir, data.load_meta(config.data_dir)
    wanted = overrides.get("dataset", meta["dataset"])
    if data.identity(meta["dataset"]) != data.identity(wanted):
        raise UserError(f"{folder} holds {meta['dataset']}, not {wanted}: name another --data_dir, "
                        "or leave --dataset out")
    for name, split in meta["splits"].items():
        if split["tokens"] <= config.block_size:
            hint = " (prepare_data.py has --val_fraction)" if name == "val" else ""
            raise UserError(f"the {name} split in {folder} has {split['tokens']} tokens: "
                            f"block_size {config.block_size} needs {config.block_size + 1}; "
                            f"prepare more stories for it{hint}")
    return meta


def check_ranks_agree(run: "Run") -> None:
    """UserError if the processes of a run do not train the same model on the same data."""
    # Summed as whole numbers, the bits of the weights are the same in any order.
    weights = run.model.transformer.wte.weight.detach().view(torch.int32).sum().item()
    facts = (run.state.iteration, hashes(run.meta), run.config.seed, run.config.max_iters, weights)
    if any(other != facts for other in run.ranks.gather(facts)):
        raise UserError("the ranks differ in data, checkpoint or settings: out_dir and data_dir "
                        "must be the same files for all")


def compile_model(run: "Run") -> None:
    """Compiles the model and tries it on one micro-batch, as a step and as an evaluation do.

    If that fails on any rank, the run goes on uncompiled on all; with --compile true: UserError.
    """
    config, problem = run.config, ""
    if config.compile == "false":
        return
    # A micro-batch as `Run.step` has it; one row for a rank that gets none.
    sequences = np.arange(config.batch_size * config.gradient_accumulation_steps)
    rows = len(run.ranks.share(sequences)[: config.micro_batch_size]) or 1
    ids = torch.zeros(rows, config.block_size, dtype=torch.int64, device=run.device)
    run.compiled_shape = ids.shape
    notice("compiling, about 30 s")
    try:
        run.model.compile_parts()
        with run.arithmetic():
            loss = run.model(ids, ids)
        run.scaler.scale(loss).backward()
        run.model.eval()
        with torch.no_grad(), run.arithmetic():
            run.model(ids, ids)
    except Exception as error:  # anything: the compiler, its headers, its cache, the GPU
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"[:150]
    run.model.train()
    problem = max(run.ranks.gather(problem))  # one that is not empty, if any is not
    if problem and config.compile == "true":
        raise UserError(f"compile true does not work here ({problem}): use --compile false or auto")
    if problem:
        run.compiled_shape = None
        notice(f"not compiled, since torch.compile does not work here: {problem}")


def description(run: "Run") -> list[str]:
    """What is about to run, in a few lines."""
    config, tokens = run.config, len(run.tokens["train"])
    length = config.max_iters * config.tokens_per_iteration
    steps = math.ceil(config.max_iters / config.gradient_accumulation_steps)
    in_steps = "one step" if steps == 1 else f"{steps:,} steps"
    iterations = "1 iteration" if config.max_iters == 1 else f"{config.max_iters:,} iterations"
    size = min(config.tokens_per_iteration * config.gradient_accumulation_steps, length)
    total = f"{length / 1e6:.1f} M" if length > 1e6 else f"{length:,}"
    if config.max_epochs or length > tokens:
        total += f", {length / tokens:.2f} epochs"
    changes = ", ".join(f"{name} {value}" for name, value in differences(config).items())
    lines = [
        f"{config.preset}: {run.model.parameter_count() / 1e6:.1f} M parameters on "
        f"{device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}",
        f"{config.data_dir}: {tokens:,} training tokens of {path_end(run.meta['dataset'])}",
        f"{iterations} in {in_steps} of {size:,} tokens: {total}",
        f"learning rate {config.learning_rate:g}, then {config.min_lr:g}; batch_size "
        f"{config.batch_size}; seed {config.seed}",
    ]
    if changes:
        lines.append(f"changed: {changes}")
    last = learning_rate_at(config, config.max_iters - 1)
    if config.warmup >= config.max_iters:
        lines.append(f"warning: the warmup of {config.warmup:,} iterations is not shorter than the "
                     f"run:\n    the rate only reaches {last:.2g}")
    elif config.decay_iters > config.max_iters:
        lines.append(f"the decay would end at iteration {config.decay_iters:,}, after the run:\n"
                     f"    the rate only reaches {last:.2g}")
    if length > MANY_EPOCHS * tokens:
        lines.append(f"warning: every story is read {length / tokens:,.0f} times. Against "
                     "overfitting: fewer\n    iterations, --dropout 0.1, or --init_from a trained "
                     "model")
    if run.state.iteration:
        lines.append(f"going on from iteration {run.state.iteration:,}")
    return lines


def differences(config: Config) -> dict:
    """The settings that are not the preset's (the reference's, if it is gone), paths left out."""
    preset = Config()
    with contextlib.suppress(UserError):  # it may be gone, or broken since
        preset = Config.from_preset(config.preset)
    usual = dataclasses.asdict(preset)
    if preset.max_epochs is not None:  # max_iters follows from it: one that was typed differs
        usual["max_iters"] = None
    aside = ["preset", "dataset", "data_dir", "out_dir", "plot_dir"]
    # Of max_iters and max_epochs, the one that follows from the other says nothing new.
    aside.append("max_epochs" if config.max_epochs is None else "max_iters")
    return {name: value for name, value in dataclasses.asdict(config).items()
            if value != usual[name] and name not in aside}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads: {torch.get_num_threads()}" if device.type == "cpu" else device.type


# --------------------------------------------------------------------------------- A resumed run


def resumed_run(folder: "RunFolder", overrides: dict) -> "Run":
    """The run as its checkpoint left it: config, weights, optimizer, place in the run.

    UserError if the overrides would change what was learnt so far, or the data has changed.
    """
    folder.read_at = folder.ckpt.stat().st_mtime_ns  # before it is read: `take` looks again
    checkpoint = gpt.load_file(folder.ckpt)
    old = gpt.config_of(checkpoint, folder.ckpt)
    config = changed_config(old, overrides, folder)
    if not Path(config.data_dir, "meta.json").exists():
        raise UserError(f"the data of this run is not in {config.data_dir} any more: say where it "
                        "is now with --data_dir")
    run = open_run(config, overrides, resumed=True)
    if checkpoint.get("data") != hashes(run.meta):
        raise UserError(f"the data in {config.data_dir} has changed since this run began: resume "
                        "with the data it was trained on (--data_dir), or begin a new run from "
                        f"this model (--init_from {folder.ckpt} and another --out_dir)")
    run.folder = folder
    restore(run, checkpoint)
    then, now = (f"warmup {config.warmup} and decay until iteration {config.decay_iters}"
                 for config in (old, run.config))
    if then != now:
        notice(f"warning: the learning rate's schedule changes: {now}, not {then}")
    return run


def changed_config(old: Config, overrides: dict, folder: "RunFolder") -> Config:
    """The checkpoint's Config with the overrides. UserError if one of them may not change."""
    # A dataset that is typed again may be spelt otherwise: `open_data` compares it.
    changes = overrides | {"dataset": old.dataset, "out_dir": str(folder.path)}
    if "max_iters" in overrides:  # it wins over a max_epochs from before
        changes["max_epochs"] = None
    refused = [f"{name} {getattr(old, name)} -> {value}" for name, value in changes.items()
               if name not in MAY_CHANGE and value != getattr(old, name)]
    if refused:
        raise UserError(f"a resumed run cannot change {', '.join(refused)}: train anew in another "
                        "--out_dir")
    notice(f"resuming {folder.ckpt} with the settings it began with")
    return dataclasses.replace(old, **changes)


def save_checkpoint(run: "Run", row: Row | None = None) -> None:
    """Writes ckpt.pt, all it takes to go on from here, and the log, which an evaluation's `row`
    joins; if that is the best so far, model.pt too. Every rank waits until they are there.
    """
    run.check_gradients()
    if row:
        run.state.log.append(row)
    if run.is_main:
        run.folder.save(run, row)
    run.ranks.wait()
    run.folder.replaces, run.folder.saved_at = False, time.monotonic()


def checkpoint_of(run: "Run") -> dict:
    """What ckpt.pt holds besides the config and the weights: tensors and plain values only."""
    state = vars(run.state) | {"seconds": run.seconds(), "log": list(run.state.log)}
    return dict(optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(), state=state,
                data=hashes(run.meta))


def restore(run: "Run", checkpoint: dict) -> None:
    """The inverse of `checkpoint_of`. UserError if the checkpoint does not fit the run."""
    gpt.load_weights(run.model, checkpoint["model"], run.folder.ckpt)
    try:
        # The groups are the config's, but for the rate of the last step.
        groups, saved = run.optimizer.state_dict()["param_groups"], checkpoint["optimizer"]
        for group, before in zip(groups, saved["param_groups"], strict=True):
            group["lr"] = before["lr"]
        run.optimizer.load_state_dict({"param_groups": groups, "state": saved["state"]})
        if run.scaler.is_enabled() and checkpoint["scaler"]:
            run.scaler.load_state_dict(checkpoint["scaler"])
        run.state = State(**checkpoint["state"])
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{run.folder.ckpt} does not hold a run of this version "
                        f"({one_line(problem)[:80]}): name another --out_dir") from None
    if run.is_main:
        # A model.pt that is missing, damaged or another run's is replaced by the next evaluation.
        with contextlib.suppress(UserError, OSError):
            best = gpt.load_file(run.folder.model)
            now = {name: getattr(run.config, name) for name in (*MAY_CHANGE, "dataset")}
            if dataclasses.replace(gpt.config_of(best, run.folder.model), **now) == run.config:
                run.folder.best_loss = best.get("val_loss", math.inf)


class RunFolder:
    """out_dir and what a run keeps there: ckpt.pt, model.pt, log.csv, run.json, and its lock."""

    def __init__(self, path: Path, mode: str = ""):
        self.path, self.mode = path, mode
        self.ckpt, self.model = path / "ckpt.pt", path / "model.pt"
        self.log, self.record = path / "log.csv", path / "run.json"
        self.lock: int | None = None  # holds the folder for this process until it ends
        self.files = (self.ckpt, self.model, self.log)  # each of them shows that a run is here
        self.read_at: int | None = None  # modification time (ns) of the ckpt.pt that was read
        # Whether --overwrite still has an old run's files to remove.
        self.replaces = mode == "overwrite" and any(file.exists() for file in self.files)
        self.saved_at = time.monotonic()  # when the last checkpoint was written
        self.best_loss = math.inf  # the validation loss of this run's model.pt

    def refuse_old_run(self) -> None:
        """UserError if the folder cannot be one, or holds what a new run would replace unasked."""
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"{self.path} cannot be a folder: {path} is a file")
        if self.mode == "resume" and self.ckpt.exists():
            raise UserError(f"another train.py has just begun in {self.path}: type this again")
        if self.mode == "resume" and self.model.exists():
            raise UserError(f"there is no {self.ckpt} to go on from, but a trained {self.model}: "
                            "name another --out_dir, or drop it by --overwrite instead of --resume")
        for file in self.files:
            if file.exists() and not self.mode:
                go_on = "--resume to go on with it, " if self.ckpt.exists() else ""
                raise UserError(f"{file} is there already: add {go_on}--overwrite to drop it, or "
                                "name another --out_dir")

    def take(self, run: "Run") -> None:
        """Makes the folder, holds it until the process ends, and writes run.json.

        UserError if another process does, or has changed its files since we looked at them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.path)
        if self.lock is None:
            raise UserError(f"another train.py is at work in {self.path}: name another --out_dir")
        if self.read_at is None:
            self.refuse_old_run()
        elif self.read_at != self.ckpt.stat().st_mtime_ns:
            raise UserError(f"the run in {self.path} was still saving: type the same command again")
        if not self.replaces:
            self.write_record(run)

    def save(self, run: "Run", row: Row | None) -> None:
        """Writes ckpt.pt before the first model.pt, so that a run killed at any point can be
        resumed, and once more when the other files of an evaluation are written.
        """
        content, log = checkpoint_of(run), run.state.log
        if not row or self.replaces or not self.model.exists():
            # Without the row: a run that is killed right after this evaluates again.
            earlier = log[:-1] if row else log
            before = content | {"state": content["state"] | {"log": earlier}}
            gpt.save_file(self.ckpt, run.config, run.model, **before)
        if self.replaces:  # the old run stays until the new one has its first checkpoint
            self.model.unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
        if row and (row["val_loss"] < self.best_loss or not self.model.exists()):
            gpt.save_file(self.model, run.config, run.model, **row)
            self.best_loss = row["val_loss"]
        try:
            if log:
                lines = [",".join(log[0])]
                lines += [",".join(f"{value:.10g}" for value in line.values()) for line in log]
                with atomic_write(self.log) as partial:
                    partial.write_text("\n".join(lines) + "\n")
            self.write_record(run)
        except OSError as problem:  # a spreadsheet has it open, say: the checkpoint holds it all
            notice(f"log.csv or run.json is not written: {problem.strerror}")
        if row:
            gpt.save_file(self.ckpt, run.config, run.model, **content)

    def write_record(self, run: "Run", final: Row | None = None) -> None:
        """run.json: what this run is and how far it has come, for people and plots.loss_curve."""
        config, state, best = run.config, run.state, run.state.best()
        tokens = {name: split["tokens"] for name, split in run.meta["splits"].items()}
        record = dict(
            settings=dataclasses.asdict(config), differs=differences(config),
            data=dict(name=config.dataset, hashes=hashes(run.meta), tokens=tokens),
            versions=run.versions,
            tokens=state.iteration * config.tokens_per_iteration, seconds=run.seconds(),
            best=best and dict(iteration=best["iteration"], val_loss=best["val_loss"]), final=final)
        with atomic_write(self.record) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def hashes(meta: dict) -> dict[str, str]:
    return {name: split["sha256"] for name, split in meta["splits"].items()}


def versions_of(device: torch.device) -> dict:
    """What a run is made with. The commit of an edited tree ends in -dirty."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError):  # there is no git
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    return dict(python=platform.python_version(), pytorch=torch.__version__,
                device=device_name(device), commit=commit)


# --------------------------------------------------------------------- The other ranks, and signals


class Ranks:
    """The processes of a run: one, or those torchrun started. Each takes its share of every step.

    DistributedDataParallel would average gradients over the ranks, which is the mean over the
    sequences only if every rank has as many. Here shares are uneven and may be empty: a sum.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, self.device = 0, 1, device
        self.command = "python train.py"  # what starts as many processes again
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        values = [os.environ.get(name) for name in names]
        if not all(values):  # one of them alone is left from something else
            return
        try:
            self.rank, self.size, local = map(int, values[:3])
            if not 0 <= self.rank < self.size:  # they would wait for each other for ten minutes
                raise ValueError(f"RANK {self.rank} does not fit WORLD_SIZE {self.size}")
            self.command = f"torchrun --standalone --nproc_per_node={self.size} train.py"
            if os.environ.get("LOCAL_WORLD_SIZE", values[1]) != values[1]:  # several machines
                self.command = "torchrun (as before) train.py"
            if device.type == "cuda":
                self.device = gpt.pick_device(f"cuda:{local}")
                torch.cuda.set_device(self.device)
            # On GPUs the gradients go through NCCL; what the processes tell each other, Gloo.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        except (RuntimeError, ValueError) as problem:
            raise UserError(f"the ranks cannot meet ({one_line(problem)[:80]}): start with "
                            f"torchrun, or unset {', '.join(names)}") from None

    def leave(self) -> None:
        """Called at the end: a process that still has Gloo's threads may crash as Python ends."""
        if self.size > 1:
            dist.destroy_process_group()

    def share(self, items: np.ndarray) -> np.ndarray:
        """This rank's part of the items. All parts are about as large; some may be empty."""
        return np.array_split(items, self.size)[self.rank]

    def together(self, collective: Callable[..., Any], *args: Any) -> None:
        """Runs a collective operation, which every rank must call. UserError if one has ended."""
        if self.size > 1:
            try:
                collective(*args)
            except RuntimeError as problem:
                reason = one_line(problem)[:80]
                raise UserError(f"lost the other ranks ({reason}): type the command again, with "
                                "--resume if it has saved a checkpoint") from None

    def wait(self) -> None:
        """Returns once all ranks have come here."""
        self.gather(None)

    def gather(self, fact: Any) -> list[Any]:
        """The facts of all ranks, in their order, on every rank."""
        facts = [fact] * self.size
        self.together(dist.all_gather_object, facts, fact)
        return facts

    def max(self, value: float) -> float:
        """The largest of the ranks' values: a number goes faster than `gather`, in every step."""
        largest = torch.tensor(value, dtype=torch.float64)
        self.together(dist.all_reduce, largest, dist.ReduceOp.MAX)
        return largest.item()

    def all_reduce_gradients(self, model: gpt.GPT, loss: Tensor) -> None:
        """Sums all gradients and the loss, in one go. A rank that had no work joins with zeros."""
        if self.size > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            tensors = [*(p.grad for p in model.parameters()), loss]
            flat = parameters_to_vector(tensors)
            self.together(dist.all_reduce, flat)
            vector_to_parameters(flat, tensors)


class Stopped(Exception):
    """Raised where a signal, whose number it holds, ends a run: the last whole step stands."""


class StopSignal:
    """Within `with stop:` a signal is noted, and `check` acts on it. A second one ends the process
    at once, but not within two seconds: one Ctrl-C under torchrun, or a closed terminal, sends two.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.caught, self.at = ranks, 0, 0.0  # caught: the signal's number

    def __enter__(self) -> None:
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup has it ignored
            numbers.append(hangup)
        self.before = {number: signal.signal(number, self.catch) for number in numbers}

    def __exit__(self, *problem: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame: Any) -> None:
        if not self.caught:
            self.caught, self.at = number, time.monotonic()
            with contextlib.suppress(OSError):  # the terminal may have gone
                if not is_silent():
                    os.write(2, b"\nstopping after this batch; Ctrl-C again to quit now\n")
        elif time.monotonic() - self.at > 2:
            os._exit(128 + number)

    def check(self) -> None:
        """Raises Stopped on every rank if a signal has come to any."""
        number = int(self.ranks.max(self.caught))
        if number:
            raise Stopped(number)


# ------------------------------------------------------------------------------------ The optimizer


class Optimizer(torch.optim.AdamW):
    """Steps each group of parameters by the rule that the group names: adamw or muon.

    To add a rule, write a method beside `muon` that steps one group from its gradients `p.grad`,
    and add its name to the choices of `matrix_optimizer` in config.py. Keep its memory in
    `self.state[p]`, with a tensor "step" as AdamW has; checkpoints save it. Use the group's lr and
    weight_decay. Multiply every change, of the memory too, by `finite`, which is 0 where the step
    is to change nothing.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options: Any):
        """`dtype` is that of Muon's products."""
        super().__init__(groups, fused=True, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """`found_inf`, on the device, is 1 if a gradient is not finite. A GradScaler sets it for
        PyTorch's fused optimizers; `update_weights` sets it always. All rules then skip the step.
        """
        finite = 1 - self.found_inf
        for group in self.param_groups:
            if group["rule"] != "adamw":
                getattr(self, group["rule"])(group, finite)
                for p in group["params"]:
                    p.grad = None  # so that AdamW leaves it alone
        super().step()

    def muon(self, group: dict, finite: Tensor) -> None:
        """Muon (Jordan et al., 2024): moves a matrix along the momentum of its gradient, made
        orthogonal, so that all directions of the matrix move alike.

        The matrices of the group have one shape. `parts` is how many matrices each stands for.
        """
        params, states = group["params"], [self.state[p] for p in group["params"]]
        for p, state in zip(params, states, strict=True):
            if not state:
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        # All matrices of the group in one stack: a GPU is told of each operation once, not n times.
        gradients = torch.stack([p.grad for p in params]).nan_to_num_(0, 0, 0)  # NaN x 0 is NaN
        momenta = torch.stack([state["momentum"] for state in states])
        momenta.lerp_(gradients, (1 - group["momentum"]) * finite)
        torch._foreach_copy_([state["momentum"] for state in states], momenta.unbind())
        directions = gradients.lerp_(momenta, group["momentum"])  # Nesterov's
        matrices = directions.unflatten(1, (group["parts"], -1)).flatten(0, 1)
        # The size of AdamW's steps (Liu et al., 2025, section 2.2), so that one rate serves both.
        rate = group["lr"] * 0.2 * max(matrices.shape[-2:]) ** 0.5
        steps = orthogonalize(matrices, self.dtype).view_as(directions).mul(rate * finite)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * finite)
        torch._foreach_sub_(params, steps.unbind())


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices (N, rows, columns) with nearly all singular values brought to 0.7 to 1.2.

    By a Newton-Schulz iteration with the polynomial of Jordan et al. (2024): products only, in
    `dtype`. Four rounds train as well as the usual five.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # so that x @ x.mT is the smaller square
    x = F.normalize(x.flatten(1), dim=1).view(x.shape).to(dtype)
    for _ in range(4):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizer(model: gpt.GPT, config: Config, dtype: torch.dtype) -> Optimizer:
    """`matrix_optimizer` steps the matrices of the blocks, AdamW (Loshchilov and Hutter, 2019) all
    others. Biases and LayerNorms do not decay. A group's rate is `lr_mult` times the learning rate.
    """
    groups: dict[Any, dict] = {}
    for name, p in model.named_parameters():
        group = dict(rule="adamw", weight_decay=config.weight_decay, lr_mult=1.0)
        shape = None
        if p.dim() == 1:
            group |= dict(weight_decay=0.0, lr_mult=config.embedding_lr_mult)
        elif name.endswith(("wte.weight", "wpe.weight")):
            group |= dict(lr_mult=config.embedding_lr_mult)
        elif config.matrix_optimizer != "adamw" and ".h." in name:
            # Queries, keys and values are three matrices in one.
            group |= dict(rule=config.matrix_optimizer, momentum=config.momentum,
                          parts=3 if "c_attn" in name else 1)
            shape = p.shape
        key = (shape, *group.values())
        if key not in groups:
            groups[key] = group | dict(params=[])
        groups[key]["params"].append(p)
    return Optimizer(list(groups.values()), dtype, lr=config.learning_rate,
                     betas=(config.beta1, config.beta2), eps=config.eps)


# ---------------------------------------------- The place in a run: when, how fast, which sequences


@dataclasses.dataclass
class State:
    """What a checkpoint holds besides weights and optimizer. Tensors stay on the device until they
    are shown, since to read one the CPU waits for the GPU.
    """

    iteration: int = 0
    seconds: float = 0.0  # that the run took before this process
    grad_norm: Tensor = torch.zeros(())  # of the last step
    skipped_updates: Tensor = torch.zeros(())  # steps whose gradient was not finite
    skipped_in_a_row: Tensor = torch.zeros(())
    most_skipped_in_a_row: Tensor = torch.zeros(())
    log: list[Row] = dataclasses.field(default_factory=list)

    def best(self) -> Row | None:
        """The row of the log with the lowest validation loss; of equal ones the first."""
        return min(self.log, key=lambda row: row["val_loss"], default=None)


def evaluation_points(config: Config) -> dict[int, int]:
    """Where evaluations fall, {step boundary: the iteration the evaluation is named after}.

    Weights change only at steps: the evaluation at iteration 500 scores those of the last whole
    step before it (32 x 15 = 480). Where two fall on one boundary, the first counts.
    """
    points: dict[int, int] = {}
    for iteration in range(config.eval_interval, config.max_iters, config.eval_interval):
        boundary = iteration - iteration % config.gradient_accumulation_steps
        if boundary:
            points.setdefault(boundary, iteration)
    return points | {config.max_iters: config.max_iters}


def due_evaluation(points: dict[int, int], config: Config, state: State) -> int | None:
    """The name of the evaluation that falls on this boundary, if the log does not have it yet."""
    tokens = state.iteration * config.tokens_per_iteration
    if any(row["tokens"] == tokens for row in state.log):
        return None
    return points.get(state.iteration)


def is_finished(config: Config, state: State) -> bool:
    due = due_evaluation(evaluation_points(config), config, state)
    return state.iteration >= config.max_iters and due is None


def learning_rate_at(config: Config, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0: linear warmup, then the decay to min_lr.

    The cosine is that of Loshchilov and Hutter (2017), equation 5, as in PyTorch's schedulers.
    """
    if iteration < config.warmup:
        start = config.warmup_start_factor
        return config.learning_rate * (start + (1 - start) * iteration / config.warmup)
    if iteration >= config.decay_iters:
        return config.min_lr
    progress = (iteration - config.warmup) / (config.decay_iters - config.warmup)
    if config.lr_schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
    else:
        share = 1 - progress
    return config.min_lr + (config.learning_rate - config.min_lr) * share


CROPS, DROPOUT, WEIGHTS = range(3)  # what randomness is used for: the first number of a place


def seed_sequence(seed: int, *place: int) -> np.random.SeedSequence:
    """The randomness of a place, as (CROPS, iteration). Neither seeds nor places overlap."""
    return np.random.SeedSequence(seed, spawn_key=place)


def seed_torch(seed: int, *place: int) -> None:
    torch.manual_seed(int(seed_sequence(seed, *place).generate_state(1, np.uint64)[0]))


def crop_starts(config: Config, iteration: int, length: int) -> np.ndarray:
    """Where the iteration's sequences begin in a split of `length` tokens: (batch_size,)."""
    if config.crops == "random":
        rng = np.random.default_rng(seed_sequence(config.seed, CROPS, iteration))
        return rng.integers(0, length - config.block_size, size=config.batch_size)
    # Shuffled: the windows of an epoch one after the other, then those of the next.
    count = max((length - config.block_size) // config.block_size, 1)
    starts = []
    for number in range(iteration * config.batch_size, (iteration + 1) * config.batch_size):
        epoch, place = divmod(number, count)
        starts.append(epoch_starts(config.seed, epoch, count, length, config.block_size)[place])
    return np.array(starts)


@functools.lru_cache(maxsize=2)
def epoch_starts(seed: int, epoch: int, count: int, length: int, block_size: int) -> np.ndarray:
    """An epoch's `count` windows, side by side from an offset drawn anew each time, shuffled."""
    rng = np.random.default_rng(seed_sequence(seed, CROPS, epoch))
    offset = rng.integers(0, min(block_size, length - block_size))
    return offset + block_size * rng.permutation(count)


def even_starts(config: Config, length: int) -> np.ndarray:
    """Where an evaluation's windows begin: eval_windows of them (or all), evenly spaced."""
    last = length - config.block_size - 1
    count = min(config.eval_windows, last + 1)
    return np.linspace(0, last, count).round().astype(np.int64)


def micro_batches(config: Config, starts: np.ndarray) -> list[np.ndarray]:
    size = config.micro_batch_size
    return [starts[i : i + size] for i in range(0, len(starts), size)]


def read_batch(tokens: np.ndarray, starts: np.ndarray, block_size: int,
               device: torch.device) -> tuple[Tensor, Tensor]:
    """The windows at `starts`, and the same one token later: ids (B, block_size) on the device.

    To a GPU the copy is asynchronous (from pinned memory), as is everything launched after it:
    while the device works on one micro-batch, this reads the next.
    """
    windows = tokens[starts[:, None] + np.arange(block_size + 1)]
    ids = torch.from_numpy(windows.astype(np.int64))
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    else:  # memory that is not pinned may be freed before it is copied
        ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


# -------------------------------------------------------------------------------------- The loop


class Run:
    """A model in training: what a step needs."""

    def __init__(self, config: Config, meta: dict, ranks: Ranks, source: gpt.GPT | None = None):
        """First weights are drawn, or are those of `source`, its positions cut to block_size."""
        self.config, self.meta, self.ranks, self.device = config, meta, ranks, ranks.device
        self.is_main = ranks.rank == 0  # the one that writes files and talks
        self.dtype = gpt.pick_dtype(config.dtype, self.device)
        self.folder, self.versions = RunFolder(Path(config.out_dir)), versions_of(self.device)
        self.stop, self.state, self.started = StopSignal(ranks), State(), time.monotonic()
        self.plot = Plot(config)
        self.compiled_shape: torch.Size | None = None  # of the micro-batch that is compiled
        self.tokens = {name: data.open_split(config.data_dir, name) for name in meta["splits"]}
        seed_torch(config.seed, WEIGHTS)
        model = gpt.GPT(config)
        if source:
            positions = source.transformer.wpe.weight[: config.block_size]
            weights = source.state_dict() | {"transformer.wpe.weight": positions}
            gpt.load_weights(model, weights, "the model to start from")
        self.model = model.to(self.device)  # drawn on the CPU: the same on every device
        self.optimizer = make_optimizer(model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.loss = torch.zeros((), device=self.device)  # of the last step
        self.scaler.scale(self.loss)  # makes its scale, which a rank without work needs too

    def seconds(self) -> float:
        """How long the run has taken, in this process and those before it."""
        return self.state.seconds + time.monotonic() - self.started

    def fail(self, reason: str) -> NoReturn:
        """UserError with what can be done about a run that has diverged."""
        folder, lower = self.folder, {}
        # With a warmup that a flag can say, which None is not.
        config = dataclasses.replace(self.config, warmup_iters=self.config.warmup)
        usual = Config.from_preset(config.preset) if config.preset in PRESETS else Config()
        for name in ("learning_rate", "min_lr"):
            lower[name] = f"{min(getattr(config, name) / 3, getattr(usual, name)):.2g}"
        if folder.replaces or not folder.model.exists():
            raise UserError(f"{reason}: train with a lower rate, as --learning_rate "
                            f"{lower['learning_rate']} --min_lr {lower['min_lr']}")
        # The model brings its architecture along; the other settings that were typed stay.
        flags = {"preset": usual.preset, "data_dir": config.data_dir, **differences(config)}
        flags |= {"init_from": folder.model, "out_dir": f"{folder.path}_lower", **lower}
        words = []
        for name, value in flags.items():
            if name not in (*ARCHITECTURE, "block_size"):
                words += [f"--{name}", str(value)]
        raise UserError(f"{reason}: go on from the best weights at a lower rate: "
                        f"{self.ranks.command} {shlex.join(words)}")

    def check_gradients(self) -> None:
        """UserError if no step gets through any more. The CPU waits for a GPU to read the count, so
        this is called every tenth step and before a checkpoint, on all ranks alike.
        """
        if self.state.most_skipped_in_a_row >= MAX_SKIPPED:
            self.fail(f"the gradient was not finite in {MAX_SKIPPED} steps in a row")

    @contextlib.contextmanager
    def arithmetic(self, compiled: bool = True) -> Iterator[None]:
        """The run's precision, and compiled code where that works and `compiled` is wanted."""
        stance = "default" if compiled and self.compiled_shape else "force_eager"
        autocast = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        with autocast, torch.compiler.set_stance(stance):
            yield

    @torch.no_grad()
    def mean_loss(self, tokens: np.ndarray, starts: np.ndarray, task: str = "") -> float:
        """The mean loss of the windows at `starts`, dropout off, with a bar if `task` names it.

        Stopped if a signal comes.
        """
        self.model.eval()
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # it has no other
        total = torch.zeros((), dtype=exact, device=self.device)
        size = min(self.config.block_size, len(tokens) - 1)
        batches = micro_batches(self.config, self.ranks.share(starts))
        for some in new_bar(batches, desc=task, disable=not (task and self.is_main), leave=False):
            x, y = read_batch(tokens, some, size, self.device)
            # What has another shape than a training batch is not worth compiling for.
            with self.arithmetic(compiled=x.shape == self.compiled_shape):
                total += self.model(x, y).to(exact) * len(some)
            if self.stop.caught:
                break
        self.stop.check()
        self.model.train()
        self.ranks.together(dist.all_reduce, total)
        return total.item() / len(starts)

    def step(self) -> None:
        """One optimizer step, over gradient_accumulation_steps iterations (the last over the rest).

        Raises Stopped, with no weight changed, if a signal comes first.
        """
        config, tokens = self.config, self.tokens["train"]
        begin, size = self.state.iteration, config.gradient_accumulation_steps
        end = min((begin // size + 1) * size, config.max_iters)
        # Which sequences: a function of the seed and the iteration, the same on every rank.
        starts = np.concatenate([crop_starts(config, i, len(tokens)) for i in range(begin, end)])
        # Forward, loss, backward: gradients of the micro-batches add up to that of the mean loss.
        self.optimizer.zero_grad()
        self.loss = torch.zeros((), device=self.device)
        for number, crops in enumerate(micro_batches(config, self.ranks.share(starts))):
            if config.dropout:
                seed_torch(config.seed, DROPOUT, begin, number, self.ranks.rank)
            x, y = read_batch(tokens, crops, config.block_size, self.device)
            with self.arithmetic():
                loss = self.model(x, y)
            loss = loss * (len(crops) / len(starts))  # its part of the mean over all sequences
            self.scaler.scale(loss).backward()
            self.loss += loss.detach()
            if self.stop.caught:  # leave early; the ranks agree on it in `check`
                break
        # A signal, to any rank: nothing has been changed yet, the last whole step stands.
        self.stop.check()
        # The ranks' gradients add up too; then the weights move.
        self.ranks.all_reduce_gradients(self.model, self.loss)
        self.update_weights(learning_rate_at(config, end - 1))
        self.state.iteration = end

    def update_weights(self, learning_rate: float) -> None:
        """Unscale, clip, set the rate, step. A gradient that is not finite changes no weight."""
        state, limit = self.state, self.config.grad_clip or math.inf  # 0: no clipping
        # Unscaled before it is measured: grad_clip means what it says, in float16 too.
        self.scaler.unscale_(self.optimizer)
        state.grad_norm = clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        # The optimizer skips its step where found_inf is 1, on the device: the CPU need not wait.
        skip = (~state.grad_norm.isfinite()).float()  # 1 if it is not finite, else 0
        self.optimizer.found_inf = skip
        self.optimizer.step()
        self.scaler.update()
        state.skipped_updates = state.skipped_updates + skip
        state.skipped_in_a_row = (state.skipped_in_a_row + 1) * skip  # one more, or back to 0
        state.most_skipped_in_a_row = torch.maximum(state.most_skipped_in_a_row,
                                                    state.skipped_in_a_row)


def train(run: Run) -> None:
    """Steps until max_iters, with an evaluation and a checkpoint wherever one is due.

    Raises Stopped, at a whole step, once a signal has come to any rank.
    """
    config, state, evaluations = run.config, run.state, evaluation_points(run.config)
    with contextlib.closing(Progress(run)) as progress:
        while True:
            # Once in a while: evaluate, and keep the best weights and what it takes to go on.
            due = due_evaluation(evaluations, config, state)
            if due is not None:
                row = evaluate(run, due, progress.tokens_per_second())
                save_checkpoint(run, row)
                progress.add(row)
            if state.iteration >= config.max_iters:
                return
            # One step of the optimizer.
            run.step()
            progress.show()
            if state.iteration // config.gradient_accumulation_steps % MAX_SKIPPED == 0:
                run.check_gradients()
            # A checkpoint by the clock: also before an evaluation, which may take long.
            minutes = (time.monotonic() - run.folder.saved_at) / 60
            if run.ranks.max(minutes) > config.checkpoint_minutes:
                save_checkpoint(run)


def evaluate(run: Run, iteration: int, tokens_per_second: float) -> Row:
    """Scores both splits on their windows: a row of the log. UserError if a loss is not finite."""
    config, state = run.config, run.state
    losses = {split: run.mean_loss(tokens, even_starts(config, len(tokens)))
              for split, tokens in run.tokens.items()}
    if not all(map(math.isfinite, losses.values())):
        run.fail(f"the loss at iteration {iteration} is not finite")
    return dict(
        iteration=iteration, tokens=state.iteration * config.tokens_per_iteration,
        train_loss=losses["train"], val_loss=losses["val"],
        val_bits_per_byte=bits_per_byte(losses["val"], run.meta["splits"]["val"]),
        learning_rate=learning_rate_at(config, max(state.iteration - 1, 0)),  # of the last step
        grad_norm=state.grad_norm.item(), skipped_updates=int(state.skipped_updates),
        tokens_per_second=tokens_per_second, seconds=run.seconds())


def bits_per_byte(loss: float, split: dict) -> float:
    """Nats a token as bits a UTF-8 byte of the split's text: comparable between vocabularies."""
    return loss / math.log(2) * split["tokens"] / split["bytes"]


# ----------------------------------------------------------------------- What is seen of a run


def new_bar(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar: redrawn twice a second on a terminal, every 30 s in a file."""
    unicode = "utf" in (getattr(sys.stderr, "encoding", "") or "").lower()
    return tqdm(*args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
                ascii="·▏▎▍▌▋▊▉█" if unicode else True, **options)


class Progress:
    """The bar, a line per evaluation, the plot; and how fast the steps between evaluations are."""

    def __init__(self, run: Run):
        self.run, self.events = run, None
        self.shown_at, total = 0.0, run.config.max_iters
        width = len(f"{total:,}")
        # tqdm prints `unit` as it is: `show` puts the figures there, in fields of fixed width.
        self.bar = new_bar(
            total=total, initial=run.state.iteration, disable=not run.is_main, unit="",
            bar_format=f"{{percentage:3.0f}}% {{bar}}  {{n:>{width},}}/{total:,}{{unit}}")
        if run.is_main and run.config.tensorboard:
            self.events = Events(run)
        if run.is_main and not os.path.exists(run.plot.path):  # False too if none may look
            run.plot.draw(run.state.log)  # without a loss as yet, it shows whether drawing works
        self.begin_lap()
        self.first_lap = self.lap

    def close(self) -> None:
        self.bar.close()
        if self.events:
            self.events.writer.close()

    def begin_lap(self) -> None:
        """Begins to measure the speed from here on."""
        self.run.loss.item()  # wait for the device
        self.lap = (self.run.state.iteration, time.monotonic())

    def tokens_per_second(self) -> float:
        """How fast the steps of this lap were; if there are none yet, those since the start."""
        self.run.loss.item()
        nothing_yet = self.lap[0] == self.run.state.iteration
        iteration, at = self.first_lap if nothing_yet else self.lap
        tokens = (self.run.state.iteration - iteration) * self.run.config.tokens_per_iteration
        return tokens / max(time.monotonic() - at, 1e-3)  # some clocks tick seldom

    def show(self) -> None:
        """After a step: the bar, and at most once a second the figures behind it."""
        run, state = self.run, self.run.state
        self.bar.update(state.iteration - self.bar.n)
        only_one_step_so_far = self.lap is self.first_lap
        if only_one_step_so_far:
            self.begin_lap()  # without it: the first step is no measure of the others
        elif time.monotonic() - self.shown_at > 1:
            # The time left follows from the average speed since the start, with evaluations.
            begin, at = self.first_lap
            pace = (time.monotonic() - at) / (state.iteration - begin)
            left = tqdm.format_interval((run.config.max_iters - state.iteration) * pace)
            self.bar.unit = (f"  {left.removeprefix('0'):>7} left  loss {run.loss.item():6.3f}"
                             f"  {self.tokens_per_second():>7,.0f} tok/s")
            self.shown_at = time.monotonic()

    def add(self, row: Row) -> None:
        """After an evaluation: a line, events for TensorBoard, and from time to time the plot."""
        if self.run.is_main:
            tqdm.write(f"iteration {row['iteration']:,}: train loss {row['train_loss']:.3f}, "
                       f"validation loss {row['val_loss']:.3f}", file=sys.stderr)
            if self.events:
                self.events.add(row)
            if time.monotonic() - self.run.plot.drawn_at > 10:  # drawing takes half a second
                self.run.plot.draw(self.run.state.log)
        self.begin_lap()


class Events:
    """The log as TensorBoard reads it, in files in out_dir."""

    def __init__(self, run: Run):
        last = run.state.log[-1]["iteration"] if run.state.log else 0
        self.writer = import_tensorboard()(run.folder.path, purge_step=last + 1)

    def add(self, row: Row) -> None:
        with contextlib.suppress(OSError):  # a full disk, say: log.csv will tell
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["iteration"])


def import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as problem:  # it is missing, or does not fit its own packages
        raise UserError(f"--tensorboard true does not work here ({one_line(problem)[:100]}): "
                        "pip install -U tensorboard") from None
    return SummaryWriter


class Plot:
    """The picture of a run's losses, and of its learning rate as it was and as it is planned."""

    def __init__(self, config: Config):
        self.config, self.drawn_at, self.failed = config, time.monotonic(), False
        self.path = Path(config.plot_dir) / f"{picture_name(Path(config.out_dir))}.png"

    def draw(self, log: list[Row]) -> bool:
        """Whether it has been drawn. If not, one notice says so, and the run goes on."""
        config, self.drawn_at = self.config, time.monotonic()
        last = log[-1]["iteration"] if log else config.max_iters
        planned = [(i, learning_rate_at(config, i)) for i in range(0, last, last // 500 + 1)]
        title = f"{config.out_dir}: {config.tokens_per_iteration:,} tokens an iteration"
        try:
            draw_run(self.path, title, log, planned, published=config.preset == "reference")
        except Exception as error:  # of many kinds: matplotlib, its settings, the disk
            if not self.failed:
                reason = f"{type(error).__name__}: {one_line(error)[:150]}"
                notice(f"no picture, training goes on: {reason}")
            self.failed = True
            return False
        return True


# --------------------------------------------------------------------------------------- The end


def finish(run: Run) -> None:
    """The plot, and the best weights scored on the validation split."""
    path, config = run.folder.model, run.config
    best = gpt.load_file(path)
    gpt.load_weights(run.model, best["model"], path)
    drawn = run.is_main and run.plot.draw(run.state.log)
    notice(f"wrote {path} (the best weights, iteration {best['iteration']:,})"
               + (f" and {run.plot.path}" if drawn else ""))
    # A forward pass is a third of an iteration: with a fifth of the tokens, 7 % of the time.
    tokens = run.state.iteration * config.tokens_per_iteration
    final = score(run, [(run.tokens["val"], run.meta["splits"]["val"])], most=tokens // 5)
    notice(in_words(final))
    if run.is_main:
        run.folder.write_record(run, final)


def score(run: Run, text: Iterable[tuple[np.ndarray, dict]], most: int = sys.maxsize) -> dict:
    """The loss over a text, every token but the first predicted once, or over evenly spaced windows
    of about `most` tokens. The text comes in batches: ids, and their `tokens` and UTF-8 `bytes`.
    """
    size, counts = run.config.block_size, Counter()
    total, scored, rest = 0.0, 0, np.array([], dtype=np.uint16)
    for ids, these in text:
        counts.update(tokens=these["tokens"], bytes=these["bytes"])
        tokens = np.concatenate([rest, ids]) if len(rest) else ids
        starts = np.arange(0, len(tokens) - size, size)  # side by side
        rest = tokens[len(starts) * size :]
        count = max(most // size, 1)
        if count < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
            rest = rest[:0]
        if len(starts):
            total += run.mean_loss(tokens, starts, "scoring") * len(starts) * size
            scored += len(starts) * size
    if len(rest) > 1:  # a last window, shorter than the others
        total += run.mean_loss(rest, np.array([0])) * (len(rest) - 1)
        scored += len(rest) - 1
    if not scored:
        raise UserError("there is no text to score")
    loss = total / scored
    perplexity = math.exp(loss) if loss < 700 else None  # JSON has no infinity
    return dict(val_loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte(loss, counts),
                tokens_scored=scored, tokens=counts["tokens"])


def in_words(final: dict, name: str = "validation loss") -> str:
    line = f"{name} {final['val_loss']:.4f}"
    if final["tokens_scored"] < final["tokens"] - 1:
        line += f" on {final['tokens_scored']:,} of {final['tokens']:,} tokens"
    return (f"{line}\nperplexity {final['perplexity'] or math.inf:.2f}, "
            f"{final['bits_per_byte']:.4f} bits per byte")


def tell_story(run: Run) -> None:
    """A short story on stdout, with the temperature and top_k that sample.py has by default."""
    notice("a story from it:\n")
    prompt, end = "Once upon a time", data.END_OF_TEXT
    ids = torch.tensor(data.encode_text(prompt).tolist(), device=run.device)[None]
    torch.manual_seed(run.config.seed)
    with torch.compiler.set_stance("force_eager"):  # every token of a story has its own shape
        rows = gpt.generate(run.model.eval(), ids, 150, 0.8, top_k=50, end_of_text=end)
        tokens = (row.item() for row in rows)
        pieces = gpt.stream_text(tokens, data.token_bytes(), end)
        print("".join(wrapped(itertools.chain([prompt], pieces), sys.stdout)))


def score_only(overrides: dict) -> None:
    """--eval_only: a model's score on stdout, on the whole validation split of prepared data or on
    all of a text that --dataset names. Writes nothing: its run may be going on.
    """
    path = overrides.get("init_from") or str(folder_of(overrides) / "model.pt")
    if "init_from" not in overrides and not Path(path).is_file():
        raise UserError(f"there is no {path} to score: name its --out_dir, or --init_from a model")
    source = load_source(path)
    # The model's own settings and data, but the device at hand; what is typed wins.
    fresh = dict(device="auto", dtype="auto", device_batch_size=None)
    if "init_from" in overrides and "preset" in overrides:  # the preset says which data
        preset = Config.from_preset(overrides["preset"])
        fresh |= dict(dataset=preset.dataset, data_dir=preset.data_dir)
    made_with = fresh.get("data_dir", source.config.data_dir)
    if "dataset" in overrides:
        fresh["data_dir"] = None  # its own folder
    changes = fresh | overrides | architecture(source.config, overrides)
    config = dataclasses.replace(source.config, **changes)
    ranks, text = Ranks(prepare_device(config)), overrides.get("dataset")
    if text and data.is_path(text) and "data_dir" not in overrides:
        run, name = Run(config, {"splits": {}}, ranks, source), "loss"
        separator = data.separator_of(made_with)
        if separator != data.SEPARATOR:
            notice(f"{separator!r} separates stories too, as in {made_with}")
        final = score(run, data.stream_ids(text, separator))
    else:
        text, name = f"the whole validation split of {config.data_dir}", "validation loss"
        run = Run(config, open_data(config, overrides), ranks, source)
        final = score(run, [(run.tokens["val"], run.meta["splits"]["val"])])
    notice(f"{path} on {text} ({final['tokens']:,} tokens), {config.block_size} at once:")
    if run.is_main:
        print(in_words(final, name))
    ranks.leave()


if __name__ == "__main__":
    cli(main)
