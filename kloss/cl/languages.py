"""The 52 locales of MASSIVE 1.1, their scripts and families, and ways to group them."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import UserError
from ..files import shown


class Language(NamedTuple):
    """A locale of MASSIVE.

    family: the branch that makes a useful group (Germanic, not Indo-European).
    spaced: whether the orthography puts spaces between words. This is about the language, not the labels: ja-JP, zh-CN and
    zh-TW are labelled per character (`CHARACTER_LOCALES`), but th-TH, km-KH and my-MM per word. MASSIVE puts spaces around
    their slots and, in some utterances, between all words.
    """

    locale: str
    name: str
    script: str
    family: str
    spaced: bool = True


_TABLE = (
    Language("af-ZA", "Afrikaans", "Latin", "Germanic"),
    Language("am-ET", "Amharic", "Ethiopic", "Semitic"),
    Language("ar-SA", "Arabic", "Arabic", "Semitic"),
    Language("az-AZ", "Azerbaijani", "Latin", "Turkic"),
    Language("bn-BD", "Bengali", "Bengali", "Indo-Aryan"),
    Language("ca-ES", "Catalan", "Latin", "Romance"),
    Language("cy-GB", "Welsh", "Latin", "Celtic"),
    Language("da-DK", "Danish", "Latin", "Germanic"),
    Language("de-DE", "German", "Latin", "Germanic"),
    Language("el-GR", "Greek", "Greek", "Hellenic"),
    Language("en-US", "English", "Latin", "Germanic"),
    Language("es-ES", "Spanish", "Latin", "Romance"),
    Language("fa-IR", "Persian", "Arabic", "Iranian"),
    Language("fi-FI", "Finnish", "Latin", "Uralic"),
    Language("fr-FR", "French", "Latin", "Romance"),
    Language("he-IL", "Hebrew", "Hebrew", "Semitic"),
    Language("hi-IN", "Hindi", "Devanagari", "Indo-Aryan"),
    Language("hu-HU", "Hungarian", "Latin", "Uralic"),
    Language("hy-AM", "Armenian", "Armenian", "Armenian"),
    Language("id-ID", "Indonesian", "Latin", "Malayo-Polynesian"),
    Language("is-IS", "Icelandic", "Latin", "Germanic"),
    Language("it-IT", "Italian", "Latin", "Romance"),
    Language("ja-JP", "Japanese", "Japanese", "Japonic", spaced=False),
    Language("jv-ID", "Javanese", "Latin", "Malayo-Polynesian"),
    Language("ka-GE", "Georgian", "Georgian", "Kartvelian"),
    Language("km-KH", "Khmer", "Khmer", "Austroasiatic", spaced=False),
    Language("kn-IN", "Kannada", "Kannada", "Dravidian"),
    Language("ko-KR", "Korean", "Hangul", "Koreanic"),
    Language("lv-LV", "Latvian", "Latin", "Baltic"),
    Language("ml-IN", "Malayalam", "Malayalam", "Dravidian"),
    Language("mn-MN", "Mongolian", "Cyrillic", "Mongolic"),
    Language("ms-MY", "Malay", "Latin", "Malayo-Polynesian"),
    Language("my-MM", "Burmese", "Myanmar", "Tibeto-Burman", spaced=False),
    Language("nb-NO", "Norwegian", "Latin", "Germanic"),
    Language("nl-NL", "Dutch", "Latin", "Germanic"),
    Language("pl-PL", "Polish", "Latin", "Slavic"),
    Language("pt-PT", "Portuguese", "Latin", "Romance"),
    Language("ro-RO", "Romanian", "Latin", "Romance"),
    Language("ru-RU", "Russian", "Cyrillic", "Slavic"),
    Language("sl-SL", "Slovenian", "Latin", "Slavic"),
    Language("sq-AL", "Albanian", "Latin", "Albanian"),
    Language("sv-SE", "Swedish", "Latin", "Germanic"),
    Language("sw-KE", "Swahili", "Latin", "Bantu"),
    Language("ta-IN", "Tamil", "Tamil", "Dravidian"),
    Language("te-IN", "Telugu", "Telugu", "Dravidian"),
    Language("th-TH", "Thai", "Thai", "Tai", spaced=False),
    Language("tl-PH", "Tagalog", "Latin", "Malayo-Polynesian"),
    Language("tr-TR", "Turkish", "Latin", "Turkic"),
    Language("ur-PK", "Urdu", "Arabic", "Indo-Aryan"),
    Language("vi-VN", "Vietnamese", "Latin", "Austroasiatic"),
    Language("zh-CN", "Chinese (simplified)", "Han", "Sinitic", spaced=False),
    Language("zh-TW", "Chinese (traditional)", "Han", "Sinitic", spaced=False),
)

LANGUAGES: dict[str, Language] = {language.locale: language for language in _TABLE}
LOCALES: tuple[str, ...] = tuple(LANGUAGES)
CHARACTER_LOCALES = frozenset({"ja-JP", "zh-CN", "zh-TW"})  # one label per character, as in MASSIVE's own code


def check_locales(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names as a tuple, in the order given, each once.

    Raises UserError for a name that is not one of the 52 locales, with similar ones.
    """
    names = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in names:
        if name not in LANGUAGES:
            raise UserError(f"unknown locale '{shown(name)}'; {_suggestion(name)}")
    return names


def groups(locales: Iterable[str], by: str | Mapping[str, str]) -> dict[str, str]:
    """Return locale -> name of its group.

    by: "script", "family", or a mapping locale -> group with every locale of `locales`.
    Raises UserError for another `by`, an unknown locale, a locale that the mapping lacks, or a group that is no name.
    """
    locales = check_locales(locales)
    if isinstance(by, Mapping):
        check_locales(by)
        missing = [locale for locale in locales if locale not in by]
        if missing:
            raise UserError(f"the grouping has no group for {', '.join(missing)}")
        for locale, group in by.items():
            if not (isinstance(group, str) and group.isprintable()):
                raise UserError(f"the group of {locale} must be a name, got {shown(reprlib.repr(group))}")
        return {locale: by[locale] for locale in locales}
    if by not in ("script", "family"):
        raise UserError(f"cannot group languages by '{shown(by)}'; allowed: 'script', 'family', or a mapping locale -> group")
    return {locale: getattr(LANGUAGES[locale], by) for locale in locales}


def _suggestion(name: str) -> str:
    lowered = str(name).replace("_", "-").lower()
    by_lower = {locale.lower(): locale for locale in LOCALES}
    by_lower |= {language.name.lower(): language.locale for language in _TABLE}
    near = [by_lower[match] for match in difflib.get_close_matches(lowered, by_lower, n=3, cutoff=0.6)]
    near += [locale for locale in LOCALES if locale.split("-")[0] == lowered.split("-")[0]]
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near))}?"
    return f"allowed: the {len(LOCALES)} locales of MASSIVE 1.1, for example {', '.join(LOCALES[:3])}"
