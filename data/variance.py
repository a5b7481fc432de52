"""What --variance shows: the noise A, B, C of each method, at a model that is held fixed.

Up to 8 response tokens all masks are listed (mdm.exact_variance). Beyond, they are sampled, here.
"""
import math
import os
import time

import torch

import mdm
from data import machine

METHODS = """mdm ppots mirror ppots_mirror mdm_batch2 multi2 strats clipped exactk exactk_strats
    exactk_batch2 exactk_mirror exactk_strats_mirror""".split()
EXACT_MAX_N = 8  # response tokens
PARTS = ["A", "B", "C", "total"]


def sampled_variance(model, x0, pos, method, generator, table=None, eps=1e-3, is_rare=None):
    """A, B, C and total per sequence, of (loss, gradient): two dictionaries with an estimate and,
    for each "A", an "A_error". Unbiased for any length; not for strats. is_rare (X, n) for isad.

    For each of x0 (X, T): 2 sets of 8 rates, and 2 masks for each rate. Plain draws hardly ever
    meet the rare large losses at small t, and do not show it; so these are sought out. Half of the
    u come from a density ~ 1/(u + eps), and a random token of the first mask is always hidden. Then
    a mask of k tokens comes up k / E[k] times as often as it should; its weight E[k] / k turns the
    1/t of the loss into a harmless 1/k.
    """
    n, rows, shift = len(pos), ([], []), max(eps, 1e-4)
    span = math.log(1 + 1 / shift)
    copies = 2 if "multi2" in method else 1
    for i, x in enumerate(x0):
        uniform, near_0 = (torch.arange(1, 5) - torch.rand(2, 2, 4, generator=generator)) / 4
        u = torch.cat([uniform, shift * torch.expm1(span * near_0)], 1).clamp(max=1)  # 2 sets of 8
        density = 0.5 + 0.5 / ((u + shift) * span)
        u = u.flatten().repeat_interleave(2)[None]
        r = torch.rand(copies, 1, 32, n, generator=generator)
        mask, weight, often = torch.ones_like(r) > 0, torch.ones_like(r), torch.ones(32)
        if "arm" in method:  # all that is drawn above is of no concern to it
            density = torch.ones_like(density)
        else:
            rare = None if is_rare is None else is_rare[i].expand(r.shape[1:])
            p = mdm.rate(method, u, n, table, eps, rare)[0].expand(r.shape[1:])
            if "exactk" not in method:  # hide a token (there none of the masks is empty anyway)
                token = p[0].multinomial(1, generator=generator)
                r[0, 0] = r[0, 0].scatter(1, token, 0.0)
                r[0, 0] += torch.rand(r[0, 0].shape, generator=generator) * p[0] * (r[0, 0] == 0)
            mask, weight = mdm.draw_masks(method, u, r, table, eps, rare)
            often = mask[0, 0].sum(-1) / p[0].sum(-1)  # k / E[k]
        flat = [z.flatten(0, 2).to(x.device) for z in (mask, weight)]
        parts = mdm.sample_gradients(model, x.expand(len(flat[0]), -1), pos, *flat)
        for row, V in zip(rows, parts):
            V = V.cpu().view(len(mask), 2, 8, 2, -1)
            row.append(moments(V[0] / often.view(2, 8, 2, 1), V.mean(0), 1 / density))
    return tuple(components(row) for row in rows)


def moments(first, mean, weight):
    """For one x0, unbiased: E|l|^2, E_t|E[l|t]|^2, |E[l]|^2 and E[l], from 2 sets of 8 rates of
    weight (2, 8) with 2 masks each: the loss of the first mask as it should be, and the mean over
    all masks, (2, 8, 2, P). By symmetry E|l|^2 = E[l1 . l]; |E v|^2 is the product of two draws."""
    second = (first * mean).sum(-1).mean(-1)
    given_t = (first[:, :, 0] * first[:, :, 1]).sum(-1)
    sets = (first.mean(2) * weight[..., None]).mean(1)
    return (weight * second).mean(), (weight * given_t).mean(), sets[0] @ sets[1], sets.mean(0)


def components(rows):
    """A, B, C and total over the sequences, each with its standard error by the jackknife."""
    second, given_t, square, mean = (torch.stack(z).double() for z in zip(*rows))
    G, X = mean @ mean.T, len(mean)

    def parts(keep):
        m = keep.sum()
        pairs = (keep @ G @ keep - keep @ G.diag()) / (m * (m - 1))
        a, b, c = second @ keep / m, given_t @ keep / m, square @ keep / m
        return torch.stack([a - b, b - c, c - pairs, a - pairs])

    without = torch.stack([parts(keep) for keep in 1 - torch.eye(X).double()])
    error = (without.var(0, unbiased=False) * (X - 1)).sqrt()
    values = parts(torch.ones(X).double())
    result = dict(zip(PARTS, values.tolist()))
    return result | dict(zip([f"{part}_error" for part in PARTS], error.tolist()))


def measure(cfg, methods, seeds, data, device, build):
    """Print a table at the initial weights, and one at the trained plain MDM's (an ARM's at its
    own), on held-out data; write OUT_DIR/variance.jsonl. seeds: one; build: train.py's."""
    seed = seeds[0]
    methods = [m for m in dict.fromkeys(["arm"] * ("arm" in methods) + METHODS + methods)]
    methods = [m for m in methods if "ema" not in m and "steps2" not in m]  # a step is the same
    methods = [m for m in methods if m == "arm" or "arm" not in m]
    n = {m: len(build(cfg, m, seeds, data, "cpu")[1]) for m in methods}
    methods = [m for m in methods if "strats" not in m or (n[m] <= EXACT_MAX_N and "isad" not in m)]
    runs = [(m, fit) for m in methods for fit in (("epr", "grid") if "ppots" in m else ("",))]
    rows, began, said = [], time.perf_counter(), time.perf_counter()
    for at in ("initialisation", "end"):
        known = {}
        for method, fit in runs:
            model, pos = build(cfg, method, seeds, data, device)
            out_dir = cfg.out_dir if at == "end" else cfg.init_from
            if out_dir:
                base = "arm" if method == "arm" else "mdm"
                found = machine.find_checkpoint(out_dir, base, seed if at == "end" else None)
                model.load_state_dict(found["weights"])
            loss, gradient = row_of(cfg, method, fit, model, data, pos, seed, known)
            passes = mdm.n_masks(method) * (2 if "batch2" in method else 1)
            name = f"{method} ({fit})" if fit else method
            rows.append({"at": at, "seed": seed, "dataset": cfg.dataset, "data": data.fingerprint,
                         "method": name, "passes": passes, "loss": loss, "gradient": gradient})
            if time.perf_counter() - said > 10:
                said, share = time.perf_counter(), len(rows) / (2 * len(runs))
                eta = int((said - began) * (1 / share - 1))
                print(f"{'variance':>20} {share:4.0%}  ETA {eta // 60}:{eta % 60:02}", flush=True)
        print(f"\nVariance per sequence at {at}, seed {seed} (batch2: of a mean of two)")
        print(table([row for row in rows if row["at"] == at]), flush=True)
    path = os.path.join(cfg.out_dir, "variance.jsonl")
    machine.write_lines(path, rows)
    print(f"Biased methods (isad, syrm, clipped) estimate something else. Written to {path}")


def row_of(cfg, method, fit, model, data, pos, seed, known):
    """(loss, gradient) of a method. known: the Gram matrices so far, by model and length."""
    n, ppots, factor = len(pos), None, 2 if "batch2" in method else 1
    x0 = data.test[:64].to(pos.device)
    generator = torch.Generator().manual_seed(seed)
    if "ppots" in method:
        r = torch.rand(1, len(x0), min(n, 16), n, generator=generator).to(pos.device)
        counts, H = mdm.measure_counts(model, x0[None], pos, r)
        ppots = mdm.ppots_table(counts.cpu(), H.cpu(), n, fit, cfg.eps)
    if n <= EXACT_MAX_N and "isad" not in method:
        key = (method == "arm", n)
        known[key] = known.get(key) or mdm.grams(model, x0, pos)
        B = cfg.batch_size * factor
        found = [mdm.exact_variance(method, *K, n, ppots, cfg.eps, B) for K in known[key]]
    else:
        rare = torch.isin(x0[:, pos].cpu(), torch.tensor(data.isad, dtype=torch.int64))
        ppots = None if ppots is None else ppots.float()
        found = sampled_variance(model, x0, pos, method, generator, ppots, cfg.eps, rare)
    return [{part: value / factor for part, value in row.items()} for row in found]


def table(rows):
    """Text: A, B, C and total of loss and gradient, and the latter's total over mdm's."""
    base = next(row for row in rows if row["method"] == "mdm")["gradient"]["total"]
    head = f"{'A':>10}{'B':>10}{'C':>10}{'total':>10}"
    lines = [f"{'':28}{'loss':^40}{'gradient':^40}", f"{'method':22}passes{head * 2}{'ratio':>9}"]
    for row in rows:
        values = [row[of][part] for of in ("loss", "gradient") for part in PARTS]
        line = f"{row['method']:22}{row['passes']:^6}" + "".join(f"{v:10.3g}" for v in values)
        line += f"{row['gradient']['total'] / base:9.3f}"
        if "total_error" in row["gradient"]:
            line += f" +- {row['gradient']['total_error'] / base:.3f}"
        lines.append(line)
    return "\n".join(lines)
