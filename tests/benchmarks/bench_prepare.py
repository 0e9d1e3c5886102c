"""Tokenizing speed: `python -m tests.benchmarks.bench_prepare [--repeats N] [--text FILE]`.

`prepare` (read, encode, write, hash) against tiktoken's batch encoder alone on stories that are
in memory already, and against `datasets.map` and a loop of writes. Without a FILE, the toy corpus.
"""

import functools
import os
import tempfile
from pathlib import Path

from config import add_flag, cli

import numpy as np

from prepare_data import SEPARATOR, THREADS, prepare, tokenizer, toy_stories
from tests.benchmarks.harness import Works, bench_parser, machine, measure, show


def ours(text: Path, folder: Path) -> Works:
    tokenizer()
    return {"": lambda: prepare(str(text), folder / "ours", val_fraction=0.001, overwrite=True)}


def tiktoken_alone(text: Path, folder: Path) -> Works:
    stories = [story.strip() for story in text.read_text(encoding="utf-8").split(SEPARATOR)]
    encoding = tokenizer()
    return {"": lambda: encoding.encode_ordinary_batch(stories, num_threads=THREADS)}


def datasets_map(text: Path, folder: Path) -> Works:
    """The notebook's way: map over single stories in worker processes, then write shard by
    shard.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer()  # forked workers have it from here
    stories = [story.strip() for story in text.read_text(encoding="utf-8").split(SEPARATOR)]
    data = datasets.Dataset.from_dict({"text": stories})

    def work() -> None:
        encoded = data.map(tokens_of, remove_columns=["text"], num_proc=os.cpu_count())
        total = sum(encoded["len"])
        file = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at = 0
        for number in range(1024):
            shard = encoded.shard(num_shards=1024, index=number, contiguous=True)
            shard = shard.with_format("numpy")
            ids = np.concatenate(shard["ids"]) if len(shard) else np.empty(0, np.uint16)
            file[at : at + len(ids)] = ids
            at += len(ids)
        file.flush()

    return {"": work}


def tokens_of(row: dict) -> dict:
    ids = tokenizer().encode_ordinary(row["text"])
    return {"ids": ids, "len": len(ids)}


def main(argv: list[str]) -> None:
    parser = bench_parser(__doc__, 5, dtype=False)
    add_flag(parser, "text", str, None, "stories between <|endoftext|> marks; else the toy corpus")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Path(args.text or folder / "toy.txt")
        if args.text is None:
            text.write_text(SEPARATOR.join(toy_stories()), encoding="utf-8")
        alone = "tiktoken.encode_ordinary_batch alone"
        workers = "datasets.map and a loop of writes"
        setups = {"ours, to files on the disk": ours, alone: tiktoken_alone, workers: datasets_map}
        contenders = {name: functools.partial(setups[name], text, folder) for name in setups}
        timings = measure(contenders, args.repeats)
        size = text.stat().st_size / 1e6
        first, ceiling = (timings[name].median for name in ("ours, to files on the disk", alone))
        rows = [timing.cells(name, size, first, ceiling) for name, timing in timings.items()]
        rows[-1][5] = "-"  # the workers' memory is in processes of their own, and not counted
    print(machine())
    columns = ["", "median", "spread", "MB/s", "time, ours 1", "peak memory", "of tiktoken alone"]
    show(f"{size:.1f} MB of stories to token ids, {THREADS} threads", columns, rows)


if __name__ == "__main__":
    cli(main)
