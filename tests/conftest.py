"""What several test files share: fixtures, and plain helpers (`from conftest import snapshot`)."""

import contextlib
import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import config
from config import Config, UserError

import pytest
import torch

import train
from model import load_file
from prepare_data import prepare

ROOT = Path(config.__file__).parent
TIMES = ("seconds", "tokens_per_second")  # what differs between two runs that do the same


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: the products here are tiny, and on a busy machine threads that wait
    for each other take longer than one that works. `pytestmark = pytest.mark.usefixtures(...)`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refusal(call: Callable[..., Any], *args: Any, **flags: Any) -> str:
    """The one line of the UserError that `call` raises."""
    with pytest.raises(UserError) as mistake:
        call(*args, **flags)
    line = str(mistake.value)
    assert line and "\n" not in line
    return line


def run_script(
    folder: Path, *command: object, timeout: float = 120, **env: str
) -> SimpleNamespace:
    """A script of ours (`"train.py", "--resume"`), or Python's own arguments (`"-c", code`), in a
    process in `folder`: status, stdout, stderr, seconds. No network; one thread, since several
    that wait for each other starve on a busy machine.
    """
    first, *rest = map(str, command)
    first = str(ROOT / first) if first.endswith(".py") else first  # an absolute path stays
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    start = time.monotonic()
    done = subprocess.run([sys.executable, first, *rest], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=timeout)
    return SimpleNamespace(status=done.returncode, stdout=done.stdout, stderr=done.stderr,
                           seconds=time.monotonic() - start)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder by its path in it: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def files_in(folder: Path) -> list[str]:
    """The paths of all files in a folder and its folders, sorted."""
    return [name for name, content in snapshot(folder).items() if content is not None]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_of(log: Path) -> list[dict[str, float]]:
    """The rows of a log.csv."""
    with open(log, newline="") as file:
        return [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
        ]


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """A log's rows without what no two runs have in common."""
    return [
        {name: value for name, value in row.items() if name not in TIMES} for row in rows
    ]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Everything in a checkpoint by its path, but the times."""
    if not isinstance(value, dict | list | tuple):
        return {} if name.endswith(TIMES) else {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found |= flat(item, f"{name}/{key}")
    return found


def check_equal(out: Path, other: Path) -> None:
    """Two out_dirs hold the same log and the same files, bit for bit, apart from times, and from
    the folders and lengths in their configs.
    """
    ours, theirs = (without_times(rows_of(folder / "log.csv")) for folder in (out, other))
    assert ours == theirs
    for file in ("model.pt", "ckpt.pt"):
        ours, theirs = (load_file(folder / file) for folder in (out, other))
        del ours["config"], theirs["config"]
        ours, theirs = flat(ours), flat(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[name], value), (file, name)
            else:
                assert ours[name] == value, (file, name)


# ---------------------------------------- Small runs of train.py in this process

TINY = dict(
    n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=4,
    dropout=0.1, max_iters=18, lr_decay_iters=18, warmup_iters=4, learning_rate=3e-3, min_lr=1e-4,
    eval_interval=6, eval_windows=8, device="cpu", dtype="float32", compile="false",
)


def tale(rng: random.Random) -> str:
    who = rng.choice(["Lily", "Tom", "Zoë", "the cat"])
    what = rng.choice(["ball", "red kite", "small boat", "drum"])
    how = rng.choice(["new", "old", "big"])
    return f"One day, {who} found a {what}. It was {how}. {who} was happy to play with the {what}."


def write_tales(path: Path, seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    tales = [tale(rng) for _ in range(count)]
    path.write_text("<|endoftext|>".join(tales), encoding="utf-8")
    return tales


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small prepared dataset."""
    folder = tmp_path_factory.mktemp("tales")
    write_tales(folder / "train.txt", 0, 300)
    write_tales(folder / "val.txt", 1, 25)
    prepare(str(folder / "train.txt"), folder / "data", str(folder / "val.txt"), num_threads=1)
    return folder / "data"


@pytest.fixture
def signals() -> Iterator[None]:
    """train.py catches signals for the life of its process: here they are given back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tiny(data: Path, folder: Path, **changes) -> Config:
    folders = dict(data_dir=str(data), out_dir=str(folder / "out"), plot_dir=str(folder / "plots"))
    return Config(**(TINY | folders | changes))


def new_run(config: Config) -> train.Run:
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    return train.start(config, {}, None)


def main(*argv: str, **flags) -> tuple[str, str]:
    """train.py's main with flags; what it wrote to stdout and to stderr."""
    command = [*argv, *(f"--{name}={value}" for name, value in flags.items())]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        train.main(command)
    return out.getvalue(), err.getvalue()
