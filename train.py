"""train.py - does variance reduction make masked diffusion training stable? Train and compare.

    python train.py                                        ARM, MDM, P-POTS+MIRROR, three seeds
    python train.py --method=ppots_mirror                  one method (pposts_mirror works too)
    python train.py --method=mdm,mdm_batch2,multi2,mirror  MIRROR, and controls of the same cost
    python train.py --n_seeds=32                           32 seeds, trained as one batch
    python train.py --dataset=shakespeare_char             a text; or --dataset=FILE, your own
    python train.py --report                               tables and figures of the newest results

Text has other defaults: n_layer 4, n_embd 128, batch_size 12, steps 2000.
To use two GPUs, run two commands with different methods or seeds in the same --out_dir.
A method is arm, mdm, or several words joined by _, for example ppots_mirror. The words:
"""
import argparse
import contextlib
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
# Settings. Methods share nearly all of them. Only the estimator should differ.


class Setting(NamedTuple):
    name: str
    default: object
    why: str  # its --help
    low: object = None  # the smallest number allowed, or a list of the words allowed
    high: object = None  # the largest number allowed
    run: bool = True  # results depend on it, so every run in a folder has the same value
    only: str = ""  # who uses it: "sums", "text" or a method's word; "" means everyone


SETTINGS = [
    # What to train, and on which data.
    Setting("method", "arm,mdm,ppots_mirror", "methods, separated by commas; see above", run=False),
    Setting("seeds", "", "seeds, separated by commas [the paper's 42,731,20231]", run=False),
    Setting("n_seeds", 0, "how many seeds: the paper's, then 0,1,2,...", 0, 10**5, run=False),
    Setting("dataset", "add3", f"{', '.join(arith.DATASETS)}; or shakespeare_char; or a text file"),
    Setting("init_from", "", "fine-tune: start from the arm or mdm in this folder", run=False),
    Setting("init_seed", -1, "the seed to start from (-1: the smallest)", -1, 10**18, run=False),
    Setting("n_train", 0, "number of training problems (0: all)", 0, 10**9, only="sums"),
    Setting("n_test", 512, "held-out problems of the last evaluation", 1, 10**6, only="sums"),
    Setting("tokenizer", "char", "char, or a tiktoken encoding such as gpt2", only="text"),
    Setting("block_size", 64, "response tokens, after one prompt token", 1, 10**6, only="text"),
    # The model.
    Setting("n_layer", 2, "transformer blocks; two are enough to carry digits", 1, 1000),
    Setting("n_head", 4, "attention heads", 1, 1000),
    Setting("n_embd", 64, "width; enough to solve add3 in seconds a seed", 1, 10**5),
    # The training.
    Setting("steps", 1000, "optimizer steps: the ARM solves add3, MDM seeds disagree", 1, 10**9),
    Setting("batch_size", 64, "sequences per step and seed", 1, 10**6),
    Setting("lr", 3e-3, "peak learning rate", 0, 1e3),
    Setting("warmup", 100, "steps up to the peak; then lr falls linearly to 0", 0, 10**9),
    Setting("beta2", 0.98, "AdamW's second decay rate; the first is 0.9", 0, 0.9999),
    Setting("weight_decay", 0.01, "small, as a model of this size hardly overfits", 0, 1e3),
    Setting("grad_clip", 1.0, "largest norm of a seed's gradient", 1e-9, 1e9),
    Setting("eps", 1e-3, "smallest masking probability, as in LLaDA: bounds the weights", 0, 0.9),
    Setting("until_nll", 0.0, "end when the mean nll reaches this value (0: never)", 0, 1e9),
    Setting("eval_every", 250, "steps between evaluations; each saves a checkpoint", 1, 10**9),
    # Settings of single methods.
    Setting("ppots_fit", "epr", "how to smooth the curve: epr (the paper) or grid (not at all)",
            ["epr", "grid"], only="ppots"),
    Setting("ppots_refits", 10, "how often to measure the density anew", 1, 10**4, only="ppots"),
    Setting("ppots_budget", 0.01, "share of the work that pilots may cost", 1e-9, 1, only="ppots"),
    Setting("isad_tokens", "", "rare tokens [separators; text: the rarest 5 %%]", only="isad"),
    # Where and how.
    Setting("out_dir", "", "the folder of all results [out/ and what you changed]", run=False),
    Setting("resume", False, "go on from the checkpoints, as if never stopped", run=False),
    Setting("report", False, "only show tables and figures; --out_dir=a,b takes two folders",
            run=False),
    Setting("variance", False, "measure the gradient's noise at the trained plain MDM", run=False),
    Setting("baseline", "mdm", "the method to compare all others with", run=False),
    Setting("device", "auto", "cpu, cuda, cuda:1, mps; auto takes the best there is"),
    Setting("compile", False, "torch.compile the loss: takes 20 s, pays from some 8000 steps on"),
]
TEXT_DEFAULTS = {"n_layer": 4, "n_embd": 128, "batch_size": 12, "steps": 2000}  # nanoGPT's on a CPU
PAPER_SEEDS = [42, 731, 20231]


def kind_of(dataset):
    return "sums" if dataset in arith.DATASETS else "text"


def defaults(dataset):
    values = {s.name: s.default for s in SETTINGS}
    return values | TEXT_DEFAULTS if kind_of(dataset) == "text" else values


def parse_args(argv=None):
    """Read the command line. Returns (cfg, methods, seeds), or leaves with an error message."""
    descriptions = {**mdm.MASKING, **mdm.TRAINING}
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__ + "\n".join(f"    {w:8} {what}" for w, what in descriptions.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that we see which flags were given
        allow_abbrev=False,
    )
    parser.error = fail
    for s in SETTINGS:
        if s.default is False:  # a switch
            form = {"action": "store_true"}
        else:
            form = {"type": type(s.default), "metavar": type(s.default).__name__}
        why = f"{s.only}: {s.why}" if s.only else s.why
        if s.default not in (0, "", -1):  # these mean: no fixed default
            why += f" [{s.default}]"
        parser.add_argument(f"--{s.name}", help=why, **form)
    given = vars(parser.parse_args(argv))  # only the flags that were typed
    for name in {"out_dir", "init_from", "dataset"} & given.keys():  # ~ is the home folder
        given[name] = ",".join(os.path.expanduser(part) for part in given[name].split(","))
    cfg = argparse.Namespace(**defaults(given.get("dataset", "add3")) | given)
    try:
        methods = [mdm.method_name(mdm.parse_method(name)) for name in cfg.method.split(",")]
        cfg.baseline = mdm.method_name(mdm.parse_method(cfg.baseline))
    except ValueError as e:
        fail(e)
    check_values(cfg)
    check_effects(cfg, given, methods)
    return cfg, list(dict.fromkeys(methods)), parse_seeds(cfg)


def parse_seeds(cfg):
    """The seeds as a list. By default the paper's three come first, then 0, 1, 2, ..."""
    if not cfg.seeds:
        others = [seed for seed in range(cfg.n_seeds) if seed not in PAPER_SEEDS]
        return (PAPER_SEEDS + others)[: cfg.n_seeds or 3]  # n_seeds is 0 if it was not given
    seeds = cfg.seeds.split(",")
    whole = all(seed.isdecimal() and int(seed) < 2**32 for seed in seeds)  # see stream
    if not whole or len(set(map(int, seeds))) < len(seeds):
        fail(f"--seeds={cfg.seeds}: give different whole numbers below 2**32, separated by commas")
    if cfg.n_seeds:
        fail("--seeds says which seeds, --n_seeds how many: give one of them")
    return [int(seed) for seed in seeds]


def check_values(cfg):
    """Refuse numbers outside their limits, and unknown words."""
    for s in SETTINGS:
        value = getattr(cfg, s.name)
        if isinstance(s.low, list) and value not in s.low:  # words
            fail(f"--{s.name}={value} must be one of {', '.join(s.low)}")
        if s.high is not None and not s.low <= value <= s.high:
            fail(f"--{s.name}={value} is not between {s.low} and {s.high}")
    if cfg.n_embd % (2 * cfg.n_head):  # rotary positions need heads of even size
        fail(f"--n_embd={cfg.n_embd} is no multiple of twice --n_head={cfg.n_head}")


def check_effects(cfg, given, methods):
    """Refuse settings and words that would change nothing."""
    active = {kind_of(cfg.dataset)}.union(*map(mdm.parse_method, methods))  # "sums", "mirror", ...
    for s in SETTINGS:
        if s.name in given and s.only and s.only not in active:
            fail(f"--{s.name} affects {s.only} only, not --dataset={cfg.dataset} with "
                 f"--method={','.join(methods)}: leave it out, or check the names")
    if "init_seed" in given and not cfg.init_from:
        fail("--init_seed has an effect with --init_from only: leave it out")
    for method in methods:
        words = mdm.parse_method(method)
        if "strats" in words and mdm.n_strata(cfg.batch_size * mdm.work(words).batch) == 1:
            fail(f"{method}: --batch_size={cfg.batch_size} has no strata: choose 4, 9 or 64, say")


def load_data(cfg, methods):
    """The data set. Leaves with an error message if a method cannot use it."""
    try:
        if kind_of(cfg.dataset) == "sums":
            data = arith.make(cfg.dataset, cfg.n_train, cfg.n_test)
        else:
            data = text.make(cfg.dataset, cfg.block_size, cfg.tokenizer)
        if cfg.isad_tokens:
            data.rare = data.encode(cfg.isad_tokens)
    except ValueError as e:
        fail(e)
    words = set().union(*map(mdm.parse_method, methods))  # of all methods together
    response = data.test[:, data.prompt_len :]
    if "isad" in words and not torch.isin(response, torch.tensor(data.rare).long()).any():
        fail(f"isad: none of its tokens is in a response of {cfg.dataset}: see --isad_tokens")
    if "syrm" in words and not data.structural:
        fail(f"syrm hides symbols of the prompt, and there are none in {cfg.dataset}")
    return data


# --------------------------------------------------------------------------------------------------
# Randomness. Each random stream has a name: (seed, purpose, part), where part counts epochs, or
# chunks of steps. So a seed's numbers depend on no other seed, and --resume can draw them again.

PURPOSES = ["init", "data", "rate", "mask", "pilot"]


def stream(seed, purpose, part=0, device="cpu"):
    key = np.random.SeedSequence([seed, PURPOSES.index(purpose), part]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(key[0]))  # each name has its own


def epochs(seed, first, count, n_train, device):
    """The indices of problems number first ... first + count - 1 in a seed's order, (count,).
    Epochs follow one another, and each is a fresh permutation of the n_train problems. A batch may
    hold the end of one epoch and the beginning of the next, so no problem is left out."""
    order = []
    for epoch in range(first // n_train, (first + count - 1) // n_train + 1):
        draw = stream(seed, "data", epoch, device)
        order.append(torch.randperm(n_train, generator=draw, device=device))
    start = first % n_train  # in the first of these epochs
    return torch.cat(order)[start : start + count]


def random_numbers(words, seeds, first_step, B, n, n_train, in_epochs, device):
    """Yield, for each step from first_step on, idx and u (S, B) and r (S, B, n); for multi2 r is
    (2, S, B, n). idx says which training sequences make up the batch."""
    # Numbers are drawn for a chunk of K steps at once, which is faster. K must not depend on the
    # seeds. Otherwise a seed's numbers would depend on the others. Methods of one B share a K.
    K = max(1, min(64, 2**20 // (B * n)))
    r_shape = (2, B, n) if "multi2" in words else (B, n)  # two independent masks, or one
    for chunk in itertools.count(first_step // K):
        idx, u, r = [], [], []
        for seed in seeds:
            if in_epochs:
                idx.append(epochs(seed, chunk * K * B, K * B, n_train, device).view(K, B))
            else:  # random windows of a text, as in nanoGPT
                draw = stream(seed, "data", chunk, device)
                idx.append(torch.randint(n_train, (K, B), generator=draw, device=device))
            draw = stream(seed, "rate", chunk, device)
            u.append(1 - torch.rand(K, B, generator=draw, device=device))  # in (0, 1]
            draw = stream(seed, "mask", chunk, device)
            r.append(torch.rand(K, *r_shape, generator=draw, device=device))
        idx = torch.stack(idx, 1)  # (K, S, B)
        u = torch.stack(u, 1)  # (K, S, B)
        r = torch.stack(r, -3)  # (K, S, B, n), or (K, 2, S, B, n)
        for i in range(K):
            if chunk * K + i >= first_step:
                yield idx[i], u[i], r[i]


# --------------------------------------------------------------------------------------------------
# Training.


def model_config(cfg, method, data):
    causal = "arm" in mdm.parse_method(method)  # the only difference between the networks
    V = len(data.vocabulary)
    T = data.test.shape[1]  # prompt and response
    return mdm.GPTConfig(V, T, cfg.n_layer, cfg.n_head, cfg.n_embd, causal)


def build(cfg, method, seeds, data, device):
    """The models, one row for each seed, and the positions (n,) that are hidden and predicted."""
    config = model_config(cfg, method, data)
    model = mdm.GPT(config, [stream(seed, "init") for seed in seeds])  # each with its own weights
    pos = list(range(data.prompt_len, config.block_size))
    if "syrm" in mdm.parse_method(method):  # the prompt's symbols, too
        pos = [*data.structural, *pos]
    return model.to(device), torch.tensor(pos, device=device)


def learning_rate(cfg, step, steps):
    # 1) linear warm-up
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    # 2) then linear decay: it would reach 0 one step after the last
    return cfg.lr * (steps - step) / (steps - cfg.warmup)


def sequence_loss(model, words, x0, pos, u, r, table, rare, eps):
    """The loss of each sequence, (S, B), for x0 (S, B, T)."""
    if "arm" in words:
        return mdm.token_nll(model, x0, pos).mean(-1)
    is_rare = torch.isin(x0[..., pos], rare) if "isad" in words else None  # (S, B, n)
    masking = words & mdm.MASKING.keys()  # train() does the other words
    mask, weight = mdm.draw_masks(masking, u, r, table, eps, is_rare)
    return mdm.method_loss(model, x0, pos, mask, weight)


def new_state(seeds, steps, device):
    """The state before the first step. train() adds the weights, and a checkpoint holds it all."""
    return {
        "step": 0,
        "steps": steps,
        "done": False,
        "curve": [],  # a dictionary for each evaluation, with a number for each seed
        "diverged": torch.zeros(len(seeds), device=device),  # the step in which it did; 0: none
        "gradclip": torch.zeros(len(seeds), device=device),  # steps whose gradient was clipped
        "table": torch.zeros(len(seeds), mdm.N_CELLS, device=device),  # P-POTS
        "ema": torch.zeros(len(seeds), 10, device=device),  # EMA's running means, in 10 bins
        "pilot": 0,  # masked sequences that pilots passed through the model
        "seconds": 0.0,  # of training and evaluation
        **machine(device),
    }


def train(cfg, method, seeds, data, device="cpu", state=None):
    """Train one method for all seeds at once. Yield the state at the start and after every
    evaluation. A yielded state never changes afterwards, and training can go on from any of them.
    state: a yielded state, or {"model": weights}. A seed diverges when its loss or gradient is not
    finite. From then on its gradient is 0. Momentum still moves it, and no other seed notices."""
    # The method.
    words = mdm.parse_method(method)
    work = mdm.work(words)
    B = cfg.batch_size * work.batch
    steps = cfg.steps * work.steps

    # The model and the optimizer.
    model, pos = build(cfg, method, seeds, data, device)
    params = list(model.parameters())  # each with a row per seed
    betas = (0.9, cfg.beta2)
    fused = device != "mps"  # one kernel for all parameters
    optimizer = torch.optim.AdamW(params, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=fused)

    # The state: new, or where an earlier training stopped.
    state = new_state(seeds, steps, device) | (state or {})
    if "model" in state:
        model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # updated in place
    diverged = state["diverged"].to(device)  # a checkpoint is loaded on the CPU
    gradclip = state["gradclip"].to(device)
    table = state["table"].to(device)
    ema = state["ema"].to(device)

    # The data, and the random numbers that decide everything.
    train_x = data.train_blocks(device)  # (n_train, T), all on the device
    rare = torch.tensor(data.rare, dtype=torch.int64, device=device)
    loss_of = torch.compile(sequence_loss) if cfg.compile else sequence_loss
    refit_every, n_pilot = pilot_size(cfg, steps, B * work.masks, len(pos))  # for P-POTS
    in_epochs = not data.is_text
    first = state["step"]
    numbers = random_numbers(words, seeds, first, B, len(pos), len(train_x), in_epochs, device)
    loss_sum = torch.zeros(len(seeds), device=device)  # since the last evaluation
    began = time.perf_counter()

    if not state["curve"]:  # the scores before training
        scores = evaluate(model, data, quick=True)
        point = {"step": 0, "loss": [None] * len(seeds), **scores}
        state = snapshot(state, model, optimizer, curve=[point])
        yield state
        began = time.perf_counter()

    for step in range(state["step"], steps):
        # P-POTS measures its density now and then.
        if "ppots" in words and step % refit_every == 0:
            table = measure_table(cfg, seeds, model, train_x, pos, step, n_pilot)
            state = state | {"pilot": state["pilot"] + n_pilot * min(len(pos), mdm.N_COUNTS)}

        # The loss of each sequence, (S, B).
        optimizer.zero_grad()
        idx, u, r = next(numbers)  # which sequences, at which rates, which masks
        x0 = train_x[idx].long()  # (S, B, T)
        loss = loss_of(model, words, x0, pos, u, r, table, rare, cfg.eps)
        if "ema" in words:
            loss, ema = mdm.ema_baseline(loss, u, ema)

        # The gradient. Seeds share no parameter, so the gradient of the summed loss holds, in each
        # seed's row, the gradient of the seed's own loss.
        loss = loss.mean(-1)  # (S,)
        loss.sum().backward()
        healthy = torch.isfinite(loss) & (diverged == 0)
        healthy, was_clipped = clip_per_seed(params, healthy, cfg.grad_clip)
        diverged = torch.where((diverged == 0) & ~healthy, step + 1, diverged)
        gradclip = gradclip + was_clipped

        # The step.
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step, steps)
        optimizer.step()
        loss_sum = loss_sum + loss.detach()

        # The evaluation. The last one is thorough. With --until_nll any evaluation may be the last.
        steps_done = step + 1
        if steps_done % cfg.eval_every and steps_done < steps:
            continue
        scores = evaluate(model, data, quick=steps_done < steps and not cfg.until_nll)
        mean_loss = loss_sum / (steps_done - state["step"])  # since the last evaluation
        point = {"step": steps_done, "loss": mean_loss.tolist(), **scores}
        reached = cfg.until_nll > 0 and np.mean(scores["nll"]) <= cfg.until_nll
        state = snapshot(
            state, model, optimizer, step=steps_done, curve=[*state["curve"], point],
            done=bool(steps_done == steps or reached or diverged.all()), diverged=diverged,
            gradclip=gradclip, table=table, ema=ema,
            seconds=state["seconds"] + time.perf_counter() - began,
        )  # fmt: skip
        yield state
        if state["done"]:
            break
        loss_sum = torch.zeros_like(loss_sum)
        began = time.perf_counter()  # the time for saving is not counted


def snapshot(state, model, optimizer, **changes):
    """A new state. Weights are copied, because training changes the model."""
    weights = copy.deepcopy(model.state_dict())
    return state | {"model": weights, "optimizer": copy.deepcopy(optimizer.state_dict())} | changes


def clip_per_seed(params, healthy, max_norm):
    """Scale each seed's gradient to a norm of at most max_norm. The gradient becomes 0 if it is not
    finite, or if the seed is not healthy (S,). Returns two bool tensors (S,): healthy, clipped."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in params).sqrt()  # (S,)
    healthy = healthy & torch.isfinite(norm)
    scale = torch.where(healthy, (max_norm / (norm + 1e-6)).clamp(max=1), 0)
    for p in params:
        row_scale = scale.view(-1, *[1] * (p.dim() - 1))  # (S, 1, 1), say
        p.grad.nan_to_num_(0, 0, 0).mul_(row_scale)  # NaN times 0 would stay NaN
    return healthy, healthy & (norm > max_norm)


def pilot_size(cfg, steps, rows, n):
    """P-POTS: the steps from one pilot to the next, and the sequences in a pilot. All pilots may
    cost the share ppots_budget of the work. A training step costs as much as three forward passes
    of its rows. A pilot needs 8 sequences, so there may be fewer pilots than ppots_refits."""
    sequences = cfg.ppots_budget * 3 * steps * rows / min(n, mdm.N_COUNTS)
    refits = max(1, min(cfg.ppots_refits, int(sequences / 8)))
    return math.ceil(steps / refits), max(8, int(sequences / refits))


def measure_table(cfg, seeds, model, train_x, pos, step, n_pilot):
    """P-POTS' table of each seed, (S, N_CELLS), from n_pilot training sequences."""
    device = train_x.device
    n = len(pos)
    x0, r = [], []
    for seed in seeds:  # each from its own stream
        draw = stream(seed, "pilot", step, device)
        idx = torch.randint(len(train_x), (n_pilot,), generator=draw, device=device)
        x0.append(train_x[idx].long())  # (n_pilot, T)
        shape = (n_pilot, min(n, mdm.N_COUNTS), n)
        r.append(torch.rand(shape, generator=draw, device=device))
    counts, H = mdm.pilot(model, torch.stack(x0), pos, torch.stack(r))
    H = H.nan_to_num(0, 0, 0)  # of a diverged seed, whose table is never used
    return mdm.ppots_table(counts, H, n, cfg.ppots_fit, cfg.eps)


# --------------------------------------------------------------------------------------------------
# Evaluation on held-out data: the same for every method, and always with the same masks.

BOUND_MASKS = 8  # masks per sequence in bound()


def evaluate(model, data, quick=False):
    """The scores of each seed, as lists: "nll", its standard error "nll_se", for sums "accuracy".
    quick: at most 512 problems and 128 sequences, instead of all problems and 512 sequences."""
    scores = {}
    if not data.is_text:
        scores["accuracy"] = accuracy(model, data, 512 if quick else None).tolist()
    nll = bound(model, data, 128 if quick else 512)  # (S, n_sequences)
    scores["nll"] = nll.mean(1).tolist()
    N = nll.shape[1]
    scores["nll_se"] = (nll.std(1) / N**0.5).tolist() if N > 1 else [None] * len(nll)
    return scores


def rows_at_once(model, n):
    """How many sequences of n response tokens an evaluation can take at once."""
    S = len(model.wte)
    widest = max(model.config.vocab_size, 16 * model.config.n_embd)  # logits, or a block's arrays
    return max(1, 2**24 // (BOUND_MASKS * S * n * widest))  # 2**24 float32 numbers are 64 MB


@torch.no_grad()
def accuracy(model, data, n_problems=None):
    """The share of fully correct responses, (S,). Generation is greedy, the surest token first."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    right = []
    for answer in data.test[:n_problems].to(device).split(rows_at_once(model, len(pos))):
        question = answer.clone()
        question[:, pos] = model.config.vocab_size  # hide the whole response
        for x in mdm.generate(model, question.expand(S, -1, -1), pos):
            pass  # only the last x is complete
        right.append((x == answer).all(-1))  # (S, rows)
    return torch.cat(right, 1).float().mean(1)


@torch.no_grad()
def bound(model, data, n_sequences):
    """The nll per response token of each sequence, (S, n_sequences). Of an MDM it is the bound (2),
    by exact counts. The first mask hides up to n/8 tokens, the second n/8 to 2n/8, and so on."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    n_sequences = min(n_sequences, len(data.test))
    spread = torch.linspace(0, len(data.test) - 1, n_sequences).round().long()  # all over the text
    x0 = data.test[spread].to(device)
    draw = torch.Generator().manual_seed(0)
    u = 1 - torch.rand(BOUND_MASKS, n_sequences, generator=draw)  # the same for all models
    u = (torch.arange(BOUND_MASKS)[:, None] + u) / BOUND_MASKS
    r = torch.rand(*u.shape, len(pos), generator=draw)
    mask, weight = mdm.draw_masks("exactk", u, r)  # (1, 8, n_sequences, n)
    mask = mask.transpose(0, 1).to(device)  # method_loss wants the masks first
    weight = weight.transpose(0, 1).to(device)
    nll = []
    for part in torch.arange(n_sequences, device=device).split(rows_at_once(model, len(pos))):
        x = x0[part].expand(S, -1, -1)
        if model.config.causal:
            nll.append(mdm.token_nll(model, x, pos).mean(-1))  # exact, by the chain rule
        else:
            m = mask[:, :, part].expand(-1, S, -1, -1)
            w = weight[:, :, part].expand(-1, S, -1, -1)
            nll.append(mdm.method_loss(model, x, pos, m, w))
    return torch.cat(nll, 1)


# --------------------------------------------------------------------------------------------------
# Files: one folder is one comparison (see data/runs.py).


def changed(cfg, settings):
    """The settings whose values are not the defaults, {name: value}."""
    normal = defaults(cfg.dataset)
    names = [s.name for s in settings]
    return {n: getattr(cfg, n) for n in names if getattr(cfg, n) != normal[n]}


def shared_settings(cfg):
    """The settings that all runs in a folder share."""
    return [s for s in SETTINGS if s.run and s.only in ("", kind_of(cfg.dataset))]


def default_folder(cfg):
    """out/DATASET_CHANGES, for example out/mul2_steps1500 for --dataset=mul2 --steps=1500."""
    changes = changed(cfg, shared_settings(cfg))
    changes.pop("dataset", None)
    parts = [runs.stem(cfg.dataset), *(f"{name}{value}" for name, value in changes.items())]
    if cfg.init_from:
        parts.append("from_" + runs.stem(cfg.init_from))
    return os.path.join("out", "_".join(parts).replace("/", "-"))


def label(cfg, method):
    """A method's name in tables and files, with its own settings: "ppots ppots_fit=grid"."""
    words = mdm.parse_method(method)
    own = changed(cfg, [s for s in SETTINGS if s.only in words])
    parts = [method, *(f"{name}={value}" for name, value in own.items())]
    return " ".join(parts).replace("/", "-")


def load_start(cfg, method, data):
    """--init_from: the model to start from, {"name", "fingerprint", "weights"}."""
    base = "arm" if "arm" in mdm.parse_method(method) else "mdm"
    theirs = runs.find_checkpoint(cfg.init_from, base, None if cfg.init_seed < 0 else cfg.init_seed)
    if theirs["config"] != dataclasses.asdict(model_config(cfg, method, data)):
        fail(f"{cfg.init_from} has another model, {theirs['config']}: give the same settings")
    if theirs["vocabulary"] != dataclasses.asdict(data.vocabulary):
        fail(f"{cfg.init_from} was trained on other tokens than those of {cfg.dataset}")
    if not theirs["state"]["done"]:
        fail(f"--init_from={cfg.init_from}: its {base} is unfinished: --resume it first")
    name = f"{runs.stem(theirs['dataset'])}-{theirs['seed']}"
    known_by = runs.fingerprint(*theirs["weights"].values())  # two trainings may share a name
    for line in runs.read_results(cfg.out_dir):
        same = line["start"] == name and line["method"].startswith("arm") == (base == "arm")
        if same and line["start_weights"] != known_by:
            fail(f"{cfg.out_dir} has runs that start from another {name}: take another --out_dir")
    return {"name": name, "fingerprint": known_by, "weights": theirs["weights"]}


def first_state(cfg, seeds, path, start):
    """The state to hand to train(): from a checkpoint (--resume), from --init_from, or none."""
    if cfg.resume and os.path.exists(path):
        return runs.load_checkpoint(path)["state"]
    if start:
        weights = start["weights"].items()
        return {"model": {k: v.repeat_interleave(len(seeds), 0) for k, v in weights}}  # for all
    return {}


def result_lines(cfg, method, seeds, data, state, start):
    """A line for each seed, for results.jsonl."""
    work = mdm.work(mdm.parse_method(method))
    B = cfg.batch_size * work.batch
    T = data.test.shape[1]  # tokens of a forward pass
    n_params = sum(weights[0].numel() for weights in state["model"].values())  # of one seed
    lines = []
    for s, seed in enumerate(seeds):
        curve = []  # of this seed
        for point in state["curve"]:
            curve.append({k: v if k == "step" else v[s] for k, v in point.items()})
        scores = {k: v for k, v in curve[-1].items() if k not in ("step", "loss")}  # the last ones
        line = {
            "method": label(cfg, method), "seed": seed, "start": start["name"] if start else "",
            "start_weights": start["fingerprint"] if start else "", "passes": work.passes,
            "batch_size": B, "steps": state["steps"], **scores,
            "diverged": int(state["diverged"][s]) or None,
            "gradclip": state["gradclip"][s].item() / max(1, state["step"]),
            "n_params": n_params,
            "forward_tokens": (state["step"] * B * work.masks + state["pilot"]) * T,
            "seconds": round(state["seconds"], 2), "seeds_trained_together": len(seeds),
            "processor": state["processor"], "threads": state["threads"],
            "torch": state["torch"], "commit": state["commit"], "curve": curve,
        }  # fmt: skip
        # JSON has no NaN: write null.
        lines.append(json.loads(json.dumps(line), parse_constant=lambda _: None))
    return lines


def machine(device):
    """Facts about the machine: they affect rounding, and so the results."""
    processor = platform.processor() or platform.machine()
    commit = ""
    with contextlib.suppress(OSError):  # no Linux
        with open("/proc/cpuinfo") as f:
            names = [x.split(":")[1].strip() for x in f if x.startswith("model name")]
        processor = names[0] if names else processor
    with contextlib.suppress(OSError):  # no git
        here = os.path.dirname(os.path.abspath(__file__))
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    return {"processor": processor, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "commit": commit}  # fmt: skip


def pick_device(name):
    """The torch name of a device: what --device says, or the best there is for "auto"."""
    if name == "auto":
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as e:
        why = str(e).partition("\n")[0]
        fail(f"the device {name} cannot be used here ({why}): try --device=cpu")
    return name


# --------------------------------------------------------------------------------------------------
# The comparison.


def main(argv=None):
    cfg, methods, seeds = parse_args(argv)
    if cfg.report:  # train nothing
        out_dirs = cfg.out_dir.split(",") if cfg.out_dir else [runs.newest_folder() or "out"]
        try:
            return report.main(out_dirs, cfg.baseline)
        except ValueError as e:
            fail(e)
    data = load_data(cfg, methods)  # before the folder is made, in case it fails
    device = pick_device(cfg.device)
    cfg.out_dir = cfg.out_dir or default_folder(cfg)
    if cfg.variance and "mdm" not in methods:
        fail("--variance measures at the plain MDM's weights: add mdm to --method")
    if cfg.init_from and os.path.realpath(cfg.init_from) == os.path.realpath(cfg.out_dir):
        fail("--init_from and --out_dir are the same folder: choose another --out_dir")
    try:
        compare(cfg, methods, seeds, data, device)
        if cfg.variance:
            variance.measure(cfg, methods, seeds[:1], data, device, build)
    except KeyboardInterrupt:
        print("\nstopped; add --resume to the same command to go on from the last evaluation")
        return 130
    return 0


def compare(cfg, methods, seeds, data, device):
    """Train the methods one after another, save everything, and print the results."""
    settings = {s.name: getattr(cfg, s.name) for s in shared_settings(cfg)}
    settings |= {"data": data.fingerprint, "device": device.split(":")[0]}
    settings["fine_tuned"] = bool(cfg.init_from)  # from scratch is another comparison
    if not data.is_text:
        settings["n_test"] = len(data.test)  # some tasks have fewer than asked for
    starts = {m: load_start(cfg, m, data) if cfg.init_from else None for m in methods}
    paths = {m: runs.checkpoint_path(cfg.out_dir, label(cfg, m), starts[m], seeds) for m in methods}
    runs.join_folder(cfg.out_dir, settings)
    print(f"{cfg.dataset}: {data.describe()}\nseeds {seeds}; {cfg.steps} steps of {cfg.batch_size} "
          f"on {device}, {torch.get_num_threads()} threads; results go to {cfg.out_dir}")
    if cfg.init_from:
        print(f"every seed starts from {starts[methods[0]]['name']} of {cfg.init_from}")

    lines = []  # of all methods
    with contextlib.ExitStack() as locks:
        for path in paths.values():
            locks.enter_context(runs.lock(path))  # one program at a time
        states = {m: first_state(cfg, seeds, paths[m], starts[m]) for m in methods}
        left = {m: passes_left(m, states[m]) for m in methods}
        at_first = sum(left.values())
        began = time.perf_counter()
        for method, state in states.items():
            if not state.get("done"):
                for state in train(cfg, method, seeds, data, device, state):
                    save(cfg, method, seeds, data, state, paths[method])
                    left[method] = passes_left(method, state)
                    print(progress(method, state, began, at_first, sum(left.values())), flush=True)
            found = result_lines(cfg, method, seeds, data, state, starts[method])
            runs.save_lines(cfg.out_dir, found)
            lines += found

    print(f"\n{report.table(settings, lines, cfg.baseline)}\n\n{report.verdict(settings, lines)}")
    out_dir = shlex.quote(cfg.out_dir)
    ask = f"--method={shlex.quote(label(cfg, methods[-1]))} --show"
    if not data.is_text:
        ask += " --prompt=" + shlex.quote(data.decode(data.test[0, : data.prompt_len]))
    print(f"Tables and figures: python train.py --report --out_dir={out_dir}\n"
          f"Try it: python sample.py --out_dir={out_dir} {ask}")


def save(cfg, method, seeds, data, state, path):
    """A checkpoint: everything that --resume, --init_from and sample.py need."""
    runs.save_checkpoint(path, {
        "seeds": seeds, "state": state, "dataset": cfg.dataset,
        "vocabulary": dataclasses.asdict(data.vocabulary),
        "config": dataclasses.asdict(model_config(cfg, method, data)),
    })  # fmt: skip


def passes_left(method, state):
    """Passes still to do, where a plain training counts as 1."""
    if state.get("done"):
        return 0
    share = 1 - state.get("step", 0) / state.get("steps", 1)  # 1 before the training
    return mdm.work(mdm.parse_method(method)).passes * share


def progress(method, state, began, at_first, left):
    """A line on the last evaluation: the scores of up to four seeds, and an estimate of the time
    left. The estimate assumes that all passes take equally long."""
    line = f"{method:>20} step {state['step']:>5}/{state['steps']}"
    for name, values in state["curve"][-1].items():
        if name in ("loss", "accuracy", "nll") and values[0] is not None:
            line += f"  {name} " + " ".join(f"{value:.2f}" for value in values[:4])
    if left < at_first:
        seconds = int((time.perf_counter() - began) * left / (at_first - left))  # so far, scaled
        line += f"  ETA {seconds // 60}:{seconds % 60:02}"
    return line


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
