"""Tests of odd surroundings: nothing that is not training ends a run.

Pictures that cannot be drawn, terminals that go away, compilers that do not work, files that have
gone, variables that a platform left behind, devices that are not there, file systems, Windows.
"""

import builtins
import contextlib
import errno
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config
from config import Lossy, UserError, atomic_write, cli, lock_folder

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    check_equal,
    copy_of,
    files_in,
    main,
    new_run,
    refusal,
    run_script,
    save,
    snapshot,
    tiny,
)

import model as gpt
import prepare_data
import sample
import train
from plots.loss_curve import draw_run

pytestmark = pytest.mark.usefixtures("one_thread", "signals", "no_pictures")
SHORT = TINY | dict(max_iters=8, lr_decay_iters=8, eval_interval=4)


def run_short(data: Path, folder: Path, *argv: str, **flags) -> str:
    """A run of two steps in `folder`; what it said on stderr."""
    places = dict(data_dir=data, out_dir=folder / "out", plot_dir=folder / "plots")
    return main(*argv, **SHORT | places | flags)[1]


def raises(problem: Exception) -> Callable[..., None]:
    """A function that raises it."""

    def fail(*args: Any, **options: Any) -> None:
        raise problem

    return fail


# ----------------------------------------------------------------------------------------- Pictures


@pytest.mark.parametrize("problem", [
    ImportError("no matplotlib\nand more lines"), OSError(28), "a file", "read-only"], ids=str)
def test_a_picture_that_cannot_be_drawn_is_one_notice(data, tmp_path, monkeypatch, problem):
    plots = Path("/proc/plots") if problem == "read-only" else tmp_path / "plots"
    if problem == "a file":
        plots.touch()
    fails = isinstance(problem, Exception)
    monkeypatch.setattr(train, "draw_run", raises(problem) if fails else draw_run)
    said = run_short(data, tmp_path, plot_dir=plots)
    assert said.count("no picture") == 1 and "validation loss" in said
    assert "out.png" not in said  # what is said must be true: no plot has been written
    assert said.index("no picture") < said.index("iteration 4:")  # at the start
    assert (tmp_path / "out" / "model.pt").exists()


def test_a_picture_whose_name_is_too_long_is_one_notice(data, tmp_path):
    (tmp_path / "plots").mkdir()
    said = run_short(data, tmp_path, out_dir=tmp_path / "out" / ("a" * 200) / ("b" * 200))
    assert said.count("no picture") == 1 and "File name too long" in said


@pytest.mark.parametrize("folder", ["plots", "out"])
def test_a_folder_that_vanishes_is_made_again(data, tmp_path, monkeypatch, folder):
    real = train.evaluate

    def evaluate(*args: Any) -> dict:
        shutil.rmtree(tmp_path / folder)
        return real(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "draw_run", draw_run)
    assert "no picture" not in run_short(data, tmp_path, max_iters=4)
    assert {"out/model.pt", "out/ckpt.pt", "plots/out.png"} <= set(files_in(tmp_path))


@pytest.mark.parametrize("backend", ["nosuch", "module://matplotlib_inline.backend_inline"])
def test_the_backend_of_a_notebook_does_not_matter(tmp_path, backend):
    code = """
from pathlib import Path
from plots.loss_curve import draw_run
log = [dict(iteration=i, train_loss=9.0, val_loss=9.1, learning_rate=1e-4) for i in (1, 2)]
draw_run(Path("a.png"), "out/$x_{y$ and %s", log)
"""
    done = run_script(tmp_path, "-c", code, MPLBACKEND=backend, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.stderr
    assert files_in(tmp_path) == ["a.png"]


# ------------------------------------------------------------------------------------------ Streams


class Gone(io.StringIO):
    """A terminal that went away."""

    write = flush = raises(OSError(errno.EIO, "Input/output error"))


def test_a_terminal_that_goes_away_does_not_end_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Lossy(Gone()))
    places = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    train.main([f"--{name}={value}" for name, value in (SHORT | places).items()])
    assert {"model.pt", "ckpt.pt", "log.csv"} <= set(files_in(tmp_path / "out"))


@pytest.mark.parametrize("stream", [Gone(), None, types.SimpleNamespace(write=print)])
def test_cli_takes_any_stderr(monkeypatch, stream):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as end:
        cli(raises(UserError("a line")))
    assert end.value.code == 2


def test_streams_that_are_no_text_files_are_read_and_written_to(monkeypatch):
    """As those of a notebook's %run: they have neither reconfigure nor buffer."""
    written = []
    stream = types.SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", ["x"])
    cli(lambda argv: print("a story"))
    assert "".join(written) == "a story\n"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "One day\n"))
    assert sample.read_prompt("-") == "One day"
    monkeypatch.setattr(sys, "stdin", None)
    assert sample.read_prompt("-") == ""


def test_a_printed_command_is_quoted_for_the_shell(data, tmp_path):
    out = tmp_path / "my run's"
    run_short(data, tmp_path, out_dir=out)
    said = main("--resume", out_dir=out)[1]
    [command] = [line for line in said.splitlines() if line.startswith("    ")]
    words = subprocess.run(f"printf '%s\\n' {command}", shell=True, capture_output=True, text=True)
    assert words.stdout.splitlines()[-1] == str(out)


# ---------------------------------------------------------------------------------------- Compiling


no_compiler = raises(RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n" * 80))


@pytest.mark.parametrize("problem", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("compile", ["auto", "true"])
def test_out_of_memory_is_not_blamed_on_the_compiler(data, tmp_path, monkeypatch, compile, problem):
    monkeypatch.setattr(gpt.GPT, "compile_parts", raises(problem))
    with pytest.raises(type(problem)):  # `cli` makes a line of it
        run_short(data, tmp_path, compile=compile)
    assert not (tmp_path / "out").exists()


def test_compile_auto_falls_back_in_one_line(data, tmp_path, monkeypatch):
    run_short(data, tmp_path / "false")
    monkeypatch.setattr(gpt.GPT, "compile_parts", no_compiler)
    said = run_short(data, tmp_path / "auto", compile="auto")
    [line] = [line for line in said.splitlines() if "compiler" in line]
    assert line.startswith("not compiled, since") and len(line) < 300
    check_equal(tmp_path / "auto" / "out", tmp_path / "false" / "out")


def test_compile_true_is_refused_and_touches_nothing(finished, data, tmp_path, monkeypatch):
    out = copy_of(finished, tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(gpt.GPT, "compile_parts", no_compiler)
    flags = dict(out_dir=out, compile="true")
    assert "--compile false" in refusal(run_short, data, tmp_path, "--overwrite", **flags)
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no compiler", "no headers"])
def test_a_compiler_that_does_not_work_is_one_line(data, tmp_path, kind):
    env = dict(CXX="/nonexistent/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    if kind == "no headers":  # a g++ that cannot find Python.h, or anything
        script = tmp_path / "g++"
        script.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
        script.chmod(0o755)
        env["CXX"] = str(script)
    places = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    flags = [f"--{k}={v}" for k, v in (SHORT | places | dict(compile="auto")).items()]
    done = run_script(tmp_path, "train.py", *flags, **env)
    assert done.status == 0 and "Traceback" not in done.stderr, done.stderr
    # What runs is said before the trial. From there on: at most the compiler's own line, then ours.
    _, trial, said = done.stderr.partition("compiling, about 30 s\n")
    lines = said.splitlines()
    [number] = [i for i, line in enumerate(lines) if line.startswith("not compiled, since")]
    assert trial and number <= 1 and len(lines[number]) < 300 and len(lines) < 25


# ------------------------------------------------ Files of a run that are missing, or another run's


def test_an_out_dir_that_cannot_be_is_refused_before_anything_is_prepared(data, tmp_path):
    (tmp_path / "file").touch()
    flags = dict(out_dir=tmp_path / "file" / "out", data_dir=tmp_path / "new")
    assert "is a file" in refusal(run_short, data, tmp_path, dataset="toy", **flags)
    assert files_in(tmp_path) == ["file"]


@pytest.fixture(scope="module")
def fresh(data, tmp_path_factory) -> Path:
    """out_dir of a short run with another seed."""
    folder = tmp_path_factory.mktemp("fresh")
    run_short(data, folder, seed=5)
    return folder / "out"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_files_of_two_runs_do_not_mix(finished, data, fresh, tmp_path, monkeypatch, number):
    """Where the first write fails, the old run is whole; later it is not resumed as the old one."""
    out = copy_of(finished, tmp_path)
    before, save_file, numbers = snapshot(out), gpt.save_file, itertools.count(1)

    def fail(*args: Any, **parts: Any) -> None:
        if next(numbers) == number:
            raise OSError("no space left")
        save_file(*args, **parts)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(gpt, "save_file", fail)
        run_short(data, tmp_path, "--overwrite", out_dir=out, seed=5)
    if number == 1:
        assert snapshot(out) == before
        return
    assert "log.csv" not in files_in(out) or number == 3
    if (out / "ckpt.pt").exists():
        assert gpt.load_file(out / "ckpt.pt")["config"]["seed"] == 5
    again = shutil.copytree(out, tmp_path / "again")  # the folder is held by this process
    mode = "--resume" if number == 3 else "--overwrite"  # the second write was to be model.pt
    run_short(data, tmp_path, mode, out_dir=again, seed=5)
    check_equal(again, fresh)
    assert files_in(again) == ["ckpt.pt", "log.csv", "model.pt", "run.json"]


def test_a_model_without_its_checkpoint_is_not_replaced(finished, data, tmp_path):
    out = copy_of(finished, tmp_path)
    (out / "ckpt.pt").unlink()
    before = snapshot(out)
    line = refusal(run_short, data, tmp_path, "--resume", out_dir=out)
    assert "model.pt" in line and "--overwrite" in line
    assert snapshot(out) == before


def test_a_checkpoint_that_came_alone_is_gone_on_with_to_the_end(finished, data, tmp_path):
    """Copied without its model.pt, and nothing after it is better."""
    content = gpt.load_file(finished.out / "ckpt.pt")
    for row in content["state"]["log"]:
        row["val_loss"] = 0.0
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(content, alone / "ckpt.pt")
    said = main("--resume", out_dir=alone, plot_dir=tmp_path, max_iters=20)[1]
    assert f"wrote {alone / 'model.pt'} (the best weights, iteration 20)" in said


@pytest.mark.parametrize("there", ["its own", "none", "damaged", "another run's"])
def test_the_best_since_a_resume_is_kept(finished, tmp_path, monkeypatch, there):
    out = copy_of(finished, tmp_path)
    model = out / "model.pt"
    if there == "none":
        model.unlink()
    elif there == "damaged":
        model.write_bytes(model.read_bytes()[:1000])
    elif there == "another run's":
        content = gpt.load_file(model)
        content["config"]["seed"] = 5
        torch.save(content | dict(val_loss=1.0, iteration=99), model)
    evaluate, losses = train.evaluate, {20: 60.0, 24: 40.0, 28: 50.0}  # all above those before

    def worse(run: train.Run, iteration: int, *args: Any) -> dict:
        return evaluate(run, iteration, *args) | dict(val_loss=losses[iteration])

    monkeypatch.setattr(train, "evaluate", worse)
    main("--resume", out_dir=out, plot_dir=tmp_path, max_iters=28, eval_interval=4)
    assert gpt.load_file(model)["iteration"] == (18 if there == "its own" else 24)


def test_resume_without_its_data_makes_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = copy_of(finished, tmp_path)
    content = gpt.load_file(out / "ckpt.pt")
    content["config"]["data_dir"] = "data/gone"
    torch.save(content, out / "ckpt.pt")
    before = snapshot(tmp_path)
    line = refusal(main, "--resume", out_dir=out, max_iters=20)
    assert "not in data/gone" in line and "--data_dir" in line
    assert snapshot(tmp_path) == before


def test_a_log_that_cannot_be_replaced_is_a_notice(data, tmp_path, capsys):
    run = new_run(tiny(data, tmp_path))
    (run.folder.path / "log.csv").mkdir()  # as a spreadsheet on Windows holds it
    capsys.readouterr()
    save(run, 1)
    said = capsys.readouterr().err
    assert "is not written" in said and said.count("\n") == 1
    assert len(gpt.load_file(run.folder.path / "ckpt.pt")["state"]["log"]) == 1


def test_a_misspelt_data_dir_is_asked_about_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "prepare", raises(UserError("no Hub here")))
    for name in ("my_stories", "TinyStories"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "meta.json").touch()
    refusal(train.main, ["--preset", "tuned", "--data_dir", "data/my_story"])
    assert "data/my_story, did you mean data/my_stories?" in capsys.readouterr().err
    refusal(train.main, ["--preset", "demo"])
    said = capsys.readouterr().err
    assert "no prepared data in data/toy" in said and "did you mean" not in said


# ---------------------------------------------------------------------------------- The environment


@pytest.mark.parametrize("left", [
    dict(WORLD_SIZE="1"), dict(RANK=""), dict(RANK="0"), dict(WORLD_SIZE="4", RANK="2"),
    dict(WORLD_SIZE="x"), dict(LOCAL_RANK="0", MASTER_ADDR="localhost")], ids=str)
def test_what_a_platform_left_in_the_environment_is_not_torchrun(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    ranks = train.Ranks(torch.device("cpu"))
    assert (ranks.rank, ranks.size) == (0, 1)


@pytest.mark.parametrize("changes", [dict(RANK="5"), dict(RANK="-1"), dict(RANK="first"),
                                     dict(MASTER_PORT="abc")], ids=str)
def test_ranks_that_cannot_meet_are_one_line(monkeypatch, changes):
    left = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    for name, value in (left | changes).items():
        monkeypatch.setenv(name, value)
    assert "unset RANK" in refusal(train.Ranks, torch.device("cpu"))


def test_without_git_a_run_has_no_commit_and_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run_short(data, tmp_path)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["versions"]["commit"] is None


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_importing_config_sets_what_torch_reads_when_it_is_imported(monkeypatch, given):
    monkeypatch.delenv("GOMP_SPINCOUNT")  # which importing config here has set
    code = "import os, sys, config; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    done = run_script(ROOT, "-c", code, **given)
    assert done.stdout.split() == ["False", given.get("GOMP_SPINCOUNT", "1000")], done.stderr


# ------------------------------------------------------------------------------------------ Devices


def test_auto_is_a_device_and_a_precision_that_are_there():
    device, cpu = gpt.pick_device("auto"), torch.device("cpu")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert gpt.pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert gpt.pick_dtype("float32", device) == torch.float32
    assert gpt.pick_dtype("bfloat16", cpu) == torch.bfloat16
    line = refusal(gpt.pick_dtype, "float16", cpu)
    assert "float16" in line and "--dtype float32" in line


def test_mps_takes_float32_and_is_not_picked_by_auto(monkeypatch):
    mps = torch.device("mps")
    assert gpt.pick_dtype("auto", mps) == gpt.pick_dtype("float32", mps) == torch.float32
    assert "float32" in refusal(gpt.pick_dtype, "bfloat16", mps)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device cpu" in refusal(gpt.pick_device, "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert gpt.pick_device("mps") == mps and gpt.pick_device("auto").type != "mps"


def test_training_on_mps_wants_a_pytorch_whose_adamw_can_skip_a_step(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settings = config.Config(device="mps")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    assert "needs PyTorch 2.13" in refusal(train.prepare_device, settings)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cpu"))
    assert train.prepare_device(settings).type == "mps"


# ------------------------------------------------------------------------- File systems and Windows


def test_a_file_system_without_modes_is_written_to(monkeypatch, tmp_path):
    problem = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(Path, "chmod", raises(problem))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_file_system_without_locks_is_used_without(monkeypatch, tmp_path):
    problem = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", raises(problem))
    (tmp_path / ".ckpt.pt.0a1b2c3d.partial").touch()  # it may be another process's, at work
    assert lock_folder(tmp_path) is not None and lock_folder(tmp_path) is not None
    assert (tmp_path / ".ckpt.pt.0a1b2c3d.partial").exists()


@pytest.fixture
def windows(monkeypatch) -> set[str]:
    """No fcntl, no SIGHUP, no ctypes.CDLL(None); msvcrt in their place."""
    real, locked = builtins.__import__, set()
    importlib.import_module("torch._dynamo")  # which looks at the system when it is imported

    def without(name: str, *args: Any, **kwargs: Any) -> types.ModuleType:
        if name in ("fcntl", "resource", "pwd", "termios"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    def locking(handle: int, mode: int, size: int) -> None:
        place = os.readlink(f"/proc/self/fd/{handle}")
        if place in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.add(place)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(sys, "platform", "win32")
    return locked


def test_the_whole_path_runs_without_fcntl(windows, tmp_path):
    (tmp_path / "tales.txt").write_text("<|endoftext|>".join(f"A tale of {n}." for n in range(300)))
    text = str(tmp_path / "tales.txt")
    prepare_data.prepare(text, tmp_path / "data", text, num_threads=1)
    assert "validation loss" in run_short(tmp_path / "data", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main(["--checkpoint", str(tmp_path / "out" / "model.pt"), "--max_new_tokens", "3"])
    assert out.getvalue().startswith("Once upon a time")
    assert len(windows) == 2  # the data's folder and the run's
    assert lock_folder(tmp_path) is not None
    assert lock_folder(tmp_path) is None  # a folder is held, too
