"""train.py - does variance reduction make masked diffusion training stable? Train and compare.

    python train.py                                        ARM, MDM, P-POTS+MIRROR, three seeds
    python train.py --method=ppots_mirror                  one method (pposts_mirror is the same)
    python train.py --method=mdm,mdm_batch2,multi2,mirror  MIRROR beside controls of its compute
    python train.py --n_seeds=32 --out_dir=out32           32 seeds, trained as one batch
    python train.py --dataset=shakespeare_char             text; or --dataset=FILE for any of yours
                     (defaults for text: n_layer 4, n_embd 128, batch_size 12, steps 2000)
    torchrun --nproc_per_node=2 train.py --n_seeds=32      share the seeds over processes or GPUs

A method is arm, mdm, or words joined by _ that say what is changed in the MDM (see mdm.py):
    ppots    t from the density of least variance   exactk   exactly k ~ U{1..n} masked tokens
    mirror   two negatively correlated masks        strats   stratified rates over the batch
    clipped  t ~ U[0.3, 0.8]; BIASED                isad     rare tokens masked more often; BIASED
    syrm     the prompt's symbols too; BIASED       ema      a steadier reported loss, same training
    controls of two passes: multi2 (two independent masks), batch2 (twice the batch), steps2
"""
import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time

import numpy as np
import torch

import data as datasets
import mdm
from data import arith, machine, report, text, variance
from data.machine import RANK, SHARE, WORLD_SIZE, fail

# --------------------------------------------------------------------------------------------------
# Settings. All methods share them: only the estimator differs.

SETTINGS = [  # name, default, the reason for it (its --help) and, for a number, its limits
    ("method", "arm,mdm,ppots_mirror", "methods, separated by commas; see above"),
    ("seeds", "", "seeds, separated by commas (default: the paper's 42,731,20231)"),
    ("n_seeds", 0, "or how many: the paper's three, then 0,1,2,...", 0, 1e5),
    ("dataset", "add3", f"{', '.join(arith.DATASETS)}; or shakespeare_char; or a text file"),
    ("init_from", "", "fine-tune: another run's out_dir; its newest arm or mdm, the first seed"),
    ("n_train", 0, "for scarce data: take only so many training problems (0: all)", 0, 1e9),
    ("n_test", 512, "arithmetic: held-out problems decoded at the end, at most", 1, 1e6),
    ("tokenizer", "char", "text: char, or a tiktoken encoding such as gpt2"),
    ("block_size", 64, "text: tokens per sequence, given one before them", 1, 1e6),
    ("steps", 1000, "optimizer steps: the ARM solves add3, MDM seeds still disagree", 1, 1e9),
    ("batch_size", 64, "sequences per step and seed", 1, 1e6),
    ("lr", 3e-3, "peak learning rate, after 100 steps of warm-up; then linearly to 0", 0, 1e3),
    ("weight_decay", 0.01, "AdamW's; small, as a model this size hardly overfits", 0, 1e3),
    ("grad_clip", 1.0, "largest norm of a seed's gradient", 1e-9, 1e9),
    ("eps", 1e-3, "smallest masking rate, as in LLaDA; keeps the plain variance finite", 0, 0.9),
    ("until_nll", 0.0, "end a method at the first evaluation with a mean nll this low", 0, 1e9),
    ("n_layer", 2, "transformer blocks; two suffice for carries", 1, 1e3),
    ("n_head", 4, "attention heads", 1, 1e3),
    ("n_embd", 64, "width; enough to solve add3 in seconds a seed", 1, 1e5),
    ("ppots_fit", "epr", "P-POTS: epr, the paper's family, or grid, as measured", "epr", "grid"),
    ("ppots_refits", 10, "P-POTS: measurements of the curve, which moves in training", 1, 1e4),
    ("ppots_budget", 0.01, "P-POTS: share of the work these may cost (or 8 sequences)", 1e-9, 1),
    ("isad_tokens", "", "ISAD: its rare tokens (default: separators; text: the rarest 5 %%)"),
    ("eval_every", 250, "steps between evaluations, after which all is saved", 1, 1e9),
    ("out_dir", "out", "where results and checkpoints go"),
    ("resume", False, "go on from --out_dir's checkpoints, to the same numbers"),
    ("variance", False, "measure A, B, C of many methods at the plain MDM's weights"),
    ("report", False, "train nothing: tables, intervals and figures of --out_dir's results"),
    ("baseline", "mdm", "the method that --report compares all others with"),
    ("device", "auto", "cpu, cuda, cuda:1, mps; auto takes the best there is"),
]
TEXT_SETTINGS = {"n_layer": 4, "n_embd": 128, "batch_size": 12, "steps": 2000}  # nanoGPT's on a CPU
PAPER_SEEDS = [42, 731, 20231]


def parse_args(argv=None):
    """The command line: the settings, a list of methods, a list of seeds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", None, __doc__, formatter_class=raw)
    parser.allow_abbrev = False
    parser.error = fail
    for name, default, why, *_ in SETTINGS:
        kind = {"action": "store_true"}
        if default is not False:
            kind = {"type": type(default), "metavar": type(default).__name__, "default": default}
        parser.add_argument(f"--{name}", help=f"{why} [{default}]" if default else why, **kind)
    cfg = parser.parse_args(argv)
    if cfg.dataset not in arith.DATASETS:
        parser.set_defaults(**TEXT_SETTINGS)
        cfg = parser.parse_args(argv)
    for name, _, _, *limits in [row for row in SETTINGS if len(row) > 3]:
        value = getattr(cfg, name)
        if value not in limits and (type(value) is str or not limits[0] <= value <= limits[1]):
            fail(f"--{name}={value} is not {limits[0]} ... {limits[1]}")
    if cfg.n_embd % (2 * cfg.n_head):
        fail(f"--n_embd={cfg.n_embd} is no multiple of twice --n_head={cfg.n_head}")
    cfg.baseline = parse_method(cfg.baseline)
    return cfg, list(dict.fromkeys(map(parse_method, cfg.method.split(",")))), parse_seeds(cfg)


def parse_method(name):
    """The one spelling of a method: "mirror_pposts" -> "ppots_mirror"."""
    words = name.strip().lower().replace("pposts", "ppots").split("_")
    base = "arm" if "arm" in words else "mdm"
    changes = [word for word in mdm.WORDS if word in words]
    estimator = set(changes) - {"batch2", "steps2"}
    wrong = len(words) > len(set(words)) or not set(words) <= {base, *mdm.WORDS}
    clash = [pair for pair in mdm.CONFLICTS if set(pair.split()) <= set(changes)]
    if wrong or clash or (base == "arm" and estimator):
        fail(f"unknown method '{name}': arm, mdm, or words joined by _ from {' '.join(mdm.WORDS)}"
             f" (never together: {', '.join(mdm.CONFLICTS)}; with arm only batch2 or steps2)")
    return "_".join(changes if estimator else [base, *changes])


def parse_seeds(cfg):
    if not cfg.seeds:
        others = [seed for seed in range(cfg.n_seeds) if seed not in PAPER_SEEDS]
        return (PAPER_SEEDS + others)[: cfg.n_seeds or 3]
    seeds = cfg.seeds.split(",")
    good = all(seed.isdecimal() and len(seed) < 19 for seed in seeds) and not cfg.n_seeds
    if not good or len(set(map(int, seeds))) < len(seeds):
        fail(f"--seeds={cfg.seeds}: give different whole numbers, commas between; no --n_seeds")
    return [int(seed) for seed in seeds]


def n_passes(method):
    """Forward and backward passes, as a multiple of plain training's."""
    return mdm.n_masks(method) * (2 if "batch2" in method or "steps2" in method else 1)


def load_data(cfg, methods):
    """The data set (see data/__init__.py), where the methods make sense on it."""
    try:
        data = datasets.load(cfg.dataset, cfg.block_size, cfg.tokenizer, cfg.n_train, cfg.n_test)
        data.isad = data.encode(cfg.isad_tokens) if cfg.isad_tokens else data.rare
    except ValueError as e:
        fail(e)
    if any("isad" in method for method in methods) and not len(data.isad):
        fail(f"isad is for separators; {cfg.dataset}'s response has none: give --isad_tokens")
    if any("syrm" in method for method in methods) and not data.structural:
        fail(f"syrm masks symbols of the prompt, and those of {cfg.dataset} have none")
    return data


# --------------------------------------------------------------------------------------------------
# Randomness. What a run draws comes from streams named by (seed, purpose, block of steps). So a
# seed's draws depend on nothing else, and to resume no generator need be saved.

STREAMS = ["init", "data", "rate", "shuffle", "mask", "pilot"]


def stream(seed, purpose, block=0, device="cpu"):
    key = np.random.SeedSequence([seed, STREAMS.index(purpose), block]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(key[0]))


def draw_block(method, seeds, block, K, B, n_train, n, device):
    """Random numbers for K steps, in a few large draws: idx, u (K, S, B), r (K, 1|2, S, B, n)."""
    idx, u, r, order = [], [], [], []
    copies = 2 if "multi2" in method else 1
    for seed in seeds:
        draws = {name: stream(seed, name, block, device) for name in STREAMS}
        idx.append(torch.randint(n_train, (K, B), generator=draws["data"], device=device))
        u.append(1 - torch.rand(K, B, generator=draws["rate"], device=device))
        r.append(torch.rand(K, copies, B, n, generator=draws["mask"], device=device))
        order.append(torch.rand(K, B, generator=draws["shuffle"], device=device).argsort(-1))
    u = torch.stack(u, 1)
    if "strats" in method:
        u = mdm.stratify(u, torch.stack(order, 1), mdm.n_strata(B))
    return torch.stack(idx, 1), u, torch.stack(r, 2)


# --------------------------------------------------------------------------------------------------
# Training.


def build(cfg, method, seeds, data, device):
    """The models, a row for each seed, and the positions (n,) that are masked and predicted."""
    V, T = len(data.vocabulary), data.test.shape[1]
    config = mdm.GPTConfig(V, T, cfg.n_layer, cfg.n_head, cfg.n_embd, causal="arm" in method)
    model = mdm.GPT(config, [stream(seed, "init") for seed in seeds])
    pos = list(range(data.prompt_len, T))
    if "syrm" in method:  # SyRM, of the paper: the prompt's symbols are masked and predicted too
        pos = [*data.structural, *pos]
    return model.to(device), torch.tensor(pos, device=device)


def train(cfg, method, seeds, data, device="cpu", state=None):
    """Train one method for all seeds at once; yield the state after every evaluation.

    state: an earlier one to go on from, or {"model": weights} to start with. "curve" is a list of
    {"step", "loss", "nll", ...} with a number for each seed; "diverged" (S,) the step at which its
    loss or gradient was not finite, after which it gets none; "clipped" (S,) counts clipped ones.
    """
    model, pos = build(cfg, method, seeds, data, device)
    params, n = list(model.parameters()), len(pos)
    B = cfg.batch_size * (2 if "batch2" in method else 1)
    steps = cfg.steps * (2 if "steps2" in method else 1)
    adamw = {"betas": (0.9, 0.98), "weight_decay": cfg.weight_decay, "fused": device != "mps"}
    optimizer = torch.optim.AdamW(params, cfg.lr, **adamw)
    rare = torch.tensor(data.isad, dtype=torch.int64, device=device)
    train_x, zero = data.train_blocks(device), torch.zeros(len(seeds), device=device)
    fresh = {"step": 0, "steps": steps, "curve": [], "diverged": zero, "clipped": zero,
             "table": zero, "ema": zero[:, None].expand(-1, 10), "pilot": 0, "seconds": 0.0}
    state = fresh | (state or {})
    model.load_state_dict(state.get("model", model.state_dict()))
    optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
    names = ("table", "ema", "diverged", "clipped")
    table, ema, diverged, clipped = (state[name].to(device) for name in names)
    K = max(1, min(64, 2**20 // (B * n)))  # steps in a block; not by seeds, or streams would shift
    refit_every, X = pilot_size(cfg, steps, B * mdm.n_masks(method), n)
    loss_sum, began = zero, time.perf_counter()

    for step in range(state["step"], steps):
        if step % K == 0 or step == state["step"]:  # random numbers for a block of steps
            draws = draw_block(method, seeds, step // K, K, B, len(train_x), n, device)
        if "ppots" in method and step % refit_every == 0:
            table = measure_table(cfg, seeds, model, train_x, pos, step, X)
            state["pilot"] += X * min(n, 16)

        # The loss of each sequence, (S, B).
        idx, u, r = (z[step % K] for z in draws)
        x0 = train_x[idx].long()  # (S, B, T)
        if "arm" in method:
            loss = mdm.token_nll(model, x0, pos).mean(-1)
        else:
            is_rare = torch.isin(x0[..., pos], rare) if "isad" in method else None
            mask, weight = mdm.draw_masks(method, u, r, table, cfg.eps, is_rare)
            loss = mdm.method_loss(model, x0, pos, mask, weight)
        if "ema" in method:
            loss, ema = mdm.ema_baseline(loss, u, ema)

        # The step. Seeds share no parameter: from the sum each gets the gradient of its own loss.
        loss = loss.mean(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        alive, over = clip_per_seed(params, (diverged == 0) & torch.isfinite(loss), cfg.grad_clip)
        diverged, clipped = torch.where(alive | (diverged > 0), diverged, step + 1), clipped + over
        decay = (steps - step) / max(1, steps - 100)
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / 100, decay, 1.0)
        optimizer.step()
        loss_sum = loss_sum + loss.detach()

        # Evaluation. What is yielded is saved: all that going on from here needs.
        step += 1
        if step % cfg.eval_every == 0 or step == steps:
            scores = evaluate(model, data, quick=step < steps and not cfg.until_nll)
            point = {"step": step, "loss": (loss_sum / (step - state["step"])).tolist(), **scores}
            good = sum(point["nll"]) <= cfg.until_nll * len(seeds)
            state |= {
                "step": step, "done": step == steps or good or bool(diverged.all()), "table": table,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema,
                "diverged": diverged, "clipped": clipped, "curve": [*state["curve"], point],
                "seconds": state["seconds"] + time.perf_counter() - began,
            }
            yield state
            if state["done"]:
                break
            loss_sum, began = zero, time.perf_counter()


def clip_per_seed(params, alive, max_norm):
    """Scale each seed's gradient to a norm of at most max_norm, or to nothing if it is not finite
    or the seed not alive, (S,). Returns who is alive and whose was clipped. Waits for no device."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in params).sqrt()
    alive = alive & torch.isfinite(norm)
    scale = torch.where(alive, (max_norm / (norm + 1e-6)).clamp(max=1), 0)
    for p in params:
        p.grad.nan_to_num_(0, 0, 0).mul_(scale.view(-1, *[1] * (p.dim() - 1)))
    return alive, alive & (norm > max_norm)


def pilot_size(cfg, steps, rows, n):
    """P-POTS: the steps between measurements and the sequences X of each. A training step costs
    three forward passes of its rows. If X would be less than 8, there are fewer measurements."""
    budget = cfg.ppots_budget * 3 * steps * rows / min(n, 16)
    refits = max(1, min(cfg.ppots_refits, int(budget / 8)))
    return math.ceil(steps / refits), max(8, int(budget / refits))


def measure_table(cfg, seeds, model, train_x, pos, step, X):
    """P-POTS' table of each seed, (S, N_CELLS), from X training sequences."""
    device, n, x0, r = train_x.device, len(pos), [], []
    for seed in seeds:
        draw = stream(seed, "pilot", step, device)
        x0.append(train_x[torch.randint(len(train_x), (X,), generator=draw, device=device)].long())
        r.append(torch.rand(X, min(n, 16), n, generator=draw, device=device))
    counts, H = mdm.measure_counts(model, torch.stack(x0), pos, torch.stack(r))
    return mdm.ppots_table(counts.cpu(), H.cpu(), n, cfg.ppots_fit, cfg.eps).float().to(device)


# --------------------------------------------------------------------------------------------------
# Evaluation on held-out data: the same for every method, and always with the same masks.


@torch.no_grad()
def evaluate(model, data, quick=False):
    """{"nll", "nll_se"} and, for arithmetic, "accuracy": lists of one number per seed.
    accuracy: whole responses that are right, of the first 512 (quick) or all, decoded greedily, one
    token a step. nll: nats per response token on 128 or 512 sequences, with its standard error;
    of an MDM the bound, by 8 exact counts a sequence, one from each eighth of 1..n."""
    device, S, V = model.wte.device, len(model.wte), model.config.vocab_size
    test, n_nll = data.test.to(device), min(128 if quick else 512, len(data.test))
    pos = torch.arange(data.prompt_len, test.shape[1], device=device)
    rows = max(1, 2**24 // (8 * S * len(pos) * max(V, 16 * model.config.n_embd)))  # 100 MB
    scores, right, nll = {}, [], []
    if isinstance(data, arith.Arithmetic):
        for answer in test[: 512 if quick else None].split(rows):
            question = answer.clone()
            question[:, pos] = V
            *_, x = mdm.generate(model, question.expand(S, -1, -1), pos)
            right.append((x == answer).all(-1))
        scores["accuracy"] = torch.cat(right, 1).float().mean(1).tolist()
    draw = torch.Generator().manual_seed(0)
    u = (torch.arange(8)[:, None] + 1 - torch.rand(8, n_nll, generator=draw)) / 8
    r = torch.rand(1, 8, n_nll, len(pos), generator=draw)
    mask, weight = (z[0].to(device) for z in mdm.draw_masks("exactk", u, r))  # (8, n_nll, n)
    spread = torch.linspace(0, len(test) - 1, n_nll).round().long()  # all over a text
    for i in torch.arange(n_nll, device=device).split(rows):
        x = test[spread[i.cpu()].to(device)].expand(S, -1, -1)
        if model.config.causal:
            nll.append(mdm.token_nll(model, x, pos).mean(-1))
        else:
            m, w = (z[:, None, i].expand(-1, S, -1, -1) for z in (mask, weight))
            nll.append(mdm.method_loss(model, x, pos, m, w))
    nll = torch.cat(nll, 1)
    return scores | {"nll": nll.mean(1).tolist(), "nll_se": (nll.std(1) / n_nll**0.5).tolist()}


# --------------------------------------------------------------------------------------------------
# Files: a checkpoint for each method (see data/machine.py) and results.jsonl.


def description(cfg, method, data):
    """What a run is made from, besides its seeds and the weights that it starts from. Data and
    weights are known by their fingerprints: --dataset and --init_from name them for people."""
    names = [name for name, *_ in SETTINGS[5:-6]]  # those that training depends on
    others = [word for word in ("ppots", "isad") if word not in method]  # have settings too
    settings = {name: getattr(cfg, name) for name in names if name.split("_")[0] not in others}
    return settings | {"data": data.fingerprint}


def first_state(cfg, method, seeds, data):
    """What training starts from: a checkpoint (--resume), weights (--init_from), or nothing. "init"
    are fingerprints of how the weights were made (written as of an MDM) and of the weights."""
    path, start = machine.checkpoint_path(cfg.out_dir, method), {"init": None}
    if cfg.init_from:
        theirs = machine.find_checkpoint(cfg.init_from, "arm" if "arm" in method else "mdm")
        ours = vars(cfg) | {"vocabulary": dataclasses.asdict(data.vocabulary)}
        alike = all(theirs[k] == ours[k] for k in ("n_layer", "n_head", "n_embd", "vocabulary"))
        if not alike or theirs["weights"]["wpe"].shape[1] != data.test.shape[1]:
            fail(f"--init_from={cfg.init_from}: other n_layer, n_head, n_embd, vocabulary, length")
        how = str([theirs["seeds"][0], *(theirs[k] for k in description(cfg, "mdm", data))])
        start["init"] = [machine.fingerprint(how), machine.fingerprint(*theirs["weights"].values())]
        weights = theirs["weights"].items()
        start["model"] = {k: v.repeat_interleave(len(seeds), 0) for k, v in weights}
    if not (cfg.resume and os.path.exists(path)):
        return start
    theirs = machine.load_checkpoint(path)
    ours = description(cfg, method, data) | {"seeds": seeds, "init": start["init"]}
    differ = [(report.NAMES.get(k, k), theirs.get(k), v) for k, v in ours.items()]
    differ = [f"--{k} ({was}, now {v})" for k, was, v in differ if was != v]
    if differ:
        fail(f"{path} had another {', '.join(differ):.300}: use that, or do without --resume")
    return theirs["state"]


def save_results(cfg, method, seeds, data, state, device):
    """A line for each seed in results.jsonl, replacing older ones of the same run; returns them."""
    path, lines = os.path.join(cfg.out_dir, f"results{SHARE}.jsonl"), []
    B = cfg.batch_size * (2 if "batch2" in method else 1)
    tokens = (state["step"] * B * mdm.n_masks(method) + state["pilot"]) * data.test.shape[1]
    settings = description(cfg, method, data) | {"steps": state["steps"], "batch_size": B}
    for s, seed in enumerate(seeds):
        curve = [{k: v if k == "step" else v[s] for k, v in at.items()} for at in state["curve"]]
        scores = {k: v for k, v in curve[-1].items() if k not in ("step", "loss")}
        if isinstance(data, text.Text):
            scores["bits_per_char"] = scores["nll"] / data.chars_per_token / math.log(2)
        line = {
            "method": method, "seed": seed, "dataset": cfg.dataset, "init_from": cfg.init_from,
            "init": state["init"], **settings, **scores, "n_test": len(data.test),
            "diverged": int(state["diverged"][s]) or None, "passes": n_passes(method),
            "clipped_steps": state["clipped"][s].item() / state["step"], "forward_tokens": tokens,
            "seconds": round(state["seconds"], 2), "seeds_trained_together": len(seeds),
            "torch": torch.__version__, "device": device, "curve": curve,
        }
        lines.append(json.loads(json.dumps(line), parse_constant=lambda _: None))  # NaN is no JSON
    every = {report.run_key(line): line for line in report.read_lines(path) + lines}
    machine.write_lines(path, every.values())
    return lines


# --------------------------------------------------------------------------------------------------
# The comparison.


def main(argv=None):
    cfg, methods, seeds = parse_args(argv)
    if cfg.report:
        return report.main(cfg.out_dir, cfg.baseline)
    data, device = load_data(cfg, methods), machine.pick_device(cfg.device)
    if cfg.variance and "mdm" not in methods:
        fail("--variance measures at the plain MDM's weights: add mdm to --method")
    if cfg.init_from and os.path.realpath(cfg.init_from) == os.path.realpath(cfg.out_dir):
        fail("--init_from is --out_dir: the models to start from would be overwritten")
    seeds = [int(seed) for seed in np.array_split(seeds, WORLD_SIZE)[RANK]]
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    try:
        with machine.lock(cfg.out_dir), machine.enough_memory():
            return compare(cfg, methods, seeds, data, device) if seeds else 0
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from the last line")
        return 130


def compare(cfg, methods, seeds, data, device):
    """Train the methods one after another, save everything, and say what came out."""
    states = {method: first_state(cfg, method, seeds, data) for method in methods}
    print(f"{cfg.dataset}: {data.describe()}; seeds {seeds}; {cfg.steps} steps of {cfg.batch_size} "
          f"on {device}, {torch.get_num_threads()} threads", flush=True)
    left = {m: n_passes(m) * (1 - s.get("step", 0) / s.get("steps", 1)) for m, s in states.items()}
    at_first, began, results = sum(left.values()), time.perf_counter(), {}
    for method, state in states.items():
        rest = () if state.get("done") else train(cfg, method, seeds, data, device, state)
        for state in rest:
            content = {"seeds": seeds, "init": state["init"], "dataset": cfg.dataset,
                       "vocabulary": dataclasses.asdict(data.vocabulary), "state": state}
            machine.save_checkpoint(cfg.out_dir, method, description(cfg, method, data) | content)
            left[method] = n_passes(method) * (1 - state["step"] / state["steps"])
            elapsed, todo = time.perf_counter() - began, sum(left.values())
            eta, point = int(elapsed * todo / (at_first - todo)), state["curve"][-1]
            line = f"{method:>20} step {state['step']:>5}/{state['steps']}"
            for name in sorted({"loss", "accuracy", "nll"} & set(point)):
                line += f"  {name} " + " ".join(f"{value:.2f}" for value in point[name][:4])
            print(f"{line}  ETA {eta // 60}:{eta % 60:02}", flush=True)
        left[method] = 0
        results[method] = save_results(cfg, method, seeds, data, state, device)

    print("\n" + report.table(results, seeds) + "\n\n" + report.verdict(results))
    out_dir, prompt = shlex.quote(cfg.out_dir), data.decode(data.test[0, : data.prompt_len])
    prompt = f" --prompt={prompt}" * isinstance(data, arith.Arithmetic)
    print(f"More of it: python train.py --report --out_dir={out_dir}\nAsk it: python sample.py "
          f"--out_dir={out_dir} --method={methods[-1]} --show{prompt}")
    if cfg.variance and RANK == 0:
        variance.measure(cfg, methods, seeds[:1], data, device, build)
    return 0


if __name__ == "__main__":
    sys.exit(main())
