"""Where the time goes, as ratios measured side by side in one run. Not a test.

    python tests/bench.py                                steps of each method, by number of seeds
    python tests/bench.py --dataset=shakespeare_char     the same at text's sizes
    python tests/bench.py --nanogpt=../nanoGPT           beside nanoGPT's own model, from a clone
    python tests/bench.py --tiny_diffusion=DIR           (with tqdm) train its model on our text;
                                                         score it with our bound, beside an MDM's

All that is compared takes turns, in rounds; every figure is the median over rounds.
"""
import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mdm
import train
from data import machine


def clock(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def our_step(cfg, method, n_seeds, data, device):
    """One step of train.train itself: a function. (clip_per_seed is called once a step.)"""
    marks, clip, evaluate = [], train.clip_per_seed, train.evaluate

    def marked(*args):
        marks.append(clock(device))
        return clip(*args)

    def step():
        train.clip_per_seed, train.evaluate = marked, lambda *_, **quick: {"nll": [9.0] * n_seeds}
        marks.clear()
        for _ in train.train(cfg, method, list(range(n_seeds)), data, device):
            pass
        train.clip_per_seed, train.evaluate = clip, evaluate
        return statistics.median(b - a for a, b in zip(marks[3:], marks[4:]))

    return step


def imported(path, name):
    """A module of somebody's repository, which finds its own neighbours first."""
    sys.path.insert(0, str(Path(path).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        for other in ("model", "sample", "training"):
            sys.modules.pop(other, None)


def nanogpt_step(path, cfg, data, device):
    """One step of nanoGPT's loop at our shape: its model, AdamW, clipping; data from memory."""
    module, T = imported(path, "model"), data.test.shape[1] - 1
    shape = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "dropout": 0.0}
    config = module.GPTConfig(block_size=T, vocab_size=len(data.vocabulary), bias=True, **shape)
    model, train_x = module.GPT(config).to(device), data.train_blocks(device)
    kind = device.split(":")[0]
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.lr, (0.9, 0.98), kind)

    def step():
        times = []
        for _ in range(12):
            began = clock(device)
            x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)].long()
            _, loss = model(x[:, :-1].contiguous(), x[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(clock(device) - began)
        return statistics.median(times[2:])

    return step


def tiny_diffusion(path, cfg, data, device):
    """Train tiny-diffusion's model by its own train_step; then score it on our validation blocks
    with our bound, its mask token's logit off and its time the share of masked tokens."""
    training, V, T = imported(path, "training"), len(data.vocabulary), data.test.shape[1]
    config = training.DiffusionConfig(
        sequence_len=T, vocab_size=V + 1, mask_token_id=V, n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_embd=cfg.n_embd, context_len=1,
    )  # fmt: skip
    torch.manual_seed(42)
    theirs = training.DiffusionTransformer(config).to(device)
    theirs.init_weights()
    schedule = training.MaskedDiffusionSchedule(config.diffusion_steps, V, 1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, weight_decay=cfg.weight_decay)
    train_x, began = data.train_blocks(device), clock(device)
    for step in range(cfg.steps):
        x = train_x[torch.randint(len(train_x), (cfg.batch_size,), device=device)].long()
        training.train_step(theirs, x, schedule, optimizer)
        if step % 500 == 0:
            print(f"  tiny-diffusion step {step}/{cfg.steps}", flush=True)
    seconds = clock(device) - began

    class AsOurs(torch.nn.Module):
        """Their model with our interface: one seed, positions asked for, no mask in the logits."""

        def __init__(self):
            super().__init__()
            self.config = mdm.GPTConfig(V, T, n_embd=cfg.n_embd)
            self.wte = torch.zeros(1, device=device)

        def forward(self, idx, pos):
            share = (idx[0] == V).float().mean(-1) * T / (T - 1)
            t = (share * (config.diffusion_steps - 1)).round().long()
            return theirs(idx[0], t)[None, :, pos, :V]

    theirs.eval()
    nll = train.evaluate(AsOurs(), data)["nll"][0]
    print(f"tiny-diffusion: {nll:.3f} nats per character after {seconds:.0f} s")
    *_, state = train.train(cfg, "mdm", [42], data, device)
    nll = state["curve"][-1]["nll"][0]
    print(f"mdm: {nll:.3f} nats per character after {state['seconds']:.0f} s")


def main():
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", default="1,8", help="numbers of seeds [1,8]")
    parser.add_argument("--methods", default="arm,mdm,ppots_mirror", help="[arm,mdm,ppots_mirror]")
    parser.add_argument("--dataset", default="add3", help="[add3]")
    parser.add_argument("--repeats", type=int, default=5, help="rounds [5]")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--tiny_diffusion", help="a clone of tiny-diffusion")
    args = parser.parse_args()
    device = machine.pick_device("auto")
    name = args.dataset if not args.tiny_diffusion else "shakespeare_char"
    steps = "--steps=2000" if args.tiny_diffusion else "--steps=14"
    flags = [f"--dataset={name}", steps, "--eval_every=2000", "--ppots_refits=1"]
    cfg, methods, _ = train.parse_args([*flags, f"--method={args.methods}"])
    data, rounds = train.load_data(cfg, methods), {}
    if args.tiny_diffusion:
        return tiny_diffusion(args.tiny_diffusion, cfg, data, device)
    steps = {(m, S): our_step(cfg, m, S, data, device) for m in methods
             for S in map(int, args.seeds.split(","))}  # fmt: skip
    if args.nanogpt:
        steps["nanoGPT", 1] = nanogpt_step(args.nanogpt, cfg, data, device)
    for _ in range(args.repeats):
        for key, step in steps.items():
            rounds.setdefault(key, []).append(step())
    ms = {key: 1e3 * statistics.median(times) for key, times in rounds.items()}
    print(f"{name}, {torch.get_num_threads()} threads on {device}, torch {torch.__version__}")
    print(f"{'method':14}{'seeds':>6}{'ms/step':>9}{'per seed':>9}{'x nanoGPT per seed':>20}")
    for (method, S), t in ms.items():
        beside = t / S / ms["nanoGPT", 1] if args.nanogpt else float("nan")
        print(f"{method:14}{S:6}{t:9.2f}{t / S:9.2f}{beside:20.2f}")


if __name__ == "__main__":
    main()
