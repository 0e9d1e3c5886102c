"""train.py and sample.py as their users run them: real processes, in an empty folder, without a network."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prepare_data import toy_stories

ROOT = Path(__file__).parents[1]
TALES = "<|endoftext|>".join(f"One day, Lily found {n} red balls. She was happy to play with them." for n in range(200))
# DESIGN promises 3 s. Twice that is allowed here, since other work on the machine (a CI runner's
# neighbours, a training run) stretches the import of PyTorch, which is nearly all of it.
SECONDS = 6


def run(folder: Path, script: str, *args: object, **env: str) -> SimpleNamespace:
    """A script in a process of its own, in `folder`; one thread, since several that wait for each other starve on a busy machine."""
    start = time.monotonic()
    command = list(map(str, [sys.executable, ROOT / script, *args]))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(status=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=time.monotonic() - start)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refused(folder: Path, *args: object, words: tuple[str, ...], **env: str) -> None:
    """One line `error: ...` at the end of stderr, status 2, and everything as it was."""
    before = contents(folder)
    done = run(folder, "train.py", *args, **env)
    *notices, last = done.stderr.splitlines()
    assert done.status == 2, done.stderr
    assert last.startswith("error: ") and "Traceback" not in done.stderr and not any(line.startswith("error") for line in notices)
    assert all(word in last for word in words), last
    assert done.stdout == ""
    assert contents(folder) == before


# ------------------------------------------------------------------------------------------
# The demo, shortened

# A small model on short sequences, a third of the iterations.
SHORT = "--preset demo --n_layer 1 --n_embd 64 --block_size 32 --batch_size 4 --max_iters 180 --eval_interval 90 --learning_rate 8e-3"
SHORT = [*SHORT.split(), "--compile", "false", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The demo on the toy corpus. It is validated on 40 stories of the 800 held out: scoring them all would take most of the time."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "val.txt").write_text("<|endoftext|>".join(toy_stories()[-40:]))
    prepared = run(folder, "prepare_data.py", "--dataset", "toy", "--val_dataset", "val.txt")
    assert prepared.status == 0, prepared.stderr
    done = run(folder, "train.py", *SHORT)
    assert done.status == 0, done.stderr
    return SimpleNamespace(folder=folder, **vars(done))


def test_the_demo_learns(demo):
    with open(demo.folder / "out" / "demo" / "log.csv", newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2
    assert losses[1] < losses[0] and losses[1] < 5  # an untrained model has ln 50257 = 10.82


def test_the_demo_leaves_data_model_log_and_plot_where_design_says(demo):
    files = {name for name, content in contents(demo.folder).items() if content is not None}
    data = {"data/toy/train.bin", "data/toy/val.bin", "data/toy/meta.json"}
    assert files == data | {"val.txt", "out/demo/model.pt", "out/demo/ckpt.pt", "out/demo/log.csv", "plots/demo.png"}


def test_stdout_of_train_holds_the_story_and_nothing_else(demo):
    assert demo.stdout.startswith("Once upon a time") and demo.stdout.endswith("\n")
    for word in ("loss", "iteration", "tokens", "demo"):
        assert word not in demo.stdout
        assert word in demo.stderr


def test_sample_writes_stories_that_begin_with_the_prompt(demo):
    prompt = "One day, a girl named Lily"
    done = run(demo.folder, "sample.py", "--prompt", prompt, "--num_samples", 4, "--seed", 1, "--device", "cpu")
    assert done.status == 0, done.stderr
    written = done.stdout.split("\n---\n")
    assert len(written) == 4 and all(story.startswith(prompt) for story in written)
    words = " ".join(story.removeprefix(prompt) for story in written).split()
    toy_words = {word for story in toy_stories()[:1000] for word in story.split()}
    assert len(words) > 20 and sum(word in toy_words for word in words) > 0.5 * len(words)  # 50,257 tokens to choose from
    assert "out/demo/model.pt" in done.stderr and "seed 1" in done.stderr


def test_a_folder_that_holds_a_run_is_refused(demo):
    check_refused(demo.folder, *SHORT, words=("out/demo/ckpt.pt", "--resume", "--overwrite"))


def test_a_finished_run_says_so_and_exits_with_0(demo):
    before = contents(demo.folder)
    done = run(demo.folder, "train.py", "--resume", "--out_dir", "out/demo")
    assert (done.status, done.stdout) == (0, "") and "finished" in done.stderr
    assert contents(demo.folder) == before


def test_a_run_is_resumed_from_the_command_line(demo, tmp_path):
    shutil.copytree(demo.folder / "out", tmp_path / "out")
    shutil.copytree(demo.folder / "data", tmp_path / "data")
    done = run(tmp_path, "train.py", "--resume", "--preset", "demo", "--max_iters", 181)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert "going on from iteration 180" in done.stderr
    assert (tmp_path / "out" / "demo" / "log.csv").read_text().splitlines()[-1].startswith("181,")


# ------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("script", ["prepare_data.py", "train.py", "sample.py"])
def test_help_is_quick(script, tmp_path):
    done = run(tmp_path, script, "--help")
    assert done.status == 0 and done.stderr == "" and "default: " in done.stdout
    assert done.seconds < SECONDS


def test_a_reader_that_has_left_is_no_error(tmp_path):
    """As with `| head`: neither a traceback nor Python's "Exception ignored" at its end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "prepare_data.py", "--help"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=30) == 1


@pytest.mark.parametrize("script", ["prepare_data.py", "train.py", "sample.py"])
def test_an_unknown_flag_is_refused_quickly(script, tmp_path):
    done = run(tmp_path, script, "--hlep")
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--help" in done.stderr
    assert done.seconds < SECONDS


# ------------------------------------------------------------------------------------------
# Wrong input of train.py: the kinds DESIGN names. All are in test_config.py, test_prepare_data.py or
# test_train.py too, in process; here some of them are slow ones.


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty working directory but for a dataset and some files that are no dataset."""
    (tmp_path / "tales.txt").write_text(TALES)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Zoë found a ball.".encode("latin-1"))
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--eps nan", ("eps", "nan")),
        pytest.param("--preset refrence", ("did you mean reference?",), marks=pytest.mark.slow),
        pytest.param("--dataset missing.txt", ("missing.txt",), marks=pytest.mark.slow),
        pytest.param("--dataset empty.txt", ("empty.txt", "empty"), marks=pytest.mark.slow),
        ("--dataset latin.txt", ("latin.txt", "UTF-8")),
        pytest.param("--dataset number.jsonl", ("number.jsonl", "string"), marks=pytest.mark.slow),
        pytest.param("--dataset image.png", ("image.png",), marks=pytest.mark.slow),
        ("", ("roneneldan/TinyStories", "Hub", "--dataset toy")),  # offline
        pytest.param("--dataset tales.txt --device cuda:77", ("cuda:77", "--device cpu"), marks=pytest.mark.slow),
        ("--dataset tales.txt --device cpu --dtype float16", ("float16", "--dtype float32")),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(folder, argv, words):
    check_refused(folder, *argv.split(), words=words, CUDA_VISIBLE_DEVICES="")


def test_an_error_is_one_line_even_if_a_value_is_not(folder):
    check_refused(folder, "--dataset", "no\nsuch\nfile.txt", words=("no such file.txt",))


def test_without_a_compiler_compile_true_is_refused(folder):
    check_refused(folder, "--compile", "true", "--dataset", "tales.txt", words=("--compile false",), PATH="/nonexistent", CXX="")


# What is seen only once the data is there, so it is prepared.
SMALL = "--n_layer 1 --n_embd 6 --block_size 8 --batch_size 1 --max_iters 1 --eval_iters 1 --device cpu --compile false"


@pytest.fixture
def prepared(folder) -> Path:
    done = run(folder, "prepare_data.py", "--dataset", "tales.txt")
    assert done.status == 0, done.stderr
    return folder


def test_an_out_dir_that_is_a_file_is_refused(prepared):
    check_refused(prepared, "--dataset", "tales.txt", *SMALL.split(), "--out_dir", "tales.txt", words=("tales.txt",))


def test_a_plot_dir_that_is_a_file_is_refused_before_the_training(prepared):
    check_refused(prepared, "--dataset", "tales.txt", *SMALL.split(), "--plot_dir", "tales.txt", words=("tales.txt",))


def test_a_model_the_machine_has_no_memory_for_is_one_line(prepared):
    check_refused(prepared, "--dataset", "tales.txt", *SMALL.split(), "--n_embd", 6 * 2**27, words=("memory",))


def test_data_that_is_missing_is_prepared_and_a_model_trained_on_it(folder):
    done = run(folder, "train.py", "--dataset", "tales.txt", *SMALL.split())
    assert done.status == 0, done.stderr
    assert {"data/tales/meta.json", "out/reference/model.pt", "plots/reference.png"} <= contents(folder).keys()


def test_a_story_that_the_terminal_cannot_show_does_not_end_in_a_traceback(prepared):
    """An untrained model writes all kinds of characters, and a terminal may be set to ASCII."""
    done = run(prepared, "train.py", "--dataset", "tales.txt", *SMALL.split(), PYTHONIOENCODING="ascii")
    assert done.status == 0, done.stderr
