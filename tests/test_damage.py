"""What kloss wrote is checked when it is read: the cache makes a damaged entry again, a run folder says what to delete."""

import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kloss.cl import cache as cache_module
from kloss.cl.backbone import load_backbone
from kloss.cl.corpus import load_corpus
from kloss.config import Config
from kloss.errors import UserError

CONFIG = Config(tiny_layers=1, tiny_hidden=32, pretrain_steps=2, pretrain_batch=4)
LOCALES = ("en-US", "ja-JP")
SEAL = "kloss-entry.json"
FILES = {"tokenizer": "tokenizer.json", "corpus": "input_ids.npy", "backbone": "model.safetensors"}


class Said(list):
    """A progress display that keeps what it is told to say."""

    def __bool__(self):
        return True

    def __call__(self, done, total, text):
        pass

    def say(self, text):
        self.append(text)


def opened(folder):
    """Opens or makes a tokenizer, a corpus and a backbone in a cache. Returns what was said, the corpus's arrays, the weights."""
    said = Said()
    options = {"train": 12, "test": 4, "dev": 4}
    corpus = load_corpus("synthetic", locales=LOCALES, synthetic=options, cache=folder, progress=said)
    model = load_backbone(Config(**vars(CONFIG) | {"cache": str(folder)}), corpus, torch.device("cpu"), said)
    arrays = [np.array(a) for x in LOCALES for part in ("train", "test") for a in corpus.sentences(x, part)]
    return said, (corpus.fingerprint, corpus.labels, arrays), model.state_dict()


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with one entry of each kind: (folder, what `opened` gives)."""
    folder = tmp_path_factory.mktemp("made")
    return folder, opened(folder)


@pytest.fixture
def cache(made, tmp_path):
    """A copy of `made`'s cache."""
    return Path(shutil.copytree(made[0], tmp_path / "cache"))


def entry(cache, kind):
    (folder,) = cache.glob(f"{kind}-*")
    return folder


def same(one, other):
    """Whether `opened` gave the same corpus and the same weights."""
    arrays = all(np.array_equal(a, b) for a, b in zip(one[1][2], other[1][2], strict=True))
    return one[1][:2] == other[1][:2] and arrays and all(torch.equal(one[2][name], other[2][name]) for name in one[2])


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """One bit in the last quarter, which is data and not a header."""
    data = bytearray(file.read_bytes())
    data[len(data) * 7 // 8] ^= 1
    file.write_bytes(data)


def folder_instead(file):
    file.unlink()
    file.mkdir()


DAMAGE = {"cut": cut, "empty": empty, "flipped": flip, "missing": Path.unlink, "folder": folder_instead}


def repaired(made, cache, kind):
    """The next opening says one line, gives what was there before, and the one after it says nothing."""
    again = opened(cache)
    assert len(again[0]) == 1 and f"{kind}-" in again[0][0] and "made again" in again[0][0], again[0]
    assert same(again, made[1]) and contents(entry(cache, kind)) == contents(entry(made[0], kind))
    assert opened(cache)[0] == []


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_of_the_cache_is_made_again(made, cache, kind, damage):
    DAMAGE[damage](entry(cache, kind) / FILES[kind])
    repaired(made, cache, kind)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("seal", [None, "", "{}", "[]", "null", '{"digest": 5, "about": {}}', "[" * 100_000, b"\xff"])
def test_an_entry_without_its_digest_is_made_again(made, cache, kind, seal):
    file = entry(cache, kind) / SEAL
    file.unlink() if seal is None else file.write_bytes(seal if isinstance(seal, bytes) else seal.encode())
    repaired(made, cache, kind)


def test_an_entry_that_is_a_file_is_made_again(made, cache):
    folder = entry(cache, "backbone")
    shutil.rmtree(folder)
    folder.write_text("no folder")
    repaired(made, cache, "backbone")


def ids_out_of_range(folder):
    values = np.load(folder / "input_ids.npy")
    values[3] = 10**6
    np.save(folder / "input_ids.npy", values)


def offsets_out_of_range(folder):
    values = np.load(folder / "offsets.npy")
    values[2] = -5
    np.save(folder / "offsets.npy", values)


def meta(change):
    def damage(folder):
        value = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(change(value)))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        ids_out_of_range,
        offsets_out_of_range,
        meta(lambda value: {}),
        meta(lambda value: []),
        meta(lambda value: {name: value[name] for name in value if name != "labels"}),
        meta(lambda value: value | {"labels": value["labels"][:2]}),
        meta(lambda value: value | {"index": {}}),
    ],
)
def test_a_corpus_changed_by_hand_is_made_again(made, cache, damage):
    damage(entry(cache, "corpus"))
    repaired(made, cache, "corpus")


def test_without_a_display_the_warning_is_pythons(cache):
    cut(entry(cache, "corpus") / "labels.npy")
    with pytest.warns(UserWarning, match="corpus-.* is made again"):
        load_corpus("synthetic", locales=LOCALES, synthetic={"train": 12, "test": 4, "dev": 4}, cache=cache)


def modes(cache):
    return {stat.S_IMODE(file.stat().st_mode) for file in cache.rglob("*") if file.is_file()}, {
        stat.S_IMODE(folder.stat().st_mode) for folder in cache.iterdir()
    }


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_entries_are_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        opened(tmp_path / "cache")
    finally:
        os.umask(before)
    assert modes(tmp_path / "cache") == ({0o666 & ~umask}, {0o777 & ~umask})


@pytest.fixture
def plain_user(made):
    """A copy of `made`'s cache that belongs to a user whom permissions bind: the tests' user, or nobody where that is root."""
    folder = Path(tempfile.mkdtemp())
    cache, root = folder / "cache", os.geteuid() == 0
    shutil.copytree(made[0], cache)
    if root:
        for path in (folder, cache, *cache.rglob("*")):
            shutil.chown(path, 65534, 65534)
        os.setegid(65534)
        os.seteuid(65534)
    yield cache
    if root:
        os.seteuid(0)
        os.setegid(0)
    for path in (cache, *cache.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("closed", ["folder", "file"])
def test_an_unreadable_entry_is_no_damage(plain_user, kind, closed):
    there = entry(plain_user, kind)
    (there if closed == "folder" else there / FILES[kind]).chmod(0)
    with pytest.raises(UserError, match=f"cannot read .*{kind}-.*Permission denied.*--cache"):
        opened(plain_user)
    assert there.exists() and not list(plain_user.glob(".tmp-*"))


def test_a_damaged_entry_that_cannot_be_moved_away(plain_user):
    cut(entry(plain_user, "backbone") / "model.safetensors")
    plain_user.chmod(0o555)
    with pytest.raises(UserError, match="backbone-.* is damaged and cannot be moved away .*Permission denied.*--cache"):
        opened(plain_user)


def test_a_cache_that_cannot_be_written_serves_as_long_as_it_has_all(made, plain_user):
    plain_user.chmod(0o555)
    assert opened(plain_user)[0] == []
    plain_user.chmod(0o755)
    shutil.rmtree(entry(plain_user, "tokenizer"))
    plain_user.chmod(0o555)
    with pytest.raises(UserError, match="cannot write .*tokenizer-.*Permission denied"):
        opened(plain_user)


def test_what_others_left_behind_is_left_to_them(plain_user):
    cache = plain_user
    shutil.rmtree(entry(cache, "backbone"))
    (cache / ".tmp-other" / "inner").mkdir(parents=True)
    (cache / ".tmp-other" / "inner" / "file").write_text("")
    (cache / ".tmp-file").write_text("")
    (cache / ".tmp-own").mkdir()
    (cache / ".tmp-other" / "inner").chmod(0o555)  # as one of another user: what is in it cannot be removed
    for leftover in cache.glob(".tmp-*"):
        os.utime(leftover, (0, time.time() - 100_000))
    assert opened(cache)[0] == []
    assert not (cache / ".tmp-own").exists() and (cache / ".tmp-other" / "inner" / "file").exists()


def test_a_home_that_nobody_knows(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(UserError, match="home.*--cache"):
        cache_module.cache_folder()
    with pytest.raises(UserError, match="cannot use"):
        cache_module.cache_folder("a\0b")
