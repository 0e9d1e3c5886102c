"""Odd surroundings: nothing that is not training ends a run, and `auto` means what works here.

Pictures that cannot be drawn, terminals that go away, compilers that do not work, variables left
behind by a platform, file systems without modes or locks, Windows without fcntl.
"""

import builtins
import contextlib
import errno
import importlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import config
from config import Lossy, UserError, atomic_write, cli, lock_folder

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    check_equal,
    files_in,
    main,
    new_run,
    refusal,
    run_script,
    snapshot,
    tiny,
)

import model as gpt
import sample
import train

pytestmark = pytest.mark.usefixtures("one_thread", "signals")
SHORT = TINY | dict(max_iters=8, lr_decay_iters=8, eval_interval=4)


def run_short(data: Path, folder: Path, *argv: str, **flags) -> str:
    """A run of two steps in `folder`; what it said on stderr."""
    places = dict(data_dir=data, out_dir=folder / "out", plot_dir=folder / "plots")
    return main(*argv, **SHORT | places | flags)[1]


# ------------------------------------------------------------------------------- A. Pictures


def fails(*args, **kwargs):
    raise ImportError("no module named matplotlib\nand more lines")


@pytest.mark.parametrize("kind", ["import", "disk", "file", "read-only"])
def test_a_picture_that_cannot_be_drawn_is_one_notice_and_the_run_goes_on(
    data, tmp_path, monkeypatch, kind
):
    flags = {}
    if kind == "import":
        monkeypatch.setattr(train, "draw_run", fails)
    if kind == "disk":
        monkeypatch.setattr(train, "draw_run", lambda *a, **k: (_ for _ in ()).throw(OSError(28)))
    if kind == "file":
        (tmp_path / "file").touch()
        flags["plot_dir"] = tmp_path / "file"
    if kind == "read-only":
        flags["plot_dir"] = "/proc/plots"
    said = run_short(data, tmp_path, **flags)
    assert said.count("no picture") == 1 and "validation loss" in said
    assert said.index("no picture") < said.index("iteration 4:")  # at the start
    assert (tmp_path / "out" / "model.pt").exists()


def test_a_plot_folder_that_vanishes_is_made_again(data, tmp_path, monkeypatch):
    real = train.evaluate

    def evaluate(*args):
        for path in (tmp_path / "plots").glob("*"):
            path.unlink()
        (tmp_path / "plots").rmdir()
        return real(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert "no picture" not in run_short(data, tmp_path, max_iters=4)
    assert (tmp_path / "plots" / "out.png").exists()


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


# -------------------------------------------------------------------------------- A. Streams


class Gone(io.StringIO):
    """A terminal that went away."""

    def write(self, text: str = "") -> int:
        raise OSError(errno.EIO, "Input/output error")

    flush = write


def test_a_terminal_that_goes_away_does_not_end_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Lossy(Gone()))
    places = dict(data_dir=data, out_dir=tmp_path / "out", plot_dir=tmp_path)
    train.main([f"--{name}={value}" for name, value in (SHORT | places).items()])
    assert {"model.pt", "ckpt.pt", "log.csv"} <= set(files_in(tmp_path / "out"))


@pytest.mark.parametrize("stream", [Gone(), None, types.SimpleNamespace(write=print)])
def test_cli_takes_any_stream(monkeypatch, stream):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as end:
        cli(lambda argv: (_ for _ in ()).throw(UserError("a line")))
    assert end.value.code == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_never_the_number_of_a_file(tmp_path, closed):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import config
file = open("file", "w")
assert file.fileno() > 2
def main(argv):
    print("a story")
    config.notice("a notice")
    file.write("whole")
config.cli(main)
"""
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(f"{sys.executable} script.py {closed}", shell=True, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


def test_a_stdout_that_is_no_text_file_is_written_to(monkeypatch):
    """As that of a notebook's %run: it has neither reconfigure nor buffer."""
    written = []
    stream = types.SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", ["x"])
    cli(lambda argv: print("a story"))
    assert "".join(written) == "a story\n"


def test_a_stdin_that_is_no_text_file_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "One day\n"))
    assert sample.read_prompt("-") == "One day"
    monkeypatch.setattr(sys, "stdin", None)
    assert sample.read_prompt("-") == ""


# -------------------------------------------------------------------------------- B. Compiling


def no_compiler(self) -> None:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n" * 80)


def test_compile_auto_falls_back_in_one_line_and_computes_what_false_computes(
    data, tmp_path, monkeypatch
):
    run_short(data, tmp_path / "false")
    monkeypatch.setattr(gpt.GPT, "compile_parts", no_compiler)
    said = run_short(data, tmp_path / "auto", compile="auto")
    [line] = [line for line in said.splitlines() if "compiler" in line]
    assert line.startswith("not compiled, since") and len(line) < 300
    check_equal(tmp_path / "auto" / "out", tmp_path / "false" / "out")


def test_compile_true_is_refused_before_anything_old_is_touched(data, tmp_path, monkeypatch):
    run_short(data, tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(gpt.GPT, "compile_parts", no_compiler)
    with pytest.raises(UserError, match="--compile false") as mistake:
        run_short(data, tmp_path, "--overwrite", compile="true")
    assert "\n" not in str(mistake.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_switched_off_torch_compile_is_not_called_compiled(data, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    said = run_short(data, tmp_path / "auto", compile="auto")
    assert name in said and ", compiled" not in said
    with pytest.raises(UserError, match=name):
        run_short(data, tmp_path / "true", compile="true")


def test_a_cache_that_cannot_be_made_ends_no_run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/cache")
    said = run_short(data, tmp_path)
    assert "TORCHINDUCTOR_CACHE_DIR cannot be made" in said
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # every optimizer would end in it


@pytest.mark.slow
def test_without_its_cache_a_run_is_compiled_through_the_usual_one(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/cache")
    assert ", compiled" in run_short(data, tmp_path, compile="true")


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
    assert "not compiled, since torch.compile does not work here" in done.stderr
    assert len(done.stderr.splitlines()) < 25


def test_overwrite_removes_nothing_until_there_is_something_to_put_there(
    data, tmp_path, monkeypatch
):
    run_short(data, tmp_path)
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")  # "out" is still held
    before = snapshot(again)
    flags = dict(out_dir=again, learning_rate=1e30, min_lr=1e30)
    assert "not finite" in refusal(run_short, data, tmp_path, "--overwrite", **flags)
    for name in ("model.pt", "ckpt.pt", "log.csv"):
        assert (again / name).read_bytes() == before[name]


def test_a_presets_own_init_from_is_where_its_run_starts(data, tmp_path, monkeypatch):
    run_short(data, tmp_path)
    monkeypatch.setitem(config.PRESETS, "mine", dict(init_from=str(tmp_path / "out" / "model.pt")))
    overrides = dict(preset="mine", out_dir=str(tmp_path / "mine"))
    planned, _, source = train.plan(overrides, "")
    assert source is not None and planned.n_embd == source.config.n_embd == 32


def test_max_iters_of_a_preset_or_typed_wins_over_an_edited_max_epochs():
    field = config.Config.__dataclass_fields__["max_epochs"]
    before, field.default = field.default, 2.0
    try:
        assert config.Config.from_preset("tuned").max_epochs is None
        assert config.Config.from_preset("reference", max_iters=5).max_epochs is None
    finally:
        field.default = before


def test_epochs_are_checked_against_the_schedule_once_the_data_is_open(data, tmp_path):
    settings = tiny(data, tmp_path, max_epochs=0.05, lr_decay_iters=2, warmup_iters=500)
    assert "lr_decay_iters 2" in refusal(train.start, settings, {})


def test_a_model_of_another_vocabulary_is_not_scored_on_a_text(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = config.Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=1000)
    gpt.save_file(tmp_path / "small.pt", small, gpt.GPT(small))
    (tmp_path / "held.txt").write_text("A tale.")
    line = refusal(main, "--eval_only", init_from=tmp_path / "small.pt", dataset="held.txt")
    assert "vocab_size 1000" in line


def test_a_model_trained_with_tensorboard_is_scored_without(data, tmp_path, monkeypatch):
    run_short(data, tmp_path)
    content = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    content["config"] |= dict(tensorboard=True, max_epochs=1.0)
    torch.save(content, tmp_path / "out" / "model.pt")
    monkeypatch.setattr(train, "import_tensorboard", lambda: pytest.fail("not needed"))
    assert "validation loss" in main("--eval_only", out_dir=tmp_path / "out", device="cpu")[0]


def test_an_out_dir_that_cannot_be_is_refused_before_anything_is_prepared(data, tmp_path):
    (tmp_path / "file").touch()
    flags = dict(out_dir=tmp_path / "file" / "out", data_dir=tmp_path / "new")
    assert "is a file" in refusal(run_short, data, tmp_path, dataset="toy", **flags)
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", ["model.pt", ".ckpt.pt.partial"])
def test_the_first_files_of_a_run_that_overwrites_and_those_of_the_old_run_do_not_mix(
    data, tmp_path, monkeypatch, fails
):
    """Where its checkpoint does not fit on the disk, the old run stays; killed between its first
    model.pt and ckpt.pt, the new one must not be resumed as the old run.
    """
    run_short(data, tmp_path)
    before = snapshot(tmp_path / "out")
    run, save_file = new_run(tiny(data, tmp_path)), gpt.save_file
    run.replaces = True

    def fail(path: Path, *args, **kwargs) -> None:
        if path.name == fails:
            raise OSError("no space left")
        save_file(path, *args, **kwargs)

    monkeypatch.setattr(gpt, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        train.save_checkpoint(run, train.evaluate(run, 4, 1.0))
    if fails == "model.pt":
        assert not {"ckpt.pt", "log.csv"} & snapshot(tmp_path / "out").keys()
    else:
        assert snapshot(tmp_path / "out") == before
    monkeypatch.undo()
    run.state.log.clear()
    train.save_checkpoint(run, train.evaluate(run, 4, 1.0))
    assert files_in(tmp_path / "out") == ["ckpt.pt", "log.csv", "model.pt", "run.json"]
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 2


# --------------------------------------------------------------------- E. Paths and environment


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides, _ = train.parse_command_line(["--out_dir=~/runs", "--dataset=~/f.txt"])
    assert overrides == {"out_dir": f"{tmp_path}/runs", "dataset": f"{tmp_path}/f.txt"}
    assert config.Config(plot_dir="~/plots").plot_dir == f"{tmp_path}/plots"
    assert sample.parse_command_line(["--checkpoint=~/m.pt"]).checkpoint == f"{tmp_path}/m.pt"


@pytest.mark.parametrize(
    "left", [dict(WORLD_SIZE="1"), dict(RANK=""), dict(RANK="0"), dict(WORLD_SIZE="4", RANK="2"),
             dict(WORLD_SIZE="x"), dict(LOCAL_RANK="0", MASTER_ADDR="localhost")], ids=str,
)
def test_what_a_platform_left_in_the_environment_is_not_torchrun(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    ranks = train.Ranks(torch.device("cpu"))
    assert (ranks.rank, ranks.size) == (0, 1)


def test_ranks_that_are_no_numbers_are_named(monkeypatch):
    places = dict(MASTER_ADDR="localhost", MASTER_PORT="1", WORLD_SIZE="2", LOCAL_RANK="0")
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "first")
    assert "RANK" in refusal(train.Ranks, torch.device("cpu"))


def test_a_file_system_without_modes_is_written_to(monkeypatch, tmp_path):
    def chmod(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", chmod)
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_resume_without_its_data_names_the_folder_and_makes_nothing(data, tmp_path, monkeypatch):
    run_short(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    content["config"]["data_dir"] = "data/gone"
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    before = snapshot(tmp_path)
    assert "data/gone" in refusal(main, "--resume", out_dir=tmp_path / "out", max_iters=12)
    assert snapshot(tmp_path) == before


OUT_OF_MEMORY = [MemoryError(), RuntimeError("[enforce fail] can't allocate memory"),
                 RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_memory_that_runs_out_is_one_line_that_says_what_to_halve(monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "argv", ["x"])

    def work(argv):
        raise kind

    with pytest.raises(SystemExit) as end:
        cli(work)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "--device_batch_size" in line and "--num_samples" in line


def test_another_runtime_error_is_not_called_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])

    def work(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli(work)


@pytest.mark.parametrize("changes", [dict(RANK="5"), dict(RANK="-1"), dict(MASTER_PORT="abc")],
                         ids=str)
def test_ranks_that_cannot_meet_are_one_line(monkeypatch, changes):
    left = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    for name, value in (left | changes).items():
        monkeypatch.setenv(name, value)
    assert "unset RANK" in refusal(train.Ranks, torch.device("cpu"))


def test_without_git_a_run_has_no_commit_and_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run_short(data, tmp_path)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["versions"]["commit"] is None


def test_an_out_dir_that_vanishes_is_made_again(data, tmp_path, monkeypatch):
    real = train.evaluate

    def evaluate(*args):
        shutil.rmtree(tmp_path / "out")
        return real(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    run_short(data, tmp_path)
    assert {"model.pt", "ckpt.pt"} <= set(files_in(tmp_path / "out"))


def test_a_tensorboard_that_does_not_import_is_one_line(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))
    assert "pip install -U tensorboard" in refusal(train.import_tensorboard)


# ----------------------------------------------------------------------------------- F. Words


@pytest.mark.parametrize(
    "typed, meant",
    [("--lr", "--learning_rate"), ("--epochs", "--max_epochs"), ("--steps", "--max_iters"),
     ("--batch", "--batch_size"), ("--ctx", "--block_size"), ("--wandb", "--tensorboard"),
     ("--num-epochs", "--max_epochs"), ("--wd", "--weight_decay"), ("--output_dir", "--out_dir")],
)
def test_names_from_elsewhere_are_known(typed, meant):
    assert f"did you mean {meant}?" in refusal(train.parse_command_line, [typed, "1"])


def test_what_is_meant_is_understood():
    overrides, _ = train.parse_command_line(
        ["--compile", "False", "--max_iters", "1e4", "--eval_interval=2.0e3", "--bias", "TRUE"])
    assert overrides == dict(compile="false", max_iters=10_000, eval_interval=2000, bias=True)
    assert "whole number" in refusal(train.parse_command_line, ["--max_iters", "1.5e0"])


def test_a_prompt_that_begins_with_a_dash_is_told_how_to_be_typed():
    assert "--prompt=-Pip" in refusal(sample.parse_command_line, ["--prompt", "-Pip"])
    assert sample.parse_command_line(["--prompt=-Pip"]).prompt == "-Pip"


def test_a_printed_command_is_quoted_for_the_shell(data, tmp_path):
    out = tmp_path / "my run's"
    run_short(data, tmp_path, out_dir=out)
    said = main("--resume", out_dir=out)[1]
    command = said.strip().rpartition(": ")[2]
    words = subprocess.run(f"printf '%s\\n' {command}", shell=True, capture_output=True, text=True)
    assert words.stdout.splitlines()[-1] == str(out)


# ------------------------------------------------------------------------ G. Windows and Macs


@pytest.fixture
def windows(monkeypatch):
    """No fcntl, no SIGHUP, no ctypes.CDLL(None); msvcrt in their place."""
    real, locked = builtins.__import__, set()
    importlib.import_module("torch._dynamo")  # which looks at the system when it is imported

    def without(name, *args, **kwargs):
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
    monkeypatch.delattr(train.signal, "SIGHUP")
    monkeypatch.setattr(train.sys, "platform", "win32")
    return locked


def test_the_whole_path_runs_without_fcntl(windows, tmp_path):
    import prepare_data

    (tmp_path / "tales.txt").write_text("<|endoftext|>".join(f"A tale of {n}." for n in range(300)))
    text = str(tmp_path / "tales.txt")
    prepare_data.prepare(text, tmp_path / "data", text, num_threads=1)
    assert "validation loss" in run_short(tmp_path / "data", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main(["--checkpoint", str(tmp_path / "out" / "model.pt"), "--max_new_tokens", "3"])
    assert out.getvalue().startswith("Once upon a time")
    assert len(windows) == 2  # the data's folder and the run's


def test_a_folder_is_held_without_fcntl_too(windows, tmp_path):
    assert lock_folder(tmp_path) is not None
    assert lock_folder(tmp_path) is None


def test_a_file_system_without_locks_is_used_without(monkeypatch, tmp_path):
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".ckpt.pt.1.partial").touch()  # it may be another process's, at work
    assert lock_folder(tmp_path) is not None and lock_folder(tmp_path) is not None
    assert (tmp_path / ".ckpt.pt.1.partial").exists()


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
    config = train.Config(device="mps")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    assert "needs PyTorch 2.13" in refusal(train.prepare_device, config)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cpu"))
    assert train.prepare_device(config).type == "mps"


def test_config_is_imported_before_torch_and_sets_what_torch_reads_then():
    code = "import sys, config; assert 'torch' not in sys.modules; import os; " \
           "print(os.environ['GOMP_SPINCOUNT'])"
    for given in ({}, {"GOMP_SPINCOUNT": "7"}):
        env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env,
                              capture_output=True, text=True)
        assert done.stdout.strip() == given.get("GOMP_SPINCOUNT", "1000"), done.stderr
    for script in ("train.py", "sample.py", "model.py"):
        text = (ROOT / script).read_text()
        assert text.index("\nfrom config import") < text.index("\nimport torch")


# ------------------------------------------------- What a tester of odd things found besides


def test_a_log_that_cannot_be_replaced_is_a_notice_and_the_checkpoint_is_written(data, tmp_path):
    run = new_run(tiny(data, tmp_path))
    (run.out_dir / "log.csv").mkdir()  # as a spreadsheet on Windows holds it
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        train.save_checkpoint(run, train.evaluate(run, 1, 1.0))
    assert "is not written" in err.getvalue() and err.getvalue().count("\n") == 1
    state = gpt.load_file(run.out_dir / "ckpt.pt")["state"]
    assert len(state["log"]) == 1


def test_the_log_of_an_old_run_is_not_replaced_unasked(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.csv").write_text("kept, when the large files went\n")
    assert "log.csv is there already: add --overwrite" in refusal(run_short, data, tmp_path)
    run_short(data, tmp_path, "--overwrite")
    assert (out / "log.csv").read_text().startswith("iteration,")


def test_a_clock_that_stands_still_ends_no_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "monotonic", lambda: 7.0)
    run_short(data, tmp_path)
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "null"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="no file that could be replaced"), atomic_write(pipe):
        pass
    assert pipe.is_fifo()


def test_an_empty_preset_is_not_the_default_one(data, tmp_path):
    assert "preset ''" in refusal(main, "--preset=")


def test_a_misspelt_data_dir_is_asked_about_and_no_other(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise UserError("no Hub here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.data, "prepare", stop)
    for name in ("my_stories", "TinyStories"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "meta.json").touch()
    refusal(train.main, ["--preset", "tuned", "--data_dir", "data/my_story"])
    assert "data/my_story, did you mean data/my_stories?: preparing" in capsys.readouterr().err
    refusal(train.main, ["--preset", "demo"])
    assert "no prepared data in data/toy: preparing toy" in capsys.readouterr().err


def test_a_trained_model_without_its_checkpoint_is_not_replaced_by_a_resume(data, tmp_path):
    run_short(data, tmp_path)
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")  # "out" is still held
    (again / "ckpt.pt").unlink()
    before = snapshot(again)
    line = refusal(run_short, data, tmp_path, "--resume", out_dir=again)
    assert "a trained" in line and "--overwrite" in line
    assert snapshot(again) == before
    # That of the first evaluation may be what a kill before the first ckpt.pt has left.
    said = run_short(data, tmp_path, "--resume", out_dir=again, eval_interval=8)
    assert "starting from the beginning" in said


def test_a_checkpoint_that_came_alone_is_gone_on_with_to_the_end(data, tmp_path):
    """Copied without its model.pt, and nothing after it is better: training was not for nothing."""
    run_short(data, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    content = gpt.load_file(tmp_path / "out" / "ckpt.pt")
    for row in content["state"]["log"]:
        row["val_loss"] = 0.0
    torch.save(content, alone / "ckpt.pt")
    said = run_short(data, tmp_path, "--resume", out_dir=alone, max_iters=12)
    assert f"wrote {alone / 'model.pt'} (the best weights, iteration 12)" in said


def test_a_stop_before_the_first_evaluation_leaves_no_model_of_the_run_before(data, tmp_path):
    run_short(data, tmp_path)
    run = new_run(tiny(data, tmp_path))
    run.replaces = True
    train.save_checkpoint(run)
    assert not {"model.pt", "log.csv"} & snapshot(tmp_path / "out").keys()


def test_gradients_are_looked_at_after_so_many_steps_whatever_the_clock(data, tmp_path):
    """Ranks that looked by their own clocks would end apart."""
    run = new_run(tiny(data, tmp_path, gradient_accumulation_steps=1, max_iters=40,
                       lr_decay_iters=40, eval_interval=100))

    def poison(module, inputs, output):
        return output * (math.nan if 3 <= run.state.iteration < 22 else 1)

    run.model.transformer.ln_f.register_forward_hook(poison)
    assert "not been finite for 10 steps" in refusal(train.train, run)
    assert run.state.iteration == 20


@pytest.mark.parametrize("there", ["its own", "none", "damaged", "another run's"])
def test_the_best_since_a_resume_is_kept_where_the_runs_own_model_is_not_there(
    data, tmp_path, monkeypatch, there
):
    run_short(data, tmp_path)
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")  # "out" is still held
    model = again / "model.pt"
    if there == "none":
        model.unlink()
    elif there == "damaged":
        model.write_bytes(model.read_bytes()[:1000])
    elif there == "another run's":
        content = gpt.load_file(model)
        torch.save(content | dict(val_loss=1.0, iteration=99), model)
    evaluate, losses = train.evaluate, {12: 60.0, 16: 40.0, 20: 50.0}  # all above those before

    def worse(run, iteration, *args):
        return evaluate(run, iteration, *args) | dict(val_loss=losses[iteration])

    monkeypatch.setattr(train, "evaluate", worse)
    run_short(data, tmp_path, "--resume", out_dir=again, max_iters=20)
    kept = gpt.load_file(model)["iteration"]
    assert kept == (8 if there == "its own" else 16)
