"""Sources and strata of sets."""

from collections.abc import Sequence

from vlmquant.calibration.build import SourceUse
from vlmquant.calibration.sampling import Stratum
from vlmquant.errors import shown
from vlmquant.tables.layout import Table, make_table


def sources_table(sets: Sequence[Sequence[SourceUse]]) -> Table:
    """How much of each source arrived in the sets that were made of it."""
    rows = []
    for uses in zip(*sets, strict=True):
        use = uses[0]
        unusable, passed_over = sum(use.unusable.values()), sum(use.passed_over.values())
        samples, images = sum(one.samples for one in uses), sum(one.images for one in uses)
        counts = (use.reading.records, unusable, passed_over, samples, use.reading.images, images)
        rows.append((use.name, *map(str, counts)))
    columns = ("source", "records", "unusable", "passed over", "samples taken", "its images", "images taken")
    return make_table("Sources", columns, rows)


def strata_table(strata: Sequence[Stratum]) -> Table:
    """What was drawn from each task of a set."""
    rows = [(shown(row.task), str(row.asked), str(row.got), str(row.with_image), str(row.text_only)) for row in strata]
    return make_table("Strata", ("task", "asked", "got", "with image", "text only"), rows)
