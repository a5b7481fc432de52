"""Any UTF-8 text as data: by characters, or by the tokens of a BPE (tiktoken). Tiny Shakespeare is fetched by name.

A sequence is a window of block_size + 1 tokens of the text. Its first token is the prompt, the block_size others are the
response. So an ARM's loss is that of nanoGPT with the same block_size, and an MDM answers exactly the same question:
-log p(block_size tokens | the one before them). The first 90 % of the text is to train on, the rest to validate.

`python data/text.py PATH` shows what a file becomes.
"""
import hashlib
import os
import re
import sys
import urllib.request
import zlib
from dataclasses import dataclass

import numpy as np
import torch

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SIZE = 1115394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
N_TEST = 512  # validation blocks, spread evenly over the validation text


@dataclass
class Vocabulary:
    """Characters, or those tokens of a BPE that occur in the text: a token id is an index into `items`."""

    tokenizer: str  # "char", or the name of a tiktoken encoding
    items: list  # characters, or the encoding's own token ids; sorted

    def __len__(self):
        return len(self.items)

    def encode(self, text):
        """Token ids (list) of a string. Raises ValueError naming the first character or token that the text lacks."""
        index = {item: i for i, item in enumerate(self.items)}
        for item in text if self.tokenizer == "char" else bpe(self.tokenizer).encode_ordinary(text):
            if item not in index:
                shown = item if self.tokenizer == "char" else bpe(self.tokenizer).decode([item])
                raise ValueError(f"{shown!r} does not occur in the text the model was trained on")
        return [index[item] for item in (text if self.tokenizer == "char" else bpe(self.tokenizer).encode_ordinary(text))]

    def decode(self, ids, mask="_"):
        """The string of token ids; a mask token (id V) shows as `mask`. Half a character of a BPE shows as U+FFFD."""
        if self.tokenizer == "char":
            return "".join(self.items[i] if i < len(self.items) else mask for i in ids)
        known = bpe(self.tokenizer)
        part = lambda i: known.decode_single_token_bytes(self.items[i]) if i < len(self.items) else mask.encode("utf-8")
        return b"".join(part(int(i)) for i in ids).decode("utf-8", errors="replace")


@dataclass
class Text:
    name: str
    vocabulary: Vocabulary
    stream: torch.Tensor  # (N,) the training text; uint8 where the vocabulary allows, so that it takes no more than the file
    test: torch.Tensor  # (n_blocks, T) int64
    counts: np.ndarray  # (V,) how often each token occurs in the training text
    chars_per_token: float  # in the responses of the validation blocks
    fingerprint: int  # checksum of all tokens
    prompt_len: int = 1
    structural = ()  # a text's prompt has no structural symbols for SyRM

    def train_blocks(self, device):
        """All windows of T tokens, (N - T + 1, T): a view, which costs no memory."""
        return self.stream.to(device).unfold(0, self.test.shape[1], 1)

    @property
    def rare(self):
        """ISAD's default: the rarest tokens, as many as make up 5 % of the text."""
        order = np.argsort(self.counts, kind="stable")
        return order[np.cumsum(self.counts[order]) <= 0.05 * self.counts.sum()].tolist()

    def encode(self, text):
        return self.vocabulary.encode(text)

    def decode(self, ids, mask="_"):
        return self.vocabulary.decode(ids, mask)

    def describe(self):
        sample = self.decode(self.stream[:40].tolist())
        return f"{len(self.stream):,} training tokens, {len(self.vocabulary)} different ones, such as {sample!r}"


def bpe(name):
    """The tiktoken encoding of that name. Raises ValueError, in one line, if there is none or it cannot be fetched."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError(f"--tokenizer={name} needs the package tiktoken: pip install tiktoken") from None
    if name not in (names := set(tiktoken.list_encoding_names()) | set(tiktoken.registry.ENCODINGS)):
        raise ValueError(f"--tokenizer={name} is unknown: char (characters) or one of tiktoken's {', '.join(sorted(names))}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # whatever the network has to offer
        url = getattr(getattr(e, "request", None), "url", None)
        where = f"{url} belongs there under the name {hashlib.sha1(url.encode()).hexdigest()}" if url else "its files belong there"
        raise ValueError(f"--tokenizer={name}: tiktoken could not download its BPE file; without network set TIKTOKEN_CACHE_DIR to a "
                         f"directory: {where} (copy that directory from a machine where it worked)") from None  # fmt: skip


def pieces(path, whole_tokens, size=2**20):
    """The text of a file, in strings of about a million characters, so that it need not fit in memory as a string.

    whole_tokens: end each after a lone line feed with something on both sides, over which no token of a BPE reaches (but
    for o200k's, if a slash follows). A byte order mark is dropped, every line ends in a line feed. Raises ValueError for
    what cannot be read or is not UTF-8.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as f:
            while part := f.read(size):
                rest += part
                start, end = max(0, len(rest) - len(part) - 2), 0 if whole_tokens else len(rest)
                for match in re.finditer(r"\S\n(?=[^\s/])", rest[start:]) if whole_tokens else ():
                    end = start + match.end()
                if end:
                    yield rest[:end]
                    rest = rest[end:]
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason}); convert it first, for instance with iconv") from None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror or e}") from None
    if rest:
        yield rest


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def tokenize(path, tokenizer):
    """The whole file as (Vocabulary, token ids (N,) of the smallest dtype that holds them). Reads it twice for
    characters, once to see which there are."""
    if tokenizer == "char":
        seen, n = np.zeros(0x110000, dtype=bool), 0
        for text in pieces(path, False):
            points = code_points(text)
            seen[points] = True
            n += len(points)
        used = np.flatnonzero(seen)
        vocabulary = Vocabulary(tokenizer, [chr(i) for i in used])
        parts = map(code_points, pieces(path, False))
    else:
        encoding = bpe(tokenizer)
        parts = [np.array(encoding.encode_ordinary(text), dtype=np.int32) for text in pieces(path, True)]
        n, used = sum(map(len, parts)), np.unique(np.concatenate([np.unique(p) for p in parts])) if parts else np.zeros(0, int)
        vocabulary = Vocabulary(tokenizer, used.tolist())
    ids = np.empty(n, dtype=np.uint8 if len(used) <= 256 else np.int16 if len(used) <= 2**15 else np.int32)
    index, start = np.zeros(used.max(initial=0) + 1, dtype=ids.dtype), 0
    index[used] = np.arange(len(used))
    for part in parts:
        ids[start : start + len(part)] = index[part]
        start += len(part)
    return vocabulary, ids


def make(path, block_size, tokenizer="char", name=None):
    """The Text in a file. Raises ValueError, in one line, for a file that cannot be read or is too short."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    vocabulary, ids = tokenize(path, tokenizer)
    T, n = block_size + 1, len(ids)
    if n < 10 * T + 10:
        raise ValueError(f"{path} has {n} tokens; --block_size={block_size} needs at least {10 * T + 10}, of which the last tenth is for "
                         "validation: use a longer text or a smaller --block_size")  # fmt: skip
    if len(vocabulary) < 2:
        raise ValueError(f"{path} has one character only, {vocabulary.items[0]!r}, over and over: nothing can be learnt from it")
    split = int(0.9 * n)
    test = torch.from_numpy(ids[split:]).unfold(0, T, block_size)  # each token but the first is asked for once
    test = test[torch.linspace(0, len(test) - 1, min(N_TEST, len(test))).round().long()].long()
    counts = sum(np.bincount(part, minlength=len(vocabulary)) for part in np.array_split(ids[:split], max(1, split >> 22)))
    response = test[:, 1:].flatten().tolist()
    chars_per_token = 1.0 if tokenizer == "char" else len(vocabulary.decode(response)) / len(response)
    return Text(name or path, vocabulary, torch.from_numpy(ids[:split]), test, counts, chars_per_token, zlib.crc32(ids))


def shakespeare(directory=os.path.dirname(os.path.abspath(__file__))):
    """The path of Tiny Shakespeare, downloaded if it is not there. Raises ValueError when that fails."""
    path = os.path.join(directory, "input.txt")  # the name that char-rnn and nanoGPT use
    good = lambda content: len(content) == SHAKESPEARE_SIZE and hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256
    if os.path.exists(path):
        with open(path, "rb") as f:
            if good(f.read(SHAKESPEARE_SIZE + 1)):
                return path
        raise ValueError(f"{path} is not Tiny Shakespeare, or is damaged: delete it, and it is fetched again")
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            content = response.read(SHAKESPEARE_SIZE + 1)
        if not good(content):
            raise OSError("what came is not the file that was asked for")
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as f:
            f.write(content)
        os.replace(temporary, path)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot fetch Tiny Shakespeare ({getattr(e, 'reason', e)}): put {SHAKESPEARE} at {path}, or use any text of yours "
                         "with --dataset=PATH") from None  # fmt: skip
    return path


if __name__ == "__main__":
    try:
        data = make(sys.argv[1] if len(sys.argv) > 1 else shakespeare(), 64, *sys.argv[2:3])
    except ValueError as e:
        sys.exit(f"error: {e}")
    p = data.counts[data.counts > 0] / data.counts.sum()
    print(f"{data.name}: {data.describe()}; {len(data.test)} validation blocks; entropy of the tokens' frequencies {-(p @ np.log(p)):.3f} nats")
