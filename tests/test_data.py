"""The arithmetic is right, the split is clean, and a text is cut into the right blocks."""
import hashlib
import json
import re
import runpy
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from data import arith, text

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = "add2 add3 add4 add5 mul2 sum4 sum5 sum6 sum7 sum8 mix3".split()
LINES = "".join(f"line {i}: Gr\u00fc\u00dfe, \u6587\u5b57 {i * i % 97}\n" for i in range(400))
SPLIT = int(0.9 * len(LINES))

# --------------------------------------------------------------------------------------------------
# Arithmetic.


def response(prompt):
    """The right response to a prompt such as 12+34, computed from the digits in sight."""
    if "+" in prompt:
        a, b = prompt.split("+")
        return str(int(a) + int(b)).zfill(len(a) + 1)
    if "*" in prompt:
        a, b = prompt.split("*")
        return f"{int(a) * int(b[1]):03}+{int(a) * int(b[0]) * 10:04}={int(a) * int(b):04}"
    return "".join(str(sum(map(int, prompt[: i + 1])) % 10) for i in range(len(prompt)))


@pytest.mark.parametrize("name", arith.DATASETS)
def test_problems_are_right_and_no_test_is_trained_on(name):
    data = arith.make(name, n_test=10**6)
    train = [data.decode(row) for row in data.train.tolist()]
    test = [data.decode(row) for row in data.test.tolist()]
    assert (train, test) == arith.draw(name)
    assert test
    assert not set(train) & set(test)
    for problem in train + test:
        prompt, answer = problem.split("=", 1)
        assert len(prompt) + 1 == data.prompt_len
        if name in COMMITTED:
            assert answer == response(prompt)


@pytest.mark.parametrize("name", arith.DATASETS)
def test_arithmetic_is_described_rightly(name):
    data = arith.make(name)
    assert data.name == name
    assert not data.is_text
    example = data.decode(data.test[0])
    prompt = example[: data.prompt_len]
    answer = example[data.prompt_len :]
    assert data.encode(example) == data.test[0].tolist()
    assert data.structural == [match.start() for match in re.finditer(r"\W", prompt)]
    assert data.decode(data.rare) == "".join(sorted(set(re.findall(r"\W", answer))))
    assert torch.equal(data.train_blocks("cpu"), data.train)


def test_fewer_problems_are_the_first_ones():
    data = arith.make("add3", n_test=10**6)
    few = arith.make("add3", n_train=100, n_test=77)
    assert torch.equal(few.train, data.train[:100])
    assert torch.equal(few.test, data.test[:77])
    assert few.fingerprint != data.fingerprint
    assert arith.make("add3", n_train=1).vocabulary == data.vocabulary
    with pytest.raises(ValueError, match="^add3 has 20000 training problems, not 20001$"):
        arith.make("add3", n_train=20_001)


def test_problems_are_those_of_the_committed_results():
    problems = [arith.draw(name) for name in COMMITTED]
    assert hashlib.sha256(repr(problems).encode()).hexdigest()[:8] == "76a69227"


@pytest.mark.parametrize("folder", ["quickstart", "finetune"])
def test_fingerprints_are_those_of_the_committed_results(folder):
    settings = json.loads((ROOT / "data/results" / folder / "settings.json").read_text())
    data = arith.make(settings["dataset"], settings["n_train"])
    assert data.fingerprint == settings["data"]


def test_mix3_has_short_numbers_and_no_test_problem_of_add3():
    train, _ = arith.draw("mix3")
    _, test_of_add3 = arith.draw("add3")
    assert not set(train) & set(test_of_add3)
    n_digits = [len(str(max(int(problem[:3]), int(problem[4:7])))) for problem in train]
    shares = np.bincount(n_digits)[1:] / len(train)
    assert abs(shares - 1 / 3).max() < 0.02
    assert arith.make("mix3").vocabulary == arith.make("add3").vocabulary


def test_the_docstrings_example_is_all_that_a_new_task_needs(tmp_path):
    example = re.search(r"above DATASETS:\n\n(.*?)\n\n`", arith.__doc__, re.DOTALL).group(1)
    before, after = Path(arith.__file__).read_text(encoding="utf-8").split("\nDATASETS = ")
    (tmp_path / "mine.py").write_text(f"{before}\n{textwrap.dedent(example)}\nDATASETS = {after}")
    data = runpy.run_path(tmp_path / "mine.py")["make"]("reverse")
    assert data.train.shape == (20_000, 11)
    assert data.prompt_len == 6
    assert data.structural == [5]
    assert torch.equal(data.train[:, :5], data.train[:, 6:].flip(1))


def test_a_task_with_its_first_equals_sign_in_two_places_is_refused(monkeypatch):
    monkeypatch.setitem(arith.TASKS, "mine", (100, lambda i: f"{i}={i}".ljust(5)))
    with pytest.raises(ValueError, match="mine: .* in one place"):
        arith.make("mine")


# --------------------------------------------------------------------------------------------------
# Text.


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_characters(tmp_path):
    path = write(tmp_path / "a.txt", LINES)
    data = text.make(path, block_size=16)
    assert data.name == path
    assert data.is_text
    assert data.prompt_len == 1
    assert not data.structural
    assert data.vocabulary.items == sorted(set(LINES))
    assert data.decode(data.train) == LINES[:SPLIT]
    assert data.encode("line") == [data.vocabulary.items.index(char) for char in "line"]
    assert data.vocabulary.decode([0, len(data.vocabulary)], mask="?") == "\n?"
    with pytest.raises(ValueError, match="'x' does not occur"):
        data.encode("linex")


def test_training_blocks_are_all_windows_of_a_text(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    blocks = data.train_blocks("cpu")
    assert len(blocks) == SPLIT - 16
    for i in (0, 7, SPLIT - 17):
        assert data.decode(blocks[i]) == LINES[i : i + 17]
    assert blocks.untyped_storage().nbytes() == len(LINES)  # a view of one byte for each


def test_each_token_for_validation_is_in_one_response(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    starts = range(SPLIT, len(LINES) - 16, 16)
    assert [data.decode(block) for block in data.test] == [LINES[i : i + 17] for i in starts]


def test_many_validation_blocks_are_thinned_out_evenly(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=1)
    starts = np.linspace(SPLIT, len(LINES) - 2, 512).round().astype(int)
    assert [data.decode(block) for block in data.test] == [LINES[i : i + 2] for i in starts]


def test_rare_tokens_make_up_five_percent(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    counts = np.array([LINES[:SPLIT].count(char) for char in data.vocabulary.items])
    n_rare = len(data.rare)
    rarest = np.sort(counts)
    assert 0 < n_rare < len(counts)
    assert sum(counts[data.rare]) == sum(rarest[:n_rare])
    assert sum(rarest[:n_rare]) <= 0.05 * SPLIT < sum(rarest[: n_rare + 1])


def test_fingerprint_of_a_text(tmp_path, monkeypatch):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    write(tmp_path / "b.txt", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())  # Windows
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text.make("~/b.txt", block_size=16).fingerprint == data.fingerprint
    changed = write(tmp_path / "c.txt", LINES[:-2] + "\n" + LINES[-2])  # in the validation text
    assert text.make(changed, block_size=16).fingerprint != data.fingerprint


@pytest.fixture
def tiny(monkeypatch):
    """A real encoding of 256 bytes and a few merges, registered as `tiny`. It needs no network."""
    merges = [b"li", b"ne", b"line", b" \xe6", b"\xc3\xbc", b": ", b"Gr"]
    ranks = {bytes([i]): i for i in range(256)}
    for i, merge in enumerate(merges):
        ranks[merge] = 256 + i
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "tiny", encoding)
    return encoding


def test_bpe(tmp_path, tiny):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16, tokenizer="tiny")
    numbers = tiny.encode_ordinary(LINES)
    split = int(0.9 * len(numbers))
    assert data.vocabulary.items == sorted(set(numbers))
    assert [data.vocabulary.items[i] for i in data.train] == numbers[:split]
    assert data.decode(data.train) == tiny.decode(numbers[:split])
    assert data.encode(LINES)[:split] == data.train.tolist()
    with_mask = [*data.encode("12"), len(data.vocabulary)]
    assert data.vocabulary.decode(with_mask, mask="\u2588") == "12\u2588"
    with pytest.raises(ValueError, match=f"token {ord('Q')} does not occur"):
        data.encode("Q")


def test_half_a_character_can_be_shown(tmp_path, tiny):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16, tokenizer="tiny")
    halves = data.encode("\u00df")
    assert len(halves) == 2
    assert data.decode(halves) == "\u00df"
    assert data.decode(halves[:1]) == "\ufffd"


def test_many_kinds_of_tokens_have_ids_of_their_own(tmp_path):
    for n_kinds in (256, 257, 300):
        content = "".join(chr(0x4E00 + i) for i in range(n_kinds)) * 3
        data = text.make(write(tmp_path / "a.txt", content), block_size=16)
        assert len(data.vocabulary) == n_kinds
        assert data.decode(data.train) == content[: int(0.9 * len(content))]


def test_a_tokenizer_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, tiny, monkeypatch):
    def refusal(name):
        with pytest.raises(ValueError) as caught:
            text.make(str(tmp_path / "a.txt"), block_size=16, tokenizer=name)
        return re.fullmatch(f"--tokenizer={name} cannot be loaded: (.*)", str(caught.value))[1]

    def without_network(name):
        raise OSError("the host does not answer\ntry again")

    write(tmp_path / "a.txt", LINES)
    assert "Unknown encoding tinny" in refusal("tinny")
    monkeypatch.setattr(tiktoken, "get_encoding", without_network)
    assert refusal("tiny") == "the host does not answer"
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if it were not installed
    assert "tiktoken" in refusal("tiny")


def test_a_hopeless_file_is_refused_with_the_reason(tmp_path):
    def refusal(path):
        with pytest.raises(ValueError) as caught:
            text.make(str(path), block_size=16)
        return re.fullmatch(f"{re.escape(str(path))} .*", str(caught.value)).group()

    assert "too short" in refusal(write(tmp_path / "a.txt", "ab" * 80))
    assert "too short" in refusal(write(tmp_path / "a.txt", ""))
    assert "utf-8" in refusal(write(tmp_path / "a.txt", LINES.encode("utf-16")))
    assert "directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "b.txt")


def test_the_shortest_text_has_one_block_for_validation(tmp_path):
    data = text.make(write(tmp_path / "a.txt", "ab" * 80 + "a"), block_size=16)
    assert data.test.shape == (1, 17)
    assert data.train_blocks("cpu").shape == (144 - 16, 17)


def test_shakespeare_is_whole():
    content = text.read("shakespeare_char")
    assert hashlib.sha256(content.encode()).hexdigest().startswith("86c4e6aa9db7c042")
    data = text.make("shakespeare_char", block_size=64)
    assert len(data.vocabulary) == 65
    assert len(data.train) == 1_003_854  # nanoGPT's training text
    assert data.fingerprint == "07de41d5"
    assert data.decode(data.rare) == "$&3XZQJzxqjVPKY-F!D?GBMHUW;CLS"


# --------------------------------------------------------------------------------------------------
# The files as programs.


def test_programs_run_from_any_folder(tmp_path, monkeypatch, capsys):
    def run(script, *arguments):
        for module in [name for name in sys.modules if name.split(".")[0] == "data"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != ROOT])
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "data" / script), run_name="__main__")
        return capsys.readouterr().out

    assert re.fullmatch(r"(\d{4}=\d{4}\n){5}", run("arith.py", "sum4"))
    assert re.fullmatch(r"(\d{3}\+\d{3}=\d{4}\n){5}", run("arith.py"))
    said = run("text.py", write(tmp_path / "a.txt", LINES))
    assert f"{SPLIT - 64} training sequences of {len(set(LINES))} kinds" in said
    assert f"such as {LINES[:40]!r}\n" in said
    assert "First Citizen" in run("text.py")
