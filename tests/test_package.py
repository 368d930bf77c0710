"""What is published: the source distribution has everything that a wheel is built from."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import kloss

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kloss": (".py", ".j2", ".css", ".typed"), "csrc": (".cpp", ".h", ".inl", ".cu", ".cuh")}


def test_the_source_distribution_is_complete(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"kloss-{kloss.__version__}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = {name for name in tracked if name.endswith(FOLDERS.get(name.split("/")[0], ("\n",)))}
    assert len(needed) > 100 and needed | {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= packed, needed - packed
