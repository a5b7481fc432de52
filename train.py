"""train.py - does variance reduction make masked diffusion training stable? Train and compare.

    python train.py                                        ARM, MDM, P-POTS+MIRROR, three seeds
    python train.py --method=ppots_mirror                  one method (pposts_mirror is the same)
    python train.py --method=mdm,mdm_batch2,multi2,mirror  MIRROR, and controls of the same cost
    python train.py --n_seeds=32                           32 seeds, trained as one batch
    python train.py --dataset=shakespeare_char             text; or --dataset=FILE for any of yours
                     (defaults for text: n_layer 4, n_embd 128, batch_size 12, steps 2000)
    python train.py --report                               tables and figures of the newest results
    torchrun --nproc_per_node=2 train.py --n_seeds=32      share the seeds over processes or GPUs

A method is arm, mdm, or words joined by _ that say what is changed in the MDM (see mdm.py):
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

import mdm
from data import arith, runs, text
from data.results import report, variance
from data.runs import fail

# --------------------------------------------------------------------------------------------------
# Settings. All methods share them: only the estimator differs.


class Setting(NamedTuple):
    name: str
    default: object
    why: str  # its --help
    low: object = None  # limits of a number, or the choices of a word
    high: object = None
    run: bool = True  # it decides numbers: all runs in a folder share it
    only: str = ""  # it has an effect on text, on arithmetic, or on methods with this word only


SETTINGS = [
    # What to train, and on which data.
    Setting("method", "arm,mdm,ppots_mirror", "methods, separated by commas; see above", run=False),
    Setting("seeds", "", "seeds, separated by commas (default: the paper's 42,731,20231)",
            run=False),
    Setting("n_seeds", 0, "how many seeds: the paper's three, then 0,1,2,...", 0, 10**5, False),
    Setting("dataset", "add3", f"{', '.join(arith.DATASETS)}; or shakespeare_char; or a text file"),
    Setting("init_from", "", "fine-tune: start from the arm or mdm in this folder", run=False),
    Setting("init_seed", -1, "the seed to start from (default: the smallest)", -1, 10**18, False),
    Setting("n_train", 0, "scarce data: so many training problems (0: all)", 0, 10**9, only="sums"),
    Setting("n_test", 512, "held-out problems for the last evaluation", 1, 10**6, only="sums"),
    Setting("tokenizer", "char", "char, or a tiktoken encoding such as gpt2", only="text"),
    Setting("block_size", 64, "tokens per sequence, and one before them", 1, 10**6, only="text"),
    # The model.
    Setting("n_layer", 2, "transformer blocks; two suffice for carries", 1, 1000),
    Setting("n_head", 4, "attention heads", 1, 1000),
    Setting("n_embd", 64, "width; enough to solve add3 in seconds a seed", 1, 10**5),
    # The training.
    Setting("steps", 1000, "optimizer steps: the ARM solves add3, MDM seeds disagree", 1, 10**9),
    Setting("batch_size", 64, "sequences per step and seed", 1, 10**6),
    Setting("lr", 3e-3, "peak learning rate", 0, 1e3),
    Setting("warmup", 100, "steps until the peak; then linearly down to 0", 0, 10**9),
    Setting("beta2", 0.98, "AdamW's, for runs as short as these; its beta1 is .9", 0, 1),
    Setting("weight_decay", 0.01, "AdamW's; small, as a model this size hardly overfits", 0, 1e3),
    Setting("grad_clip", 1.0, "largest norm of a seed's gradient", 1e-9, 1e9),
    Setting("eps", 1e-3, "smallest masking rate, as in LLaDA: keeps the variance finite", 0, 0.9),
    Setting("until_nll", 0.0, "stop a method when its mean nll is this low (0: never)", 0, 1e9),
    Setting("eval_every", 250, "steps between evaluations, after which all is saved", 1, 10**9),
    # Settings of single methods.
    Setting("ppots_fit", "epr", "epr, the paper's family, or grid, as measured", ["epr", "grid"],
            only="ppots"),
    Setting("ppots_refits", 10, "pilots in a training: the curve moves", 1, 10**4, only="ppots"),
    Setting("ppots_budget", 0.01, "the pilots' share of the work", 1e-9, 1, only="ppots"),
    Setting("isad_tokens", "", "rare tokens (default: separators; text: the rarest 5 %%)",
            only="isad"),
    # Where and how.
    Setting("out_dir", "", "where all goes (default: out/ and what differs from the defaults)",
            run=False),
    Setting("resume", False, "go on from the checkpoints, to the same numbers", run=False),
    Setting("report", False, "train nothing: tables and figures; --out_dir=a,b draws both in one",
            run=False),
    Setting("variance", False, "measure A, B, C of many methods at the plain MDM's weights",
            run=False),
    Setting("baseline", "mdm", "the method that all others are compared with", run=False),
    Setting("device", "auto", "cpu, cuda, cuda:1, mps; auto takes the best there is"),
    Setting("compile", False, "torch.compile the loss"),
]
TEXT_DEFAULTS = {"n_layer": 4, "n_embd": 128, "batch_size": 12, "steps": 2000}  # nanoGPT's on a CPU
PAPER_SEEDS = [42, 731, 20231]


def defaults(dataset):
    values = {s.name: s.default for s in SETTINGS}
    return values if dataset in arith.DATASETS else values | TEXT_DEFAULTS


def parse_args(argv=None):
    """The command line: settings (with those of them that were given), methods and seeds."""
    words = {**mdm.MASKING, **mdm.TRAINING}
    about = __doc__ + "\n".join(f"    {word:8} {what}" for word, what in words.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", None, about, formatter_class=raw)
    parser.allow_abbrev = False
    parser.error = fail
    for s in SETTINGS:
        kind = {"action": "store_true"}
        if s.default is not False:
            kind = {"type": type(s.default), "metavar": type(s.default).__name__}
        where = f"{s.only}: " if s.only else ""
        default = f" [{s.default}]" if s.default else ""
        why = where + s.why + default
        parser.add_argument(f"--{s.name}", default=argparse.SUPPRESS, help=why, **kind)
    given = vars(parser.parse_args(argv))
    for name in ("out_dir", "init_from", "dataset"):
        if name in given:
            given[name] = os.path.expanduser(given[name])
    cfg = argparse.Namespace(**defaults(given.get("dataset", "add3")) | given)
    try:
        methods = [mdm.method_name(mdm.parse_method(name)) for name in cfg.method.split(",")]
        cfg.baseline = mdm.method_name(mdm.parse_method(cfg.baseline))
    except ValueError as e:
        fail(e)
    methods = list(dict.fromkeys(methods))
    seeds = parse_seeds(cfg)
    check_values(cfg)
    check_effects(cfg, given, methods)
    return cfg, methods, seeds


def parse_seeds(cfg):
    if not cfg.seeds:
        others = [seed for seed in range(cfg.n_seeds) if seed not in PAPER_SEEDS]
        return (PAPER_SEEDS + others)[: cfg.n_seeds or 3]
    seeds = cfg.seeds.split(",")
    whole = all(seed.isdecimal() and len(seed) < 19 for seed in seeds)
    if not whole or len(set(map(int, seeds))) < len(seeds):
        fail(f"--seeds={cfg.seeds}: give different whole numbers, commas between")
    if cfg.n_seeds:
        fail("--seeds says which seeds, --n_seeds how many: give one of them")
    return [int(seed) for seed in seeds]


def check_values(cfg):
    for s in SETTINGS:
        value = getattr(cfg, s.name)
        if isinstance(s.low, list):
            if value not in s.low:
                fail(f"--{s.name}={value} is none of {', '.join(s.low)}")
        elif s.low is not None and not s.low <= value <= s.high:
            fail(f"--{s.name}={value} is not between {s.low} and {s.high}")
    if cfg.n_embd % (2 * cfg.n_head):
        fail(f"--n_embd={cfg.n_embd} is no multiple of twice --n_head={cfg.n_head}")


def check_effects(cfg, given, methods):
    """Refuse settings and words that would change nothing."""
    kind = "sums" if cfg.dataset in arith.DATASETS else "text"
    words = set().union(*map(mdm.parse_method, methods))
    for s in SETTINGS:
        if s.name in given and s.only and s.only not in {kind} | words:
            fail(f"--{s.name} has an effect on {s.only} only, and there is none: leave it out")
    if "init_seed" in given and not cfg.init_from:
        fail("--init_seed has an effect with --init_from only: leave it out")
    for method in methods:
        words = mdm.parse_method(method)
        if "strats" in words and mdm.n_strata(cfg.batch_size * mdm.work(words).batch) == 1:
            fail(f"{method}: --batch_size={cfg.batch_size} has no strata: take 4, 9 or 64, say")


def load_data(cfg, methods):
    """The data set, an arith.Arithmetic or a text.Text, if the methods make sense on it."""
    try:
        if cfg.dataset in arith.DATASETS:
            data = arith.make(cfg.dataset, cfg.n_train, cfg.n_test)
        else:
            data = text.make(cfg.dataset, cfg.block_size, cfg.tokenizer)
        data.isad = data.encode(cfg.isad_tokens) if cfg.isad_tokens else data.rare
    except ValueError as e:
        fail(e)
    words = set().union(*map(mdm.parse_method, methods))
    response = data.test[:, data.prompt_len :]
    if "isad" in words and not torch.isin(response, torch.tensor(data.isad).long()).any():
        fail(f"isad: none of its tokens is in a response of {cfg.dataset}: see --isad_tokens")
    if "syrm" in words and not data.structural:
        fail(f"syrm hides symbols of the prompt, and there are none in {cfg.dataset}")
    return data


# --------------------------------------------------------------------------------------------------
# Randomness. Every random number comes from a stream named by (seed, purpose, part). So the draws
# of a seed depend on no other seed, and --resume needs no state of a generator.

PURPOSES = ["init", "data", "rate", "mask", "pilot"]


def stream(seed, purpose, part=0, device="cpu"):
    key = np.random.SeedSequence([seed, PURPOSES.index(purpose), part]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(key[0]))


def epochs(seed, first, count, n_train, device):
    """Places first ... first + count - 1 of an endless row of epochs, (count,). Each epoch is a
    permutation of the n_train problems. A batch may hold the end of one and the start of the next,
    so no problem is left out."""
    order = []
    for epoch in range(first // n_train, (first + count - 1) // n_train + 1):
        draw = stream(seed, "data", epoch, device)
        order.append(torch.randperm(n_train, generator=draw, device=device))
    start = first % n_train
    return torch.cat(order)[start : start + count]


def random_numbers(words, seeds, first_step, B, n, n_train, in_epochs, device):
    """For each step from first_step on: idx and u (S, B), and r (S, B, n), multi2: (2, S, B, n).
    They are drawn for a block of steps at a time, as a few large draws are faster than many small
    ones. The block's length must not depend on the seeds, or else a seed's numbers would."""
    K = max(1, min(64, 2**20 // (B * n)))  # steps in a block
    r_shape = (2, B, n) if "multi2" in words else (B, n)
    for block in itertools.count(first_step // K):
        idx, u, r = [], [], []
        for seed in seeds:
            if in_epochs:
                idx.append(epochs(seed, block * K * B, K * B, n_train, device).view(K, B))
            else:
                draw = stream(seed, "data", block, device)
                idx.append(torch.randint(n_train, (K, B), generator=draw, device=device))
            draw = stream(seed, "rate", block, device)
            u.append(1 - torch.rand(K, B, generator=draw, device=device))  # in (0, 1]
            draw = stream(seed, "mask", block, device)
            r.append(torch.rand(K, *r_shape, generator=draw, device=device))
        idx = torch.stack(idx, 1)
        u = torch.stack(u, 1)
        r = torch.stack(r, -3)
        for i in range(K):
            if block * K + i >= first_step:
                yield idx[i], u[i], r[i]


# --------------------------------------------------------------------------------------------------
# Training.


def build(cfg, method, seeds, data, device):
    """The models, one row for each seed, and the positions (n,) that are hidden and predicted."""
    words = mdm.parse_method(method)
    V = len(data.vocabulary)
    T = data.test.shape[1]
    causal = "arm" in words
    config = mdm.GPTConfig(V, T, cfg.n_layer, cfg.n_head, cfg.n_embd, causal)
    model = mdm.GPT(config, [stream(seed, "init") for seed in seeds])
    pos = list(range(data.prompt_len, T))
    if "syrm" in words:  # the prompt's symbols are hidden and predicted too
        pos = [*data.structural, *pos]
    return model.to(device), torch.tensor(pos, device=device)


def learning_rate(cfg, step, steps):
    # 1) linear warm-up
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    # 2) then linear decay, to 0 at the end
    return cfg.lr * (steps - step) / (steps - cfg.warmup)


def sequence_loss(model, words, x0, pos, u, r, table, rare, eps):
    """The loss of each sequence, (S, B), for x0 (S, B, T)."""
    if "arm" in words:
        return mdm.token_nll(model, x0, pos).mean(-1)
    is_rare = torch.isin(x0[..., pos], rare) if "isad" in words else None
    masking = words & mdm.MASKING.keys()
    mask, weight = mdm.draw_masks(masking, u, r, table, eps, is_rare)
    return mdm.method_loss(model, x0, pos, mask, weight)


def new_state(seeds, steps, device):
    """The state of a training that has not begun. A checkpoint holds this, and weights."""
    return {
        "step": 0,
        "steps": steps,
        "done": False,
        "curve": [],  # a dictionary for each evaluation, with a number for each seed
        "diverged": torch.zeros(len(seeds), device=device),  # the step when a seed did, or 0
        "gradclip": torch.zeros(len(seeds), device=device),  # steps whose gradient was clipped
        "table": torch.zeros(len(seeds), mdm.N_CELLS, device=device),  # P-POTS
        "ema": torch.zeros(len(seeds), 10, device=device),  # EMA's running means, 10 bins
        "pilot": 0,  # sequences that pilots passed through the model
        "seconds": 0.0,
    }


def train(cfg, method, seeds, data, device="cpu", state=None):
    """Train one method for all seeds at once. Yield the state at the start and after every
    evaluation. A yielded state never changes afterwards, and training goes on from any of them.
    state: such a state, or {"model": weights} to begin with. A seed that diverges, because its loss
    or gradient is not finite, gets no more steps and harms no other."""
    words = mdm.parse_method(method)
    work = mdm.work(words)
    B = cfg.batch_size * work.batch
    steps = cfg.steps * work.steps
    model, pos = build(cfg, method, seeds, data, device)
    params = list(model.parameters())
    betas = (0.9, cfg.beta2)
    fused = device != "mps"
    optimizer = torch.optim.AdamW(params, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=fused)

    state = new_state(seeds, steps, device) | (state or {})
    if "model" in state:
        model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    diverged = state["diverged"].to(device)
    gradclip = state["gradclip"].to(device)
    table = state["table"].to(device)
    ema = state["ema"].to(device)

    train_x = data.train_blocks(device)
    rare = torch.tensor(data.isad, dtype=torch.int64, device=device)
    loss_of = torch.compile(sequence_loss) if cfg.compile else sequence_loss
    refit_every, n_pilot = pilot_size(cfg, steps, B * work.masks, len(pos))
    in_epochs = isinstance(data, arith.Arithmetic)  # text: random windows
    first = state["step"]
    numbers = random_numbers(words, seeds, first, B, len(pos), len(train_x), in_epochs, device)
    loss_sum = torch.zeros(len(seeds), device=device)
    began = time.perf_counter()

    if not state["curve"]:  # where does training begin?
        scores = evaluate(model, data, quick=True)
        point = {"step": 0, "loss": [None] * len(seeds), **scores}
        state = snapshot(state, model, optimizer, curve=[point])
        yield state

    for step in range(state["step"], steps):
        if "ppots" in words and step % refit_every == 0:
            table = measure_table(cfg, seeds, model, train_x, pos, step, n_pilot)
            state = state | {"pilot": state["pilot"] + n_pilot * min(len(pos), mdm.N_COUNTS)}

        # The loss of each sequence, (S, B).
        idx, u, r = next(numbers)
        x0 = train_x[idx].long()  # (S, B, T)
        loss = loss_of(model, words, x0, pos, u, r, table, rare, cfg.eps)
        if "ema" in words:
            loss, ema = mdm.ema_baseline(loss, u, ema)

        # The gradient. Seeds share no parameter, so from the sum each gets that of its own loss.
        loss = loss.mean(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        healthy = torch.isfinite(loss) & (diverged == 0)
        finite, was_clipped = clip_per_seed(params, healthy, cfg.grad_clip)
        diverged = torch.where((diverged == 0) & ~finite, step + 1, diverged)
        gradclip = gradclip + was_clipped

        # The step.
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step, steps)
        optimizer.step()
        loss_sum = loss_sum + loss.detach()

        # The evaluation.
        done = step + 1
        if done % cfg.eval_every and done < steps:
            continue
        scores = evaluate(model, data, quick=done < steps and not cfg.until_nll)
        mean_loss = loss_sum / (done - state["step"])
        point = {"step": done, "loss": mean_loss.tolist(), **scores}
        reached = cfg.until_nll > 0 and np.mean(scores["nll"]) <= cfg.until_nll
        state = snapshot(
            state, model, optimizer, step=done, curve=[*state["curve"], point],
            done=bool(done == steps or reached or diverged.all()), diverged=diverged,
            gradclip=gradclip, table=table, ema=ema,
            seconds=state["seconds"] + time.perf_counter() - began,
        )  # fmt: skip
        yield state
        if state["done"]:
            break
        loss_sum = torch.zeros_like(loss_sum)
        began = time.perf_counter()


def snapshot(state, model, optimizer, **changes):
    """A new state. Weights are copied, because those of the model go on changing."""
    weights = copy.deepcopy(model.state_dict())
    return state | {"model": weights, "optimizer": copy.deepcopy(optimizer.state_dict())} | changes


def clip_per_seed(params, healthy, max_norm):
    """Scale each seed's gradient to a norm of at most max_norm. Erase it where it is not finite, or
    the seed not healthy (S,). Returns who stays healthy and who was clipped, both (S,) bool."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in params).sqrt()
    healthy = healthy & torch.isfinite(norm)
    scale = torch.where(healthy, (max_norm / (norm + 1e-6)).clamp(max=1), 0)
    for p in params:
        p.grad.nan_to_num_(0, 0, 0).mul_(scale.view(-1, *[1] * (p.dim() - 1)))
    return healthy, healthy & (norm > max_norm)


def pilot_size(cfg, steps, rows, n):
    """P-POTS: the steps between two pilots, and the sequences of each. Pilots may cost a share
    ppots_budget of the work, where a training step costs three forward passes of its rows.
    A pilot of fewer than 8 sequences says little, so there may be fewer pilots than asked for."""
    sequences = cfg.ppots_budget * 3 * steps * rows / min(n, mdm.N_COUNTS)
    refits = max(1, min(cfg.ppots_refits, int(sequences / 8)))
    return math.ceil(steps / refits), max(8, int(sequences / refits))


def measure_table(cfg, seeds, model, train_x, pos, step, n_pilot):
    """P-POTS' table of each seed, (S, N_CELLS), from n_pilot training sequences."""
    device = train_x.device
    n = len(pos)
    x0, r = [], []
    for seed in seeds:
        draw = stream(seed, "pilot", step, device)
        idx = torch.randint(len(train_x), (n_pilot,), generator=draw, device=device)
        x0.append(train_x[idx].long())
        shape = (n_pilot, min(n, mdm.N_COUNTS), n)
        r.append(torch.rand(shape, generator=draw, device=device))
    counts, H = mdm.pilot(model, torch.stack(x0), pos, torch.stack(r))
    H = H.nan_to_num(0, 0, 0)  # a seed that has diverged needs no table, and must stop no other
    return mdm.ppots_table(counts, H, n, cfg.ppots_fit, cfg.eps)


# --------------------------------------------------------------------------------------------------
# Evaluation on held-out data: the same for every method, and always with the same masks.


def evaluate(model, data, quick=False):
    """{"nll", "nll_se"} and, for arithmetic, "accuracy": lists with a number for each seed. quick:
    at most 512 problems and 128 sequences instead of all problems and 512 sequences."""
    scores = {}
    if isinstance(data, arith.Arithmetic):
        scores["accuracy"] = accuracy(model, data, 512 if quick else None).tolist()
    nll = bound(model, data, 128 if quick else 512)
    scores["nll"] = nll.mean(1).tolist()
    scores["nll_se"] = (nll.std(1) / nll.shape[1] ** 0.5).tolist()
    return scores


def rows_at_once(model, n):
    """How many sequences of n response tokens an evaluation can take at once."""
    S = len(model.wte)
    widest = max(model.config.vocab_size, 16 * model.config.n_embd)  # logits, or a block's arrays
    masks = 8
    return max(1, 2**24 // (masks * S * n * widest))  # 2**24 float32 numbers are 64 MB


@torch.no_grad()
def accuracy(model, data, n_problems=None):
    """The share of whole responses that are right, (S,): greedy, the surest token first."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    right = []
    for answer in data.test[:n_problems].to(device).split(rows_at_once(model, len(pos))):
        question = answer.clone()
        question[:, pos] = model.config.vocab_size
        for x in mdm.generate(model, question.expand(S, -1, -1), pos):
            pass  # the last one is complete
        right.append((x == answer).all(-1))
    return torch.cat(right, 1).float().mean(1)


@torch.no_grad()
def bound(model, data, n_sequences):
    """Nats per response token of each sequence, (S, n_sequences). Of an MDM this is the bound (2),
    by exact counts: 8 masks a sequence, with one count from each eighth of 1 ... n."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    n_sequences = min(n_sequences, len(data.test))
    spread = torch.linspace(0, len(data.test) - 1, n_sequences).round().long()  # all over a text
    x0 = data.test[spread].to(device)
    draw = torch.Generator().manual_seed(0)
    u = (torch.arange(8)[:, None] + 1 - torch.rand(8, n_sequences, generator=draw)) / 8
    r = torch.rand(8, n_sequences, len(pos), generator=draw)
    mask, weight = mdm.draw_masks("exactk", u, r)  # (1, 8, n_sequences, n)
    mask = mask.transpose(0, 1).to(device)
    weight = weight.transpose(0, 1).to(device)
    nll = []
    for part in torch.arange(n_sequences, device=device).split(rows_at_once(model, len(pos))):
        x = x0[part].expand(S, -1, -1)
        if model.config.causal:
            nll.append(mdm.token_nll(model, x, pos).mean(-1))
        else:
            m = mask[:, :, part].expand(-1, S, -1, -1)
            w = weight[:, :, part].expand(-1, S, -1, -1)
            nll.append(mdm.method_loss(model, x, pos, m, w))
    return torch.cat(nll, 1)


# --------------------------------------------------------------------------------------------------
# Files: one folder is one comparison (see data/runs.py).


def changed(cfg, settings):
    """The settings, by name, whose values are not the defaults."""
    normal = defaults(cfg.dataset)
    names = [s.name for s in settings]
    return {n: getattr(cfg, n) for n in names if getattr(cfg, n) != normal[n]}


def shared_settings(cfg):
    """The settings that all runs in a folder share."""
    kind = "sums" if cfg.dataset in arith.DATASETS else "text"
    return [s for s in SETTINGS if s.run and s.only in ("", kind)]


def default_folder(cfg):
    """out/ and the data set, with all settings that are not the defaults: out/mul2_steps1500."""
    parts = [os.path.splitext(os.path.basename(cfg.dataset))[0]]
    for name, value in changed(cfg, shared_settings(cfg)).items():
        if name != "dataset":
            parts.append(f"{name}{value}".replace("/", "-"))
    if cfg.init_from:
        parts.append("from_" + os.path.basename(os.path.normpath(cfg.init_from)))
    return os.path.join("out", "_".join(parts))


def label(cfg, method):
    """A method's name in tables and files, with its own settings: "ppots ppots_fit=grid"."""
    words = mdm.parse_method(method)
    own = changed(cfg, [s for s in SETTINGS if s.only in words])
    return " ".join([method, *(f"{name}={value}" for name, value in own.items())])


def load_start(cfg, method, data):
    """--init_from: the model to start from, {"name", "fingerprint", "weights"}."""
    base = "arm" if "arm" in mdm.parse_method(method) else "mdm"
    seed = None if cfg.init_seed < 0 else cfg.init_seed
    theirs = runs.find_checkpoint(cfg.init_from, base, seed)
    ours = {**vars(cfg), "vocabulary": dataclasses.asdict(data.vocabulary)}
    for name in ("n_layer", "n_head", "n_embd", "vocabulary"):
        if theirs[name] != ours[name]:
            fail(f"--init_from={cfg.init_from} has another {name}: give its, or train it again")
    weights = theirs["weights"]
    if weights["wpe"].shape[1] != data.test.shape[1]:
        fail(f"--init_from={cfg.init_from} has sequences of another length")
    if not theirs["state"]["done"]:
        fail(f"--init_from={cfg.init_from}: its {base} is unfinished: --resume it first")
    name = os.path.splitext(os.path.basename(theirs["dataset"]))[0] + f"-{theirs['seed']}"
    known_by = runs.fingerprint(*weights.values())
    for line in runs.read_results(cfg.out_dir):
        same = line["start"] == name and line["method"].startswith("arm") == (base == "arm")
        if same and line["start_weights"] != known_by:
            fail(f"{cfg.out_dir} has runs from another {name}: take another --out_dir")
    return {"name": name, "fingerprint": known_by, "weights": weights}


def first_state(cfg, method, seeds, path, start):
    """What training starts from: a checkpoint (--resume), weights (--init_from), or nothing."""
    if cfg.resume and os.path.exists(path):
        theirs = runs.load_checkpoint(path)
        if theirs["seeds"] != seeds:
            fail(f"{path} holds the seeds {theirs['seeds']}, not {seeds}: --resume with its seeds "
                 "and as many processes as before")
        if theirs["start"] != (start and start["fingerprint"]):
            fail(f"{path} started from other weights: do without --resume, or use those")
        return theirs["state"]
    if start:
        weights = start["weights"].items()
        return {"model": {k: v.repeat_interleave(len(seeds), 0) for k, v in weights}}
    return {}


def result_lines(cfg, method, seeds, data, device, state, start):
    """A line for each seed in results.jsonl."""
    work = mdm.work(mdm.parse_method(method))
    B = cfg.batch_size * work.batch
    T = data.test.shape[1]
    n_params = sum(weights[0].numel() for weights in state["model"].values())
    lines = []
    for s, seed in enumerate(seeds):
        curve = [{k: v if k == "step" else v[s] for k, v in at.items()} for at in state["curve"]]
        scores = {k: v for k, v in curve[-1].items() if k not in ("step", "loss")}
        line = {
            "method": label(cfg, method), "seed": seed, "start": start["name"] if start else "",
            "start_weights": start["fingerprint"] if start else "", "passes": work.passes,
            "batch_size": B, "steps": state["steps"], **scores,
            "diverged": int(state["diverged"][s]) or None,
            "gradclip": state["gradclip"][s].item() / max(1, state["step"]),
            "n_params": n_params,
            "forward_tokens": (state["step"] * B * work.masks + state["pilot"]) * T,
            "seconds": round(state["seconds"], 2), "seeds_trained_together": len(seeds),
            **machine(device), "curve": curve,
        }  # fmt: skip
        lines.append(json.loads(json.dumps(line), parse_constant=lambda _: None))  # NaN is no JSON
    return lines


def machine(device):
    """What a number may depend on besides the settings."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty"]
    processor = platform.processor() or platform.machine()
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        with open("/proc/cpuinfo") as f:
            processor = next(x for x in f if x.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        commit = ""
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "commit": commit}
    return {"processor": processor, "threads": torch.get_num_threads(), **versions}


def pick_device(name, rank=0):
    """The torch name of a device: what --device says, or the best there is for "auto"."""
    chosen = name
    if name == "auto":
        there = torch.accelerator.is_available()
        chosen = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        if chosen == "cuda":  # each of torchrun's processes takes a GPU of its own
            local_rank = int(os.environ.get("LOCAL_RANK") or rank)
            chosen = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ZeroDivisionError) as e:
        why = str(e).splitlines()[0]
        if name == "auto":
            print(f"{chosen} is there and cannot be used ({why}): going on with the CPU")
            return "cpu"
        fail(f"--device={name} cannot be used here ({why}): try --device=cpu")
    return chosen


# --------------------------------------------------------------------------------------------------
# The comparison.


def main(argv=None):
    cfg, methods, seeds = parse_args(argv)
    rank, world_size = runs.torchrun_share()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    if cfg.report:
        out_dirs = cfg.out_dir.split(",") if cfg.out_dir else [runs.newest_folder() or "out"]
        try:
            return report.main(out_dirs, cfg.baseline) if rank == 0 else 0
        except ValueError as e:
            fail(e)
    data = load_data(cfg, methods)
    device = pick_device(cfg.device, rank)
    cfg.out_dir = cfg.out_dir or default_folder(cfg)
    if cfg.variance and "mdm" not in methods:
        fail("--variance measures at the plain MDM's weights: add mdm to --method")
    if cfg.init_from and os.path.realpath(cfg.init_from) == os.path.realpath(cfg.out_dir):
        fail("--init_from is --out_dir: the models to start from would be overwritten")
    seeds = [int(seed) for seed in np.array_split(seeds, world_size)[rank]]
    try:
        with runs.lock(cfg.out_dir, (rank + 1, world_size)), runs.enough_memory():
            return compare(cfg, methods, seeds, data, device) if seeds else 0
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from the last line")
        return 130


def compare(cfg, methods, seeds, data, device):
    """Train the methods one after another, save everything, and say what came out."""
    settings = {s.name: getattr(cfg, s.name) for s in shared_settings(cfg)}
    settings |= {"data": data.fingerprint, "device": device.split(":")[0]}
    settings["fine_tuned"] = bool(cfg.init_from)
    runs.join_folder(cfg.out_dir, settings)

    states, starts, paths, left = {}, {}, {}, {}
    for method in methods:
        start = load_start(cfg, method, data) if cfg.init_from else None
        name = start["name"] if start else ""
        path = runs.checkpoint_path(cfg.out_dir, label(cfg, method), name, seeds)
        states[method] = first_state(cfg, method, seeds, path, start)
        starts[method] = start
        paths[method] = path
        left[method] = passes_left(method, states[method])
    print(f"{cfg.dataset}: {data.describe()}\nseeds {seeds}; {cfg.steps} steps of {cfg.batch_size} "
          f"on {device}, {torch.get_num_threads()} threads; all goes to {cfg.out_dir}")

    lines = []
    at_first = sum(left.values())
    began = time.perf_counter()
    for method in methods:
        state = states[method]
        if not state.get("done"):
            for state in train(cfg, method, seeds, data, device, state):
                start = starts[method]
                content = {
                    "seeds": seeds, "start": start and start["fingerprint"], "state": state,
                    "dataset": cfg.dataset, "vocabulary": dataclasses.asdict(data.vocabulary),
                    "n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd,
                }  # fmt: skip
                runs.save_checkpoint(paths[method], content)
                left[method] = passes_left(method, state)
                print(progress(method, state, began, at_first, sum(left.values())), flush=True)
        found = result_lines(cfg, method, seeds, data, device, state, starts[method])
        runs.save_lines(cfg.out_dir, found)
        lines += found

    print(f"\n{report.table(settings, lines, cfg.baseline)}\n\n{report.verdict(settings, lines)}")
    out_dir = shlex.quote(cfg.out_dir)
    ask = f"python sample.py --out_dir={out_dir} --method={methods[-1]} --show"
    if isinstance(data, arith.Arithmetic):
        ask += " --prompt=" + shlex.quote(data.decode(data.test[0, : data.prompt_len]))
    print(f"More of it: python train.py --report --out_dir={out_dir}\nTry it: {ask}")
    if cfg.variance:
        variance.measure(cfg, methods, seeds[:1], data, device, build)
    return 0


def passes_left(method, state):
    if state.get("done"):
        return 0
    share = 1 - state.get("step", 0) / state.get("steps", 1)
    return mdm.work(mdm.parse_method(method)).passes * share


def progress(method, state, began, at_first, left):
    """One line on the last evaluation: the numbers of the first four seeds, and the time left, if
    the passes that are left take as long as those made since the beginning."""
    line = f"{method:>20} step {state['step']:>5}/{state['steps']}"
    for name, values in state["curve"][-1].items():
        if name in ("loss", "accuracy", "nll") and values[0] is not None:
            line += f"  {name} " + " ".join(f"{value:.2f}" for value in values[:4])
    if left < at_first:
        seconds = int((time.perf_counter() - began) * left / (at_first - left))
        line += f"  ETA {seconds // 60}:{seconds % 60:02}"
    return line


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
