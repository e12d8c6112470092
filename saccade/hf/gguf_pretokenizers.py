"""The pre-tokenizers that GGUF files name (`tokenizer.ggml.pre`): where text may be cut.

A BPE vocabulary was learned on pieces of text, cut by the regular expressions of the model's own
tokenizer.json.  A GGUF file holds only their name in llama.cpp's list; this table has what the
name stands for.  Where llama.cpp rewrote an expression for its own engine, or cuts runs of digits
that the original cuts one by one, the original is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Split

_BYTES: Final = ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2: Final = ByteLevel(add_prefix_space=False, use_regex=True)
_EACH_DIGIT: Final = Digits(individual_digits=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """What a name of llama.cpp's list stands for.

    Attributes:
        steps: applied in this order; each cuts the pieces of the one before.
        nfc: text is normalized to composed characters first.
        ignore_merges: a piece that is a token is one, whatever the merges would make of it.
        add_bos: the model's first token goes in front where the file does not say.
        raw: tokens are spelled in UTF-8 with ▁ for a space, not in GPT-2's letters for bytes.
    """

    steps: tuple[Any, ...] = ()
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False

    def build(self, *, add_prefix_space: bool = False) -> Any | None:
        """The pre-tokenizer of the tokenizers library; a prefix space only where GPT-2's is all."""
        if self.raw:
            return None
        if self.steps == (_GPT2,) and add_prefix_space:
            return ByteLevel(add_prefix_space=True, use_regex=True)
        ends_in_bytes = any(step is _GPT2 for step in self.steps)
        return pre_tokenizers.Sequence([*self.steps, *([] if ends_in_bytes else [_BYTES])])


def _split(*patterns: str) -> tuple[Any, ...]:
    """Each match of a pattern is a piece, and so is what lies between two."""
    return tuple(Split(Regex(_ascii(pattern)), "isolated") for pattern in patterns)


def _ascii(pattern: str) -> str:
    """The same pattern with other characters as escapes: printing a pre-tokenizer panics else."""
    return "".join(c if c.isascii() else f"\\x{{{ord(c):X}}}" for c in pattern)


_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the ends of English contractions
_BLANK: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _words(
    digits: str = r"\p{N}",
    *,
    short: str = f"{_SHORT}|",
    word: str = r"[^\r\n\p{L}\p{N}]?\p{L}+",
    signs: str = _SIGNS,
    blank: str = _BLANK,
) -> str:
    """GPT-4's expression (cl100k) and its variants."""
    return f"{short}{word}|{digits}|{signs}|{blank}"


def _cases(digits: str, *, short: str = f"{_SHORT}?") -> str:
    """GPT-4o's expression (o200k) and its variants: a word ends where lower case meets upper."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    ahead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{ahead}{upper}*{lower}+{short}|{ahead}{upper}+{lower}*{short}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}"
    )


_THREE: Final = r"\p{N}{1,3}"
_FROM_THE_RIGHT: Final = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # 1,234,567
_HAN_KANA: Final = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK3: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANK
)
_SPARK: Final = _DEEPSEEK3.replace(r"[\r\n]*|\s*[\r\n]+|", r"|[\r\n]|")
_BLOOM: Final = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_DEEPSEEK_CJK: Final = "[一-龥ࠀ-一가-\ud7ff]+"
# Letters with case, as the regex crate knew them when DeepSeek LLM was trained.
_CASED: Final = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙ"
    "ὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ"
    "-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_ASIAN: Final = (  # scripts written without spaces
    "[一-鿿㐀-䶿\uf900-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
)
_NOT_HAN: Final = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
)
_KIMI: Final = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_NOT_HAN[0]}*{_NOT_HAN[1]}+{_SHORT}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NOT_HAN[0]}+{_NOT_HAN[1]}*{_SHORT}?|{_THREE}|{_SIGNS}|{_BLANK}"
)
_YOUTU_ASIAN: Final = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、\u3000-\u303f︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
)
_BAILING: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2_BLANK: Final = (
    r"\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_EXAONE_WORD: Final = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_MARKED_WORD: Final = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"

_LLAMA3: Final = PreTokenizer(steps=_split(_words(_THREE)), ignore_merges=True, add_bos=True)
_SMOLLM: Final = PreTokenizer(steps=(_EACH_DIGIT, _GPT2))
_PLAIN: Final = PreTokenizer(steps=(_GPT2,))
_NEOX: Final = PreTokenizer(steps=(_GPT2,), nfc=True)
_QWEN2: Final = PreTokenizer(steps=_split(_words()), nfc=True)
_SINGLE: Final = PreTokenizer(steps=_split(_words()))
_DEEPSEEK: Final = PreTokenizer(steps=_split(_THREE, _HAN_KANA, _DEEPSEEK3))
_O200K: Final = PreTokenizer(steps=_split(_cases(_THREE)))
_POEM: Final = PreTokenizer(steps=_split(_BLOOM))
_RAW: Final = PreTokenizer(raw=True)

_FAMILIES: Final[Sequence[tuple[str, PreTokenizer]]] = (
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer(steps=_split(_words(_THREE)))),
    ("minicpm5", PreTokenizer(steps=_split(_THREE, _words(r"\p{N}+")), ignore_merges=True)),
    ("jais-2", PreTokenizer(steps=_split(_words(_THREE, blank=_JAIS2_BLANK)))),
    ("deepseek-llm", PreTokenizer(steps=(
        *_split("[\r\n]", rf"\s?[{_CASED}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
                _DEEPSEEK_CJK), _EACH_DIGIT))),
    ("deepseek-coder", PreTokenizer(steps=(
        *_split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK), _EACH_DIGIT))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK),
    ("spark2_5", PreTokenizer(steps=_split(_THREE, _HAN_KANA, _SPARK, r"\p{N}"))),
    ("youtu", PreTokenizer(steps=_split(_YOUTU_ASIAN, _cases(r"\p{N}")), ignore_merges=True)),
    ("falcon", PreTokenizer(steps=(
        Punctuation("contiguous"), _GPT2, Digits(individual_digits=False),
        *_split("[0-9][0-9][0-9]")))),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _SMOLLM),
    ("command-r", PreTokenizer(steps=(_EACH_DIGIT, _GPT2), nfc=True)),
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
     "jina-v1-en jina-v2-code roberta-bpe jais trillion granite-docling exaone4", _PLAIN),
    ("mpt olmo", _NEOX),
    ("qwen2 deepseek-r1-qwen megrez kormo f2llmv2", _QWEN2),
    ("stablelm2 hunyuan solar-open grok-2", _SINGLE),
    ("qwen35", PreTokenizer(steps=_split(_words(
        word=_MARKED_WORD, signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")), nfc=True)),
    ("ufakzeka", PreTokenizer(steps=_split(_words(short="")))),
    ("laguna", PreTokenizer(steps=(
        Split(Regex(r"(?:\r?\n)+(?!\r?\n)"), "merged_with_next"), *_split(_words())))),
    ("seed-coder", PreTokenizer(steps=_split(_words(signs=r" ?[^\s\p{L}\p{N}\r\n]+")))),
    ("exaone-moe", PreTokenizer(steps=_split(_words(
        word=_EXAONE_WORD, signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
        blank=r"\s*[\r\n]|\s+(?!\S)|\s+")))),
    ("poro-chat bloom gpt3-finnish", _POEM),
    ("viking", PreTokenizer(steps=_split(_BLOOM, r"\p{N}"))),
    ("tekken", PreTokenizer(
        steps=_split(_cases(r"\p{N}", short="")), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _O200K),
    ("granite-embed-multi-97m", PreTokenizer(steps=_split(_cases(_THREE)), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer(steps=_split(
        r"\d{1,3}(?=(?:\d{3})*\b)", _cases(_THREE)))),
    ("chameleon", PreTokenizer(steps=(
        *_split("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )"),
        _EACH_DIGIT, Punctuation("isolated"), _GPT2), add_bos=True)),
    ("superbpe", PreTokenizer(steps=_split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer(steps=_split(_BAILING))),
    ("kimi-k2", PreTokenizer(steps=_split(_KIMI))),
    ("afmoe", PreTokenizer(steps=_split(_FROM_THE_RIGHT, _ASIAN, _DEEPSEEK3))),
    ("gemma4 granite-embed-multi-311m sarvam-moe", _RAW),
)  # fmt: skip

PRE_TOKENIZERS: Final = {name: rule for names, rule in _FAMILIES for name in names.split()}
"""Name in llama.cpp's list -> what it stands for."""

_BY_ARCHITECTURE: Final = {
    "bloom": "bloom",
    "command-r": "command-r",
    "falcon": "falcon",
    "mpt": "mpt",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3moe": "qwen2",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
}
"""What files of before the name existed were made for, where an architecture has only one."""

DEFAULT: Final = PreTokenizer(
    steps=(
        *_split(r"[\p{P}\$\+<=>\^~\|]+"),
        *_split(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        ),
    )
)
"""llama.cpp's guess for a file without the name."""


def pre_tokenizer_of(name: str | None, architecture: str) -> tuple[PreTokenizer, str | None]:
    """The pre-tokenizer that a file names, and a sentence where it had to be guessed."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name], None
    if name not in (None, "", "default"):
        return _PLAIN, (
            f"the pre-tokenizer {name!r} that the GGUF file names is not known here: text is cut "
            "as GPT-2 cuts it, so some of it becomes other tokens than the model was trained with."
        )
    if architecture in _BY_ARCHITECTURE:
        return PRE_TOKENIZERS[_BY_ARCHITECTURE[architecture]], None
    return DEFAULT, (
        "the GGUF file does not name its pre-tokenizer (it was made before April 2024): text is "
        "cut as llama.cpp does then, so some of it may become other tokens than the model was "
        "trained with. Convert the model again."
    )
