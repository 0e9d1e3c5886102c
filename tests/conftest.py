"""What several test files share: fixtures, and helpers to import (`from conftest import snapshot`).

The parts of train.py that its users do not see, but several tests do, are called from here.
"""

import contextlib
import csv
import io
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
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
# The files that take longest are begun first (with `-n 2` a file runs in one process, where its
# fixtures are made once): two processes end together if what is begun last is short.
FIRST = ["survival", "train", "ranks", "prepare_data", "model", "sample", "cli", "machines"]


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for products as small as here, several only wait for each other."""
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
    process in `folder`: status, stdout, stderr. No network; one thread, since several that wait
    for each other starve on a busy machine.
    """
    first, *rest = map(str, command)
    first = str(ROOT / first) if first.endswith(".py") else first  # an absolute path stays
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, first, *rest], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=timeout)
    return SimpleNamespace(status=done.returncode, stdout=done.stdout, stderr=done.stderr)


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
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def log_of(out: Path) -> list[dict[str, float]]:
    """The rows of the log in an out_dir, without what differs between two runs that do the same."""
    rows = rows_of(out / "log.csv")
    for row in rows:
        for name in TIMES:
            del row[name]
    return rows


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Everything in a checkpoint by its path, apart from the times."""
    if not isinstance(value, dict | list | tuple):
        return {} if name.endswith(TIMES) else {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found |= flat(item, f"{name}/{key}")
    return found


def check_same(ours: dict[str, Any], theirs: dict[str, Any], note: object = "") -> None:
    """What two checkpoints hold, as `flat` gives it, is equal bit for bit."""
    assert ours.keys() == theirs.keys(), note
    for name, value in theirs.items():
        equal = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert equal(ours[name], value), (note, name)


def check_equal(out: Path, other: Path) -> None:
    """Two out_dirs hold the same log and files, bit for bit, apart from times and configs."""
    assert log_of(out) == log_of(other)
    for file in ("model.pt", "ckpt.pt"):
        ours, theirs = (load_file(folder / file) for folder in (out, other))
        del ours["config"], theirs["config"]
        check_same(flat(ours), flat(theirs), file)


def edit_config(folder: Path, **values: object) -> None:
    """Copies config.py to `folder` with other values of fields of Config, or of DEFAULT_PRESET."""
    text = (ROOT / "config.py").read_text()
    for name, value in values.items():
        text, found = re.subn(rf"(?m)^(    {name}: .* = (?:setting\()?|{name} = )[^,\s]+",
                              lambda line, value=value: line[1] + repr(value), text)
        assert found == 1, name
    (folder / "config.py").write_text(text)


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


def prepare_tales(folder: Path, seed: int, count: int = 300) -> Path:
    """Prepares so many stories, and a twelfth of it for validation, in `folder`/data."""
    write_tales(folder / "train.txt", seed, count)
    write_tales(folder / "val.txt", seed + 1, count // 12)
    prepare(str(folder / "train.txt"), folder / "data", str(folder / "val.txt"), num_threads=1)
    return folder / "data"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small prepared dataset."""
    return prepare_tales(tmp_path_factory.mktemp("tales"), 0)


@pytest.fixture
def signals() -> Iterator[None]:
    """train.py catches signals for the life of its process: here they are given back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def touch_picture(path: Path, *args: Any, **options: Any) -> None:
    """In the place of train.py's draw_run, which takes longer than a run of these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Pictures are empty files here."""
    monkeypatch.setattr(train, "draw_run", touch_picture)


def tiny(data: Path, folder: Path, **changes) -> Config:
    folders = dict(data_dir=str(data), out_dir=str(folder / "out"), plot_dir=str(folder / "plots"))
    return Config(**(TINY | folders | changes))


def new_run(config: Config, checkpoint: dict | None = None, **options: Any) -> train.Run:
    """A run that has not begun, or one from a `checkpoint` or a `source`; its folder is made."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    run = train.open_run(config, {}, **options)
    if checkpoint:
        train.restore(run, checkpoint)
    return run


def new_config(overrides: dict, mode: str = "") -> tuple[Config, Any]:
    """What train.py would train, and the model it would start from."""
    return train.new_config(train.RunFolder(train.folder_of(overrides), mode), overrides)


def save(run: train.Run, label: int = 0) -> dict[str, float] | None:
    """Saves a checkpoint; before it, if it has a label, an evaluation, whose row is returned."""
    row = train.evaluate(run, label, 1.0) if label else None
    train.save_checkpoint(run, row)
    return row


def main(*argv: str, **flags) -> tuple[str, str]:
    """train.py's main with flags; what it wrote to stdout and to stderr."""
    command = [*argv, *(f"--{name}={value}" for name, value in flags.items())]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        train.main(command)
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> SimpleNamespace:
    """A run of 18 iterations that came to its end. Read it only: this process holds its folder."""
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "out" / "first"
    flags = TINY | dict(data_dir=data, out_dir=out, plot_dir=folder / "plots")
    stdout, stderr = main(**flags)
    return SimpleNamespace(folder=folder, out=out, flags=flags, stdout=stdout, stderr=stderr)


def copy_of(finished: SimpleNamespace, folder: Path) -> Path:
    """Its out_dir in another folder, to work on."""
    return shutil.copytree(finished.out, folder / "copy")
