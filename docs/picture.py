"""Take the picture of a report that README.md shows, in headless Chromium.

    python docs/picture.py demo-output/report.html [--chromium chromium]

Writes docs/report.png, the top of the page as it is on a screen, and refuses one of 300 kB or more.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parent / "report.png"
WIDTH, HEIGHT = 1100, 900
MOST_BYTES = 300_000
SECONDS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--chromium", default="chromium", help="the program")
    arguments = parser.parse_args()
    if not arguments.report.is_file() or shutil.which(arguments.chromium) is None:
        sys.exit(f"needs the report {arguments.report} and the program {arguments.chromium}")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "report.png"
        subprocess.run(
            [
                arguments.chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                "--blink-settings=preferredColorScheme=1",
                f"--window-size={WIDTH},{HEIGHT}",
                f"--screenshot={taken}",
                arguments.report.resolve().as_uri(),
            ],
            check=True,
            timeout=SECONDS,
            stderr=subprocess.DEVNULL,
        )
        if taken.stat().st_size >= MOST_BYTES:
            sys.exit(f"the picture has {taken.stat().st_size} bytes; fewer than {MOST_BYTES} are wanted")
        shutil.copyfile(taken, PICTURE)


if __name__ == "__main__":
    main()
