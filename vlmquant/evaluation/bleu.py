"""BLEU-4 under two conventions that must never be mixed up: sacrebleu's and COCO captioning's.

Both come from ten sufficient statistics a sample, so that a corpus (or a bootstrap resample of it) is a sum:
clipped n-gram matches (4), n-grams of the hypothesis (4), length of the hypothesis, length of the reference.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ORDER = 4
STATISTICS = 2 * ORDER + 2
TEXTS_KEPT = 20_000
"""Captions whose statistics are not counted again: a report's are asked for with every model it compares."""
MATCHES, TOTALS, HYPOTHESIS, REFERENCE = slice(0, ORDER), slice(ORDER, 2 * ORDER), 2 * ORDER, 2 * ORDER + 1

# pycocoevalcap's bleu_scorer.py: they keep a corpus without any match of an order just above zero.
COCO_TINY = 1e-15
COCO_SMALL = 1e-9

Array = NDArray[np.float64]


def _sacrebleu() -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU  # where there are captions, and nowhere else

    return BLEU(max_ngram_order=ORDER, force=True)  # force: no advice about tokenized periods on the log


def sacrebleu_signature(references: Sequence[Sequence[str]]) -> str:
    """The signature of a corpus score over samples with these references, such as `nrefs:5|case:mixed|eff:no|...`."""
    bleu = _sacrebleu()
    most = max(len(sample) for sample in references)
    streams = [[sample[k] if k < len(sample) else None for sample in references] for k in range(most)]
    bleu.corpus_score(["-"] * len(references), streams)
    return str(bleu.get_signature())


_counting = functools.cache(_sacrebleu)
"""Of which only counts are asked, which do not depend on what was asked before."""


def sacrebleu_statistics(hypothesis: str, references: Sequence[str]) -> Array:
    """(10,) float64, tokenized by sacrebleu's 13a, cased; the reference closest in length counts."""
    return np.array(_sacrebleu_counts(hypothesis, tuple(references)), dtype=np.float64)


@functools.lru_cache(TEXTS_KEPT)
def _sacrebleu_counts(hypothesis: str, references: tuple[str, ...]) -> tuple[float, ...]:
    score = _counting().corpus_score([hypothesis], [[reference] for reference in references])
    return (*score.counts, *score.totals, score.sys_len, score.ref_len)


def sacrebleu_score(sums: Array) -> Array:
    """Sums (..., 10) of statistics -> BLEU-4 (...) from 0 to 100, as sacrebleu computes it: smooth:exp, eff:no."""
    matches, totals = sums[..., MATCHES], sums[..., TOTALS]
    halvings = np.cumsum(matches == 0, axis=-1)  # the k-th order without a match counts as 1 / 2^k matches
    smoothed = np.where(matches == 0, 0.5**halvings, matches)
    score = _geometric_mean(smoothed, np.maximum(totals, 1)) * _brevity(sums[..., HYPOTHESIS], sums[..., REFERENCE])
    return np.where(matches.any(axis=-1) & totals.all(axis=-1), 100 * score, 0.0)


def coco_statistics(hypothesis: str, references: Sequence[str]) -> Array:
    """(10,) float64 by COCO's convention: ptb_tokens; the closest reference's length, the shorter one on a tie."""
    return np.array(_coco_counts(hypothesis, tuple(references)), dtype=np.float64)


@functools.lru_cache(TEXTS_KEPT)
def _coco_counts(hypothesis: str, references: tuple[str, ...]) -> tuple[int, ...]:
    words = ptb_tokens(hypothesis)
    answers = [ptb_tokens(reference) for reference in references]
    matches, totals = [], []
    for n in range(1, ORDER + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for answer in answers:
            most |= _ngrams(answer, n)
        matches.append((_ngrams(words, n) & most).total())
        totals.append(max(0, len(words) - n + 1))
    closest = min((abs(len(answer) - len(words)), len(answer)) for answer in answers)[1]
    return (*matches, *totals, len(words), closest)


def coco_score(sums: Array) -> Array:
    """Sums (..., 10) of statistics -> BLEU-4 (...) from 0 to 100, as COCO's caption evaluation computes it."""
    precision = _geometric_mean(sums[..., MATCHES] + COCO_TINY, sums[..., TOTALS] + COCO_SMALL)
    return 100 * precision * _brevity(sums[..., HYPOTHESIS] + COCO_TINY, sums[..., REFERENCE] + COCO_SMALL)


def _geometric_mean(matches: Array, totals: Array) -> Array:
    mean: Array = np.exp(np.log(matches / totals).mean(axis=-1))
    return mean


def _brevity(hypothesis: Array, reference: Array) -> Array:
    """exp(1 - reference / hypothesis) where the hypothesis is shorter, else 1; 0 without any hypothesis."""
    ratio = np.divide(reference, hypothesis, out=np.full_like(reference, np.inf), where=hypothesis > 0)
    penalty: Array = np.exp(np.minimum(0.0, 1 - ratio))
    return penalty


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[k:] for k in range(n)), strict=False))


# What COCO's caption evaluation drops after tokenizing; brackets and quotes stand for -LRB-, ``, '' and their kin.
PUNCTUATION = frozenset("'\"`.?!,:-;()[]{}“”‘…")
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
FUSED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b")
TOKEN = re.compile(
    r"""(?:[^\W\d_]\.){2,}             # u.s.
      | (?:mr|mrs|ms|dr|st|jr|sr|prof|vs)\.
      | \d+(?:[.,:/]\d+)+              # 3.5  1,000  10:30  1/2
      | n't | '(?:s|re|ve|ll|d|m)(?!\w)
      | \w+(?:['-]\w+)*                # dog  well-lit  o'clock
      | \S                             # any other sign by itself""",
    re.VERBOSE,
)


def ptb_tokens(text: str) -> list[str]:
    """Lower-case tokens after the Penn Treebank manner of Stanford's PTBTokenizer, without COCO's punctuation.

    Clitics stand apart (do n't, dog 's), hyphenated words, numbers and abbreviations stay whole. Pure Python: it agrees
    with the Java tokenizer on ordinary captions, not on every web address or currency there is.
    """
    text = text.lower().replace("’", "'")
    text = FUSED.sub(lambda match: " ".join(part for part in match.groups() if part), text)
    return [token for token in TOKEN.findall(CLITIC.sub(r" \1 ", text)) if token not in PUNCTUATION]
