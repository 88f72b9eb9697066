"""What around a mention of an option says how it is meant (`multiple_choice`).

Patterns for what stands before a mention end in `$`; those for what follows are matched from its
end. English, and the forms of Chinese, Japanese and Korean that answers have.
"""

import re

ASCII = str.maketrans(
    dict(zip("\u2019\u3002\u3001\u3010\u3011\u3014\u3015\u2013\u2014", "'.,[][]--", strict=True))
    | dict.fromkeys('"\u201c\u201d\u2018\u00ab\u00bb\u300c\u300d\u300e\u300f\u300a\u300b')
)
"""Signs that NFKC leaves as they are; quotes go."""
_ENDS = r"(?:[.,:;!?\n)\]]|$)"
REASON = rf"\s*(?:{_ENDS}|[(\-=]|(?:because|since|as|for|given|due)\b|因为)"
VERB = r"\s+(?:is|are|was|has|shows|would|seems|looks|matches|and|or|nor|it)\b|\s*[是或和]"
COUNTED = r" \w+\s*(?:[.,;!\n]|$)"  # after a number: "so 4 animals"
JOIN = re.compile(
    r"[ )\]]*(?:[\n;]|,\s*(?:or\b|and\b)?|/|&|\+|\bor\b|\band\b|\bnor\b|还是|或者?|和|及|与)\s*"
    r"(?:(?:the|an?|options?|either|both)\s+)*[(\[ ]*",
    re.I,
)
APPOSITION = re.compile(r"[ )\].:,=\-]*(?:\b(?:an?|the|is)\s+)*[(\[ \-]*", re.I)
_FILLER = (
    r"(?:[\s:=(\[>\-]|\b(?:is|are|was|be|would|should|must|will|the|an?|one|option|choice|answer|"
    r"letter|most|likely|probably|definitely|clearly|indeed|therefore|thus|hence|either)\b|"
    r"选项|答案|应该|应当|应|为|是|选择|选|は|은|는)*$"
)
STATES = re.compile(  # before a mention: this is the answer
    r"(?:\b(?:answers?|ans|choose|chose|chosen|select|selected|pick|picked|go with|"
    r"going with|opt for|(?:correct|right|best|true|accurate|final)(?:\s+\w+\s+is)?|correction)\b|"
    r"=|答案|应选|选择|选|正确|答え|正解|정답|답)" + _FILLER,
    re.I,
)
CONCLUDES = re.compile(  # the same, where the sentence ends or a reason follows
    r"(?:\b(?:so|thus|hence|therefore|conclude|conclusion|it is|it's|its|that's|i think|i believe|"
    r"i guess|i(?:'d| would) say|must|probably|no|wait|sorry|actually|rather|but|yes)\b|"
    r"所以|因此|故|而是|是)[,\s]*" + _FILLER,
    re.I,
)
NAMES = re.compile(  # before a letter: it is a label, whatever is said of it
    r"(?:\b(?:options?|choices?|letter|image|picture|figure|panel|point|box|be|is|with|for|say|only|"
    r"maybe|perhaps|probably|likely|definitely|certainly|clearly|obviously|matches|to|as|either|"
    r"both|between)\b|选项|图)"
    r"[\s:(\[]*$",
    re.I,
)
CONFIRMED = re.compile(
    r"[)\]\s]*(?:(?:is|are|was|be|would be|must be|should be|seems|looks|appears)\b[^.,;\n]{0,24}?"
    r"\b(?:correct|right|best|true|accurate|answer|appropriate)\b|it is\b|是?(?:正确|对的))",
    re.I,
)
NEGATED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|no|cannot|never|neither|nor|except|eliminat\w+|exclud\w+|"
    r"rul(?:e|es|ed|ing) out|rather than|instead of|other than|discard\w*|reject\w*)|n't)\b"
    r"(?:\s+(?:think|believe)\s+(?:that\s+)?(?:it's|it is|the answer is)\s+(?:an?\s+|the\s+)?|"
    r"(?:\s+(?!(?:is|are|was|were|so|but|thus|hence|then|because|since|only|sure)\b)[a-z]+\b){0,3})|"
    r"不是|不选|不能选|而非|并非|排除)\s*(?:选项)?[(\[]?\s*$",
    re.I,
)
NEGATED_AFTER = re.compile(
    r"[)\]\s]*(?:(?:is|are|was|were|does|do|did|can|could|would|has|have|seems|looks)\s*(?:\w+\s+)?"
    r"(?:not|n't|wrong|incorrect|false|ruled out|eliminated)\b|cannot\b|can't\b|"
    r"(?:是)?(?:不对|错|不正确|不是))",
    re.I,
)
LINE_BEGINS = re.compile(r"(?:^|\n)[\s(\[:>\-]*(?:(?:option|choice)\s+|选项)?[(\[]?$", re.I)
CLAUSE_BEGINS = re.compile(r"(?:^|[.,:;!?\n])[\s(\[>\-]*$")
WORDS = ("A", "I")  # that are also words
