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

import torch

import mdm
import train
from data import arith, runs
from data.runs import fail
from data.text import Vocabulary

GAP = "_"  # marks, in a prompt, a token to be filled in


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--out_dir", help="where train.py wrote its checkpoints [the newest folder in out/]")
    add("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    add("--seed", type=int, help="which seed's model [the smallest there is]")
    add("--prompt", action="append", default=[], help="what is given; may be repeated")
    add("--steps", type=int, help="in how many steps to fill in everything [a step per token]")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest, 1 samples [0]")
    add("--sample_seed", type=int, default=0, help="the seed of these samples [0]")
    add("--show", action="store_true", help="show every step")
    add("--device", default="auto", help="cpu, cuda, mps or auto [auto]")
    args = parser.parse_args(argv)
    for name, least in [("steps", 1), ("temperature", 0), ("sample_seed", 0)]:
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            fail(f"--{name}={value} must be at least {least}, and below 2**63")
    return args


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, with S = 1: (model, its vocabulary, its data set's name)."""
    saved = runs.find_checkpoint(out_dir, method, seed)
    vocabulary = Vocabulary(**saved["vocabulary"])
    model = mdm.GPT(mdm.GPTConfig(**saved["config"]), [torch.Generator()])  # S = 1; its weights go
    model.load_state_dict(saved["weights"])
    return model.to(device), vocabulary, saved["dataset"]


def encode(vocabulary, prompt):
    """Token ids of a prompt, with the mask token's id in its gaps."""
    mask_id = len(vocabulary)
    ids = []
    try:
        for part in prompt.split(GAP):
            ids += [mask_id, *vocabulary.encode(part)]
    except ValueError as e:
        fail(f"prompt '{prompt}': {e}")
    return ids[1:]  # a mask token between any two parts, but none before the first


def check_question(dataset, ids):
    """Refuse a prompt of a wrong length, or with a gap in its question."""
    data = arith.make(dataset)
    question = ids[: data.prompt_len]
    has_gap = len(data.vocabulary) in question
    if has_gap or not data.prompt_len <= len(ids) <= data.test.shape[1]:
        example = data.decode(data.test[0, : data.prompt_len])
        fail(f"a prompt must look like {example}, perhaps with a part of the answer")


def main(argv=None):
    args = parse_args(argv)
    device = train.pick_device(args.device)
    out_dir = os.path.expanduser(args.out_dir or runs.newest_folder() or "out")
    try:
        # A method's own settings belong to the name of its folder: "ppots ppots_fit=grid".
        name, space, own = args.method.partition(" ")
        method = train.method_name(mdm.parse_method(name)) + space + own
    except ValueError as e:
        fail(e)
    model, vocabulary, dataset = load_model(out_dir, method, args.seed, device)
    mask_id = len(vocabulary)
    T = model.config.block_size
    prompts = args.prompt or [""]
    rows = [encode(vocabulary, prompt) for prompt in prompts]
    if model.config.causal and any(mask_id in row for row in rows):
        fail("there are gaps to fill, and an ARM can only go on: use an MDM's --method")
    first = 0  # tokens first ... end - 1 are shown
    end = T
    if dataset in arith.DATASETS:
        for row in rows:
            check_question(dataset, row)
    else:
        # A line feed comes before the user's prompt, as if a line began. It is not shown.
        first = 1
        line_feed = vocabulary.items.index("\n") if "\n" in vocabulary.items else 0  # or any token
        rows = [[line_feed, *row] for row in rows]
        longest = max(map(len, rows))
        if longest > T:
            fail(f"a prompt has {longest - 1} tokens, a block has {T - 1}: shorten it")
        if all(mask_id in row for row in rows):
            end = longest  # fill the gaps, and add nothing after them

    padded = [row + [mask_id] * (T - len(row)) for row in rows]
    x = torch.tensor([padded], device=device)  # (1, rows, T)
    hidden = (x[0, :, :end] == mask_id).any(0)  # in one of the rows
    pos = hidden.nonzero()[:, 0]
    generator = torch.Generator(device).manual_seed(args.sample_seed)
    states = mdm.generate(model, x, pos, args.steps, args.temperature, generator=generator)
    for state in itertools.chain([x], states):  # the first is the prompts alone
        shown = [vocabulary.decode(row[first:end], GAP) for row in state[0].tolist()]
        if args.show:
            print("\n".join(shown), flush=True)
    if not args.show:
        print("\n".join(shown))  # the last state, which is complete
    return 0


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
