"""What kloss wrote is checked when it is read: the cache makes a damaged entry again, a run folder says what to delete."""

import copy
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
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from safetensors import safe_open
from safetensors.torch import save_file
from test_report import FIVE, fake_scores, write_run
from toy import ToyCorpus, toy_model
from users import plain_user

from kloss.cl import cache as cache_module
from kloss.cl.backbone import load_backbone
from kloss.cl.corpus import load_corpus
from kloss.cl.learner import Learner
from kloss.cl.rundir import open_run
from kloss.cl.runner import train_study
from kloss.cl.study import Study
from kloss.config import Config
from kloss.errors import UserError
from kloss.report import figures, write_report

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
def own_cache(made):
    """A copy of `made`'s cache that belongs to a user whom permissions bind."""
    with plain_user(made[0]) as place:
        yield place / made[0].name


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("closed", ["folder", "file"])
def test_an_unreadable_entry_is_no_damage(own_cache, kind, closed):
    there = entry(own_cache, kind)
    (there if closed == "folder" else there / FILES[kind]).chmod(0)
    with pytest.raises(UserError, match=f"cannot read .*{kind}-.*Permission denied.*--cache"):
        opened(own_cache)
    assert there.exists() and not list(own_cache.glob(".tmp-*"))


def test_a_damaged_entry_that_cannot_be_moved_away(own_cache):
    cut(entry(own_cache, "backbone") / "model.safetensors")
    own_cache.chmod(0o555)
    with pytest.raises(UserError, match="backbone-.* is damaged and cannot be moved away .*Permission denied.*--cache"):
        opened(own_cache)


def test_a_cache_that_cannot_be_written_serves_as_long_as_it_has_all(made, own_cache):
    own_cache.chmod(0o555)
    assert opened(own_cache)[0] == []
    own_cache.chmod(0o755)
    shutil.rmtree(entry(own_cache, "tokenizer"))
    own_cache.chmod(0o555)
    with pytest.raises(UserError, match="cannot write .*tokenizer-.*Permission denied"):
        opened(own_cache)


def test_what_others_left_behind_is_left_to_them(own_cache):
    cache = own_cache
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


LEARNERS = (
    Learner(experiences=(("aa",), ("bb",)), rank=2, alpha=2.0, lr=1e-2, seed=1, epochs=2, batch_size=4),
    Learner(experiences=(("cc",),), rank=3, alpha=3.0, lr=1e38, seed=2, epochs=2, batch_size=4),  # diverges at step 2
    Learner(experiences=(("aa",),), rank=None, alpha=1.0, lr=1e-2, seed=3, epochs=1, batch_size=6),
)
TO_SCORE = [{0: ["aa"], 1: ["aa", "bb"], 2: ["bb"]}, {0: ["cc"], 1: ["cc"]}, {1: ["aa"]}]
LORA, WHOLE = 4, 13  # rounds after which a run is stopped: among the adapters, among the whole model's steps


def train(folder, stop=None):
    """Trains the study to its end, or stops it behind that many rounds with a checkpoint. Returns scores and what was said."""
    said, rounds = Said(), []

    class Stop(Said):
        def __call__(self, done, total, text):
            rounds.append(done)
            if len(rounds) == stop:
                raise KeyboardInterrupt

    config, study = Config(checkpoint_seconds=0 if stop else 1000), Study([], list(LEARNERS), TO_SCORE)
    display = Stop() if stop else said
    with open_run(folder, {"seed": 0}) as run:
        outcome = train_study(config, ToyCorpus(), study, lambda corpus: toy_model(), run, display)
    return outcome, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where a run was stopped -> its folder, of which only copies are changed; None: what a whole run gives."""
    folder, stopped = tmp_path_factory.mktemp("runs"), {}
    stopped[None] = train(folder / "whole")[0]
    assert "diverged at step 2" in stopped[None].failed[1]
    for stop in (1, LORA, WHOLE):
        stopped[stop] = folder / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train(stopped[stop], stop + 1)
    return stopped


def read(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def changed(runs, tmp_path, stop, tensors=None, state=None, keep_digest=False):
    """A copy of a stopped run whose checkpoint's tensors and state were changed in place by two functions."""
    folder = Path(shutil.copytree(runs[stop], tmp_path / "run"))
    values, metadata = read(folder / "checkpoint.safetensors")
    content = json.loads(metadata["state"])
    if state:
        state(content)
    if tensors:
        tensors(values)
    metadata["state"] = json.dumps(content)
    if not keep_digest:
        del metadata["digest"]
    save_file(values, folder / "checkpoint.safetensors", metadata)
    return folder


def refused(folder, words=""):
    before = (folder / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match="checkpoint.safetensors is damaged .*delete it to train again from the start") as error:
        train(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert (folder / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("stop", [1, LORA, WHOLE])
@pytest.mark.parametrize("old", [False, True], ids=["digest", "no digest"])
def test_a_checkpoint_of_learners_of_which_one_diverged_is_continued(runs, tmp_path, stop, old):
    folder = Path(shutil.copytree(runs[stop], tmp_path / "run"))
    if old:
        folder = changed(runs, tmp_path / "old", stop)
    if old and stop == 1:  # the weights are infinite already, and nothing says yet that the learner diverged
        return refused(folder, "param of learner 1 is not finite")
    outcome, said = train(folder)
    assert outcome == runs[None]
    assert ["has no digest" in line for line in said if "diverged" not in line] == [True] * old


def flip_weight(values):
    values["param"].view(torch.int32)[0, 5] ^= 1 << 20


@pytest.mark.parametrize("stop", [LORA, WHOLE])
def test_a_flipped_bit_of_a_checkpoint_is_seen(runs, tmp_path, stop):
    refused(changed(runs, tmp_path, stop, flip_weight, keep_digest=True), "digest")
    for number, where in enumerate((0.5, 0.9, -1)):  # in the file as it lies there
        folder = Path(shutil.copytree(runs[stop], tmp_path / str(number)))
        data = bytearray((folder / "checkpoint.safetensors").read_bytes())
        data[int(len(data) * where) if where > 0 else where] ^= 16
        (folder / "checkpoint.safetensors").write_bytes(data)
        refused(folder, "digest")


@pytest.mark.parametrize("stop", [LORA, WHOLE])
def test_a_changed_state_of_a_checkpoint_is_seen(runs, tmp_path, stop):
    def one_more(state):
        state["state"]["scores"][0]["0" if stop == LORA else "1"] = {"aa": [0, 0, 0]}

    refused(changed(runs, tmp_path, stop, state=one_more, keep_digest=True), "digest")


def replaced(name, change):
    def replace(values):
        values[name] = change(values[name])

    return replace


NAN = torch.full((), float("nan"))
TENSORS = {
    "one row": (replaced("param", lambda t: t[:1].clone()), "param"),
    "a scalar": (replaced("param", lambda t: t[0, 0].clone()), "param"),
    "a column too few": (replaced("exp_avg", lambda t: t[:, 1:].clone()), "exp_avg"),
    "half": (replaced("param", lambda t: t.half()), "param"),
    "double": (replaced("exp_avg_sq", lambda t: t.double()), "exp_avg_sq"),
    "steps as floats": (replaced("steps", lambda t: t.float()), "steps"),
    "negative steps": (replaced("steps", lambda t: t - 99), "steps"),
    "too many steps": (replaced("steps", lambda t: t + 99), "steps"),
    "NaN": (replaced("param", lambda t: torch.cat([NAN.expand(1, t.shape[1]), t[1:]])), "param of learner 0 is not finite"),
    "a moment of inf": (replaced("exp_avg_sq", lambda t: t.index_fill(1, torch.tensor([3]), float("inf"))), "exp_avg_sq"),
    "missing": (lambda values: values.pop("exp_avg"), "tensors are exp_avg_sq, param, steps, not"),
    "all missing": (lambda values: values.clear(), "tensors are none"),
    "another": (lambda values: values.update(other=torch.zeros(3)), "other"),
}


@pytest.mark.parametrize(("stop", "damage"), [*((LORA, damage) for damage in TENSORS), (WHOLE, "a scalar"), (WHOLE, "NaN")])
def test_tensors_that_are_not_the_learners_are_refused(runs, tmp_path, stop, damage):
    change, words = TENSORS[damage]
    refused(changed(runs, tmp_path, stop, change), words)


def at(*path, value=None, pop=False):
    """Sets, or removes, what stands at a path of JSON."""

    def change(state):
        for step in path[:-1]:
            state = state[step]
        if pop:
            del state[path[-1]]
        else:
            state[path[-1]] = value

    return change


STATES = {
    "nothing": lambda state: state.clear(),
    "no cohort": at("cohort", pop=True),
    "cohort in words": at("cohort", value="one"),
    "finished a list": at("finished", value=[]),
    "no state": at("state", pop=True),
    "state null": at("state", value=None),
    "state a list": at("state", value=[]),
    "no counters": at("state", "counters", pop=True),
    "counters of one learner": at("state", "counters", value=[[0, 0, 0]] * 5),
    "two counters": at("state", "counters", 0, value=[0, 0]),
    "counters of text": at("state", "counters", 0, value="000"),
    "a counter of text": at("state", "counters", 0, value=[0, "0", 0]),
    "a counter of true": at("state", "counters", 0, value=[True, 0, 0]),
    "experience below": at("state", "counters", 0, value=[-1, 0, 0]),
    "experience beyond": at("state", "counters", 0, value=[9, 0, 0]),
    "epoch beyond": at("state", "counters", 0, value=[0, 2, 0]),
    "batch beyond": at("state", "counters", 0, value=[0, 0, 3]),
    "batch behind the end": at("state", "counters", 0, value=[2, 0, 1]),
    "scores null": at("state", "scores", value=None),
    "a score null": at("state", "scores", 0, "0", value=None),
    "no scores": at("state", "scores", 0, value={}),
    "an experience in words": at("state", "scores", 0, "one", value={}),
    "scores of the future": at("state", "scores", 0, "2", value={"bb": [0, 0, 0]}),
    "another locale": at("state", "scores", 0, "0", value={"zz": [0, 0, 0]}),
    "two counts": at("state", "scores", 0, "0", value={"aa": [1, 2]}),
    "negative counts": at("state", "scores", 0, "0", value={"aa": [-1, 2, 3]}),
    "more found than there are": at("state", "scores", 0, "0", value={"aa": [5, 6, 3]}),
    "failed a list": at("state", "failed", value=[]),
    "failed nobody": at("state", "failed", value={"7": "diverged"}),
    "failed in words": at("state", "failed", value={"one": "diverged"}),
    "tokens of text": at("state", "tokens", value="many"),
    "negative tokens": at("state", "tokens", value=-1),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_that_is_not_the_learners_is_refused(runs, tmp_path, damage):
    refused(changed(runs, tmp_path, LORA, state=STATES[damage]))


@pytest.mark.parametrize(
    "change",
    [
        at("finished", "0", value=None),
        at("finished", "0", value={}),
        at("finished", "0", "scores", pop=True),
        at("finished", "0", "weights", pop=True),
        at("finished", "0", "weights", value=[1]),
        at("finished", "0", "weights", value=[1, "2"]),
        at("finished", "0", "counters", 0, value=[1, 0, 0]),
        at("finished", "0", "scores", 0, value={}),
    ],
)
def test_a_finished_cohort_that_is_not_the_learners_is_refused(runs, tmp_path, change):
    refused(changed(runs, tmp_path, WHOLE, state=change))


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{", "[" * 100_000, '{"finished": ' + "1" * 5000 + "}"])
def test_a_state_that_is_odd_json_is_refused(runs, tmp_path, text):
    folder = Path(shutil.copytree(runs[LORA], tmp_path / "run"))
    values, metadata = read(folder / "checkpoint.safetensors")
    save_file(values, folder / "checkpoint.safetensors", {"state": text})
    refused(folder)
    save_file(values, folder / "checkpoint.safetensors")
    refused(folder)


@pytest.mark.parametrize("damage", [cut, empty])
def test_a_checkpoint_cut_short(runs, tmp_path, damage):
    folder = Path(shutil.copytree(runs[LORA], tmp_path / "run"))
    damage(folder / "checkpoint.safetensors")
    refused(folder)


def test_a_checkpoint_that_is_no_file(runs, tmp_path):
    folder = Path(shutil.copytree(runs[LORA], tmp_path / "run"))
    folder_instead(folder / "checkpoint.safetensors")
    with pytest.raises(UserError, match="checkpoint.safetensors"):
        train(folder)


def test_a_checkpoint_deleted_trains_again_from_the_start(runs, tmp_path):
    folder = Path(shutil.copytree(runs[LORA], tmp_path / "run"))
    (folder / "checkpoint.safetensors").unlink()
    assert train(folder)[0] == runs[None]


def test_a_run_folder_removed_while_the_run_goes_on_is_not_made_anew(tmp_path):
    class Remove(Said):
        def __call__(self, done, total, text):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    with pytest.raises(UserError, match="run folder .* is gone"), open_run(tmp_path / "run", {"seed": 0}) as run:
        train_study(Config(), ToyCorpus(), Study([], list(LEARNERS), TO_SCORE), lambda corpus: toy_model(), run, Remove())
    assert not (tmp_path / "run").exists()


SCORES = {
    "only a format": (lambda scores: [scores.pop(name) for name in list(scores) if name != "format"], "name"),
    "runs null": (at("runs", value=None), "runs"),
    "runs of null": (at("runs", 1, value=None), "runs[1]"),
    "no runs": (at("runs", pop=True), "runs"),
    "no corpus": (at("corpus", pop=True), "corpus"),
    "locales a text": (at("corpus", "locales", value="en-US"), "corpus.locales"),
    "utterances null": (at("corpus", "train_utterances", value=None), "corpus.train_utterances"),
    "utterances of text": (at("corpus", "test_utterances", "en-US", value="many"), "corpus.test_utterances.en-US"),
    "no utterances": (at("corpus", "test_utterances", value={}), "corpus.test_utterances"),
    "subwords a list": (at("corpus", "tokens_per_word", value=[1]), "corpus.tokens_per_word"),
    "a backbone of text": (at("backbone", "layers", value="4"), "backbone.layers"),
    "a name of numbers": (at("name", value=5), "name"),
    "choices of numbers": (at("choices", value=[5]), "choices[0]"),
    "no label": (at("runs", 0, "label", pop=True), "runs[0].label"),
    "a rate of text": (at("runs", 0, "lr", value="fast"), "runs[0].lr"),
    "no weights": (at("runs", 0, "trainable_parameters", value=None), "runs[0].trainable_parameters"),
    "steps of text": (at("runs", 0, "steps", value="x"), "runs[0].steps"),
    "a seed in a list": (at("runs", 0, "seed", value=[0]), "runs[0].seed"),
    "diverged: true": (at("runs", 0, "diverged", value=True), "runs[0].diverged"),
    "R null": (at("runs", 0, "R", value=None), "runs[0].R"),
    "R empty": (at("runs", 0, "R", value=[]), "runs[0].R"),
    "a row null": (at("runs", 0, "R", 2, value=None), "runs[0].R[2]"),
    "a row short": (at("runs", 0, "R", 2, value=[0.5]), "runs[0].R"),
    "a row missing": (at("runs", 0, "R", 2, pop=True), "runs[0].R"),
    "a cell of text": (at("runs", 0, "R", 2, 1, value="0.5"), "runs[0].R[2][1]"),
    "a cell of NaN": (at("runs", 0, "R", 2, 1, value=float("nan")), "runs[0].R"),
    "a cell of 80": (at("runs", 0, "R", 2, 1, value=80.0), "runs[0].R"),
    "an order without languages": (at("runs", 0, "order", value=[]), "runs[0].R"),
    "an order of another length": (at("runs", 0, "order", 4, pop=True), "runs[0].R"),
    "an order of numbers": (at("runs", 0, "order", 1, value=7), "runs[0].order[1]"),
}


@pytest.fixture(scope="module")
def scores():
    return fake_scores(strategies=("non-shared", "multi"), orders=1, seeds=2)


@pytest.mark.parametrize("damage", SCORES)
def test_scores_changed_by_hand_are_one_line(tmp_path, scores, damage):
    change, where = SCORES[damage]
    write_run(tmp_path, scores)
    value = copy.deepcopy(scores)
    change(value)
    (tmp_path / "scores.json").write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    words = f"{tmp_path / 'scores.json'} is not what kloss wrote ({where} "
    assert str(error.value).startswith(words) and str(error.value).endswith("rename or delete it to go on")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"commit": 5}, "commit"),
        ({"commit": ["a"]}, "commit"),
        ({"command": 5}, "command"),
        ({"command": ["a", 5]}, "command"),
        ({"argv": {"a": 1}}, "argv"),
    ],
)
def test_an_environment_changed_by_hand_is_one_line(tmp_path, scores, value, where):
    write_run(tmp_path, scores)
    (tmp_path / "env.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"env.json is not what kloss wrote \({where} .*delete it"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"seed": 0'])
def test_a_configuration_cut_short_says_what_to_delete(tmp_path, scores, text):
    write_run(tmp_path, scores)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json .*; rename or delete it to go on"):
        write_report(tmp_path)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_part_of_the_scores_changed_to_anything(data):
    """A report, of which only the drawing is left out, or one line."""
    value = fake_scores(FIVE[:2], ("shared",), orders=1, seeds=1)
    env = {"commit": "0123", "dirty": True, "command": ["a"], "threads": 2}
    part = data.draw(st.sampled_from([value, value, value, env]))
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(part[key], (dict, list)) or not part[key] or data.draw(st.integers(0, 3)) == 0:
            break
        part = part[key]
    odd = st.sampled_from([None, True, 0, -1, 5, 1.5, 1e300, float("nan"), "", "text", [], {}, [1], [[]], {"a": 1}, [None]])
    part[key] = data.draw(odd)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_panel", lambda caption, figure, warning="": figures.Panel(caption, Markup(""), False, warning))
        (Path(folder) / "scores.json").write_text(json.dumps(value))
        (Path(folder) / "env.json").write_text(json.dumps(env))
        try:
            write_report(folder)
        except UserError as error:
            assert "\n" not in str(error) and ("scores.json" in str(error) or "env.json" in str(error))


@pytest.mark.parametrize("line", ["not json", "[1]", "[" * 100_000, b"\xff"])
def test_a_line_of_the_log_changed_by_hand_is_one_line(tmp_path, scores, line):
    write_run(tmp_path, scores)
    (tmp_path / "log.jsonl").write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match="log.jsonl.*delete (the line|it) to go on"):
        write_report(tmp_path)
