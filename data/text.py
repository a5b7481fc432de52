"""Any UTF-8 text as data, by characters or by BPE tokens (tiktoken).

The first 90 % of the text is for training, the rest for validation. A sequence is a window of
block_size + 1 tokens. Its first token is the prompt, and the others are the response. So an ARM has
nanoGPT's loss at the same block_size, and an MDM is scored on the same responses.

`python data/text.py FILE` shows the size and the beginning of a text. Without FILE it shows
shakespeare_char: Tiny Shakespeare, nanoGPT's million characters, in the file shakespeare.txt.gz.
"""
import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # there Python finds the package `data`
from data import runs


@dataclass
class Vocabulary:
    """The characters or BPE tokens that occur in the data. The id of a token is its place in items.
    The mask token comes after them: its id is len(vocabulary)."""

    tokenizer: str  # "char", or the name of a tiktoken encoding
    items: list  # sorted: the characters, or tiktoken's numbers of the tokens

    def __len__(self):
        return len(self.items)

    def encode(self, text):
        """The token ids of a string. Raises ValueError for a token outside the vocabulary."""
        ids = {item: i for i, item in enumerate(self.items)}
        try:
            return [ids[item] for item in split(text, self.tokenizer)]
        except KeyError as missing:
            raise ValueError(f"token {missing} does not occur in the data") from None

    def decode(self, ids, mask="_"):
        """The string of token ids. The mask token is shown as `mask`."""
        if self.tokenizer == "char":
            shown = [*self.items, mask]
            return "".join(shown[i] for i in ids)
        to_bytes = bpe(self.tokenizer).decode_single_token_bytes
        pieces = [to_bytes(self.items[i]) if i < len(self) else mask.encode() for i in ids]
        return b"".join(pieces).decode(errors="replace")  # one piece may be half a character


@dataclass
class Data:
    """A data set. Each of its sequences has T tokens: a prompt, then a response."""

    name: str
    is_text: bool  # or else it is arithmetic
    vocabulary: Vocabulary
    train: torch.Tensor  # token ids: (N, T) of N problems, or (N,) of a text in one piece
    test: torch.Tensor  # token ids (N_test, T)
    prompt_len: int
    structural: list  # for SyRM: the positions of symbols in the prompt
    rare: list  # for ISAD: the ids of rare tokens
    fingerprint: str  # changes with the data

    def __post_init__(self):
        self.encode = self.vocabulary.encode
        self.decode = self.vocabulary.decode

    def train_blocks(self, device):
        """All sequences for training, (n_train, T). Of a text these are all windows of T tokens."""
        train = self.train.to(device)
        if not self.is_text:
            return train
        T = self.test.shape[1]
        return train.unfold(0, T, 1)  # a view: the windows need no memory of their own

    def describe(self):
        blocks = self.train_blocks("cpu")
        example = self.decode(blocks[0, :40])
        kinds = len(self.vocabulary)
        return f"{len(blocks)} training sequences of {kinds} kinds of tokens, such as {example!r}"


def bpe(name):
    """The tiktoken encoding of that name. Raises ValueError if it cannot be loaded."""
    try:
        import tiktoken  # here, because few need it

        return tiktoken.get_encoding(name)
    except Exception as error:  # an unknown name, no network, or no tiktoken
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--tokenizer={name} cannot be loaded: {reason}") from None


def split(text, tokenizer):
    """A list of the text's characters, or of tiktoken's numbers of its tokens."""
    return list(text) if tokenizer == "char" else bpe(tokenizer).encode_ordinary(text)


def read(path):
    """The text of a UTF-8 file. Raises ValueError if it cannot be read."""
    try:
        if path == "shakespeare_char":
            return gzip.open(HERE / "shakespeare.txt.gz", "rt", encoding="utf-8").read()
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no data set, and no UTF-8 text: {error}") from None


def make(path, block_size, tokenizer="char"):
    """The Data of a text file or of shakespeare_char. Raises ValueError if it cannot be made."""
    text = read(path)
    vocabulary = Vocabulary(tokenizer, sorted(set(split(text, tokenizer))))
    dtype = torch.uint8 if len(vocabulary) <= 256 else torch.int32  # a small one saves memory
    ids = torch.tensor(vocabulary.encode(text), dtype=dtype)
    n_train = int(0.9 * len(ids))
    train = ids[:n_train]
    validation = ids[n_train:]
    if len(validation) <= block_size:
        raise ValueError(f"{path} has {len(ids)} tokens, too short for --block_size={block_size}: "
                         f"it needs {10 * block_size + 1}")

    # The last token of a block is the prompt of the next block. So no token is in two responses.
    blocks = validation.unfold(0, block_size + 1, block_size)
    # We use at most 512 blocks, from all over the text.
    chosen = torch.linspace(0, len(blocks) - 1, min(512, len(blocks))).round().long()

    # The rarest tokens, as many as fit into 5 % of the training text.
    counts = train.bincount(minlength=len(vocabulary))
    counts, rarest_first = counts.sort(stable=True)  # equal counts stay in the same order
    rare = rarest_first[counts.cumsum(0) <= n_train // 20]

    return Data(name=path, is_text=True, vocabulary=vocabulary, train=train,
                test=blocks[chosen].long(), prompt_len=1, structural=[], rare=rare.tolist(),
                fingerprint=runs.fingerprint(ids, vocabulary.items))


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "shakespeare_char"
    try:
        print(make(path, block_size=64).describe())
    except ValueError as error:
        runs.fail(error)
