"""Arithmetic as character-level, fixed-width text, made on the spot (well under a second, nothing is downloaded).

    add2 ... add5   123+456=0579             zero-padded sum, most significant digit first
    mul2            47*86=282+3760=4042      two-digit product by way of its two partial products
    sum4 ... sum8   3941=3267                running sums of the digits, mod 10
    mix3            007+042=0049             add3's form, but of one, two or three digits, a third each: to pretrain on

What stands up to the first `=` is the prompt; the rest is the response, which alone is masked, generated and scored.
Training and test problems are disjoint and come from a seed of their own: every run sees the same ones. (Not up to swapping the
operands: 47*86 may be in one and 86*47 in the other, as it nearly always is in the small mul2, rarely in add3.)

`python data/arith.py add3` prints a few.
"""
import os
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.text import Vocabulary

DATASETS = ["add2", "add3", "add4", "add5", "mul2", "sum4", "sum5", "sum6", "sum7", "sum8", "mix3"]
DATA_SEED = 1337
N_TRAIN, N_TEST = 20_000, 512  # fewer to train on where there are fewer problems: all but 1000 of them


@dataclass
class Arithmetic:
    name: str
    vocabulary: Vocabulary
    train: torch.Tensor  # (N_train, T) int64 token ids
    test: torch.Tensor  # (N_test, T)
    prompt_len: int  # the response is tokens prompt_len ... T-1
    chars_per_token = 1.0

    def train_blocks(self, device):
        return self.train.to(device)

    def encode(self, text):
        """Token ids of a string. Raises ValueError naming the first character that is not in the vocabulary."""
        return self.vocabulary.encode(text)

    def decode(self, ids, mask="_"):
        """The string of a sequence of token ids; a mask token (id V) shows as `mask`."""
        return self.vocabulary.decode(ids, mask)

    def describe(self):
        return f"{len(self.train)} training problems such as {self.decode(self.train[0])}"

    @property
    def fingerprint(self):
        return zlib.crc32(self.train.numpy())

    @property
    def structural(self):
        """Positions (list) of the prompt's structural symbols, the same in all problems; for SyRM."""
        return [i for i in range(self.prompt_len) if self.vocabulary.items[self.train[0, i]] in "+*="]

    @property
    def rare(self):
        """ISAD's default: token ids of the separators in the response, or else of its two rarest tokens."""
        count = self.train[:, self.prompt_len :].flatten().bincount(minlength=len(self.vocabulary))
        separators = [i for i, c in enumerate(self.vocabulary.items) if c in "+*=" and count[i] > 0]
        return separators or torch.where(count > 0, count, count.max() + 1).argsort()[:2].tolist()


def problem(name, i):
    """Problem number i of a data set, as text."""
    d = int(name[3:])
    if name.startswith("add"):
        a, b = divmod(i, 10**d)
        return f"{a:0{d}}+{b:0{d}}={a + b:0{d + 1}}"
    if name.startswith("mul"):
        a, b = divmod(i, 10**d)
        ones, tens = a * (b % 10), a * (b // 10 * 10)
        return f"{a:02}*{b:02}={ones:03}+{tens:04}={a * b:04}"
    digits = [int(c) for c in f"{i:0{d}}"]
    return f"{i:0{d}}=" + "".join(str(s % 10) for s in np.cumsum(digits))


def draw(name):
    """Training and test problems of a data set, as two lists of text."""
    rng = np.random.default_rng(DATA_SEED)
    if name == "mix3":  # few small problems exist, so they recur; which are held out is settled by a checksum
        size = 10 ** rng.integers(1, 4, 25_000)[:, None]
        texts = [f"{a:03}+{b:03}={a + b:04}" for a, b in rng.integers(0, size, (25_000, 2))]
        held_out, add3_test = [zlib.crc32(text.encode()) % 8 == 0 for text in texts], set(draw("add3")[1])
        train = [text for text, out in zip(texts, held_out) if not out and text not in add3_test]
        return train[:N_TRAIN], [text for text, out in zip(texts, held_out) if out][:N_TEST]
    total = 10 ** (int(name[3:]) * (1 if name.startswith("sum") else 2))
    n_train = min(N_TRAIN, total - 1000)
    texts = [problem(name, int(i)) for i in rng.choice(total, n_train + N_TEST, replace=False)]
    return texts[:n_train], texts[n_train:]


def make(name):
    """The data set of that name. Raises ValueError for an unknown one."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    train, test = draw(name)
    chars = "".join(sorted(set("0123456789").union(train[0])))
    table = np.zeros(128, dtype=np.int64)
    table[[ord(c) for c in chars]] = range(len(chars))
    ids = torch.from_numpy(table[np.frombuffer("".join(train + test).encode(), dtype=np.uint8)]).view(len(train) + len(test), -1)
    return Arithmetic(name, Vocabulary("char", list(chars)), ids[: len(train)], ids[len(train) :], train[0].index("=") + 1)


if __name__ == "__main__":
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else "add3")
    except ValueError as e:
        sys.exit(f"error: {e}")
    print(f"{data.name}: {len(data.train)} training and {len(data.test)} test problems, vocabulary {''.join(data.vocabulary.items)!r}, "
          f"{data.prompt_len} prompt and {data.train.shape[1] - data.prompt_len} response tokens")  # fmt: skip
    print("\n".join(data.decode(row) for row in data.train[:5]))
