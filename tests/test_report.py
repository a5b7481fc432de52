"""Statistics against known answers; tables and figures from made-up results."""
import json
import math
import os

import numpy as np
import pytest

from data import figures, report


def test_spread_and_interval():
    """Of 0 and 1, n = 20, the bootstrap mean is binomial, and its quantiles are known."""
    x, few = np.repeat([0.0, 1.0], 10), np.arange(4.0)  # of few seeds: Student's t
    assert report.interval(report.mean, x) == pytest.approx((0.3, 0.7), abs=0.051)
    assert report.sd(x) == pytest.approx(np.std(x, ddof=1)) and math.isnan(report.sd(x[:1]))
    assert report.sd(np.array([1.0, np.inf])) == np.inf
    assert report.t_interval(few) == pytest.approx((1.5, -0.554, 3.554), abs=0.01)
    assert report.interval(report.difference, few, x[:4])[1] == pytest.approx(3.554, abs=0.01)


def test_the_spread_between_pretrainings_and_within():
    """Of 300 experiments whose SDs are known: the mean estimates, and how often intervals hold."""
    rng, kept, squares = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    for _ in range(300):
        x = 2 * rng.normal(size=(6, 1)) + rng.normal(size=(6, 8))
        for i, ((sd, low, high), truth) in enumerate(zip(report.between_and_within(x), (2, 1))):
            kept[i] += low <= truth <= high
            squares[i] += sd**2 / 300
    assert squares == pytest.approx([4, 1], rel=0.12) and (abs(kept / 300 - 0.95) < 0.04).all()


def line(method="mdm", seed=1, accuracy=0.5, nll=1.0, **changes):
    scores = {"accuracy": accuracy, "nll": nll}
    curve = [{"step": 10, "accuracy": accuracy / 2, "nll": 2.0}, {"step": 20, **scores}]
    run = {"method": method, "seed": seed, "dataset": "add3", "steps": 20, "batch_size": 8, "lr": 1}
    outcome = {"nll_se": 0.1, "passes": 1, "seconds": 1.0, "clipped_steps": 0.25, "curve": curve}
    return run | scores | outcome | changes


def test_groups_hold_what_can_be_compared():
    lines = [line("mdm"), line("mdm_batch2", batch_size=16), line("mdm_steps2", steps=40)]
    lines += [line("arm", lr=2.0)]
    lines += [line("ppots", ppots_fit="epr"), line("ppots", ppots_fit="grid")]
    first, second = report.groups(lines)
    assert list(first) == ["mdm", "mdm_batch2", "mdm_steps2", "ppots", "ppots grid"]
    assert list(second) == ["arm"] and "dataset add3" in report.heading(first)
    tuned = [line(m, s, s / 9, init_from=a, init=[a, m + a], data="1")
             for a in "ab" for s in (1, 2) for m in ("arm", "mdm")]  # fmt: skip
    (both,) = report.groups(tuned)  # seeds of two pretrainings are one sample
    assert len(both["mdm"]) == 4 and "init_from a (mdma) b (mdmb)" in report.heading(both)
    assert "0.167 0.167" in report.nested(both) and report.nested(first) == ""
    assert len(report.same_seeds(both, "arm", "mdm")[0]) == 4


def test_a_lost_seed_counts_as_the_worst():
    rows = [line(accuracy=0.9), line(seed=2, accuracy=0.9, diverged=7), line(seed=3, nll=None)]
    assert report.column(rows, "accuracy").tolist() == [0.9, 0.0, 0.5]
    assert report.column(rows, "nll").tolist() == [1.0, math.inf, math.inf]
    assert "seed 2: not finite at step 7" in report.table({"mdm": rows})


def test_all_shares_are_read_and_the_newest_run_counts(tmp_path):
    old, new, other = line(nll=1.0), line(nll=2.0), line(seed=2)
    damaged = '\n{"method": "md\n[1]\n{"seed": 3}\n'
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + damaged)
    (tmp_path / "results.1of2.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(new).encode() + b"\n")
    (tmp_path / "results.2of2.jsonl").write_text(json.dumps(other) + "\n")
    os.utime(tmp_path / "results.jsonl", (1, 1))
    assert {(x["seed"], x["nll"]) for x in report.read_results(tmp_path)} == {(1, 2.0), (2, 1.0)}


@pytest.fixture
def results():
    rng = np.random.default_rng(0)
    found = {}
    for method, passes, level in [("arm", 1, 0.9), ("mdm", 1, 0.4), ("ppots_mirror", 2, 0.7),
                                  ("mdm_batch2", 2, 0.6)]:  # fmt: skip
        accuracies = level + 0.1 * rng.random(5)
        found[method] = [line(method, s, a, 2 - a, passes=passes) for s, a in enumerate(accuracies)]
    return found


def test_tables_and_the_verdict(results):
    text = report.table({name: rows[:3] for name, rows in results.items()}, [0, 1, 2])
    assert "25%" in text and "seed 2" in text and max(map(len, text.splitlines())) <= 130
    assert "5/5" not in report.table({"mdm": results["mdm"]})
    for key in ("accuracy", "nll"):
        assert "minus mdm" in report.statistics(results, key)
    said = report.verdict(results)
    a, b = (report.column(results[name], "accuracy").mean() for name in ("ppots_mirror", "mdm"))
    assert f"{100 * (a - b):+.1f} points" in said and "its worst seed beats" in said
    assert "mdm_batch2 +" in said
    alone = report.verdict({name: rows[:1] for name, rows in results.items() if "2" not in name})
    assert "nan" not in alone and "worst seed" not in alone and "add mdm_batch2" in alone
    assert "run --method" in report.verdict({"arm": results["arm"]})
    for name in results:  # text has no accuracy: less is better
        for row in results[name]:
            del row["accuracy"]
    assert "does not beat" not in report.verdict(results) and " nats" in report.verdict(results)


def test_figures(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    larger = [row | {"batch_size": 16} for rows in results.values() for row in rows]
    said = figures.write(str(tmp_path), [results, *report.groups(larger)])
    for name in ("seeds.png", "seeds2.png", "batches.png"):
        assert name in said and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert len(figures.method().axes) == 2
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in figures.write(str(tmp_path), [results])
