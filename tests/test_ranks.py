"""Tests of one run on several processes: the same losses and weights, nothing lost when one goes.

Where torchrun itself matters, it is torchrun that starts the processes. Elsewhere they are forked
(see test_survival.py) with the environment that torchrun would give them, which is much faster.
"""

import functools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_survival
import torch.distributed.run
from conftest import ROOT, log_of, prepare_tales
from test_survival import (
    READ,
    SAVE_FILE,
    TINY,
    UPDATE,
    Hook,
    Job,
    Result,
    at,
    check_one_line,
    limit_files,
    signal_self,
    wait_for,
    watch,
)

from model import load_file

# 20 steps of 5 sequences, which neither 2 nor 3 divides, the last of 2. A large eps keeps what
# AdamW changes in proportion to the gradient: with a tiny one, rounding decides its sign where the
# gradient is nearly 0.
SHARED = TINY | dict(
    batch_size=1, gradient_accumulation_steps=5, device_batch_size=2, max_iters=97,
    eval_interval=25, eval_windows=3, dropout=0.0, eps=1e-4, learning_rate=1e-2,
    matrix_optimizer="adamw",
)
STEP_ENDS = [*range(5, 97, 5), 97]
# 8 steps of 3 sequences, the last of one: of four processes, one or three have no work.
FEW = SHARED | dict(
    gradient_accumulation_steps=3, max_iters=22, eval_interval=6, eval_windows=2,
    matrix_optimizer="muon",
)
no_process_is_left = test_survival.no_process_is_left  # a fixture, here too


def flags_of(settings: dict, data: Path, folder: Path) -> dict:
    return settings | dict(data_dir=data, out_dir=folder / "out", plot_dir=folder)


def run_alone(data: Path, folder: Path, settings: dict) -> Path:
    """out_dir of the run of these settings on one process."""
    count = functools.partial(tally, folder / "tally")
    wait_for_all([Job(folder, hooks=(count,), **flags_of(settings, data, folder))])
    return folder / "out"


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory) -> Path:
    return run_alone(data, tmp_path_factory.mktemp("alone"), SHARED)


def become(rank: int, size: int, port: int) -> None:
    """A hook: what torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def fork_ranks(
    folder: Path, size: int, *argv: str,
    hooks: Callable[[int], tuple[Hook, ...]] = lambda rank: (), **flags: Any,
) -> list[Job]:
    """As many processes as `size` says; `hooks` gives those of a rank."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]  # one that is free
    jobs = []
    for rank in range(size):
        first = functools.partial(become, rank, size, port)
        jobs.append(Job(folder, *argv, hooks=(first, *hooks(rank)), **flags))
    return jobs


def on_rank(number: int, *hooks: Hook) -> Callable[[int], tuple[Hook, ...]]:
    """For `fork_ranks`: these hooks on one rank, none on the others."""
    return lambda rank: hooks if rank == number else ()


def wait_for_all(jobs: list[Job]) -> list[Result]:
    results = [job.wait() for job in jobs]
    assert all(result.status == 0 for result in results), [result.err for result in results]
    return results


def tally(path: Path) -> Callable[[], None]:
    """A hook: writes down how many sequences this process has read."""
    counts: list[int] = []
    watch(READ, lambda _, split, starts, *rest: counts.append(len(starts)))
    return lambda: path.write_text(str(sum(counts)))


def spy_on_writes(folder: Path, report: Path) -> Callable[[], None]:
    """A hook: notes every file in `folder` that this process writes, renames or removes."""
    seen: list[str] = []

    def look(event: str, args: tuple) -> None:
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.chmod")
        if (writes or changes) and str(args[0]).startswith(str(folder)):
            seen.append(f"{event} {args[0]}")

    sys.addaudithook(look)
    return lambda: report.write_text("\n".join(seen))


def perplexity(text: str) -> float:
    """That of the whole validation split, as it is told at the end."""
    return float(re.search(r"perplexity ([\d.]+)", text)[1])


def check_agree(out: Path, alone: Path) -> None:
    """Logs and weights are those of one process to float32 rounding."""
    ours, theirs = log_of(out), log_of(alone)
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([*row.values()], [*other.values()], rtol=2e-5, err_msg=str(row))
    for name in ("model.pt", "ckpt.pt"):
        ours, theirs = (load_file(folder / name)["model"] for folder in (out, alone))
        for key, weights in theirs.items():
            assert (ours[key] - weights).abs().max() < 2e-5, (name, key)


def saved_iteration(folder: Path) -> int:
    return load_file(folder / "out" / "ckpt.pt")["state"]["iteration"]


# ---------------------------------------------------------------------------- Processes of torchrun


def torchrun(folder: Path, script: Path = ROOT / "train.py", **flags: Any) -> Job:
    """`torchrun --standalone --nproc_per_node=2` of train.py, or of a script around it."""
    words = ("--standalone", "--nproc_per_node=2", str(script))
    return Job(folder, *words, main=torch.distributed.run.main, **flags)


def ranks_of(job: Job) -> list[int]:
    """The ids of a torchrun's processes, rank 0's first."""
    pid = job.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children)


SLOW = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import config, train

read, real = train.read_batch, train.train

def slow_read(*args):
    time.sleep(0.05)
    return read(*args)

def told(run):
    try:
        real(run)
    except train.Stopped:
        path = run.folder.path.parent / f"stopped_{{run.ranks.rank}}"
        path.write_text(str(run.state.iteration))
        raise

train.read_batch, train.train = slow_read, told
config.cli(train.main)
"""


@pytest.fixture
def slow_job(data, tmp_path) -> Iterator[Job]:
    """A slow run on two processes that has its first checkpoint, and far to go."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    job = torchrun(tmp_path, script, **flags_of(SHARED, data, tmp_path))
    wait_for((tmp_path / "out" / "ckpt.pt").exists, job)
    pids = ranks_of(job)
    yield job
    if job.running():
        for pid in (*pids, job.process.pid):
            os.kill(pid, signal.SIGKILL)


def test_two_processes_of_torchrun_agree_with_one(data, tmp_path, alone):
    result = torchrun(tmp_path, **flags_of(SHARED, data, tmp_path)).wait()
    assert result.status == 0, result.err
    check_agree(tmp_path / "out", alone)
    assert result.err.count("iteration 25: train loss") == 1
    assert result.out.count("Once upon a time") == 1


def test_sigterm_to_torchrun_stops_all_after_the_same_step(slow_job, tmp_path, alone):
    slow_job.send(signal.SIGTERM)
    result = slow_job.wait()
    assert result.status != 0 and "--resume" in result.err
    stopped = [int((tmp_path / f"stopped_{rank}").read_text()) for rank in (0, 1)]
    saved = saved_iteration(tmp_path)
    assert stopped == [saved] * 2 and saved in STEP_ENDS[:-1]
    wait_for_all([Job(tmp_path, "--resume", out_dir=tmp_path / "out")])
    check_agree(tmp_path / "out", alone)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job_and_one_process_goes_on(slow_job, tmp_path, alone, rank):
    pids, begin = ranks_of(slow_job), time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    assert slow_job.wait().status != 0 and time.monotonic() - begin < 60  # the promise: a minute
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert saved_iteration(tmp_path) in STEP_ENDS[:-1]
    wait_for_all([Job(tmp_path, "--resume", out_dir=tmp_path / "out")])
    check_agree(tmp_path / "out", alone)


# ------------------------------------ Forked processes: the same results, and errors on all of them


def test_three_processes_agree_with_one_and_share_all_work(data, tmp_path, alone):
    folder = tmp_path / "run"
    folder.mkdir()

    def hooks(rank: int) -> tuple[Hook, ...]:
        count = functools.partial(tally, tmp_path / f"tally_{rank}")
        return count, functools.partial(spy_on_writes, folder, tmp_path / f"writes_{rank}")

    results = wait_for_all(fork_ranks(folder, 3, hooks=hooks, **flags_of(SHARED, data, folder)))
    check_agree(folder / "out", alone)
    writes = [(tmp_path / f"writes_{rank}").read_text() for rank in range(3)]
    assert "ckpt.pt" in writes[0] and writes[1:] == ["", ""]
    assert results[0].out != "" and [result.out for result in results[1:]] == ["", ""]
    total = int((alone.parent / "tally").read_text())
    shares = [int((tmp_path / f"tally_{rank}").read_text()) for rank in range(3)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 2 * len(STEP_ENDS)


def test_processes_without_work_join_with_zeros(data, tmp_path):
    four = tmp_path / "four"
    four.mkdir()
    wait_for_all(fork_ranks(four, 4, **flags_of(FEW, data, four)))
    check_agree(four / "out", run_alone(data, tmp_path, FEW))


def test_a_run_goes_on_from_one_process_to_two(data, tmp_path, alone):
    hook = at(UPDATE, 12, signal_self, signal.SIGTERM)
    job = Job(tmp_path, hooks=(hook,), **flags_of(SHARED, data, tmp_path))
    assert job.wait().status == 143
    wait_for_all(fork_ranks(tmp_path, 2, "--resume", out_dir=tmp_path / "out"))
    check_agree(tmp_path / "out", alone)


def slow_write() -> Hook:
    """A disk that takes its time."""
    return at(SAVE_FILE, None, time.sleep, 0.4)


def test_all_score_with_the_best_weights_once_they_are_written(data, tmp_path):
    """The only evaluation is the last: nobody may look for model.pt before rank 0 wrote it."""
    flags = flags_of(FEW | dict(eval_interval=1000), data, tmp_path)
    one = Job(tmp_path, **flags | dict(out_dir=tmp_path / "one")).wait()
    results = wait_for_all(fork_ranks(tmp_path, 2, hooks=on_rank(0, slow_write()), **flags))
    assert perplexity(results[0].err) == pytest.approx(perplexity(one.err), rel=1e-5)


def test_several_start_from_a_model_and_score_it_as_one_does(data, tmp_path, alone):
    """One that learns nothing, and is long enough for the whole split to be scored at its end."""
    nothing = dict(learning_rate=1e-30, min_lr=0, max_iters=9, weight_decay=0, batch_size=64,
                   device_batch_size=96)
    flags = flags_of(FEW | nothing, data, tmp_path) | dict(init_from=alone / "model.pt")
    results = wait_for_all(fork_ranks(tmp_path, 2, **flags))
    # In batches of the same size, so that rounding is the same too.
    flags = dict(out_dir=alone, device="cpu", dtype="float32", device_batch_size=96)
    scored = wait_for_all(fork_ranks(tmp_path, 2, "--eval_only", **flags))
    told = perplexity(results[0].err)
    assert f"perplexity {told}" in scored[0].out and scored[1].out == ""


def test_a_signal_to_one_rank_stops_all_once_the_checkpoint_is_written(data, tmp_path):
    """A rank that left would make torchrun end the one that writes."""

    def hooks(rank: int) -> tuple[Hook, ...]:
        stop = at(UPDATE, 3, signal_self, signal.SIGTERM)
        return (stop,) if rank else (slow_write(),)

    flags = flags_of(FEW | dict(eval_interval=1000), data, tmp_path)
    jobs = fork_ranks(tmp_path, 2, hooks=hooks, **flags)
    assert jobs[1].wait().status == 143
    assert saved_iteration(tmp_path) == 9
    result = jobs[0].wait()
    assert result.status == 143 and "--resume" in result.err


def use_data(folder: Path) -> None:
    """A hook: this process is told of other data than the rest."""
    sys.argv.append(f"--data_dir={folder}")


def test_ranks_that_differ_in_data_are_refused(data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    hook = functools.partial(use_data, prepare_tales(other, seed=5))
    jobs = fork_ranks(tmp_path, 2, hooks=on_rank(1, hook), **flags_of(FEW, data, tmp_path))
    for job in jobs:
        result = job.wait()
        assert result.status == 2 and ": the ranks differ" in result.err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_under_several_processes_is_said_in_one_line(data, tmp_path):
    limit, flags = at(SAVE_FILE, 4, limit_files, 100_000), flags_of(FEW, data, tmp_path)
    jobs = fork_ranks(tmp_path, 2, hooks=on_rank(0, limit), **flags)
    results = [job.wait() for job in jobs]
    for result in results:
        check_one_line(result)
    assert "File too large" in results[0].err
    assert saved_iteration(tmp_path) in range(0, 22, 3)
