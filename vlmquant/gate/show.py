"""Verdicts for machines that run builds: JUnit XML, and Markdown for a GitHub step summary."""

import re
from collections.abc import Sequence

from vlmquant.report.data import Verdict
from vlmquant.report.numbers import bounds_text, change_text, threshold_text

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


def to_junit(verdicts: Sequence[Verdict], *, thresholds: str = "") -> str:
    """One test case per verdict. An inconclusive one is an error, not a skipped test: a build that skips is green.
    Skipped is what the thresholds let go where the samples say nothing of it.

    thresholds: where they are from.
    """
    from xml.etree import ElementTree

    kinds = ("fail", "inconclusive", "skipped")
    count = {kind: str(sum(verdict.outcome == kind for verdict in verdicts)) for kind in kinds}
    suite = ElementTree.Element(
        "testsuite",
        name="vlmquant.gate",
        tests=str(len(verdicts)),
        failures=count["fail"],
        errors=count["inconclusive"],
        skipped=count["skipped"],
    )
    if thresholds:
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", name="thresholds", value=_clean(thresholds))
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(verdict.candidate), name=_name(verdict))
        text = _clean(_sentence(verdict))
        if verdict.outcome == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        elif verdict.outcome == "skipped":
            ElementTree.SubElement(case, "skipped", message=text)
        else:
            tag = "failure" if verdict.outcome == "fail" else "error"
            ElementTree.SubElement(case, tag, type=verdict.outcome, message=text).text = text
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def to_step_summary(verdicts: Sequence[Verdict], *, thresholds: str = "") -> str:
    """Markdown for the file that $GITHUB_STEP_SUMMARY names."""
    from vlmquant.report.markdown import verdict_lines

    return "\n".join(["## vlmquant gate", "", *verdict_lines(verdicts, thresholds=thresholds)]) + "\n"


def _name(verdict: Verdict) -> str:
    return verdict.threshold if verdict.stratum is None else _clean(f"{verdict.stratum}: {verdict.threshold}")


def _sentence(verdict: Verdict) -> str:
    show = threshold_text(verdict.threshold)
    told = (
        f"{verdict.reason}: {change_text(verdict.threshold, verdict.point)}, "
        f"bounds {bounds_text(verdict.threshold, verdict.low, verdict.high)}, "
        f"margin {show(verdict.margin)}, n {verdict.n}"
    )
    return f"{told}; {verdict.advice}" if verdict.advice else told


def _clean(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
