"""English text that is on every machine with JAX, and its words as numbers.

The docstrings of the installed NumPy and JAX hold some 670 thousand words of English. They are read
from the source files, of which none is run. A text file of the user's own does as well.
"""

import collections
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jaxgrad.terminal import InvalidInput

UNKNOWN = "<unk>"
FEWEST_WORDS = 200

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|_+|[^\w\s]")
# A string that starts its line is a docstring; the second half steps over all other strings.
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.*?)"""|""".*?"""', re.DOTALL | re.MULTILINE)
_MARKUP = re.compile(
    r"""^[ \t]*>>>.*(?:\n(?![ \t]*$).*)*  # a code example, up to the next empty line
    | ^[ \t]*([-=~])\1{2,}[ \t]*$         # the line under a title
    | :[a-z:]+:(?=`) | `                  # :func:`name`
    """,
    re.MULTILINE | re.VERBOSE,
)


class Corpus(NamedTuple):
    """A text as numbers: ``vocabulary[train[i]]`` is its i-th word."""

    source: str
    vocabulary: list[str]
    train: np.ndarray
    held_out: np.ndarray


def load(path: Path | None = None) -> Corpus:
    """The corpus of a text file, or of the installed docstrings.

    The last tenth of every tenth of the text is held out. The vocabulary is what the other words
    hold at least twice; the rest is ``<unk>``, so that ``<unk>`` too is seen in training.

    Args:
      path: A UTF-8 text file; None for the docstrings of NumPy and JAX.

    Raises:
      InvalidInput: The file cannot be read as text, or holds too little of it.
    """
    source = str(path) if path else "docstrings of NumPy and JAX"
    found = words(read(path) if path else "\n\n".join(docstrings(np, jax)))
    if len(found) < FEWEST_WORDS:
        raise InvalidInput(f"{source}: need at least {FEWEST_WORDS} words, got {len(found)}")
    train, held_out = split(found)
    counts = collections.Counter(train).most_common()
    vocabulary = [UNKNOWN, *(word for word, count in counts if count > 1)]
    if len(vocabulary) == 1:
        raise InvalidInput(f"{source}: need words that occur more than once, got none")
    number = {word: i for i, word in enumerate(vocabulary)}

    def encode(part: list[str]) -> np.ndarray:
        return np.array([number.get(word, 0) for word in part], np.int32)

    return Corpus(source, vocabulary, encode(train), encode(held_out))


def words(text: str) -> list[str]:
    """Lower-case words, numbers and punctuation marks, in order.

    Example:
      >>> words("Don't panic: 42!")
      ["don't", 'panic', ':', '42', '!']
    """
    return _WORD.findall(text.lower())


def sentence(found: list[str]) -> str:
    """Words set as one line again.

    Example:
      >>> sentence(["don't", "panic", "(", "42", ")", "!"])
      "don't panic (42)!"
    """
    line = re.sub(r" (?=[.,:;!?)\]}])", "", " ".join(found))
    return re.sub(r"(?<=[(\[{]) ", "", line)


def split(found: list[str]) -> tuple[list[str], list[str]]:
    """The first nine tenths of every tenth, and the last tenth of every tenth."""
    train, held_out = [], []
    for i in range(10):
        tenth = found[i * len(found) // 10 : (i + 1) * len(found) // 10]
        train += tenth[: len(tenth) * 9 // 10]
        held_out += tenth[len(tenth) * 9 // 10 :]
    return train, held_out


def docstrings(*packages: ModuleType) -> Iterator[str]:
    """Every distinct docstring of the installed packages, without markup and code examples."""
    seen = set()
    for package in packages:
        folder = Path(inspect.getfile(package)).parent
        for path in sorted(folder.rglob("*.py")):
            if "tests" in path.relative_to(folder).parts:
                continue
            for found in _DOCSTRING.finditer(path.read_text(encoding="utf-8", errors="replace")):
                if found[1] and found[1] not in seen:
                    seen.add(found[1])
                    yield _MARKUP.sub("", inspect.cleandoc(found[1]))


def read(path: Path) -> str:
    """The text of a file.

    Raises:
      InvalidInput: It is missing, unreadable, not a plain file, or not UTF-8 text.
    """
    try:
        if path.exists() and not path.is_file():
            raise InvalidInput(
                f"{path}: need a text file, got a {'directory' if path.is_dir() else 'device'}"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}: need UTF-8 text, got byte {error.object[error.start]:#04x} "
            f"at position {error.start}"
        ) from error
    if "\0" in text:
        raise InvalidInput(f"{path}: need text, got a binary file")
    return text


def windows(rng: np.random.Generator, part: np.ndarray, batch: int, context: int) -> np.ndarray:
    """``int32[batch, context + 1]``: stretches of the text from places drawn at random."""
    starts = rng.integers(len(part) - context, size=(batch, 1))
    return part[starts + np.arange(context + 1)]


def consecutive_windows(part: np.ndarray, batch: int, context: int) -> Iterator[np.ndarray]:
    """``int32[batch, context + 1]``, one after the other while the text lasts.

    A window ends with the word that the next one starts with, so every word is predicted once. A
    text of fewer than ``batch`` windows comes as one smaller batch.
    """
    batch = min(batch, (len(part) - 1) // context)
    for start in range(0, len(part) - batch * context, batch * context):
        yield part[start + np.arange(batch)[:, None] * context + np.arange(context + 1)]


def unigram_perplexity(corpus: Corpus, targets: np.ndarray) -> float:
    """Perplexity of a model that knows only how often each word occurs, every count plus one."""
    counts = np.bincount(corpus.train, minlength=len(corpus.vocabulary)) + 1
    return float(np.exp(-np.log(counts / counts.sum())[targets].mean()))
