"""Every cell of the pages' tables of results follows from the committed lines."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data import runs
from data.results import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data/results"
OTHERS = {"minus plain": "mdm", "minus plain, in points": "mdm", "minus twice the batch": "mdm_batch2"}


def without_zero(text):
    """0.812 [0.706, 0.918] as the pages write it: .812 [.706, .918]."""
    return re.sub(r"\b0\.", ".", text)


def tables(page):
    """The tables of a page, as (folder, rows). A row is a dictionary. The folder is the last one
    that a command before the table reports on, or finetune."""
    folder = "finetune"
    rows = []
    for line in [*page.read_text("utf-8").splitlines(), ""]:
        named = re.search(r"--report --out_dir=(?:data/results/)?(\S+)", line)
        if named:
            folder = named[1].replace("$R", "finetune")
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
        elif rows:
            yield folder, [dict(zip(rows[0], row)) for row in rows[2:]]
            rows = []


def check(row, settings, lines):
    key = report.score(lines)
    method = re.search("`(.*)`", row["method"])[1]
    x = report.wide(lines, key)[2][method]
    assert not np.isnan(x).any()  # no run is left out
    assert row["passes"] == str({line["method"]: line["passes"] for line in lines}[method])
    mean = without_zero(report.show(report.t_test(report.sample_of(x))[0]))
    for head, cell in row.items():
        if head in ("accuracy", "mean accuracy", "nll"):
            assert cell in (mean, mean.split()[0])
        elif head.startswith("solved"):
            assert cell == report.solved(x.ravel()).split(" of")[0]
        elif head in OTHERS:
            difference = report.compare(settings, lines, method, OTHERS[head])[0]
            shown = report.show(difference, report.UNITS[key][1], "+")
            shown = "" if method == OTHERS[head] else without_zero(shown)
            assert without_zero(cell) in (shown, shown.partition(" ")[0])
        else:
            assert head in ("method", "passes")


@pytest.mark.parametrize("page, n_tables", [("README.md", 1), ("data/results/README.md", 4)])
def test_tables_follow_from_the_lines(page, n_tables):
    n_checked = 0
    for folder, rows in tables(ROOT / page):
        if "passes" in rows[0]:
            settings = runs.read_settings(str(RESULTS / folder))
            lines = runs.read_results(str(RESULTS / folder))
            for row in rows:
                check(row, settings, lines)
            n_checked += 1
    assert n_checked >= n_tables


def test_the_planned_comparisons_follow_from_the_lines():
    settings = runs.read_settings(str(RESULTS / "finetune"))
    lines = runs.read_results(str(RESULTS / "finetune"))
    found = {pair: report.compare(settings, lines, *pair) for pair in report.COMPARISONS}
    family = [pair for pair in found if report.COMPARISONS[pair] == "family"]
    adjusted = report.holm({pair: found[pair][3] for pair in family})
    (rows,) = [rows for _, rows in tables(RESULTS / "README.md") if "comparison" in rows[0]]
    for row in rows:
        pair = tuple(re.findall("`(.*?)`", row["comparison"]))
        difference, _, _, p = found.pop(pair)
        assert row["role"] == report.COMPARISONS[pair]
        assert row["difference"] == report.show(difference, 1, "+")
        assert row["p"] == without_zero(f"{p:.2g}")
        assert row["p, Holm"] == (without_zero(f"{adjusted[pair]:.2g}") if pair in adjusted else "")
    assert not found


def test_the_law_tables_follow_from_the_lines():
    """Measured noise over predicted noise: before training, and after it."""
    found = {}  # by n and method
    for path in RESULTS.glob("*/variance.jsonl"):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            found[f"n = {row['n']}", row["method"]] = row
    before, after = [rows for _, rows in tables(RESULTS / "README.md") if "n = 4" in rows[0]]
    for at, rows in (("start", before), ("end", after)):
        for row in rows:
            method = row.pop("method").strip("`")
            for n, cell in row.items():
                mine = found[n, method]
                plain = found[n, "mdm"]
                measured = mine[at] / plain[at]
                predicted = mine[f"{at}_law"] / plain[f"{at}_law"]
                assert cell == without_zero(f"{measured / predicted:.2f}")


def test_the_gpu_tables_follow_from_the_lines():
    lines = [json.loads(line) for line in (RESULTS / "gpu.jsonl").read_text("utf-8").splitlines()]
    by_seeds, by_mode, text = [rows for _, rows in tables(RESULTS / "README.md")
                               if {"1 seed", "nanoGPT", "precision"} & set(rows[0])]  # fmt: skip
    ms = {(x["part"], x["method"], x["seeds"], x["mode"]): x["ms"] for x in lines if "ms" in x}
    for row in by_seeds:
        method = row.pop("ms a step").strip("`")
        for head, cell in row.items():
            assert cell == f"{ms['steps', method, int(head.split()[0]), 'recorded']:#.3g}"
    modes = ["recorded", "compiled, recorded", "eager", "compiled", "reduce-overhead"]
    for row, mode in zip(by_mode, modes, strict=True):
        for head, method in (("`train.py`", "arm"), ("nanoGPT", "nanoGPT")):
            x = ms.get(("compiled", method, 1, mode))
            assert row[head] == (f"{x:#.3g}" if x else "")
    for row in text:
        name = {"method": row["method"].strip("`"), "precision": row["precision"]}
        mine = [x for x in lines if x.items() >= name.items()]
        (speed,) = [x["tokens_per_s"] for x in mine if "tokens_per_s" in x]
        assert row["tokens a second"] == f"{round(speed, -3):,.0f}"
        nats = {f"{x['step']} steps": f"{x['nats']:.3f}" for x in mine if x.get("step")}
        assert nats == {head: cell for head, cell in row.items() if "steps" in head and cell}
