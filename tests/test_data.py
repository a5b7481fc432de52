"""The arithmetic is right, the split is clean, and any text becomes what it should."""
import io
import urllib.request

import pytest
import tiktoken
import torch

from data import arith, text


@pytest.mark.parametrize("name", arith.DATASETS)
def test_data_set(name):
    data = arith.make(name, n_test=10**6)
    train, test = ({data.decode(row) for row in part} for part in (data.train, data.test))
    assert len(data.test) >= 1000 and not train & test and len(data.train) >= 9000
    assert name == "mix3" or len(train) == len(data.train)
    for problem in list(test)[:500] + list(train)[:500]:
        prompt, response = problem[: data.prompt_len], problem[data.prompt_len :]
        assert prompt[-1] == "=" and "=" not in prompt[:-1]
        if name[:3] in ("add", "mix"):
            assert sum(map(int, prompt[:-1].split("+"))) == int(response)
        elif name[:3] == "mul":
            a, b = map(int, prompt[:-1].split("*"))
            parts, total = response.split("=")
            assert a * b == int(total) == sum(map(int, parts.split("+")))
            assert int(parts[:3]) == a * (b % 10)
        else:
            sums = [sum(map(int, prompt[: i + 1])) % 10 for i in range(int(name[3:]))]
            assert [int(c) for c in response] == sums
    assert all(data.encode(data.decode(row)) == row.tolist() for row in data.test[:20])
    assert data.structural == [i for i, char in enumerate(prompt) if char in "+*="]
    assert data.decode(data.rare) == ("+=" if name == "mul2" else "")
    few = arith.make(name, 100)
    assert (few.train == data.train[:100]).all() and (few.test == data.test[:512]).all()


def test_mix3_keeps_clear_of_add3s_test_problems():
    mix, add3 = arith.make("mix3"), arith.make("add3")
    assert mix.vocabulary == add3.vocabulary
    texts = {mix.decode(x) for x in mix.train}
    assert not texts & {add3.decode(x) for x in add3.test}


LINES = "".join(f"line {i}: Gr\u00fc\u00dfe, \u6587\u5b57 {i * i % 97}\n" for i in range(400))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_characters(tmp_path):
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16)
    split, rest = int(0.9 * len(LINES)), LINES[int(0.9 * len(LINES)) :]
    assert data.vocabulary.items == sorted(set(LINES)) and data.stream.dtype == torch.uint8
    assert data.decode(data.stream) == LINES[:split]
    assert data.encode(LINES[:50]) == data.stream[:50].tolist()
    blocks = data.train_blocks("cpu")
    assert blocks.shape == (split - 16, 17) and data.decode(blocks[7]) == LINES[7 : 7 + 17]
    assert blocks.untyped_storage().nbytes() == split  # a view
    wanted = [rest[i : i + 17] for i in range(0, len(rest) - 16, 16)]
    assert [data.decode(x) for x in data.test] == wanted
    assert data.counts.tolist() == [LINES[:split].count(c) for c in data.vocabulary.items]
    assert data.decode([0, len(data.vocabulary)], mask="?")[1] == "?"
    assert 0 < sum(data.counts[data.rare]) <= 0.05 * split
    windows = b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()
    assert text.make(write(tmp_path / "b.txt", windows), 16).fingerprint == data.fingerprint
    assert len(text.make(write(tmp_path / "c.txt", "ab" * 90), block_size=16).test) == 1


def test_bpe(tmp_path, monkeypatch):
    """A real encoding of 256 bytes and a few merges, registered as `tiny`; no network."""
    merges = [b"li", b"ne", b"line", b" \xe6", b"\xc3\xbc", b": ", b"Gr"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+"
    tiny = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "tiny", tiny)
    data = text.make(write(tmp_path / "a.txt", LINES), block_size=16, tokenizer="tiny")
    ids = tiny.encode_ordinary(LINES)
    assert data.vocabulary.items == sorted(set(ids)) and len(data.vocabulary) < 60
    assert [data.vocabulary.items[i] for i in data.stream] == ids[: int(0.9 * len(ids))]
    assert data.decode(data.stream) == tiny.decode(ids[: int(0.9 * len(ids))])
    wanted = [data.vocabulary.items.index(i) for i in tiny.encode_ordinary("line 12: ")]
    assert data.encode("line 12: ") == wanted
    with pytest.raises(ValueError, match="'Q'"):
        data.encode("Q")


HOPELESS = {"0 tokens": "", "168 tokens": "ab" * 84, "UTF-8": b"\xff", "1 different": "a" * 999}


def test_hopeless_files(tmp_path):
    for message, content in HOPELESS.items():
        with pytest.raises(ValueError, match=message):
            text.make(write(tmp_path / "a.txt", content), block_size=16)


def test_fetching_shakespeare(tmp_path, monkeypatch):
    """What arrives whole is kept, what does not is not; without network an alternative is named."""
    play = b"To be, or not to be\n" * 50
    monkeypatch.setattr(text, "SHA256", text.hashlib.sha256(play).hexdigest())
    arrivals = [lambda: open(tmp_path / "no network"), lambda: io.BytesIO(play[:-1])]
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: arrivals.pop(0)())
    while arrivals:
        with pytest.raises(ValueError, match="a text of yours"):
            text.shakespeare(tmp_path)
        assert not list(tmp_path.iterdir())
    arrivals.append(lambda: io.BytesIO(play))
    for _ in range(2):  # once is enough
        assert open(text.shakespeare(tmp_path), "rb").read() == play
    write(tmp_path / "input.txt", play[:-1])
    with pytest.raises(ValueError, match="damaged"):
        text.shakespeare(tmp_path)
