"""What `train.py --variance` shows: the law of mdm.py beside the measured variance of the gradient.

The models are held fixed: the initial one, and the trained plain MDM (the trained ARM for arm).
Up to 8 response tokens all masks are listed, so A, B and C are exact. Longer responses are sampled,
and only the total is estimated.
"""
import math
import os

import torch

import mdm
from data import runs

METHODS = """mdm ppots mirror ppots_mirror multi2 exactk ppots_exactk sqrtk clipped clipped_exactk
    exactk_mirror sqrtk_mirror""".split()
EXACT_MAX_N = 8  # response tokens
N_SEQUENCES = 64


def sampled_variance(model, x0, pos, method, generator, table=None, eps=mdm.EPS):
    """The gradient's variance per sequence, (total, standard error), for x0 (X, T) and any length
    of response. Unbiased. Not for isad and strats.

    Plain draws hardly ever meet the rare huge gradients at small rates. So these are sought out.
    Half of the u come from a density ~ 1/(u + eps), and a random token of the first mask is always
    hidden. A mask of k tokens then comes up k / (n p) times as often as it should, and we divide by
    that. By symmetry E|l|^2 = E[l1 . l], where l1 is the loss of the first mask alone."""
    n = len(pos)
    words = mdm.parse_method(method)
    shift = max(eps, 1e-4)
    span = math.log(1 + 1 / shift)
    squares = []
    means = []
    for x in x0:
        even = (torch.arange(1, 9) - torch.rand(2, 8, generator=generator)) / 8
        near_0 = shift * torch.expm1(span * even[1])
        u = torch.cat([even[0], near_0]).clamp(max=1)
        density = 0.5 + 0.5 / ((u + shift) * span)
        copies = 2 if "multi2" in words else 1
        r = torch.rand(copies, len(u), n, generator=generator)
        if "arm" in words:
            mask = torch.ones(1, len(u), n) > 0
            weight = often = density = torch.ones(1)
        else:
            often = torch.ones(len(u))
            if not words & {"exactk", "sqrtk"}:  # by count no mask is empty anyway
                p, _ = mdm.draw_rates(words, u, torch.tensor([float(n)]), n, table, eps)
                token = torch.randint(n, (len(u), 1), generator=generator)
                r[0] = r[0].scatter(1, token, p[:, None] * r[0].gather(1, token))
            mask, weight = mdm.draw_masks(words, u, r if copies == 2 else r[0], table, eps)
            if not words & {"exactk", "sqrtk"}:
                often = mask[0].sum(-1) / (n * p)
        weight = weight.expand(mask.shape)
        flat = [z.flatten(0, 1).to(x.device) for z in (mask, weight)]
        _, V = mdm.sample_gradients(model, x.expand(len(flat[0]), -1), pos, *flat)
        V = V.cpu().view(*mask.shape[:2], -1)  # (M, rates, P)
        first = V[0] / (often * density)[:, None]
        squares.append((first * V.mean(0)).sum(-1).mean())
        means.append(first.mean(0))
    square = torch.stack(squares).double()
    mean = torch.stack(means).double()
    gram = mean @ mean.T

    def total(keep):
        """E|l|^2 - |E l|^2 of the sequences kept, where |E l|^2 is a product of two different."""
        m = keep.sum()
        pairs = (keep @ gram @ keep - keep @ gram.diag()) / (m * (m - 1))
        return square @ keep / m - pairs

    X = len(x0)
    without_one = torch.stack([total(keep) for keep in 1 - torch.eye(X).double()])  # the jackknife
    error = (without_one.var(unbiased=False) * (X - 1)).sqrt()
    return total(torch.ones(X).double()).item(), error.item()


def measure(cfg, methods, seeds, data, device, build):
    """Print a table, and write OUT_DIR/variance.jsonl. seeds: one; build: train.py's."""
    own = [m for m in methods if not mdm.parse_method(m) & {"isad", "strats", "syrm", "ema"}]
    own = [m for m in own if not mdm.parse_method(m) & {"batch2", "steps2"}]
    rows = []
    head = f"\n{'':22}passes{'law':>8}{'predicted':>11}{'measured at the start':>26}{'end':>16}"
    print(f"{head}\n(law in ARMs; the others as shares of plain training's)")
    plain = {}
    for method in dict.fromkeys(["mdm", *own, *METHODS]):
        words = mdm.parse_method(method)
        row = {"method": method, "seed": seeds[0], "passes": mdm.work(words).passes}
        for at in ("start", "end"):
            model, pos = build(cfg, method, seeds, data, device)
            folder = cfg.out_dir if at == "end" else cfg.init_from
            if folder:
                base = "arm" if "arm" in words else "mdm"
                first = None if cfg.init_seed < 0 else cfg.init_seed
                seed = seeds[0] if at == "end" else first
                model.load_state_dict(runs.find_checkpoint(folder, base, seed)["weights"])
            row |= measured(cfg, method, model, data, pos, seeds[0], at)
        plain = plain or row
        cells = [row[name] / plain[name] for name in ("law", "start", "end")]
        print(f"{method:22}{row['passes']:^6}{row['law']:8.2f}{cells[0]:11.3f}{cells[1]:26.3f}"
              f"{cells[2]:16.3f}", flush=True)
        rows.append(row)
    path = os.path.join(cfg.out_dir, "variance.jsonl")
    runs.write_lines(path, rows)
    print(f"Clipped rates are biased: they estimate something else. Written to {path}")


def measured(cfg, method, model, data, pos, seed, at):
    """The law, and the variance of the gradient at a model: {"law", at, at_error or at_A, ...}."""
    n = len(pos)
    words = mdm.parse_method(method)
    x0 = data.test[:N_SEQUENCES].to(pos.device)
    draw = torch.Generator().manual_seed(seed)
    table = None
    if "ppots" in words:
        r = torch.rand(1, len(x0), min(n, mdm.N_COUNTS), n, generator=draw).to(pos.device)
        counts, H = mdm.pilot(model, x0[None], pos, r)
        table = mdm.ppots_table(counts, H.cpu(), n, cfg.ppots_fit, cfg.eps)[0]
    law = 1.0 if "arm" in words else mdm.cost_in_arms(words, n, table, cfg.eps)
    if n <= EXACT_MAX_N:
        parts = mdm.exact_variance(words, mdm.grams(model, x0, pos), n, table, cfg.eps)
        return {"law": law, at: parts.pop("total")} | {f"{at}_{k}": v for k, v in parts.items()}
    total, error = sampled_variance(model, x0, pos, words, draw, table, cfg.eps)
    return {"law": law, at: total, f"{at}_error": error}
