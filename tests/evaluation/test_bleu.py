"""BLEU-4: against numbers worked by hand for COCO's convention, against sacrebleu for sacrebleu's."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from vlmquant.evaluation.bleu import (
    coco_score,
    coco_statistics,
    ptb_tokens,
    sacrebleu_score,
    sacrebleu_signature,
    sacrebleu_statistics,
)

PARAGRAPH = "A man rides a bicycle. Two dogs, one black and one white, run after him down the street."
WORDS = st.sampled_from(["a", "dog", "cat", "runs", "on", "the", "grass", "grass.", "A", "don't"])
SENTENCES = st.lists(WORDS, max_size=9).map(" ".join)
CORPUS = st.lists(
    st.tuples(SENTENCES, st.lists(SENTENCES.filter(bool), min_size=2, max_size=2)), min_size=1, max_size=6
)


def test_bleu_of_a_paragraph_with_itself_is_100() -> None:
    assert sacrebleu_score(sacrebleu_statistics(PARAGRAPH, [PARAGRAPH])) == pytest.approx(100)
    # COCO's 1e-9 in the denominators of the precisions keeps it a trace below
    assert coco_score(coco_statistics(PARAGRAPH, [PARAGRAPH])) == pytest.approx(100, abs=1e-6)


@given(CORPUS)
def test_sacrebleu_from_summed_statistics_is_sacrebleus_corpus_score(corpus: list[tuple[str, list[str]]]) -> None:
    ours = sacrebleu_score(np.sum([sacrebleu_statistics(text, answers) for text, answers in corpus], axis=0))
    texts, streams = [text for text, _ in corpus], [[answers[k] for _, answers in corpus] for k in range(2)]
    assert ours == pytest.approx(sacrebleu.corpus_bleu(texts, streams, force=True).score, abs=1e-9)


def test_signature_is_sacrebleus() -> None:
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a"], [["a"], ["b"]])
    assert sacrebleu_signature([["a", "b"]]) == str(metric.get_signature())
    assert "nrefs:var" in sacrebleu_signature([["a", "b"], ["a"]])


def test_coco_statistics_by_hand() -> None:
    # Tokens: a dog runs on the grass. References of 5 and 8 tokens: 5 is nearer to 6.
    statistics = coco_statistics(
        "A dog runs on the grass.", ["a dog runs on grass", "the dog is on the grass, my friend ."]
    )
    # 1-grams: a dog runs on the grass, all found. 2: a-dog dog-runs runs-on on-the the-grass, all found.
    # 3: a-dog-runs dog-runs-on on-the-grass of 4. 4: a-dog-runs-on of 3.
    assert statistics.tolist() == [6, 5, 3, 1, 6, 5, 4, 3, 6, 5]
    assert coco_score(statistics) == pytest.approx(100 * (1 * 1 * 3 / 4 * 1 / 3) ** 0.25, abs=1e-5)


def test_coco_counts_are_clipped_by_the_most_of_any_reference() -> None:
    statistics = coco_statistics("the the the the", ["the cat", "the the dog"])
    assert statistics[:4].tolist() == [2, 1, 0, 0]


def test_coco_brevity_penalty_by_hand() -> None:
    statistics = coco_statistics("a b c d", ["a b c d e f"])
    assert coco_score(statistics) == pytest.approx(100 * math.exp(1 - 6 / 4), abs=1e-5)


def test_coco_takes_the_shorter_reference_on_a_tie() -> None:
    assert coco_statistics("a b c", ["a b c d", "a b"])[-1] == 2


def test_coco_without_any_match_is_zero_and_without_an_order_nearly() -> None:
    assert coco_score(coco_statistics("x", ["a b c d"])) == pytest.approx(0, abs=1e-2)
    assert coco_score(coco_statistics("", ["a b c d"])) == 0


def test_coco_is_a_corpus_score_and_not_a_mean() -> None:
    first, second = coco_statistics("a b c d", ["a b c d"]), coco_statistics("e f g h", ["i j k l"])
    assert coco_score(first + second) == pytest.approx(100 * (4 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** 0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Two people don't ride the dog's bike.", "two people do n't ride the dog 's bike"),
        ('A well-lit room, with a "STOP" sign!', "a well-lit room with a stop sign"),
        ("It's 10:30 (U.S. time) -- 3.5 miles...", "it 's 10:30 u.s. time 3.5 miles"),
        ("The boys' can’t & cannot o'clock", "the boys ca n't & can not o'clock"),
        ("50% off at Mr. Smith's", "50 % off at mr. smith 's"),
        ("black--white ; 'quoted'", "black white quoted"),
    ],
)
def test_ptb_tokens(text: str, tokens: str) -> None:
    assert ptb_tokens(text) == tokens.split()


@given(st.text())
def test_ptb_tokens_are_lower_case_without_spaces(text: str) -> None:
    for token in ptb_tokens(text):
        assert token
        assert not any(character.isspace() for character in token)
