"""Every estimator against brute force: a model of 3 response tokens over a 3-letter alphabet, in
float64, where all masks, rates and permutations can be gone through by calling the very sampler
that training uses."""
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import mdm
from data import variance
from mdm import GPT, GPTConfig

N, T, X, EPS = 3, 5, 4, 1e-2  # response tokens, block_size, sequences, eps
POS, MASKS = torch.arange(2, T), mdm.all_masks(N)
TABLE = torch.linspace(1, 3, mdm.N_CELLS).double()[None]
TABLE = TABLE / TABLE.sum()
TOLERANCE = {  # of exact_variance, relative to the total
    **dict.fromkeys(["mdm", "mirror", "multi2"], 1e-4),
    **dict.fromkeys(["exactk", "exactk_mirror", "exactk_multi2"], 1e-8),
    **dict.fromkeys(["ppots", "ppots_mirror"], 1e-3),
}


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def toy():
    """A model, four sequences; nll (X, 8, N), H (X, 8, 1), gradient (X, 8, P) of each mask."""
    model = GPT(GPTConfig(3, T, 1, 2, 4), [torch.Generator().manual_seed(0)]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel()))
    x0 = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 0, 2], [2, 0, 1, 2, 2], [0, 2, 1, 1, 0]])
    nlls, grads = [], []
    for x, mask in itertools.product(x0, MASKS):
        nll = mdm.token_nll(model, x[None, None], POS, mask[None, None])[0, 0]
        model.zero_grad()
        (nll * mask).sum().backward()
        nlls.append(nll.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    nlls = torch.stack(nlls).view(X, 8, N)
    return model, x0, nlls, (nlls * MASKS).sum(-1, keepdim=True), torch.stack(grads).view(X, 8, -1)


def nodes(method):
    """Gauss-Legendre nodes and weights for u in (0,1], fine enough for 1/(t + eps), and cut where
    the sampler has a corner: p = 1/2 for MIRROR, a cell's edge for P-POTS, a new count."""
    cuts = {0.0, 1.0, *(0.5**j for j in range(14)), *(i / N for i in range(N))}
    half = (0.5 - EPS) / (1 - EPS)
    cuts |= {half, (0.5 - 0.3) / 0.5}
    if "ppots" in method:
        cdf, s = torch.cat([torch.zeros(1).double(), TABLE[0].cumsum(0)]), half**0.5 * mdm.N_CELLS
        cuts |= {*cdf[1:-1].tolist(), (cdf[int(s)] + (s - int(s)) * TABLE[0, int(s)]).item()}
    x, w = np.polynomial.legendre.leggauss(8)
    edges = np.array(sorted(cuts))
    u = (edges[:-1, None] + np.diff(edges)[:, None] * (x + 1) / 2).ravel()
    return torch.tensor(u), torch.tensor((np.diff(edges)[:, None] * w / 2).ravel())


def patterns(method, p):
    """All that the uniforms r of one sequence can do at the rates p: [(r (copies, n), chance)]."""
    if "exactk" in method:
        ranks = itertools.permutations(range(N))
        one = [([(i + 0.5) / N for i in rank], 1 / math.factorial(N)) for rank in ranks]
    else:
        tokens = []
        for q in p:
            edges = sorted({0.0, q, 1 - q, 1.0})
            tokens.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(edges) if b > a])
        one = [([r for r, _ in c], math.prod(w for _, w in c)) for c in itertools.product(*tokens)]
    both = itertools.product(one, repeat=2 if "multi2" in method else 1)
    return [([r for r, _ in c], math.prod(w for _, w in c)) for c in both]


def outcomes(method, rare=None):
    """All that a draw can be: for each node its du, and chances (cases,), mask and weight
    (M, cases, n) from draw_masks."""
    for u, du in zip(*nodes(method)):
        p = mdm.rate(method, u.view(1, 1), N, TABLE, EPS, rare)[0].flatten().expand(N).tolist()
        r, chance = zip(*patterns(method, p))
        r = float64(r).transpose(0, 1)[:, None]  # (copies, 1, cases, n)
        is_rare = None if rare is None else rare.expand(r.shape[1:])
        mask, weight = mdm.draw_masks(method, u.expand(1, len(chance)), r, TABLE, EPS, is_rare)
        assert sum(chance) == pytest.approx(1, abs=1e-12)
        yield du, float64(chance), mask[:, 0], weight[:, 0]


def index(mask):
    return (mask.long() * 2 ** torch.arange(N)).sum(-1)


def moments(method, V):
    """From V (X, 8, P), outcome by outcome: du (Q,), E[l|u] (Q, X, P), E[|l|^2 | u] (Q, X)."""
    found = []
    for du, chance, mask, weight in outcomes(method):
        loss = (weight[..., :1] / N * V[:, index(mask)]).mean(1)  # (X, cases, P)
        mean = (chance[:, None] * loss).sum(1)
        found.append((du, mean, (chance * loss.square().sum(-1)).sum(1)))
    return [torch.stack(z) for z in zip(*found)]


def objective(eps):
    """The weight of each mask in L, (8,): Beta integrals, or for eps > 0 over p in (eps, 1)."""
    k = MASKS.sum(-1).numpy()
    if eps == 0:
        chance = [1 / (N * j * math.comb(N, j)) if j else 0.0 for j in k.tolist()]
        return float64(chance)
    x, w = np.polynomial.legendre.leggauss(40)
    p = eps + (1 - eps) * (x + 1) / 2
    weight = (w / 2 * p ** (k[:, None] - 1.0) * (1 - p) ** (N - k[:, None])).sum(-1) / N
    return torch.tensor(np.where(k > 0, weight, 0.0))


def exact(method, K, **changes):
    return mdm.exact_variance(method, *K, N, TABLE, **{"eps": EPS, **changes})


@pytest.mark.parametrize("method", TOLERANCE)
def test_unbiased_and_its_exact_variance_is_brute_force(method, toy):
    model, x0, _, H, grads = toy
    for K, V in zip(mdm.grams(model, x0, POS), (H, grads)):
        du, given_u, second = moments(method, V)
        mean = torch.einsum("q,qxp->xp", du, given_u)
        wanted = torch.einsum("m,xmp->xp", objective(0.0 if "exactk" in method else EPS), V)
        torch.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-12)  # unbiased
        A = (du @ (second - given_u.square().sum(-1))).mean()
        B = (du @ given_u.square().sum(-1) - mean.square().sum(-1)).mean()
        C = (mean - mean.mean(0)).square().sum(-1).mean()
        error = TOLERANCE[method] * (A + B + C)
        got = exact(method, K)
        for part, value in {"A": A, "B": B, "C": C, "total": A + B + C}.items():
            assert abs(got[part] - value) < error, (part, got, value)


@pytest.mark.parametrize("method", ["strats", "strats_mirror", "exactk_strats"])
def test_strata_take_their_differences_off(method, toy):
    """The batch-size-4 variance from its definition: two strata, two draws in each."""
    model, x0, _, H, _ = toy
    plain = method.replace("strats_", "").replace("_strats", "").replace("strats", "mdm")
    u, _ = nodes(plain)
    du, given_u, second = moments(plain, H)
    wanted = 0.0
    for stratum in (0, 1):
        here = 2 * du * ((u * 2).long() == stratum)
        mean = here @ given_u.mean(1)[:, 0]
        wanted += (here @ second.mean(1) - mean**2).item() / 2
    got = exact(method, mdm.grams(model, x0, POS)[0], batch_size=4)["total"]
    assert got == pytest.approx(wanted, rel=1e-4)


def test_exact_counts_gain_by_never_drawing_the_empty_mask(toy):
    """A plain MDM without the empty mask, weight (1 - (1-p)^n) / p, has the gradient variance of
    exact counts to within 10 %, a fraction of the plain one's; at eps -> 0 theirs is never more."""
    model, x0, *_ = toy
    for K in mdm.grams(model, x0, POS):
        assert exact("exactk", K)["total"] < exact("mdm", K, eps=1e-6)["total"]
    K, K_mean = mdm.grams(model, x0, POS)[1]
    u, du = nodes("mdm")
    p, k = mdm.rate_to_p_mask(u, EPS)[:, None], MASKS.sum(1)
    drawn = 1 - (1 - p) ** N
    P = torch.where(k > 0, p**k * (1 - p) ** (N - k) / drawn, 0.0)
    a = drawn / (N * p)
    second, mean = ((du[:, None] * a**2 * P).sum(0) * K.diag()).sum(), (du[:, None] * a * P).sum(0)
    total = (second - mean @ K_mean @ mean).item()
    assert total == pytest.approx(exact("exactk", (K, K_mean))["total"], rel=0.1)
    assert total < 0.7 * exact("mdm", (K, K_mean))["total"]


def second_moment(H, t):
    """E[l^2 | t] over the toy's sequences, by enumeration."""
    k = MASKS.sum(-1).double()
    return ((t ** (k - 2) * (1 - t) ** (N - k))[1:] * H[:, 1:, 0].square() / N**2).sum(1).mean()


def test_variance_of_the_plain_loss_grows_like_log_eps(toy):
    """E[l^2 | t] ~ c/t, c from the one-token masks: each power of ten in eps adds c ln 10. Under
    the optimal table it settles."""
    model, x0, _, H, _ = toy
    K = mdm.grams(model, x0, POS)[0]
    c = (H[:, MASKS.sum(-1) == 1, 0].square().sum(1) / N**2).mean().item()
    steps = np.diff([exact("mdm", K, eps=10.0**-e)["total"] for e in range(3, 7)])
    assert steps == pytest.approx(c * math.log(10), rel=2e-2)
    mass = torch.stack([second_moment(H, t) for t in mdm.CELLS.tolist()]).sqrt() * mdm.CELLS.sqrt()
    table = (mass / mass.sum())[None]
    totals = [mdm.exact_variance("ppots", *K, N, table, 10.0**-e)["total"] for e in range(3, 7)]
    steps = np.diff(totals)
    assert (abs(steps) < 0.1 * c * math.log(10)).all() and abs(steps[-1]) < abs(steps[0])


# ---- P-POTS


def test_pilot_measures_the_exact_curve(toy):
    """Masks have exactly the counts asked for; if each sees all its masks, E[l^2|t] is exact."""
    model, x0, _, H, _ = toy
    r = torch.tensor(list(itertools.permutations([0.1, 0.5, 0.9]))).double()  # all ranks
    r = r[None, None, :, None].expand(1, X, -1, N, -1).reshape(1, X * 6, N, N)
    counts, got = mdm.measure_counts(model, x0[None].repeat_interleave(6, 1), POS, r)
    assert counts.tolist() == [1, 2, 3]
    torch.testing.assert_close(got[0, ::6, 2], H[:, 7, 0])
    t = float64([0.05, 0.3, 0.5, 0.9, 0.999])
    wanted = torch.stack([second_moment(H, s) for s in t.tolist()])
    torch.testing.assert_close(mdm.second_moment(counts, got, t, N, eps=0.0)[0], wanted)


def test_long_responses_are_interpolated_per_token():
    """n = 64, 16 counts: if every hidden token costs c, E[l^2|t] = c^2 (1 + (1-t)/(n t))."""
    n, c, t = 64, 2.0, float64([0.02, 0.3, 0.9])
    counts = torch.linspace(1, n, 16).round().long()
    got = mdm.second_moment(counts, (c * counts.double()).expand(1, 5, -1), t, n, eps=0.0)
    torch.testing.assert_close(got[0], c**2 * (1 + (1 - t) / (n * t)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_ppots_weight_is_the_density_really_sampled(dtype, tolerance):
    """E[weight] = 1 (else the estimate is biased), t is sorted by u, from 0 to 1, and inside a cell
    the slope of t(u) is the weight."""
    u, du = nodes("ppots")
    t, weight = mdm.ppots_sample(u[None].to(dtype), TABLE.to(dtype))
    assert (weight[0].double() @ du).item() == pytest.approx(1, abs=tolerance)
    assert (t[0].diff() >= 0).all()
    ends, _ = mdm.ppots_sample(torch.tensor([[1e-9, 1.0]], dtype=dtype), TABLE.to(dtype))
    assert ends[0, 0] < 1e-10 and ends[0, 1] == 1.0
    for at in (0.1, 0.5, 0.9):
        t, weight = mdm.ppots_sample(float64([[at - 1e-6, at, at + 1e-6]]), TABLE)
        assert ((t[0, 2] - t[0, 0]) / 2e-6).item() == pytest.approx(weight[0, 1].item(), rel=1e-5)


@pytest.mark.parametrize("true", [[1, -1, 0.5, 0, 1, 0.5], [-2, 2, -1, 1, 3, 0]])
def test_epr_recovers_its_own_family(true):
    t, theta = torch.arange(1, 64).double() / 64, float64([true])
    p = mdm.epr(theta, t).softmax(-1)
    fit = mdm.epr(mdm.fit_epr(t, p), t)
    assert (p * (p.log() - fit.log_softmax(-1))).sum() < 1e-5
    a, b, d, c1, c2, c3 = torch.nn.functional.softplus(theta[0]).tolist()
    v = a * 0.3 ** (1 + c1) + b * 0.7 ** (1 + c2)  # the family itself
    wanted = math.sqrt(v + math.exp(d * 0.3 ** (1 + c3)) ** 2)
    assert mdm.epr(theta, float64([0.3])).exp().item() == pytest.approx(wanted)


@pytest.mark.parametrize("fit", ["epr", "grid"])
def test_ppots_beats_uniform_rates(fit, toy):
    model, x0, *_ = toy
    K = mdm.grams(model, x0, POS)[0]
    r = torch.rand(1, X * 64, N, N, generator=torch.Generator().manual_seed(1)).double()
    table = mdm.ppots_table(*mdm.measure_counts(model, x0[None].repeat(1, 64, 1), POS, r), N, fit)
    total = mdm.exact_variance("ppots", *K, N, table)["total"]
    assert table.sum().item() == pytest.approx(1)
    assert total < 0.9 * exact("mdm", K, eps=1e-3)["total"]
    if fit == "grid":  # and it is the optimum: any other table does worse
        for seed in range(5):
            noise = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed))
            other = table * (1 + 0.3 * noise)
            assert total < mdm.exact_variance("ppots", *K, N, other / other.sum())["total"]


def test_no_rate_is_ever_given_up_and_no_method_is_quietly_plain():
    """Even by a pilot that saw no loss at all: a probability 0 would be a bias."""
    for fit in ("epr", "grid"):
        table = mdm.ppots_table(torch.arange(1, N + 1), torch.zeros(1, 4, N), N, fit)
        assert torch.isfinite(table).all() and (table > 0).all()
    for method in ("ppots", "pposts_mirror", "ppots_exactk", "arm"):
        with pytest.raises(ValueError, match="table" if method == "ppots" else "no method"):
            mdm.draw_masks(method, torch.rand(1, 2), torch.rand(1, 1, 2, N))


# ---- MIRROR and the rest


def test_arm_has_only_data_noise(toy):
    arm = GPT(GPTConfig(3, T, 1, 2, 8, True), [torch.Generator().manual_seed(0)]).double()
    got = exact("arm", mdm.grams(arm, toy[1], POS)[0])
    nll = mdm.token_nll(arm, toy[1][None], POS)[0].mean(-1)
    assert got["A"] == got["B"] == 0 and got["C"] == pytest.approx(nll.var(unbiased=False).item())


# ---- the variance by sampling (data/variance.py)


@pytest.mark.parametrize("method", ["mdm", "ppots_mirror"])
def test_sampled_variance_is_the_exact_one(method):
    """At eps = 1e-3: over 120 repeats the mean of each part is right to 3 standard errors, and 90 %
    of the repeats are right to 3 of their own."""
    draw = torch.Generator().manual_seed(0)
    model, pos = GPT(GPTConfig(10, 8, 1, 2, 4), [draw]), torch.arange(4, 8)
    data = torch.randint(10, (32, 8), generator=draw)
    table = TABLE.flip(1) if "ppots" in method else None
    exact = [mdm.exact_variance(method, *K, 4, table) for K in mdm.grams(model, data, pos)]
    found = []
    for _ in range(120):
        x0 = data[torch.randint(32, (5,), generator=draw)]
        float32 = None if table is None else table.float()
        found.append(variance.sampled_variance(model, x0, pos, method, draw, float32))
    for i, wanted in enumerate(exact):
        for part in variance.PARTS:
            value = float64([row[i][part] for row in found])
            error = float64([row[i][f"{part}_error"] for row in found])
            assert abs(value.mean() - wanted[part]) < 3 * value.std() / 120**0.5, (i, part)
            if part in ("A", "total"):
                assert ((value - wanted[part]).abs() < 3 * error).double().mean() > 0.9, (i, part)


def test_sampled_variance_of_an_untrained_model_has_a_closed_form():
    """On text: every token costs ln V, so Var(l) = ln(V)^2 / n (ln(1/eps) - 1) for small eps."""
    V, n = 65, 16
    model = GPT(GPTConfig(V, n + 1, 1, 1, 2), [torch.Generator()])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x0, draw = torch.zeros(700, n + 1, dtype=torch.long), torch.Generator().manual_seed(0)
    loss, _ = variance.sampled_variance(model, x0, torch.arange(1, n + 1), "mdm", draw)
    assert loss["total"] == pytest.approx(math.log(V) ** 2 / n * (math.log(1000) - 1), rel=0.03)


@pytest.mark.parametrize("method", ["isad", "clipped"])
def test_biased_methods_are_biased_and_their_variance_is_sampled_too(method, toy):
    """For weights that differ by token too: mean and A from brute force."""
    model, x0, nlls, H, _ = toy
    rare, A, mean = torch.tensor([True, False, False]), 0.0, 0.0
    for du, chance, mask, weight in outcomes(method, rare):
        loss = mdm.mdm_loss(nlls[:, index(mask)], mask, weight).mean(1)  # (X, cases)
        A = A + du * (loss.square() @ chance - (loss @ chance).square()).mean()
        mean = mean + du * (loss @ chance)
    unbiased = H[..., 0] @ objective(0.0 if method == "clipped" else EPS)
    assert ((mean - unbiased).abs() > 1e-4 * unbiased).all()  # brute force is exact to 1e-9
    args = POS, method, torch.Generator().manual_seed(0), None, EPS, rare.expand(600, N)
    got, _ = variance.sampled_variance(model, x0.repeat(150, 1), *args)
    assert abs(got["A"] - A) < 3 * got["A_error"] < 0.2 * A


def test_the_readmes_fine_tuning_runs_as_it_stands(toy):
    """Its loss has the mean L, to 4 standard errors of 20,000 draws, its table is the exact one."""
    model, x0, _, H, _ = toy
    readme = (Path(mdm.__file__).parent / "README.md").read_text("utf-8")
    (code,) = [c for c in re.findall("```python\n(.*?)```", readme, re.S) if "def " in c]
    names = {"pilot": x0.repeat(100, 1), "x0": x0.repeat(5000, 1), "n": N, "B": 20_000}
    names |= {"mask_id": 3, "model": lambda xt: model(xt[None], torch.arange(T))[0]}
    exec(code, names)
    losses = mdm.mdm_loss(names["nll"].detach(), names["mask"], names["weight"]).mean(0)
    wanted = (H[..., 0] @ objective(1e-3)).mean()
    assert names["loss"].item() == pytest.approx(losses.mean().item())
    assert abs(losses.mean() - wanted) < 4 * losses.std() / 20_000**0.5 < 0.05 * wanted
    count = MASKS.sum(-1)
    moments = [H[:, count == k, 0].square().mean().sqrt() for k in (1, 2, 3)]
    table = mdm.ppots_table(torch.arange(1, N + 1), torch.stack(moments)[None, None], N)
    torch.testing.assert_close(names["table"].double(), table, rtol=0.1, atol=0)
