"""The answers that quantization changed most."""

import difflib
from dataclasses import dataclass

from vlmquant.evaluation.records import Run, SampleScore


@dataclass(frozen=True)
class Changed:
    """One sample that the two models answer differently."""

    before: SampleScore
    after: SampleScore

    @property
    def kind(self) -> str:
        if self.before.exact and self.after.exact is False:
            return "right, now wrong"
        if self.after.exact and self.before.exact is False:
            return "wrong, now right"
        return "changed"

    @property
    def kl_per_token(self) -> float:
        """Mean KL over the sample's answer tokens, nats; 0 where it is unknown."""
        return self.after.kl / self.after.tokens if self.after.kl is not None and self.after.tokens else 0.0


def changed_answers(reference: Run, candidate: Run) -> list[Changed]:
    """Samples whose generated answer differs: those answered right before and wrong now first, then by falling KL."""
    before = {sample.id: sample for sample in reference.samples}
    changed = [
        Changed(before[sample.id], sample)
        for sample in candidate.samples
        if sample.id in before
        and sample.generated is not None
        and before[sample.id].generated is not None
        and sample.generated.strip() != str(before[sample.id].generated).strip()
    ]
    return sorted(changed, key=lambda one: (one.kind != "right, now wrong", -one.kl_per_token, one.after.id))


def word_changes(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in pieces, each with whether it is not in `before`: what a reader's eye should find at once."""
    old, new = before.split(), after.split()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        (" ".join(new[first:last]), tag != "equal") for tag, _, _, first, last in matcher.get_opcodes() if last > first
    ]
