"""Texts that show differences between two encoders. A fast encoder is used only if it encodes them as the reference does.

    proof_texts(tokens)   characters of every Unicode category in several contexts, runs of digits and blanks, line ends, emoji
                          sequences, contractions, and every token of the vocabulary in a few contexts

Two encoders with the same merges differ only where one of them cuts a text inside a token of the other. So the tokens
themselves are the most important texts.
"""

import functools
import itertools
import sys
import unicodedata
from collections.abc import Iterable

_DENSE = 0x20000
"""Characters of many categories are below this code point. Above are ideographs, private use, and a few tags."""
_CHUNK = 48
"""Characters in one text."""
_MOST_TOKENS = 20_000
"""Use at most this many tokens of the vocabulary, evenly spread."""
_WRITTEN = (
    *("1" * n for n in range(1, 10)),
    *(f"year {'7' * n}, x{'2' * n}y -{'3' * n}.{'0' * n}" for n in range(1, 8)),
    *(f"a{blank * n}b{blank * n}\n{blank * n}" for n in (1, 2, 3) for blank in " \t\u00a0\u3000\u2028\x0b\x0c\x85\u200b\u1680"),
    "10\u00a0km\u3000here\x0cend\u2028x\u2029y\u202fz",
    *(f"a{end}b{end}{end} c {end}\t{end}d{end}" for end in ("\n", "\r", "\r\n", "\n\r", " \r\n ", "\x85")),
    "e\u0301a\u0308 n\u0303o \u0301 1\u0301 \u20ac\u0301 क्षि नमस्ते ก็ ﷺ อักษร",
    "m² x³y 10⁻⁶ ½ ¾x Ⅷ ⅷ ① ㊿ ٣٤٥٦ ४५६७ 五六 ª º ₂",
    "😀😀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 ☺️ 1️⃣ #️⃣ a\u200db \ufeffc",
    "I'll WE'LL it's IT'S can't o'd 'S 's'T'\u017f '\u017f'\u212a don\u2019t l'ﬁ \u0130'S ß'ss STRASSE ǅ ǆ",
    "camelCaseWord XMLHttpRequest éÉÈè ΑΩαω ЖжЩщ Ⓐⓐ ʰʱ ǅǈ ЀaB",
    "a/b//c\\d\r\n// *** --- ... !!!??? ___x_y __init__ <|endoftext|> </s> [INST] \x00\x01\x7f\x80\x9f",
    "end with blanks   ", "\n\n", " ", "\t", "  \n", "\u00a0",
)  # fmt: skip


def proof_texts(tokens: Iterable[bytes]) -> list[str]:
    """The texts to encode with both. tokens: the vocabulary; only tokens of complete characters are used."""
    whole = []
    for token in tokens:
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        if len(text) > 1:
            whole.append(text)
    step = -(-len(whole) // _MOST_TOKENS) or 1
    return [*_characters(), *(f"{text}\n{text}1{text} {text}{text}" for text in whole[::step])]


@functools.cache
def _characters() -> tuple[str, ...]:
    """The texts that do not depend on the vocabulary."""
    chosen = []
    for category, run in itertools.groupby(range(_DENSE), key=lambda point: unicodedata.category(chr(point))):
        points = list(run)
        # The ends of a run and points inside it, because newer versions of Unicode fill unassigned runs.
        stride = 64 if category == "Cn" else 512
        if category != "Cs":
            chosen += sorted({points[0], points[-1], *points[::stride]})
    chosen += [*range(_DENSE, sys.maxunicode, 8192), *range(0xE0000, 0xE0200, 64)]
    probes = [
        "".join(f"a{c}b {c}{c}1{c}\n" for c in map(chr, chosen[at : at + _CHUNK]))
        for at in range(0, len(chosen), _CHUNK)
    ]
    return (*_WRITTEN, *probes)
