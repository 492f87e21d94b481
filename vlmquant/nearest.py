"""What a word that we do not know was meant to be: by what people call it, or as a slip of the keyboard; else nothing.

A wrong suggestion is worse than none, as it may be taken: `w8a16` is a letter or two from `w8a8`, and another model.
"""

from collections.abc import Iterable, Mapping

WORD = 100
"""Letters of a word that is compared."""
LETTERS_PER_SLIP = 3
"""So many letters of a word make room for one slip."""


def nearest(word: str, known: Iterable[str], meanings: Mapping[str, str] | None = None) -> str | None:
    """The known word that is meant; None where none is, or two may be.

    meanings: other names of known words, in lower case. A slip is a letter too many, too few, another one, or two that
    changed places; not the first letter, and no digit but in another place, as digits carry the meaning.
    """
    known, word = list(known), word[:WORD].lower()
    meant = (meanings or {}).get(word)
    if meant in known:
        return meant
    distances = {
        candidate: distance(word, candidate.lower())
        for candidate in known
        if candidate[:1].lower() == word[:1] and _digits(candidate) == _digits(word)
    }
    least = min(distances.values(), default=WORD)
    found = [candidate for candidate, slips in distances.items() if slips == least]
    return found[0] if len(found) == 1 and least <= len(word) // LETTERS_PER_SLIP else None


def did_you_mean(word: str, known: Iterable[str], meanings: Mapping[str, str] | None = None) -> str:
    """For the end of a message: ", did you mean 'mixed'?", or nothing."""
    found = nearest(word, known, meanings)
    return f", did you mean '{found}'?" if found else ""


def _digits(word: str) -> list[str]:
    return sorted(letter for letter in word if letter.isdigit())


def distance(one: str, other: str) -> int:
    """Slips between two words: letters added, dropped, replaced, or swapped with their neighbour (optimal string
    alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]
