"""Tests of survival: runs that are killed, stopped, short of disk or handed damaged files.

Whatever happens to a run, `--resume` ends with the files of one that nothing ever happened to.
Such a run is a real process, forked from a server that has imported train.py once
(multiprocessing's forkserver), which saves seconds. It can be told beforehand what to do to itself
and where ("kill yourself before the third step"), so that it dies in the same place on any machine.
"""

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, UserError, cli

import pytest
import torch
from conftest import (
    ROOT,
    check_equal,
    check_same,
    edit_config,
    flat,
    log_of,
    main,
    prepare_tales,
    refusal,
    snapshot,
    touch_picture,
)

import train
from model import FORMAT, GPT, load_file, save_file
from plots.loss_curve import draw_run
from prepare_data import token_bytes

MODULES = ("config.py", "model.py", "prepare_data.py", "sample.py", "train.py")
OURS = {str(ROOT / name) for name in (*MODULES, "plots/loss_curve.py")}
TINY = dict(
    n_layer=1, n_head=2, n_embd=8, block_size=8, batch_size=1, gradient_accumulation_steps=4,
    dropout=0.2, max_iters=30, warmup_iters=4, learning_rate=3e-3, min_lr=1e-4, eval_interval=8,
    eval_windows=2, device="cpu", dtype="float32", compile="false", matrix_optimizer="muon",
)
# Its 8 steps end at 4, 8, 12, 16, 20, 24, 28 and 30; a step is of four micro-batches, the last of
# two. Evaluations (one micro-batch of each split) are at 8, 16, 24 and 30.
ALWAYS = dict(checkpoint_minutes=1e-9)  # a checkpoint after every step, not at evaluations only
# Places where a process can be told to do something, by train.py's names for them.
READ = "read_batch"  # before a micro-batch
UPDATE = "Run.update_weights"  # in a step, when its gradients are there
EVALUATE = "evaluate"
SAVE_FILE = "gpt.save_file"  # before a model.pt or a ckpt.pt is written
PATIENCE = 120  # seconds that anything may take on a busy machine
token_bytes()  # the tokenizer is read here, and so by the server once for all its forks

# ------------------------------------------------------- Processes, and what they can be told to do

# Called in the process before main; what it returns is called after main.
Hook = Callable[[], Callable[[], None] | None]
FORKS = multiprocessing.get_context("forkserver")


class Result(NamedTuple):
    status: int  # below zero: the signal that ended the process
    out: str
    err: str


class Job:
    """A process that runs train.py (or another main) with these flags."""

    numbers = itertools.count()
    started: list["Job"] = []

    def __init__(self, folder: Path, *argv: str, hooks: tuple[Hook, ...] = (),
                 main: Callable = train.main, **flags: Any):
        words = [*argv, *(f"--{name}={value}" for name, value in flags.items())]
        number = next(self.numbers)
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        for file in (self.out, self.err):
            file.touch()  # it may be killed before it writes
        figures = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
        FORKS.set_forkserver_preload(["pytest", "test_survival", "torch._dynamo", *figures])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            multiprocessing.forkserver.ensure_running()
        args = (words, hooks, main, self.out, self.err)
        self.process = FORKS.Process(target=play, args=args, daemon=True)
        self.process.start()
        self.started.append(self)

    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> Result:
        self.process.join(PATIENCE)
        if self.running():
            self.process.kill()
            pytest.fail(f"the process does not end; it said:\n{self.err.read_text()}")
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test that fails halfway leaves none that hangs."""
    yield
    while Job.started:
        job = Job.started.pop()
        if job.running():
            job.send(signal.SIGKILL)


def play(argv: list[str], hooks: tuple[Hook, ...], main: Callable, out: Path, err: Path) -> None:
    """What such a process does. It leaves an empty picture: drawing takes longer than all else."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if pytest itself runs under nohup
    sys.argv = ["main", *argv]
    torch.set_num_threads(1)
    train.draw_run = touch_picture
    ends = [hook() for hook in hooks]
    try:
        cli(main)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for end in filter(None, ends):
            end()


def watch(where: str, see: Callable[..., Any]) -> None:
    """Before each call of train.py's `where`, `see` gets the call's number and arguments."""
    *owners, name = where.split(".")
    owner = functools.reduce(getattr, owners, train)
    real, numbers = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        see(next(numbers), *args)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def at(where: str, number: int | None, act: Callable[..., Any], *args: Any) -> Hook:
    """A hook: `act(*args)` before the `number`-th call (None: every call) of train.py's `where`."""
    return functools.partial(_at, where, number, act, args)


def _at(where: str, number: int | None, act: Callable[..., Any], args: tuple) -> None:
    watch(where, lambda count, *_: act(*args) if number in (count, None) else None)


def kill_at(where: str, number: int) -> Hook:
    return at(where, number, signal_self, signal.SIGKILL)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def hang(sign: Path) -> None:
    """Says that the place is reached, and is then busy for longer than anybody waits."""
    sign.touch()
    time.sleep(2 * PATIENCE)


def forbid_writing(folder: Path) -> None:
    folder.chmod(0o500)
    if os.geteuid() == 0:
        os.seteuid(65534)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_while_writing(size: int) -> None:
    """The kernel ends this process in a write, when a file gets so many bytes long."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    limit_files(size)


def count_calls(path: Path | None, kill_at: float) -> Callable[[], None]:
    """A hook: SIGKILL at this call by or in our modules, or else their number to `path`."""
    train.draw_run = draw_run
    numbers = itertools.count(1)

    def look(frame: Any, event: str, what: Any) -> None:
        ours = event in ("call", "c_call") and frame.f_code.co_filename in OURS
        if ours and next(numbers) >= kill_at:
            signal_self(signal.SIGKILL)

    def tell() -> None:
        sys.setprofile(None)
        if path is not None:
            path.write_text(str(next(numbers)))

    sys.setprofile(look)
    return tell


def wait_for(ready: Callable[[], bool], job: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert job.running() and time.monotonic() < end, job.err.read_text()
        time.sleep(0.01)


# ------------------------------------------------------------------------ Runs, and what they leave


class Place:
    """A folder with the run of TINY in its `out`."""

    def __init__(self, data: Path, folder: Path, out: Path | None = None):
        self.data, self.folder, self.out = data, folder, out or folder / "out"
        self.flags = TINY | dict(data_dir=data, out_dir=self.out, plot_dir=folder)

    def begin(self, *argv: str, hooks: tuple[Hook, ...] = (), **changes: Any) -> Job:
        return Job(self.folder, *argv, hooks=hooks, **self.flags | changes)

    def resume(self, **changes: Any) -> Job:
        return Job(self.folder, "--resume", out_dir=self.out, **changes)

    def resume_to_the_end(self, **changes: Any) -> Result:
        result = self.resume(**changes).wait()
        assert result.status == 0, result.err
        return result

    def iteration(self) -> int:
        return load_file(self.out / "ckpt.pt")["state"]["iteration"]


@pytest.fixture
def place(data, tmp_path) -> Place:
    return Place(data, tmp_path)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """out_dir of the run of TINY that nothing ever happens to."""
    place = Place(data, tmp_path_factory.mktemp("whole"))
    result = place.begin().wait()
    assert result.status == 0, result.err
    return place.out


@pytest.fixture(scope="session")
def killed(data, tmp_path_factory) -> Place:
    """A run that was killed in its sixth step: its last checkpoint is of iteration 16. Copy it."""
    place = Place(data, tmp_path_factory.mktemp("killed"))
    assert place.begin(hooks=(kill_at(UPDATE, 6),)).wait().status == -signal.SIGKILL
    assert place.iteration() == 16
    return place


@pytest.fixture
def interrupted(killed, tmp_path) -> Place:
    """A run whose last checkpoint is that of iteration 16."""
    shutil.copytree(killed.out, tmp_path / "out")
    return Place(killed.data, tmp_path)


def check_one_line(result: Result, *words: str) -> None:
    """Status 2, and the last thing said is one line with these words in it."""
    errors = [line for line in result.err.splitlines() if "rror" in line]
    assert result.status == 2 and len(errors) == 1, result.err
    assert errors[0].startswith("error: ") and result.err.endswith(errors[0] + "\n"), result.err
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in result.err


def check_resumes(place: Place, whole: Path) -> None:
    """Resumed to the end, the run equals the one that nothing ever happened to."""
    place.resume_to_the_end()
    check_equal(place.out, whole)


def check_refused(place: Place, *words: str, **changes: Any) -> None:
    """Resuming is refused in one line (in this process), and nothing is touched."""
    before = snapshot(place.out)
    line = refusal(main, "--resume", out_dir=place.out, **changes)
    assert all(word in line for word in words), line
    assert snapshot(place.out) == before


# -------------------------------------------------------------------------------------------- Kills


@pytest.fixture(scope="session")
def calls(whole, data, tmp_path_factory) -> int:
    """How many calls a whole run makes that saves after every step, which changes no result."""
    place = Place(data, tmp_path_factory.mktemp("calls"))
    count = functools.partial(count_calls, place.folder / "calls", float("inf"))
    assert place.begin(hooks=(count,), **ALWAYS).wait().status == 0
    check_equal(place.out, whole)
    return int((place.folder / "calls").read_text())


def check_survives_a_kill(place: Place, whole: Path, hook: Hook, status: int) -> None:
    """Resumed with all its flags, as in a restart loop: there may be no checkpoint yet."""
    assert place.begin(hooks=(hook,), **ALWAYS).wait().status == status
    assert place.begin("--resume").wait().status == 0
    check_equal(place.out, whole)


MOMENTS = [(part, 3) for part in range(3)]
MORE_MOMENTS = [pytest.param(part, 20, marks=pytest.mark.slow) for part in range(20)]


@pytest.mark.parametrize("part, parts", MOMENTS + MORE_MOMENTS)
def test_a_run_killed_anywhere_equals_one_that_never_was(place, whole, calls, part, parts):
    """A seeded moment in each third of the run: its beginning, middle and end all have a kill."""
    moment = int(calls * (part + random.Random(part).random()) / parts)
    hook = functools.partial(count_calls, None, moment)
    check_survives_a_kill(place, whole, hook, -signal.SIGKILL)


@pytest.mark.parametrize("seed, file", [(3, "model.pt"), (4, "ckpt.pt")])
def test_a_run_killed_in_a_write_and_resumed_equals_one_that_never_was(place, whole, seed, file):
    """In the evaluation at 16, as the first writes ckpt.pt, model.pt and ckpt.pt once more."""
    size = random.Random(seed).randrange(1, (whole / file).stat().st_size)
    hook = at(SAVE_FILE, 4 if file == "model.pt" else 5, die_while_writing, size)
    assert place.begin(hooks=(hook,)).wait().status == -signal.SIGXFSZ
    torn = [path for path in place.out.iterdir() if path.stat().st_size == size]
    # The kill did come when so much of this very file was written.
    assert len(torn) == 1 and torn[0].name.startswith(f".{file}.")
    assert place.iteration() == 8
    check_resumes(place, whole)
    # What the killed write left is cleared away: many kills would fill a disk.
    assert snapshot(place.out).keys() == {"ckpt.pt", "model.pt", "log.csv", "run.json"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 210))
def test_a_run_killed_in_the_middle_of_any_write(place, whole, seed):
    rng = random.Random(seed)
    number, size = rng.randint(1, 12), rng.randrange(1, (whole / "model.pt").stat().st_size)
    hook = at(SAVE_FILE, number, die_while_writing, size)
    check_survives_a_kill(place, whole, hook, -signal.SIGXFSZ)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300, 304))
def test_a_run_killed_again_and_again_by_the_clock(place, whole, seed):
    """From outside, at any moment of the wall clock, until it gets through."""
    rng = random.Random(seed)
    while True:
        job = place.begin("--resume", **ALWAYS)
        job.process.join(rng.uniform(0, 1))
        if not job.running():
            break
        job.send(signal.SIGKILL)
        job.wait()
    assert job.wait().status == 0
    check_equal(place.out, whole)


def test_log_rows_after_the_checkpoint_are_cut(place, whole):
    """Killed when model.pt and log.csv knew of the evaluation at 16, and ckpt.pt did not."""
    assert place.begin(hooks=(kill_at(SAVE_FILE, 5),)).wait().status == -signal.SIGKILL
    assert place.iteration() == 8 and [row["iteration"] for row in log_of(place.out)] == [8, 16]
    place.resume_to_the_end(eval_interval=10)
    assert [row["iteration"] for row in log_of(place.out)] == [8, 20, 30]  # 10 has the weights of 8


# ------------------------------------------------------------------------- Checkpoints by the clock


@pytest.mark.parametrize(
    "where, number, saved, rows", [(UPDATE, 6, 20, 2), (EVALUATE, 2, 16, 1), (EVALUATE, 4, 30, 3)],
    ids=["in a step", "before an evaluation", "between the last step and the last evaluation"])
def test_a_checkpoint_by_the_clock_resumes_exactly(place, whole, where, number, saved, rows):
    assert place.begin(hooks=(kill_at(where, number),), **ALWAYS).wait().status == -signal.SIGKILL
    assert place.iteration() == saved and len(log_of(place.out)) == rows
    check_resumes(place, whole)


def break_gradients(iteration: int) -> None:
    """A hook: the gradients of the step that begins at this iteration are not finite."""

    def break_them(count: int, run: train.Run, *args: Any) -> None:
        if run.state.iteration == iteration:
            run.model.transformer.ln_f.weight.grad.fill_(torch.nan)

    watch(UPDATE, break_them)


def test_a_skipped_step_is_still_counted_after_a_resume(data, tmp_path):
    broken = functools.partial(break_gradients, 8)
    places = [Place(data, tmp_path, tmp_path / name) for name in ("a", "b")]
    assert places[0].begin(hooks=(broken,)).wait().status == 0
    kill = kill_at(UPDATE, 4)
    assert places[1].begin(hooks=(broken, kill), **ALWAYS).wait().status == -signal.SIGKILL
    places[1].resume_to_the_end()
    assert [row["skipped_updates"] for row in log_of(places[0].out)] == [0, 1, 1, 1]
    check_equal(places[1].out, places[0].out)


FAR_TOO_LARGE = 2.0**22


def scale_far_too_large() -> None:
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=FAR_TOO_LARGE)


def test_skipped_float16_steps_are_counted(place):
    """A loss scale far too large, which is halved at every step that it breaks, until they pass."""
    # Not a skipif: asking for a GPU in the server would spoil it for what is forked.
    if not torch.cuda.is_available():
        pytest.skip("float16 needs a GPU")
    flags = ALWAYS | dict(device="cuda", dtype="float16", max_iters=120)
    result = place.begin(hooks=(scale_far_too_large, kill_at(UPDATE, 3)), **flags).wait()
    assert result.status == -signal.SIGKILL, result.err
    before = load_file(place.out / "ckpt.pt")
    assert before["state"]["skipped_updates"] == 2
    assert before["scaler"]["scale"] == FAR_TOO_LARGE / 4
    place.resume_to_the_end()
    after, rows = load_file(place.out / "ckpt.pt"), log_of(place.out)
    skipped = after["state"]["skipped_updates"]
    assert 2 < skipped < 30 and after["scaler"]["scale"] == FAR_TOO_LARGE / 2**skipped
    assert rows[-1]["skipped_updates"] == skipped
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_resume_that_overtook_the_last_checkpoint_of_the_old_run_is_refused(interrupted, whole):
    """The old process saves once more, and ends, while the new one starts."""
    newer = functools.partial(shutil.copy, whole / "ckpt.pt", interrupted.out / "ckpt.pt")
    result = interrupted.resume(hooks=(at("lock_folder", 1, newer),)).wait()
    check_one_line(result, "again")
    assert interrupted.iteration() == 30
    interrupted.resume_to_the_end()


# ------------------------------------------------------------------------------------------ Signals


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # and the exit status


@pytest.mark.parametrize("number, status", SIGNALS.items())
def test_a_signal_leaves_the_last_whole_step_and_the_run_goes_on(place, whole, number, status):
    job = place.begin(hooks=(at(READ, None, time.sleep, 0.05),))
    wait_for((place.out / "ckpt.pt").exists, job)
    job.send(number)
    result = job.wait()
    assert result.status == status and "Traceback" not in result.err
    assert f"--resume --out_dir {place.out}" in result.err.splitlines()[-1]
    assert place.iteration() in (8, 12, 16, 20, 24, 28)
    assert f"stopped at iteration {place.iteration()}; to go on:" in result.err
    check_resumes(place, whole)


@pytest.mark.parametrize("where, number, saved", [
    (READ, 2, 0), (READ, 12, 8), (EVALUATE, 2, 16), (UPDATE, 5, 20), (SAVE_FILE, 5, 16),
    (UPDATE, 8, 30),
], ids=["before the first step ends", "in a step, which is dropped", "in an evaluation",
        "when all micro-batches of a step are done", "while a checkpoint is written",
        "in the last step, whose evaluation is not lost"])
def test_a_signal_at_any_place_is_obeyed(place, whole, where, number, saved):
    assert place.begin(hooks=(at(where, number, signal_self, signal.SIGTERM),)).wait().status == 143
    assert place.iteration() == saved
    check_resumes(place, whole)


def signal_twice(number: int, second: int) -> None:
    """As a terminal that closes, or torchrun, which passes a Ctrl-C on, sends two."""
    signal_self(number)
    time.sleep(0.02)
    signal_self(second)


@pytest.mark.parametrize("number, second, status", [
    (signal.SIGHUP, signal.SIGHUP, 129), (signal.SIGINT, signal.SIGINT, 130),
    (signal.SIGINT, signal.SIGTERM, 130),
], ids=str)
def test_a_second_signal_within_two_seconds_is_the_same_one(place, whole, number, second, status):
    result = place.begin(hooks=(at(READ, 13, signal_twice, number, second),)).wait()
    assert result.status == status and "to go on:" in result.err
    check_resumes(place, whole)


def test_a_run_under_nohup_outlives_the_logout(place, whole):
    nohup = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    hangup = at(UPDATE, 3, signal_self, signal.SIGHUP)
    result = place.begin(hooks=(nohup, hangup)).wait()
    assert result.status == 0, result.err
    check_equal(place.out, whole)


def test_a_later_second_signal_ends_at_once(data, tmp_path):
    """One run for each signal, so that the two seconds pass for all of them at once."""
    places = {number: Place(data, tmp_path, tmp_path / number.name) for number in SIGNALS}
    jobs = {}
    for number, place in places.items():
        sign = tmp_path / f"{number.name}.sign"
        jobs[number] = job = place.begin(hooks=(at(READ, 13, hang, sign),))
        wait_for(sign.exists, job)
        job.send(signal.SIGINT)
        wait_for(lambda job=job: "stopping" in job.err.read_text(), job)
    before = snapshot(tmp_path)
    time.sleep(2.1)
    for number, job in jobs.items():
        job.send(number)
        assert job.wait().status == SIGNALS[number] and places[number].iteration() == 8
    assert snapshot(tmp_path) == before


def test_ctrl_c_on_the_command_line(place):
    """`python train.py` itself, with the shell's view of it."""
    flags = place.flags | dict(max_iters=100_000)
    command = [sys.executable, "train.py", *(f"--{name}={flags[name]}" for name in flags)]
    err, checkpoint = place.folder / "err", place.out / "ckpt.pt"
    with open(err, "w") as file, subprocess.Popen(command, cwd=ROOT, stderr=file) as process:
        end = time.monotonic() + PATIENCE
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    stopped, said = place.iteration(), err.read_text()
    assert "Traceback" not in said
    assert f"stopped at iteration {stopped:,}; to go on:\n    python train.py --resume" in said
    place.resume_to_the_end(max_iters=stopped + 4)
    assert place.iteration() == stopped + 4


# -------------------------------------------------------------------------------------------- Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk with room for one checkpoint and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    possible = os.geteuid() == 0 and shutil.which("mount") is not None
    if not possible or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not possible here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(data, tmp_path, small_disk, whole):
    place = Place(data, tmp_path, small_disk / "out")
    check_one_line(place.begin().wait(), "No space left")
    assert place.iteration() == 8 and not list(place.out.glob(".*"))
    remount(small_disk, "size=32m")
    check_resumes(place, whole)


@pytest.mark.parametrize("act, words", [(limit_files, "File too large"),
                                        (forbid_writing, "Permission denied")])
def test_a_write_that_is_not_allowed_is_one_line(place, whole, act, words):
    argument = 1_000_000 if act is limit_files else place.out
    check_one_line(place.begin(hooks=(at(SAVE_FILE, 5, act, argument),)).wait(), words)
    place.out.chmod(0o700)
    assert place.iteration() == 8 and not list(place.out.glob(".*"))
    check_resumes(place, whole)


def test_a_disk_that_has_become_read_only_is_one_line(data, killed, tmp_path, small_disk):
    remount(small_disk, "size=32m")
    place = Place(data, tmp_path, shutil.copytree(killed.out, small_disk / "out"))
    remount(small_disk, "ro")
    before = snapshot(place.out)
    check_one_line(place.resume().wait(), "Read-only file system", str(place.out))
    assert snapshot(place.out) == before


# --------------------------------------------------------------- Damaged, foreign and hostile files


class Bomb:
    """A pickle that makes a file when it is loaded by somebody careless."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sign),)


@pytest.mark.parametrize("form", ["pickle", "old", "zip"])
def test_a_poisoned_ckpt_pt_is_refused_and_nothing_runs(interrupted, form):
    path, sign = interrupted.out / "ckpt.pt", interrupted.out / "exploded"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(sign)))
    elif form == "old":
        content = {"format": FORMAT, "model": Bomb(sign)}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(load_file(path) | {"model": Bomb(sign)}, path)
    check_refused(interrupted, "ckpt.pt", "not a checkpoint of ours")
    assert not sign.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert sign.exists()  # it was live


def test_a_truncated_checkpoint_or_one_with_a_flipped_bit_is_refused(interrupted):
    """Nearly all of the file is weights and moments, and so are the places of the bits."""
    path, rng = interrupted.out / "ckpt.pt", random.Random(0)
    content = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.99, 1):
        path.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
        check_refused(interrupted, "ckpt.pt", "damaged")
    for _ in range(3):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        check_refused(interrupted, "ckpt.pt", "damaged")


@pytest.mark.parametrize("count", [400, pytest.param(None, marks=pytest.mark.slow)])
def test_no_flipped_bit_passes_for_a_weight(tmp_path, count):
    """Damage is refused in one line, or changes nothing of what is read: padding may change."""
    torch.manual_seed(0)
    config = Config(n_layer=1, n_head=1, n_embd=2, block_size=2, vocab_size=8)
    path = tmp_path / "a.pt"
    save_file(path, config, GPT(config), note="a value")
    content, good = path.read_bytes(), flat(load_file(path))
    flips = list(itertools.product(range(len(content)), range(8)))  # each bit of each byte
    for place, bit in random.Random(0).sample(flips, count or len(flips)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            check_same(flat(load_file(path)), good, (place, bit))


@pytest.mark.parametrize("content", [
    {}, {"config": 3}, {"config": {"n_layer": "x"}, "model": {}}, "model.pt"], ids=str)
def test_a_checkpoint_with_parts_missing_or_wrong_is_one_line(interrupted, content):
    """A model.pt in its place lacks the optimizer, for instance."""
    checkpoint = interrupted.out / "ckpt.pt"
    if content == "model.pt":
        shutil.copy(interrupted.out / content, checkpoint)
    else:
        torch.save({"format": FORMAT} | content, checkpoint)
    check_refused(interrupted, "ckpt.pt" if content == "model.pt" else "")


# ------------------------------------------------ Data, flags and constants that have changed since


def test_other_data_is_refused_and_so_are_swapped_files(interrupted, tmp_path):
    data = prepare_tales(tmp_path, seed=5)
    check_refused(interrupted, "has changed", "--init_from", data_dir=data)
    (data / "train.bin").rename(data / "x")
    (data / "val.bin").rename(data / "train.bin")
    (data / "x").rename(data / "val.bin")
    check_refused(interrupted, "disagrees with meta.json", data_dir=data)


def test_what_cannot_change_the_past_may_change(interrupted, whole):
    changes = dict(max_iters=34, eval_interval=17, device_batch_size=3, lr_decay_iters=40)
    result = interrupted.resume_to_the_end(**changes, **ALWAYS)
    warnings = [line for line in result.err.splitlines() if "schedule changes" in line]
    assert len(warnings) == 1 and "warning" in warnings[0] and "40" in warnings[0]
    # The evaluation at 17 would have the weights of 16.
    assert [row["iteration"] for row in log_of(interrupted.out)] == [8, 16, 34]
    assert log_of(interrupted.out)[:2] == log_of(whole)[:2]


def main_of_the_copy(folder: Path, argv: list[str]) -> None:
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)
    sys.path.insert(0, str(folder))
    importlib.import_module("train").main(argv)


def test_constants_edited_in_config_py_since_change_nothing_of_a_run(interrupted, whole):
    """One that was typed when the run began, one that was not, and the default preset."""
    for name in MODULES:
        shutil.copy(ROOT / name, interrupted.folder)
    edit_config(interrupted.folder, n_layer=3, weight_decay=0.7, DEFAULT_PRESET="tuned")
    result = interrupted.resume_to_the_end(
        main=functools.partial(main_of_the_copy, interrupted.folder))
    check_equal(interrupted.out, whole)
    lines = [line for line in result.err.splitlines() if "settings it began with" in line]
    assert len(lines) == 1 and str(interrupted.out / "ckpt.pt") in lines[0], result.err
    assert "schedule" not in result.err


def test_without_a_checkpoint_resume_begins_and_says_so(place, whole):
    other = place.folder / "out" / "demo" / "ckpt.pt"
    other.parent.mkdir(parents=True)
    other.touch()
    result = place.begin("--resume", hooks=(functools.partial(os.chdir, place.folder),)).wait()
    assert "starting from the beginning (runs to resume: out/demo)" in result.err
    check_equal(place.out, whole)


def test_stopped_in_the_last_scoring_a_run_has_all_its_files_and_says_so(place):
    hook = at("score", 1, signal_self, signal.SIGINT)
    result = place.begin(hooks=(hook,)).wait()
    assert result.status == 130 and "Traceback" not in result.err
    assert f"wrote {place.out / 'model.pt'}" in result.err
    assert {"model.pt", "log.csv", "ckpt.pt"} <= snapshot(place.out).keys()
    assert (place.folder / "out.png").exists()
    assert "is finished" in place.resume_to_the_end().err


def test_a_second_process_in_the_folder_is_refused(place):
    sign = place.folder / "sign"
    first = place.begin(hooks=(at(READ, 13, hang, sign),))
    wait_for(sign.exists, first)
    before = snapshot(place.out)
    for flag in ("--resume", "--overwrite"):
        line = refusal(main, flag, **place.flags)
        assert "another train.py" in line and "--out_dir" in line
    assert snapshot(place.out) == before and first.running()
