"""Errors that are a user's to mend: each says where, what and what to do; the command line exits with its code."""

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_GATE_FAILED = 3
EXIT_GATE_INCONCLUSIVE = 4
EXIT_SENTINEL = 5
EXIT_DOES_NOT_FIT = 6
EXIT_STARVED_EXPERTS = 7
EXIT_CACHE_SCALE = 8
EXIT_RANK_LOST = 9

EXIT_CODES = {
    EXIT_OK: "done",
    EXIT_ERROR: "something given is wrong (a model, a file), or a check found it so",
    EXIT_USAGE: "the call or the recipe is wrong",
    EXIT_GATE_FAILED: "the gate failed",
    EXIT_GATE_INCONCLUSIVE: "the gate is inconclusive: too few samples for its thresholds",
    EXIT_SENTINEL: "a check tripped: the result would have looked fine and been wrong",
    EXIT_DOES_NOT_FIT: "not enough memory or disk",
    EXIT_STARVED_EXPERTS: "too many experts of a mixture saw too few calibration tokens",
    EXIT_CACHE_SCALE: "a scale of the KV cache is missing or of no use",
    EXIT_RANK_LOST: "of several processes that share a run, one is gone",
}
"""What each means. 128 + n: signal n ended the process."""


class VlmquantError(Exception):
    """Base of all errors that vlmquant raises on purpose."""

    exit_code = EXIT_ERROR


class UsageError(VlmquantError):
    """The call itself is wrong: an unknown option value, a path that cannot be used."""

    exit_code = EXIT_USAGE


class RecipeError(VlmquantError):
    """The recipe cannot be read or means nothing."""

    exit_code = EXIT_USAGE


class InputError(VlmquantError):
    """A model, data set or report given to us is missing, damaged or of a kind we do not handle."""


class UnknownClassError(InputError):
    """A model whose class the installed transformers does not know, may not run or cannot build."""


class PlanError(VlmquantError):
    """The recipe cannot be applied to this model."""


class CheckpointError(VlmquantError):
    """A checkpoint written by vlmquant is damaged, incomplete or from another version."""


class SentinelError(VlmquantError):
    """A check against silent failure tripped: the result would have looked fine and been wrong."""

    exit_code = EXIT_SENTINEL


class StarvedExpertsError(SentinelError):
    """Too many experts of a mixture saw too few calibration tokens to be quantized on data."""

    exit_code = EXIT_STARVED_EXPERTS


class CacheScaleError(SentinelError):
    """A scale of the KV cache is missing, zero, infinite or saturated."""

    exit_code = EXIT_CACHE_SCALE


class DoesNotFitError(VlmquantError):
    """The work needs more memory or disk than there is."""

    exit_code = EXIT_DOES_NOT_FIT


class RankLostError(VlmquantError):
    """Of several processes that share a run, one is gone or never came."""

    exit_code = EXIT_RANK_LOST


class KernelError(VlmquantError):
    """A CUDA kernel cannot be built, started or measured on this machine."""


LINE_CHARACTERS = 1000
"""Of what another library's error says inside a line of ours."""


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line goes; its class where it says nothing."""
    return shown(next(iter(str(error).strip().splitlines()), type(error).__name__), limit=LINE_CHARACTERS)


SHOWN_CHARACTERS = 200
"""Of a stranger's text inside a line of ours."""
MESSAGE_CHARACTERS = 4000
"""Of a whole message."""


def shown(text: object, *, limit: int = SHOWN_CHARACTERS) -> str:
    """Strangers' text (a name in a file, a value) as part of one line: what is not printable escaped, and cut short."""
    full = str(text)
    escaped = visible(full[:limit])
    return escaped[:limit] + ("..." if max(len(full), len(escaped)) > limit else "")


def visible(text: str) -> str:
    """Text in which every character that is not printable is escaped: line ends, ESC, halves of surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(message: object) -> str:
    """A message as it goes to a terminal: no control characters, and no line but the first that looks like ours."""
    full = str(message)
    lines = full[:MESSAGE_CHARACTERS].split("\n")
    text = "\n  ".join(shown(line, limit=MESSAGE_CHARACTERS) for line in lines)
    return text + (f" ... ({len(full):,} characters)" if len(full) > MESSAGE_CHARACTERS else "")
