"""The arithmetic is right, the split is clean, and a text is cut into the right blocks."""
import hashlib
import io
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
import torch

from data import arith, text

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = "add2 add3 add4 add5 mul2 sum4 sum5 sum6 sum7 sum8 mix3".split()
LINES = "".join(f"line {i}: Gr\u00fc\u00dfe, \u6587\u5b57 {i * i % 97}\n" for i in range(400))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


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
def test_arithmetic(name):
    data = arith.make(name, n_test=10**6)
    train = [data.decode(row) for row in data.train.tolist()]
    test = [data.decode(row) for row in data.test.tolist()]
    assert test and not set(train) & set(test)
    for problem in train + test:
        prompt = problem[: data.prompt_len - 1]
        assert problem == f"{prompt}={response(prompt)}" or name not in COMMITTED
    assert data.encode(test[0]) == data.test[0].tolist()
    assert torch.equal(data.train_blocks("cpu"), data.train)
    assert [prompt[i] for i in data.structural[:-1]] == re.findall(r"\W", prompt)
    symbols = re.findall(r"\W", problem[data.prompt_len :])
    assert data.decode(data.rare) == "".join(sorted(set(symbols)))
    few = arith.make(name, n_train=100)
    assert torch.equal(few.train, data.train[:100]) and torch.equal(few.test, data.test[:512])
    assert few.vocabulary == data.vocabulary and few.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match=f"^{name} has {len(train)} training problems, not 99999$"):
        arith.make(name, n_train=99999)


def test_problems_are_those_of_the_committed_results():
    problems = [arith.draw(name) for name in COMMITTED]
    assert hashlib.sha256(repr(problems).encode()).hexdigest()[:8] == "76a69227"


def test_mix3_has_short_numbers_and_no_test_problem_of_add3():
    train = arith.draw("mix3")[0]
    assert not set(train) & set(arith.draw("add3")[1])
    n_digits = [len(str(max(int(problem[:3]), int(problem[4:7])))) for problem in train]
    assert abs(np.bincount(n_digits)[1:] / len(train) - 1 / 3).max() < 0.02
    assert arith.make("mix3").vocabulary == arith.make("add3").vocabulary


def test_the_docstrings_example_is_all_that_a_new_task_needs(tmp_path):
    example = re.search(r"above DATASETS:\n\n(.*?)\n\n`", arith.__doc__, re.DOTALL).group(1)
    before, after = Path(arith.__file__).read_text(encoding="utf-8").split("\nDATASETS = ")
    (tmp_path / "mine.py").write_text(f"{before}\n{textwrap.dedent(example)}\nDATASETS = {after}")
    data = runpy.run_path(tmp_path / "mine.py")["make"]("reverse")
    assert data.train.shape == (20_000, 11) and data.prompt_len == 6 and data.structural == [5]
    assert torch.equal(data.train[:, :5], data.train[:, 6:].flip(1))


def test_characters(tmp_path, monkeypatch):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    split = int(0.9 * len(LINES))
    assert data.vocabulary.items == sorted(set(LINES)) and data.tokens.dtype == torch.uint8
    assert data.decode(data.tokens) == LINES[:split]
    assert data.decode([0, len(data.vocabulary)], mask="?") == "\n?"
    blocks = data.train_blocks("cpu")
    assert blocks.shape == (split - 16, 17) and data.decode(blocks[7]) == LINES[7 : 7 + 17]
    assert blocks.untyped_storage().nbytes() == split  # a view
    starts = range(split, len(LINES) - 16, 16)
    assert [data.decode(block) for block in data.test] == [LINES[i : i + 17] for i in starts]
    pairs = text.make(str(tmp_path / "a.txt"), block_size=1)
    starts = np.linspace(split, len(LINES) - 2, 512).round().astype(int)
    assert [pairs.decode(pair) for pair in pairs.test] == [LINES[i : i + 2] for i in starts]
    counts = np.array([LINES[:split].count(char) for char in data.vocabulary.items])
    rarest = np.sort(counts)[: len(data.rare) + 1]
    assert sum(counts[data.rare]) == sum(rarest[:-1]) <= 0.05 * split < sum(rarest)
    write(tmp_path / "b.txt", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    assert text.make("~/b.txt", 16).fingerprint == data.fingerprint
    write(tmp_path / "c.txt", LINES[:-2] + "\n" + LINES[-2])  # differs in the validation text only
    assert text.make(str(tmp_path / "c.txt"), 16).fingerprint != data.fingerprint


def test_bpe(tmp_path, monkeypatch):
    """A real encoding of 256 bytes and a few merges, registered as `tiny`; no network."""
    merges = [b"li", b"ne", b"line", b" \xe6", b"\xc3\xbc", b": ", b"Gr"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+"
    tiny = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    names = tiktoken.list_encoding_names()
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: [*names, "tiny"])
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "tiny", tiny)
    path = write(tmp_path / "a.txt", LINES)
    data = text.make(path, block_size=16, tokenizer="tiny")
    numbers = tiny.encode_ordinary(LINES)
    split = int(0.9 * len(numbers))
    assert data.vocabulary.items == sorted(set(numbers))
    assert [data.vocabulary.items[i] for i in data.tokens] == numbers[:split]
    assert data.decode(data.tokens) == tiny.decode(numbers[:split])
    assert data.encode(LINES)[:split] == data.tokens.tolist()
    assert data.decode([*data.encode("12"), len(data.vocabulary)], mask="\u2588") == "12\u2588"
    with pytest.raises(ValueError, match="'Q' does not occur"):
        data.encode("Q")
    try:  # Rust panics here in tiktoken 0.14; a later one may not
        assert len(text.make(write(tmp_path / "b.txt", " " * 10**6 + "b"), 16, "tiny").vocabulary) == 2
    except ValueError as error:
        assert re.fullmatch("--tokenizer=tiny .* --tokenizer=char", str(error))
    with pytest.raises(ValueError, match="--tokenizer=tinny is neither char nor one of .*gpt2"):
        text.make(path, 16, "tinny")
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=OSError))
    with pytest.raises(ValueError, match="OSError.*TIKTOKEN_CACHE_DIR"):
        text.make(path, 16, "tiny")


def test_a_hopeless_file_is_refused_with_the_reason(tmp_path, monkeypatch):
    def refusal(path):
        with pytest.raises(ValueError) as caught:
            text.make(str(path), block_size=16)
        return re.fullmatch(f"{re.escape(str(path))} .*", str(caught.value)).group()

    assert "179 tokens, 2 different" in refusal(write(tmp_path / "a.txt", "ab" * 89 + "a"))
    assert "1 different" in refusal(write(tmp_path / "a.txt", "a" * 999))
    assert "not UTF-8" in refusal(write(tmp_path / "a.txt", LINES.encode("utf-16")))
    assert "directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "b.txt")
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "is not allowed")))
    assert "is not allowed" in refusal(tmp_path / "a.txt")


def test_shakespeare_is_whole():
    data = text.make("shakespeare_char", block_size=64)
    content = text.read("shakespeare_char").encode()
    assert hashlib.sha256(content).hexdigest().startswith("86c4e6aa9db7c042")
    assert len(data.vocabulary) == 65
    assert len(data.tokens) == 1_003_854  # nanoGPT's training text


def test_scripts_run_from_any_folder_and_print_in_any_encoding(tmp_path, monkeypatch, capsys):
    def run(script, argument):
        for module in [name for name in sys.modules if name.split(".")[0] == "data"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != ROOT])
        monkeypatch.setattr(sys, "argv", [script, argument])
        output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
        monkeypatch.setattr(sys, "stdout", output)
        runpy.run_path(str(ROOT / "data" / script), run_name="__main__")
        return output.buffer.getvalue().decode("cp1252")

    assert re.match("20000 training problems such as (.{12})\n\\1\n", run("arith.py", "add3"))
    assert "Gr\u00fc\u00dfe, ??" in run("text.py", write(tmp_path / "a.txt", LINES))
    for script in ("arith.py", "text.py"):
        with pytest.raises(SystemExit):
            run(script, "add9")
        assert re.fullmatch("error: .*add9.*\n", capsys.readouterr().err)
