"""The report on made-up runs: what it must cope with, what it must say, that it needs nothing else."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from kloss.cl import metrics
from kloss.cl.languages import LANGUAGES, LOCALES
from kloss.cl.statistics import crossed_interval
from kloss.cl.summary import summary_rows
from kloss.errors import UserError
from kloss.report import write_report
from kloss.report.sections import count

FIVE = ("en-US", "de-DE", "ru-RU", "ja-JP", "ar-SA")
TWELVE = (*FIVE, "es-ES", "hi-IN", "th-TH", "zh-CN", "tr-TR", "ko-KR", "fr-FR")
VOID = {"meta", "br", "path", "image", "use", "rect"}


def fake_R(strategy, order, seed):
    """A score matrix such as the study finds: shared learners forget, most under another writing."""
    rng = np.random.default_rng([seed, len(order), len(strategy)])
    T = len(order)
    if strategy in ("multi", "lora-multi"):
        return np.stack([np.full(T, 0.01), 0.72 - 0.2 * np.array([not LANGUAGES[m].spaced for m in order])])
    latin = np.array([LANGUAGES[m].script == "Latin" for m in order])
    learned = np.where(latin, 0.68, 0.58) - 0.15 * np.array([not LANGUAGES[m].spaced for m in order])
    near = np.where(latin[:, None] == latin[None, :], 0.75, 0.45)  # share that a learner of i reaches on j
    rate = {"shared": 1.0, "vanilla": 0.8, "partial": 0.5}.get(strategy, 0.0)
    R = np.full((T + 1, T), 0.01)
    for i in range(T):
        hops = i - np.arange(T)
        kept = 1 - rate * (1 - near[i]) * (1 - np.exp(-np.maximum(hops, 0) / (0.3 * T)))
        R[i + 1] = np.where(hops >= 0, learned * kept, learned * near[i] * 0.8)
    noise = rng.normal(0, 0.012, R.shape) * (R > 0.05)
    if not rate:  # an adapter alone does not change again
        noise = np.where(np.tri(T + 1, T, -1), np.diagonal(noise[1:]), noise)
    return np.clip(R + noise, 0, 1)


def fake_run(strategy, order, *, order_name="Order 1", seed=0, label=None, R=None):
    R = fake_R(strategy, order, seed) if R is None else R
    return {
        "strategy": strategy,
        "label": label or f"{strategy.upper()} r=8",
        "rank": 8,
        "lr": 2e-3,
        "order": list(order),
        "order_name": order_name,
        "seed": seed,
        "groups": None,
        "diverged": None,
        "trainable_parameters": 1_300_000,
        "steps": 4000,
        "R": np.array(R, dtype=object).tolist(),
        "metrics": metrics.summarise(R),
    }


def fake_scores(locales=FIVE, strategies=("non-shared", "shared", "multi"), orders=3, seeds=3, runs=None):
    if runs is None:
        shuffled = [np.random.default_rng(o).permutation(locales).tolist() for o in range(orders)]
        runs = [
            fake_run(strategy, shuffled[o], order_name=f"Order {o + 1}", seed=seed)
            for strategy in strategies
            for o in range(orders)
            for seed in range(seeds)
        ]
    return {
        "format": 1,
        "name": "tiny synthetic",
        "runs": runs,
        "summary": [],
        "corpus": {
            "name": "synthetic",
            "locales": list(locales),
            "labels": 111,
            "train_utterances": dict.fromkeys(locales, 400),
            "test_utterances": dict.fromkeys(locales, 300),
            "truncated": dict.fromkeys(locales, 0),
            "tokens_per_word": {m: 1.2 + 0.04 * n for n, m in enumerate(locales)},
        },
        "backbone": {"name": "tiny", "parameters": 3_100_000, "layers": 4, "hidden": 128, "vocabulary": 8000},
        "choices": ["Batch 32.", "AdamW, weight decay 0.01, clip 1.", "A head per learner."],
    }


def fake_log(steps=300):
    for n, phase in enumerate(("warm-up", "lora")):
        for step in range(1, steps + 1):
            yield {
                "time": 1e9 + 1000 * n + step,
                "phase": phase,
                "step": step,
                "loss": 3 / (1 + step / (40 + 20 * n)),
                "tokens_per_second": 20000 + 500 * (step % 5) + 9000 * n,
            }


def write_run(folder, scores):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores, allow_nan=False), encoding="utf-8")
    config = {"preset": "tiny", "optimiser": {"lr": 2e-3, "betas": [0.9, 0.999]}}
    (folder / "config.json").write_text(json.dumps(config))
    env = {"commit": "0123456789abcdef", "dirty": True, "command": "python -m kloss.run --seeds 3"}
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in fake_log()))
    return folder


def report(folder, scores):
    return write_report(write_run(folder, scores)).read_text(encoding="utf-8")


def text_of(html):
    """What a reader sees of a piece of HTML, spaces squeezed."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def headline(html):
    return text_of(re.search("(?s)<h1>.*?</h1>", html)[0]).strip()


class Balance(HTMLParser):
    """Asserts that every tag that opens also closes, in turn."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("locales", [FIVE, TWELVE, LOCALES], ids=len)
def test_is_one_file_that_needs_nothing_else(tmp_path, locales):
    strategies = ("non-shared", "shared", "lora-multi")
    html = report(tmp_path, fake_scores(locales, strategies, orders=1, seeds=2))
    tags = Balance(html)
    assert len(tags.ids) == len(set(tags.ids))
    assert "<script" not in html and "@import" not in html and "<link" not in html
    addresses = re.findall(r"""(?:href|src)=["']([^"']*)|url\(([^)]*)\)""", html)
    assert all(a.startswith(("#", "data:")) for pair in addresses for a in pair if a)
    assert not re.search(r"#00000[123]\b", html), "a stand-in colour was not replaced"
    for title in (
        "Results",
        "Beside the paper",
        "Along the sequence",
        "Score matrices",
        "Languages",
        "By script",
        "Training",
        "Choices and setting",
        "Configuration",
        "Environment",
    ):
        assert title in html
    for locale in locales:  # readable text on the heat maps, not only in the table
        assert len(re.findall(rf"<text[^>]*>{locale}</text>", html)) >= 6
    assert ('<figure class="full">' in html) == (len(locales) == 52)


def test_headline_says_who_lost_and_how_much(tmp_path):
    kept = [[0, 0, 0], [0.8, 0, 0], [0.8, 0.6, 0], [0.8, 0.6, 0.5]]
    lost = [[0, 0, 0], [0.8, 0, 0], [0.6, 0.6, 0], [0.4, 0.4, 0.5]]
    worse = [[0, 0, 0], [0.8, 0, 0], [0.6, 0.6, 0], [0.2, 0.4, 0.5]]
    order = FIVE[:3]
    runs = [fake_run("non-shared", order, R=kept), fake_run("shared", order, R=lost)]
    html = report(tmp_path, fake_scores(order, runs=runs))
    assert headline(html) == (
        "NON-SHARED r=8 ends at 0.63 F1, SHARED r=8 at 0.43: 0.20 apart. "
        "SHARED r=8 lost 0.30 F1 on the languages it had learned earlier."
    )
    runs += [fake_run("shared", order, R=worse, seed=1), fake_run("non-shared", order, R=kept, seed=1)]
    html = report(tmp_path, fake_scores(order, runs=runs))
    assert headline(html) == (
        "NON-SHARED r=8 ends at 0.63 F1, SHARED r=8 at 0.40: 0.23 apart (−0.19 to 0.66) . "
        "SHARED r=8 lost 0.35 F1 (−0.29 to 0.99) on the languages it had learned earlier."
    )
    assert "Do groups of languages differ? SHARED r=8" in html
    en, de, ru = (re.search(rf"(?s)<td>{m} .*?</tr>", html)[0] for m in order)
    assert [text_of(row).split()[-6:] for row in (en, de, ru)] == [
        ["0.800", "–", "–", "0.300", "−0.500", "0.375"],
        ["0.600", "–", "–", "0.400", "−0.200", "0.667"],
        ["0.500", "–", "–", "0.500", "–", "–"],
    ]
    gained = [[0, 0], [0.5, 0], [0.6, 0.5]]
    html = report(tmp_path, fake_scores(FIVE[:2], runs=[fake_run("shared", FIVE[:2], R=gained)]))
    assert headline(html) == "SHARED r=8 reached 0.55 F1. SHARED r=8 gained 0.10 F1 on the languages it had learned earlier."
    assert "For SHARED r=8, which has the lowest CBT" in html  # it gained: nothing was forgotten
    gained[2][0], gained[1][0] = 0.107, 0.1
    html = report(tmp_path, fake_scores(FIVE[:2], runs=[fake_run("shared", FIVE[:2], R=gained)]))
    assert "SHARED r=8 gained 0.01 F1" in headline(html)


def test_what_is_so_by_construction_is_no_finding(tmp_path):
    """NON-SHARED gained less than SHARED, so its charts of changes that cannot be were drawn, empty."""
    order, gained = FIVE[:3], [[0, 0, 0], [0.5, 0, 0], [0.6, 0.5, 0], [0.6, 0.6, 0.5]]
    runs = [fake_run("non-shared", order, seed=seed) for seed in range(6)] + [fake_run("shared", order, R=gained)]
    html = report(tmp_path, fake_scores(order, runs=runs))
    row = text_of(re.search(r"(?s)<td>NON-SHARED r=8</td>.*?</tr>", html)[0])
    assert row.count("by construction") == 3 and "0 by construction" in row and "1 by construction" in row
    assert "NON-SHARED r=8 lost" not in text_of(html) and "SHARED r=8 gained 0.10" in headline(html)
    assert "For SHARED r=8, which has the lowest CBT" in html
    assert "0 there by construction: NON-SHARED r=8" in html
    assert len(re.findall('aria-label="CBT: earlier', html)) == 1
    html = report(tmp_path, fake_scores(order, runs=runs[:6]))  # nobody could lose anything: no chart of losses
    assert "No learner was trained on a second language, so none could be lost" in headline(html)
    assert 'aria-label="CBT: earlier' not in html and "F1 at the end minus" not in html and "By script" in html


def test_nothing_learned_stands_before_everything(tmp_path):
    R = np.zeros((6, 5))
    R[1:] = 0.01
    html = report(tmp_path, fake_scores(FIVE, runs=[fake_run("shared", FIVE, R=R)]))
    assert headline(html) == "Nothing was learned , so nothing is known of what was kept or lost."
    body = text_of(html)
    assert body.index("no learner reached 0.05 F1") < body.index("Results")
    runs = [fake_run("shared", FIVE, R=R), fake_run("non-shared", FIVE)]
    html = report(tmp_path, fake_scores(FIVE, runs=runs))
    assert "Nothing was learned" not in html
    assert (
        "SHARED r=8 learned nothing: it never reached 0.05 F1" in html and "At the floor nothing can be lost: SHARED r=8" in html
    )


def test_the_first_screen_says_what_the_run_cannot(tmp_path):
    scores = fake_scores(FIVE, ("non-shared", "shared"), orders=1, seeds=3)
    text = text_of(report(tmp_path, scores))
    top = text[: text.index("Results")]
    assert "One order: how much a language lost or destroyed also depends on its place" in top
    assert "3 seeds: intervals of few values" in top and "which utterances were tested (300 a language)" in top
    assert (
        "Scored on test: settings that were chosen on the same utterances" in top
        and "synthetic" not in top.split("cannot say")[1]
    )
    scores["corpus"] |= {"scored": "dev", "scored_utterances": dict.fromkeys(FIVE, 20), "synthetic": True}
    text = text_of(report(tmp_path, scores))
    top = text[: text.index("Results")]
    assert "Scored on dev: for choosing settings" in top and "(20 a language)" in top and "The corpus is synthetic" in top
    assert "400 training and 20 dev utterances each" in text


def test_the_first_screen_says_what_was_asked_and_found(tmp_path):
    scores = fake_scores(TWELVE, ("non-shared", "shared", "multi"), orders=1, seeds=2)
    for run in scores["runs"]:  # SHARED keeps half of what is Latin, all of what is not
        if run["strategy"] == "shared":
            latin = np.array([LANGUAGES[m].script == "Latin" for m in run["order"]])
            R = np.where(np.tri(13, 12, -1), 0.6 + 0.01 * run["seed"], 0.0)
            R[-1] = np.where(latin, 0.3, 0.6) + np.linspace(0, 0.01, 12)
            R[-1, -1] = 0.6
            run["R"] = R.tolist()
    text = text_of(report(tmp_path, scores))
    top = text[: text.index("Results")]
    assert "Which way of sharing learners leaves most of 12 languages at the end: NON-SHARED r=8, SHARED r=8, MULTI r=8?" in top
    assert re.search(r"SHARED r=8 keeps 0\.8\d of what it had learned of a language \(0\.\d\d to \d\.\d\d\)\.", top)
    assert "NON-SHARED r=8: no learner gets a second language, so nothing can be lost." in top
    assert "8 tests at 0.05 without correction, differ in" in top and "not Latin against Latin in the share kept (+0.50)" in top
    scores["runs"] = [fake_run("shared", FIVE[:3])]
    assert "Scripts and ways of writing" not in text_of(
        report(tmp_path, scores)
    )  # two languages, both Latin, were learned before
    scores["runs"] = [fake_run("shared", FIVE)]
    text = text_of(report(tmp_path, scores))
    assert "differ in none: no evidence that they matter here" in text
    assert "Best on dev" not in text
    scores["runs"] += [fake_run("shared", FIVE, label="SHARED r=16", R=np.full((6, 5), 0.9))]
    scores["corpus"] |= {"scored": "dev", "scored_utterances": dict.fromkeys(FIVE, 20)}
    top = text_of(report(tmp_path, scores)).split("Results")[0]
    assert "Best on dev of 2 settings of shared: SHARED r=16, F1 0.900. Run it alone with --eval-split test." in top


def test_languages_and_positions_are_told_apart_with_many_orders(tmp_path):
    few = text_of(report(tmp_path / "few", fake_scores(FIVE, ("shared",), orders=4, seeds=1)))
    assert "cannot be told apart" in few and "3 orders: mostly the place in the order" in few  # two of the four are equal
    many = report(tmp_path / "many", fake_scores(FIVE, ("shared",), orders=8, seeds=1))
    assert "cannot be told apart" not in text_of(many) and "place in the order taken out" in many
    assert "Each language against the average one" in many
    cells = text_of(re.search(r"(?s)<td>de-DE German</td>.*?</tr>", many)[0]).split()
    assert cells[4] == "to" and cells[6:8] == ["t", "6"] and cells.count("t") == 3  # impact, change, share kept
    row = text_of(re.search(r"(?s)<td>impact</td>.*?</tr>", many)[0]).split()
    assert len(row) >= 8 and row[5:8] == ["3", "of", "5:"]


def test_joint_training_alone_has_no_sequence(tmp_path):
    html = report(tmp_path, fake_scores(FIVE, ("multi", "lora-multi"), orders=1))
    assert headline(html).startswith("MULTI r=8 ends at 0.68 F1")
    assert "No two languages were learned one after the other" in headline(html)
    assert "Along the sequence" not in html and "Score matrices" not in html


def test_one_language_and_one_run(tmp_path):
    runs = [fake_run("shared", FIVE[:1], R=[[0.0], [0.5]])]
    html = report(tmp_path, fake_scores(FIVE[:1], runs=runs))
    assert headline(html).startswith("SHARED r=8 reached 0.50 F1")
    assert "1 language of" in html and "1 run ·" in html and " to </span>" not in html


def test_a_diverged_run_is_shown_and_in_no_average(tmp_path):
    scores = fake_scores(FIVE, ("non-shared", "shared"), orders=1, seeds=2)
    clean = summary_rows({**scores, "runs": scores["runs"][:3]})
    broken = scores["runs"][3]
    broken["diverged"] = "loss was not finite at step 812 <of 900>"
    broken["R"][3:] = [[None] * 5] * 3
    row = summary_rows(scores)[1]
    assert row["diverged"] == 1 and row["runs"] == 2 and row["f1"] == clean[1]["f1"] and row["f1_low"] is None
    html = report(tmp_path, scores)
    assert "1 diverged" in html and "812 &lt;of 900&gt;" in html
    scores["runs"][2]["diverged"] = "too"  # all of SHARED
    html = report(tmp_path, scores)
    text = headline(html)  # nobody who could lose was measured
    assert text.startswith("NON-SHARED r=8 reached 0.59") and "What was lost is not known" in text and text.count("r=8") == 1
    scores["runs"] += [fake_run("multi", FIVE)]
    for run in scores["runs"][:4]:
        run["diverged"] = "all"
    text = headline(report(tmp_path, scores))  # languages were learned one after the other, but nobody knows how it ended
    assert text.startswith("MULTI r=8 reached 0.68 F1. What was lost is not known") and "No two languages" not in text
    scores["runs"][4]["diverged"] = "all"
    assert headline(report(tmp_path, scores)) == "Every run diverged: there is nothing to compare."


def test_orders_of_diverged_runs_do_not_count(tmp_path):
    runs = [fake_run("shared", FIVE), fake_run("shared", FIVE[::-1], order_name="Order 2")]
    assert "All runs share one order" not in report(tmp_path, fake_scores(FIVE, runs=runs))
    runs[1]["diverged"] = "loss nan"
    assert "All runs share one order" in report(tmp_path, fake_scores(FIVE, runs=runs))


def test_cells_not_measured_and_locales_not_known(tmp_path):
    order = ("en-US", "xx-XX", "ja-JP", "ar-SA")
    R = np.tril(np.full((5, 4), 0.5), -1).astype(object)
    R[0], R[2] = None, None
    html = report(tmp_path, fake_scores(order, runs=[fake_run("shared", order, R=R)]))
    assert "unknown" in html and "nan" not in text_of(html).lower().split()


def test_many_strategies_and_rates(tmp_path):
    runs = [fake_run("shared", FIVE, label=f"SHARED r={2**n}", seed=n) for n in range(6)]
    runs.append({**runs[0], "lr": 1e-4})
    html = report(tmp_path, fake_scores(FIVE, runs=runs))
    assert "SHARED r=1, lr 0.002" in html and "SHARED r=1, lr 0.0001" in html and "1 more" in html


def test_names_are_text_not_markup(tmp_path):
    runs = [fake_run("shared", FIVE, label="<b onclick='x'>&\\1\"$x$", seed=s) for s in range(2)]
    scores = fake_scores(FIVE, runs=runs)
    scores["name"], scores["choices"] = "<i>name</i>", ["<script>alert(1)</script>"]
    html = report(tmp_path, scores)
    Balance(html)
    assert "onclick='" not in html and "<script" not in html and "<title>&lt;i&gt;name" in html
    order = ("en-US", "<s>xx</s>", "ja-JP")
    html = report(tmp_path, fake_scores(order, runs=[fake_run("shared", order, R=fake_R("shared", FIVE[:3], 0))]))
    Balance(html)
    assert "<s>" not in html and "<td>&lt;s&gt;xx&lt;/s&gt; </td>" in html


def test_every_name_of_a_file_is_escaped(tmp_path):
    bad = "<script>&'\""
    scores = fake_scores(FIVE, runs=[fake_run("shared", FIVE, order_name=bad, seed=s) for s in range(3)])
    scores["runs"][2] |= {"diverged": bad, "order_name": "Order 2"}
    scores["corpus"]["name"] = scores["backbone"]["name"] = bad
    write_run(tmp_path, scores)
    (tmp_path / "config.json").write_text(json.dumps({bad: {bad: bad}}))
    (tmp_path / "env.json").write_text(json.dumps({"commit": bad, "command": [bad, bad]}))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"phase": bad, "step": n, "loss": 1.0}) + "\n" for n in range(3)))
    html = write_report(tmp_path).read_text()
    Balance(html)
    assert "<script" not in html and len(re.findall("&lt;script&gt;&amp;&#39;&#34;", html)) >= 15


def test_a_report_needs_no_torch():
    program = "import sys, kloss.report; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_levels_compare_only_with_the_same_backbone_and_corpus(tmp_path):
    scores = fake_scores(LOCALES, ("lora-multi",), orders=1, seeds=1)
    assert "Levels do not compare" in report(tmp_path, scores)
    scores["corpus"]["name"] = "MASSIVE 1.1"
    assert "Levels do not compare" in report(tmp_path, scores)
    scores["backbone"] = {
        "name": "xlm-roberta-base",
        "parameters": 278e6,
        "layers": 12,
        "hidden": 768,
        "vocabulary": 250002,
    }
    assert "52 languages with 400 training and 300 test utterances each" in text_of(report(tmp_path, scores))  # --limit
    scores["corpus"] |= {"train_utterances": dict.fromkeys(LOCALES, 11514), "test_utterances": dict.fromkeys(LOCALES, 2974)}
    html = report(tmp_path, scores)
    assert "Levels do not compare" not in html and "not measured here" in html and "75.03" in html
    scores["corpus"]["test_utterances"]["ja-JP"] = 60
    assert "11514 training and 60–2974 test utterances" in text_of(report(tmp_path, scores))


def test_files_beside_the_scores_may_be_missing_or_cut_short(tmp_path):
    write_run(tmp_path, fake_scores(strategies=("multi",)))
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"time": 1, "pha')
    assert "Training" in write_report(tmp_path).read_text()
    log.write_text("".join(json.dumps({"phase": f"MONO {n}", "step": 1}) + "\n" for n in range(40)))
    assert "Of 40 phases, the 12 with most" in write_report(tmp_path).read_text()
    before = (tmp_path / "report.html").read_bytes()
    for text, words in (
        (b'{"phase": "lora", "step": 1}\nnot json\n', "log.jsonl:2 is not JSON"),
        (b"[1, 2]\n", "log.jsonl:1 holds JSON of type list"),
        (b'{"phase": "\xe9"}\n', "log.jsonl cannot be read"),
    ):
        log.write_bytes(text)
        with pytest.raises(UserError, match=words):
            write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    for name in ("log.jsonl", "config.json", "env.json"):
        (tmp_path / name).unlink()
    assert "Training" not in write_report(tmp_path).read_text()


@pytest.mark.filterwarnings("error")
def test_odd_lines_of_the_log(tmp_path):
    write_run(tmp_path, fake_scores(strategies=("multi",)))
    log = tmp_path / "log.jsonl"
    odd = ("1" * 400, "1" * 5000, "1e400", "-1e400", "1e308", "NaN", "-Infinity", "null", "[1]", '"text"')
    for name in ("loss", "step", "tokens_per_second", "time"):
        good = {"phase": "a\\ud800", "step": 1, "loss": 1.0, "tokens_per_second": 5, "time": 1}
        lines = [
            json.dumps(good).replace(f'"{name}": {json.dumps(good[name])}', f'"{name}": {value}') for value in (*odd, "2", "3")
        ]
        log.write_text("\n".join(lines) + "\n")
        assert "Training" in write_report(tmp_path).read_text()
    for text in ("[" * 100_000, '{"phase": ' + "[" * 100_000):
        log.write_text(text + "\n")
        with pytest.raises(UserError, match="log.jsonl:1 is not JSON"):
            write_report(tmp_path)


def test_time_of_a_phase_that_was_stopped_and_taken_up_again(tmp_path):
    write_run(tmp_path, fake_scores(strategies=("shared",)))
    times = (10, 40, 100, 7, 30, 61, 5)  # each run counts from its own start
    entries = [{"phase": "lora", "step": n, "loss": 1.0, "time": time} for n, time in enumerate(times, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert ">144 s</td>" in write_report(tmp_path).read_text()


def test_scores_missing_or_of_another_format(tmp_path):
    with pytest.raises(UserError, match="scores.json does not exist"):
        write_report(tmp_path)
    (tmp_path / "scores.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="has format 2; only format 1"):
        write_report(tmp_path)


def test_summary_rows_are_means_over_runs_with_their_interval():
    scores = fake_scores(FIVE, ("shared", "multi"), orders=2, seeds=3)
    shared, multi = summary_rows(scores)
    values = [metrics.summarise(run["R"])["cbt"] for run in scores["runs"][:6]]
    assert shared["cbt"] == pytest.approx(np.mean(values)) and shared["orders"] == 2 and shared["seeds"] == 3
    table = {divmod(n, 3): value for n, value in enumerate(values)}  # orders by seeds
    assert (shared["cbt_low"], shared["cbt_high"], shared["cbt_df"]) == crossed_interval(table)
    assert multi["cbt"] is None and multi["cbt_low"] is None and multi["f1"] == pytest.approx(0.68)
    assert json.loads(json.dumps([shared, multi], allow_nan=False)) == [shared, multi]


def test_counts_have_three_digits_and_a_unit():
    assert [count(value) for value in (12, 999, 999_499, 999_500, 1_234_567)] == ["12", "999", "999 k", "1 M", "1.23 M"]
