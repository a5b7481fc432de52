"""Every estimator against brute force. The sampler that training uses is called with all random
numbers u and r that make a difference, so that means and variances come out exactly."""
import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mdm
import train
from data import arith

UNBIASED = """mdm mirror multi2 exactk exactk_mirror exactk_multi2 sqrtk sqrtk_mirror ppots
    ppots_mirror ppots_exactk ppots_exactk_mirror""".split()
BIASED = ["clipped", "clipped_exactk", "isad", "ppots_isad"]
EPS = 1e-2
HALF = (0.5 - EPS) / (1 - EPS)  # where p_mask is 1/2, so that MIRROR's masks begin to overlap
TABLE = torch.linspace(1, 3, mdm.N_CELLS).double()
TABLE = TABLE / TABLE.sum()


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- All that a method can draw


def by_count(method):
    return "exactk" in method or "sqrtk" in method


def gauss(cuts):
    """Points and weights for integrals from min to max, of what is smooth between two cuts."""
    x, w = np.polynomial.legendre.leggauss(8)
    edges = float64(cuts).unique()
    width = edges.diff()[:, None]
    points = edges[:-1, None] + width * torch.tensor(x + 1) / 2
    return points.flatten(), (width * torch.tensor(w) / 2).flatten()


def count_law(method, n):
    """P(k), k = 1 ... n, of a method by count, from its definition."""
    k = torch.arange(1, n + 1).double()
    if "sqrtk" in method:
        return k**-0.5 / (k**-0.5).sum()
    if "exactk" == method.split("_")[0]:
        return torch.ones(n).double() / n
    t, weight = (mdm.CELLS, TABLE) if "ppots" in method else gauss([0.3, 0.8])
    ways = float64([math.comb(n, j) for j in range(1, n + 1)])
    chance = weight @ (ways * t[:, None] ** k * (1 - t[:, None]) ** (n - k))
    return chance / chance.sum()


def nodes(method, n):
    """gauss() for u in (0, 1], cut where the sampler has a corner or a steep slope."""
    if by_count(method):
        return gauss([0, *count_law(method, n).cumsum(0).tolist()])
    if "ppots" in method:
        return gauss([0, *TABLE.cumsum(0).tolist()])
    return gauss([0, HALF, 0.4, (0.8 - EPS) / (1 - EPS), *(0.5**j for j in range(8))])


def p_mask(method, u, n, eps=EPS):
    """The probability (Q, n) to hide each token at the numbers u. ISAD's first token is rare."""
    t = mdm.ppots_sample(u, TABLE)[0] if "ppots" in method else u
    p = 0.3 + 0.5 * u if "clipped" in method else eps + (1 - eps) * t
    p = p[:, None].repeat(1, n)
    if "isad" in method:
        p[:, 0] = (p[:, 0] + 0.2).clamp(max=1)
    return p


def patterns(method, p):
    """All that the random numbers r of one sequence can do at p (Q, n): r (Q, cases, n), for multi2
    with an axis 2 in front, and the chance (Q, cases) of each."""
    n = p.shape[-1]
    if by_count(method):
        orders = float64(list(itertools.permutations(range(n)))) / n
        r = orders.expand(len(p), -1, -1)
        chance = torch.ones(r.shape[:2]).double() / len(orders)
    else:  # the r of a token lies between two neighbours of 0, p, 1, for MIRROR also 1 - p
        edges = [torch.zeros_like(p), p, torch.ones_like(p)]
        if "mirror" in method:
            edges[1:2] = [torch.minimum(p, 1 - p), torch.maximum(p, 1 - p)]
        edges = torch.stack(edges, -1)
        middle = (edges[..., 1:] + edges[..., :-1]) / 2
        choice = torch.tensor(list(itertools.product(range(middle.shape[-1]), repeat=n)))
        r = middle[:, torch.arange(n), choice]
        chance = edges.diff()[:, torch.arange(n), choice].prod(-1)
    if "multi2" in method:
        first, second = torch.cartesian_prod(*[torch.arange(r.shape[1])] * 2).T
        return torch.stack([r[:, first], r[:, second]]), chance[:, first] * chance[:, second]
    return r, chance


def all_draws(method, n):
    """One batch with all that a method can draw: u (rows,), r (..., rows, n), chance (rows,)."""
    u, du = nodes(method, n)
    r, chance = patterns(method, p_mask(method, u, n))
    chance = du[:, None] * chance
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    return u.repeat_interleave(chance.shape[1]), r.flatten(-3, -2), chance.flatten()


def draw(method, u, r, response=None, table=TABLE):
    """draw_masks with all it could need. The first token of a response is ISAD's rare one."""
    inside = torch.ones(r.shape[-1]) if response is None else response
    is_rare = (inside.cumsum(-1) * inside == 1).expand(*u.shape, -1)
    return mdm.draw_masks(method, u, r, table=table.to(u), eps=EPS,
                          is_rare=is_rare, response=response)


def mask_index(mask):
    """The row of a mask (..., n) in mdm.all_masks(n)."""
    return (mask.long() * 2 ** torch.arange(mask.shape[-1])).sum(-1)


def mean_weights(mask, weight, chance):
    """Each mask's mean weight / n in the loss, token by token: (2^n, n)."""
    n = mask.shape[-1]
    parts = chance[:, None] * weight * mask / (n * len(mask))
    total = torch.zeros(2**n, n).double()
    return total.index_add(0, mask_index(mask).flatten(), parts.flatten(0, 1))


def wanted_weights(method, n):
    """The same from the definition of the loss: int P(mask | p) / (n p) dt, where p is p_mask at
    the rate t. By count there is no eps, and P-POTS changes nothing."""
    t, dt = nodes("mdm", n)
    p = p_mask(method.replace("ppots", ""), t, n, 0 if by_count(method) else EPS)
    masks = mdm.all_masks(n)
    chance = torch.where(masks[:, None], p, 1 - p).prod(-1)
    return masks * torch.einsum("mq,q,qi->mi", chance, dt, 1 / p) / n


# ---- The mean


@pytest.mark.parametrize("places, outside", [([0, 1, 2, 3], 0.999), ([1, 2, 4, 6], 0.0)])
@pytest.mark.parametrize("method", UNBIASED + BIASED)
def test_the_mean_for_responses_of_different_lengths(method, places, outside):
    """One batch, responses of 1 to 4 tokens in rows of 7. Each mask has the mean weight that the
    method promises: the bound L's, if it is unbiased. By count exactly k = 1 ... n tokens are
    hidden, with the chance P(k). Nothing is hidden outside the response, whatever r is there."""
    draws = [all_draws(method, n) for n in (1, 2, 3, 4)]
    n_of_row = torch.cat([torch.full((len(u),), n) for n, (u, _, _) in enumerate(draws, 1)])
    response = torch.zeros(len(n_of_row), 7, dtype=torch.bool)
    response[:, places] = torch.arange(4) < n_of_row[:, None]
    inside = [torch.nn.functional.pad(r, (0, 4 - r.shape[-1]), value=outside) for _, r, _ in draws]
    inside = torch.cat(inside, -2)
    r = torch.full((*inside.shape[:-1], 7), outside).double()
    r[..., places] = inside
    mask, weight = draw(method, torch.cat([u for u, _, _ in draws]), r, response)
    assert not (mask & ~response).any()
    # The integral of clipped_exactk has N_CELLS midpoints, and mine for ppots_isad a corner.
    tolerance = 1e-5 if method in ("clipped_exactk", "ppots_isad") else 1e-9
    for n, (u, _, chance) in enumerate(draws, 1):
        m = mask[:, n_of_row == n][..., places[:n]]
        w = weight[:, n_of_row == n][..., places[:n]]
        got = mean_weights(m, w, chance)
        torch.testing.assert_close(got, wanted_weights(method, n), rtol=0, atol=tolerance)
        off = (got - wanted_weights("exactk" if by_count(method) else "mdm", n)).abs().max()
        assert off < 1e-9 if method in UNBIASED else off > 5e-3 or n == 1
        if by_count(method):
            k = 1 + (u[:, None] > count_law(method, n).cumsum(0)).sum(-1)
            assert (m.sum(-1) == k).all()


@pytest.mark.parametrize("method", UNBIASED + BIASED + ["strats", "clipped_mirror", "ppots_multi2"])
def test_axes_that_change_nothing(method):
    """Equal to the bit, in float32: a response that is everything and none; one seed and no axis of
    seeds; two seeds with their own tables and one by one. (A law of counts that is an integral: to
    rounding, since sums of other shapes may add up in another order.)"""
    u = 1 - torch.rand(2, 1, 12, generator=seeded())
    r = torch.rand(2, 2, 1, 12, 5, generator=seeded(1))
    r = r if "multi2" in method else r[0]
    table = torch.stack([TABLE, TABLE.flip(0)])[:, None]
    mask, weight = draw(method, u, r, None, table)
    rounding = 1e-6 if "exactk" in method and not method.startswith("exactk") else 0
    for s in (0, 1):
        axis = draw(method, u[s], r[..., s, :, :, :], None, table[s])
        none = draw(method, u[s, 0], r[..., s, 0, :, :], None, table[s, 0])
        full = draw(method, u[s, 0], r[..., s, 0, :, :], torch.ones(12, 5) > 0, table[s, 0])
        for m, w in ((axis[0][:, 0], axis[1][:, 0]), none, full):
            assert torch.equal(m, mask[:, s, 0])
            torch.testing.assert_close(w, weight[:, s, 0], rtol=rounding, atol=0)
        assert not draw(method, u[s, 0], r[..., s, 0, :, :], torch.zeros(12, 5) > 0)[0].any()
    if "ppots" in method:
        assert not torch.equal(draw(method, u, r, None, table.flip(0))[1], weight)


def test_the_loss_by_hand():
    """The example of mdm.py's first page; and with 2 response tokens in a row of 4."""
    mask, weight = mdm.draw_masks("mirror", float64([0.5]), float64([[0.1, 0.8, 0.4, 0.6]]), eps=0)
    assert mask.long().tolist() == [[[1, 0, 1, 0]], [[0, 1, 0, 1]]]
    nll = float64([[1, 9, 3, 9]])
    assert mdm.mdm_loss(nll, mask[0], weight[0]).tolist() == [2]
    assert mdm.mdm_loss(nll, mask[0], weight[0], torch.tensor([2])).tolist() == [4]


# ---- The variance


@pytest.fixture(scope="module")
def toy():
    """A model of 3 letters, 4 sequences with 3 response tokens: model, x0, pos, and for each
    sequence and mask H (4, 8, 1) and its gradient (4, 8, P)."""
    model = mdm.GPT(mdm.GPTConfig(3, 5, 1, 2, 4), [seeded()]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=seeded(p.numel()))
    x0 = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 0, 2], [2, 0, 1, 2, 2], [0, 2, 1, 1, 0]])
    pos = torch.arange(2, 5)
    every_mask = mdm.all_masks(3).repeat(4, 1)
    n = torch.full((32, 3), 3.0)
    H, V = mdm.sample_gradients(model, x0.repeat_interleave(8, 0), pos, every_mask, n)
    return model, x0, pos, H.double().view(4, 8, 1), V.double().view(4, 8, -1)


def products(V):
    """What mdm.grams gives, from V (X, N, P): the mean of V V^T, and V V^T of the mean."""
    return torch.einsum("xap,xbp->ab", V, V) / len(V), V.mean(0) @ V.mean(0).T


@pytest.mark.parametrize("method", UNBIASED + ["clipped", "clipped_exactk"])
def test_exact_variance_is_brute_force(method, toy):
    """A, B, C of the loss and of the gradient, against their definitions. c (Q, cases, 8) holds the
    coefficient that each draw gives to each mask."""
    model, x0, pos, H, V = toy
    u, r, chance = all_draws(method, 3)
    mask, weight = draw(method, u, r)
    hit = torch.nn.functional.one_hot(mask_index(mask), 8)
    c = (hit * weight[..., :1] / 3).mean(0).view(len(u.unique()), -1, 8)
    chance = chance.view(c.shape[:2])
    second = torch.einsum("qc,qci,qcj->ij", chance, c, c)
    at_u = (chance[..., None] * c).sum(1) / chance.sum(1, keepdim=True)
    between = torch.einsum("q,qi,qj->ij", chance.sum(1), at_u, at_u)
    mean = chance.sum(1) @ at_u
    for K, V in [(products(H), H), (mdm.grams(model, x0, pos), V)]:
        of_a_sequence = torch.einsum("m,xmp->xp", mean, V)
        wanted = {
            "A": ((second - between) * products(V)[0]).sum().item(),
            "B": ((between - torch.outer(mean, mean)) * products(V)[0]).sum().item(),
            "C": (of_a_sequence - of_a_sequence.mean(0)).square().sum(-1).mean().item(),
        }
        wanted["total"] = sum(wanted.values())
        got = mdm.exact_variance(method, K, 3, TABLE, EPS)
        assert got == pytest.approx(wanted, rel=0, abs=1e-4 * wanted["total"])


def test_arm_has_only_data_noise(toy):
    arm = mdm.GPT(mdm.GPTConfig(3, 5, 1, 2, 8, True), [seeded()])
    ones = torch.ones(4, 3)
    _, V = mdm.sample_gradients(arm, toy[1], toy[2], ones, ones)
    wanted = (V - V.mean(0)).square().sum(1).mean().item()
    got = mdm.exact_variance("arm", mdm.grams(arm, toy[1], toy[2]), 3)
    for unknown in ("isad", "strats_mirror"):
        with pytest.raises(ValueError, match="knows only"):
            mdm.exact_variance(unknown, None, 3)
    assert got == pytest.approx({"A": 0, "B": 0, "C": wanted, "total": wanted}, rel=1e-5)


def test_variance_of_the_plain_loss_grows_like_log_eps(toy):
    """E[l^2 | t] ~ c/t, c from the masks of one token: each power of ten in eps adds c ln 10."""
    H = toy[3]
    c = (H[:, mdm.all_masks(3).sum(-1) == 1, 0].square().sum(1) / 9).mean().item()
    found = [mdm.exact_variance("mdm", products(H), 3, eps=10.0**-e) for e in (3, 4, 5, 6)]
    assert np.diff([parts["total"] for parts in found]) == pytest.approx(c * math.log(10), rel=0.02)


# ---- The law: what a method costs, in ARMs


@pytest.mark.parametrize("n", [4, 13, 64])
def test_the_law_has_its_closed_forms(n):
    """noise_in_arms, which calls the sampler, against mdm.py's table; for P-POTS, any density."""
    k = torch.arange(1, n + 1).double()
    log = math.log(1 / mdm.EPS)
    sqrt_t = (torch.arange(64 * mdm.N_CELLS).double() + 0.5) / (64 * mdm.N_CELLS)
    mass = TABLE.repeat_interleave(64)
    one_over_q = 2 * sqrt_t / (mass * mdm.N_CELLS)
    wanted = {
        "mdm": log,
        "clipped": math.log(0.8 / 0.3) / 0.5,
        "exactk": (1 / k).sum(),
        "sqrtk": k.rsqrt().sum() ** 2 / n,
        "mirror": log / 2 + math.log(2) - 0.5,
        "multi2": log / 2 + 0.5,
        "exactk_mirror": ((2 * k + 2 * (2 * k - n).clamp(min=0)) / (4 * k**2)).sum(),
        "ppots": (mass / 64 * one_over_q**2 / mdm.rate_to_p_mask(sqrt_t**2)).sum(),
        "ppots_exactk": (1 / (n * k * count_law("ppots_exactk", n))).sum(),
    }
    for method, value in wanted.items():
        assert mdm.noise_in_arms(method, n, TABLE) == pytest.approx(float(value), rel=0.005), method


def test_the_laws_rows_of_ppots():
    """Those of mdm.py's table: if each hidden token costs the same, for both fits."""
    for fit, row in {"epr": (4.50, 5.02, 6.05), "grid": (3.94, 4.39, 5.28)}.items():
        for n, noise in zip((4, 13, 64), row):
            k = torch.arange(1, n + 1)
            table = mdm.ppots_table(k, k[None].double(), n, fit)
            assert mdm.noise_in_arms("ppots", n, table) == pytest.approx(noise, rel=0.005)


def test_the_law_predicts_the_gradients_variance():
    """add3, n = 4, and a model that has learned how common each digit is, but little else, so that
    its tokens are about equally strong: over plain training's, the exact variance of the gradient
    is what the law says to 10 %. (Five other seeds: to 6 %.)"""
    data = arith.make("add3")
    pos = torch.arange(8, 12)
    g = seeded()
    model = mdm.GPT(mdm.GPTConfig(int(data.train.max()) + 1, 12, n_embd=32), [g])
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(40):
        x0 = data.train[torch.randint(len(data.train), (1, 32), generator=g)]
        u = 1 - torch.rand(1, 32, generator=g)
        mask, weight = mdm.draw_masks("exactk_mirror", u, torch.rand(1, 32, 4, generator=g))
        optimizer.zero_grad()
        mdm.method_loss(model, x0, pos, mask, weight).mean().backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, (40 - step) / 20)
        optimizer.step()
    K = mdm.grams(model, data.test[:64], pos)
    plain = mdm.exact_variance("mdm", K, 4)["total"]
    for method in ("clipped", "exactk", "sqrtk", "mirror", "multi2", "exactk_mirror"):
        law = mdm.noise_in_arms(method, 4) / mdm.noise_in_arms("mdm", 4)
        assert mdm.exact_variance(method, K, 4)["total"] / plain == pytest.approx(law, rel=0.1)


# ---- P-POTS


def test_the_pilot_measures_the_exact_curve(toy):
    """If each sequence meets all orders of r, E[l^2 | t] is what the sum over all masks says."""
    model, x0, pos, H, _ = toy
    r = float64(list(itertools.permutations([0.1, 0.5, 0.9])))
    r = r[None, None, :, None].expand(1, 4, 6, 3, 3).reshape(1, 24, 3, 3)
    counts, got = mdm.pilot(model, x0[None].repeat_interleave(6, 1), pos, r)
    t = float64([0.05, 0.3, 0.5, 0.9, 0.999])
    k = mdm.all_masks(3).sum(-1)[1:]
    chance = t[:, None] ** k * (1 - t[:, None]) ** (3 - k)
    wanted = chance @ H[:, 1:, 0].square().mean(0) / (3 * t) ** 2
    got = mdm.second_moment(counts, got, t, 3, eps=0)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_the_pilots_masks_have_the_counts_they_say():
    """Growing from 1 to n, for 13 tokens and for responses of 0, 1, 2, 4 and 7 tokens among 7."""
    counts, mask = mdm.pilot_masks(torch.rand(2, 5, 4, 13, generator=seeded()))
    assert counts.tolist() == [[1, 5, 9, 13]] * 5 and (mask.sum(-1) == counts).all()
    n = torch.tensor([0, 1, 2, 4, 7])
    response = torch.rand(5, 7, generator=seeded(1)).argsort(-1) < n[:, None]
    counts, mask = mdm.pilot_masks(torch.rand(2, 5, 16, 7, generator=seeded(2)), response)
    assert counts[:, 0].tolist() == [1, 1, 1, 1, 1] and counts[:, -1].tolist() == [1, 1, 2, 4, 7]
    assert set(counts[4].tolist()) == set(range(1, 8)) and (counts.diff() >= 0).all()
    assert (mask.sum(-1) == counts).all((0, 2)).tolist() == [False, True, True, True, True]
    assert not (mask & ~response[:, None]).any()


def test_the_curve_of_long_and_of_different_responses():
    """If every hidden token costs 2, E[l^2 | t] = 4 (1 + (1-t) / (n t)), for 64 tokens and 16
    counts. With 8, 64 and 64 tokens n is the median, and a cost may depend on k/n (to 15 %)."""
    t = float64([0.1, 0.3, 0.9])
    wanted = 4 * (1 + (1 - t) / (64 * t))
    n = torch.tensor([8, 64, 64])
    counts = 1 + (torch.linspace(0, 1, 16) * (n[:, None] - 1)).round().long()
    one = mdm.second_moment(counts[1], 2 * counts[1:], t, 64, eps=0)
    torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(mdm.second_moment(counts, 2 * counts, t, n, eps=0), wanted)
    H = counts * counts / n[:, None]
    one = mdm.second_moment(counts[1], H[1:], t, 64, eps=0)
    torch.testing.assert_close(mdm.second_moment(counts, H, t, n, eps=0), one, rtol=0.15, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_ppots_weight_is_the_density_really_sampled(dtype, tolerance):
    """The mean weight is 1 (else the estimate is biased), t grows with u, and inside a cell the
    slope of t(u) is the weight."""
    u, du = nodes("ppots", 1)
    t, weight = mdm.ppots_sample(u.to(dtype), TABLE.to(dtype))
    assert (weight.double() @ du).item() == pytest.approx(1, abs=tolerance)
    assert (t.diff() >= 0).all()
    t, weight = mdm.ppots_sample(float64([[0.1], [0.5], [0.9]]) + float64([-1e-6, 0, 1e-6]), TABLE)
    torch.testing.assert_close((t[:, 2] - t[:, 0]) / 2e-6, weight[:, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("true", [[1, -1, 0.5, 0, 1, 0.5], [-2, 2, -1, 1, 3, 0]])
def test_epr_recovers_its_own_family(true):
    """A curve of the family is found again, to 1e-5 nats. The family is the paper's formula."""
    t = torch.arange(1, 64).double() / 64
    theta = float64([true])
    p = mdm.epr(theta, t).softmax(-1)
    fit = mdm.epr(mdm.fit_epr(t, p), t)
    assert (p * (p.log() - fit.log_softmax(-1))).sum() < 1e-5
    a, b, d, c1, c2, c3 = torch.nn.functional.softplus(theta[0]).tolist()
    v = a * 0.3 ** (1 + c1) + b * 0.7 ** (1 + c2)
    wanted = math.sqrt(v + math.exp(d * 0.3 ** (1 + c3)) ** 2)
    assert mdm.epr(theta, float64([0.3])).exp().item() == pytest.approx(wanted)


def test_epr_is_fitted_to_the_root_of_the_curve():
    """The table is equation (4) to .01 nats. It would be .06 away if the root were forgotten."""
    counts = torch.arange(1, 5)
    H = torch.tensor([[1.0, 6.0, 27.0, 108.0]])
    q = (mdm.second_moment(counts, H, mdm.CELLS, 4) * mdm.CELLS).sqrt()
    q = q / q.sum()
    assert (q * (q / mdm.ppots_table(counts, H, 4)).log()).sum() < 0.01


@pytest.mark.parametrize("fit", ["epr", "grid"])
def test_ppots_beats_uniform_rates(fit, toy):
    """The loss's exact variance. The grid is the optimum: tables around it do worse."""
    model, x0, pos, H, _ = toy
    r = torch.rand(1, 256, 3, 3, generator=seeded())
    counts, found = mdm.pilot(model, x0[None].repeat(1, 64, 1), pos, r)
    table = mdm.ppots_table(counts, found, 3, fit)[0].double()
    total = mdm.exact_variance("ppots", products(H), 3, table)["total"]
    assert total < 0.9 * mdm.exact_variance("mdm", products(H), 3)["total"]
    for seed in range(5 if fit == "grid" else 0):
        other = table * (1 + 0.3 * torch.rand(table.shape, generator=seeded(seed)))
        other = other / other.sum()
        assert total < mdm.exact_variance("ppots", products(H), 3, other)["total"]


@pytest.mark.parametrize("fit", ["epr", "grid"])
def test_ppots_table_gives_no_rate_up_and_works_everywhere(fit):
    """Every cell keeps a thousandth of the largest one's probability, even if the model knows all.
    Each row is its own, gradients may be off, and a pilot that is not finite is refused."""
    counts = torch.arange(1, 5)
    H = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4], [1e4, 2e4, 3e4, 4e4], [0, 0, 0, 1e9]])[:, None]
    table = mdm.ppots_table(counts, H, 4, fit)
    assert (table.amin(-1) > 0.99e-3 * table.amax(-1)).all() and table.dtype == torch.float32
    torch.testing.assert_close(table.sum(-1), torch.ones(4))
    torch.testing.assert_close(mdm.ppots_table(counts, H[3], 4, fit), table[3])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(mdm.ppots_table(counts + 0, H + 0, 4, fit), table)
    for bad in (math.nan, math.inf):
        H[0, 0, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            mdm.ppots_table(counts, H, 4, fit)


# ---- The other methods


def test_strata_are_filled_equally():
    """In each stratum equally many sequences, whatever u is, and there u decides; 0 < u <= 1."""
    for B, strata in [(1, 1), (4, 2), (7, 1), (12, 3), (16, 4), (64, 8)]:
        u = torch.cat([torch.rand(2, B, generator=seeded()), torch.ones(1, B)]).double()
        got = mdm.stratify(u)
        stratum = (got * strata).ceil().long() - 1
        for row in stratum:
            assert row.bincount(minlength=strata).tolist() == [B // strata] * strata
        torch.testing.assert_close(got * strata - stratum, u)
        _, weight = draw("strats", u, torch.rand(3, B, 2))
        torch.testing.assert_close(1 / weight[0, ..., 0], EPS + (1 - EPS) * got)
    edge = mdm.stratify(torch.tensor([2.0**-24, 1.0, 1.0, 1.0]))
    assert edge.min() > 0 and edge.max() == 1


def test_ema_is_steadier_unbiased_and_trains_the_same():
    """By hand. Then, where the loss depends on the rate: a batch's SD is less than half; with as
    many rates in each bin its mean stays; and its gradient stays, to the bit."""
    ema = torch.tensor([[1.0, 3.0]])
    steady, new = mdm.ema_baseline(torch.tensor([[5.0, 7.0]]), torch.tensor([[0.2, 0.5]]), ema)
    assert steady.tolist() == [[6, 8]]  # minus the first bin's 1, plus the mean 2
    torch.testing.assert_close(new, torch.tensor([[1.05, 3.0]]))
    ema = torch.zeros(1, 10)
    u = 1 - torch.rand(400, 1, 64, generator=seeded())
    loss = (3 / (u + 0.1)).requires_grad_()
    means = []
    for step in range(400):
        steady, ema = mdm.ema_baseline(loss[step], u[step], ema, step=0.05)
        means.append(steady.mean())
    means = torch.stack(means)
    assert means[200:].std() < 0.5 * loss[200:].mean((1, 2)).std()
    (gradient,) = torch.autograd.grad(means.sum(), loss)
    assert torch.equal(gradient, torch.full_like(gradient, 1 / 64))
    u = (torch.arange(20)[None] + 1) / 20
    steady, _ = mdm.ema_baseline(u.square(), u, ema)
    assert steady.mean().item() == pytest.approx(u.square().mean().item(), abs=1e-4)


# ---- Names, and what the first and last pages promise


def test_names_of_methods():
    """All pairs of words: refused, or one set of words with one spelling, whatever their order."""
    for pair in itertools.permutations(["mdm", *mdm.MASKING, *mdm.TRAINING], 2):
        words = set(pair) - {"mdm"}
        conflict = any(len(words & set(group.split())) == 2 for group in mdm.AT_MOST_ONE_OF)
        if conflict or ("arm" in pair and not words - {"arm"} & {"batch2", "steps2"}):
            with pytest.raises(ValueError):
                mdm.parse_method("_".join(pair))
        else:
            assert mdm.parse_method("_".join(pair)) == words
            assert mdm.parse_method(train.method_name(words)) == words
    for name in ("mdm", "mdm_batch2", "arm", "arm_steps2", "ema", "ppots_exactk_strats_mirror"):
        words = mdm.parse_method(name)
        assert train.method_name(words) == name == train.method_name(sorted(words)[::-1])
    assert mdm.parse_method(" PPOSTS_Mirror ") == {"ppots", "mirror"}
    masks_batch_steps_passes = {
        "exactk": (1, 1, 1, 1), "mirror": (2, 1, 1, 2), "multi2": (2, 1, 1, 2),
        "mdm_batch2": (1, 2, 1, 2), "arm_steps2": (1, 1, 2, 2),
        "ppots_mirror_batch2": (2, 2, 1, 4)}  # fmt: skip
    for name, wanted in masks_batch_steps_passes.items():
        assert mdm.work(mdm.parse_method(name)) == wanted


@pytest.mark.parametrize("method, shape, reason", [
    ("multi2", (4, 3), "shape"), ("mdm", (1, 4, 3), "shape"), ("mirror", (2, 4, 3), "shape"),
    ("exactk", (5, 3), "shape"), ("ppots", (4, 3), "table"), ("ppots_exactk", (4, 3), "table"),
    ("isad", (4, 3), "is_rare"), ("arm_mirror", (4, 3), "no masks"),
    *[(word, (4, 3), "training loop") for word in mdm.TRAINING],
    *[(group.replace(" ", "_"), (4, 3), "choose one") for group in mdm.AT_MOST_ONE_OF],
    *[(name, (4, 3), "unknown") for name in ("warmrate", "", "mirror_mirror", "exactk mirror")],
])  # fmt: skip
def test_draw_masks_refuses_in_one_line(method, shape, reason):
    with pytest.raises(ValueError, match=reason) as error:
        mdm.draw_masks(method, torch.ones(4), torch.rand(shape))
    assert "\n" not in str(error.value)


def test_the_demonstration_runs_alone(tmp_path):
    """mdm.py, alone in a folder: its table has the law within 15 points of the exact variance."""
    shutil.copy(mdm.__file__, tmp_path)
    run = [sys.executable, "-E", "mdm.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    rows = re.findall(r"^(\w+) +\d +[\d.]+" + r" +(\d+)%" * 5 + "$", done.stdout, re.M)
    assert [row[0] for row in rows] == mdm.DEMO_METHODS and len(rows) > 6, done.stderr
    for method, *shares in rows:
        law, measured, A, B, C = map(int, shares)
        assert abs(law - measured) < 15 and abs(A + B + C - measured) <= 2
        assert (law == measured == 100) == (method == "mdm")


@pytest.mark.parametrize("method", ["sqrtk", "sqrtk_mirror"])
def test_the_readmes_snippet_runs_as_it_stands(monkeypatch, method):
    """Prompts of 2 tokens, responses of 1 to 4, padding, and a model as Hugging Face has them. With
    torch.rand replaced by 500 numbers u times all orders of r, the snippet's gradient is that of
    the bound, to 1 %. The block with `pilot_batch` gives the exact table."""
    readme = (Path(mdm.__file__).parent / "README.md").read_text("utf-8")
    blocks = re.findall("```python\n(.*?)```", readme, re.S)
    step = next(block for block in blocks if "def token_nll" in block)
    measure = next(block for block in blocks if "pilot_batch" in block)
    pad = torch.nn.functional.pad
    parameters = torch.randn(5, 6, 6, generator=seeded()).double().requires_grad_()

    def model(input_ids, attention_mask):
        """Every token sees all tokens but padding. The logits come in an object."""
        place, word, own, context, head = parameters
        x = word[input_ids] + place
        seen = attention_mask[..., None].to(x)
        mean = (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return SimpleNamespace(logits=(x @ own + mean @ context).tanh() @ head[:, :5])

    ids = torch.randint(5, (4, 6), generator=seeded(1))
    n = torch.arange(1, 5)
    seen = torch.arange(6) < 2 + n[:, None]
    labels = ids.masked_fill(~seen | (torch.arange(6) < 2), -100)
    batch = {"input_ids": ids, "attention_mask": seen.long(), "labels": labels}
    pilot_batch = {key: rows.repeat_interleave(24, 0) for key, rows in batch.items()}
    batch = {key: rows.repeat(500, 1) for key, rows in pilot_batch.items()}
    u = ((torch.arange(500) + 0.5) / 500).repeat_interleave(4 * 24)
    orders = torch.tensor(list(itertools.permutations([0.2, 0.4, 0.6, 0.8])))
    r = pad(orders, (2, 0), value=0.1).repeat(4 * 500, 1)

    def rand(*size, **_):
        """u (B,), r (B, T), or for the pilot (B, 16, T)."""
        size = size if isinstance(size[0], int) else size[0]
        if len(size) == 1:
            return u
        return r if len(size) == 2 else r[: size[0], None].expand(size)

    monkeypatch.setattr(torch, "rand", rand)
    names = {"model": model, "mask_id": 5, "batch": batch, "pilot_batch": pilot_batch}
    exec(step.replace('"sqrtk"', f'"{method}"'), names)
    masks = mdm.all_masks(4)  # of n < 4 tokens, the first 2^n are all
    xt = torch.where(pad(masks, (2, 0)), 5, ids[:, None]).flatten(0, 1)
    logp = model(xt, seen.long().repeat_interleave(16, 0)).logits.log_softmax(-1).view(4, 16, 6, 5)
    nll = -logp.gather(-1, ids[:, None, :, None].expand(-1, 16, -1, -1))[..., 2:, 0]
    bound = [pad(wanted_weights("exactk", k), (0, 4 - k, 0, 16 - 2**k)) for k in range(1, 5)]
    (wanted,) = torch.autograd.grad((torch.stack(bound) * nll).sum() / 4, parameters)
    assert (parameters.grad - wanted).norm() < 0.01 * wanted.norm()

    exec(measure, names)
    counts = 1 + (torch.linspace(0, 1, 16) * (n[:, None] - 1)).round().long()
    of_count = (masks.sum(-1) == counts[..., None]) & (torch.arange(16) < 2 ** n[:, None, None])
    square = (nll * masks).sum(-1).detach().square()[:, None]
    H = ((square * of_count).sum(-1) / of_count.sum(-1)).sqrt()
    table = mdm.ppots_table(counts, H, n)
    torch.testing.assert_close(names["table"].view(-1).double(), table, rtol=1e-3, atol=0)
