"""Tests of the three scripts as their users run them: processes, in an empty folder, no network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import config

import pytest
from conftest import ROOT, files_in, main, rows_of, snapshot, write_tales
from conftest import run_script as run

import train
from prepare_data import toy_stories


def contents(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in snapshot(folder).items() if text is not None}


def check_error(done: SimpleNamespace, *words: str) -> None:
    """One line `error: ...` at the end of stderr, status 2."""
    assert done.status == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last


# ------------------------------------------------------------------------------ The demo, shortened

# A smaller model on short sequences, a quarter of the iterations, and an optimizer that needs few.
SHORT = """--preset demo --n_layer 1 --n_embd 32 --block_size 32 --batch_size 4 --max_iters 60
    --eval_interval 30 --eval_windows 16 --learning_rate 3e-2 --warmup_iters 5
    --matrix_optimizer muon --compile false --device cpu --dtype float32"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The demo on the toy corpus. It is validated on 10 stories of the 800 held out: to score them
    all would take most of the time.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "val.txt").write_text("<|endoftext|>".join(toy_stories()[-10:]))
    prepared = run(folder, "prepare_data.py", "--dataset", "toy", "--val_dataset", "val.txt")
    assert prepared.status == 0, prepared.stderr
    done = run(folder, "train.py", *SHORT.split())
    assert done.status == 0, done.stderr
    return SimpleNamespace(folder=folder, **vars(done))


def test_the_demo_learns_and_leaves_its_files_and_nothing_else(demo):
    losses = [row["val_loss"] for row in rows_of(demo.folder / "out" / "demo" / "log.csv")]
    assert len(losses) == 2
    assert losses[1] < losses[0] and losses[1] < 5  # an untrained model has ln 50257 = 10.82
    data = {"data/toy/train.bin", "data/toy/val.bin", "data/toy/meta.json"}
    run = {"out/demo/model.pt", "out/demo/ckpt.pt", "out/demo/log.csv"}
    run |= {"out/demo/run.json", "plots/demo.png"}
    assert set(files_in(demo.folder)) == data | run | {"val.txt"}


def test_stdout_of_train_holds_the_story_and_nothing_else(demo):
    assert demo.stdout.startswith("Once upon a time") and demo.stdout.endswith("\n")
    for word in ("loss", "iteration", "tokens", "demo"):
        assert word not in demo.stdout
        assert word in demo.stderr


def test_a_plot_of_the_run_is_drawn_from_its_log(demo, tmp_path):
    """The programs that draw are modules of a package: they are run from where it lies."""
    log, png = demo.folder / "out" / "demo" / "log.csv", tmp_path / "demo.png"
    done = run(ROOT, "-m", "plots.loss_curve", log, "--out", png)
    assert done.status == 0 and str(png) in done.stderr, done.stderr
    assert png.read_bytes().startswith(b"\x89PNG")


def test_sample_writes_stories_that_begin_with_the_prompt(demo):
    prompt = "One day, a girl named Lily"
    done = run(demo.folder, "sample.py", "--prompt", prompt, "--num_samples", 4, "--seed", 1,
               "--device", "cpu", "--max_new_tokens", 50)
    assert done.status == 0, done.stderr
    written = done.stdout.split("\n---\n")
    assert len(written) == 4 and all(story.startswith(prompt) for story in written)
    words = " ".join(story.removeprefix(prompt) for story in written).split()
    toy_words = {word for story in toy_stories()[:1000] for word in story.split()}
    # There are 50,257 tokens to choose from.
    assert len(words) > 20 and sum(word in toy_words for word in words) > 0.5 * len(words)
    assert "out/demo/model.pt" in done.stderr and "seed 1" in done.stderr


@pytest.mark.usefixtures("one_thread", "signals")
def test_the_demo_is_resumed(demo, tmp_path, monkeypatch):
    """In this process; test_survival.py resumes in others."""
    for name in ("out", "data"):
        shutil.copytree(demo.folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    stdout, stderr = main("--resume", "--preset", "demo", "--max_iters", "61")
    assert stdout.startswith("Once upon a time") and "going on from iteration 60" in stderr
    assert rows_of(Path("out/demo/log.csv"))[-1]["iteration"] == 61


def test_missing_data_is_prepared_and_a_terminal_that_is_set_to_ascii_shows_the_story(tmp_path):
    """An untrained model writes all kinds of characters."""
    write_tales(tmp_path / "tales.txt", 0, 200)
    done = run(tmp_path, "train.py", *SMALL.split(), PYTHONIOENCODING="ascii")
    assert done.status == 0, done.stderr
    made = {"data/tales/meta.json", "out/reference/model.pt", "plots/reference.png"}
    assert made <= snapshot(tmp_path).keys()


# ------------------------------------------------------------------------------ Help, unknown flags


def test_help_and_an_unknown_flag_import_nothing_slow(tmp_path):
    """What is imported says more than a clock, which other work on the machine disturbs."""
    slow = "datasets transformers matplotlib huggingface_hub pandas pyarrow scipy torch._dynamo"
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import config
for name in ("prepare_data", "sample", "train"):
    script = importlib.import_module(name)
    for flag in ("--help", "--hlep"):
        sys.argv[1:] = [flag]
        try:
            config.cli(script.main)
        except SystemExit as end:
            print(end.code, file=sys.stderr)
    slow = set({slow!r}.split()) | ({{"torch"}} if name == "prepare_data" else set())
    print(*sorted(slow & set(sys.modules)), file=sys.stderr)
"""
    done = run(tmp_path, "-c", code)
    assert re.fullmatch(r"(0\nerror: .*--help.*\n2\n\n){3}", done.stderr), done.stderr
    assert done.stdout.count("usage: ") == 3
    of_sample = done.stdout.split("usage: ")[2]
    for flag in of_sample.split("\n  --")[1:]:
        assert "default: " in " ".join(flag.split()), flag


def test_a_reader_that_has_left_is_no_error(tmp_path):
    """As with `| head`: neither a traceback nor Python's "Exception ignored" at its end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "prepare_data.py", "--help"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=30) == 1


# ------------- Wrong input of train.py, one of each kind: all kinds are tested where they are found

# What is trained where only the rest of the command line counts.
SMALL = """--dataset tales.txt --n_layer 1 --n_embd 6 --block_size 8 --batch_size 1 --max_iters 1
    --eval_windows 1 --device cpu --compile false"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working directory with a dataset, prepared as well, and a file that is none."""
    write_tales(tmp_path / "tales.txt", 0, 200)
    (tmp_path / "latin.txt").write_bytes("Zoë found a ball.".encode("latin-1"))
    done = run(tmp_path, "prepare_data.py", "--dataset", "tales.txt")
    assert done.status == 0, done.stderr
    return tmp_path


def test_wrong_input_is_one_line_and_leaves_nothing_behind(folder, monkeypatch, capsys):
    """In this process, all in one folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = contents(folder)
    for argv, words in (
        ((), ("roneneldan/TinyStories", "Hub", "--dataset toy")),
        (("--eps", "nan"), ("eps", "nan")), (("--dataset", "latin.txt"), ("latin.txt", "UTF-8")),
        (("--dataset", "tales.txt", "--device", "cpu", "--dtype", "float16"),
         ("float16", "--dtype float32")),
        (("--dataset", "no\nsuch\nfile.txt"), ("no such file.txt",)),
        ((*SMALL.split(), "--n_embd", str(6 * 2**27)), ("memory",)),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as end:
            config.cli(train.main)
        out, err = capsys.readouterr()
        check_error(SimpleNamespace(status=end.value.code, stdout=out, stderr=err), *words)
        assert contents(folder) == before  # an empty folder may remain


def test_without_a_network_the_default_dataset_is_one_line(tmp_path):
    check_error(run(tmp_path, "prepare_data.py"), "roneneldan/TinyStories", "Hub", "--dataset toy")
    assert not contents(tmp_path)


@pytest.mark.slow  # test_machines.py has it with a compiler that is only pretended not to work
def test_where_nothing_can_be_compiled_compile_true_is_refused(folder):
    before, cache = contents(folder), str(folder.parent / "cache")
    done = run(folder, "train.py", *SMALL.split(), "--compile", "true", PATH="/nonexistent", CXX="",
               TORCHINDUCTOR_CACHE_DIR=cache)
    check_error(done, "--compile false")
    assert contents(folder) == before
