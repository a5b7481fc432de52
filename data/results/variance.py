"""What `train.py --variance` shows: the law of mdm.py beside the measured noise of the gradient.

We measure before training, and at the trained plain MDM (for arm, the trained ARM). If a response
has up to 8 tokens, we list all masks, and the result is exact. Else we draw masks at random."""
import math

import torch

import mdm
from data import runs

METHODS = """mdm ppots mirror ppots_mirror multi2 exactk ppots_exactk sqrtk clipped clipped_exactk
    exactk_mirror sqrtk_mirror""".split()
EXACT_MAX_N = 8  # response tokens
N_SEQUENCES = 64  # or 16, if their responses are longer than 64 tokens


def draw_rare_masks(words, n, generator, table, eps):
    """16 draws of a rate and its masks: mask, weight (M, 16, n), often (16,). Importance sampling:
    plain draws hardly ever meet the huge gradients at small rates. So we draw a mask `often` times
    as often as a plain draw would, and the caller divides its gradient by that."""
    if "arm" in words:
        return torch.ones(1, 16, n) > 0, torch.ones(1, 16, n), torch.ones(16)
    shift = max(eps, 1e-4)
    span = math.log(1 + 1 / shift)
    # Two sets of 8 numbers, one in each eighth of (0, 1]. The second set is turned into small u.
    even = (torch.arange(1, 9) - torch.rand(2, 8, generator=generator)) / 8
    near_0 = shift * torch.expm1(span * even[1])  # of density 1 / ((u + shift) * span)
    u = torch.cat([even[0], near_0]).clamp(max=1)
    often = 0.5 + 0.5 / ((u + shift) * span)  # the density of both sets together
    r = torch.rand(2 if "multi2" in words else 1, 16, n, generator=generator)
    if not words & mdm.BY_COUNT:  # methods by count never draw an empty mask
        # One random token of the first mask is always hidden. Each of k tokens could be the one, so
        # a mask of k tokens comes up k / (n p) times as often.
        p, _ = mdm.draw_rates(words, u, torch.tensor([float(n)]), n, table, eps)
        token = torch.randint(n, (16, 1), generator=generator)
        r[0] = r[0].scatter(1, token, p[:, None] * r[0].gather(1, token))
        often = often * (r[0] < p[:, None]).sum(-1) / (n * p)
    if "multi2" not in words:
        r = r[0]
    mask, weight = mdm.draw_masks(words, u, r, table=table, eps=eps)
    return mask, weight, often


def sampled_variance(model, x0, pos, method, generator, table=None, eps=mdm.EPS):
    """The gradient's variance per sequence for x0 (X, T): (total, standard error). Unbiased.

    It is E|g|^2 - |E g|^2, where g is the gradient of a step, the mean over its masks. All masks of
    a step are alike, so E|g|^2 = E[g1 . g], where g1 is the gradient of the first mask alone."""
    words = mdm.parse_method(method)
    squares = []  # E|g|^2 of each sequence
    means = []  # and its E g
    for x in x0:
        mask, weight, often = draw_rare_masks(words, len(pos), generator, table, eps)
        flat = [z.flatten(0, 1).to(x.device) for z in (mask, weight)]
        _, g = mdm.sample_gradients(model, x.expand(len(flat[0]), -1), pos, *flat)
        g = g.cpu().unflatten(0, mask.shape[:2])  # (M, 16, n_params)
        first = g[0] / often[:, None]
        squares.append((first * g.mean(0)).sum(-1).mean())
        means.append(first.mean(0))
    square = torch.stack(squares).double()
    mean = torch.stack(means).double()
    # |E g|^2 comes from pairs of two different sequences: the square of a noisy mean is too large.
    X = len(x0)
    pairs = (mean @ mean.T).fill_diagonal_(0).sum(1)
    total = (square - pairs / (X - 1)).mean()
    error = (square - 2 * pairs / (X - 2)).std() / math.sqrt(X)  # by the jackknife
    return total.item(), error.item()


def measured(cfg, words, model, data, pos, seed, at):
    """The law, and the gradient's variance at a model: {"n", at_law, at, at_error or at_A, ...}."""
    n = len(pos)
    x0 = data.test[: N_SEQUENCES if n <= 64 else 16].to(pos.device)
    draw = torch.Generator().manual_seed(seed)
    table = None
    if "ppots" in words:
        r = torch.rand(1, len(x0), min(n, mdm.N_COUNTS), n, generator=draw).to(pos.device)
        counts, H = mdm.pilot(model, x0[None], pos, r)
        table = mdm.ppots_table(counts, H.cpu(), n, cfg.ppots_fit, cfg.eps)[0]
    law = 1.0 if "arm" in words else mdm.noise_in_arms(words, n, table, cfg.eps)
    row = {"n": n, f"{at}_law": law}  # the law of ppots depends on the model
    if n <= EXACT_MAX_N:
        K, K_mean = mdm.grams(model, x0, pos)
        parts = mdm.exact_variance(words, (K, K_mean), n, table, cfg.eps)
        row |= {at: parts["total"]} | {f"{at}_{part}": parts[part] for part in "ABC"}
        # The noise of the mean gradient over x0: the most that coupled sequences could take away.
        shared = mdm.exact_variance(words, (K_mean, K_mean), n, table, cfg.eps)
        return row | {f"{at}_shared": shared["total"]}
    total, error = sampled_variance(model, x0, pos, words, draw, table, cfg.eps)
    return row | {at: total, f"{at}_error": error}


def measure(cfg, methods, seeds, data, device, build):
    """Print a table, and write OUT_DIR/variance.jsonl. seeds has one seed. build is train.build."""
    own = [method for method in methods if mdm.parse_method(method) <= mdm.EXACT]
    if left_out := set(methods) - set(own):
        print(f"\nNot measured: {', '.join(sorted(left_out))} (only words of {sorted(mdm.EXACT)})")
    init_seed = cfg.init_seed if cfg.init_seed >= 0 else None
    models = {"start": (cfg.init_from, init_seed), "end": (cfg.out_dir, seeds[0])}  # "": random
    print("\nGradient noise as a share of plain's: predicted by the law, and measured")
    print(f"{'':22}passes   start: law    measured    end: law    measured")
    rows = []
    for method in dict.fromkeys(["mdm", *own, *METHODS]):
        words = mdm.parse_method(method)
        row = {"method": method, "seed": seeds[0], "passes": mdm.work(words).passes}
        for at, (folder, seed) in models.items():
            model, pos = build(cfg, method, seeds, data, device)
            if folder:
                trained = runs.find_checkpoint(folder, "arm" if "arm" in words else "mdm", seed)
                model.load_state_dict(trained["weights"])
            row |= measured(cfg, words, model, data, pos, seeds[0], at)
        rows.append(row)
        names = ("start_law", "start", "end_law", "end")
        shares = [f"{row[name] / rows[0][name]:12.3f}" for name in names]
        print(f"{method:22}{row['passes']:^6}{''.join(shares)}", flush=True)
    runs.write_lines(f"{cfg.out_dir}/variance.jsonl", rows)
    print(f"Clipped rates are biased. Written to {cfg.out_dir}/variance.jsonl")
