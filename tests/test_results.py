"""Every cell of the pages' tables of results follows from the committed lines."""
import re
from pathlib import Path

import pytest

from data import runs
from data.results import report

ROOT = Path(__file__).resolve().parent.parent


def without_zero(text):
    """0.812 [0.706, 0.918] as the pages write it: .812 [.706, .918]."""
    return re.sub(r"\b0\.", ".", text)


def rows(page):
    """The cells of each row of a page's table whose head has the word accuracy."""
    table = page.read_text("utf-8").split("| method | passes | accuracy |")[1].split("\n\n")[0]
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


@pytest.mark.parametrize("page", ["README.md", "data/results/README.md"])
def test_tables_follow_from_the_lines(page):
    folder = ROOT / "data/results/finetune"
    settings = runs.read_settings(str(folder))
    lines = runs.read_results(str(folder))
    columns = report.wide(lines, "accuracy")[2]
    passes = {line["method"]: str(line["passes"]) for line in lines}
    found = rows(ROOT / page)
    assert len(found) >= 8
    for method, n_passes, accuracy, *differences in found:
        assert columns[method].shape == (4, 8)  # pretrainings and seeds, none left out
        assert n_passes == passes[method]
        shown = without_zero(report.show(report.interval(report.units(columns[method]))))
        assert accuracy in (shown, shown.split()[0])
        for difference, other in zip(differences, ["mdm", "mdm_batch2"]):
            values = report.compare(settings, lines, method, other)[0]
            assert difference == ("" if method == other else report.show(values, 1, "+"))
