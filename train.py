"""train.py - does variance reduction make masked diffusion training stable? Train the methods and compare them.

    python train.py                                        ARM, MDM and P-POTS+MIRROR, three seeds, one table
    python train.py --method=ppots_mirror                  one method (pposts_mirror is the same)
    python train.py --method=mdm,mdm_batch2,multi2,mirror  two-pass MIRROR next to controls of the same compute
    python train.py --n_seeds=32 --out_dir=out32           thirty-two seeds, trained as one batch
    python train.py --resume                               go on where a stopped run was
    python train.py --variance                             and measure the variance of each method, exactly
    python train.py --dataset=shakespeare_char             text: Tiny Shakespeare, or --dataset=FILE for any of yours
    python train.py --report --out_dir=out32               table, intervals and figures of results that are there
    torchrun --nproc_per_node=2 train.py --n_seeds=32      share the seeds over processes, GPUs or machines

All seeds of a method train at once, along the leading axis of every parameter. Each seed has private random streams,
so what it draws depends neither on the other seeds nor on the other methods. Results go to OUT_DIR/results.jsonl, one
line per method and seed, and OUT_DIR/METHOD/ckpt.pt. How the methods work is in mdm.py.
"""
import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

import mdm
from data import arith, report, text
from mdm import GPT, GPTConfig, method_name, parse_method

PAPER_SEEDS = [42, 731, 20231]
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def opt(default, why):
    """A setting: its default, and the reason for it, which is also its --help."""
    return field(default=default, metadata={"help": why})


@dataclass
class Config:
    """Every setting, with the reason for its default. All methods share them: only the estimator differs."""

    # what to run
    method: str = opt("arm,mdm,ppots_mirror", "methods to compare, separated by commas; the paper's claim is about these three")
    seeds: str = opt("", "seeds, separated by commas (default: the paper's 42,731,20231)")
    n_seeds: int = opt(0, "or how many: the paper's three, then 0,1,2,...")
    dataset: str = opt("add3", f"{', '.join(arith.DATASETS)}; or text: shakespeare_char, or the path of a UTF-8 file. add3 takes "
                       "seconds a seed, and a plain MDM's seeds still disagree on it")  # fmt: skip
    tokenizer: str = opt("char", "text: char for characters, or a tiktoken encoding such as gpt2, cut down to the tokens that occur")
    block_size: int = opt(64, "text: tokens predicted per sequence, given one before them; nanoGPT's on a CPU")
    # training
    steps: int = opt(2000, "optimizer steps: the ARM has long solved add3 by then, while the plain MDM's seeds still disagree")
    batch_size: int = opt(64, "sequences per step and seed, all methods alike")
    lr: float = opt(3e-3, "peak learning rate; 100 warm-up steps, then linearly to 0")
    weight_decay: float = opt(0.01, "AdamW's, on every parameter; small, a model this size hardly overfits")
    grad_clip: float = opt(1.0, "largest gradient norm, of each seed by itself")
    eps: float = opt(1e-3, "smallest masking rate, as in LLaDA; it keeps the plain loss's variance finite (see mdm.py)")
    init_from: str = opt("", "fine-tune: start every seed from the first seed of an earlier run's OUT_DIR (its arm for arm, its mdm for the rest)")
    until_nll: float = opt(0.0, "end a method's training at the first evaluation with a mean nll of at most this")
    # model
    n_layer: int = opt(2, "transformer blocks; two suffice for carries")
    n_head: int = opt(4, "attention heads")
    n_embd: int = opt(64, "width; a seed trains in seconds and solves add3")
    # the methods' own
    ppots_fit: str = opt("epr", "P-POTS: epr, the paper's fitted family, or grid, the measured curve itself")
    ppots_refits: int = opt(10, "P-POTS: how often the curve is measured; from scratch it moves, so once is not enough")
    ppots_budget: float = opt(0.01, "P-POTS: share of the training's arithmetic that the forward passes measuring it may cost")
    isad_tokens: str = opt("", "ISAD: its rare tokens, as one string (default: separators in the response, else its 2 rarest; text: the rarest 5 %)")
    # evaluation, files, machine
    eval_every: int = opt(250, "steps between evaluations, progress lines and checkpoints")
    out_dir: str = opt("out", "where results and checkpoints go")
    resume: bool = opt(False, "go on from the checkpoints in --out_dir, to the same numbers as if never stopped")
    variance: bool = opt(False, "after training, measure A, B and C of every method at one frozen model")
    report: bool = opt(False, "train nothing: table, confidence intervals and figures (with matplotlib) of --out_dir's results")
    baseline: str = opt("mdm", "the method that --report compares all others with; mdm_batch2, for instance, for those of two passes")
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")


BETAS = (0.9, 0.98)  # AdamW; 0.98 as usual for small batches of heavy-tailed gradients
WARMUP = 100  # steps
NOT_TRAINING = {"method", "seeds", "n_seeds", "out_dir", "resume", "variance", "report", "baseline", "device"}  # no settings of a training


class UserError(Exception):
    """Something the user can put right; shown as one line."""


def parse_args(argv=None):
    """The command line, as (Config, methods, seeds). Exits with code 2 and one line when a value makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, epilog=methods_help()
    )
    for f in dataclasses.fields(Config):
        why = f.metadata["help"].replace("%", "%%")
        if f.type in (bool, "bool"):
            parser.add_argument(f"--{f.name}", action="store_true", help=why)
        else:
            why += f" [{f.default}]" if f.default not in ("", 0) else ""
            shown = {int: "N", float: "X", str: "..."}[type(f.default)]
            parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, metavar=shown, help=why)
    parser.error = lambda message: sys.exit(fail(message))
    cfg = Config(**vars(parser.parse_args(argv)))
    try:
        cfg.baseline = method_name(parse_method(cfg.baseline))
        return cfg, parse_methods(cfg.method), parse_seeds(cfg)
    except (ValueError, UserError) as e:
        sys.exit(fail(e))


def fail(message, of_all=True):
    """Print the one line of an error, once if all processes have it, and return the exit code."""
    if RANK == 0 or not of_all:
        print(f"error: {message}", file=sys.stderr)
    return 2


def methods_help():
    lines = ["methods: arm, mdm, or ingredients of an MDM joined by _ (pposts is read as ppots):"]
    for word, (attacks, passes, what) in mdm.INGREDIENTS.items():
        lines.append(f"  {word:10} attacks {attacks:5} {'2 passes' if passes == 2 else '1 pass  '}  {what}")
    return "\n".join(lines)


def parse_methods(names):
    """"mdm,pposts_mirror" -> [frozenset(), frozenset({"ppots", "mirror"})], each once."""
    names = [name for name in names.split(",") if name.strip()]
    if not names:
        raise ValueError("--method names no method; for instance --method=mdm,ppots_mirror")
    return list(dict.fromkeys(parse_method(name) for name in names))


def parse_seeds(cfg):
    """The list of seeds. Raises ValueError for none, a negative one, or one given twice."""
    if cfg.n_seeds and cfg.seeds:
        raise ValueError("give --seeds or --n_seeds, not both")
    if not 0 <= cfg.n_seeds <= 10**5:
        raise ValueError("--n_seeds must be from 1 to 100000")
    if not cfg.seeds:
        return (PAPER_SEEDS + [i for i in range(cfg.n_seeds) if i not in PAPER_SEEDS])[: cfg.n_seeds or 3]
    try:
        seeds = [int(s) for s in cfg.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds wants whole numbers separated by commas, not '{cfg.seeds}'") from None
    if min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise ValueError("--seeds must be at least 0, below 2^63, and each given once")
    return seeds


def check(cfg):
    """Raises UserError, in one line, for a setting that cannot work."""
    for name in ("steps", "batch_size", "n_layer", "n_head", "n_embd", "eval_every", "ppots_refits", "block_size"):
        if not 1 <= getattr(cfg, name) <= 10**9:
            raise UserError(f"--{name} must be at least 1 and at most a billion, not {getattr(cfg, name)}")
    for name in ("lr", "grad_clip", "ppots_budget"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} must be a positive number, not {getattr(cfg, name)}")
    if not 0 <= cfg.weight_decay < math.inf or not 0 <= cfg.until_nll < math.inf:
        raise UserError("--weight_decay and --until_nll must be at least 0")
    if not 0 <= cfg.eps < 1 or cfg.ppots_budget > 1:
        raise UserError("--eps must be in [0, 1) and --ppots_budget in (0, 1]")
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"--n_embd ({cfg.n_embd}) must be a multiple of --n_head ({cfg.n_head})")
    if cfg.ppots_fit not in ("epr", "grid"):
        raise UserError(f"--ppots_fit must be epr or grid, not '{cfg.ppots_fit}'")


def load_data(cfg):
    """The data set: data.arith.Arithmetic or data.text.Text, which offer the same. Raises UserError."""
    try:
        if cfg.dataset in arith.DATASETS:
            return arith.make(cfg.dataset)
        if cfg.dataset == "shakespeare_char":
            return text.make(text.shakespeare(), cfg.block_size, cfg.tokenizer, cfg.dataset)
        if os.path.exists(cfg.dataset):
            return text.make(cfg.dataset, cfg.block_size, cfg.tokenizer)
    except ValueError as e:
        raise UserError(e) from None
    raise UserError(f"unknown dataset '{cfg.dataset}': no file of that name, nor one of {', '.join(arith.DATASETS)}, shakespeare_char")


def is_text(dataset):
    return dataset not in arith.DATASETS


def check_memory(cfg, methods, n_seeds, data, device):
    """Refuse what cannot fit: a lower bound on memory (weights, gradients, Adam's moments, activations) against the machine's."""
    C, L, T = cfg.n_embd, cfg.n_layer, data.test.shape[1]
    S = n_seeds / WORLD_SIZE * (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device == "cpu" else 1)
    n_params = 12 * L * C * C + C * (2 * len(data.vocabulary) + T)
    n_activations = max(mdm.n_passes(m - {"steps2"}) for m in methods) * cfg.batch_size * T * (10 * L * C + len(data.vocabulary))
    needed = 4 * S * (4 * n_params + n_activations)
    if device.startswith("cuda"):
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows has no such call in the standard library
        return
    if needed > there:
        raise UserError(f"this needs at least {needed / 2**30:.0f} GiB of memory, {device} has {there / 2**30:.0f}: {SMALLER}")


SMALLER = "lower --n_seeds, --batch_size, --n_embd, --n_layer or --block_size"


def pick_device(name):
    if name in ("auto", "cuda") and torch.cuda.is_available() and WORLD_SIZE > 1:  # each process has a GPU of its own
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device={name} cannot be used on this machine; leave it out to take what there is") from None
    return name


# ---------------------------------------------------------------------------------------------------------------
# Randomness. Every number a run draws comes from a stream named by (seed, purpose, block of steps). So a seed's numbers
# depend on nothing else, and a stream need not be saved: the step number says where it stands.

STREAMS = ["init", "data", "rate", "shuffle", "mask", "pilot"]


def stream(seed, purpose, block=0, device="cpu"):
    key = np.random.SeedSequence([seed, STREAMS.index(purpose), block]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key))


def draw_block(method, seeds, block, n_steps, batch_size, n_train, n, device):
    """All the random numbers of n_steps steps, in a few large draws: idx, u (K, S, B), r (K, copies, S, B, n)."""
    K, B, copies = n_steps, batch_size, 2 if "multi2" in method else 1
    idx, u, r = [], [], []
    for seed in seeds:
        idx.append(torch.randint(n_train, (K, B), generator=stream(seed, "data", block, device), device=device))
        u.append(1 - torch.rand(K, B, generator=stream(seed, "rate", block, device), device=device))
        r.append(torch.rand(K, copies, B, n, generator=stream(seed, "mask", block, device), device=device))
    u = torch.stack(u, 1)
    if method & {"strats", "lowdisc"}:
        shuffle = [torch.rand(K, B, generator=stream(seed, "shuffle", block, device), device=device) for seed in seeds]
        u = mdm.draw_rates(method, u, torch.stack(shuffle, 1).argsort(-1))
    return torch.stack(idx, 1), u, torch.stack(r, 2)


# ---------------------------------------------------------------------------------------------------------------
# Training.


def build(cfg, method, seeds, data, device):
    """A stacked model, one row per seed, and the positions (n,) that the method may mask."""
    T = data.test.shape[1]
    causal = "arm" in method
    gpt_config = GPTConfig(len(data.vocabulary), T, cfg.n_layer, cfg.n_head, cfg.n_embd, causal)
    model = GPT(gpt_config, [stream(seed, "init") for seed in seeds]).to(device)
    response = list(range(data.prompt_len, T))
    pos = [*data.structural, *response] if "syrm" in method else response
    return model, torch.tensor(pos, device=device)


def train(cfg, method, seeds, data, device="cpu", state=None, save=None, stop=None):
    """Train one method for all seeds at once. A plain function of its arguments: it prints and writes nothing.

    cfg: Config; method: from parse_method; seeds: list of int; data: from load_data; state: a dictionary from an earlier
    call, to go on from, or only {"model": weights} to start with; save(state): called after every evaluation, True ends
    the training there, and so does setting state["done"]; stop(): asked after every step, True ends it as well (save is
    called first). A state that was not "done" can be continued. Returns the state: "step", "steps", "model", "optimizer",
    "curve" [{"step", "loss", "accuracy", "nll", "nll_se"}, with one value per seed], "seconds", "forward_tokens",
    "n_params", "done", "diverged" (S,), the step at which a seed's loss or gradient stopped being finite (from there on
    its gradient counts as zero) or 0, and what P-POTS and EMA remember.
    """
    model, pos = build(cfg, method, seeds, data, device)
    S, n, T = len(seeds), len(pos), data.test.shape[1]
    B = cfg.batch_size * (2 if "batch2" in method else 1)
    steps = cfg.steps * (2 if "steps2" in method else 1)
    params = list(model.parameters())
    fused = device.startswith(("cpu", "cuda"))
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=BETAS, weight_decay=cfg.weight_decay, fused=fused)
    train_x, arm, M = data.train_blocks(device), "arm" in method, mdm.n_masks(method)
    rare = rare_tokens(cfg, data).to(device) if "isad" in method else None

    fresh = {"step": 0, "curve": [], "seconds": 0.0, "pilot_tokens": 0, "loss_sum": None, "loss_steps": 0, "table": None,
             "theta": None, "ema": None, "diverged": None, "laws": []}  # fmt: skip
    state = {**fresh, **(state or {})}
    state["curve"], state["laws"] = list(state["curve"]), list(state["laws"])
    if "model" in state:
        model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    table, ema, loss_sum, diverged = (None if state[k] is None else state[k].to(device) for k in ("table", "ema", "loss_sum", "diverged"))
    diverged = torch.zeros(S, dtype=torch.int64, device=device) if diverged is None else diverged
    theta = state["theta"]  # EPR is fitted on the CPU, in float64
    if "ema" in method and ema is None:
        ema = torch.zeros(S, 10, device=device)
    block_steps = max(1, min(64, 2**20 // (B * n)))  # the same for any number of seeds, or streams would shift
    refit_every = max(1, steps // cfg.ppots_refits)
    loss_sum = torch.zeros(S, device=device) if loss_sum is None else loss_sum  # since the last evaluation, for the report
    loss_steps, clock = state["loss_steps"], time.perf_counter()

    def snapshot(done):
        nonlocal clock
        state.update(step=step, steps=steps, model=model.state_dict(), optimizer=optimizer.state_dict(), table=table,
                     theta=theta, ema=ema, loss_sum=loss_sum, loss_steps=loss_steps, done=done, diverged=diverged,
                     seconds=state["seconds"] + time.perf_counter() - clock,
                     forward_tokens=step * B * M * T + state["pilot_tokens"], n_params=sum(p[0].numel() for p in params))  # fmt: skip
        ended = save(state) if save else False
        clock = time.perf_counter()
        return ended

    first_step = state["step"]
    for step in range(first_step, steps):
        block, i = divmod(step, block_steps)
        if i == 0 or step == first_step:
            idx, u, r = draw_block(method, seeds, block, block_steps, B, len(train_x), n, device)
        if "ppots" in method and step % refit_every == 0 and step // refit_every < cfg.ppots_refits:
            table, theta, spent, law = refit_ppots(cfg, method, seeds, model, train_x, pos, step, steps * B * M, theta)
            state["pilot_tokens"] += spent * T
            state["laws"] += law

        x0 = train_x[idx[i]].long()  # (S, B, T)
        if arm:
            loss = mdm.token_nll(model, x0, pos).mean(-1)
        else:
            is_rare = None if rare is None else torch.isin(x0[..., pos], rare)
            loss = mdm.method_loss(model, x0, pos, *mdm.draw_masks(method, u[i], r[i], table, cfg.eps, is_rare))
        if ema is not None:
            loss, ema = mdm.ema_control_variate(loss, u[i], ema)
        loss = loss.mean(-1)  # (S,)
        optimizer.zero_grad()
        loss.sum().backward()  # the sum, since seeds share no parameter: each gets the gradient of its own loss
        finite = clip_per_seed(params, cfg.grad_clip, (diverged == 0) & torch.isfinite(loss))
        diverged = torch.where(finite | (diverged > 0), diverged, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP), 1.0)
        optimizer.step()
        loss_sum, loss_steps = loss_sum + loss.detach(), loss_steps + 1

        step += 1
        if step % cfg.eval_every == 0 or step == steps:
            scores = evaluate(model, data, n_nll=None if step == steps or cfg.until_nll else 128)  # all where it may be the last
            state["curve"].append({"step": step, "loss": (loss_sum / loss_steps).tolist(), **scores})
            loss_sum, loss_steps = torch.zeros_like(loss_sum), 0
            ended = snapshot(done=step == steps)
            if ended or state["done"]:
                break
        if stop and stop() and step < steps:
            snapshot(done=False)
            break
    return state


def clip_per_seed(params, max_norm, alive):
    """Scale each seed's gradient, over all its parameters, to at most max_norm; to nothing where a seed is not alive (S,)
    or its gradient is not finite. Returns who is still alive (S,). Nothing waits for the device."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in params).sqrt()  # (S,)
    alive = alive & torch.isfinite(norm)
    scale = torch.where(alive, (max_norm / (norm + 1e-6)).clamp(max=1), 0)
    for p in params:
        p.grad.nan_to_num_(0, 0, 0).mul_(scale.view(-1, *[1] * (p.dim() - 1)))
    return alive


def refit_ppots(cfg, method, seeds, model, train_x, pos, step, budget_sequences, theta):
    """Measure P-POTS' curve again: its table, the EPR parameters, the forward passes spent per seed, and for the report a
    list of {"step", "fitted", "measured"}, the law as it is sampled and as it was measured, (S, N_CELLS) (none for exactk).
    The pilot's size follows from its budget: a training step on a sequence counts as three forward passes of it."""
    n, device = len(pos), train_x.device
    n_counts, K = min(n, 16), 2
    X = max(4, int(cfg.ppots_budget * 3 * budget_sequences / cfg.ppots_refits / (n_counts * K)))
    generators = [stream(seed, "pilot", step, device) for seed in seeds]
    idx = torch.stack([torch.randint(len(train_x), (X,), generator=g, device=device) for g in generators])
    r = torch.stack([torch.rand(X, n_counts, K, n, generator=g, device=device) for g in generators])
    counts, sums = pilot(model, train_x[idx].long(), pos, r)
    table, theta = mdm.ppots_law(method, counts, sums, n, cfg.ppots_fit, cfg.eps, theta)
    law = []
    if "exactk" not in method:
        law = [{"step": step, "fitted": table.float(), "measured": mdm.ppots_law(method, counts, sums, n, "grid", cfg.eps)[0].float()}]
    return table.float().to(device), theta, X * n_counts * K, law


def pilot(model, x0, pos, uniforms):
    """mdm.measure_counts on the CPU, a part of the sequences at a time."""
    part = max(1, rows_at_once(model, len(pos)) // (len(x0) * math.prod(uniforms.shape[2:4])))
    counts, sums = zip(*[mdm.measure_counts(model, x, pos, u) for x, u in zip(x0.split(part, 1), uniforms.split(part, 1))])
    return counts[0].cpu(), torch.cat(sums, 1).cpu()


def rows_at_once(model, n):
    """How many sequences with n predicted tokens to forward in one batch, so that logits and activations stay below about a
    gigabyte; and below 2^15, beyond which attention on some GPUs takes no batch."""
    return min(2**15, max(1, 2**27 // (n * max(model.config.vocab_size, 16 * model.config.n_embd))))


def rare_tokens(cfg, data):
    """ISAD's token ids: --isad_tokens, or the data set's own choice."""
    try:
        return torch.tensor(data.encode(cfg.isad_tokens) if cfg.isad_tokens else data.rare, dtype=torch.int64)
    except ValueError as e:
        raise UserError(f"--isad_tokens: {e}") from None


@torch.no_grad()
def evaluate(model, data, n_nll=None, rows=None):
    """The same for every method, and deterministic: {"accuracy", "nll", "nll_se"}, each a list of one number per seed.

    accuracy (not for text): share of test problems whose whole response is right, decoded greedily, one token per step.
    nll: nats per response token on n_nll test sequences (all of them if None), with its standard error over them; exact for
    an ARM; for an MDM the bound, by the fixed masks of mdm.nll_masks (stratified exact counts, or all masks where the
    response is short). rows bounds the sequences in one forward batch.
    """
    test, S = data.test.to(model.wte.device), len(model.wte)
    pos = torch.arange(data.prompt_len, test.shape[1], device=test.device)
    scores, rows = {}, rows or rows_at_once(model, len(pos))
    if isinstance(data, arith.Arithmetic):
        question = test.clone()
        question[:, pos] = model.config.vocab_size
        right = []
        for part, answer in zip(question.split(max(1, rows // S)), test.split(max(1, rows // S))):
            for x in mdm.generate(model, part.expand(S, -1, -1), pos):
                pass
            right.append((x == answer).all(-1))
        scores["accuracy"] = torch.cat(right, 1).float().mean(1).tolist()

    n_nll = min(n_nll or len(test), len(test))
    test = test[:n_nll] if "accuracy" in scores else test[torch.linspace(0, len(test) - 1, n_nll).round().long()]  # all over a text
    if model.config.causal:
        nll = torch.cat([mdm.token_nll(model, x.expand(S, -1, -1), pos).mean(-1) for x in test.split(max(1, rows // S))], 1)
    else:
        mask, weight = mdm.nll_masks(len(pos), len(test), torch.Generator().manual_seed(0))
        K, nll = mask.shape[1], []
        step = max(1, rows // (S * K))
        for x, m, w in zip(test.split(step), mask.to(test.device).split(step), weight.to(test.device).split(step)):
            m, w = m.expand(S, -1, -1, -1), w.expand(S, -1, -1, -1)
            nll.append(mdm.mdm_loss(mdm.token_nll(model, x[:, None].expand(S, -1, K, -1), pos, m), m, w).sum(-1))
        nll = torch.cat(nll, 1)  # (S, n_nll)
    return {**scores, "nll": nll.mean(1).tolist(), "nll_se": (nll.std(1) / n_nll**0.5).tolist()}


# ---------------------------------------------------------------------------------------------------------------
# Files. Whatever is written is written to a temporary name and renamed: a killed run leaves the old file or the new one.


def write_file(path, content):
    """Write bytes so that `path` holds either what it held before or all of the new, whatever happens meanwhile."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        for wait in (0.1, 0.2, 0.5, 0):  # on Windows a file that somebody reads cannot be replaced
            try:
                os.replace(temporary, path)
                break
            except PermissionError:
                if not wait:
                    raise
                time.sleep(wait)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def to_bytes(checkpoint):
    buffer = io.BytesIO()  # not straight into the file: torch would not say that the disk is full
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def lock(out_dir):
    """Keep others out of out_dir until this process ends, however it ends: the system lets go of the lock, even after
    kill -9. Returns the open file. Raises UserError, naming the process that is in there."""
    os.makedirs(out_dir, exist_ok=True)
    f = open(os.path.join(out_dir, "lock"), "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            f.seek(2**20)  # nobody can read what is locked there, so lock beyond the text
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        f.seek(0)
        raise UserError(f"--out_dir={out_dir} is in use by {f.read().strip()}: wait for it, or choose another --out_dir") from None
    except OSError:
        pass  # a file system without locks
    f.truncate(0)
    f.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
    f.flush()
    return f


def write_lines(path, lines):
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8"))


def checkpoint_path(out_dir, method):
    return os.path.join(out_dir, method_name(method), "ckpt.pt")


def load_checkpoint(path):
    """The checkpoint's dictionary. Raises UserError if there is none, or if it is not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not {"config", "method", "seeds", "state", "vocabulary", "fingerprint"} <= set(checkpoint):
            raise ValueError
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; train it first, or check --out_dir and --method") from None
    except (PermissionError, IsADirectoryError) as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError, pickle.UnpicklingError):
        raise UserError(f"{path} is not a checkpoint of this version of the program, or is damaged; delete it and train again") from None


def training_settings(cfg, method):
    """The settings that this method's result depends on, as a dictionary."""
    theirs = lambda k: k.startswith(("ppots_", "isad_")) and k.split("_")[0] not in method
    unused = lambda k, v: k in ("tokenizer", "block_size") and not is_text(cfg.dataset) or k in ("init_from", "until_nll") and not v
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_TRAINING and not theirs(k) and not unused(k, v)}


def resumable(cfg, method, seeds, data, path):
    """The state to go on from, or None when there is no checkpoint. Raises UserError when it is of another run."""
    if not os.path.exists(path):
        return None
    checkpoint = load_checkpoint(path)
    try:
        theirs, ours = (training_settings(c, method) for c in (Config(**checkpoint["config"]), cfg))
    except TypeError:
        raise UserError(f"{path} is of another version of this program; use another --out_dir, or leave out --resume") from None
    differ = [f"--{k}={theirs.get(k, '')}" for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    differ += [f"--seeds={','.join(map(str, checkpoint['seeds']))}"] if checkpoint["seeds"] != seeds else []
    if differ:
        raise UserError(f"{path} was trained with {' '.join(differ)}: use these, or another --out_dir, or leave out --resume")
    if checkpoint["fingerprint"] != data.fingerprint:
        raise UserError(f"{path} was trained on other data: {cfg.dataset} has changed since; use another --out_dir, or leave out --resume")
    return checkpoint["state"]


def initial(cfg, method, seeds, data):
    """--init_from: the state {"model"} in which every seed has the weights of that run's first seed. Raises UserError."""
    path = checkpoint_path(cfg.init_from, method & {"arm"})
    checkpoint = load_checkpoint(path)
    theirs = checkpoint["config"]
    differ = [f"--{k}={theirs.get(k)}" for k in ("n_layer", "n_head", "n_embd") if theirs.get(k) != getattr(cfg, k)]
    if differ:
        raise UserError(f"{path} has a model of {' '.join(differ)}: use these")
    if checkpoint["vocabulary"] != dataclasses.asdict(data.vocabulary):
        raise UserError(f"{path} was trained on {theirs['dataset']}, whose vocabulary is not that of {cfg.dataset}")
    weights = {k: v[:1].expand(len(seeds), *v.shape[1:]) for k, v in checkpoint["state"]["model"].items()}
    if weights["wpe"].shape[1] != data.test.shape[1]:
        raise UserError(f"{path} was trained on sequences of {weights['wpe'].shape[1]} tokens; {cfg.dataset} has {data.test.shape[1]}")
    return {"model": weights}


def first_states(cfg, methods, seeds, data):
    """What each method starts from: {method: its checkpoint's state with --resume, weights with --init_from, or None}."""
    states = dict.fromkeys(methods)
    for method in methods:
        if cfg.resume:
            states[method] = resumable(cfg, method, seeds, data, checkpoint_path(cfg.out_dir, method))
        if cfg.init_from and states[method] is None:
            states[method] = initial(cfg, method, seeds, data)
    return states


def result_lines(cfg, method, seeds, state, device, chars_per_token):
    """results.jsonl's dictionaries, one per seed. What is not a finite number (of a seed that diverged) is null."""
    finite = lambda x: x if math.isfinite(x) else None
    for s, seed in enumerate(seeds):
        curve = [{k: v if k == "step" else finite(v[s]) for k, v in c.items()} for c in state["curve"]]
        scores = {k: curve[-1][k] for k in ("accuracy", "nll", "nll_se") if k in curve[-1]}
        if is_text(cfg.dataset):
            per_char = 1 / chars_per_token / math.log(2)
            scores |= {f"bits_per_char{k}": scores[f"nll{k}"] and scores[f"nll{k}"] * per_char for k in ("", "_se")}
        settings = {**training_settings(cfg, method), "steps": state["steps"], "batch_size": cfg.batch_size * (2 if "batch2" in method else 1)}
        yield {"method": method_name(method), "seed": seed, **settings, **scores, "diverged": int(state["diverged"][s]) or None,
               "forward_tokens": state["forward_tokens"], "passes": mdm.n_passes(method), "seconds": round(state["seconds"], 2),
               "seeds_trained_together": len(seeds), "n_params": state["n_params"], "torch": torch.__version__, "device": device,
               "curve": curve}  # fmt: skip


def write_laws(path, method, seeds, state):
    """ppots.jsonl: P-POTS' law of the first seed after each refit, as probabilities of mdm.py's N_CELLS cells of t."""
    short = lambda p: [float(f"{x:.4g}") for x in p]
    new = [{"method": method_name(method), "seed": seeds[0], "step": law["step"], "fitted": short(law["fitted"][0].tolist()),
            "measured": short(law["measured"][0].tolist())} for law in state["laws"]]  # fmt: skip
    write_lines(path, [line for line in report.read_lines(path) if line["method"] != method_name(method)] + new)


def write_results(path, new):
    """Add lines to results.jsonl, in place of older ones of the same run."""
    key = lambda line: json.dumps({k: v for k, v in line.items() if k not in report.OUTCOME | {"eval_every"}}, sort_keys=True)
    write_lines(path, {key(line): line for line in report.read_lines(path) + new}.values())


# ---------------------------------------------------------------------------------------------------------------
# Many processes (torchrun): each trains a share of the seeds on a device of its own. Nothing is exchanged during training;
# at every evaluation the shares are joined in process 0, which alone reads, writes and prints.


def by_seed(f, *trees):
    """Apply f to the leaves of training states that have one entry per seed: tensors, and the curve's lists of floats."""
    t = trees[0]
    if isinstance(t, dict):
        return {k: by_seed(f, *(tree[k] for tree in trees)) for k in t}
    if isinstance(t, torch.Tensor) and t.dim() > 0 or isinstance(t, list) and t and isinstance(t[0], float):
        return f(*trees)
    if isinstance(t, list):
        return [by_seed(f, *parts) for parts in zip(*trees)]
    return t


def share_of(state, start, stop):
    """The part of a state that belongs to seeds start to stop."""
    return by_seed(lambda x: x[start:stop], state)


def join(states):
    """The state of all seeds, from the states of consecutive shares of them."""
    return by_seed(lambda *xs: torch.cat(xs) if isinstance(xs[0], torch.Tensor) else sum(xs, []), *states)


def everyone(x):
    """What each process has to say, as a list, the same in all of them."""
    said = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(said, x)
    return said


def gather(state):
    """In process 0 the joined state, elsewhere None."""
    if WORLD_SIZE == 1:
        return state
    states = [None] * WORLD_SIZE
    dist.gather_object(to_bytes(state), states if RANK == 0 else None)  # as bytes, so that tensors leave their device
    load = lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return join([load(content) for content in states]) if RANK == 0 else None


# ---------------------------------------------------------------------------------------------------------------
# What the user sees.


def say(*text):
    if RANK == 0:
        print(*text, flush=True)


class Progress:
    """One line per evaluation, with the time that all methods together still need."""

    def __init__(self, cfg, methods, states):
        self.work = {m: cfg.steps * mdm.n_passes(m) for m in methods}  # in forward passes of one plain batch
        begun = {m: states[m] for m in methods if states[m] and "step" in states[m]}
        self.done = {m: self.work[m] * (begun[m]["done"] or begun[m]["step"] / begun[m]["steps"]) if m in begun else 0 for m in methods}
        self.before, self.began = sum(self.done.values()), time.perf_counter()

    def line(self, method, seeds, state):
        self.done[method] = self.work[method] * (1 if state["done"] else state["step"] / state["steps"])
        done, elapsed = sum(self.done.values()), time.perf_counter() - self.began
        eta = round(elapsed * (sum(self.work.values()) - done) / (done - self.before))
        c, few = state["curve"][-1], len(seeds) <= 4
        show = lambda x: " ".join(f"{v:.2f}" for v in x) if few else f"{np.mean(x):.2f} (mean of {len(seeds)})"
        accuracy = f"  accuracy {show(c['accuracy'])}" if "accuracy" in c else ""
        speed = state["forward_tokens"] * len(seeds) / state["seconds"]
        return (f"{method_name(method):>14}  step {state['step']:>{len(str(state['steps']))}}/{state['steps']}  loss {np.mean(c['loss']):6.3f}"
                f"{accuracy}  nll {np.mean(c['nll']):.3f}  {speed / 1e3:.0f}k tokens/s  ETA {eta // 60}:{eta % 60:02}")  # fmt: skip


def run(cfg, methods, seeds):
    """The comparison: train every method, write everything down, print the table. Returns the exit code."""
    check(cfg)
    if cfg.report:
        return print_report(cfg.out_dir, cfg.baseline) if RANK == 0 else 0
    device, data = pick_device(cfg.device), load_data(cfg)
    check_memory(cfg, methods, len(seeds), data, device)
    if "isad" in set().union(*methods):
        rare_tokens(cfg, data)  # a wrong --isad_tokens should fail now, not after an hour
    if "syrm" in set().union(*methods) and not data.structural:
        raise UserError(f"syrm masks the structural symbols of a prompt, and the prompts of {cfg.dataset} have none")
    if "reclipped" in set().union(*methods):
        try:
            mdm.clipped_weights(data.test.shape[1] - data.prompt_len)
        except ValueError as e:
            raise UserError(e) from None
    if cfg.variance and frozenset() not in methods:
        raise UserError("--variance measures at the plain MDM's weights: add mdm to --method")
    if cfg.variance and cfg.eps == 0:
        raise UserError("--variance wants --eps above 0: at 0 the plain loss's variance is infinite")
    if len(seeds) < WORLD_SIZE:
        raise UserError(f"{WORLD_SIZE} processes for {len(seeds)} seeds: start at most one process per seed")
    with contextlib.ExitStack() as stack:
        states, error = None, None
        if RANK == 0:  # what only process 0 can find wrong, the others have to hear of
            try:
                stack.enter_context(lock(cfg.out_dir))
                states = first_states(cfg, methods, seeds, data)
            except UserError as e:
                error = str(e)
            except OSError as e:
                error = f"cannot write to --out_dir={cfg.out_dir}: {e.strerror or e}"
        if error := everyone(error)[0]:
            raise UserError(error)
        return compare(cfg, methods, seeds, data, device, everyone(states)[0] if cfg.resume or cfg.init_from else states)


def compare(cfg, methods, seeds, data, device, states):
    """run(), once everything that can be wrong has been looked at."""
    results_path = os.path.join(cfg.out_dir, "results.jsonl")
    say(f"{cfg.dataset}: {data.describe()}; seeds {seeds}; {cfg.steps} steps of {cfg.batch_size} on {device} "
        f"({WORLD_SIZE} {'process' if WORLD_SIZE == 1 else 'processes'}, {torch.get_num_threads()} threads)")  # fmt: skip

    interrupted = []
    ask_to_stop = lambda *_: sys.exit(130) if interrupted else interrupted.append(True)  # a second Ctrl-C does not wait
    previous = signal.signal(signal.SIGINT, ask_to_stop)
    states = states or dict.fromkeys(methods)
    progress, results = Progress(cfg, methods, states), {}
    share = np.array_split(np.arange(len(seeds)), WORLD_SIZE)[RANK]
    start, end = int(share[0]), int(share[-1]) + 1
    try:
        for method in methods:
            path, whole = checkpoint_path(cfg.out_dir, method), states[method]

            def save(state):
                """After every evaluation, and when stopped: the checkpoint and a line. True ends the training."""
                nonlocal whole
                evaluated = state["curve"] and state["curve"][-1]["step"] == state["step"]
                nll = sum(everyone(state["curve"][-1]["nll"] if evaluated else [math.nan]), [])
                stop, lost = (list(x) for x in zip(*everyone((bool(interrupted), bool((state["diverged"] > 0).all())))))
                state["done"] = bool(state["done"] or cfg.until_nll > 0 and np.mean(nll) <= cfg.until_nll or all(lost))
                whole = gather(state)
                if RANK == 0:
                    settings = {"config": dataclasses.asdict(cfg), "method": method_name(method), "seeds": seeds}
                    content = {"vocabulary": dataclasses.asdict(data.vocabulary), "fingerprint": data.fingerprint, "state": whole}
                    write_file(path, to_bytes({**settings, **content}))
                    if evaluated:
                        say(progress.line(method, seeds, whole))
                return any(stop)

            if not (whole and whole.get("done")):
                state = whole and share_of(whole, start, end)
                # processes must stop together, so with several of them only where they meet: at evaluations
                stop = (lambda: bool(interrupted)) if WORLD_SIZE == 1 else None
                state = train(cfg, method, seeds[start:end], data, device, state, save, stop)
                if not state["done"]:
                    say(f"stopped at step {state['step']} of {state['steps']}, saved in {path}; "
                        "the same command with --resume goes on from here")  # fmt: skip
                    return 130
            if RANK == 0:
                results[method_name(method)] = list(result_lines(cfg, method, seeds, whole, device, data.chars_per_token))
                write_results(results_path, results[method_name(method)])
                if whole["laws"]:
                    write_laws(os.path.join(cfg.out_dir, "ppots.jsonl"), method, seeds, whole)
    finally:
        signal.signal(signal.SIGINT, previous)
    if RANK > 0:
        return 0
    say("\n" + report.table(results, seeds))
    say("\n" + (report.verdict(results) or "For the paper's claim run --method=arm,mdm,ppots_mirror."))
    prompt = "" if is_text(cfg.dataset) else f' --prompt="{data.decode(data.test[0, : data.prompt_len])}"'
    say(f"Results: {results_path}; intervals and figures: python train.py --report --out_dir={cfg.out_dir}\n"
        f"Try: python sample.py --out_dir={cfg.out_dir} --method={list(results)[-1]} --seed={seeds[0]}{prompt} --show")  # fmt: skip
    if cfg.variance:
        measure_variance(cfg, methods, seeds[0], data, device)
    return 0


def print_report(out_dir, baseline):
    """--report: tables and figures of the results in out_dir."""
    lines = report.read_lines(os.path.join(out_dir, "results.jsonl"))
    if not lines:
        raise UserError(f"there are no results in {os.path.join(out_dir, 'results.jsonl')}; train something first, or check --out_dir")
    if baseline not in {"mdm", *(line["method"] for line in lines)}:
        raise UserError(f"--baseline={baseline} is not among the results; there are {', '.join(dict.fromkeys(line['method'] for line in lines))}")
    for results in report.groups(lines):
        keys = ["nll"] if report.is_text(next(iter(results.values()))) else ["accuracy", "nll"]
        print(report.heading(results) + "\n")
        print(report.table(results), *(report.statistics(results, key, baseline) for key in keys), sep="\n\n")
        said = report.verdict(results), report.prediction(results, report.read_lines(os.path.join(out_dir, "variance.jsonl")))
        print("".join(f"\n{line}\n" for line in said if line))
    print(report.figures(out_dir, lines))
    return 0


# Always in the variance table, besides the methods of the run: a frozen model costs little.
VARIANCE_METHODS = """mdm ppots mirror ppots_mirror mdm_batch2 multi2 strats lowdisc clipped reclipped exactk exactk_strats
    exactk_ppots exactk_batch2 exactk_mirror exactk_strats_mirror exactk_ppots_mirror""".split()
EXACT_MAX_N = 8  # response tokens; beyond that 2^n masks of 64 problems take minutes, and sampling takes over


def measure_variance(cfg, methods, seed, data, device, n_problems=64):
    """A, B and C of every method at one frozen model, at initialisation and at the plain MDM's final weights (an ARM at
    its own), on held-out problems. Prints a table for each and writes OUT_DIR/variance.jsonl."""
    arm = [frozenset({"arm"})] if frozenset({"arm"}) in methods else []
    usual = [parse_method(name) for name in VARIANCE_METHODS]
    if data.test.shape[1] - data.prompt_len > EXACT_MAX_N:  # where reclipped's variance dwarfs all others
        usual.remove(frozenset({"reclipped"}))
    methods = arm + [m for m in dict.fromkeys(usual + methods) if "arm" not in m]
    x0, lines = data.test[:n_problems].to(device), []
    began = reported = time.perf_counter()
    for trained in (False, True):
        rows, known = [], {}
        for i, method in enumerate(methods):
            now, done = time.perf_counter(), i + trained * len(methods)
            if now - reported > 10:
                eta, reported = round((now - began) / done * (2 * len(methods) - done)), now
                say(f"      variance  method {done}/{2 * len(methods)}  ETA {eta // 60}:{eta % 60:02}")
            model, pos = build(cfg, method, [seed], data, device)
            if trained:
                checkpoint = load_checkpoint(checkpoint_path(cfg.out_dir, method & {"arm"}))
                s = checkpoint["seeds"].index(seed)
                model.load_state_dict({k: v[s : s + 1] for k, v in checkpoint["state"]["model"].items()})
            elif cfg.init_from:
                model.load_state_dict(initial(cfg, method, [seed], data)["model"])
            rows.append(variance_row(cfg, method, model, x0, pos, data, seed, known))
        where = "the plain MDM's final weights (the ARM at its own)" if trained else "initialisation"
        print(f"\nVariance per sequence at {where}, seed {seed}; A masking pattern, B masking rate, C data; ratio: to mdm")
        print(mdm.variance_table(rows), flush=True)
        lines += [{"at": "end" if trained else "initialisation", "seed": seed, "dataset": cfg.dataset, **row} for row in rows]
    path = os.path.join(cfg.out_dir, "variance.jsonl")
    write_lines(path, lines)
    print(f"Biased methods (isad, syrm, clipped) estimate something else: compare them with care. Written to {path}")


def variance_row(cfg, method, model, x0, pos, data, seed, known):
    """One row for mdm.variance_table. Exact up to EXACT_MAX_N tokens to mask, by sampling (with standard errors) beyond,
    and for isad. known: the Gram matrices computed so far, by model and positions."""
    n, batch_size, table = len(pos), cfg.batch_size * (2 if "batch2" in method else 1), None
    if "ppots" in method:
        g = stream(seed, "pilot", 2**20, x0.device)  # a block that no training reaches
        r = torch.rand(1, len(x0), min(n, 16), 4, n, generator=g, device=x0.device)
        table = mdm.ppots_law(method, *pilot(model, x0[None], pos, r), n, cfg.ppots_fit, cfg.eps)[0]
    if n <= EXACT_MAX_N and "isad" not in method:
        if ("arm" in method, n) not in known:
            known["arm" in method, n] = mdm.grams(model, x0, pos)
        law = lambda m: None if "arm" in m else mdm.exact_law(m, n, None if table is None else table[0], cfg.eps, batch_size)
        loss, gradient = (mdm.exact_variance(law(m), *K) for m, K in zip((method, method - {"ema"}), known["arm" in method, n]))
        errors = {}
    else:
        x0 = x0[:24]  # each takes a dozen backward passes and more
        rare = torch.isin(x0[:, pos], rare_tokens(cfg, data).to(x0.device)).cpu() if "isad" in method else None
        sample = lambda m: mdm.monte_carlo_variance(model, x0, pos, m, torch.Generator().manual_seed(seed),
                                                    None if table is None else table.float(), cfg.eps, rare, batch_size=batch_size)  # fmt: skip
        loss, gradient = sample(method)
        if "ema" in method:  # it steadies the loss and leaves the gradient alone
            gradient = sample(method - {"ema"})[1]
        errors = {f"{name}_error": {k: v[1] for k, v in part.items()} for name, part in (("loss", loss), ("gradient", gradient))}
        loss, gradient = ({k: v[0] for k, v in part.items()} for part in (loss, gradient))
    row = {"method": method_name(method), "passes": mdm.n_passes(method - {"steps2"}), "loss": loss, "gradient": gradient, **errors}
    if "batch2" in method:  # half the variance of a step, at twice the passes
        for part in [k for k in row if k.startswith(("loss", "gradient"))]:
            row[part] = {k: v if k == "mean" else v / 2 for k, v in row[part].items()}
    return row


def out_of_memory(e):
    """torch has a type of its own for this on a GPU only."""
    return isinstance(e, MemoryError) or any(w in str(e) for w in ("out of memory", "allocate memory", "size calculation", "overflow"))


def main(argv=None):
    cfg, methods, seeds = parse_args(argv)
    try:
        if WORLD_SIZE > 1:
            # gloo on GPUs too: what is exchanged are objects on the CPU. Whoever waits, for instance for --variance, may wait long
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        return run(cfg, methods, seeds)
    except UserError as e:
        return fail(e)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more on leaving
        return 1
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        return fail(f"cannot write to --out_dir={cfg.out_dir}: {e.strerror or e}{where}; what was written before is safe", of_all=False)
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            return fail(f"out of memory: {SMALLER}; results and checkpoints written before are safe", of_all=False)
        if WORLD_SIZE > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            return fail("another process has ended; --resume goes on from the last checkpoint")
        raise
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no reason to stop
    code = main()
    if WORLD_SIZE > 1:  # leave together and at once: torch's own tidying up, now and then, aborts a process that has finished
        if dist.is_initialized() and code in (0, 130):
            dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
