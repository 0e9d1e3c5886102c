"""Writes stories with a trained model: `python sample.py --prompt "One day, a cat"`."""

import argparse
import codecs
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from config import DEVICE, DTYPE, SEED, Parser, UserError, at_least, notice, parser_of, run
from model import GPT, generate, load_model
from prepare_data import END_OF_TEXT, tokenizer


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
    found = sorted(Path("out").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no out/*/model.pt yet: train one (python train.py --preset demo), or name one with --checkpoint")
    return str(found[-1])


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


def main(argv: list[str]) -> None:
    args = parse_command_line(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    prompt = read_prompt(args.prompt)
    checkpoint = args.checkpoint or newest_checkpoint()
    model = load_model(checkpoint).to(device, dtype)
    if model.config.vocab_size != tokenizer().n_vocab:
        raise UserError(f"{checkpoint} has {model.config.vocab_size} token ids, not the {tokenizer().n_vocab} of GPT-2's tokenizer")
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
