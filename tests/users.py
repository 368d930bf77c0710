"""A user whom permissions bind, for tests that root runs too."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def plain_user(copied=None):
    """Give a folder of its own, with a copy of a folder if given, to the tests' user, or to nobody where that is root."""
    place, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    if copied is not None:
        shutil.copytree(copied, place / copied.name)
    if root:
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        group = os.getegid()
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        if root:
            os.seteuid(0)
            os.setegid(group)
        for path in (place, *place.rglob("*")):
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(place)
