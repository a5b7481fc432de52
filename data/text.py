"""Any UTF-8 text as data: by characters, or by the tokens of a BPE (tiktoken).

A sequence is a window of block_size + 1 tokens. Its first token is the prompt, the others are the
response. So an ARM's loss is nanoGPT's at the same block_size, and an MDM answers the very same
question, -log p(block_size tokens | the one before). The last 10 % of the text is for validation.

`python -m data.text PATH` shows what a file becomes."""
import hashlib
import os
import sys
import urllib.request
from dataclasses import dataclass

import numpy as np
import torch

from data import machine

CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
SHAKESPEARE = CHAR_RNN + "data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
N_TEST = 512  # validation blocks, spread evenly over the validation text


@dataclass
class Vocabulary:
    """Characters, or those tokens of a BPE that occur in the text. An id is an index into items."""

    tokenizer: str  # "char", or the name of a tiktoken encoding
    items: list  # characters, or the encoding's own token ids; sorted

    def __len__(self):
        return len(self.items)

    def encode(self, text):
        """Token ids (list) of a string. Raises ValueError naming a character or token not there."""
        index = {item: i for i, item in enumerate(self.items)}
        parts = text if self.tokenizer == "char" else bpe(self.tokenizer).encode_ordinary(text)
        for item in parts:
            if item not in index:
                shown = item if self.tokenizer == "char" else bpe(self.tokenizer).decode([item])
                raise ValueError(f"{shown!r} does not occur in the data the model was trained on")
        return [index[item] for item in parts]

    def decode(self, ids, mask="_"):
        """The string of token ids; the mask token shows as `mask`, half a character as U+FFFD."""
        known = [self.items[i] if i < len(self.items) else None for i in map(int, ids)]
        if self.tokenizer == "char":
            return "".join(mask if item is None else item for item in known)
        token = bpe(self.tokenizer).decode_single_token_bytes
        parts = [mask.encode() if item is None else token(item) for item in known]
        return b"".join(parts).decode(errors="replace")


@dataclass
class Text:
    name: str
    vocabulary: Vocabulary
    stream: torch.Tensor  # (N,) the training text, as small integers
    test: torch.Tensor  # (n_blocks, T) int64
    counts: np.ndarray  # (V,) how often each token occurs in the training text
    chars_per_token: float  # in the responses of the validation blocks
    fingerprint: str  # of all tokens
    prompt_len: int = 1
    structural = ()  # of symbols for SyRM

    def __post_init__(self):
        self.encode, self.decode = self.vocabulary.encode, self.vocabulary.decode

    def train_blocks(self, device):
        """All windows of T tokens, (N - T + 1, T): a view, which costs no memory."""
        return self.stream.to(device).unfold(0, self.test.shape[1], 1)

    @property
    def rare(self):
        """ISAD's default: the rarest tokens, as many as make up 5 % of the text."""
        order = np.argsort(self.counts, kind="stable")
        return order[np.cumsum(self.counts[order]) <= 0.05 * self.counts.sum()].tolist()

    def describe(self):
        sample = self.decode(self.stream[:40])
        return f"{len(self.stream):,} tokens to train on, {len(self.vocabulary)} kinds: {sample!r}"


def bpe(name):
    """The tiktoken encoding of that name. Raises ValueError if there is none, or no download."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f"--tokenizer={name} needs a package: pip install tiktoken") from None
    names = sorted({*tiktoken.list_encoding_names(), *tiktoken.registry.ENCODINGS})
    if name not in names:
        raise ValueError(f"--tokenizer={name} is neither char nor one of {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception:  # whatever the network has to offer
        raise ValueError(f"--tokenizer={name} cannot be downloaded: copy tiktoken's cache from "
                         "another machine and set TIKTOKEN_CACHE_DIR to it") from None


def tokenize(path, tokenizer):
    """The whole file as (Vocabulary, token ids (N,)). Raises ValueError."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            content = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no data set, and no file of UTF-8 text: {e}") from None
    if tokenizer == "char":
        tokens = np.frombuffer(content.encode("utf-32-le"), dtype="<u4")
    else:
        tokens = np.array(bpe(tokenizer).encode_ordinary(content), dtype=np.int32)
    items, ids = np.unique(tokens, return_inverse=True)
    items = [chr(i) for i in items] if tokenizer == "char" else items.tolist()
    return Vocabulary(tokenizer, items), ids.astype(np.uint8 if len(items) <= 256 else np.int32)


def make(path, block_size, tokenizer="char", name=None):
    """The Text in a file. Raises ValueError for one that cannot be read or is too short."""
    vocabulary, ids = tokenize(path, tokenizer)
    T, n = block_size + 1, len(ids)
    kinds, needed = len(vocabulary), 10 * T + 10
    if n < needed or kinds < 2:
        raise ValueError(f"{path} has {n} tokens, {kinds} different; it needs {needed} and 2")
    split = int(0.9 * n)
    test = torch.from_numpy(ids[split:]).unfold(0, T, block_size)  # each token is asked for once
    spread = torch.linspace(0, len(test) - 1, min(N_TEST, len(test))).round().long()
    test = test[spread].long()
    counts = np.bincount(ids[:split], minlength=len(vocabulary))
    per_token = len(vocabulary.decode(test[:, 1:].flatten())) / test[:, 1:].numel()
    stream, known_by = torch.from_numpy(ids[:split]), machine.fingerprint(ids, vocabulary.items)
    return Text(name or path, vocabulary, stream, test, counts, per_token, known_by)


def shakespeare(directory=os.path.dirname(os.path.abspath(__file__))):
    """The path of Tiny Shakespeare, downloaded if it is not there. Raises ValueError."""
    path = os.path.join(directory, "input.txt")
    try:
        if not os.path.exists(path):
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError("what came is not the whole file")
            with open(path + ".tmp", "wb") as f:
                f.write(content)
            os.replace(path + ".tmp", path)
    except (OSError, ValueError) as e:
        why = getattr(e, "reason", e)
        raise ValueError(f"cannot fetch Tiny Shakespeare ({why}): put {SHAKESPEARE} at {path}, "
                         "or use a text of yours") from None
    with open(path, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != SHA256:
            raise ValueError(f"{path} is not Tiny Shakespeare, or is damaged: delete it")
    return path


if __name__ == "__main__":
    try:
        print(make(sys.argv[1] if len(sys.argv) > 1 else shakespeare(), 64).describe())
    except ValueError as e:
        sys.exit(f"error: {e}")
