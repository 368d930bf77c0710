"""The table of the 52 locales, its groups, and the errors for names that are none."""

from collections import Counter

import pytest

from kloss.cl.languages import CHARACTER_LOCALES, LANGUAGES, LOCALES, check_locales, groups
from kloss.errors import UserError

ORDER = (
    "af-ZA am-ET ar-SA az-AZ bn-BD ca-ES cy-GB da-DK de-DE el-GR en-US es-ES fa-IR fi-FI fr-FR he-IL "
    "hi-IN hu-HU hy-AM id-ID is-IS it-IT ja-JP jv-ID ka-GE km-KH kn-IN ko-KR lv-LV ml-IN mn-MN ms-MY "
    "my-MM nb-NO nl-NL pl-PL pt-PT ro-RO ru-RU sl-SL sq-AL sv-SE sw-KE ta-IN te-IN th-TH tl-PH tr-TR "
    "ur-PK vi-VN zh-CN zh-TW"
)


def test_order_and_scripts():
    assert " ".join(LOCALES) == ORDER and len(LOCALES) == 52
    scripts = Counter(language.script for language in LANGUAGES.values())
    assert scripts["Latin"] == 29 and scripts.total() - scripts["Latin"] == 23
    assert all(locale == language.locale for locale, language in LANGUAGES.items())


def test_unspaced():
    unspaced = {locale for locale, language in LANGUAGES.items() if not language.spaced}
    assert unspaced == {"ja-JP", "zh-CN", "zh-TW", "th-TH", "km-KH", "my-MM"}
    assert unspaced > CHARACTER_LOCALES


def test_groups():
    assert groups(["ru-RU", "mn-MN", "pl-PL"], "script") == {"ru-RU": "Cyrillic", "mn-MN": "Cyrillic", "pl-PL": "Latin"}
    assert groups(["ru-RU", "mn-MN", "pl-PL"], "family") == {"ru-RU": "Slavic", "mn-MN": "Mongolic", "pl-PL": "Slavic"}
    assert groups(["de-DE"], {"de-DE": "a", "en-US": "b"}) == {"de-DE": "a"}
    families = Counter(groups(LOCALES, "family").values())
    assert families["Germanic"] == 8 and families["Romance"] == 6 and families["Dravidian"] == 4


@pytest.mark.parametrize(
    ("locales", "by", "words"),
    [
        (["en-US"], "colour", "'script', 'family'"),
        (["en-US", "de-DE"], {"en-US": "a"}, "no group for de-DE"),
        (["en-US"], {"en-US": "a", "xx-XX": "b"}, "xx-XX"),
        (["en-UK"], "script", "en-US"),
    ],
)
def test_groups_refuse(locales, by, words):
    with pytest.raises(UserError, match=words):
        groups(locales, by)


@pytest.mark.parametrize(
    ("name", "near"), [("en_us", "en-US"), ("de", "de-DE"), ("german", "de-DE"), ("zh-HK", "zh-CN"), ("jp-JP", "ja-JP")]
)
def test_unknown_locale_names_near_ones(name, near):
    with pytest.raises(UserError, match=near) as caught:
        check_locales(["fr-FR", name])
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_check_locales_keeps_order_and_drops_repeats():
    assert check_locales(["ru-RU", "af-ZA", "ru-RU"]) == ("ru-RU", "af-ZA")
    assert check_locales("ru-RU") == ("ru-RU",)
