"""A parallel slot-filling corpus generated from a seed, in the scripts of MASSIVE's 52 locales, with two dials.

Utterance i means the same in every locale: a frame (verb, noun) and slot values. Each language has its own words, word order
and adpositions. The dials `overlap` and `relatedness` (see `generate`) separate shared vocabulary from kinship.
So an effect of shared words can be told from an effect of scripts or of related languages.
Everything depends on the seed and on names, never on an order of draws. A locale's sentences do not depend on the other
locales, and both dials are nested: a higher value only adds to what is shared.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

from ..config import Config
from ..errors import UserError
from ..files import shown
from .languages import CHARACTER_LOCALES, LANGUAGES, LOCALES, check_locales

VERSION = 1  # part of a corpus's fingerprint; increment when the same options give other sentences

MOST = 100_000  # utterances of a locale and partition; MASSIVE has 11,514 for training
FALSE_FRIENDS = 0.6  # share of the pairs of shared words whose two meanings each language may swap
SEGMENTED = 0.3  # share of th-TH, km-KH and my-MM utterances with spaces between all words

# consonants (16) and vowels (5), or 80 syllables; every letter is stable under NFKC
_SCRIPTS: dict[str, str | tuple[str, str]] = {
    "Latin": ("ptkbdgmnsrlvhzfj", "aeiou"),
    "Cyrillic": ("пткбдгмнсрлвхзфж", "аеиоу"),
    "Greek": ("πτκβδγμνσρλξχζφψ", "αειου"),
    "Armenian": ("պտկբդգմնսրլվհզֆժ", "աեիօը"),
    "Georgian": ("პტკბდგმნსრლვხზფჟ", "აეიოუ"),
    "Hebrew": ("פטקבדגמנסרלשהזצח", "אעיוכ"),
    "Arabic": ("بتكدقغمنسرلشحزفج", "اهيوع"),
    "Devanagari": ("पटकबदगमनसरलवहजफच", "ािेोु"),
    "Bengali": ("পতকবদগমনসরলচহজফশ", "ািেোু"),
    "Tamil": ("கஙசஞடணதநபமயரலவழள", "ாெிொு"),
    "Telugu": ("పటకబదగమనసరలవహజఫచ", "ాెిొు"),
    "Kannada": ("ಪಟಕಬದಗಮನಸರಲವಹಜಫಚ", "ಾೆಿೊು"),
    "Malayalam": ("പടകബദഗമനസരലവഹജഫച", "ാെിൊു"),
    "Khmer": ("បតកដគមនសរលវហចជផថ", "ាេិោុ"),
    "Myanmar": ("ပတကဗဒဂမနသရလဝဟဇဖစ", "ာေိုူ"),
    "Thai": ("ปตกบดคมนสรลวหซฟจ", "าะิอุ"),
    "Ethiopic": "".join(chr(0x1200 + 8 * row + vowel)
                        for row in (1, 3, 5, 6, 7, 8, 12, 14, 18, 19, 21, 25, 27, 30, 32, 33)
                        for vowel in (3, 4, 2, 6, 1)),
    "Hangul": "".join(chr(0xAC00 + 588 * c + 28 * v) for c in range(16) for v in (0, 5, 20, 8, 13)),
    "Japanese": "かきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもらりるれろ"
                "がぎぐげござじずぜぞだぢづでどばびぶべぼぱぴぷぺぽ山川田人日月火水木金土本中大小上下左右年",
    "Han": "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要"
           "下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主",
}  # fmt: skip
_TRADITIONAL = str.maketrans("这来国个说们为时会着过学对里后么没于还发当无开", "這來國個說們為時會著過學對裡後麼沒於還發當無開")
_ACCENTS = "áàâäåæéèêëíîïóôöøúùûüāēīōūăőűọẹ"  # the vowels of Latin endings, some per language

# families' positions of the verb ("second": after the first phrase) and the adposition; the seed decides the rest
_ORDER = dict.fromkeys(
    ("Turkic", "Dravidian", "Indo-Aryan", "Japonic", "Koreanic", "Mongolic", "Tibeto-Burman"), ("last", "after")
)
_ORDER |= {"Uralic": ("second", "after"), "Kartvelian": ("last", "after"), "Armenian": ("second", "after"),
           "Iranian": ("last", "before"), "Celtic": ("first", "before"), "Semitic": ("first", "before"),
           "Sinitic": ("second", "before")}  # fmt: skip

_POOLS = {
    "number": 8, "hour": 1, "daypart": 3, "weekday": 6, "day": 3, "month": 4, "next": 1, "new": 1,
    "name": 8, "surname": 6, "place": 8, "shop": 3, "word": 8, "food": 7, "weather": 5, "colour": 5,
    "event": 6, "device": 5, "room": 4, "vehicle": 4, "currency": 5,
}  # fmt: skip
_MARKERS = ("at", "on", "in", "from", "to", "by", "with", "about")
_FUNCTION = ("please", "now", "the", "me")

# slot -> forms of a value: word order, and the pools of its words
_VALUES = {
    "time": (("unit", "number hour"), ("unit", "number hour"), ("plain", "daypart")),
    "date": (("plain", "weekday"), ("plain", "day"), ("modifier", "next weekday"), ("unit", "number month")),
    "place_name": (("plain", "place"), ("plain", "place"), ("modifier", "new place")),
    "person": (("plain", "name"),),
    "artist_name": (("plain", "name surname"), ("plain", "name")),
    "song_name": (("plain", "word word"), ("plain", "word"), ("modifier", "colour word")),
    "business_name": (("modifier", "surname shop"), ("modifier", "place shop"), ("plain", "surname")),
    "food_type": (("plain", "food"), ("modifier", "colour food"), ("plain", "food")),
    "weather_descriptor": (("plain", "weather"),),
    "color_type": (("plain", "colour"),),
    "event_name": (("plain", "event"), ("modifier", "new event")),
    "device_type": (("plain", "device"),),
    "house_place": (("plain", "room"),),
    "transport_type": (("plain", "vehicle"),),
    "currency_name": (("plain", "currency"),),
}
# verb, noun, slots: marker:slot, "?" if optional
_FRAMES: tuple[tuple[str, str | None, str], ...] = (
    ("wake", "alarm", "at:time on:date?"),
    ("cancel", "alarm", "at:time"),
    ("play", "song", ":song_name by:artist_name?"),
    ("play", "music", "by:artist_name in:house_place?"),
    ("tell", "weather", ":weather_descriptor in:place_name? on:date"),
    ("tell", "weather", "in:place_name on:date?"),
    ("add", "calendar", ":event_name with:person? on:date at:time?"),
    ("remind", "calendar", "about:event_name on:date? at:time"),
    ("tell", "calendar", "with:person on:date"),
    ("send", "message", "to:person about:event_name?"),
    ("call", None, "to:person at:time?"),
    ("turn", "light", ":color_type in:house_place"),
    ("turn", None, ":device_type in:house_place? at:time?"),
    ("order", None, ":food_type from:business_name at:time?"),
    ("find", "recipe", "with:food_type"),
    ("book", "ticket", "by:transport_type from:place_name to:place_name on:date?"),
    ("find", "way", "from:place_name? to:business_name by:transport_type?"),
    ("find", None, ":business_name in:place_name"),
    ("add", "list", ":food_type :device_type?"),
    ("tell", "price", "in:currency_name from:currency_name?"),
    ("tell", "news", "about:place_name"),
    ("tell", "joke", ""),
    ("stop", "music", ""),
)  # fmt: skip
_WORDS = tuple(dict.fromkeys([f[0] for f in _FRAMES] + [f[1] for f in _FRAMES if f[1]]))
_STRATA = ((*_MARKERS, *_FUNCTION), _WORDS, tuple(f"{pool} {i}" for pool, size in _POOLS.items() for i in range(size)))


T = TypeVar("T")
Chunk = tuple[str | None, tuple[str, ...]]  # slot or None, concepts


class Structure(NamedTuple):
    """The grammar of a language: the position of each kind of word."""

    verb: str
    adposition: str
    noun: str
    polite: str
    article: str
    unit: str
    modifier: str
    roles: tuple[str, ...]  # the order of phrases


class Phrase(NamedTuple):
    slot: str
    marker: str
    order: str
    concepts: tuple[str, ...]


class Meaning(NamedTuple):
    verb: str
    noun: str | None
    phrases: tuple[Phrase, ...]
    polite: bool


class Options(NamedTuple):
    """Options of `generate`. train, dev, test: utterances per locale."""

    train: int = 200
    dev: int = 20
    test: int = 60
    overlap: float = Config.overlap
    relatedness: float = Config.relatedness
    seed: int = Config.seed


def generate(locales: Iterable[str], **options: Any) -> Iterator[dict[str, str]]:
    """Generate records of a parallel corpus, locale by locale, with the five keys of MASSIVE that are needed.

    options: see `Options`. The same id means the same in all locales.
    overlap: share of the vocabulary, in [0, 1], that all locales write alike, as one word in Latin letters. It holds for
    function words, for verbs and nouns, and for slot values. No other word is shared: at 0 none, at 1 all.
    The Jaccard index of two vocabularies is overlap / (2 - overlap), whatever their scripts, families or `relatedness`.
    Some shared words are false friends: pairs whose meanings each language may swap.
    relatedness: similarity, in [0, 1], of the languages of a family, apart from whole words. It is the probability that
    a feature is the family's and not the language's own: every choice of grammar (`Structure`), every syllable of a stem, and
    the meaning of every false friend. Words end in the language's own syllable, so cognates stay different words.
    It changes nothing between families. Cognates share substrings within one script only, and some subwords with them.
    Raises UserError for an unknown locale or an option that is unknown or out of range.
    """
    train, dev, test, overlap, relatedness, seed = check_options(**options)
    locales = check_locales(locales)
    meanings = [_meaning(random.Random(f"{seed} meaning {i}")) for i in range(train + dev + test)]
    partitions = ["train"] * train + ["dev"] * dev + ["test"] * test
    for locale in locales:
        lexicon, grammar = _lexicons(overlap, relatedness, seed)[locale], structure(locale, relatedness, seed)
        for i, (meaning, partition) in enumerate(zip(meanings, partitions, strict=True)):
            chunks = [(slot, [lexicon[c] for c in concepts]) for slot, concepts in _linearise(meaning, grammar)]
            utt, annot_utt = _write(chunks, locale, _uniform(seed, "segmented", locale, i) < SEGMENTED)
            yield {"id": str(i), "locale": locale, "partition": partition, "utt": utt, "annot_utt": annot_utt}


def check_options(**options: Any) -> Options:
    """Return all options, defaults included. Raises UserError for an unknown or wrong one."""
    if unknown := [name for name in options if name not in Options._fields]:
        allowed = ", ".join(Options._fields)
        raise UserError(f"unknown option {shown(', '.join(unknown))} of the synthetic corpus; allowed: {allowed}")
    checked = Options(**options)
    for name, value, minimum in (("train", checked.train, 1), ("dev", checked.dev, 0), ("test", checked.test, 0)):
        if not isinstance(value, int) or not minimum <= value <= MOST:
            raise UserError(
                f"synthetic {name} must be a whole number, at least {minimum} and at most {MOST:,}, not {shown(value)}"
            )
    for name, dial in (("overlap", checked.overlap), ("relatedness", checked.relatedness)):
        if not isinstance(dial, int | float) or not 0 <= dial <= 1:
            raise UserError(f"synthetic {name} must lie in [0, 1], not {shown(dial)}")
    if not isinstance(checked.seed, int):
        raise UserError(f"synthetic seed must be a whole number, not {shown(checked.seed)}")
    return checked


def structure(locale: str, relatedness: float, seed: int) -> Structure:
    """Return the grammar of a locale: its family's at relatedness 1, its own at 0."""
    family = LANGUAGES[locale].family

    def owner(name: str) -> str:
        return family if _uniform(seed, "structure", locale, name) < relatedness else locale

    def pick(name: str, *options: str) -> str:
        return options[int(_uniform(seed, owner(name), name) * len(options))]

    verb, adposition = pick("verb", "first", "second", "last"), pick("adposition", "before", "after")
    if owner("verb") == family:
        verb = _ORDER.get(family, ("second", "before"))[0]
    if owner("adposition") == family:
        adposition = _ORDER.get(family, ("second", "before"))[1]
    return Structure(
        verb=verb,
        adposition=adposition,
        noun=pick("noun", "first", "last"),
        polite=pick("polite", "first", "last"),
        article=pick("article", "before", "after"),
        unit=pick("unit", "before", "after"),
        modifier=pick("modifier", "before", "after"),
        roles=tuple(sorted(("", *_MARKERS), key=lambda role: _uniform(seed, owner(f"role {role}"), "role", role))),
    )


def _uniform(*key: object) -> float:
    """Return a number in [0, 1) that depends on the key only, not on the machine or version."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest()) / 2**48


def _meaning(rng: random.Random) -> Meaning:
    def pick(options: Sequence[T]) -> T:
        return options[int(rng.random() * len(options))]

    verb, noun, roles = pick(_FRAMES)
    phrases = []
    for role in roles.split():
        if role.endswith("?") and rng.random() < 0.5:
            continue
        marker, slot = role.rstrip("?").split(":")
        order, pools = pick(_VALUES[slot])
        concepts = tuple(f"{pool} {int(rng.random() * _POOLS[pool])}" for pool in pools.split())
        phrases.append(Phrase(slot, marker, order, concepts))
    return Meaning(verb, noun, tuple(phrases), rng.random() < 0.5)


def _linearise(meaning: Meaning, grammar: Structure) -> list[Chunk]:
    """Return (slot or None, concepts) in the language's order."""

    def attach(item: T, position: str, items: list[T]) -> list[T]:
        return [item, *items] if position in ("first", "before") else [*items, item]

    phrases: list[list[Chunk]] = []
    for phrase in sorted(meaning.phrases, key=lambda p: grammar.roles.index(p.marker)):
        concepts = phrase.concepts
        if (phrase.order, "after") in (("unit", grammar.unit), ("modifier", grammar.modifier)):
            concepts = concepts[::-1]
        chunks: list[Chunk] = [(phrase.slot, concepts)]
        phrases.append(attach((None, (phrase.marker,)), grammar.adposition, chunks) if phrase.marker else chunks)
    if meaning.noun:
        noun: list[Chunk] = attach((None, ("the",)), grammar.article, [(None, (meaning.noun,))])
        phrases = attach(noun, grammar.noun, phrases)
    phrases.insert({"first": 0, "second": 1, "last": len(phrases)}[grammar.verb], [(None, (meaning.verb,))])
    if meaning.polite:
        phrases = attach([(None, ("please",))], grammar.polite, phrases)
    length = sum(len(concepts) for chunks in phrases for _, concepts in chunks)
    for filler in ("me", "now")[: max(0, 4 - length)]:
        phrases = attach([(None, (filler,))], grammar.polite, phrases)
    return [chunk for chunks in phrases for chunk in chunks]


@cache
def _lexicons(overlap: float, relatedness: float, seed: int) -> dict[str, dict[str, str]]:
    """Return locale -> concept -> written form. Makes all 52 at once, so that no two words are equal by chance."""
    used: set[str] = set()

    def fresh(write: Callable[..., str], *key: object) -> str:
        form = next(form for form in (write(seed, *key, attempt) for attempt in range(1000)) if form not in used)
        used.add(form)
        return form

    lexicons: dict[str, dict[str, str]] = {locale: {} for locale in LOCALES}
    for stratum in _STRATA:
        order = sorted(stratum, key=lambda concept: _uniform(seed, "loan", concept))
        loans = order[: round(overlap * len(order))]
        forms = {concept: fresh(_loan, concept) for concept in loans}
        for lexicon in lexicons.values():
            lexicon |= forms
        for first, second in zip(loans[::2], loans[1::2], strict=False):
            if _uniform(seed, "friends", first) >= FALSE_FRIENDS:
                continue
            for locale, lexicon in lexicons.items():
                kin = _uniform(seed, "friends kin", locale, first) < relatedness
                if _uniform(seed, "swap", LANGUAGES[locale].family if kin else locale, first) < 0.5:
                    lexicon[first], lexicon[second] = forms[second], forms[first]
    for locale, lexicon in lexicons.items():
        for stratum in _STRATA:
            for concept in stratum:
                if concept not in lexicon:
                    lexicon[concept] = fresh(_native, locale, concept, relatedness)
    return lexicons


def _loan(seed: int, concept: str, attempt: int) -> str:
    syllables = [int(_uniform(seed, "loan", concept, attempt, i) * 80) for i in range(3)]
    return "".join(_SCRIPTS["Latin"][0][s // 5] + _SCRIPTS["Latin"][1][s % 5] for s in syllables)


def _native(seed: int, locale: str, concept: str, relatedness: float, attempt: int) -> str:
    """Write a word: a stem, each syllable the family's or the language's own, and one of three endings.

    Where each character is a word to label, a function word has one character, any other word two: stem and ending.
    attempt: 0, then counts the forms already in use; later attempts take nothing from the family.
    """
    language = LANGUAGES[locale]

    def stem(i: int) -> int:
        kin = attempt == 0 and _uniform(seed, "stem kin", locale, concept, i) < relatedness
        return int(_uniform(seed, "stem", language.family if kin else locale, concept, i, attempt) * 80)

    letters, function = _SCRIPTS[language.script], concept in _STRATA[0]
    if locale in CHARACTER_LOCALES:
        own = int(_uniform(seed, "second", locale, concept, attempt) * 80)
        text = letters[stem(0)] + ("" if function else letters[own])
        return text.translate(_TRADITIONAL) if locale == "zh-TW" else text
    syllables = [stem(0)] if function else [stem(0), stem(1)]
    kind = int(_uniform(seed, "kind", locale, concept) * 3)
    syllables.append(int(_uniform(seed, "ending", locale, kind) * 80))
    if isinstance(letters, str):
        return "".join(letters[s] for s in syllables)
    text = "".join(letters[0][s // 5] + letters[1][s % 5] for s in syllables)
    if language.script == "Latin":
        text = text[:-1] + _ACCENTS[int(_uniform(seed, "accent", locale, kind) * len(_ACCENTS))]
    return text


def _write(chunks: Sequence[tuple[str | None, list[str]]], locale: str, segmented: bool) -> tuple[str, str]:
    """Return (utt, annot_utt) of chunks (slot or None, words), spaced as MASSIVE spaces them in this locale."""
    spans: list[tuple[str | None, list[str]]] = []
    for slot, words in chunks:
        if slot is None and spans and spans[-1][0] is None:
            spans[-1][1].extend(words)
        else:
            spans.append((slot, list(words)))
    glued = not LANGUAGES[locale].spaced and (locale in CHARACTER_LOCALES or not segmented)
    texts = [_glue(words, locale in CHARACTER_LOCALES) if glued else " ".join(words) for _, words in spans]
    annot_utt = " ".join(text if slot is None else f"[{slot} : {text}]" for (slot, _), text in zip(spans, texts, strict=True))
    if locale in CHARACTER_LOCALES:
        return _glue(texts, True), annot_utt
    return " ".join(texts), annot_utt


def _glue(words: list[str], tight: bool) -> str:
    """Join words, with spaces only between two Latin words or, if not `tight`, around each Latin word."""
    text = words[0]
    for before, word in zip(words, words[1:], strict=False):
        latin = (before[-1].isascii(), word[0].isascii())
        text += " " * (all(latin) if tight else any(latin)) + word
    return text
