"""The arithmetic is right, the split is clean, and both are the same every time; and any text becomes what it should."""
import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from data import arith, text


@pytest.mark.parametrize("name", arith.DATASETS)
def test_data_set(name):
    data = arith.make(name)
    train, test = ({data.decode(row) for row in part} for part in (data.train, data.test))
    assert len(data.test) == 512 and not train & test and len(data.train) >= 9000
    assert name == "mix3" or len(train) == len(data.train)
    for text in list(test) + list(train)[:500]:
        prompt, response = text[: data.prompt_len], text[data.prompt_len :]
        assert prompt[-1] == "=" and "=" not in prompt[:-1]
        if name[:3] in ("add", "mix"):
            assert sum(map(int, prompt[:-1].split("+"))) == int(response)
        elif name[:3] == "mul":
            a, b = map(int, prompt[:-1].split("*"))
            parts, total = response.split("=")
            assert a * b == int(total) == sum(map(int, parts.split("+"))) and int(parts[:3]) == a * (b % 10)
        else:
            assert [int(c) for c in response] == [sum(map(int, prompt[: i + 1])) % 10 for i in range(int(name[3:]))]
    assert all(data.encode(data.decode(row)) == row.tolist() for row in data.test[:20])
    assert (arith.make(name).train == data.train).all()
    assert all(data.decode(data.train[0])[i] in "+*=" for i in data.structural)


def test_refusals():
    with pytest.raises(ValueError, match="add9"):
        arith.make("add9")
    with pytest.raises(ValueError, match="'x'"):
        arith.make("add2").encode("12x")


def test_mix3_keeps_clear_of_add3s_test_problems():
    mix, add3 = arith.make("mix3"), arith.make("add3")
    assert mix.vocabulary == add3.vocabulary and not {mix.decode(x) for x in mix.train} & {add3.decode(x) for x in add3.test}
    digits = [len(str(max(int(x[:3]), int(x[4:7])))) for x in map(mix.decode, mix.train)]
    assert all(0.25 < np.mean(np.array(digits) == d) < 0.4 for d in (1, 2, 3))


# ---- text

LINES = "".join(f"line {i}: Gr\u00fc\u00dfe, \u6587\u5b57 {i * i % 97}\n" for i in range(400))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


@pytest.fixture
def tiny_bpe():
    """A real tiktoken encoding of 256 bytes and a few merges, registered under the name `tiny`; no network."""
    merges = [b"li", b"ne", b"line", b" \xe6", b"\xc3\xbc", b": ", b"Gr", b"\n/", b";\n/"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+"  # as in o200k, tokens may run over a line's end
    tiktoken.registry.ENCODINGS["tiny"] = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    yield tiktoken.get_encoding("tiny")
    del tiktoken.registry.ENCODINGS["tiny"]


def test_characters(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    assert data.vocabulary.items == sorted(set(LINES)) and data.stream.dtype == torch.uint8
    split = int(0.9 * len(LINES))
    assert data.decode(data.stream.tolist()) == LINES[:split] and data.encode(LINES[:50]) == data.stream[:50].tolist()
    blocks = data.train_blocks("cpu")
    assert blocks.shape == (split - 16, 17) and data.decode(blocks[7].tolist()) == LINES[7 : 7 + 17]
    assert blocks.untyped_storage().nbytes() == split  # a view
    rest = LINES[split:]
    assert [data.decode(x.tolist()) for x in data.test] == [rest[i : i + 17] for i in range(0, len(rest) - 16, 16)][: len(data.test)]
    assert data.counts.tolist() == [LINES[:split].count(c) for c in data.vocabulary.items]
    assert data.decode([0, len(data.vocabulary)], mask="?")[1] == "?"
    assert sum(data.counts[data.rare]) <= 0.05 * split
    with pytest.raises(ValueError, match="'Q'"):
        data.encode("Q")


def test_bpe(tmp_path, tiny_bpe):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16, tokenizer="tiny")
    ids = tiny_bpe.encode_ordinary(LINES)
    assert data.vocabulary.items == sorted(set(ids)) and len(data.vocabulary) < 60  # only what occurs
    split = int(0.9 * len(ids))
    assert [data.vocabulary.items[i] for i in data.stream] == ids[:split]
    assert data.decode(data.stream.tolist()) == tiny_bpe.decode(ids[:split])
    assert data.encode("line 12: ") == [data.vocabulary.items.index(i) for i in tiny_bpe.encode_ordinary("line 12: ")]
    characters = len(data.decode(data.test[:, 1:].flatten().tolist()))
    assert data.chars_per_token == characters / data.test[:, 1:].numel() and 0.5 < data.chars_per_token < 1  # bytes of wide characters
    with pytest.raises(ValueError, match="does not occur"):
        data.encode("Q")


@pytest.mark.parametrize("tokenizer", ["char", "tiny"])
@pytest.mark.parametrize("content", [LINES, LINES.replace("\n", "  \n\n "), LINES.replace("\n", ""),
                                     LINES.replace("\n", ";\n// ")])  # fmt: skip
def test_pieces_change_nothing(tokenizer, content, tmp_path, tiny_bpe, monkeypatch):
    """Read in pieces of a few characters, a text gives the tokens it gives as a whole."""
    path = write(tmp_path / "a.txt", content)
    whole = text.tokenize(path, tokenizer)
    monkeypatch.setattr(text, "pieces", functools.partial(text.pieces, size=100))
    pieces = text.tokenize(path, tokenizer)
    assert whole[0] == pieces[0] and (whole[1] == pieces[1]).all() and (len(list(text.pieces(path, True))) > 10) == (content == LINES)  # split only at safe places


def test_windows_files(tmp_path):
    """A byte order mark and CRLF change nothing."""
    a, b = (text.tokenize(write(tmp_path / "a.txt", c), "char") for c in (LINES, b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()))
    assert a[0] == b[0] and (a[1] == b[1]).all()


def test_ids_are_small(tmp_path):
    for n, dtype in ((256, np.uint8), (300, np.int16), (40_000, np.int32)):
        vocabulary, ids = text.tokenize(write(tmp_path / "a.txt", "".join(map(chr, range(200, 200 + n)))), "char")
        assert len(vocabulary) == n and ids.dtype == dtype and (np.sort(ids) == np.arange(n)).all()


@pytest.mark.parametrize("content, message", [("", "0 tokens"), ("x", "1 tokens"), ("short", "5 tokens"), (b"\xff\xfe" * 500, "UTF-8"),
                                              ("aaaa" * 500, "one character"), ("ab" * 84, "168 tokens")])  # fmt: skip
def test_hopeless_files(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        text.make(write(tmp_path / "a.txt", content), block_size=16)
    assert "\n" not in str(e.value)


def test_the_shortest_text(tmp_path):
    data = text.make(write(tmp_path / "a.txt", "ab" * 90), block_size=16)
    assert len(data.test) == 1 and len(data.train_blocks("cpu")) > 100


@pytest.mark.skipif(os.name == "nt", reason="needs the module resource")
def test_a_large_file_needs_little_memory(tmp_path):
    """20 MB: the process grows by less than three times that (mostly by the token ids, a byte each)."""
    path = tmp_path / "big.txt"
    path.write_bytes(LINES.encode()[:10_000] * 2000)
    program = f"""if True:
        import resource, sys, torch
        from data import text
        text.make({str(tmp_path / 'small.txt')!r}, 64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data = text.make({str(path)!r}, 64)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    write(tmp_path / "small.txt", LINES)
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"  # else the peak is pytest's own
    grown = subprocess.run([sys.executable, "-c", start, program], cwd=Path(text.__file__).parent.parent, capture_output=True, text=True, check=True)
    assert int(grown.stdout) * (1 if sys.platform == "darwin" else 1024) < 3 * path.stat().st_size


def test_unknown_tokenizers(monkeypatch):
    with pytest.raises(ValueError, match="gpt2"):
        text.bpe("nonsense")

    def offline(name):
        error = OSError("no network")
        error.request = type("Request", (), {"url": "https://example.org/vocab.bpe"})
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as e:
        text.bpe("gpt2")
    assert hashlib.sha1(b"https://example.org/vocab.bpe").hexdigest() in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="pip install tiktoken"):
        text.bpe("gpt2")


def test_fetching_shakespeare(tmp_path, monkeypatch):
    """From a server of our own: what arrives whole is kept, what does not is not; no network gives the alternative."""
    (tmp_path / "www").mkdir()
    (tmp_path / "data").mkdir()
    play = b"To be, or not to be\n" * 50
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    handler.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(text, "SHAKESPEARE", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(text, "SHAKESPEARE_SIZE", len(play))
        monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(play).hexdigest())
        for content in (None, play[:-1], play + b"!", play.replace(b"be", b"me")):
            if content is not None:
                write(tmp_path / "www" / "input.txt", content)
            with pytest.raises(ValueError, match="--dataset=PATH"):
                text.shakespeare(tmp_path / "data")
            assert not list((tmp_path / "data").iterdir())
        write(tmp_path / "www" / "input.txt", play)
        path = text.shakespeare(tmp_path / "data")
        assert Path(path).read_bytes() == play
        server.shutdown()
    assert text.shakespeare(tmp_path / "data") == path  # once is enough
    write(Path(path), play[:-1])
    with pytest.raises(ValueError, match="damaged"):
        text.shakespeare(tmp_path / "data")
    Path(path).unlink()
    with pytest.raises(ValueError, match="--dataset=PATH"):
        text.shakespeare(tmp_path / "data")
