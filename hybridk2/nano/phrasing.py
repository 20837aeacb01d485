"""How people type: slots filled, case, punctuation and spelling made careless.

A phrasing is a template with {slots}. Noise touches the words around the slots and never a
slot's own value, so that what must be copied or compared stays what it is.
"""

import functools
import re

from hybridk2.nano.words import Draw

_SLOT = re.compile(r"(\{\w+\})")
_WORD = re.compile(r"[A-Za-z]{4,}")

_OPENINGS = (
    "Hi! ", "Hello, ", "Hey, ", "Please tell me: ", "Quick question: ", "Can you tell me: ",
    "I wonder: ", "Question: ", "Tell me, ", "Ok, ", "So, ", "Well, ", "Now ", "Next: ",
    "Dear assistant, ", "One more: ", "I have a question. ", "Hey there! ", "Kimi, ", "Um, ",
    "Good morning. ", "Another one: ", "Could you help me? ", "My teacher asks: ",
)  # fmt: skip
_CLOSINGS = (
    " Think carefully.", " think carefully.", " Please think step by step.", " Thanks!", " Thanks.",
    " Please.", " please", " Be careful.", " Explain.", " Take your time.", " I need to know.",
    " Thank you!", " It is important.", " Think before you answer.", " Reason step by step.",
    " Answer briefly.", " No rush.", " I am not sure.", " Think hard.", " Cheers", " Just tell me.",
)  # fmt: skip


# Other words for the words of the templates: more ways to say a thing than are written down.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "tell": ("let", "inform", "give", "show"),
    "find": ("get", "locate", "look for", "search", "seek"),
    "get": ("fetch", "obtain", "retrieve", "bring", "grab", "find"),
    "show": ("display", "give", "present"),
    "check": ("verify", "see", "look up", "find out", "inspect"),
    "give": ("tell", "show", "provide", "hand"),
    "what's": ("what is", "whats", "what", "wat is"),
    "what": ("which", "wat", "whatever"),
    "which": ("what", "wich", "which exactly"),
    "need": ("want", "require", "would like", "must have"),
    "want": ("need", "wish", "would like"),
    "please": ("pls", "kindly", "plz"),
    "can": ("could", "would", "will"),
    "could": ("can", "would"),
    "how": ("how exactly", "in what way"),
    "look": ("see", "search"),
    "search": ("look", "hunt", "browse", "query"),
    "compare": ("contrast", "weigh", "judge", "evaluate"),
    "pick": ("choose", "select", "take", "single out"),
    "choose": ("pick", "select", "determine"),
    "number": ("value", "figure", "one", "decimal", "quantity"),
    "numbers": ("values", "figures", "decimals"),
    "between": ("among", "of", "from"),
    "among": ("of", "from", "out of", "in"),
    "of": ("out of", "from", "among"),
    "and": ("&", "or"),
    "or": ("vs", "versus", "/", "and"),
    "vs": ("versus", "against", "or", "v."),
    "than": ("then", "compared to", "compared with"),
    "true": ("correct", "right", "so"),
    "equal": ("identical", "the same", "equivalent"),
    "same": ("equal", "identical"),
    "sort": ("order", "arrange", "rank", "put in order"),
    "order": ("purchase", "order number"),
    "arrange": ("sort", "order", "line up"),
    "rank": ("sort", "order", "list"),
    "put": ("place", "set", "bring"),
    "send": ("deliver", "shoot", "write", "dispatch"),
    "write": ("send", "compose"),
    "play": ("start", "put on", "run"),
    "set": ("start", "make", "create", "put"),
    "start": ("begin", "launch", "set"),
    "turn": ("switch", "flip"),
    "convert": ("change", "turn", "transform", "exchange"),
    "translate": ("render", "put", "convert"),
    "calculate": ("compute", "work out", "evaluate"),
    "track": ("follow", "trace", "locate"),
    "book": ("reserve", "arrange", "get"),
    "weather": ("weather conditions", "weather situation", "weather forecast"),
    "price": ("cost", "quote", "going rate"),
    "time": ("clock time", "hour", "time of day"),
    "news": ("headlines", "latest news", "stories"),
    "distance": ("way", "length of the trip", "distance in km"),
    "population": ("number of inhabitants", "headcount"),
    "definition": ("meaning", "explanation"),
    "meaning": ("definition", "sense"),
    "movie": ("film", "picture"),
    "film": ("movie", "picture"),
    "song": ("track", "tune"),
    "recipe": ("dish", "cooking recipe"),
    "flights": ("planes", "a flight"),
    "message": ("note", "text message", "text"),
    "email": ("mail", "e-mail"),
    "user": ("account holder", "user record"),
    "package": ("parcel", "shipment"),
    "restaurant": ("place to eat", "diner"),
    "hotel": ("room", "hotel room"),
    "file": ("document", "file named"),
    "today": ("right now", "at the moment", "now"),
    "is": ("might be", "would be", "is actually"),
    "are": ("would be", "r"),
    "do": ("could", "will", "did"),
    "use": ("take", "try", "apply", "employ"),
    "call": ("invoke", "run", "use", "trigger"),
    "you": ("u", "you there"),
    "who": ("which person", "whoever"),
    "where": ("at which place", "wherever"),
    "write me": ("draft",),
    "explain": ("clarify", "describe"),
    "help": ("assist", "support", "aid"),
    "model": ("system", "AI", "network"),
    "made": ("built", "created", "produced"),
    "big": ("large", "huge"),
    "small": ("tiny", "little"),
    "real": ("actual", "true", "genuine"),
    "load": ("open", "start", "use"),
}
_FILLERS = (
    "just", "actually", "really", "exactly", "now", "like", "maybe", "quickly", "again", "here",
    "right now", "if possible", "you know", "currently", "simply", "so", "well", "then", "also",
)  # fmt: skip
_DISPENSABLE = frozenset(
    """
    a an the is are do does did me my i it of to for you please can could would will this that one
    be us there so with have has number numbers than what which tell give get find show
    """.split()  # noqa: SIM905 (a list of fifty strings reads worse)
)
# Share of training questions whose words are changed; evaluation asks in plain words.
_REWORDED = 0.45
_UPPER_CASE, _UPPER_CASE_IN_TRAINING = 0.03, 0.07
_CUT = re.compile(r"(\s+)")


def _reword(draw: Draw, text: str) -> str:
    """Some words replaced, dropped or added; slots stay where they are."""
    too_short = "{" not in text and len(text) < 25  # to survive the loss of a word
    drop = 0.12 if not too_short and draw.chance(0.35) else 0.0
    words: list[str] = []
    for word in _CUT.split(text):
        bare = word.strip(".,:;?!").lower()
        if "{" in word or not bare.strip():
            words.append(word)
            continue
        if bare in _SYNONYMS and draw.chance(0.18):
            other = draw.choice(_SYNONYMS[bare])
            start = word.lower().index(bare)
            other = other.capitalize() if word[start].isupper() else other
            word = word[:start] + other + word[start + len(bare) :]
        elif bare in _DISPENSABLE and draw.chance(drop):
            word = ""
        elif draw.chance(0.025):
            word = f"{draw.choice(_FILLERS)} {word}" if draw.chance(0.7) else f"{word} {word}"
        words.append(word)
    return re.sub(r"  +", " ", "".join(words)).strip()


def _misspell(draw: Draw, text: str) -> str:
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = draw.choice(words)
    spot = draw.between(word.start() + 1, word.end() - 2)
    kind = draw.random()
    if kind < 0.4:  # two letters swapped
        return text[:spot] + text[spot + 1] + text[spot] + text[spot + 2 :]
    if kind < 0.7:  # one letter lost
        return text[:spot] + text[spot + 1 :]
    return text[:spot] + text[spot] + text[spot:]  # one letter doubled


def careless(draw: Draw, template: str) -> str:
    """The template as a hurried person would type it; slots untouched."""
    if draw.chance(_REWORDED) and not draw.evaluation:
        template = _reword(draw, template) or template
    parts = _SLOT.split(template)
    style = draw.random()
    upper = _UPPER_CASE if draw.evaluation else _UPPER_CASE_IN_TRAINING
    if style < 0.16:
        parts = [part if part.startswith("{") else part.lower() for part in parts]
    elif style < 0.16 + upper:
        parts = [part if part.startswith("{") else part.upper() for part in parts]
    for _ in range(draw.weighted((0, 1, 2), (0.86, 0.1, 0.04))):
        spot = draw.between(0, len(parts) - 1)
        if not parts[spot].startswith("{"):
            parts[spot] = _misspell(draw, parts[spot])
    text = "".join(parts)
    if draw.chance(0.14):
        text = text.rstrip("?.! ")
    elif draw.chance(0.04):
        text = text.rstrip("?.! ") + draw.choice(("??", "?!", "...", " ?", "!", "!!"))
    if draw.chance(0.03):
        text = text.replace(" ", "  ", 1)
    return text


def framed(draw: Draw, template: str) -> str:
    """The template with, at times, a greeting before it and a plea after it."""
    if draw.chance(0.18):
        template = draw.choice(_OPENINGS) + template
    if draw.chance(0.22):
        closing = draw.choice(_CLOSINGS)
        if template.endswith("}"):  # or nobody could tell where the value ends
            template += "," if closing[1].islower() else "."
        template += closing
    return template


def fill(template: str, slots: dict[str, str]) -> str:
    """Slots replaced one by one: values may contain braces."""
    return _SLOT.sub(lambda slot: slots[slot.group()[1:-1]], template)


@functools.lru_cache(maxsize=4096)
def alternatives(text: str) -> tuple[str, ...]:
    """Templates written one after another, separated by bars, for compact tables."""
    return tuple(dict.fromkeys(part.strip() for part in text.strip().split("|") if part.strip()))
