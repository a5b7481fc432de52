"""sample.py - let a trained model fill in what is missing.

    python sample.py --method=ppots_mirror --seed=42 --prompt="123+456="
    python sample.py --method=mdm --prompt="123+456=" --show                watch it unmask
    python sample.py --method=mdm --prompt="123+456=_5_9"                   fill in what _ marks
    # with text (train.py --dataset=shakespeare_char):
    python sample.py --method=mdm --temperature=0.8 --steps=16              four tokens a step
    python sample.py --method=mdm --prompt="ROMEO:" --temperature=0.8       go on from a beginning
    python sample.py --method=mdm --prompt="KING ____:" --order=random      fill in, as no ARM can
"""
import argparse
import os
import sys
import time

import torch

import mdm
import train
from data import arith, runs
from data.runs import fail
from data.text import Vocabulary


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sample.py", None, __doc__, formatter_class=raw)
    parser.error = fail
    add = parser.add_argument
    add("--out_dir", help="where train.py wrote its checkpoints (default: the newest in out/)")
    add("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    add("--seed", type=int, help="which seed's model (default: the smallest there is)")
    add("--prompt", action="append", default=[], help="may be repeated (text: default none)")
    add("--file", help="a UTF-8 file with one prompt per line")
    add("--mask_char", default="_", help="marks, in a prompt, what is to be filled in [_]")
    add("--length", type=int, help="text: tokens shown (default: a block, or a prompt with gaps)")
    add("--steps", type=int, help="fewer than tokens: several at once (default: one a step)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest, 1 samples [0]")
    orders = ["confidence", "random", "left"]
    add("--order", choices=orders, default=orders[0], help="what to fill in first [confidence]")
    add("--sample_seed", type=int, default=0, help="of --temperature and --order=random [0]")
    add("--show", action="store_true", help="show every step, animated in a terminal")
    add("--device", default="auto", help="cpu, cuda, mps or auto [auto]")
    args = parser.parse_args(argv)
    for name, least in [("steps", 1), ("length", 1), ("temperature", 0), ("sample_seed", 0)]:
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            fail(f"--{name}={value} must be at least {least}")
    if len(args.mask_char) != 1:
        fail(f"--mask_char={args.mask_char} must be one character")
    if args.file:
        try:
            with open(os.path.expanduser(args.file), encoding="utf-8-sig") as f:
                args.prompt += [line.rstrip("\n") for line in f if line.rstrip("\n")]
        except (OSError, UnicodeDecodeError) as e:
            fail(f"--file={args.file} cannot be read as UTF-8 text: {e}")
    return args


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, with S = 1: (model, its vocabulary, its data set's name)."""
    saved = runs.find_checkpoint(out_dir, method, seed)
    vocabulary = Vocabulary(**saved["vocabulary"])
    model = mdm.GPT(mdm.GPTConfig(**saved["config"]), [torch.Generator()])
    model.load_state_dict(saved["weights"])
    return model.to(device), vocabulary, saved["dataset"]


def encode(vocabulary, prompt, mask_char):
    """Token ids of a prompt, with the mask token's id wherever it has a mask_char."""
    ids = []
    try:
        for part in prompt.split(mask_char):
            ids += [len(vocabulary), *vocabulary.encode(part)]
    except ValueError as e:
        fail(f"prompt '{prompt}': {e}")
    return ids[1:]  # a mask token between any two parts, but none before the first


def arithmetic_row(data, ids, prompt):
    """Complete the token ids to a whole sequence: the rest of the response is masked."""
    T = data.test.shape[1]
    mask_id = len(data.vocabulary)
    if not data.prompt_len <= len(ids) <= T or mask_id in ids[: data.prompt_len]:
        example = data.decode(data.test[0, : data.prompt_len])
        fail(f"--prompt={prompt} must look like {example}, perhaps with a part of the answer")
    return ids + [mask_id] * (T - len(ids))


def text_row(model, vocabulary, ids, prompt):
    """Complete the token ids to a whole sequence. Its first token is a line feed, if there is one,
    because lines begin after it."""
    T = model.config.block_size
    if len(ids) > T - 1:
        fail(f"prompt '{prompt}' has {len(ids)} tokens, a block has {T - 1}: shorten it")
    try:
        first = vocabulary.encode("\n")[:1]
    except ValueError:
        first = [0]
    return first + ids + [len(vocabulary)] * (T - 1 - len(ids))


def show(rows, above):
    """Print the rows in place of the last `above` lines. Returns how many lines they took."""
    content = "\n".join(rows)
    if above:
        time.sleep(0.05)
        content = f"\x1b[{above}A\x1b[J{content}"
    print(content, flush=True)
    return content.count("\n") + 1


def main(argv=None):
    args = parse_args(argv)
    device = train.pick_device(args.device)
    out_dir = os.path.expanduser(args.out_dir or runs.newest_folder() or "out")
    try:
        name, space, own = args.method.partition(" ")  # "ppots ppots_fit=grid"
        method = mdm.method_name(mdm.parse_method(name)) + space + own
    except ValueError as e:
        fail(e)
    model, vocabulary, dataset = load_model(out_dir, method, args.seed, device)
    prompts = args.prompt or [""]
    ids = [encode(vocabulary, prompt, args.mask_char) for prompt in prompts]
    mask_id = len(vocabulary)
    if model.config.causal and any(mask_id in row for row in ids):
        fail("there are gaps to fill, and an ARM can only go on: use an MDM's --method")
    if dataset in arith.DATASETS:
        if args.length:
            fail("--length has an effect on text only: leave it out")
        data = arith.make(dataset)
        rows = [arithmetic_row(data, *pair) for pair in zip(ids, prompts)]
        begin = data.prompt_len  # tokens begin ... end - 1 may be filled in
        first = 0  # tokens first ... end - 1 are shown
        end = model.config.block_size
    else:
        rows = [text_row(model, vocabulary, *pair) for pair in zip(ids, prompts)]
        begin = first = 1
        length = len(rows[0]) - 1
        if all(mask_id in row for row in ids):  # fill the gaps, and add nothing after them
            length = max(len(row) for row in ids)
        end = min(1 + (args.length or length), len(rows[0]))

    def lines(x):
        return [vocabulary.decode(row[first:end], args.mask_char) for row in x[0].tolist()]

    x = torch.tensor([rows], device=device)
    masked = x[0, :, begin:end] == mask_id
    pos = torch.arange(begin, end, device=device)[masked.any(0)]
    above = show(lines(x), 0) if args.show else 0
    generator = torch.Generator(device).manual_seed(args.sample_seed)
    for x in mdm.generate(model, x, pos, args.steps, args.temperature, args.order, generator):
        if args.show:
            above = show(lines(x), above if sys.stdout.isatty() else 0)
    if not args.show:
        show(lines(x), 0)
    return 0


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
