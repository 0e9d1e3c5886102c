"""config.py against the published recipe and the contract of the command line."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from config import PRESETS, Config, UserError, add_config_flags, default_data_dir, fail, one_line, whole_file

ROOT = Path(__file__).parents[1]
FIELDS = dataclasses.fields(Config)


def typed(*argv: str) -> dict:
    """The fields that train.py's parser finds in a command line."""
    return train.parse_command_line(list(argv))[0]


def config(*argv: str) -> Config:
    return Config.from_preset(**typed(*argv))


def refused(*argv: str) -> str:
    """The one line that refuses a command line."""
    with pytest.raises(UserError) as mistake:
        config(*argv)
    line = str(mistake.value)
    assert line and "\n" not in line
    return line


# ------------------------------------------------------------------------------------------
# The recipe


# reference/README.md, row by row.
REFERENCE = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 128, "vocab_size": 50257, "dropout": 0.1, "bias": True, "gelu": "exact",
    "dataset": "roneneldan/TinyStories",
    "batch_size": 32, "gradient_accumulation_steps": 32, "max_iters": 10_000,
    "learning_rate": 1e-4, "min_lr": 5e-4, "warmup_iters": 1000, "warmup_start_factor": 1 / 3,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-9, "grad_clip": 0.5, "eval_interval": 500,
}  # fmt: skip


@pytest.mark.parametrize("name, value", REFERENCE.items())
def test_a_default_is_the_reference_runs(name, value):
    assert getattr(Config(), name) == value


def test_the_reference_run_is_41_million_tokens_in_313_updates():
    c = Config()
    assert c.tokens_per_iteration == 4096
    assert c.tokens_per_iteration * c.gradient_accumulation_steps == 131_072
    assert divmod(c.max_iters, c.gradient_accumulation_steps) == (312, 16)
    assert c.max_iters * c.tokens_per_iteration == pytest.approx(41e6, rel=0.01)


@pytest.mark.parametrize("preset", ["reference", "tuned"])
def test_an_evaluation_is_a_few_dozen_batches_and_under_5_percent_of_the_run(preset):
    c = Config.from_preset(preset)
    assert 12 <= c.eval_iters <= 60
    forwards = 2 * c.eval_iters * c.max_iters / c.eval_interval  # a forward pass is a third of an iteration
    assert forwards / 3 < 0.05 * c.max_iters


def test_a_short_run_of_tuned_is_evaluated_on_the_way():
    assert Config.from_preset("tuned").eval_interval <= 1000 / 2  # 1,000 iterations: the shortest run that the README proposes


def test_tuned_has_the_budget_of_the_reference():
    tuned, reference = Config.from_preset("tuned"), Config()
    assert tuned.max_iters * tuned.tokens_per_iteration == reference.max_iters * reference.tokens_per_iteration


def test_the_reference_preset_is_the_defaults():
    assert Config.from_preset("reference") == Config.from_preset() == Config()


def test_what_is_left_open_follows_other_fields():
    c = Config(max_iters=70, batch_size=5)
    assert (c.decay_iters, c.pass_sequences) == (70, 5)
    c = Config(max_iters=70, lr_decay_iters=2000, batch_size=5, device_batch_size=2)
    assert (c.decay_iters, c.pass_sequences) == (2000, 2)


def test_a_preset_sets_some_fields_and_flags_win_over_it():
    demo = config("--preset", "demo")
    assert {name: getattr(demo, name) for name in PRESETS["demo"]} == PRESETS["demo"]
    assert demo.dataset == "toy" and demo.beta1 == Config().beta1
    assert config("--max_iters", "7", "--preset", "demo") == dataclasses.replace(demo, max_iters=7)


def test_default_folders_have_the_names_of_preset_and_dataset():
    assert (Config().data_dir, Config().out_dir, Config().plot_dir) == ("data/TinyStories", "out/reference", "plots")
    demo = Config.from_preset("demo")
    assert (demo.data_dir, demo.out_dir) == ("data/toy", "out/demo")
    assert config("--dataset", "a/b.txt", "--out_dir", "elsewhere").data_dir == "data/b"


@pytest.mark.parametrize(
    "dataset, folder",
    [
        ("roneneldan/TinyStories", "data/TinyStories"), ("toy", "data/toy"), ("/a/train.txt", "data/train"),
        ("x.jsonl", "data/x"), ("../stories/", "data/stories"), ("v1.5", "data/v1.5"),
    ],
)  # fmt: skip
def test_default_data_dir(dataset, folder):
    assert default_data_dir(dataset) == folder


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().n_layer = 7


# ------------------------------------------------------------------------------------------
# Values


def text_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag_that_takes_its_own_default(field):
    value = getattr(Config(), field.name)
    value = (7 if "int" in str(field.type) else "a/path") if value is None else value
    parsed = typed(f"--{field.name}", text_of(value))
    assert parsed == {field.name: value} and type(parsed[field.name]) is type(value)


def test_flags_that_are_not_typed_are_not_set():
    assert typed() == {}


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_a_boolean_takes_true_or_false(text, value):
    assert config("--bias", text).bias is value


def test_a_whole_number_is_a_number_too():
    c = config("--learning_rate", "1")
    assert c.learning_rate == 1.0 and type(c.learning_rate) is float
    assert type(Config(grad_clip=1).grad_clip) is float


def test_the_last_of_a_repeated_flag_wins():
    assert config("--seed", "1", "--seed", "2").seed == 2
    assert config("--preset", "reference", "--preset", "demo").preset == "demo"


def test_a_value_may_stand_behind_an_equals_sign():
    assert config("--seed=5", "--eps=1e-6") == Config(seed=5, eps=1e-6)


@pytest.mark.parametrize(
    "flag, text, allowed",
    [
        ("eps", "nan", "more than 0"), ("eps", "inf", "more than 0"), ("eps", "0", "more than 0"), ("eps", "tiny", "a number"),
        ("learning_rate", "-1e-4", "more than 0"), ("learning_rate", "1e999", "more than 0"), ("learning_rate", "-inf", "more than 0"),
        ("learning_rate", "-nan", "more than 0"), ("min_lr", "-.5", "0 or more"), ("min_lr", "nan", "0 or more"),
        ("weight_decay", "-0.1", "0 or more"), ("grad_clip", "-1", "0 or more"), ("beta1", "1", "under 1"), ("beta2", "1.5", "under 1"),
        ("dropout", "1", "under 1"), ("dropout", "-0.1", "from 0"), ("warmup_start_factor", "1.1", "from 0 to 1"),
        ("n_layer", "0", "1 or more"), ("n_layer", "-3", "1 or more"), ("n_layer", "2.5", "whole number"),
        ("n_head", "six", "whole number"), ("n_head", "0", "1 or more"), ("n_embd", "0", "1 or more"),
        ("block_size", "0", "1 or more"), ("block_size", "", "whole number"),
        ("vocab_size", "65537", "65536"), ("vocab_size", "0", "from 1"), ("batch_size", "0", "1 or more"),
        ("gradient_accumulation_steps", "0", "1 or more"), ("device_batch_size", "0", "1 or more"), ("device_batch_size", "None", "whole"),
        ("max_iters", "1e4", "whole number"), ("max_iters", "0", "1 or more"), ("warmup_iters", "-1", "0 or more"),
        ("lr_decay_iters", "0", "1 or more"), ("eval_interval", "0", "1 or more"), ("eval_iters", "0", "1 or more"),
        ("checkpoint_minutes", "0", "more than 0"), ("seed", "-1", "from 0"), ("seed", str(2**63), str(2**63 - 1)),
        ("bias", "maybe", "true or false"), ("bias", "1", "true or false"), ("compile", "maybe", "auto, true, false"),
        ("gelu", "relu", "exact, tanh"), ("device", "gpu", "cuda:N"), ("device", "cuda:x", "cuda:N"), ("dtype", "int8", "bfloat16"),
        ("out_dir", "", "a path"), ("data_dir", " ", "a path"), ("plot_dir", "", "a path"), ("dataset", "", "a path"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_name_value_and_what_is_allowed(flag, text, allowed):
    line = refused(f"--{flag}", text)
    assert flag in line and allowed in line
    assert text in line or repr(float(text)) in line  # -1e-4 may be told as -0.0001


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 1.0}, {"n_layer": True}, {"n_layer": "6"}, {"n_layer": None}, {"learning_rate": "1e-4"}, {"learning_rate": True},
        {"learning_rate": math.nan}, {"bias": 1}, {"bias": None}, {"gelu": None}, {"data_dir": 3}, {"preset": "nothing"},
        {"dtype": "float8"}, {"lr_decay_iters": 5.0},
    ],
)  # fmt: skip
def test_a_config_built_in_python_is_checked_as_well(changes):
    with pytest.raises(UserError) as mistake:
        Config(**changes)
    ((name, value),) = changes.items()
    assert name in str(mistake.value) and repr(value) in str(mistake.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--n_embd 30 --n_head 4", ["n_head", "4", "n_embd", "30", "divide"]),
        ("--lr_decay_iters 999", ["lr_decay_iters", "999", "warmup_iters", "1000"]),
        ("--warmup_iters 50 --max_iters 60 --lr_decay_iters 40", ["lr_decay_iters", "40", "warmup_iters", "50"]),
    ],
)
def test_a_combination_that_cannot_be_is_refused_with_names_and_values(argv, words):
    line = refused(*argv.split())
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    "argv",
    [
        "--max_iters 100",  # below warmup_iters
        "--max_iters 100 --lr_decay_iters 10000", "--lr_decay_iters 5000", "--lr_decay_iters 1000", "--warmup_iters 0 --lr_decay_iters 1",
        "--warmup_iters 10000", "--device_batch_size 100000", "--eval_interval 20000", "--min_lr 0 --weight_decay 0 --grad_clip 0",
        "--dropout 0 --beta1 0 --beta2 0 --warmup_start_factor 0",
        "--device cuda:3 --dtype float16 --compile true",  # whether they are there is not the config's question
    ],
)  # fmt: skip
def test_unusual_values_that_make_sense_are_taken(argv):
    config(*argv.split())


# ------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "argv, guess",
    [
        ("--learning-rate 1e-4", "--learning_rate"), ("--batchsize 3", "--batch_size"), ("--resum", "--resume"),
        ("--max_itres=3", "--max_iters"), ("--preset refrence", "reference"), ("--preset demos", "demo"), ("--dtype float61", "float16"),
        ("--gelu exakt", "exact"), ("--compile ture", "true"), ("--device cdua", "cuda"), ("--bias flase", "false"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_answered_with_the_nearest_real_one(argv, guess):
    assert guess in refused(*argv.split())


@pytest.mark.parametrize("abbreviation", ["--learning 1", "--max_it 3", "--resum", "--over", "--prese demo", "--n_l=3"])
def test_abbreviated_flags_are_refused(abbreviation):
    assert f"unknown flag {abbreviation.split()[0].split('=')[0]}" in refused(*abbreviation.split())


def test_a_value_without_a_flag_is_not_called_a_flag():
    assert "'One day' belongs to no flag" in refused("One day")


@pytest.mark.parametrize("argv", ["--max_iters", "--preset", "--out_dir --resume", "stray", "--resume=true", "--preset tuneddd"])
def test_a_malformed_command_line_is_one_line(argv):
    assert argv.split()[0].split("=")[0].lstrip("-") in refused(*argv.split())


def test_resume_and_overwrite_exclude_each_other():
    assert "--overwrite" in refused("--resume", "--overwrite")


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    _, *entries = text.split(" --preset PRESET ")[1].split(" --")  # after the usage, an entry a flag
    entries = {entry.split()[0]: entry for entry in entries}
    for field in FIELDS:
        if field.name == "preset":
            continue
        entry = entries[field.name]
        assert len(entry.split()) > 4, f"{field.name} has no help"
        default = f"(default: {text_of(field.default)})"
        assert (default if field.default is not None else "if not given") in entry, field.name
    assert "--preset PRESET" in text and "(default: reference)" in text and "--resume" in text and "--overwrite" in text


UNITS = {
    "block_size": "tokens", "batch_size": "sequences", "device_batch_size": "sequences", "gradient_accumulation_steps": "iterations",
    "max_iters": "iterations", "warmup_iters": "iterations", "lr_decay_iters": "iteration", "eval_interval": "iterations",
    "eval_iters": "batches", "checkpoint_minutes": "minutes", "dropout": "share", "warmup_start_factor": "share",
    "n_layer": "blocks", "n_head": "heads", "n_embd": "features", "out_dir": "folder", "data_dir": "folder", "plot_dir": "folder",
}  # fmt: skip


@pytest.mark.parametrize("name, unit", UNITS.items())
def test_help_says_the_unit(name, unit):
    assert unit in Config.__dataclass_fields__[name].metadata["help"]


def test_flags_can_be_added_to_any_parser():
    import argparse

    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    assert vars(parser.parse_args(["--n_layer", "3"])) == {"n_layer": 3}


# ------------------------------------------------------------------------------------------
# Errors and files


def test_one_line_takes_out_every_line_end():
    assert one_line("a\n  b\r\nc\td") == "a b c d"


def test_fail_is_one_line_on_stderr_and_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        fail("this and that")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: this and that\n")


@pytest.mark.parametrize(
    "action, status, error",
    [
        ("raise config.UserError('two\\nlines')", 2, "error: two lines\n"),
        ("open('/nonexistent/file')", 2, "error: No such file or directory: /nonexistent/file\n"),
        ("raise OSError('the disk is\\nfull')", 2, "error: the disk is full\n"),
        ("raise KeyboardInterrupt", 130, "\n"),
        ("raise BrokenPipeError", 1, ""),
        ("print('fine')", 0, ""),
    ],
)
def test_run_turns_what_goes_wrong_into_a_line_and_a_status(action, status, error):
    code = f"import config\ndef main(argv):\n    {action}\nconfig.run(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (status, error)


def test_whole_file_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == path.parent
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whole_file_leaves_the_old_file_and_no_debris_on_an_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_whole_file_gives_the_permissions_of_an_ordinary_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.txt") as partial:
            partial.write_text("x")
    finally:
        assert os.umask(before) == umask  # and it leaves the umask as it was
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
