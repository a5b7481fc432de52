"""sample.py - ask a trained model.

    python sample.py --out_dir=out --method=ppots_mirror --seed=42 --prompt="123+456="
    python sample.py --method=mdm --prompt="123+456=" --show                watch it unmask
    python sample.py --method=mdm --prompt="123+456=_5_9"                   `_` marks what is to be filled in
    python sample.py --method=arm --file=prompts.txt                        one prompt per line; ARMs go left to right

Text (a model trained with --dataset=FILE or shakespeare_char):

    python sample.py --method=mdm --temperature=0.8 --steps=16              a block from nothing, four tokens a step
    python sample.py --method=mdm --prompt="ROMEO:" --temperature=0.8       go on from a beginning
    python sample.py --method=mdm --prompt="KING ____:" --order=random      fill in the gaps, which no ARM can
"""
import argparse
import math
import os
import shutil
import sys
import time

import torch

import mdm
import train
from data import arith
from data.text import Vocabulary


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out_dir", default="out", help="where train.py wrote its checkpoints [out]")
    parser.add_argument("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    parser.add_argument("--seed", type=int, help="which seed's model (default: the first one trained)")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated (text: default none)")
    parser.add_argument("--file", help="a UTF-8 text file with one prompt per line")
    parser.add_argument("--mask_char", default="_", help="the character that marks, in a prompt, what is to be filled in [_]")
    parser.add_argument("--length", type=int, help="text: tokens to show (default: the prompt's, if it has gaps, else block_size)")
    parser.add_argument("--steps", type=int, help="denoising steps; when fewer than tokens, several are filled in at once (default: one a step)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 samples from the model [0]")
    orders = ["confidence", "random", "left"]
    parser.add_argument("--order", choices=orders, default="confidence", help="which tokens an MDM fills in first [confidence]")
    parser.add_argument("--sample_seed", type=int, default=0, help="seed of --temperature and --order=random [0]")
    parser.add_argument("--show", action="store_true", help="show every step: animated in a terminal, else one line each")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto [auto]")
    parser.error = lambda message: sys.exit(train.fail(message))
    return parser.parse_args(argv)


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, S = 1, as trained: (model, its vocabulary, its settings). Raises UserError."""
    path = train.checkpoint_path(out_dir, method)
    checkpoint = train.load_checkpoint(path)
    try:
        cfg, seeds, weights = train.Config(**checkpoint["config"]), checkpoint["seeds"], checkpoint["state"]["model"]
        vocabulary = Vocabulary(**checkpoint["vocabulary"])
        row = 0 if seed is None else seeds.index(seed)
        config = mdm.GPTConfig(len(vocabulary), weights["wpe"].shape[1], cfg.n_layer, cfg.n_head, cfg.n_embd, "arm" in method)
        model = mdm.GPT(config, [torch.Generator()])
        model.load_state_dict({k: v[row : row + 1] for k, v in weights.items()})
    except ValueError:
        raise train.UserError(f"--seed={seed} was not trained there; trained seeds: {', '.join(map(str, seeds))}") from None
    except (TypeError, KeyError, RuntimeError):
        raise train.UserError(f"{path} is of another version of this program; train again") from None
    return model.to(device), vocabulary, cfg


def encode(vocabulary, prompt, mask_char):
    """Token ids of a prompt, with the mask token wherever it has a mask_char. Raises UserError."""
    ids = []
    for i, part in enumerate(prompt.split(mask_char)):
        try:
            ids += ([len(vocabulary)] if i else []) + vocabulary.encode(part)
        except ValueError as e:
            raise train.UserError(f"prompt '{prompt}': {e}") from None
    return ids


def problem(data, T, prompt, mask_char):
    """Arithmetic: a prompt's T token ids, the missing rest of the answer masked. Raises UserError."""
    ids, example = encode(data.vocabulary, prompt, mask_char), data.decode(data.train[0, : data.prompt_len])
    if not data.prompt_len <= len(ids) <= T:
        wanted = f"{data.prompt_len}, like {example} (or up to {T} with part of the answer)"
        raise train.UserError(f"prompt '{prompt}' has {len(ids)} characters; {data.name} wants {wanted}")
    if len(data.vocabulary) in ids[: data.prompt_len]:
        raise train.UserError(f"prompt '{prompt}': only the response, after {example[-1]!r}, can be filled in")
    return ids + [len(data.vocabulary)] * (T - len(ids))


def passage(vocabulary, T, prompt, mask_char, causal):
    """Text: T token ids, and how many of them to show. The first, which models never predict, is a line feed, as a
    prompt begins a line; what the prompt leaves open is masked. Raises UserError."""
    ids, mask_id = encode(vocabulary, prompt, mask_char), len(vocabulary)
    if len(ids) > T - 1:
        raise train.UserError(f"prompt '{prompt}' has {len(ids)} tokens, the model's blocks have {T - 1}: shorten it")
    if causal and mask_id in ids:
        raise train.UserError(f"prompt '{prompt}' has gaps ({mask_char}): an ARM can only go on from a beginning; use an MDM's --method")
    try:
        first = vocabulary.encode("\n")[:1]
    except ValueError:
        first = [0]
    return first + ids + [mask_id] * (T - 1 - len(ids)), len(ids) if mask_id in ids else T - 1


def show(rows, animate, n_shown):
    """Print the rows; in an animation over the n_shown lines printed last. Returns how many lines that made."""
    text = "\n".join(rows)
    if animate and n_shown:
        time.sleep(0.05)
        text = f"\x1b[{n_shown}A\x1b[J{text}"  # cursor up, clear to the end
    print(text, flush=True)
    width = shutil.get_terminal_size().columns  # longer lines wrap
    return sum(max(1, math.ceil(len(line) / width)) for row in rows for line in row.split("\n"))


def sample(args):
    method = mdm.parse_method(args.method)
    for name in ("steps", "length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise train.UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.temperature < float("inf"):
        raise train.UserError(f"--temperature must be at least 0, not {args.temperature}")
    if not 0 <= args.sample_seed < 2**63:
        raise train.UserError(f"--sample_seed must be at least 0 and below 2^63, not {args.sample_seed}")
    if len(args.mask_char) != 1:
        raise train.UserError(f"--mask_char must be one character, not '{args.mask_char}'")
    prompts = list(args.prompt)
    if args.file:
        try:
            with open(args.file, encoding="utf-8-sig") as f:
                prompts += [line for line in f.read().splitlines() if line]
        except (OSError, UnicodeDecodeError) as e:
            raise train.UserError(f"--file={args.file} cannot be read as UTF-8 text: {getattr(e, 'strerror', None) or e}") from None
    device = train.pick_device(args.device)
    model, vocabulary, cfg = load_model(args.out_dir, method, args.seed, device)
    T = model.config.block_size
    if train.is_text(cfg.dataset):
        rows, shown = zip(*[passage(vocabulary, T, p, args.mask_char, model.config.causal) for p in prompts or [""]])
        first, end = 1, 1 + min(args.length or max(shown), T - 1)
    else:
        if not prompts:
            raise train.UserError('no prompt: give --prompt="..." or --file=...')
        data = arith.make(cfg.dataset)
        rows, first, end = [problem(data, T, p, args.mask_char) for p in prompts], 0, T
    pos = torch.arange(1 if train.is_text(cfg.dataset) else data.prompt_len, end, device=device)
    generator = torch.Generator(device).manual_seed(args.sample_seed)
    lines = lambda x: [vocabulary.decode(row[first:end], args.mask_char) for row in x[0].tolist()]
    n_tokens, n_passes, began = 0, 0, time.perf_counter()
    for part in torch.tensor([rows], device=device).split(train.rows_at_once(model, len(pos)), 1):
        n, passes = fill_in(model, part, pos, args, generator, lines)
        n_tokens, n_passes = n_tokens + n, n_passes + passes * part.shape[1]
    print(f"{n_tokens / len(rows):g} tokens a sequence in {n_passes / len(rows):g} forward passes: {n_tokens / max(1, n_passes):.2f} tokens per pass, "
          f"{n_tokens / (time.perf_counter() - began):.0f} tokens/s", file=sys.stderr)  # fmt: skip
    return 0


def fill_in(model, x, pos, args, generator, lines):
    """Generate and print one batch, x (1, B, T). Returns the tokens filled in and the forward passes it took."""
    masked = x[0][:, pos] == model.config.vocab_size
    pos, most = pos[masked.any(0)], int(masked.sum(1).max())
    animate, n_shown, n_passes = sys.stdout.isatty(), 0, 0
    if args.show:
        n_shown = show(lines(x), animate, 0)
    steps = min(args.steps or most, most)
    for x in mdm.generate(model, x, pos, steps, args.temperature, args.order, generator) if most else ():
        n_passes += 1
        if args.show:
            n_shown = show(lines(x), animate, n_shown)
    if not args.show:
        show(lines(x), False, 0)
    return int(masked.sum()), n_passes


def main(argv=None):
    args = parse_args(argv)
    try:
        return sample(args)
    except (train.UserError, ValueError) as e:
        return train.fail(e)
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError) as e:
        if not train.out_of_memory(e):
            raise
        return train.fail("out of memory: give fewer prompts at a time")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
