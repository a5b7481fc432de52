"""sample.py - ask a trained model.

    python sample.py --out_dir=out --method=ppots_mirror --seed=42 --prompt="123+456="
    python sample.py --method=mdm --prompt="123+456=" --show                one line per denoising step
    python sample.py --method=mdm --prompt="123+456=_5_9"                   `_` marks what is to be filled in
    python sample.py --method=arm --file=prompts.txt                        one prompt per line; ARMs go left to right
"""
import argparse
import sys

import torch

import mdm
import train
from data import arith


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out_dir", default="out", help="where train.py wrote its checkpoints [out]")
    parser.add_argument("--method", default="ppots_mirror", help="which method's model [ppots_mirror]")
    parser.add_argument("--seed", type=int, help="which seed's model (default: the first one trained)")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--file", help="a UTF-8 text file with one prompt per line")
    parser.add_argument("--steps", type=int, help="denoising steps; when fewer than tokens, several are filled in at once (default: one a step)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 samples from the model [0]")
    orders = ["confidence", "random", "left"]
    parser.add_argument("--order", choices=orders, default="confidence", help="which tokens an MDM fills in first [confidence]")
    parser.add_argument("--sample_seed", type=int, default=0, help="seed of --temperature and --order=random [0]")
    parser.add_argument("--show", action="store_true", help="print the sequence after every step")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto [auto]")
    parser.error = lambda message: sys.exit(train.fail(message))
    return parser.parse_args(argv)


def load_model(out_dir, method, seed=None, device="cpu"):
    """One seed's model, S = 1, as trained, and its data set: (model, data). Raises UserError."""
    path = train.checkpoint_path(out_dir, method)
    checkpoint = train.load_checkpoint(path)
    try:
        cfg, seeds = train.Config(**checkpoint["config"]), checkpoint["seeds"]
    except TypeError:
        raise train.UserError(f"{path} is of another version of this program; train again") from None
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise train.UserError(f"--seed={seed} was not trained there; trained seeds: {', '.join(map(str, seeds))}")
    data = arith.make(cfg.dataset)
    model, _ = train.build(cfg, method, [seed], data, "cpu")
    row = seeds.index(seed)
    model.load_state_dict({k: v[row : row + 1] for k, v in checkpoint["state"]["model"].items()})
    return model.to(device), data


def encode_prompt(data, prompt):
    """Token ids of a prompt, a list of length T, with mask tokens for the rest and wherever it has a `_`. Raises UserError."""
    T, example = data.train.shape[1], data.decode(data.train[0, : data.prompt_len])
    if not data.prompt_len <= len(prompt) <= T:
        wanted = f"{data.prompt_len}, like {example} (or up to {T} with part of the answer)"
        raise train.UserError(f"prompt '{prompt}' has {len(prompt)} characters; {data.name} wants {wanted}")
    ids = []
    for c in prompt.ljust(T, "_"):
        try:
            ids += [len(data.chars)] if c == "_" else data.encode(c)
        except ValueError as e:
            raise train.UserError(f"prompt '{prompt}': {e}") from None
    if len(data.chars) in ids[: data.prompt_len]:
        raise train.UserError(f"prompt '{prompt}': only the response, after {example[-1]!r}, can be filled in")
    return ids


def sample(args):
    method = mdm.parse_method(args.method)
    if args.steps is not None and args.steps < 1:
        raise train.UserError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.temperature < float("inf"):
        raise train.UserError(f"--temperature must be at least 0, not {args.temperature}")
    prompts = list(args.prompt)
    if args.file:
        try:
            with open(args.file, encoding="utf-8") as f:
                prompts += [line for line in f.read().splitlines() if line]
        except (OSError, UnicodeDecodeError) as e:
            raise train.UserError(f"--file={args.file} cannot be read as UTF-8 text: {getattr(e, 'strerror', None) or e}") from None
    if not prompts:
        raise train.UserError('no prompt: give --prompt="..." or --file=...')
    device = train.pick_device(args.device)
    model, data = load_model(args.out_dir, method, args.seed, device)
    x = torch.tensor([[encode_prompt(data, p) for p in prompts]], device=device)
    pos = torch.arange(data.prompt_len, x.shape[2], device=device)
    generator = torch.Generator(device).manual_seed(args.sample_seed)
    if args.show:
        print("\n".join(data.decode(row) for row in x[0]))
    for x in mdm.generate(model, x, pos, args.steps, args.temperature, args.order, generator):
        if args.show:
            print("\n".join(data.decode(row) for row in x[0]))
    if not args.show:
        print("\n".join(data.decode(row) for row in x[0]))
    return 0


def main(argv=None):
    args = parse_args(argv)
    try:
        return sample(args)
    except (train.UserError, ValueError) as e:
        return train.fail(e)


if __name__ == "__main__":
    sys.exit(main())
