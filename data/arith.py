"""Arithmetic as character-level, fixed-width text, made on the spot in well under a second.

    add2 ... add5   123+456=0579             zero-padded sum, most significant digit first
    mul2            47*86=282+3760=4042      product by way of its two partial products
    sum4 ... sum8   3941=3267                running sums of the digits, mod 10
    mix3            007+042=0049             like add3, with 1, 2 or 3 digits: to pretrain on

Up to the first `=` it is the prompt; the rest is the response, which alone is masked, generated and
scored. Training and test problems are disjoint, and the same in every run (but of 47*86 and 86*47
each may have one: usual in mul2, rare in add3). `python -m data.arith add3` prints a few.
"""
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from data import machine
from data.text import Vocabulary

DATASETS = ["add2", "add3", "add4", "add5", "mul2", "sum4", "sum5", "sum6", "sum7", "sum8", "mix3"]
DATA_SEED = 1337
N_TRAIN, N_TEST = 20_000, 8192  # of few problems all but 1000 are for training, these for tests


@dataclass
class Arithmetic:
    name: str
    vocabulary: Vocabulary
    train: torch.Tensor  # (N_train, T) int64 token ids
    test: torch.Tensor  # (N_test, T)
    prompt_len: int  # the response is tokens prompt_len ... T-1

    def __post_init__(self):
        self.encode, self.decode = self.vocabulary.encode, self.vocabulary.decode

    def train_blocks(self, device):
        return self.train.to(device)

    def describe(self):
        return f"{len(self.train)} training problems such as {self.decode(self.train[0])}"

    @property
    def fingerprint(self):
        return machine.fingerprint(self.train, self.vocabulary.items)

    @property
    def structural(self):
        """Positions (list) of the prompt's symbols, the same in all problems; for SyRM."""
        prompt = self.decode(self.train[0, : self.prompt_len])
        return [i for i, char in enumerate(prompt) if char in "+*="]

    @property
    def rare(self):
        """ISAD's default: token ids (list) of the separators in the response."""
        response = self.decode(self.train[0, self.prompt_len :])
        return self.encode("".join(sorted(set(response) & set("+*="))))


def problem(name, i):
    d = int(name[3:])
    a, b = divmod(i, 10**d)
    if name.startswith("add"):
        return f"{a:0{d}}+{b:0{d}}={a + b:0{d + 1}}"
    if name.startswith("mul"):
        ones, tens = a * (b % 10), a * (b // 10 * 10)
        return f"{a:02}*{b:02}={ones:03}+{tens:04}={a * b:04}"
    digits = [int(c) for c in f"{i:0{d}}"]
    return f"{i:0{d}}=" + "".join(str(s % 10) for s in np.cumsum(digits))


def draw(name):
    """Training and test problems of a data set, as two lists of text."""
    rng = np.random.default_rng(DATA_SEED)
    if name == "mix3":  # small problems are few and recur: a checksum says which are held out
        size = 10 ** rng.integers(1, 4, 25_000)[:, None]
        texts = [f"{a:03}+{b:03}={a + b:04}" for a, b in rng.integers(0, size, (25_000, 2))]
        held_out = [text for text in texts if zlib.crc32(text.encode()) % 8 == 0]
        never = {*held_out, *draw("add3")[1]}
        return [text for text in texts if text not in never][:N_TRAIN], held_out[:N_TEST]
    total = 10 ** (int(name[3:]) * (1 if name.startswith("sum") else 2))
    n_train = min(N_TRAIN, total - 1000)
    n = min(n_train + N_TEST, total)
    texts = [problem(name, int(i)) for i in rng.choice(total, n, replace=False)]
    return texts[:n_train], texts[n_train:]


def make(name, n_train=0, n_test=512):
    """The data set of that name: n_train (0: all) problems, n_test (at most). Raises ValueError."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    train, test = draw(name)
    if n_train > len(train):
        raise ValueError(f"{name} has {len(train)} training problems, not {n_train}")
    train, test = train[: n_train or len(train)], test[:n_test]
    chars = sorted(set("0123456789").union(train[0]))
    index = {char: i for i, char in enumerate(chars)}
    ids = torch.tensor([[index[char] for char in text] for text in train + test])
    parts = ids.split([len(train), len(test)])
    return Arithmetic(name, Vocabulary("char", chars), *parts, train[0].index("=") + 1)


if __name__ == "__main__":
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else "add3")
    except ValueError as e:
        sys.exit(f"error: {e}")
    print(f"{data.describe()}; vocabulary {''.join(data.vocabulary.items)}")
    print("\n".join(data.decode(row) for row in data.train[:5]))
