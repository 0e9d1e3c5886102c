"""Tests of the three scripts as their users run them: processes, in an empty folder, no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, files_in, rows_of, snapshot, write_tales
from conftest import run_script as run

from prepare_data import toy_stories


def check_refused(folder: Path, *args: object, words: tuple[str, ...], **env: str) -> None:
    """One line `error: ...` at the end of stderr, status 2, and every file as it was."""
    before = {name: text for name, text in snapshot(folder).items() if text is not None}
    done = run(folder, "train.py", *args, **env)
    assert done.status == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    after = {name: text for name, text in snapshot(folder).items() if text is not None}
    assert after == before  # an empty folder may remain


# ------------------------------------------------------------------------------ The demo, shortened

# A small model on short sequences, a third of the iterations.
SHORT = """--preset demo --n_layer 1 --n_embd 64 --block_size 32 --batch_size 4 --max_iters 180
    --eval_interval 90 --learning_rate 8e-3 --compile false --device cpu --dtype float32"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The demo on the toy corpus. It is validated on 40 stories of the 800 held out: to score them
    all would take most of the time.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "val.txt").write_text("<|endoftext|>".join(toy_stories()[-40:]))
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
               "--device", "cpu")
    assert done.status == 0, done.stderr
    written = done.stdout.split("\n---\n")
    assert len(written) == 4 and all(story.startswith(prompt) for story in written)
    words = " ".join(story.removeprefix(prompt) for story in written).split()
    toy_words = {word for story in toy_stories()[:1000] for word in story.split()}
    # There are 50,257 tokens to choose from.
    assert len(words) > 20 and sum(word in toy_words for word in words) > 0.5 * len(words)
    assert "out/demo/model.pt" in done.stderr and "seed 1" in done.stderr


def test_a_run_is_resumed_from_the_command_line(demo, tmp_path):
    shutil.copytree(demo.folder / "out", tmp_path / "out")
    shutil.copytree(demo.folder / "data", tmp_path / "data")
    done = run(tmp_path, "train.py", "--resume", "--preset", "demo", "--max_iters", 181)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert "going on from iteration 180" in done.stderr
    assert (tmp_path / "out" / "demo" / "log.csv").read_text().splitlines()[-1].startswith("181,")


# --------------------------------------------------------------------------------------------- Help


@pytest.mark.parametrize("script", ["prepare_data.py", "train.py", "sample.py"])
def test_help_says_the_defaults_and_imports_nothing_slow(script, tmp_path):
    """What is imported says more than a clock, which other work on the machine disturbs."""
    slow = "datasets transformers matplotlib huggingface_hub pandas pyarrow torch._dynamo"
    code = f"""
import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
atexit.register(lambda: print(*sorted(set({slow!r}.split()) & set(sys.modules)), file=sys.stderr))
import config, {script.removesuffix(".py")} as script
config.cli(script.main)
"""
    done = run(tmp_path, "-c", code, "--help")
    assert done.status == 0 and done.stderr == "\n" and "default: " in done.stdout


def test_a_reader_that_has_left_is_no_error(tmp_path):
    """As with `| head`: neither a traceback nor Python's "Exception ignored" at its end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "prepare_data.py", "--help"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=30) == 1


@pytest.mark.parametrize("script", ["prepare_data.py", "train.py", "sample.py"])
def test_an_unknown_flag_is_refused(script, tmp_path):
    done = run(tmp_path, script, "--hlep")
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--help" in done.stderr


# ------------- Wrong input of train.py, one of each kind: all kinds are tested where they are found


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty working directory but for a dataset and a file that is none."""
    write_tales(tmp_path / "tales.txt", 0, 200)
    (tmp_path / "latin.txt").write_bytes("Zoë found a ball.".encode("latin-1"))
    return tmp_path


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--eps", "nan"), ("eps", "nan")), (("--dataset", "latin.txt"), ("latin.txt", "UTF-8")),
        ((), ("roneneldan/TinyStories", "Hub", "--dataset toy")),  # offline
        (("--dataset", "tales.txt", "--device", "cpu", "--dtype", "float16"),
         ("float16", "--dtype float32")),
        (("--dataset", "no\nsuch\nfile.txt"), ("no such file.txt",)),
    ],
    ids=str,
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(folder, argv, words):
    check_refused(folder, *argv, words=words, CUDA_VISIBLE_DEVICES="")


# What is seen only once the data is there, so it is prepared.
SMALL = """--dataset tales.txt --n_layer 1 --n_embd 6 --block_size 8 --batch_size 1 --max_iters 1
    --eval_windows 1 --device cpu --compile false"""


@pytest.fixture
def prepared(folder) -> Path:
    done = run(folder, "prepare_data.py", "--dataset", "tales.txt")
    assert done.status == 0, done.stderr
    return folder


def test_where_nothing_can_be_compiled_compile_true_is_refused(prepared):
    argv = (*SMALL.split(), "--compile", "true")
    check_refused(prepared, *argv, words=("--compile false",), PATH="/nonexistent", CXX="",
                  TORCHINDUCTOR_CACHE_DIR=str(prepared.parent / "cache"))


def test_a_model_the_machine_has_no_memory_for_is_one_line(prepared):
    check_refused(prepared, *SMALL.split(), "--n_embd", 6 * 2**27, words=("memory",))


def test_data_that_is_missing_is_prepared_and_a_model_trained_on_it(folder):
    done = run(folder, "train.py", *SMALL.split())
    assert done.status == 0, done.stderr
    made = {"data/tales/meta.json", "out/reference/model.pt", "plots/reference.png"}
    assert made <= snapshot(folder).keys()


def test_a_story_that_the_terminal_cannot_show_does_not_end_in_a_traceback(prepared):
    """An untrained model writes all kinds of characters, and a terminal may be set to ASCII."""
    done = run(prepared, "train.py", *SMALL.split(), PYTHONIOENCODING="ascii")
    assert done.status == 0, done.stderr
