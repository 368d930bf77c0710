"""What all tests share: the interpreter where there is no GPU, poisoned memory, and where the real corpus lies."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    for item in items:
        # A keyword may be a folder's name: a clone in a folder named gpu would skip every test.
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("massive") and not (SHARED / "massive").is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the MASSIVE corpus in ../shared"))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with massive/ and xlmr-tokenizer/; tests that use it are marked `massive`."""
    return SHARED


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is NaN, so that a row which nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The GPU suite on the CPU, small (`suite_parts`)."""
    from suite_parts import small_suite

    return small_suite(tmp_path, monkeypatch)
