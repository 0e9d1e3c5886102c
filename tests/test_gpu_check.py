"""tests/gpu_check.py: its table, and on a CPU with small models the rows that need no GPU."""

import dataclasses
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from config import UserError

import pytest
import torch
from conftest import prepare_tales, refusal

import model as gpt
import train
from tests import gpu_check

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
FORK = multiprocessing.get_context("fork")

SMALL = dict(n_layer=1, n_head=2, n_embd=16, block_size=24, batch_size=2, eval_windows=8,
             compile="false")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> gpu_check.Place:
    folder = tmp_path_factory.mktemp("gpu_check")
    return gpu_check.Place("cpu", folder, prepare_tales(folder, 0), SMALL)


# ------------------------------------------------------------------------------- The table


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(gpu_check.main, ["--only", "3", "--out", str(tmp_path / "rows.json")])
    assert "no CUDA GPU" in line
    assert not list(tmp_path.iterdir())


def fine(place: gpu_check.Place) -> gpu_check.Answer:
    print("a story")
    return "one\nthat needs a word", "two\nfirst detail\nsecond detail"


def broken(place: gpu_check.Place) -> gpu_check.Answer:
    raise ValueError("this row\nis broken")


def test_a_row_that_fails_says_so_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "ROWS", [("first", broken), ("second", fine)])
    # In this process, since another would not know these rows.
    monkeypatch.setattr(gpu_check, "ProcessPoolExecutor", lambda **options: ThreadPoolExecutor())
    monkeypatch.setattr(gpu_check, "prepare", lambda *arguments: None)
    gpu_check.main(["--out", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    table = re.sub(" +", " ", out)
    assert "| 0 first | no failure | FAILED: ValueError: this row is broken | 0 |" in table
    assert "| 1 second | one | two | 0 |" in table
    assert "Row 1, measured:\nfirst detail\nsecond detail" in out
    assert "Row 1, expected:\nthat needs a word" in out and "a story" not in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["first", "second"]
    assert rows[1]["measured"] == "two\nfirst detail\nsecond detail"
    gpu_check.main(["--only", "1", "--out", str(tmp_path / "one.json")])
    assert "first |" not in capsys.readouterr().out
    assert [row["row"] for row in json.loads((tmp_path / "one.json").read_text())] == [1]


class Dies:
    """Ends the process that unpickles it, as a crash of the driver would."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_a_row_whose_process_dies_says_so(place, monkeypatch):
    """Forked: a new process would import everything again."""
    contexts = SimpleNamespace(get_context=lambda name: FORK)
    monkeypatch.setattr(gpu_check, "multiprocessing", contexts)
    for value, words in ((Dies(), "its process died"), (-1, "UserError: preset full: n_layer -1")):
        row = gpu_check.in_own_process(9, dataclasses.replace(place, changes={"n_layer": value}))
        assert row["measured"].startswith(f"FAILED: {words}")


# ------------------------------------------------------------------------------- The rows


def test_steps_are_watched_for_synchronization_and_then_no_more(place, monkeypatch):
    calls = []
    run = SimpleNamespace(step=lambda: calls.append("step"), compiled_shape=None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    monkeypatch.setattr(gpu_check.Place, "warm_run", lambda *place, **settings: run)
    assert gpu_check.synchronization(place)[1].endswith("(not compiled)")
    assert calls == ["error", *["step"] * 20, "default"]
    run.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gpu_check.synchronization(place)
    assert calls[-2:] == ["error", "default"]


def test_kernels_are_counted_by_step_and_the_longest_come_first():
    def event(name: str, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    events = [event("add", 100)] * 6 + [event("gemm", 900)] * 2 + [
        event(f"other {n}", 1) for n in range(10)]
    lines = gpu_check.kernel_report(events, 2, 2e-3).splitlines()
    assert lines[0] == "9 launches a step, GPU busy 60% of 2.0 ms"  # 2,410 us in two steps
    assert lines[1:3] == ["0.900 ms a step, 1.0 times: gemm", "0.300 ms a step, 3.0 times: add"]
    assert len(lines) == 11
    with pytest.raises(RuntimeError, match="no kernel"):
        gpu_check.kernel_report([], 2, 1.0)


@pytest.mark.parametrize("name, expected", [
    ("Tesla T4", "MFU 9.2% of 65 TFLOP/s"), ("NVIDIA GeForce RTX 4090", "MFU 3.6% of 165 TFLOP/s"),
    ("NVIDIA H100 80GB HBM3", "MFU 0.6% of 989 TFLOP/s"), ("Fast T400", "no MFU: peak unknown")])
def test_mfu_is_of_the_published_peak_of_a_known_card(monkeypatch, name, expected):
    model = SimpleNamespace(parameter_count=lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    run = SimpleNamespace(model=model, dtype=torch.bfloat16)
    assert gpu_check.mfu(run, 1000.0) == expected


def test_speeds_are_shown_for_each_preset(place, monkeypatch):
    for name, value in dict(synchronize=None, reset_peak_memory_stats=None, get_device_name="CPU",
                            max_memory_allocated=2.5e9).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    line = gpu_check.speed(place, preset="tuned", tokens=48)
    assert re.fullmatch(r"tuned: [\d,]+ tokens/s, 2\.5 GB, no MFU.* \(not compiled\)", line)


def test_the_toy_run_reports_the_last_evaluation(place, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOY_ITERATIONS", 6)
    measured = gpu_check.toy_loss(place)[1]
    record = json.loads((place.folder / "toy_auto" / "run.json").read_text())
    loss = record["best"]["val_loss"]  # there is one evaluation only
    assert measured == f"validation loss {loss:.4f} after 288 tokens, 0 steps skipped"


def forked(status: int, *command: str) -> None:
    """`run_process` in a fork."""

    def work() -> None:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {})
        else:
            train.main(list(command[1:]))

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == status


@pytest.mark.parametrize("run_process", [
    forked, pytest.param(gpu_check.run_process, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_resumed_is_compared(place, monkeypatch, tmp_path, run_process):
    place = dataclasses.replace(place, folder=tmp_path)
    monkeypatch.setattr(gpu_check, "run_process", run_process)
    assert gpu_check.resuming(place, 4)[1] == "bit-equal: weights, and 2 evaluations"
    ours, theirs = (gpt.load_file(place.folder / name / "ckpt.pt") for name in ("whole", "killed"))
    theirs["model"]["transformer.ln_f.bias"][3] += 0.25
    assert gpu_check.comparison(ours, theirs).startswith("weights up to 2.5e-01 apart")


def test_repetitive_text_overflows_float16_where_the_head_does_not_mind(place, monkeypatch):
    """With a gradient held much larger, a few like tokens are as many as thousands."""
    monkeypatch.setattr(gpt, "pick_dtype", lambda name, device: getattr(torch, name))
    place = dataclasses.replace(place, changes=SMALL | dict(block_size=12))
    words = gpu_check.repetitive_text(place, steps=12)[1].split("; ")
    losses = [float(re.search(r"loss ([\d.]+)", part)[1]) for part in words]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] < 10.5
    assert int(re.search(r", (\d+) of 12 steps skipped", words[0])[1]) < 4
    monkeypatch.setattr(gpt, "FLOAT16_SCALE", 2.0**14)
    with pytest.raises(UserError, match="not finite in 10 steps"):
        gpu_check.repetitive_run(place, "float16", 12)


def test_sampling_twice_tells_the_same_and_a_difference_is_seen(place, monkeypatch):
    assert gpu_check.sampling(place)[1] == "1 at once: the same, 4 at once: the same"
    texts = iter("aabc")
    monkeypatch.setattr(gpu_check.sample, "main", lambda flags: print(next(texts)))
    assert gpu_check.sampling(place)[1] == "1 at once: the same, 4 at once: different"
