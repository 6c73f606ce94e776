"""One spelling for characters that Unicode has several of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Full-width signs that are the usual punctuation of Chinese and Japanese, not a variant of it.
_KEPT = "！（），：；？～"
_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in _KEPT} | {
    0x3000: 0x20
}
_FULL_WIDTH = re.compile("[\u3000\uff01-\uff5e]")
# Half-width katakana with their punctuation and their separate sound marks (ｶﾞ is ガ).
_HALF_WIDTH_KATAKANA = re.compile("[\uff61-\uff9f]+")


def nfc(text: str) -> str:
    """Unicode's normalisation form C: e and a combining accent become é."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def nfc_width(text: str) -> str:
    """``nfc``, full-width letters, digits, symbols and space as ASCII, and full-width katakana.

    ＡＢＣ　１２３ becomes ABC 123 and ｶﾀｶﾅ becomes カタカナ. Punctuation of Chinese and Japanese
    (，：；？！（）～) stays: it is full-width where these languages are written well.
    """
    if text.isascii():
        return text
    if _FULL_WIDTH.search(text):
        text = text.translate(_TO_ASCII)
    text = _HALF_WIDTH_KATAKANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return unicodedata.normalize("NFC", text)


NORMALIZATIONS: dict[str, Callable[[str], str] | None] = {
    "none": None,
    "nfc": nfc,
    "nfc_width": nfc_width,
}
