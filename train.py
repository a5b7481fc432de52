"""train.py - does variance reduction make masked diffusion training stable? Train and compare.

    python train.py                                        an ARM, a plain MDM, the paper's method
    python train.py --method=ppots_mirror                  one method: P-POTS and MIRROR together
    python train.py --method=mdm,mdm_batch2,multi2,mirror  MIRROR, beside controls of the same cost
    python train.py --n_seeds=32                           32 seeds, trained at the same time
    python train.py --dataset=shakespeare_char             a text; or --dataset=FILE, your own
    python train.py --report                               tables and figures of the newest results

mdm.py holds the model and explains the methods. All seeds of a method train at once, as one model
whose parameters have a row for each seed. Shapes: S seeds, B sequences in a batch, T tokens in a
sequence, and n of them to predict, at the positions `pos`.

Text has other defaults: n_layer 4, n_embd 128, batch_size 12, steps 2000.
For two GPUs, run two commands with different methods or seeds in the same --out_dir.
A method is arm, mdm, or words joined by _. Section 8 of mdm.py and --help have all words.
"""
import argparse
import copy
import dataclasses
import itertools
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mdm
from data import arith, runs, text
from data.results import report, variance
from data.runs import fail

# --------------------------------------------------------------------------------------------------
# Settings, the same for all methods. If you know nanoGPT, glance at them, and go on at Randomness.
# Brackets in a description tell the value without the flag.


class Setting(NamedTuple):
    name: str
    default: object
    why: str  # its --help
    low: object = None  # the smallest number allowed
    high: object = None  # the largest number allowed
    shared: bool = True  # if False, runs in one folder may differ in it
    user: str = ""  # who uses it: sums, text, init_from or a method's word; "" means everyone


SETTINGS = [
    # The methods, the seeds and the data.
    Setting("method", "arm,mdm,ppots_mirror", "methods, separated by commas", shared=False),
    Setting("seeds", "", "seeds, separated by commas [see n_seeds]", shared=False),
    Setting("n_seeds", 3, "how many: 42,731,20231, then 0,1,2,...", 1, 10**5, shared=False),
    Setting("dataset", "add3", f"{', '.join(arith.DATASETS)}; or shakespeare_char; or a text file"),
    Setting("init_from", "", "fine-tune: start from the arm or mdm in this folder", shared=False),
    Setting("init_seed", -1, "seed to start from (-1: the smallest)", -1, 10**18, user="init_from"),
    Setting("n_train", 0, "number of training problems (0: all)", 0, 10**9, user="sums"),
    Setting("n_test", 512, "held-out problems; a quick evaluation takes at most 512",
            1, 10**6, user="sums"),
    Setting("tokenizer", "char", "char, or a tiktoken encoding such as gpt2", user="text"),
    Setting("block_size", 64, "response tokens, after one prompt token", 1, 10**6, user="text"),
    # The model.
    Setting("n_layer", 2, "transformer blocks; two are enough to carry digits", 1, 1000),
    Setting("n_head", 4, "attention heads", 1, 1000),
    Setting("n_embd", 64, "width; enough to solve add3 in seconds a seed", 1, 10**5),
    # The training.
    Setting("steps", 1000, "optimizer steps; enough for most good methods on add3", 1, 10**9),
    Setting("batch_size", 64, "sequences per step and seed", 1, 10**6),
    Setting("lr", 3e-3, "peak learning rate", 0, 1e3),
    Setting("warmup", 100, "steps up to the peak; then lr falls linearly to 0", 0, 10**9),
    Setting("beta2", 0.98, "AdamW's second decay rate; the first is 0.9", 0, 0.9999),
    Setting("weight_decay", 0.01, "small, as a model of this size hardly overfits", 0, 1e3),
    Setting("grad_clip", 1.0, "largest norm of a seed's gradient", 1e-9, 1e9),
    Setting("eps", 1e-3, "smallest masking probability p, LLaDA's: bounds weights 1/p", 0, 0.9),
    Setting("until_nll", 0.0, "end at this held-out nll, the seeds' mean (0: never)", 0, 1e9),
    Setting("eval_every", 250, "steps between evaluations; each saves a checkpoint", 1, 10**9),
    # Settings of single methods.
    Setting("ppots_fit", "epr", "epr: the paper's smooth curve; grid: as measured", user="ppots"),
    Setting("ppots_refits", 10, "pilots in a training: each measures anew", 1, 10**4, user="ppots"),
    Setting("ppots_budget", 0.01, "share of the work that pilots may cost", 1e-9, 1, user="ppots"),
    Setting("isad_tokens", "", "rare tokens [separators; text: rarest 5 percent]", user="isad"),
    # Where and how.
    Setting("out_dir", "", "folder of all results [out/ and the changed settings]", shared=False),
    Setting("resume", False, "go on from the checkpoints, as if never stopped", shared=False),
    Setting("report", False, "only show tables and figures; --out_dir=a,b: of two", shared=False),
    Setting("variance", False, "measure the gradient's noise at the trained mdm", shared=False),
    Setting("baseline", "mdm", "the method to compare all others with", shared=False),
    Setting("device", "auto", "cpu, cuda, cuda:1, mps; auto takes the best there is"),
    Setting("compile", False, "torch.compile: takes 20 s; on a CPU it pays from 8000 steps on"),
]
TEXT_DEFAULTS = {"n_layer": 4, "n_embd": 128, "batch_size": 12, "steps": 2000}  # nanoGPT's on a CPU
PAPER_SEEDS = [42, 731, 20231]  # in all tables of the paper


def kind_of(dataset):
    return "sums" if dataset in arith.DATASETS else "text"  # mul2 counts as sums, too


def defaults(dataset):
    others = TEXT_DEFAULTS if kind_of(dataset) == "text" else {}
    return {s.name: s.default for s in SETTINGS} | others


def parse_args(argv=None):
    """Read the command line. Returns (cfg, methods, seeds), or leaves with an error message."""
    words = {**mdm.MASKING, **mdm.TRAINING}
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__ + "".join(f"\n    {word:8} {about}" for word, about in words.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that we see which flags were given
        allow_abbrev=False,
    )
    parser.error = fail  # one line, without the usage
    for s in SETTINGS:
        if s.default is False:  # a switch
            form = {"action": "store_true"}
        else:
            form = {"type": type(s.default), "metavar": type(s.default).__name__}
        why = f"{s.user}: {s.why}" if s.user else s.why
        if s.default and s.default != -1:  # -1, 0 and "" are explained in the text
            why += f" [{s.default}]"
        parser.add_argument(f"--{s.name}", help=why, **form)
    given = vars(parser.parse_args(argv))  # only the flags that were typed
    for name in {"out_dir", "init_from", "dataset"} & given.keys():  # ~ is the home folder
        given[name] = ",".join(os.path.expanduser(part) for part in given[name].split(","))
    # All others have their defaults, and a text has other defaults than sums.
    values = defaults(given.get("dataset", "add3")) | given
    cfg = argparse.Namespace(**values)  # cfg.lr, for example
    try:
        methods = [method_name(mdm.parse_method(name)) for name in cfg.method.split(",")]
        cfg.baseline = method_name(mdm.parse_method(cfg.baseline))
    except ValueError as e:
        fail(e)
    methods = list(dict.fromkeys(methods))  # each once, in this order
    check_values(cfg)
    check_effects(cfg, given, methods)
    return cfg, methods, parse_seeds(cfg)


def method_name(words):
    """The one spelling of a set of words: {"mirror", "ppots"} -> "ppots_mirror"."""
    ordered = [word for word in [*mdm.MASKING, *mdm.TRAINING] if word in words]
    if set(words) <= {"batch2", "steps2"}:
        ordered = ["mdm", *ordered]
    return "_".join(ordered)


def parse_seeds(cfg):
    """The seeds as a list. By default the paper's three come first, then 0, 1, 2, ..."""
    if not cfg.seeds:
        others = [seed for seed in range(cfg.n_seeds) if seed not in PAPER_SEEDS]
        return (PAPER_SEEDS + others)[: cfg.n_seeds]
    words = cfg.seeds.split(",")
    seeds = [int(word) for word in words if word.isdecimal()]
    # Fewer than the words if one is no number, too large for stream(), or given twice.
    usable = {seed for seed in seeds if seed < 2**32}
    if len(usable) < len(words):
        fail(f"--seeds={cfg.seeds}: give different whole numbers below 2**32, separated by commas")
    return seeds


def check_values(cfg):
    """Refuse numbers outside their limits, and models that cannot be built."""
    for s in SETTINGS:
        value = getattr(cfg, s.name)
        if s.high is not None and not s.low <= value <= s.high:
            fail(f"--{s.name}={value} is not between {s.low} and {s.high}")
    if cfg.ppots_fit not in ("epr", "grid"):
        fail(f"--ppots_fit={cfg.ppots_fit} must be epr or grid")
    if cfg.n_embd % (2 * cfg.n_head):  # rotary positions need heads of even size
        fail(f"--n_embd={cfg.n_embd} is no multiple of twice --n_head={cfg.n_head}")


def check_effects(cfg, given, methods):
    """Refuse settings and words without an effect."""
    users = {kind_of(cfg.dataset), *words_of(methods)}
    if cfg.init_from:
        users.add("init_from")
    for s in SETTINGS:
        if s.name in given and s.user and s.user not in users:
            fail(f"--{s.name} affects {s.user} only, and there is none in --dataset={cfg.dataset} "
                 f"--method={','.join(methods)}: leave it out, or check the names")
    if "seeds" in given and "n_seeds" in given:
        fail("--seeds says which seeds, --n_seeds how many: give one of them")
    for method in methods:
        # StraTS cuts (0,1] into strata. For a batch of 7, for example, there is only one.
        words = mdm.parse_method(method)
        if "strats" in words and mdm.n_strata(cfg.batch_size * mdm.work(words).batch) == 1:
            fail(f"{method}: --batch_size={cfg.batch_size} has no strata: choose 4, 9 or 64, say")


def words_of(methods):
    """The words of all the methods together."""
    return set().union(*map(mdm.parse_method, methods))


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
    words = words_of(methods)
    if "isad" in words and not data.rare:
        fail(f"isad: {cfg.dataset} has no rare tokens of its own: name some with --isad_tokens")
    if "syrm" in words and not data.structural:
        fail(f"syrm hides symbols of the prompt, and there are none in {cfg.dataset}")
    return data


# --------------------------------------------------------------------------------------------------
# Randomness. A random stream is known by a name: (seed, purpose, part). A part is an epoch, a
# chunk of steps, or the step of a pilot. So --resume can draw a part again, and no seed's numbers
# depend on other seeds.

PURPOSES = ["init", "data", "rate", "mask", "pilot"]  # the order is part of the key: only append


def stream(seed, purpose, part=0, device="cpu"):
    """The random generator of this name. SeedSequence hashes the three numbers. Each must be below
    2**32: a larger one would count as two, and two names could be the same."""
    name = [seed, PURPOSES.index(purpose), part]
    key = np.random.SeedSequence(name).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key))


def epochs(seed, first, count, n_train, device):
    """Indices of training problems, (count,). Each seed has an endless list: one epoch after
    another, all problems in each, in another random order. We take `count` of them, from the place
    `first` on. A batch may hold the end of one epoch and the beginning of the next."""
    first_epoch, start = divmod(first, n_train)
    last_epoch = (first + count - 1) // n_train
    order = []
    for epoch in range(first_epoch, last_epoch + 1):
        generator = stream(seed, "data", epoch, device)
        order.append(torch.randperm(n_train, generator=generator, device=device))
    return torch.cat(order)[start : start + count]


def random_numbers(words, seeds, first_step, B, n, n_train, in_epochs, device):
    """Yield the random numbers of each step, from first_step on:

    idx (S, B)     which training sequences make up the batch
    u (S, B)       uniform in (0, 1]; the masking rate of a sequence follows from it
    r (S, B, n)    uniform in [0, 1), one for each token; it decides which tokens are hidden.
                   multi2 has two independent masks: (2, S, B, n)."""
    # It is faster to draw the numbers of K steps at once, a chunk. For long sequences K is smaller,
    # which saves memory. K must not depend on the other seeds, or a seed's numbers would, too.
    K = max(1, min(64, 2**20 // (B * n)))
    r_shape = (2, B, n) if "multi2" in words else (B, n)
    for chunk in itertools.count(first_step // K):
        idx = []
        u = []
        r = []
        for seed in seeds:
            if in_epochs:
                idx.append(epochs(seed, chunk * K * B, K * B, n_train, device).view(K, B))
            else:  # random windows of a text, as in nanoGPT
                generator = stream(seed, "data", chunk, device)
                idx.append(torch.randint(n_train, (K, B), generator=generator, device=device))
            generator = stream(seed, "rate", chunk, device)
            u.append(1 - torch.rand(K, B, generator=generator, device=device))  # never 0
            generator = stream(seed, "mask", chunk, device)
            r.append(torch.rand(K, *r_shape, generator=generator, device=device))
        idx = torch.stack(idx, 1)  # (K, S, B)
        u = torch.stack(u, 1)  # (K, S, B)
        r = torch.stack(r, -3)  # (K, S, B, n), or (K, 2, S, B, n)
        for i in range(K):
            if chunk * K + i >= first_step:  # --resume may begin inside a chunk
                yield idx[i], u[i], r[i]


# --------------------------------------------------------------------------------------------------
# Training.

# The first steps run as usual, and torch loads its kernels. Then a GPU records a step.
RECORD_AFTER = 3


def model_config(cfg, method, data):
    causal = "arm" in mdm.parse_method(method)  # the only difference between the networks
    V = len(data.vocabulary)
    T = data.test.shape[1]  # prompt and response
    return mdm.GPTConfig(V, T, cfg.n_layer, cfg.n_head, cfg.n_embd, causal)


def build(cfg, method, seeds, data, device):
    """The model, with a row of parameters for each seed, and the positions (n,) to predict."""
    config = model_config(cfg, method, data)
    model = mdm.GPT(config, [stream(seed, "init") for seed in seeds])
    pos = list(range(data.prompt_len, data.test.shape[1]))  # the response
    if "syrm" in mdm.parse_method(method):  # SyRM also hides the prompt's symbols
        pos = [*data.structural, *pos]
    return model.to(device), torch.tensor(pos, device=device)


def learning_rate(cfg, step, steps):
    # 1) linear warm-up
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    # 2) then linear decay: it would reach 0 one step after the last
    return cfg.lr * (steps - step) / (steps - cfg.warmup)


def sequence_loss(model, words, x0, pos, u, r, table, is_rare_token, eps):
    """The loss of each sequence, (S, B), for x0 (S, B, T)."""
    if "arm" in words:
        return mdm.token_nll(model, x0, pos).mean(-1)
    is_rare = is_rare_token[x0[..., pos]] if "isad" in words else None  # (S, B, n)
    masking = words & mdm.MASKING.keys()  # train() and build() see to the others
    mask, weight = mdm.draw_masks(masking, u, r, table=table, eps=eps, is_rare=is_rare)
    return mdm.method_loss(model, x0, pos, mask, weight)


def new_state(seeds, steps, device):
    """The state before the first step. train() adds the weights. A checkpoint holds all of it."""
    S = len(seeds)
    return {
        "step": 0,
        "steps": steps,
        "done": False,
        "curve": [],  # a dictionary for each evaluation, with a number for each seed
        "diverged": torch.zeros(S, device=device),  # the step in which a seed diverged, or 0
        "gradclip": torch.zeros(S, device=device),  # steps with a clipped gradient
        "table": torch.zeros(S, mdm.N_CELLS, device=device),  # P-POTS: the chance of each rate
        "ema": torch.zeros(S, 10, device=device),  # EMA: the running mean loss of 10 bins of u
        "pilot": 0,  # P-POTS: the forward passes of a seed's pilots, each of one sequence
        "seconds": 0.0,  # of all steps and the evaluations after them
        **runs.machine(device),
    }


def train(cfg, method, seeds, data, device="cpu", state=None):
    """Train one method for all seeds at once. Yield the state at the start and after every
    evaluation. A yielded state never changes afterwards. A training can go on from any of them.

    state: a yielded one; or {"model": the weights to start from}; or None, a new training.

    A seed diverges when its loss or its gradient is not finite. From then on its gradient is 0, and
    only momentum and weight decay move its weights. No other seed is affected."""
    # The method.
    words = mdm.parse_method(method)
    work = mdm.work(words)  # in multiples of plain training's
    B = cfg.batch_size * work.batch
    steps = cfg.steps * work.steps

    # The model and the optimizer.
    model, pos = build(cfg, method, seeds, data, device)
    params = list(model.parameters())
    betas = (0.9, cfg.beta2)
    optimizer = torch.optim.AdamW(params, cfg.lr, betas, weight_decay=cfg.weight_decay, fused=True)
    loss_of = sequence_loss
    if cfg.compile:
        torch.compiler.reset()  # else torch compiles the function for eight methods only
        loss_of = torch.compile(sequence_loss)

    # The state: new, or where an earlier training stopped.
    state = new_state(seeds, steps, device) | (state or {})
    if "model" in state:
        model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # or steps would change it
    first = state["step"]
    # Training changes these in place, so they are copies. `state` keeps the last evaluation's.
    names = ("diverged", "gradclip", "table", "ema")
    diverged, gradclip, table, ema = (state[name].to(device, copy=True) for name in names)
    loss_sum = torch.zeros(len(seeds), device=device)  # since the last evaluation
    clock = torch.full((), first, device=device)  # the steps begun: a graph knows tensors only

    # The data, and the random numbers of each step.
    train_x = data.train_blocks(device)  # (n_train, T), all on the device
    rare = torch.tensor(data.rare)
    is_rare_token = torch.isin(torch.arange(len(data.vocabulary)), rare).to(device)  # for ISAD
    n = len(pos)
    in_epochs = not data.is_text
    numbers = random_numbers(words, seeds, first, B, n, len(train_x), in_epochs, device)
    refit_every, n_pilot = pilot_size(cfg, steps, B * work.masks, n)  # for P-POTS
    pilot_passes = n_pilot * min(n, mdm.N_COUNTS)  # forward, for each sequence and mask

    def compute_gradient(idx, u, r):
        """The gradient of a step, left in each parameter's .grad. idx says which sequences; u is
        for rates, and r for masks. A GPU records this function once and then repeats it: see
        recorded(). So all that it keeps stays at its place in memory. And nobody else may clear
        .grad, or the optimizer would not see the recording's gradients."""
        clock.add_(1)
        optimizer.zero_grad()

        # The loss of each sequence, (S, B).
        x0 = train_x[idx].long()  # (S, B, T)
        loss = loss_of(model, words, x0, pos, u, r, table, is_rare_token, cfg.eps)
        if "ema" in words:
            used_u = mdm.stratify(u) if "strats" in words else u  # the u that draw_masks used
            loss, new_ema = mdm.ema_baseline(loss, used_u, ema)
            ema.copy_(new_ema)

        # The gradient. Seeds share no parameter. So row s of the gradient of the summed loss is
        # the gradient of seed s alone.
        loss = loss.mean(-1)  # (S,)
        loss.sum().backward()
        alive = diverged == 0
        healthy, was_clipped = clip_per_seed(params, alive & torch.isfinite(loss), cfg.grad_clip)
        diverged.copy_(torch.where(alive & ~healthy, clock, diverged))
        gradclip.add_(was_clipped)
        loss_sum.add_(loss.detach())

    if not state["curve"]:  # the scores before training
        point = {"step": 0, "loss": [None] * len(seeds), **evaluate(model, data, quick=True)}
        state = snapshot(state, model, optimizer, curve=[point])
        yield state
    # torch calls AMD's GPUs cuda, too. But they may repeat a recording wrongly, without an error.
    can_record = device.startswith("cuda") and not torch.version.hip
    began = time.perf_counter()

    for step in range(first, steps):
        # P-POTS measures now and then which rates are noisy.
        if "ppots" in words and step % refit_every == 0:
            table.copy_(measure_table(cfg, seeds, model, train_x, pos, step, n_pilot))
            state = state | {"pilot": state["pilot"] + pilot_passes}

        # The step.
        batch = next(numbers)
        if can_record and step == first + RECORD_AFTER:
            compute_gradient = recorded(compute_gradient, batch)  # no step yet
        compute_gradient(*batch)
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step, steps)
        optimizer.step()

        # The evaluation. It is quick, but not at the last step, nor if --until_nll may end it here.
        steps_done = step + 1
        last = steps_done == steps
        if steps_done % cfg.eval_every != 0 and not last:
            continue
        thorough = last or cfg.until_nll > 0
        scores = evaluate(model, data, quick=not thorough)
        mean_loss = loss_sum / (steps_done - state["step"])  # since the last evaluation
        point = {"step": steps_done, "loss": mean_loss.tolist(), **scores}
        low_enough = cfg.until_nll > 0 and np.mean(scores["nll"]) <= cfg.until_nll
        all_diverged = (diverged > 0).all()
        state = snapshot(
            state, model, optimizer, step=steps_done, curve=[*state["curve"], point],
            done=bool(last or low_enough or all_diverged),
            diverged=diverged, gradclip=gradclip, table=table, ema=ema,
            seconds=state["seconds"] + time.perf_counter() - began,
        )  # fmt: skip
        yield state
        if state["done"]:
            return
        loss_sum.zero_()
        began = time.perf_counter()  # the time for saving is not counted


def snapshot(state, model, optimizer, **changes):
    """The old state with new values. They are copied, since training goes on in place."""
    changes = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **changes}
    return {**state, **copy.deepcopy(changes)}


def recorded(function, inputs):
    """Record a function of tensors as a CUDA graph. Returns a function that repeats it.

    A small model's gradient takes some 450 kernels, the GPU's programs. The GPU needs 1 ms for
    them. But Python needs 10 ms to start them one by one. A graph starts all with one command.

    A graph repeats the kernels on the same memory, and no Python. So the function must keep all
    shapes, put its results in place, and never ask the GPU for a value."""
    inputs = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph):
        function(*inputs)  # Python runs once, but the GPU only notes the kernels

    def replay(*new_inputs):
        for x, new in zip(inputs, new_inputs, strict=True):
            x.copy_(new)
        graph.replay()

    return replay


def clip_per_seed(params, healthy, max_norm):
    """Scale each seed's gradient to a norm of at most max_norm. It becomes 0 if the seed is not
    healthy (S,), or if it is not finite. Returns two bool tensors (S,): healthy, clipped."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in params).sqrt()  # (S,)
    healthy = healthy & torch.isfinite(norm)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_ does
    scale = torch.where(healthy, scale, 0)
    for p in params:
        row_per_seed = p.grad.view(len(scale), -1)  # the same memory
        row_per_seed.nan_to_num_(0, 0, 0).mul_(scale[:, None])  # NaN times 0 would stay NaN
    return healthy, healthy & (norm > max_norm)


def pilot_size(cfg, steps, rows, n):
    """P-POTS: the steps from one pilot to the next, and the sequences of a pilot.

    All pilots together may cost the share ppots_budget of the training. A step trains on `rows`
    sequences, and each costs as much as three forward passes. In a pilot a sequence costs a forward
    pass for each of its masks. A pilot has at least 8 sequences, so there may be fewer pilots than
    ppots_refits, and a very short training exceeds the budget."""
    forward_passes = cfg.ppots_budget * 3 * steps * rows
    in_all_pilots = forward_passes / min(n, mdm.N_COUNTS)  # sequences
    refits = max(1, min(cfg.ppots_refits, int(in_all_pilots / 8)))
    return math.ceil(steps / refits), max(8, int(in_all_pilots / refits))


def measure_table(cfg, seeds, model, train_x, pos, step, n_pilot):
    """P-POTS' table of each seed, (S, N_CELLS), from a pilot of n_pilot training sequences."""
    device = train_x.device
    n = len(pos)
    r_shape = (n_pilot, min(n, mdm.N_COUNTS), n)
    x0 = []
    r = []
    for seed in seeds:
        generator = stream(seed, "pilot", step, device)
        idx = torch.randint(len(train_x), (n_pilot,), generator=generator, device=device)
        x0.append(train_x[idx].long())  # (n_pilot, T)
        r.append(torch.rand(r_shape, generator=generator, device=device))
    counts, H = mdm.pilot(model, torch.stack(x0), pos, torch.stack(r))
    H = H.nan_to_num(0, 0, 0)  # of a diverged seed: its table does not matter, but must exist
    return mdm.ppots_table(counts, H, n, cfg.ppots_fit, cfg.eps)


# --------------------------------------------------------------------------------------------------
# Evaluation on held-out data: the same for every method, and always with the same masks.

BOUND_MASKS = 8  # masks per sequence in bound()


def evaluate(model, data, quick=False):
    """The scores of each seed, as lists: "nll", its standard error "nll_se", for sums "accuracy".
    quick: accuracy on at most 512 problems, not all, and nll on 128 sequences, not 512."""
    scores = {}
    if not data.is_text:
        scores["accuracy"] = accuracy(model, data, 512 if quick else None).tolist()
    nll = bound(model, data, 128 if quick else 512)  # (S, n_sequences)
    n_sequences = nll.shape[1]
    sd = nll.std(1) if n_sequences > 1 else torch.full_like(nll[:, 0], torch.nan)
    scores["nll"] = nll.mean(1).tolist()
    scores["nll_se"] = (sd / n_sequences**0.5).tolist()
    return scores


def rows_at_once(model, n):
    """How many sequences of n response tokens an evaluation can take at once. The largest array of
    a forward pass is the logits, or the middle of an MLP. It may have 2**24 numbers, some 64 MB."""
    S = len(model.wte)
    # An MLP is 4 n_embd wide. We allow for 4 tokens in all for each response token.
    per_token = max(model.config.vocab_size, 4 * 4 * model.config.n_embd)
    return max(1, 2**24 // (BOUND_MASKS * S * n * per_token))


@torch.no_grad()
def accuracy(model, data, n_problems=None):
    """The share of fully correct responses, (S,). Generation is greedy, the surest token first."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    right = []
    for x0 in data.test[:n_problems].to(device).split(rows_at_once(model, len(pos))):
        xt = x0.clone()
        xt[:, pos] = model.config.vocab_size  # the mask token: the whole response is hidden
        *_, x = mdm.generate(model, xt.expand(S, -1, -1), pos)  # only the last x is complete
        right.append((x == x0).all(-1))  # (S, rows)
    return torch.cat(right, 1).float().mean(1)


@torch.no_grad()
def bound(model, data, n_sequences):
    """The nll per response token of each sequence, (S, n_sequences). An ARM's is exact. An MDM's is
    an upper bound, equation (2) of mdm.py, estimated with 8 masks of each sequence. They hide few
    tokens, then more and more: the numbers u behind them lie in (0, 1/8], (1/8, 2/8], and so on."""
    device = model.wte.device
    S = len(model.wte)
    pos = torch.arange(data.prompt_len, data.test.shape[1], device=device)
    n_sequences = min(n_sequences, len(data.test))
    spread = torch.linspace(0, len(data.test) - 1, n_sequences).round().long()  # from all places
    x0 = data.test[spread].to(device).expand(S, -1, -1)

    generator = torch.Generator().manual_seed(0)  # on the CPU: the same masks for all models
    within = 1 - torch.rand(BOUND_MASKS, n_sequences, generator=generator)  # its eighth
    u = (torch.arange(BOUND_MASKS)[:, None] + within) / BOUND_MASKS
    r = torch.rand(*u.shape, len(pos), generator=generator)
    drawn = mdm.draw_masks("exactk", u, r)  # mask and weight, both (1, 8, n_sequences, n)
    # The same 8 masks for all seeds: (8, S, n_sequences, n).
    mask, weight = (z.transpose(0, 1).to(device).expand(-1, S, -1, -1) for z in drawn)

    rows = rows_at_once(model, len(pos))
    nll = []
    for x, m, w in zip(x0.split(rows, 1), mask.split(rows, 2), weight.split(rows, 2)):
        if model.config.causal:
            nll.append(mdm.token_nll(model, x, pos).mean(-1))  # by the chain rule
        else:
            nll.append(mdm.method_loss(model, x, pos, m, w))
    return torch.cat(nll, 1)


# --------------------------------------------------------------------------------------------------
# Files: one folder is one comparison (see data/runs.py).


def changed(cfg, settings):
    """The settings whose values are not the defaults, {name: value}."""
    usual = defaults(cfg.dataset)
    values = {s.name: getattr(cfg, s.name) for s in settings}
    return {name: value for name, value in values.items() if value != usual[name]}


def shared_settings(cfg):
    """The settings that all runs in a folder share. A method's own settings are in its label."""
    return [s for s in SETTINGS if s.shared and s.user in ("", kind_of(cfg.dataset))]


def label(cfg, method):
    """A method's name in tables and files, with its own settings: "ppots ppots_fit=grid"."""
    words = mdm.parse_method(method)
    own = changed(cfg, [s for s in SETTINGS if s.user in words])
    parts = [method, *(f"{name}={value}" for name, value in own.items())]
    return " ".join(parts).replace("/", "-")  # --isad_tokens may hold a /


def default_folder(cfg):
    """out/DATASET_CHANGES, for example out/mul2_steps1500 for --dataset=mul2 --steps=1500."""
    changes = changed(cfg, shared_settings(cfg))
    changes.pop("dataset", None)  # it comes first, without its path
    parts = [Path(cfg.dataset).stem, *(f"{name}{value}" for name, value in changes.items())]
    if cfg.init_from:
        parts.append("from_" + Path(cfg.init_from).name)
    return os.path.join("out", "_".join(parts).replace(",", "-"))  # a comma separates folders


def load_start(cfg, method, data):
    """--init_from: the model to start from, {"name", "fingerprint", "weights"}. None without it."""
    if not cfg.init_from:
        return None
    base = "arm" if "arm" in mdm.parse_method(method) else "mdm"
    seed = cfg.init_seed if cfg.init_seed >= 0 else None
    theirs = runs.find_checkpoint(cfg.init_from, base, seed)
    if theirs["config"] != dataclasses.asdict(model_config(cfg, method, data)):
        fail(f"{cfg.init_from} has another model, {theirs['config']}: give the same settings")
    if theirs["vocabulary"] != dataclasses.asdict(data.vocabulary):
        fail(f"{cfg.init_from} was trained on other tokens than those of {cfg.dataset}")
    if not theirs["state"]["done"]:
        fail(f"--init_from={cfg.init_from}: its {base} is unfinished: --resume it first")
    name = f"{Path(theirs['dataset']).stem}-{theirs['seed']}"
    weights_id = runs.fingerprint(*theirs["weights"].values())
    # The name tells only the data and the seed, so another start may have the same. In one folder
    # two starts of a kind (ARM or MDM) must not share a name.
    for line in runs.read_results(cfg.out_dir):
        same_base = line["method"].startswith("arm") == (base == "arm")
        if line["start"] == name and same_base and line["start_weights"] != weights_id:
            fail(f"{cfg.out_dir} has runs that start from another {name}: take another --out_dir")
    return {"name": name, "fingerprint": weights_id, "weights": theirs["weights"]}


def save(cfg, method, seeds, data, state, path):
    """A checkpoint: everything that --resume, --init_from and sample.py need."""
    runs.save_checkpoint(path, {
        "seeds": seeds, "state": state, "dataset": cfg.dataset,
        "vocabulary": dataclasses.asdict(data.vocabulary),
        "config": dataclasses.asdict(model_config(cfg, method, data)),
    })  # fmt: skip


def of_seed(point, s):
    """Seed s's numbers of an evaluation. The step is the same for all seeds."""
    return {name: value if name == "step" else value[s] for name, value in point.items()}


def result_lines(cfg, method, seeds, data, state, start):
    """A line for each seed, for results.jsonl."""
    work = mdm.work(mdm.parse_method(method))
    B = cfg.batch_size * work.batch
    n_passed = state["step"] * B * work.masks + state["pilot"]  # sequences, through the model
    n_params = sum(weights[0].numel() for weights in state["model"].values())  # of one seed
    lines = []
    for s, seed in enumerate(seeds):
        curve = [of_seed(point, s) for point in state["curve"]]
        scores = {k: v for k, v in curve[-1].items() if k not in ("step", "loss")}
        lines.append({
            "method": label(cfg, method), "seed": seed, "start": start["name"] if start else "",
            "start_weights": start["fingerprint"] if start else "", "passes": work.passes,
            "batch_size": B, "steps": state["steps"], **scores,
            "diverged": int(state["diverged"][s]) or None,  # None: it did not
            "gradclip": state["gradclip"][s].item() / max(1, state["step"]),  # a share of the steps
            "n_params": n_params, "forward_tokens": n_passed * data.test.shape[1],
            "seconds": round(state["seconds"], 2), "seeds_trained_together": len(seeds),
            "processor": state["processor"], "threads": state["threads"],
            "torch": state["torch"], "commit": state["commit"], "curve": curve,
        })  # fmt: skip
    return runs.without_nan(lines)


def pick_device(name):
    """The torch name of a device: what --device says, or the best there is for "auto". On CUDA it
    also makes torch deterministic."""
    if name == "auto":
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        torch.zeros(1, device=name).item()  # the first use shows whether it works
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as e:
        why = str(e).partition("\n")[0]
        fail(f"the device {name} cannot be used here ({why}): try --device=cpu")
    if name.startswith("cuda"):
        # The same command shall give the same numbers. By default a GPU may add numbers in any
        # order, and then the last digits differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products refuse
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # filling costs time
    return name


# --------------------------------------------------------------------------------------------------
# The comparison.


def main(argv=None):
    cfg, methods, seeds = parse_args(argv)
    if cfg.report:  # train nothing
        out_dir = cfg.out_dir or runs.newest_folder() or "out"
        try:
            return report.main(out_dir.split(","), cfg.baseline)
        except ValueError as e:
            fail(e)
    if "," in cfg.out_dir:
        fail(f"--out_dir={cfg.out_dir}: only --report takes several folders; leave out the comma")
    if cfg.variance and "mdm" not in methods:
        fail("--variance measures at the plain MDM's weights: add mdm to --method")
    data = load_data(cfg, methods)
    if cfg.variance and len(data.test) < 3:
        fail("--variance needs three test sequences: raise --n_test, or take a longer text")
    device = pick_device(cfg.device)
    cfg.out_dir = cfg.out_dir or default_folder(cfg)
    compare(cfg, methods, seeds, data, device)
    if cfg.variance:
        variance.measure(cfg, methods, seeds[:1], data, device, build)
    return 0


def compare(cfg, methods, seeds, data, device):
    """Train the methods one after another, save everything, and print the results."""
    settings = {s.name: getattr(cfg, s.name) for s in shared_settings(cfg)}
    settings["data"] = data.fingerprint
    settings["device"] = device.split(":")[0]  # cuda:0 and cuda:1 may share a folder
    settings["fine_tuned"] = bool(cfg.init_from)  # from scratch is another comparison
    if not data.is_text:
        settings["n_test"] = len(data.test)  # some tasks have fewer than asked for
    starts = {method: load_start(cfg, method, data) for method in methods}
    runs.join_folder(cfg.out_dir, settings)
    print(f"{cfg.dataset}: {data.describe()}\nseeds {seeds}; {cfg.steps} steps of {cfg.batch_size} "
          f"on {device}, {torch.get_num_threads()} threads; results go to {cfg.out_dir}")
    for method in methods:
        train_and_save(cfg, method, seeds, data, device, starts[method])
    # All methods of the folder with these seeds, also those of earlier commands.
    lines = [line for line in runs.read_results(cfg.out_dir) if line["seed"] in seeds]
    print(f"\n{report.table(settings, lines, cfg.baseline)}\n\n{report.verdict(settings, lines)}")
    # Commands to go on with, ready for a shell.
    out_dir = shlex.quote(cfg.out_dir)
    ask = f"--method={shlex.quote(label(cfg, methods[-1]))} --show"
    if not data.is_text:
        question = data.decode(data.test[0, : data.prompt_len])
        ask += f" --prompt={shlex.quote(question)}"
    print(f"Tables and figures: python train.py --report --out_dir={out_dir}\n"
          f"Try a model: python sample.py --out_dir={out_dir} {ask}")


def train_and_save(cfg, method, seeds, data, device, start):
    """Train one method, and save its results. With --resume a finished one is only read."""
    path = runs.checkpoint_path(cfg.out_dir, label(cfg, method), start, seeds)
    state = {}
    if start:  # all seeds begin at the weights of one
        print(f"{method:>20} starts from {start['name']} of {cfg.init_from}")
        weights = start["weights"].items()
        state = {"model": {name: w.repeat_interleave(len(seeds), 0) for name, w in weights}}
    with runs.lock(path):  # only one program at a time trains it
        if cfg.resume and os.path.exists(path):
            state = runs.load_checkpoint(path)["state"]
            print(f"{method:>20} resumed: {state['step']} of {state['steps']} steps are done")
        elif cfg.resume:
            print(f"{method:>20} begins, as there is no {path}")
        if not state.get("done"):
            for state in train(cfg, method, seeds, data, device, state):
                save(cfg, method, seeds, data, state, path)
                print(progress(method, state), flush=True)
        runs.save_lines(cfg.out_dir, result_lines(cfg, method, seeds, data, state, start))


def progress(method, state):
    """A line on the last evaluation: the scores of up to four seeds, and the time this method still
    needs."""
    line = f"{method:>20} step {state['step']:>5}/{state['steps']}"
    for name, values in state["curve"][-1].items():
        if name in ("loss", "accuracy", "nll") and values[0] is not None:
            line += f"  {name} " + " ".join(f"{value:.2f}" for value in values[:4])
            line += " ..." if len(values) > 4 else ""
    if state["step"] and not state["done"]:
        left = state["seconds"] * (state["steps"] - state["step"]) / state["step"]
        line += f"  ETA {int(left) // 60}:{int(left) % 60:02}"
    return line


if __name__ == "__main__":
    sys.exit(runs.guarded(main))
