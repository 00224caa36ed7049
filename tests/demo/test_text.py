"""The corpus: what is a word, what is held out, and which texts are refused."""

import numpy as np
import pytest

from jaxgrad.demo import text
from jaxgrad.terminal import InvalidInput

ENGLISH = "The cat sat on the mat; a dog (three years old) ran past it. " * 40


def corpus_of(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return text.load(path)


def test_docstrings_are_english_of_the_stated_size():
    corpus = text.load()
    assert len(corpus.train) + len(corpus.held_out) > 500_000
    assert 5_000 < len(corpus.vocabulary) < 10_000
    assert {"the", "of", "array", "."} < set(corpus.vocabulary[:20])
    assert (corpus.held_out == 0).mean() < 0.02
    assert ">>>" not in " ".join(corpus.vocabulary)


def test_numbers_stand_for_the_words(tmp_path):
    corpus = corpus_of(tmp_path, ENGLISH)
    train, held_out = text.split(text.words(ENGLISH))
    assert [corpus.vocabulary[i] for i in corpus.train] == train
    assert [corpus.vocabulary[i] for i in corpus.held_out] == held_out


def test_every_word_is_either_trained_on_or_held_out():
    train, held_out = text.split(list(map(str, range(1003))))
    assert sorted(train + held_out, key=int) == list(map(str, range(1003)))
    assert len(held_out) == pytest.approx(100, abs=10)
    assert held_out[:12] == [*map(str, range(90, 100)), "190", "191"]


def test_words_seen_once_in_training_are_unknown(tmp_path):
    corpus = corpus_of(tmp_path, "unique " + ENGLISH)
    assert "unique" not in corpus.vocabulary
    assert corpus.vocabulary[corpus.train[0]] == text.UNKNOWN


def test_byte_order_mark_is_no_word(tmp_path):
    assert corpus_of(tmp_path, ENGLISH.encode("utf-8-sig")).vocabulary[1:]
    assert "\ufeff" not in "".join(corpus_of(tmp_path, ENGLISH.encode("utf-8-sig")).vocabulary)


def test_consecutive_windows_predict_every_word_once():
    part = np.arange(100)
    windows = list(text.consecutive_windows(part, batch=3, context=7))
    predicted = np.concatenate([w[:, 1:].ravel() for w in windows])
    np.testing.assert_array_equal(predicted, np.arange(1, 1 + 4 * 21))


def test_short_text_makes_one_smaller_batch():
    (windows,) = text.consecutive_windows(np.arange(20), batch=16, context=8)
    assert windows.shape == (2, 9)


def test_windows_reach_both_ends():
    drawn = text.windows(np.random.default_rng(0), np.arange(10), batch=500, context=4)
    assert drawn.min() == 0
    assert drawn.max() == 9
    assert (np.diff(drawn, axis=1) == 1).all()


def test_unigram_perplexity_of_equally_frequent_words_is_their_number():
    corpus = text.Corpus("", list("abcd"), np.arange(4000) % 4, np.arange(4))
    assert text.unigram_perplexity(corpus, corpus.held_out) == pytest.approx(4)
    unseen = corpus._replace(vocabulary=list("abcde"))
    assert text.unigram_perplexity(unseen, np.array([4])) == pytest.approx(4005)


@pytest.mark.parametrize(
    "content, needed",
    [
        (b"", "need at least 200 words, got 0"),
        (b"too short", "need at least 200 words, got 2"),
        (b"na\xefve " * 300, "need UTF-8 text, got byte 0xef at position 2"),
        (b"\x7fELF\0\0" * 300, "need text, got a binary file"),
        ("".join(chr(0x4E00 + i) + " " for i in range(300)), "words that occur more than once"),
    ],
    ids=["empty", "short", "latin-1", "binary", "no repetition"],
)
def test_bad_content_is_refused(tmp_path, content, needed):
    with pytest.raises(InvalidInput, match=needed) as raised:
        corpus_of(tmp_path, content)
    assert "text.txt" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_path_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"missing\.txt: cannot be read: No such file"):
        text.load(tmp_path / "missing.txt")
    with pytest.raises(InvalidInput, match="need a text file, got a directory"):
        text.load(tmp_path)


def test_docstrings_of_an_installed_package_come_without_examples_or_markup():
    found = "\n".join(text.docstrings(np.fft))
    assert "one-dimensional discrete Fourier Transform" in found
    assert "`" not in found
    assert ">>>" not in found
