"""sample.py - let a trained model fill in what is missing.

    python sample.py --method=ppots_mirror --seed=42 --prompt="123+456="
    python sample.py --method=mdm --prompt="123+456=" --show                watch it unmask
    python sample.py --method=mdm --prompt="123+456=_5_9"                   fill in what _ marks
    # with text (train.py --dataset=shakespeare_char):
    python sample.py --method=mdm --temperature=0.8 --steps=16              four tokens a step
    python sample.py --method=mdm --prompt="ROMEO:" --temperature=0.8       go on from a beginning
    python sample.py --method=mdm --prompt="KING ____:"                     fill in, as no ARM can
"""
import argparse
import itertools
import os
import sys
import time

import torch

import mdm
import train
from data import arith, runs
from data.runs import fail
from data.text import Vocabulary

GAP = "_"  # marks, in a prompt, a token to be filled in


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sample.py", None, __doc__, formatter_class=raw)
    parser.error = fail
    add = parser.add_argument
    add("--out_dir", help="where train.py wrote its checkpoints [the newest folder in out/]")
    add("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    add("--seed", type=int, help="which seed's model [the smallest there is]")
    add("--prompt", action="append", default=[], help="may be repeated [text: none]")
    add("--steps", type=int, help="fewer than tokens: several at once [one token a step]")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest, 1 samples [0]")
    orders = ["confidence", "left"]
    add("--order", choices=orders, default=orders[0], help="what to fill in first [confidence]")
    add("--sample_seed", type=int, default=0, help="of --temperature [0]")
    add("--show", action="store_true", help="show every step, animated in a terminal")
    add("--device", default="auto", help="cpu, cuda, mps or auto [auto]")
    args = parser.parse_args(argv)
    for name, least in [("steps", 1), ("temperature", 0), ("sample_seed", 0)]:
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            fail(f"--{name}={value} must be at least {least}")
    return args


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, with S = 1: (model, its vocabulary, its data set's name)."""
    saved = runs.find_checkpoint(out_dir, method, seed)
    vocabulary = Vocabulary(**saved["vocabulary"])
    model = mdm.GPT(mdm.GPTConfig(**saved["config"]), [torch.Generator()])
    model.load_state_dict(saved["weights"])
    return model.to(device), vocabulary, saved["dataset"]


def encode(vocabulary, prompt):
    """Token ids of a prompt, with the mask token's id in its gaps."""
    ids = []
    try:
        for part in prompt.split(GAP):
            ids += [len(vocabulary), *vocabulary.encode(part)]
    except ValueError as e:
        fail(f"prompt '{prompt}': {e}")
    return ids[1:]  # a mask token between any two parts, but none before the first


def check_question(dataset, ids):
    """Refuse the tokens of a prompt that is no question of this data set."""
    data = arith.make(dataset)
    has_gap = len(data.vocabulary) in ids[: data.prompt_len]
    if has_gap or not data.prompt_len <= len(ids) <= data.test.shape[1]:
        example = data.decode(data.test[0, : data.prompt_len])
        fail(f"a prompt must look like {example}, perhaps with a part of the answer")


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
    mask_id = len(vocabulary)
    T = model.config.block_size
    rows = [encode(vocabulary, prompt) for prompt in args.prompt or [""]]
    if model.config.causal and any(mask_id in row for row in rows):
        fail("there are gaps to fill, and an ARM can only go on: use an MDM's --method")
    first = 0  # tokens first ... end - 1 are shown
    end = T
    if dataset in arith.DATASETS:
        for row in rows:
            check_question(dataset, row)
    else:
        first = 1  # token 0 is a line feed, if there is one, because lines begin after it
        line_feed = vocabulary.items.index("\n") if "\n" in vocabulary.items else 0
        rows = [[line_feed, *row] for row in rows]
        longest = max(map(len, rows))
        if longest > T:
            fail(f"a prompt has {longest - 1} tokens, a block has {T - 1}: shorten it")
        if all(mask_id in row for row in rows):
            end = longest  # fill the gaps, and add nothing after them

    x = torch.tensor([[row + [mask_id] * (T - len(row)) for row in rows]], device=device)
    hidden = (x[0, :, :end] == mask_id).any(0)
    pos = hidden.nonzero()[:, 0]
    generator = torch.Generator(device).manual_seed(args.sample_seed)
    steps = mdm.generate(model, x, pos, args.steps, args.temperature, args.order, generator)
    above = 0
    for x in itertools.chain([x], steps):  # the last x is complete
        lines = [vocabulary.decode(row[first:end], GAP) for row in x[0].tolist()]
        if args.show:
            above = show(lines, above if sys.stdout.isatty() else 0)
    if not args.show:
        show(lines, 0)
    return 0


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
