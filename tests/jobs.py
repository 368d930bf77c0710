"""Jobs of several processes as torchrun starts them, forked from one that has imported everything. Run as a program by tests."""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from toy import ToyCorpus, toy_model

from kloss.cl.learner import Learner
from kloss.cl.probes import Probe, State
from kloss.cl.rules import OLoRA
from kloss.cl.rundir import open_run
from kloss.cl.runner import train_study
from kloss.cl.shares import Limits, costs_of, stages
from kloss.cl.study import Study
from kloss.config import Config
from kloss.console import Silent
from kloss.processes import ProcessLost, started

FIRST = Learner(experiences=(("aa",), ("bb",)), rank=2, alpha=2.0, lr=1e-2, seed=1, epochs=2, batch_size=4, dropout=0.1)
ALONE = tuple(replace(FIRST, experiences=((m,),), seed=seed, rank=seed) for seed, m in ((3, "aa"), (4, "bb"), (5, "cc")))
LEARNERS = (
    FIRST,
    Learner(experiences=(("cc",),), rank=3, alpha=3.0, lr=1e38, seed=2, epochs=2, batch_size=4),  # diverges at step 2
    *ALONE,
    replace(FIRST, experiences=(("cc",), ("aa", "bb")), seed=6, epochs=3, rule=OLoRA(1.0)),
    replace(FIRST, experiences=(("cc",),), start=(FIRST, 1)),
    replace(FIRST, method="ia3", seed=9),
    replace(FIRST, method="fusion", donors=((ALONE[0], 1), (ALONE[2], 1))),
    *(Learner(experiences=(("aa",), ("cc",)), rank=None, alpha=1.0, lr=1e-2, seed=n, epochs=1, batch_size=6) for n in (7, 8)),
)
LOCALES = ["aa", "bb", "cc"]
TO_SCORE = [{i: LOCALES for i in range(len(learner.experiences) + 1)} for learner in LEARNERS]
PROBES = tuple(
    ("made", Probe(lambda rows, slots, part: rows[0], (State(learner, experience),), "", locale, {}))
    for learner, experience in ((0, 1), (0, 2), (1, 1), (5, 1), (2, 1))
    for locale in LOCALES
)
STUDY = Study([], list(LEARNERS), TO_SCORE, PROBES)


def train(folder: Path, config: Config) -> int:
    """A process of a run. Returns its exit status."""
    try:
        with started() as processes:
            with processes.first():
                opened = open_run(folder, {"exact": config.exact}, processes.rank, processes.number)
                run = opened.__enter__()
            corpus = ToyCorpus()
            costs = costs_of(STUDY, corpus, "cpu")
            plan = stages(STUDY, Limits(config.max_learners, exact=config.exact), costs, processes.number)
            slow = processes.number > 1 and 0 in plan[0].shares[processes.rank].cohorts[0]

            def load(_):
                time.sleep(0.5 * slow)  # a fork that does not wait for learner 0 comes too early
                return toy_model()

            outcome = train_study(config, corpus, STUDY, load, run, Silent(), processes, plan)
            if processes.rank == 0:
                (folder / "outcome.json").write_text(json.dumps(outcome))
            processes.wait()
    except ProcessLost:
        return 3
    except KeyboardInterrupt:
        return 128
    return 0


def start(number: int, work: Callable[[], int]) -> list[int]:
    """The process ids of a job of so many, each of which does the work and exits with what it returns."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            if number > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "job"}
                os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
            status = 70
            try:
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return children


def ends(children: list[int]) -> list[int]:
    """Their exit statuses; if one is not 0, the others get torchrun's signal."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child]:
            for other in set(children) - statuses.keys():
                os.kill(other, signal.SIGTERM)
    return [statuses[child] for child in children]


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill a process of one to three at so many moments, going on each time with one to three; print kills and runs."""
    torch.set_num_threads(1)
    config, chance = (
        Config(exact=True, checkpoint_seconds=0, save_adapters=True, max_learners=4, slot_counts=True),
        random.Random(seed),
    )
    lengths = []
    for number in (1, 2, 3):
        began = time.monotonic()
        assert ends(start(number, partial(train, folder / f"whole-{number}", config))) == [0] * number
        lengths.append(time.monotonic() - began)
    killed, runs = 0, 0
    while killed < kills:
        out, number = folder / f"killed-{runs}", 3
        while not (out / "outcome.json").exists():
            children = start(number, partial(train, out, config))
            if killed < kills:
                time.sleep(chance.uniform(0.1, 0.9) * lengths[number - 1])
                os.kill(chance.choice(children), signal.SIGKILL)  # a zombie, if it has ended
            statuses = ends(children)
            was_killed = -signal.SIGKILL in statuses
            assert was_killed or statuses == [0] * number, statuses
            killed, number = killed + was_killed, chance.choice((1, 2, 3))
        runs += 1
    print(killed, runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
