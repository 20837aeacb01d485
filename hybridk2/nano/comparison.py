"""Questions about which number is bigger, with the thought that answers them reliably.

The thought lines the two numbers up to one length and walks down the decimal places until two
digits differ: every step is a look-up, so a tiny model can be right about numbers it never saw.
"""

import itertools
import re
from dataclasses import dataclass
from decimal import Decimal

from hybridk2.nano.phrasing import alternatives, careless, fill, framed
from hybridk2.nano.words import Draw, held_out, noun, person

_WHOLE_PLACES = (
    "ones", "tens", "hundreds", "thousands", "ten-thousands", "hundred-thousands", "millions",
)  # fmt: skip
_DECIMAL_PLACES = (
    "tenths", "hundredths", "thousandths", "ten-thousandths", "hundred-thousandths", "millionths",
    "ten-millionths",
)  # fmt: skip
_TURNED = {"<": ">", ">": "<", "=": "="}

# word of the question -> (asks for the bigger one, the opposite word)
COMPARATIVES = {
    "bigger": (True, "smaller"), "larger": (True, "smaller"), "greater": (True, "smaller"),
    "higher": (True, "lower"), "more": (True, "less"), "smaller": (False, "bigger"),
    "lower": (False, "higher"), "less": (False, "more"), "lesser": (False, "greater"),
}  # fmt: skip
SUPERLATIVES = {
    "biggest": True, "largest": True, "greatest": True, "highest": True, "maximum": True,
    "smallest": False, "lowest": False, "least": False, "minimum": False,
}  # fmt: skip
_FREQUENT = ("bigger", "bigger", "larger", "larger", "greater", "smaller", "smaller")

_WHICH = alternatives("""
which one is {W}, {A} or {B}?|which is {W}, {A} or {B}?|Which number is {W}: {A} or {B}?
|What is {W}, {A} or {B}?|Is {A} or {B} {W}?|{A} or {B}, which is {W}?
|{A} or {B}: which one is {W}?|Of {A} and {B}, which is {W}?
|Between {A} and {B}, which one is {W}?|{A} and {B}: which is {W}?
|Tell me which is {W}: {A} or {B}.|Which of these is {W}: {A}, {B}?
|which is the {W} number, {A} or {B}?|Which of {A} and {B} is {W}?
|Which of the two numbers {A} and {B} is {W}?|what's {W}: {A} or {B}?|Find the {W} of {A} and {B}.
|Find the {W} number: {A}, {B}|Pick the {W} one: {A} or {B}|Name the {W} of the two: {A}, {B}.
|Out of {A} and {B}, choose the {W} number.|which has the {W} value, {A} or {B}?
|Decide which is {W}: {A} or {B}.|{A} {B} which one is {W}
|If I have {A} and {B}, which one is {W}?|Would you say {A} or {B} is {W}?|{W}: {A} or {B}?
|Can you tell which number is {W}, {A} or {B}?|I want to know which is {W}, {A} or {B}.
|Do you know which is {W}: {A} or {B}?|Given {A} and {B}, which is {W}?
|which decimal is {W}, {A} or {B}?|Compare {A} and {B}: which one is {W}?
|Say which of {A} and {B} is {W}.|{A} vs {B}, which is {W}?|Look at {A} and {B}. Which one is {W}?
|Here are two numbers: {A} and {B}. Which is {W}?|My friend says {A}, I say {B}. Which is {W}?
|Is it {A} or {B} that is {W}?|Give me the {W} of {A} and {B}.|what number is {W} {A} or {B}
|I need the {W} one of {A} and {B}.|Which one of {A} or {B} is {W}?
|Between {A} and {B}, what is {W}?|Which is the {W} one: {A} or {B}?
|Select the {W} value: {A} / {B}|Two prices: {A} and {B}. Which is {W}?
|Two measurements, {A} and {B}: which one is {W}?|Who wins if {W} wins: {A} or {B}?
|Guess what is {W}, {A} or {B}?|Which would be {W}, {A} or {B}?
""")
_WHICH_OF_TWO = alternatives("""
What is the {W} of {A} and {B}?|Which is the {W}: {A} or {B}?|{W} of {A} and {B}
|Find the {W} of {A} and {B}.|the {W} of {A} and {B} please|Give the {W} of {A}, {B}.
|Return the {W} of {A} and {B}.|Which of {A} and {B} is the {W}?|What's the {W}, {A} or {B}?
|Tell me the {W} of {A} and {B}.|{W}({A}, {B})|Calculate the {W} of {A} and {B}.
|Of {A} and {B}, which is the {W}?
""")
_COMPARE = alternatives("""
{A} vs {B}|{A} vs. {B}?|Compare {A} and {B}.|compare {A} with {B}|Compare {A} to {B}.|{A} or {B}?
|Compare the numbers {A} and {B}.|How does {A} compare to {B}?|Please compare {A} and {B}.
|{A} versus {B}|How do {A} and {B} compare?|compare these: {A}, {B}|Compare: {A} and {B}
|{A}, {B}: compare|Do a comparison of {A} and {B}.|Can you compare {A} and {B}?
|What is the relation between {A} and {B}?|Could you compare the decimals {A} and {B} for me?
|I have {A} and {B}. Compare them.
""")
_WHETHER = alternatives("""
Is {A} {W} than {B}?|is {A} {W} than {B}|Is the number {A} {W} than {B}?
|Is it true that {A} is {W} than {B}?|Would {A} be {W} than {B}?|{A} is {W} than {B}, right?
|{A} is {W} than {B}, correct?|{A} {W} than {B}?|Do you agree that {A} is {W} than {B}?
|Tell me if {A} is {W} than {B}.|Can you check whether {A} is {W} than {B}?
|Does {A} count as {W} than {B}?|I think {A} is {W} than {B}. Am I right?
|Am I right that {A} is {W} than {B}?|Check: is {A} {W} than {B}?
|My friend says {A} is {W} than {B}. Is that so?|So {A} is {W} than {B}?
|Is {A} really {W} than {B}?|Could {A} be {W} than {B}?|Isn't {A} {W} than {B}?
|yes or no: is {A} {W} than {B}?
""")
_EQUAL = alternatives("""
Is {A} equal to {B}?|Are {A} and {B} equal?|Is {A} the same as {B}?
|Are {A} and {B} the same number?|does {A} equal {B}?|{A} = {B}?|Is {A} = {B}?
|Do {A} and {B} have the same value?|Are {A} and {B} the same?|Is {A} as big as {B}?
|Check if {A} equals {B}.|Is it true that {A} equals {B}?
""")
_CLAIM = alternatives("""
True or false: {A} {S} {B}|true or false: {A} {S} {B}?|{A} {S} {B}, true or false?
|Is {A} {S} {B} true or false?|True or false? {A} is {W} than {B}.
|True or false: {A} is {W} than {B}.|{A} is {W} than {B}: true or false?
""")
_SIGN = alternatives("""
Which sign goes between {A} and {B}: <, > or =?|Put <, > or = between {A} and {B}.
|{A} _ {B}: <, > or =?|Fill in <, = or >: {A} ? {B}|{A} ? {B} (<, > or =)
|Which is right: {A} < {B} or {A} > {B}?|{A} < {B} or {A} > {B}?
|Is {A} < {B}, {A} = {B} or {A} > {B}?|Which symbol belongs between {A} and {B}: <, > or =?
|Choose < or > or = for {A} and {B}.|Write the right symbol (<, >, =): {A} __ {B}
|{A} ... {B}, which sign fits, < or >?|Insert the correct sign between {A} and {B}: <, =, >
|Is it {A} < {B} or {A} > {B}?
""")
_SEVERAL = alternatives("""
Which is the {W}: {L}?|Which one is the {W}, {L}?|What is the {W} of {L}?|Find the {W} of {L}.
|Of {L}, which is the {W}?|Which number is the {W}: {L}?|the {W} of {L}|Give me the {W} of {L}.
|Tell me the {W} number: {L}|{L}: which is the {W}?|Pick the {W}: {L}.
|Among {L}, which one is {W}?|among {L}, which is the {W}?|Which one among {L} is the {W}?
|Out of {L}, which one is the {W}?|I have {L}. Which is the {W}?|Which of these is the {W}: {L}
|{W} of {L}|{W}: {L}|the {W} number in {L}|what is the {W} number out of {L}
|Look at {L} and name the {W}.|Let me know the {W} of {L}.|Which of the numbers {L} is the {W}?
|In the list {L}, which is the {W}?|Compare {L}. Which is the {W}?|Which of {L} is the {W}?
|Here are some numbers: {L}. Which is the {W}?|Return the {W} of these: {L}.
|What's the {W} number among {L}?|From {L}, choose the {W}.|Name the {W} one: {L}
""")
_ORDER_UP = alternatives("""
Sort {L}.|Sort {L} from smallest to largest.|Put {L} in order.|Order these numbers: {L}
|sort ascending: {L}|Arrange {L} in increasing order.|Order {L} from small to big.
|{L} in ascending order|List {L} from low to high.|Sort the numbers {L}, smallest first.
|{L}, sorted|Line up {L} from the smallest to the biggest.
|Write {L} in order, from least to greatest.|Rank {L} from lowest to highest.
|Sort these from least to greatest: {L}|Put these in ascending order: {L}
|Please sort {L} in ascending order.
""")
_ORDER_DOWN = alternatives("""
Sort {L} from largest to smallest.|Put {L} in descending order.|sort descending: {L}
|Order {L} from big to small.|Arrange {L} in decreasing order.|Rank {L} from highest to lowest.
|Sort these from greatest to least: {L}|Order these from biggest to smallest: {L}
|Please sort {L} in descending order.
""")
# Adjectives of a quantity: (word for more, word for less, units; "_" stands where the number goes).
_QUANTITIES = (
    ("heavier", "lighter", ("_ kg", "_ g", "_ lb", "_ tons", "_kg", "_ grams", "_ pounds")),
    ("longer", "shorter", ("_ m", "_ cm", "_ km", "_ miles", "_ feet", "_m", "_ inches",
                           "_ meters")),
    ("taller", "shorter", ("_ m", "_ cm", "_ feet", "_m", "_ meters")),
    ("warmer", "colder", ("_ degrees", "_°C", "_ °C", "_°F", "_ C")),
    ("hotter", "cooler", ("_ degrees", "_°C", "_ °C", "_°F")),
    ("more expensive", "cheaper", ("$_", "€_", "£_", "_ dollars", "_ euros", "_€", "_ yuan", "¥_")),
    ("older", "younger", ("_ years",)),
    ("deeper", "shallower", ("_ m", "_ feet", "_ km")),
    ("farther", "closer", ("_ km", "_ miles", "_ m", "_ light years")),
    ("wider", "narrower", ("_ m", "_ cm", "_ inches")),
)  # fmt: skip
_UNITS = ("$_", "€_", "_%", "_ %", "_ kg", "_ km", "_ m", "_ points", "_ liters", "_ hours", "_ GB")
_QUANTITY_WHICH = alternatives("""
Which is {W}, {A} or {B}?|which one is {W}, {A} or {B}?|What is {W}: {A} or {B}?
|{A} or {B}, which is {W}?|Is {A} or {B} {W}?|Between {A} and {B}, which is {W}?
|Which of {A} and {B} is {W}?|{W}: {A} or {B}?
""")
_OWNERS = alternatives("""
{P} has {A} and {Q} has {B}. Who has more?|{P} has {A}, {Q} has {B}. Who has less?
|{P} scored {A} and {Q} scored {B}. Who has more?|{P} got {A}; {Q} got {B}. Who got more?
|If {P} has {A} and {Q} has {B}, who has more?|{P} owns {A} and {Q} owns {B}. Who has less?
|{P}: {A}, {Q}: {B}. Who has more?|{P} earned {A}, {Q} earned {B}. Who earned more?
|{P} earns {A} and {Q} earns {B}. Who earns less?|{P} ate {A}, {Q} ate {B}. Who ate more?
|{P} saved {A} while {Q} saved {B}. Who saved less?
|{P} walked {A} and {Q} walked {B}. Who walked more?
""")
_ITEMS = alternatives("""
The {P} is {A} and the {Q} is {B}. Which is {W}?|A {P} of {A} or a {Q} of {B}: which is {W}?
|The {P} is {A}, the {Q} is {B}. Which one is {W}?
|If the {P} is {A} and the {Q} is {B}, which is {W}?|The {P}: {A}. The {Q}: {B}. Which is {W}?
|Our {P} is {A}; our {Q} is {B}. Which one is {W}?
""")
_CHINESE = alternatives("""
{A}和{B}哪个大？|{A}和{B}哪个更大？|{A} 和 {B} 哪个大？|{A}与{B}哪个大
|哪个更大，{A}还是{B}？|比较{A}和{B}
|{A}和{B}比，哪个大？|请比较{A}和{B}的大小|{A}大还是{B}大？|哪个数大，{A}还是{B}？请仔细想想。
|{A}和{B}谁大？|{A}跟{B}哪一个比较大？
""")
_FOREIGN = alternatives("""
¿Cuál es mayor, {A} o {B}?|¿Qué número es más grande, {A} o {B}?|Was ist größer, {A} oder {B}?
|Welche Zahl ist größer: {A} oder {B}?|Lequel est plus grand, {A} ou {B} ?
|Quel est le plus grand : {A} ou {B} ?|Qual é maior, {A} ou {B}?|Quale è più grande, {A} o {B}?
|{A} と {B} はどちらが大きい？|Что больше, {A} или {B}?|Wat is groter, {A} of {B}?
|Która liczba jest większa, {A} czy {B}?
""")
_AGAIN = alternatives("""
And {A} or {B}?|What about {A} and {B}?|and {A} vs {B}?|How about {A} and {B}?|Now {A} and {B}.
|And between {A} and {B}?|Same for {A} and {B}.|{A} and {B}?|then {A} or {B}?|Ok, and {A} or {B}?
""")


@dataclass(frozen=True)
class Check:
    """What a right answer must say. `kind` is one of the methods of `comparison_is_right`."""

    kind: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """One question with its thought and answer, and what to accept from the model."""

    question: str
    thought: str
    answer: str
    check: Check


def _digits(draw: Draw, count: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(count))


def _whole(draw: Draw) -> str:
    length = draw.weighted((0, 1, 2, 3, 4, 5, 6), (8, 50, 22, 11, 5, 2, 2))
    if length == 0:
        return "0"
    return draw.choice("123456789") + _digits(draw, length - 1)


def _decimals(draw: Draw) -> str:
    return _digits(draw, draw.weighted((1, 2, 3, 4, 5, 6), (32, 35, 19, 8, 4, 2)))


def _other_form(draw: Draw, whole: str, decimals: str) -> tuple[str, str]:
    """The same value or nearly so, written otherwise."""
    kind = draw.random()
    if kind < 0.35 and len(decimals) < 6:
        return whole, decimals + "0" * draw.between(1, min(3, 6 - len(decimals)))
    if kind < 0.55 and len(decimals) < 6:
        return whole, decimals + draw.choice("123456789")
    if kind < 0.75:
        return whole, ("0" + decimals)[:6]
    if kind < 0.9 and len(decimals) > 1:
        return whole, decimals[1] + decimals[0] + decimals[2:]
    spot = draw.between(0, len(decimals) - 1)
    return whole, decimals[:spot] + draw.choice("0123456789") + decimals[spot + 1 :]


def _two_forms(draw: Draw) -> tuple[tuple[str, str], tuple[str, str]]:
    kind = draw.random()
    first = _whole(draw), _decimals(draw)
    if kind < 0.42:
        second = first[0], _decimals(draw)
    elif kind < 0.60:
        second = _other_form(draw, *first)
    elif kind < 0.75:
        second = _whole(draw), _decimals(draw)
    elif kind < 0.82:
        first, second = (first[0], ""), (draw.choice((first[0], _whole(draw))), _decimals(draw))
    elif kind < 0.92:
        first, second = (first[0], ""), (_whole(draw), "")
    else:  # two whole parts of one length
        second = (
            "".join(draw.choice("123456789") for _ in first[0]),
            draw.choice(("", _decimals(draw))),
        )
    return (first, second) if draw.chance(0.5) else (second, first)


def _written(draw: Draw, form: tuple[str, str], minus: str) -> str:
    whole, decimals = form
    if draw.chance(0.04):
        whole = "0" * draw.between(1, 2) + whole
    if whole == "0" and decimals and draw.chance(0.06):
        whole = ""
    return minus + whole + ("." + decimals if decimals else "")


def _key(first: str, second: str) -> str:
    values = sorted((Decimal(first).normalize(), Decimal(second).normalize()))
    return f"{values[0]:f}|{values[1]:f}"


def pair_is_held_out(first: str, second: str) -> bool:
    """Whether training never compares these two values, in either order or spelling."""
    key = _key(first, second)
    return key == "9.11|9.9" or held_out(key)


def number_pair(draw: Draw) -> tuple[str, str]:
    """Two numbers as people write them, of this side of the split."""
    while True:
        signs = draw.weighted((("", ""), ("-", "-"), ("-", ""), ("", "-")), (85, 10, 2.5, 2.5))
        forms = _two_forms(draw)
        first, second = (
            _written(draw, form, minus) for form, minus in zip(forms, signs, strict=True)
        )
        if any(text.startswith("-") and Decimal(text) == 0 for text in (first, second)):
            continue
        if pair_is_held_out(first, second) == draw.evaluation:
            return first, second


def _split(text: str) -> tuple[str, str]:
    whole, _, decimals = text.lstrip("-").partition(".")
    return whole.lstrip("0") or "0", decimals


def compare(first: str, second: str) -> tuple[str, str]:
    """The thought that compares two written numbers, and the sign between them."""
    thought = f"Compare {first} and {second}.\n"
    minus = first.startswith("-"), second.startswith("-")
    if minus[0] != minus[1]:
        sign = "<" if minus[0] else ">"
        return thought + f"Only {first if minus[0] else second} is negative.\n" + (
            f"So {first} {sign} {second}."
        ), sign
    (whole_a, decimals_a), (whole_b, decimals_b) = _split(first), _split(second)
    width, depth = max(len(whole_a), len(whole_b)), max(len(decimals_a), len(decimals_b))
    lined_a, lined_b = (
        whole.rjust(width, "0") + ("." + decimals.ljust(depth, "0") if depth else "")
        for whole, decimals in ((whole_a, decimals_a), (whole_b, decimals_b))
    )
    if minus[0]:
        thought += "Both are negative.\n"
    thought += f"Lined up: {lined_a} and {lined_b}.\n"
    places = (*_WHOLE_PLACES[width - 1 :: -1], *_DECIMAL_PLACES[:depth])
    sign = "="
    digits = zip(lined_a.replace(".", ""), lined_b.replace(".", ""), strict=True)
    for name, (digit_a, digit_b) in zip(places, digits, strict=True):
        sign = "=" if digit_a == digit_b else "<" if digit_a < digit_b else ">"
        thought += f"{name}: {digit_a} {sign} {digit_b}\n"
        if sign != "=":
            break
    if minus[0] and sign != "=":
        thought += f"Without the minus, {sign}. With it, {_TURNED[sign]}.\n"
        sign = _TURNED[sign]
    return thought + f"So {first} {sign} {second}.", sign


def _winner(first: str, second: str, sign: str, bigger: bool) -> tuple[str, str]:
    return (first, second) if (sign == ">") == bigger else (second, first)


def _shown(draw: Draw, unit: str, *numbers: str) -> tuple[str, ...]:
    return tuple(unit.replace("_", number) for number in numbers)


def _which(draw: Draw) -> Comparison:
    first, second = number_pair(draw)
    unit, answer_form = "_", "{X} is {W} than {Y}."
    kind = draw.random()
    if kind < 0.62:
        word = draw.choice(_FREQUENT) if draw.chance(0.6) else draw.choice(list(COMPARATIVES))
        bigger, template = COMPARATIVES[word][0], draw.phrasing(_WHICH)
        unit = draw.choice(_UNITS) if draw.chance(0.12) else "_"
    elif kind < 0.76:
        word, bigger, template = "bigger", True, draw.phrasing(_COMPARE)
    elif kind < 0.86:
        word = draw.choice(list(SUPERLATIVES))
        bigger, template = SUPERLATIVES[word], draw.phrasing(_WHICH_OF_TWO)
        if draw.chance(0.2) and word in ("maximum", "minimum"):
            word = word[:3]
        answer_form = "{X} is the {W}."
    else:
        more, less, units = draw.choice(_QUANTITIES)
        bigger = draw.chance(0.5)
        word, unit = more if bigger else less, draw.choice(units)
        template = draw.phrasing(_QUANTITY_WHICH)
    shown_a, shown_b = _shown(draw, unit, first, second)
    question = fill(careless(draw, framed(draw, template)), {"A": shown_a, "B": shown_b, "W": word})
    return _decided(question, (first, second), (shown_a, shown_b), word, bigger, answer_form)


def _decided(
    question: str,
    numbers: tuple[str, str],
    shown: tuple[str, str],
    word: str,
    bigger: bool,
    answer_form: str = "{X} is {W} than {Y}.",
) -> Comparison:
    thought, sign = compare(*numbers)
    if sign == "=":
        answer = f"{shown[0]} and {shown[1]} are equal."
        return Comparison(question, thought, answer, Check("equal", ()))
    winner, loser = _winner(*shown, sign, bigger)
    thought += f"\nThe {word} one is {winner}."
    answer = fill(answer_form, {"X": winner, "Y": loser, "W": word})
    right = numbers[shown.index(winner)] if shown[0] != shown[1] else numbers[0]
    return Comparison(question, thought, answer, Check("first", (right,)))


def _whether(draw: Draw) -> Comparison:
    first, second = number_pair(draw)
    thought, sign = compare(first, second)
    kind = draw.random()
    word = draw.choice(_FREQUENT) if draw.chance(0.5) else draw.choice(list(COMPARATIVES))
    bigger, opposite = COMPARATIVES[word]
    asks_equal = 0.62 <= kind < 0.78
    yes, no = "Yes", "No"
    if kind < 0.62:
        template = draw.phrasing(_WHETHER)
    elif asks_equal:
        template = draw.phrasing(_EQUAL)
    else:
        template, yes, no = draw.phrasing(_CLAIM), "True", "False"
        if "{S}" in template:
            word, opposite = ("bigger", "smaller") if bigger else ("smaller", "bigger")
    question = fill(
        careless(draw, framed(draw, template)),
        {"A": first, "B": second, "W": word, "S": ">" if bigger else "<"},
    )
    if asks_equal:
        holds = sign == "="
        word = opposite = "bigger" if sign == ">" else "smaller"
    else:
        holds = sign == (">" if bigger else "<")
    if sign == "=":
        answer = f"{yes if holds else no}, {first} and {second} are equal."
    else:
        relation = word if holds else opposite
        answer = f"{yes if holds else no}, {first} is {relation} than {second}."
    thought += f"\nThe answer is {(yes if holds else no).lower()}."
    return Comparison(question, thought, answer, Check("starts", (yes if holds else no,)))


def _sign(draw: Draw) -> Comparison:
    first, second = number_pair(draw)
    thought, sign = compare(first, second)
    question = fill(careless(draw, framed(draw, draw.phrasing(_SIGN))), {"A": first, "B": second})
    answer = f"{first} {sign} {second}"
    return Comparison(question, thought, answer, Check("contains", (answer,)))


def _several_numbers(draw: Draw) -> list[str]:
    """Three or four different numbers; their first pair is of this side of the split."""
    count = draw.weighted((3, 4), (0.75, 0.25))
    while True:
        numbers = list(number_pair(draw))
        if max(map(len, numbers)) > 7:  # or the thought would be very long
            continue
        while len(numbers) < count:
            whole, decimals = _split(draw.choice(numbers))
            form = _other_form(draw, whole, decimals[:4] or "5")
            minus = "-" if numbers[0].startswith("-") and draw.chance(0.8) else ""
            form = form if draw.chance(0.6) else (whole, _decimals(draw)[:4])
            numbers.append(_written(draw, form, minus))
        if len({Decimal(number) for number in numbers}) < count:
            continue
        pairs = itertools.combinations(numbers[1:], 2)
        if draw.evaluation or not any(pair_is_held_out(*pair) for pair in pairs):
            return numbers


def _listed(draw: Draw, numbers: list[str]) -> str:
    if draw.chance(0.4):
        return ", ".join(numbers)
    return ", ".join(numbers[:-1]) + draw.choice((" and ", " or ", ", and ")) + numbers[-1]


def _several(draw: Draw) -> Comparison:
    numbers = _several_numbers(draw)
    word = draw.choice(list(SUPERLATIVES))
    bigger = SUPERLATIVES[word]
    question = fill(
        careless(draw, framed(draw, draw.phrasing(_SEVERAL))),
        {"W": word, "L": _listed(draw, numbers)},
    )
    best, thoughts = numbers[0], []
    for number in numbers[1:]:
        thought, sign = compare(best, number)
        best = _winner(best, number, sign, bigger)[0]
        thoughts.append(thought + f"\nThe {word} so far is {best}.")
    answer = f"{best} is the {word}."
    return Comparison(question, "\n".join(thoughts), answer, Check("first", (best,)))


def _ordered(draw: Draw) -> Comparison:
    numbers = _several_numbers(draw)[:3] if draw.chance(0.8) else list(number_pair(draw))
    rising = draw.chance(0.6)
    question = fill(
        careless(draw, framed(draw, draw.phrasing(_ORDER_UP if rising else _ORDER_DOWN))),
        {"L": _listed(draw, numbers)},
    )
    order, thoughts = [numbers[0]], []
    for number in numbers[1:]:
        spot = len(order)
        while spot:  # insertion from the far end
            thought, sign = compare(order[spot - 1], number)
            thoughts.append(thought)
            if sign == "=" or (sign == "<") == rising:
                break
            spot -= 1
        order.insert(spot, number)
        thoughts.append(f"In order so far: {', '.join(order)}.")
    answer = f"In order: {', '.join(order)}."
    return Comparison(question, "\n".join(thoughts), answer, Check("order", tuple(order)))


def _owned(draw: Draw) -> Comparison:
    first, second = number_pair(draw)
    if draw.chance(0.5):
        names = person(draw), person(draw)
        template, unit = draw.phrasing(_OWNERS), draw.choice((*_UNITS, "_", "_", "_"))
        word = "less" if "less" in template else "more"
        bigger, shown_names = word == "more", names
    else:
        names = noun(draw), noun(draw)
        more, less, units = draw.choice(_QUANTITIES)
        bigger = draw.chance(0.5)
        template, word, unit = draw.phrasing(_ITEMS), more if bigger else less, draw.choice(units)
        shown_names = f"the {names[0]}", f"the {names[1]}"
    if names[0].lower() == names[1].lower():
        return _owned(draw)
    shown_a, shown_b = _shown(draw, unit, first, second)
    question = fill(
        careless(draw, framed(draw, template)),
        {"A": shown_a, "B": shown_b, "W": word, "P": names[0], "Q": names[1]},
    )
    steps, sign = compare(first, second)
    thought = f"{names[0]}: {first}. {names[1]}: {second}.\n{steps}"
    if sign == "=":
        answer = f"{shown_a} and {shown_b} are equal."
        return Comparison(question, thought, answer, Check("equal", ()))
    winner = _winner(first, second, sign, bigger)[0] == first
    name = shown_names[0 if winner else 1]
    thought += f"\n{name[0].upper() + name[1:]}: {word}."
    quantity, other = (shown_a, shown_b) if winner else (shown_b, shown_a)
    answer = f"{name[0].upper() + name[1:]}: {quantity} is {word} than {other}."
    return Comparison(question, thought, answer, Check("starts", (name,)))


def _in_other_words(draw: Draw) -> Comparison:
    first, second = number_pair(draw)
    chinese = draw.chance(0.6)
    # One phrasing for each other language: a language that training lacks is not asked in.
    template = draw.phrasing(_CHINESE) if chinese else draw.familiar(_FOREIGN)
    question = fill(template, {"A": first, "B": second})
    if not chinese:
        return _decided(question, (first, second), (first, second), "bigger", True)
    case = _decided(question, (first, second), (first, second), "bigger", True, "{X} 比 {Y} 大。")
    if case.check.kind == "equal":
        return Comparison(question, case.thought, f"{first} 和 {second} 一样大。", case.check)
    return case


def follow_up(draw: Draw) -> Comparison:
    """A second question that leans on the first one ("And 3.4 or 3.12?")."""
    first, second = number_pair(draw)
    question = fill(careless(draw, draw.phrasing(_AGAIN)), {"A": first, "B": second})
    return _decided(question, (first, second), (first, second), "bigger", True)


_MAKERS = (_which, _whether, _sign, _several, _ordered, _owned, _in_other_words)
_SHARES = (0.50, 0.19, 0.03, 0.08, 0.04, 0.10, 0.06)


def comparison(draw: Draw) -> Comparison:
    """A question of any kind about the size of numbers."""
    return draw.weighted(_MAKERS, _SHARES)(draw)


_NUMBER = re.compile(r"-?\d*\.?\d+")


def comparison_is_right(check: Check, answer: str) -> bool:
    """Whether a visible answer (the thought left out) says what it must."""
    numbers = _NUMBER.findall(answer)
    if check.kind == "first":
        return bool(numbers) and numbers[0] == check.values[0] and "equal" not in answer
    if check.kind == "equal":
        return "equal" in answer or "一样" in answer
    if check.kind == "starts":
        return answer.lower().startswith(check.values[0].lower())
    if check.kind == "contains":
        return check.values[0] in answer
    assert check.kind == "order", check.kind
    return numbers == list(check.values)
