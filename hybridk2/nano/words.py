"""Words of the generated corpus, and the line between training and evaluation.

Owns the word lists, the makers of names nobody has seen, and `Draw`, the one source of
randomness of the corpus. `held_out` decides by a hash which strings training never shows:
a `Draw` for training refuses them, a `Draw` for evaluation takes them only. Knows nothing of
conversations or of tokens.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

# One string in eight is kept for evaluation.
HELD_OUT_ONE_IN = 8
_USUAL_PHRASINGS = 6
# The two questions of the README: never trained on, whatever their hash says.
ALWAYS_HELD_OUT = frozenset({"Beijing", "get_weather"})


def held_out(text: str) -> bool:
    """Whether training must never show `text`; a pure function of the string."""
    if text in ALWAYS_HELD_OUT:
        return True
    return zlib.crc32(text.encode("utf-8")) % HELD_OUT_ONE_IN == 0


class Draw:
    """Seeded randomness that knows which side of the split it is on."""

    def __init__(self, seed: int, *, evaluation: bool = False) -> None:
        self.rng = random.Random(seed)
        self.evaluation = evaluation
        self.random = self.rng.random
        self.choice = self.rng.choice
        self.between = self.rng.randint
        self._sides: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def weighted(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        return self.rng.choices(items, weights)[0]

    def _side(self, items: tuple[str, ...]) -> tuple[list[str], list[str]]:
        if items not in self._sides:
            self._sides[items] = (
                [item for item in items if not held_out(item)],
                [item for item in items if held_out(item)],
            )
        return self._sides[items]

    def word(self, items: tuple[str, ...]) -> str:
        """One of this side's words (any word, if the list is too short to have a side)."""
        trained, kept = self._side(items)
        return self.choice((kept if self.evaluation else trained) or items)

    def phrasing(self, items: tuple[str, ...]) -> str:
        """A phrasing: for evaluation, a good third are ones that training never shows.

        The first few of a table, the most usual ones, are trained on whatever their hash: it is
        the values in them that are new.
        """
        usual, rare = items[:_USUAL_PHRASINGS], items[_USUAL_PHRASINGS:]
        trained, kept = self._side(rare)
        if self.evaluation and kept and self.chance(0.35):
            return self.choice(kept)
        spot = self.between(0, len(usual) + len(trained) - 1)
        return usual[spot] if spot < len(usual) else trained[spot - len(usual)]

    def familiar(self, items: tuple[str, ...]) -> str:
        """A phrasing that training shows, whatever the side: where another cannot be expected."""
        rare = items[_USUAL_PHRASINGS:]
        known = (*items[:_USUAL_PHRASINGS], *self._side(rare)[0])
        return known[self.between(0, len(known) - 1)]

    def fresh(self, make: Callable[[], str]) -> str:
        """A made-up string of this side."""
        while True:
            text = make()
            if held_out(text) == self.evaluation:
                return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.strip() for line in text.strip().split("|") if line.strip()))


CITIES = _lines("""
Beijing|Shanghai|Paris|London|Tokyo|New York|Los Angeles|Berlin|Madrid|Rome|Vienna|Prague|Warsaw
|Budapest|Lisbon|Dublin|Athens|Oslo|Stockholm|Helsinki|Copenhagen|Amsterdam|Brussels|Zurich|Geneva
|Milan|Naples|Turin|Munich|Hamburg|Frankfurt|Cologne|Lyon|Marseille|Nice|Bordeaux|Barcelona|Seville
|Valencia|Porto|Moscow|Saint Petersburg|Kyiv|Minsk|Riga|Tallinn|Vilnius|Istanbul|Ankara|Cairo
|Alexandria|Tunis|Algiers|Casablanca|Marrakesh|Lagos|Accra|Nairobi|Addis Ababa|Kampala|Cape Town
|Johannesburg|Durban|Harare|Lusaka|Dakar|Tehran|Baghdad|Damascus|Beirut|Amman|Jerusalem|Tel Aviv
|Riyadh|Jeddah|Dubai|Abu Dhabi|Doha|Kuwait City|Muscat|Karachi|Lahore|Islamabad|Kabul|Delhi
|New Delhi|Mumbai|Bangalore|Chennai|Kolkata|Hyderabad|Pune|Dhaka|Kathmandu|Colombo|Yangon|Bangkok
|Hanoi|Ho Chi Minh City|Phnom Penh|Vientiane|Kuala Lumpur|Singapore|Jakarta|Bandung|Manila|Cebu
|Taipei|Hong Kong|Macau|Shenzhen|Guangzhou|Chengdu|Wuhan|Xi'an|Nanjing|Hangzhou|Suzhou|Tianjin
|Chongqing|Harbin|Dalian|Seoul|Busan|Incheon|Osaka|Kyoto|Nagoya|Sapporo|Fukuoka|Yokohama|Sydney
|Melbourne|Brisbane|Perth|Adelaide|Auckland|Wellington|Christchurch|Honolulu|Anchorage|Seattle
|Portland|San Francisco|Oakland|San Jose|San Diego|Las Vegas|Phoenix|Denver|Salt Lake City|Dallas
|Houston|Austin|San Antonio|New Orleans|Atlanta|Miami|Orlando|Tampa|Charlotte|Nashville|Memphis
|Chicago|Detroit|Cleveland|Pittsburgh|Philadelphia|Boston|Washington|Baltimore|Toronto|Montreal
|Ottawa|Vancouver|Calgary|Edmonton|Quebec|Mexico City|Guadalajara|Monterrey|Havana|Kingston
|San Juan|Panama City|Bogota|Medellin|Cali|Quito|Lima|Cusco|La Paz|Santiago|Buenos Aires|Cordoba
|Montevideo|Asuncion|São Paulo|Rio de Janeiro|Brasília|Salvador|Recife|Reykjavík|Málaga|Córdoba
|Zürich|Genève|Köln|München|Düsseldorf|Kraków|Łódź|Gdańsk|Wrocław|Göteborg|Malmö|Århus|Tromsø
|Bogotá|Medellín|Cancún|Querétaro|Québec|Montréal|İzmir|Şanlıurfa|Plzeň|České Budějovice|Győr
|Iași|Timișoara|Đà Nẵng|北京|上海|广州|深圳|成都|西安|东京|大阪|首尔|台北|香港|巴黎|伦敦|Bath|York
|Cambridge|Oxford|Leeds|Bristol|Glasgow|Edinburgh|Cardiff|Belfast|Cork|Galway|Bergen|Aarhus|Turku
|Tampere|Uppsala|Graz|Linz|Salzburg|Innsbruck|Basel|Bern|Lausanne|Verona|Venice|Florence|Bologna
|Palermo|Catania|Split|Zagreb|Ljubljana|Sarajevo|Belgrade|Skopje|Sofia|Bucharest|Chisinau|Odesa
|Lviv|Tbilisi|Yerevan|Baku|Tashkent|Almaty|Bishkek|Ulaanbaatar|Springfield|Boulder|Santa Fe|Tucson
""")

PEOPLE = _words("""
Anna Tom Maria John Peter Paul Lucy Emma Olivia Noah Liam Mia Sophia Jack Harry Charlie Oscar Ella
Grace Alice Bob Carol Dave Eve Frank Heidi Ivan Judy Karl Laura Mike Nina Otto Paula Quentin Rita
Steve Tina Uma Victor Wendy Xavier Yara Zoe Ahmed Fatima Omar Layla Yusuf Aisha Hassan Leila Chen
Wei Ming Li Wang Zhang Yuki Hiro Sakura Kenji Aiko Min Jin Soo Priya Raj Anil Deepa Sanjay Kavita
Carlos Juan Sofia Lucia Diego Mateo Pablo Elena Ines Rosa Pedro Joao Ana Luis Marta Giulia Marco
Luca Chiara Matteo Francesca Pierre Marie Jean Claire Louis Camille Hans Greta Lukas Lena Jonas
Klara Ingrid Lars Erik Astrid Bjorn Olga Dmitri Natasha Boris Svetlana Igor Katya Amara Kofi Zainab
Thabo Nomsa Ade Chidi Ngozi Kwame Sam Alex Robin Kim Max Leo Ben Dan Ron Amy Beth Kate Jane Mary
Ruth Sarah Rachel David Daniel Adam Simon Mark Luke Matthew James Andrew Philip Thomas George Henry
""")

COUNTRIES = _lines("""
France|Germany|Spain|Italy|Portugal|Poland|Austria|Switzerland|Belgium|Netherlands|Denmark|Norway
|Sweden|Finland|Iceland|Ireland|Greece|Turkey|Egypt|Morocco|Algeria|Tunisia|Kenya|Nigeria|Ghana
|South Africa|Ethiopia|Uganda|Tanzania|Zambia|China|Japan|South Korea|India|Pakistan|Bangladesh
|Nepal|Sri Lanka|Thailand|Vietnam|Laos|Cambodia|Malaysia|Indonesia|Philippines|Australia|New Zealand
|Canada|Mexico|Cuba|Jamaica|Brazil|Argentina|Chile|Peru|Bolivia|Colombia|Ecuador|Uruguay|Paraguay
|Venezuela|Russia|Ukraine|Belarus|Estonia|Latvia|Lithuania|Czech Republic|Slovakia|Hungary|Romania
|Bulgaria|Serbia|Croatia|Slovenia|Albania|Israel|Jordan|Lebanon|Iraq|Iran|Saudi Arabia|Qatar|Oman
|Yemen|Mongolia|Kazakhstan|Uzbekistan|Georgia|Armenia|Fiji|Samoa|Panama|Costa Rica|Guatemala
""")

LANGUAGES = _words("""
French German Spanish Italian Portuguese Polish Dutch Danish Norwegian Swedish Finnish Icelandic
Irish Greek Turkish Arabic Hebrew Persian Hindi Bengali Tamil Telugu Urdu Nepali Thai Vietnamese
Lao Khmer Malay Indonesian Tagalog Japanese Korean Chinese Mongolian Russian Ukrainian Czech Slovak
Hungarian Romanian Bulgarian Serbian Croatian Latin Swahili Yoruba Zulu Welsh Basque Catalan
""")

CURRENCIES = _words("""
USD EUR GBP JPY CNY CHF CAD AUD NZD SEK NOK DKK PLN CZK HUF RON BGN TRY RUB UAH INR PKR BDT LKR THB
VND MYR IDR PHP SGD HKD KRW TWD BRL ARS CLP COP PEN MXN ZAR EGP KES NGN GHS MAD ILS SAR AED QAR
""")

COMPANIES = _lines("""
Apple|Google|Microsoft|Amazon|Meta|Tesla|Nvidia|Intel|Samsung|Sony|Toyota|Honda|Siemens|Bosch|Nestle
|Unilever|Shell|Boeing|Airbus|Netflix|Disney|Nike|Adidas|Visa|Oracle|Adobe|Cisco|Dell|Lenovo|Xiaomi
|Tencent|Alibaba|Baidu|Moonshot|Nokia|Ericsson|Philips|Volkswagen|Renault|Volvo|Ferrari|Starbucks
|Pfizer|Novartis|Bayer|Caterpillar|General Motors|Ford|Walmart|Costco|Ikea|Spotify|Uber|Airbnb
""")

NOUNS = _words("""
apple river mountain table chair window garden bridge castle forest desert ocean island village
market museum library school hospital station airport harbor train plane bicycle car truck boat
rocket satellite planet star moon sun cloud storm rain snow wind fire stone metal gold silver copper
iron glass paper wood cotton silk leather bread cheese butter milk coffee tea sugar salt pepper rice
pasta pizza soup salad chicken beef fish egg potato tomato onion carrot banana orange lemon cherry
grape melon peach pear plum strawberry chocolate cookie cake honey dog cat horse cow sheep goat pig
rabbit mouse tiger lion elephant monkey bear wolf fox deer eagle owl parrot penguin whale shark
dolphin turtle snake frog spider bee ant butterfly flower rose tree leaf grass seed root doctor
teacher engineer farmer painter singer actor writer lawyer soldier sailor pilot chef baker tailor
king queen prince knight wizard dragon ghost robot computer phone camera radio television keyboard
printer battery engine wheel mirror clock lamp candle bottle cup plate knife fork spoon basket
bucket hammer nail screw rope ladder shovel brush pencil pen notebook book letter stamp envelope
newspaper magazine novel poem song guitar piano violin drum flute concert theater movie painting
statue game puzzle chess football tennis hockey golf marathon medal ticket passport suitcase hotel
restaurant kitchen bedroom bathroom garage roof wall floor door key lock money coin bank loan tax
price budget salary contract company factory office meeting project report email password website
server network database program language grammar alphabet number triangle circle square angle
fraction equation theorem proof history geography physics chemistry biology medicine vaccine virus
cell brain heart blood bone muscle skin tooth eye ear nose hand foot dream memory music color
shadow light sound silence time year month week day hour minute birthday wedding holiday festival
""")

ADJECTIVES = _words("""
red blue green yellow purple black white bright dark small big tall short old new young fast slow
hot cold warm cool dry wet clean dirty quiet loud soft hard sweet bitter sour salty fresh rich poor
happy sad angry calm brave shy kind wild gentle strange famous secret ancient modern simple complex
cheap heavy lonely empty broken golden silver wooden sunny rainy cloudy windy foggy snowy stormy
clear humid mild
""")

VERBS = _words("""
find watch build paint carry open close break repair clean cook bake sell buy borrow lose follow
visit remember forget describe explain draw write read sing play push pull lift throw catch hide
show teach learn study count measure choose change mix cut wash burn freeze plant grow feed train
""")

SKY = _lines("""
sunny|cloudy|partly cloudy|light rain|heavy rain|snow|thunderstorm|clear sky|fog|windy|drizzle|hail
|overcast|hot and humid|cold and dry|scattered showers|Sunny|Cloudy|Clear|Rain|Snow|Overcast|Mist
""")

_ONSETS = _words(
    "b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl st t th tr v w "
    "x y z zh"
)
_VOWELS = _words("a e i o u a e i o u ai ea ei ia io oo ou ee au")
_CODAS = ("", "", "", "", "n", "r", "l", "s", "t", "m", "k", "x", "nd", "rk", "st", "sh", "ng", "p")
_ACCENTED = "áàâäãåāéèêëēíìîïóòôöõøúùûüñçšžłśćńőřđýþ"
_RARE = ((0x00E0, 0x00F6), (0x0100, 0x017F), (0x0180, 0x024F), (0x0300, 0x036F))
_SCRIPTS = (
    (0x4E00, 0x7FFF), (0x4E00, 0x6FFF), (0x3041, 0x3090), (0x30A1, 0x30F0), (0x0410, 0x044F),
    (0x03B1, 0x03C9), (0xAC00, 0xD7A0), (0x05D0, 0x05EA), (0x0627, 0x064A), (0x0905, 0x0939),
)  # fmt: skip


def blend(draw: Draw, items: tuple[str, ...]) -> str:
    """The head of one word and the tail of another: looks like a word of the list, is none."""
    head, tail = draw.choice(items), draw.choice(items)
    return head[: draw.between(2, 4)] + tail[-draw.between(2, 4) :]


def pseudo_word(draw: Draw) -> str:
    """A lower-case word that does not exist: one to four syllables, or a blend of two words."""
    if draw.chance(0.35):
        return blend(draw, NOUNS if draw.evaluation else draw.choice((NOUNS, ADJECTIVES, VERBS)))
    syllables = draw.weighted((1, 2, 3, 4), (0.2, 0.55, 0.21, 0.04))
    return "".join(
        draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(syllables)
    )


def letters(draw: Draw, shortest: int, longest: int, alphabet: str) -> str:
    return "".join(draw.choice(alphabet) for _ in range(draw.between(shortest, longest)))


def _accented(draw: Draw) -> str:
    text = list(pseudo_word(draw))
    for _ in range(draw.between(1, 2)):
        # Training goes beyond the usual letters, to marks that stand on the letter before them.
        rare = not draw.evaluation and draw.chance(0.4)
        letter = chr(draw.between(*draw.choice(_RARE))) if rare else draw.choice(_ACCENTED)
        text[draw.between(0, len(text) - 1)] = letter
    return "".join(text)


def _other_script(draw: Draw) -> str:
    first, last = draw.choice(_SCRIPTS)
    text = "".join(chr(draw.between(first, last)) for _ in range(draw.between(1, 5)))
    return text if text.isprintable() else _other_script(draw)


def _proper_name(draw: Draw) -> str:
    kind = draw.random()
    if kind < 0.50:
        # Several words are where copies go wrong: training shows them more often.
        lengths = (0.7, 0.24, 0.06) if draw.evaluation else (0.5, 0.33, 0.17)
        return " ".join(
            pseudo_word(draw).capitalize() for _ in range(draw.weighted((1, 2, 3), lengths))
        )
    if kind < 0.62:
        return _accented(draw).capitalize()
    if kind < 0.76:
        return _other_script(draw)
    if kind < 0.84:
        joint = draw.choice(("-", "'", ". ", " de ", " of ", "-la-", " upon "))
        return pseudo_word(draw).capitalize() + joint + pseudo_word(draw).capitalize()
    if kind < 0.92:
        return letters(draw, 3, 10, "abcdefghijklmnopqrstuvwxyz").capitalize()
    if draw.evaluation or draw.chance(0.5):
        return draw.choice(("Port", "New", "San", "Saint", "North", "Lake", "Fort", "Mount")) + (
            " " + pseudo_word(draw).capitalize()
        )
    return pseudo_word(draw).capitalize() + draw.choice((" City", " Falls", " Bay", " Hills"))


def place(draw: Draw) -> str:
    """A city: a real one, or one that exists nowhere."""
    known = draw.chance(0.5 if draw.evaluation else 0.4)
    return draw.word(CITIES) if known else draw.fresh(lambda: _proper_name(draw))


def person(draw: Draw) -> str:
    if draw.chance(0.6):
        return draw.word(PEOPLE)
    return draw.fresh(lambda: pseudo_word(draw).capitalize())


def noun(draw: Draw) -> str:
    known = draw.chance(0.55 if draw.evaluation else 0.45)
    return draw.word(NOUNS) if known else draw.fresh(lambda: pseudo_word(draw))


def title(draw: Draw) -> str:
    """A name of a film, a song, a book: two to four capitalised words."""
    words = [draw.word(ADJECTIVES), draw.word(NOUNS)]
    if not draw.evaluation:
        words = [
            draw.fresh(lambda: pseudo_word(draw)) if draw.chance(0.3) else word for word in words
        ]
    if draw.chance(0.4 if draw.evaluation else 0.5):
        words += ["of", draw.choice((draw.word(NOUNS), draw.fresh(lambda: pseudo_word(draw))))]
    text = " ".join(word if word == "of" else word.capitalize() for word in words)
    return "The " + text if draw.chance(0.5) else text


def phrase(draw: Draw, shortest: int = 2, longest: int = 7) -> str:
    """A run of lower-case words, made-up ones among them, now and then one of them twice.

    In training more are made up: what has to be learned is to copy, not which words there are.
    """
    words: list[str] = []
    known = 0.8 if draw.evaluation else 0.55
    for _ in range(draw.between(shortest, longest)):
        if words and draw.chance(0.08 if draw.evaluation else 0.12):
            words.append(draw.choice(words))
        elif draw.chance(known):
            words.append(draw.word(draw.choice((NOUNS, NOUNS, ADJECTIVES, VERBS))))
        else:
            words.append(draw.fresh(lambda: pseudo_word(draw)))
    return " ".join(words)


def sentence(draw: Draw) -> str:
    """A grammatical sentence about nothing."""
    text = draw.phrasing(_SENTENCES).format(
        n1=draw.word(NOUNS), n2=draw.word(NOUNS), n3=noun(draw), a1=draw.word(ADJECTIVES),
        a2=draw.word(ADJECTIVES), v1=draw.word(VERBS), v2=draw.word(VERBS), p=draw.word(PEOPLE),
        c=draw.word(CITIES),
    )  # fmt: skip
    return text[0].upper() + text[1:]


_SENTENCES = _lines("""
the {a1} {n1} is near the {n2}.|{p} likes to {v1} the {a1} {n1}.|we {v1} a {n1} every {n2}.
|in {c} the {n1} was {a1} and the {n2} was {a2}.|a {n1} can {v1} a {n2}, but not a {n3}.
|yesterday {p} went to {c} to {v1} a {a1} {n1}.|nobody knows why the {n1} is {a1}.
|my {n1} is {a1}, your {n2} is {a2}.|the {n3} of {c} is {a1}.|please do not {v1} the {n1}.
|when the {n1} is {a1}, {p} will {v1} the {n2}.|{p} has a {a1} {n1} and a {a2} {n3}.
|it takes a {n1} to {v1} a {a2} {n2}.|there is no {n1} in the {a1} {n2}.
|i want to {v1} my {a1} {n1}.|the {n1} and the {n2} are both {a1}.
|{p} said that every {n1} must {v2} some {n2}.
""")
