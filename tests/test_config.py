"""Tests of config.py: presets, values, flags and their help, config.py edited, errors, files."""

import dataclasses
import io
import math
import os
import re
import shutil
from pathlib import Path

import config as config_module
from config import PRESETS, Config, UserError, atomic_write

import conftest
import pytest
from conftest import ROOT, edit_config, new_config, run_script

import model
import prepare_data
import sample
import train

FIELDS = dataclasses.fields(Config)
FLAGS = [field for field in FIELDS if field.name != "vocab_size"]


def overrides_in(*argv: str) -> dict:
    """The settings that train.py's parser finds in a command line."""
    return train.parse_command_line(list(argv))[0]


def config(*argv: str) -> Config:
    return Config.from_preset(**overrides_in(*argv))


def refused(*argv: str) -> str:
    """The one line that refuses a command line."""
    return conftest.refusal(config, *argv)


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def defaults_in(text: str) -> dict[str, str]:
    """The defaults that a help tells, by flag."""
    _, *entries = text.split("\n  --")
    told = {}
    for entry in entries:
        flag, words = entry.split()[0], " ".join(entry.split())
        _, found, rest = words.partition("(default: ")
        if found:
            told[flag] = rest.partition(")")[0]
    return told


# ----------------------------------------------------------------------------- Presets and defaults


def test_tuned_has_the_budget_of_the_reference():
    tuned, reference = Config.from_preset("tuned"), Config()
    tokens = [c.max_iters * c.tokens_per_iteration for c in (tuned, reference)]
    assert tokens[0] == tokens[1]


def test_what_is_left_open_follows_other_fields():
    c = Config(max_iters=70, batch_size=5)
    assert (c.decay_iters, c.micro_batch_size) == (70, 5)
    c = Config(max_iters=70, lr_decay_iters=2000, batch_size=5, device_batch_size=2)
    assert (c.decay_iters, c.micro_batch_size) == (2000, 2)


def test_a_preset_sets_some_fields_and_flags_win_over_it():
    demo = config("--preset", "demo")
    assert {name: getattr(demo, name) for name in PRESETS["demo"]} == PRESETS["demo"]
    assert demo.beta1 == Config().beta1
    assert config("--max_iters", "7", "--preset", "demo") == dataclasses.replace(demo, max_iters=7)


@pytest.mark.parametrize("dataset, folder", [
    ("roneneldan/TinyStories", "data/TinyStories"), ("toy", "data/toy"), ("a/b.txt", "data/b"),
    ("/a/train.txt", "data/train"), ("x.jsonl", "data/x"), ("../stories/", "data/stories"),
    ("v1.5", "data/v1.5"),
])
def test_default_folders_have_the_names_of_dataset_and_preset(dataset, folder):
    assert Config(dataset=dataset).data_dir == folder
    assert config("--dataset", dataset, "--out_dir", "elsewhere").data_dir == folder
    assert Config.from_preset("demo").out_dir == "out/demo"


# ------------------------------------------------------------------------------------------- Values


def text_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("field", FLAGS, ids=lambda field: field.name)
def test_every_field_is_a_flag_that_takes_its_own_default(field):
    value = getattr(Config(), field.name)
    if value is None:
        value = {int | None: 7, float | None: 0.5, str | None: "a/path"}[field.type]
    parsed = overrides_in(f"--{field.name}", text_of(value))
    assert parsed == {field.name: value} and type(parsed[field.name]) is type(value)


@pytest.mark.parametrize("argv, settings", [
    ("", {}), ("--bias True", dict(bias=True)), ("--bias=FALSE", dict(bias=False)),
    ("--compile False", dict(compile="false")), ("--learning_rate 1", dict(learning_rate=1.0)),
    ("--max_iters 1e4", dict(max_iters=10_000)), ("--max_iters=2.0", dict(max_iters=2)),
    ("--max_iters +7", dict(max_iters=7)), (f"--seed {2**63 - 1}", dict(seed=2**63 - 1)),
    ("--seed 1 --seed 2", dict(seed=2)), ("--seed=5 --eps=1e-6", dict(seed=5, eps=1e-6)),
    ("--preset reference --preset demo", dict(preset="demo")),
])
def test_what_is_typed_is_understood(argv, settings):
    parsed = overrides_in(*argv.split())
    assert parsed == settings
    assert all(type(parsed[name]) is type(value) for name, value in settings.items())


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = overrides_in("--out_dir=~/runs", "--dataset=~/f.txt")
    assert overrides == {"out_dir": f"{tmp_path}/runs", "dataset": f"{tmp_path}/f.txt"}
    assert Config(plot_dir="~/plots").plot_dir == f"{tmp_path}/plots"
    assert sample.parse_command_line(["--checkpoint=~/m.pt"]).checkpoint == f"{tmp_path}/m.pt"


def test_a_value_that_begins_with_a_dash_is_told_how_to_be_typed():
    assert "--prompt=-X" in conftest.refusal(sample.parse_command_line, ["--prompt", "-Pip"])
    assert sample.parse_command_line(["--prompt=-Pip"]).prompt == "-Pip"
    assert "--separator=-X" in conftest.refusal(prepare_data.main, ["--separator", "---"])


IMPOSSIBLE = {
    "eps": "nan inf 0 tiny", "learning_rate": "-1e-4 1e999 -inf -nan", "min_lr": "-.5 nan",
    "weight_decay": "-0.1", "grad_clip": "-1", "beta1": "1", "beta2": "1.5", "dropout": "1 -0.1",
    "warmup_start_factor": "1.1", "embedding_lr_mult": "nan", "momentum": "1",
    "n_layer": "0 -3 2.5", "n_head": "six 0", "n_embd": f"0 {2**31}", "block_size": "0",
    "batch_size": "0", "gradient_accumulation_steps": "0", "device_batch_size": "0 None",
    "max_iters": "1.5e0 0", "warmup_iters": "-1", "lr_decay_iters": "0", "eval_interval": "0",
    "eval_windows": "0", "checkpoint_minutes": "-1", "seed": f"-1 {2**63}", "bias": "maybe 1",
    "compile": "maybe", "gelu": "relu", "dtype": "int8",
}
REFUSED = [(name, text) for name, texts in IMPOSSIBLE.items() for text in texts.split()]
EMPTY = [("block_size", ""), ("out_dir", ""), ("data_dir", " "), ("plot_dir", ""), ("dataset", "")]


@pytest.mark.parametrize("flag, text", REFUSED + EMPTY)
def test_a_value_that_cannot_be_is_refused_with_its_name(flag, text):
    line = refused(f"--{flag}", text)
    assert flag in line
    assert text in line or repr(float(text)) in line  # -1e-4 may be told as -0.0001


@pytest.mark.parametrize("name, value", [
    ("n_layer", 1.0), ("n_layer", True), ("n_layer", "6"), ("n_layer", None),
    ("learning_rate", "1e-4"), ("learning_rate", True), ("learning_rate", math.nan),
    ("bias", 1), ("bias", None), ("gelu", None), ("data_dir", 3), ("preset", 5),
    ("dtype", "float8"), ("lr_decay_iters", 5.0), ("vocab_size", 65537), ("vocab_size", 0),
])
def test_a_config_built_in_python_is_checked_as_well(name, value):
    line = conftest.refusal(Config, **{name: value})
    assert name in line and repr(value) in line
    assert type(Config(grad_clip=1).grad_clip) is float and Config(vocab_size=9).vocab_size == 9


@pytest.mark.parametrize("argv, words", [
    ("--n_embd 30 --n_head 4", "n_head 4 n_embd 30"),
    ("--lr_decay_iters 999", "lr_decay_iters 999 warmup_iters 1000"),
    ("--warmup_iters 50 --max_iters 60 --lr_decay_iters 40", "lr_decay_iters 40 warmup_iters 50"),
])
def test_a_combination_that_cannot_be_is_refused_with_names_and_values(argv, words):
    line = refused(*argv.split())
    assert all(word in line for word in words.split())


@pytest.mark.parametrize("argv", [
    "--max_iters 100",  # below warmup_iters
    "--max_iters 100 --lr_decay_iters 10000", "--lr_decay_iters 5000",
    "--lr_decay_iters 1000", "--warmup_iters 0 --lr_decay_iters 1", "--warmup_iters 10000",
    "--device_batch_size 100000", "--eval_interval 20000", "--eval_windows 1000000",
    "--min_lr 0 --weight_decay 0 --grad_clip 0",
    "--dropout 0 --beta1 0 --beta2 0 --warmup_start_factor 0",
    "--device cuda:3 --dtype float16 --compile true",  # whether they are there is found later
])
def test_unusual_values_that_make_sense_are_taken(argv):
    config(*argv.split())


# -------------------------------------------------------------------------------------------- Flags


@pytest.mark.parametrize("argv, words", [
    ("--learning-rate 1e-4", "--learning_rate"), ("--batchsize 3", "--batch_size"),
    ("--resum", "unknown flag --resum, did you mean --resume"), ("--max_itres=3", "--max_iters"),
    ("--preset refrence", "reference"), ("--preset demos", "demo"),
    ("--preset nothing", ", ".join(PRESETS)),
    ("--dtype float61", "float16"), ("--dtype nonsense", "bfloat16"),
    ("--gelu exakt", "exact"), ("--gelu nonsense", "tanh"),
    ("--compile ture", "true"), ("--compile nonsense", "auto"), ("--bias flase", "false"),
    # Names that people bring from elsewhere.
    ("--lr 1", "--learning_rate?"), ("--epochs 1", "--max_epochs?"),
    ("--num-epochs 1", "--max_epochs?"), ("--steps 1", "--max_iters?"),
    ("--batch 1", "--batch_size?"), ("--ctx 1", "--block_size?"), ("--wandb", "--tensorboard?"),
    ("--wd 1", "--weight_decay?"), ("--output_dir x", "--out_dir?"),
    ("--eval_iters 9", "--eval_windows?"), ("--wandb_log", "--tensorboard?"),
    # A flag of another script, and words that are close to none.
    ("--val_fraction 0.1", "a flag of prepare_data.py"), ("--top_k 5", "a flag of sample.py"),
    ("--rope", "--rope (--help"), ("--zloss", "--zloss (--help"),
    # Flags cut short, and the one that is a field but no flag.
    ("--learning 1", "unknown flag --learning"), ("--max_it 3", "unknown flag --max_it"),
    ("--over", "unknown flag --over"), ("--prese demo", "unknown flag --prese"),
    ("--n_l=3", "unknown flag --n_l"), ("--vocab_size 50257", "unknown flag --vocab_size"),
    # Command lines of another form.
    ("--max_iters", "max_iters"), ("--preset", "preset"), ("--out_dir --resume", "out_dir"),
    ("stray", "stray"), ("--resume=true", "resume"), ("--preset tuneddd", "preset"),
    ("--preset=", "preset"), ("--overwrite --resume", "overwrite"),
    ("--eval_only --resume", "eval_only"),
])
def test_what_is_not_understood_is_one_line_with_the_nearest_that_is(argv, words):
    assert words in refused(*argv.split())


def test_help_has_every_flag_under_its_heading(capsys):
    text = help_of(capsys)
    flags = re.findall(r"(?m)^  --(\w+) ", text)
    assert flags[-len(FLAGS) :] == [field.name for field in FLAGS]
    assert {"resume", "overwrite", "eval_only"} < {*flags}
    for title, name in (
        ("model", "n_layer"), ("data", "crops"), ("batch", "max_iters"),
        ("learning rate", "embedding_lr_mult"), ("optimizer", "grad_clip"),
        ("evaluation", "eval_windows"), ("run", "checkpoint_minutes"),
    ):
        assert re.search(rf"\n\n{title}:\n(.+\n)*  --{name} ", text), title


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_shows_its_defaults(capsys, preset):
    told = defaults_in(help_of(capsys, "--preset", preset))
    expected = {field.name: field.default for field in FLAGS} | PRESETS[preset]
    expected["preset"] = preset
    for name, value in expected.items():
        text = f"{value:g}" if isinstance(value, float) else text_of(value)
        assert value is None or told[name] == text, name


# --------------------------------------------------------------------------------- config.py edited


def test_the_default_preset_is_what_train_py_trains_without_a_preset(monkeypatch, capsys):
    assert config() == Config.from_preset() == Config.from_preset("reference") == Config()
    monkeypatch.setattr(config_module, "DEFAULT_PRESET", "demo")
    demo = Config.from_preset("demo")
    assert config() == Config.from_preset() == demo
    assert config("--max_iters", "7") == Config.from_preset(max_iters=7)
    assert config("--max_iters", "7") == dataclasses.replace(demo, max_iters=7)
    planned = new_config({}, "overwrite")[0]
    assert (planned.preset, planned.out_dir) == ("demo", "out/demo")
    assert config("--preset", "reference") == Config()
    told = defaults_in(help_of(capsys))
    assert told["preset"] == "demo" and told["n_layer"] == "3" and told["dataset"] == "toy"
    assert defaults_in(help_of(capsys, "--preset", "reference"))["n_layer"] == "6"


@pytest.mark.parametrize("settings, words", [
    (dict(max_itres=5), ("'mine'", "'max_itres'", "max_iters?")),
    (dict(n_layer=0), ("n_layer", "0")), (dict(beta2="0.9"), ("beta2", "'0.9'")),
    (dict(gelu="relu"), ("gelu", "exact", "tanh")),
    (dict(n_head=5), ("n_head 5", "n_embd 384")), (dict(preset="demo"), ("preset",)),
    (dict(max_iters=1e3), ("max_iters", "1000.0")),
], ids=str)
def test_a_preset_with_a_misspelt_setting_or_an_impossible_value_is_one_line(
    monkeypatch, settings, words
):
    monkeypatch.setitem(PRESETS, "mine", settings)
    for argv in (("--preset", "mine"), ("--preset", "mine", "--help")):
        line = refused(*argv)
        assert all(word in line for word in words), line
    assert config("--preset", "demo").preset == "demo"  # the others are as good as they were


def test_an_edited_default_changes_the_reference_but_no_preset_that_sets_it(tmp_path):
    edit_config(tmp_path, max_iters=500, eps=1e-7)
    code = """
from config import Config
for preset in ("reference", "tuned", "demo"):
    settings = Config.from_preset(preset)
    print(settings.max_iters, settings.eps)
"""
    # `tuned` and `demo` say how long they are; `demo` has an eps of its own too.
    assert run_script(tmp_path, "-c", code).stdout == "500 1e-07\n40000 1e-07\n240 1e-08\n"


HEADS = 'n_head: int = setting(6, "attention heads in each block", low=1)'
EDITS = {  # an edit by hand, and what `train.py --help` or an error says of it
    "a plain value": (HEADS, "n_head: int = 8", "--n_head N"),
    "a field of one's own": (HEADS, f"{HEADS}\n    note: float = 0.5", "--note X"),
    "an own text, empty": (HEADS, f"{HEADS}\n    note: str = ''", "--note NOTE"),
    "an own field, or None": (HEADS, f"{HEADS}\n    note: str | None = None", "--note NOTE"),
    "a comma too many": (HEADS, f"{HEADS},", "n_head (Field"),
    "a value of another type": (HEADS, 'n_head: int = "8"', "n_head '8'"),
    "another type": (HEADS, f"{HEADS}\n    note: tuple = ()", "the type of note must be"),
    "a deleted field": (HEADS, "", "config.py has no setting n_head"),
    "a preset that is no dict": ('"reference": {},', '"reference": {}, "mine": "demo",',
                                 "the preset 'mine' must be a dict"),
    "a default preset that is gone": ('DEFAULT_PRESET = "reference"', 'DEFAULT_PRESET = "tunde"',
                                      "DEFAULT_PRESET in config.py 'tunde' is not known, did you "
                                      "mean tuned?"),
    "an impossible value": ("max_iters: int = setting(10_000", "max_iters: int = setting(-5",
                            "max_iters -5 "),
}


@pytest.mark.parametrize("edit", EDITS)
def test_config_py_can_be_edited_by_hand(tmp_path, edit):
    before, after, said = EDITS[edit]
    text = (ROOT / "config.py").read_text()
    assert text.count(before) == 1
    (tmp_path / "config.py").write_text(text.replace(before, after))
    code = """
import sys
import config
def main(argv):
    parser = config.Parser("")
    config.add_config_flags(parser, argv)
    parser.parse_args(argv)
config.cli(main)
"""
    argv = ["--preset", "mine", "--help"] if "preset that is no" in edit else ["--help"]
    done = run_script(tmp_path, "-c", code, *argv)
    assert "Traceback" not in done.stderr
    if said.startswith("--"):
        flags = done.stdout.rpartition("model:")[2].partition("data:")[0]
        assert done.status == 0 and said in flags
    else:
        assert done.status == 2 and said in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert len(done.stderr) < 200


@pytest.mark.usefixtures("one_thread", "signals")
def test_a_run_and_its_model_outlive_its_preset(tmp_path, monkeypatch, capsys):
    conftest.write_tales(tmp_path / "tales.txt", 0, 60)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as edited:
        edited.setitem(PRESETS, "mine", dict(
            dataset="tales.txt", n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2,
            gradient_accumulation_steps=1, max_iters=2, eval_windows=4, warmup_iters=0, beta1=0.8,
            device="cpu", dtype="float32", compile="false"))
        assert "changed: " not in conftest.main(preset="mine")[1]
    assert "'mine'" in conftest.refusal(conftest.main, preset="mine")
    shutil.copytree("out/mine", "out/copy")  # this process holds out/mine
    _, told = conftest.main("--resume", out_dir="out/copy", max_iters=4)
    for words in ("settings it began with", "going on from iteration 2"):
        assert words in told
    scored, _ = conftest.main("--eval_only", out_dir="out/copy")
    assert scored.startswith("validation loss")
    sample.main(["--checkpoint", "out/mine/model.pt", "--max_new_tokens", "3", "--device", "cpu"])
    assert "out/mine/model.pt" in capsys.readouterr().err
    loaded = model.load_model("out/mine/model.pt")
    assert loaded.config.preset == "mine" and loaded.config.beta1 == 0.8
    weights = model.load_file(Path("out/mine/model.pt"))["model"]
    assert conftest.same(loaded.state_dict(), weights)
    overrides = overrides_in("--init_from", "out/mine/model.pt", "--preset", "demo")
    started, source = new_config(overrides, "overwrite")
    assert (started.preset, started.n_embd) == ("demo", 8) and source.config.preset == "mine"


# ----------------------------------------- Errors become one line; files appear whole or not at all

CLI = "import config\ndef main(argv):\n    {}\nconfig.cli(main)"
HALVE = "error: out of memory: halve --device_batch_size .*--num_samples.*\n"


@pytest.mark.parametrize("action, status, stderr", [
    ("raise config.UserError('two\\nlines')", 2, "error: two lines\n"),
    ("open('/nonexistent/file')", 2, "error: No such file or directory: /nonexistent/file\n"),
    ("raise OSError('the disk is\\nfull')", 2, "error: the disk is full\n"),
    ("raise KeyboardInterrupt", 130, "\n"), ("raise BrokenPipeError", 1, ""),
    ("print('fine')", 0, ""), ("raise MemoryError", 2, HALVE),
    ("raise RuntimeError('[enforce fail] can\\'t allocate memory')", 2, HALVE),
    ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", 2, HALVE),
    ("raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')", 2, HALVE),
    ("raise RuntimeError('a bug')", 1, r"(?s)Traceback.*\nRuntimeError: a bug\n"),
])
def test_cli_turns_what_goes_wrong_into_a_line_and_a_status(action, status, stderr):
    done = run_script(ROOT, "-c", CLI.format(action))
    assert done.status == status and re.fullmatch(stderr, done.stderr)


def test_atomic_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == path.parent
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_the_old_file_and_no_debris_on_an_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "null"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="null"), atomic_write(pipe):
        pass
    assert pipe.is_fifo()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as partial:
            partial.write_text("x")
    finally:
        assert os.umask(before) == umask  # and it leaves the umask as it was
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_a_lock_removes_the_unfinished_files_of_ours_and_no_others(tmp_path):
    ours, others = ".ckpt.pt.0a1b2c3d.partial", [".ckpt.pt.partial", "my.partial", ".my.x.partial"]
    for name in (ours, *others):
        (tmp_path / name).touch()
    os.close(config_module.lock_folder(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_under_torchrun_local_rank_0_speaks_for_all_and_an_error_of_one_rank_is_not_lost():
    action = "config.time.sleep = print; config.notice('told'); raise config.UserError('odd')"
    job = dict(TORCHELASTIC_RUN_ID="1", RANK="3")
    for local in (dict(LOCAL_RANK="0"), {}):  # without: a job that is no rank of torchrun's
        first = run_script(ROOT, "-c", CLI.format(action), **local, **job)
        assert first.stderr == "told\nerror: odd\n" and first.stdout == ""
    other = run_script(ROOT, "-c", CLI.format(action), LOCAL_RANK="1", **job)
    assert other.stderr == "error: rank 3: odd\n" and other.stdout == "5\n"  # torchrun may end it


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, most", [(Terminal, 79), (io.StringIO, 999)])
def test_a_notice_is_wrapped_on_a_terminal_and_a_command_in_it_stays_whole(
    monkeypatch, stream, most
):
    words, command = " ".join(["word"] * 60), "    python train.py --out_dir " + "long/" * 20
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.setenv("COLUMNS", "80")
    config_module.notice(words)
    config_module.notice(f"to go on:\n{command}")
    *lines, before, last = config_module.sys.stderr.getvalue().splitlines()
    assert (before, last) == ("to go on:", command) and " ".join(lines) == words
    assert 70 < max(map(len, lines)) <= most
