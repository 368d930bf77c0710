"""Make the reports of run folders anew, and compare the first with each other one, paired.

python -m kloss.report FOLDER [FOLDER ...]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files import leaving_pipes, read_json, shown, user_path
from . import write_report
from .compare import Read, compare


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for a mistake of the user's, with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m kloss.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run that is done")
    try:
        read = []
        for given in parser.parse_args(arguments).folders:
            folder = user_path(given)
            print(f"report: {write_report(folder)}")
            read.append(Read(given, read_json(folder / "scores.json"), _config(folder)))
        for other in read[1:]:
            print("", *compare(read[0], other), sep="\n")
    except UserError as error:
        print(f"kloss: {shown(error, 2000)}", file=sys.stderr)
        return 2
    return 0


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    return read_json(file) if file.exists() else {}


if __name__ == "__main__":
    with leaving_pipes():
        sys.exit(main())
