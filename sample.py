"""sample.py - ask a trained model.

    python sample.py --method=ppots_mirror --seed=42 --prompt="123+456="
    python sample.py --method=mdm --prompt="123+456=" --show                watch it unmask
    python sample.py --method=mdm --prompt="123+456=_5_9"                   fill in what _ marks
    # with text (train.py --dataset=shakespeare_char):
    python sample.py --method=mdm --temperature=0.8 --steps=16              four tokens a step
    python sample.py --method=mdm --prompt="ROMEO:" --temperature=0.8       go on from a beginning
    python sample.py --method=mdm --prompt="KING ____:" --order=random      fill in, as no ARM can
"""
import argparse
import sys
import time

import torch

import mdm
import train
from data import arith, machine
from data.machine import fail
from data.text import Vocabulary


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sample.py", None, __doc__, formatter_class=raw)
    parser.error = fail
    add = parser.add_argument
    add("--out_dir", default="out", help="where train.py wrote its checkpoints [out]")
    add("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    add("--seed", type=int, help="which seed's model (default: the first one trained)")
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
    counts = [1 if n is None else n for n in (args.steps, args.length)]
    good = min(counts) > 0 and args.temperature >= 0 and 0 <= args.sample_seed < 2**63
    if not good or len(args.mask_char) != 1:
        fail("--steps and --length start at 1, others at 0, and --mask_char is one character")
    if args.file:
        try:
            with open(args.file, encoding="utf-8-sig") as f:
                args.prompt += [line for line in f.read().splitlines() if line]
        except (OSError, UnicodeDecodeError) as e:
            fail(f"--file={args.file} cannot be read as UTF-8 text: {e}")
    return args


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, with S = 1: (model, its vocabulary, its data set's name)."""
    saved = machine.find_checkpoint(out_dir, method, seed)
    vocabulary, T = Vocabulary(**saved["vocabulary"]), saved["weights"]["wpe"].shape[1]
    shape = len(vocabulary), T, saved["n_layer"], saved["n_head"], saved["n_embd"], "arm" in method
    model = mdm.GPT(mdm.GPTConfig(*shape), [torch.Generator()])
    model.load_state_dict(saved["weights"])
    return model.to(device), vocabulary, saved["dataset"]


def encode(vocabulary, prompt, mask_char):
    """Token ids of a prompt, the mask token's wherever it has a mask_char."""
    ids = []
    try:
        for part in prompt.split(mask_char):
            ids += [len(vocabulary), *vocabulary.encode(part)]
    except ValueError as e:
        fail(f"prompt '{prompt}': {e}")
    return ids[1:]


def problem(data, ids, prompt):
    """Arithmetic: T token ids, the missing rest of the response masked."""
    T, mask_id = data.test.shape[1], len(data.vocabulary)
    if not data.prompt_len <= len(ids) <= T or mask_id in ids[: data.prompt_len]:
        example = data.decode(data.test[0, : data.prompt_len])
        fail(f"prompt '{prompt}' is not like {example}, or that with a part of the answer")
    return ids + [mask_id] * (T - len(ids))


def passage(model, vocabulary, ids, prompt):
    """Text: T token ids; the first is given, a line feed, as lines begin after one."""
    T, mask_id = model.config.block_size, len(vocabulary)
    if len(ids) > T - 1:
        fail(f"prompt '{prompt}' has {len(ids)} tokens, a block has {T - 1}: shorten it")
    first = vocabulary.encode("\n") if "\n" in vocabulary.items else [0]
    return first + ids + [mask_id] * (T - 1 - len(ids))


def show(rows, above):
    """Print the rows, over the `above` lines printed before. Returns how many lines they took."""
    text = "\n".join(rows)
    time.sleep(0.05 if above else 0)
    print(f"\x1b[{above}A\x1b[J{text}" if above else text, flush=True)
    return text.count("\n") + 1


def main(argv=None):
    args = parse_args(argv)
    method, device = train.parse_method(args.method), machine.pick_device(args.device)
    model, vocabulary, dataset = load_model(args.out_dir, method, args.seed, device)
    prompts = args.prompt or [""]
    ids = [encode(vocabulary, prompt, args.mask_char) for prompt in prompts]
    if model.config.causal and len(vocabulary) in sum(ids, []):
        fail("there are gaps to fill, and an ARM can only go on: use an MDM's --method")
    if dataset in arith.DATASETS:
        data = arith.make(dataset)
        rows = [problem(data, *pair) for pair in zip(ids, prompts)]
        begin, first, end = data.prompt_len, 0, model.config.block_size
    else:
        rows = [passage(model, vocabulary, *pair) for pair in zip(ids, prompts)]
        gaps = all(len(vocabulary) in row for row in ids)
        length = args.length or (max(map(len, ids)) if gaps else 10**9)
        begin, first, end = 1, 1, min(1 + length, len(rows[0]))

    def lines(x):
        return [vocabulary.decode(row[first:end], args.mask_char) for row in x[0].tolist()]

    x = torch.tensor([rows], device=device)
    masked = x[0, :, begin:end] == len(vocabulary)
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
    sys.exit(main())
