"""What tools are about: the table from which declarations and questions are made.

A kind says how such a tool may be named and described, which parameters it takes, how people ask
for it, and what it returns. `tools.py` turns a kind into a declaration under a name that nobody
has seen; this file knows values and wording only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from hybridk2.nano import words
from hybridk2.nano.phrasing import alternatives
from hybridk2.nano.words import Draw

Value = str | int | float | bool


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kind.

    names, about: how it may be called and described. value: draws what the user says; text is
    passed on as it was typed. phrases: how an optional parameter is mentioned ("{x}" stands for
    the value); a parameter without phrases is required and has its slot in the questions.
    """

    role: str
    names: str
    about: str
    value: Callable[[Draw], Value]
    type: str = "string"
    enum: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One sort of tool. `bare` are questions that leave the required value out."""

    verbs: str
    nouns: str
    about: str
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]
    returns: str
    bare: tuple[str, ...] = field(default=())


def _integer(low: int, high: int) -> Callable[[Draw], int]:
    return lambda draw: draw.between(low, high)


def _amount(draw: Draw) -> int | float:
    if draw.chance(0.6):
        return draw.choice((draw.between(1, 99), draw.between(1, 9) * 100, draw.between(1, 5000)))
    return draw.between(1, 999) + draw.between(1, 9) / 10


def _one_of(items: tuple[str, ...]) -> Callable[[Draw], str]:
    return lambda draw: draw.choice(items)


def _symbol(draw: Draw) -> str:
    return words.letters(draw, 2, 5, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _code(draw: Draw) -> str:
    letters = words.letters(draw, 0, 3, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    digits = words.letters(draw, 2, 6, "0123456789")
    joint = draw.choice(("", "-", "_", "/")) if letters else ""
    tail = "-" + words.letters(draw, 1, 3, "ABCDEFXYZ0123456789") if draw.chance(0.2) else ""
    return letters + joint + digits + tail


def _date(draw: Draw) -> str:
    if draw.chance(0.5):
        return f"{draw.between(1990, 2035)}-{draw.between(1, 12):02}-{draw.between(1, 28):02}"
    return draw.choice(
        (
            "today",
            "tomorrow",
            "Monday",
            "Tuesday",
            "Wednesday",
            "Thursday",
            "Friday",
            "Saturday",
            "Sunday",
            "next week",
            "tonight",
        )
    )


def _clock(draw: Draw) -> str:
    if draw.chance(0.6):
        return f"{draw.between(0, 23)}:{draw.between(0, 59):02}"
    return f"{draw.between(1, 12)}{draw.choice((' am', ' pm', 'am', 'pm'))}"


def _email(draw: Draw) -> str:
    name = words.person(draw).lower()
    return f"{name}@{words.pseudo_word(draw)}.{draw.choice(('com', 'org', 'net', 'io', 'de'))}"


def _link(draw: Draw) -> str:
    path = "/" + words.pseudo_word(draw) if draw.chance(0.5) else ""
    return f"https://{words.pseudo_word(draw)}.{draw.choice(('com', 'org', 'net', 'io'))}{path}"


def _path(draw: Draw) -> str:
    parts = [words.noun(draw) for _ in range(draw.between(1, 3))]
    lead = draw.choice(("/", "", "./", "/home/"))
    return lead + "/".join(parts) + draw.choice((".txt", ".md", ".py", ".csv", ".json", ""))


def _sum(draw: Draw) -> str:
    sign = draw.choice((" + ", " - ", " * ", " / ", "+", "*"))
    text = f"{draw.between(1, 999)}{sign}{draw.between(1, 99)}"
    return f"({text}) * {draw.between(2, 9)}" if draw.chance(0.2) else text


def _item(draw: Draw) -> str:
    return words.noun(draw)


def _topic(draw: Draw) -> str:
    return words.phrase(draw, 1, 5)


def _message(draw: Draw) -> str:
    return words.phrase(draw, 2, 8) if draw.chance(0.5) else words.sentence(draw).rstrip(".")


def _country(draw: Draw) -> str:
    return draw.word(words.COUNTRIES)


def _company(draw: Draw) -> str:
    return draw.word(words.COMPANIES)


_Q = alternatives
_CITY = Parameter(
    "city",
    "city|location|place|town|city_name|where|destination|q|loc",
    """
                      City name|The city|Name of the city|Name of the place|e.g. San Francisco
                      |The location to look up|City and country
                  """,
    words.place,
)
_UNIT = Parameter(
    "unit",
    """
    unit|units|scale|temperature_unit
""",
    """
    Temperature unit|The unit to use|Unit
""",
    _one_of(("celsius", "fahrenheit")),
    enum=("celsius", "fahrenheit"),
    phrases=_Q(" in {x}| Use {x}.| (in {x})| in {x} please| Answer in {x}."),
)
_DAY = Parameter(
    "date",
    "date|day|when|on_date",
    "The date|Day to look up|Date, YYYY-MM-DD",
    _date,
    phrases=_Q(" on {x}| for {x}| (on {x})"),
)
_LIMIT = Parameter(
    "limit",
    "limit|count|max_results|n|top_k|num_results",
    """
                       Maximum number of results|How many to return|Number of results
                   """,
    _integer(1, 50),
    "integer",
    phrases=_Q("""
                       Show {x} results.|with {x} results|limit {x}|(top {x})
                   """),
)

KINDS: tuple[Kind, ...] = (
    Kind(
        """
        get|fetch|check|lookup|query|current|find|show|read
    """,
        """
        weather|forecast|weather_info|weather_report|current_weather|conditions|city_weather
        |weather_data
    """,
        """
             Get weather information.|Get the current weather in a city
             |Returns the weather forecast for a place|Weather lookup by city
             |Current weather conditions|Tells the weather|Query the weather service.
         """,
        (_CITY, _UNIT, _DAY),
        _Q("""
             What's the weather like in {city} today? Use the tool to check.
             |What's the weather in {city}?|How is the weather in {city}?|Is it raining in {city}?
             |weather in {city}|Weather for {city}?|What is the weather in {city}?
             |Tell me the weather in {city}.|Do I need an umbrella in {city}?
             |Will it rain in {city}?|How warm is it in {city}?|What's the temperature in {city}?
             |{city} weather|Check the weather in {city}.|Can you check the weather for {city}?
             |Is it cold in {city} right now?|What's it like outside in {city}?
             |Give me the forecast for {city}.|I am going to {city}, how is the weather?
             |Look up the weather in {city} please.|Is it sunny in {city}?
             |I need the weather report for {city}.|What does the sky look like in {city}?
             |Use the tool to get the weather in {city}.|What will the weather be like in {city}?
             |how hot is it in {city}|{city}的天气怎么样？|查一下{city}的天气
         """),
        "condition temperature humidity wind weather temp_c summary",
        _Q("""
             What's the weather?|How is the weather?|weather please|Is it raining?
             |Check the weather.
         """),
    ),
    Kind(
        """
        get|fetch|current|lookup|show|tell|what_is_the
    """,
        """
        time|local_time|current_time|clock|timezone_time|world_clock
    """,
        """
             Get the current time in a city.|Local time of a place|Returns the time|World clock
             |Tells what time it is somewhere
         """,
        (_CITY,),
        _Q("""
             What time is it in {city}?|Tell me the time in {city}.|current time in {city}
             |What's the time in {city}?|time in {city}|What is the local time in {city}?
             |Is it night in {city}?|Do you know what time it is in {city}?
             |What time do they have in {city} now?|Give me the time for {city}.
             |what's the clock say in {city}
         """),
        "time timezone date local_time",
        _Q("What time is it?|Tell me the time.|time please"),
    ),
    Kind(
        """
        get|fetch|lookup|check|quote
    """,
        """
        stock_price|stock|share_price|quote|stock_quote|ticker|market_price
    """,
        """
             Get the current stock price.|Look up a share price by ticker symbol|Stock quote
             |Returns the latest price of a stock
         """,
        (
            Parameter(
                "symbol",
                """
             symbol|ticker|stock|code|ticker_symbol
         """,
                """
             Ticker symbol|Stock symbol, e.g. AAPL|The ticker
         """,
                _symbol,
            ),
        ),
        _Q("""
             What's the stock price of {symbol}?|How much is {symbol} trading at?
             |Get me a quote for {symbol}.|price of {symbol} stock|What is {symbol} trading at?
             |How is {symbol} doing on the stock market?|Check the share price of {symbol}.
             |stock price {symbol}|Look up the ticker {symbol}.|Quote {symbol}
             |Where does {symbol} stock stand?
         """),
        "price currency change volume",
        _Q("What's the stock price?|Get me a stock quote."),
    ),
    Kind(
        """
        get|find|lookup|check
    """,
        """
        company_info|company|company_profile|firm_data|ceo|headquarters|revenue
    """,
        "Get information about a company.|Look up a company profile|Company facts by name",
        (
            Parameter(
                "company",
                """
             company|company_name|name|firm
         """,
                """
             Company name|Name of the firm|The company
         """,
                _company,
            ),
        ),
        _Q("""
             Tell me about the company {company}.|Look up company information for {company}.
             |Who is the CEO of {company}?|Where is the headquarters of {company}?
             |What is the revenue of {company}?|Find the company profile of {company}.
             |What does the company {company} do?|company info {company}
         """),
        "ceo headquarters revenue employees founded",
    ),
    Kind(
        "translate|convert|get",
        "text|word|translation|phrase|sentence|to_language",
        """
             Translate text into another language.|Translates a word|Translation service
             |Text translation
         """,
        (
            Parameter(
                "text",
                """
             text|word|phrase|input|source_text|content
         """,
                """
             Text to translate|The word|What to translate
         """,
                _topic,
            ),
            Parameter(
                "language",
                """
              language|target|target_language|to|lang|target_lang|into
          """,
                """
              Target language|Language to translate to|The language
          """,
                lambda draw: draw.word(words.LANGUAGES),
            ),
        ),
        _Q("""
             Translate '{text}' to {language}.|Translate "{text}" into {language}.
             |How do you say '{text}' in {language}?|What is "{text}" in {language}?
             |Please translate '{text}' into {language}.|translate {text} to {language}
             |Say '{text}' in {language}.|I need "{text}" translated to {language}.
             |{language} for '{text}'?|What's the {language} translation of '{text}'?
             |In {language}, what is '{text}'?
         """),
        "translation language text",
    ),
    Kind(
        "convert|exchange|get|calculate",
        "currency|money|exchange|currency_amount|rate",
        "Convert an amount from one currency to another.|Currency conversion|Converts money",
        (
            Parameter(
                "amount",
                """
             amount|value|quantity|sum
         """,
                """
             Amount of money|The amount to convert|Amount
         """,
                _amount,
                "number",
            ),
            Parameter(
                "source",
                """
              from|from_currency|source|base|source_currency
          """,
                """
              Source currency|Currency to convert from|From currency
          """,
                lambda draw: draw.word(words.CURRENCIES),
            ),
            Parameter(
                "target",
                """
              to|to_currency|target|quote|target_currency
          """,
                """
              Target currency|Currency to convert to|To currency
          """,
                lambda draw: draw.word(words.CURRENCIES),
            ),
        ),
        _Q("""
             Convert {amount} {source} to {target}.|How much is {amount} {source} in {target}?
             |{amount} {source} in {target}|What is {amount} {source} in {target}?
             |Exchange {amount} {source} into {target}.|change {amount} {source} to {target}
             |I have {amount} {source}, how many {target} is that?
             |How many {target} do I get for {amount} {source}?
             |convert {amount} {source} into {target} please
         """),
        "result rate currency amount",
    ),
    Kind(
        "get|fetch|lookup",
        "exchange_rate|fx_rate|currency_rate|rate",
        """
             Get the exchange rate between two currencies.|Exchange rate lookup
             |Rate of one currency in another
         """,
        (
            Parameter(
                "source",
                """
             base|from|from_currency|source
         """,
                """
             Base currency|Currency to convert from|From
         """,
                lambda draw: draw.word(words.CURRENCIES),
            ),
            Parameter(
                "target",
                """
              quote|to|to_currency|target
          """,
                """
              Quote currency|Currency to convert to|To
          """,
                lambda draw: draw.word(words.CURRENCIES),
            ),
        ),
        _Q("""
             What's the exchange rate from {source} to {target}?
             |exchange rate {source} to {target}|Give me the rate from {source} to {target}.
             |What is the {source} to {target} exchange rate?
             |How does {source} exchange to {target}?
         """),
        "rate date",
    ),
    Kind(
        """
        search|web|find|google|query|lookup
    """,
        """
        web|internet|search|search_web|online|websearch|documents
    """,
        "Search the web.|Find pages on the internet|Web search|Runs a search query|Search engine",
        (
            Parameter(
                "query",
                """
             query|q|search|term|keywords|search_query|text
         """,
                """
             Search query|What to search for|Query text|Keywords
         """,
                _topic,
            ),
            _LIMIT,
        ),
        _Q("""
             Search the web for {query}.|Search for {query}.
             |Find something about {query} on the internet.|google {query}
             |Look for {query} online.|Search: {query}|Can you search for {query}?
             |Please search the internet for {query}.|web search {query}|Run a search on {query}.
             |I want to find {query} on the web.
         """),
        "title url snippet",
        _Q("Search the web.|Search something for me."),
    ),
    Kind(
        "get|calculate|measure|find",
        "distance|route_length|travel_distance|distance_between",
        """
             Distance between two cities.|Calculate the distance between two places
             |How far two places are apart
         """,
        (
            Parameter(
                "start",
                """
             origin|from|start|city_a|from_city|source|a|first
         """,
                """
             Starting city|Where from|Origin|First city
         """,
                words.place,
            ),
            Parameter(
                "end",
                """
              destination|to|end|city_b|to_city|target|b|second
          """,
                """
              Destination city|Where to|Destination|Second city
          """,
                words.place,
            ),
        ),
        _Q("""
             How far is it from {start} to {end}?|What's the distance between {start} and {end}?
             |distance from {start} to {end}|How many kilometers from {start} to {end}?
             |How far apart are {start} and {end}?|Distance between {start} and {end}?
             |How far is {start} from {end}?|Measure the distance from {start} to {end}.
         """),
        "distance_km distance duration",
    ),
    Kind(
        """
        find|search|get|list|book
    """,
        """
        flights|flight|flight_search|plane_tickets|trains|connections
    """,
        """
             Find flights between two cities.|Search for flights|Flight search
             |Connections from one city to another
         """,
        (
            Parameter(
                "start",
                """
             origin|from|departure|from_city|depart_from
         """,
                """
             Departure city|Where from|Origin
         """,
                words.place,
            ),
            Parameter(
                "end",
                """
              destination|to|arrival|to_city|arrive_at
          """,
                """
              Arrival city|Where to|Destination
          """,
                words.place,
            ),
            _DAY,
        ),
        _Q("""
             Find flights from {start} to {end}.|Is there a flight from {start} to {end}?
             |I want to fly from {start} to {end}.|flights {start} to {end}
             |Show me connections from {start} to {end}.|Search a flight to {end} from {start}.
             |How do I fly to {end} from {start}?|Book a flight from {start} to {end}.
         """),
        "flight departure arrival price airline",
    ),
    Kind(
        "send|post|write|deliver",
        "message|sms|text_message|chat_message|note|dm",
        "Send a message to a person.|Sends a text message|Message somebody",
        (
            Parameter(
                "person",
                """
             recipient|to|contact|name|receiver|user
         """,
                """
             Who gets the message|Recipient|Name of the person
         """,
                words.person,
            ),
            Parameter(
                "message",
                """
              message|text|body|content|msg
          """,
                """
              Message text|What to say|The text to send
          """,
                _message,
            ),
        ),
        _Q("""
             Send a message to {person}: {message}|Tell {person} "{message}"
             |Text {person}: {message}|Send {person} the message '{message}'.
             |Message {person}: {message}|Write to {person}: "{message}"
             |Please send '{message}' to {person}.|Let {person} know: {message}
         """),
        "status sent id",
    ),
    Kind(
        """
        send|write|compose
    """,
        """
        email|mail|e_mail|electronic_mail
    """,
        """
        Send an email.|Sends an email to an address|Email sender
    """,
        (
            Parameter(
                "address",
                """
             to|address|recipient|email|to_address
         """,
                """
             Email address|Address of the recipient|To
         """,
                _email,
            ),
            Parameter(
                "subject",
                """
              subject|title|topic|subject_line
          """,
                """
              Subject line|Subject of the email|Subject
          """,
                _topic,
            ),
        ),
        _Q("""
             Send an email to {address} about {subject}
             |Email {address} with the subject '{subject}'.
             |Write an email to {address} with subject "{subject}".
             |mail {address}, subject: {subject}
             |Compose an email to {address}, the subject is '{subject}'.
         """),
        "status message_id",
    ),
    Kind(
        "get|fetch|read|latest|list",
        "news|headlines|articles|news_articles|top_stories",
        "Get the latest news on a topic.|News headlines|Fetches news articles",
        (
            Parameter(
                "topic",
                """
             topic|subject|query|category|about
         """,
                """
             News topic|What the news is about|Topic
         """,
                _topic,
            ),
            _LIMIT,
        ),
        _Q("""
             What's the news about {topic}?|Any news on {topic}?|Get me headlines about {topic}.
             |latest news on {topic}|news about {topic}|Show me the news on {topic}.
             |What is new about {topic}?|Read me the news about {topic}.
         """),
        "headline source summary",
        _Q("What's the news?|Any news?|Show me the headlines."),
    ),
    Kind(
        """
        get|lookup|find|count
    """,
        """
        population|country_population|inhabitants|capital|country_info|country
    """,
        """
             Get facts about a country.|Population of a country
             |Country information: capital, population, area
         """,
        (
            Parameter(
                "country",
                """
             country|name|country_name|nation
         """,
                """
             Country name|The country|Name of the country
         """,
                _country,
            ),
        ),
        _Q("""
             What's the population of {country}?|How many people live in {country}?
             |What's the capital of {country}?|population of {country}
             |Tell me the capital of {country}.|How big is {country}?|Look up facts on {country}.
             |What is the capital city of {country}?|Get country information for {country}.
         """),
        "population capital area",
    ),
    Kind(
        "define|lookup|get|explain",
        "word|definition|dictionary|meaning|synonyms|term",
        """
             Look up a word in the dictionary.|Definition of a word|Dictionary lookup
             |Meaning of a term
         """,
        (Parameter("word", "word|term|query|entry|lemma", "The word|Word to define|Term", _item),),
        _Q("""
             What does the word {word} mean?|Define {word}.|What's the definition of '{word}'?
             |Look up {word} in the dictionary.|meaning of {word}|What is the meaning of "{word}"?
             |Give me the definition of {word}.|define '{word}'
         """),
        "definition word part_of_speech example",
        _Q("Define a word.|Look up a word."),
    ),
    Kind(
        "find|search|get|suggest",
        "recipe|recipes|meal|dish|cooking_instructions",
        "Find a recipe.|Recipe search by ingredient|Suggests a dish",
        (
            Parameter(
                "dish",
                """
              dish|ingredient|food|query|name|main_ingredient
          """,
                """
              The dish|Main ingredient|What to cook
          """,
                _item,
            ),
            _LIMIT,
        ),
        _Q("""
             Find a recipe for {dish}.|How do I cook {dish}?|recipe with {dish}
             |Give me a recipe for {dish}.|What can I cook with {dish}?
             |I want to make {dish}, find me a recipe.|Show recipes for {dish}.
         """),
        "recipe minutes servings",
    ),
    Kind(
        "get|find|lookup|search",
        "movie|film|movie_info|film_info|movie_details|imdb",
        "Get information about a movie.|Film database|Looks up a film by title",
        (
            Parameter(
                "film",
                """
             title|movie|film|name|movie_title
         """,
                """
             Title of the movie|Film title|The movie
         """,
                words.title,
            ),
        ),
        _Q("""
             Who directed the movie {film}?|Tell me about the movie {film}.
             |When did the film {film} come out?|Look up the film '{film}'.|movie info for {film}
             |What's the movie "{film}" about?|What year is the film {film} from?
         """),
        "director year rating genre",
    ),
    Kind(
        "play|start|queue",
        "music|song|track|playback|tune|audio",
        "Play a song.|Starts music playback|Plays a track",
        (
            Parameter(
                "song",
                """
             song|title|track|name|song_title
         """,
                """
             Title of the song|The track|Song name
         """,
                words.title,
            ),
        ),
        _Q("""
             Play {song}.|Play the song {song}.|Put on {song}.|I want to hear the song {song}.
             |play '{song}'|Start the track {song}.|Can you play "{song}"?
         """),
        "status title",
        _Q("Play a song.|Play some music."),
    ),
    Kind(
        "set|start|create|begin",
        "timer|countdown|kitchen_timer|stopwatch",
        "Set a timer.|Starts a countdown|Timer in minutes",
        (
            Parameter(
                "minutes",
                """
             minutes|duration|length|mins|duration_minutes
         """,
                """
             Minutes|Length in minutes|Duration
         """,
                _integer(1, 120),
                "integer",
            ),
        ),
        _Q("""
             Set a timer for {minutes} minutes.|Start a {minutes} minute timer.
             |timer {minutes} minutes|Count down {minutes} minutes.
             |Wake me up in {minutes} minutes.|Set the timer to {minutes} minutes.
         """),
        "status ends_at",
        _Q("Set a timer.|Start a timer."),
    ),
    Kind(
        "set|create|add|make",
        "reminder|alarm|calendar_event|event|appointment|task",
        "Create a reminder.|Adds an event at a time|Reminds you of something",
        (
            Parameter(
                "event",
                """
             text|title|what|task|event|label
         """,
                """
             What to remember|Title of the event|Text
         """,
                _topic,
            ),
            Parameter(
                "moment",
                """
              time|at|when|start_time|hour
          """,
                """
              Time of day|When|Start time
          """,
                _clock,
            ),
        ),
        _Q("""
             Remind me at {moment} to {event}.|Set a reminder for {moment}: {event}
             |Add an event at {moment}: {event}|At {moment}, remind me: {event}
             |Create a reminder '{event}' at {moment}.|Reminder: {event} at {moment}
         """),
        "status id",
    ),
    Kind(
        "turn|switch|set|control",
        "light|lights|lamp|lighting|light_switch|power",
        "Switch a light on or off.|Controls the lights of a room|Light switch",
        (
            Parameter(
                "room",
                "room|where|area|zone|location",
                "The room|Which room|Room name",
                _one_of(
                    (
                        "kitchen",
                        "bedroom",
                        "bathroom",
                        "garage",
                        "hall",
                        "office",
                        "garden",
                        "attic",
                        "cellar",
                    )
                ),
            ),
            Parameter(
                "state",
                """
              state|mode|action|position|status
          """,
                """
              On or off|The new state|State
          """,
                _one_of(("on", "off")),
                enum=("on", "off"),
            ),
        ),
        _Q("""
             Turn the lights in the {room} {state}.|Turn {state} the light in the {room}.
             |Switch {state} the {room} lights.|{room} lights {state}
             |Lights {state} in the {room} please.|Switch the {room} light {state}.
         """),
        "status room",
    ),
    Kind(
        "get|fetch|lookup|load|read",
        "user|customer|account|member|profile|employee",
        "Get a user by id.|Looks up a customer record|User record",
        (
            Parameter(
                "number",
                """
             id|user_id|number|account_id|customer_id
         """,
                """
             User id|Numeric id|Id of the account
         """,
                _integer(1, 99999),
                "integer",
            ),
        ),
        _Q("""
             Look up user {number}.|Who is the customer with id {number}?
             |Get the user number {number}.|fetch user {number}|Show me account {number}.
             |Load the profile of user {number}.|Which user has the id {number}?
         """),
        "name email status city",
        _Q("Look up a user.|Who is the customer?"),
    ),
    Kind(
        "track|get|check|lookup",
        "package|order|shipment|delivery|parcel|order_status",
        "Track a package.|Order status by number|Where a delivery is",
        (
            Parameter(
                "order",
                """
             order_id|tracking_number|id|code|number|package
         """,
                """
             Tracking number|Order number|Code of the order
         """,
                _code,
            ),
        ),
        _Q("""
             Where is my package {order}?|Track order {order}.|What's the status of order {order}?
             |track {order}|Has the parcel {order} arrived?|Check the delivery {order}.
             |When will order {order} come?
         """),
        "status location eta",
        _Q("Where is my package?|Track my order."),
    ),
    Kind(
        "calculate|compute|evaluate|run",
        "expression|math|sum|calculator|formula",
        "Evaluate a mathematical expression.|Calculator|Computes a formula",
        (
            Parameter(
                "formula",
                """
             expression|formula|expr|input|calculation
         """,
                """
             Expression to evaluate|The formula|Math expression
         """,
                _sum,
            ),
        ),
        _Q("""
             Calculate {formula}.|What is {formula}?|compute {formula}|How much is {formula}?
             |Evaluate {formula}|Work out {formula} for me.|Use the calculator for {formula}.
         """),
        "result",
        _Q("Calculate something.|Use the calculator."),
    ),
    Kind(
        "convert|change|transform",
        "unit|units|measurement|length|weight",
        "Convert a measurement from one unit to another.|Unit conversion|Converts units",
        (
            Parameter(
                "amount",
                """
             value|amount|number|quantity
         """,
                """
             The number|Value to convert|Amount
         """,
                _amount,
                "number",
            ),
            Parameter(
                "source",
                """
              from_unit|from|source_unit|unit_from
          """,
                """
              Unit to convert from|Source unit|From
          """,
                _one_of(("meters", "feet", "miles", "inches", "yards")),
            ),
            Parameter(
                "target",
                "to_unit|to|target_unit|unit_to",
                "Unit to convert to|Target unit|To",
                _one_of(("kilometers", "centimeters", "millimeters", "leagues", "fathoms")),
            ),
        ),
        _Q("""
             Convert {amount} {source} to {target}.|How many {target} are {amount} {source}?
             |{amount} {source} in {target}|What is {amount} {source} in {target}?
             |change {amount} {source} into {target}
         """),
        "result unit",
    ),
    Kind(
        "find|search|list|get",
        "restaurants|restaurant|places_to_eat|food_places|cafes",
        "Find restaurants in a city.|Restaurant search|Where to eat",
        (
            _CITY,
            Parameter(
                "cuisine",
                """
             cuisine|food|kind|type|style
         """,
                """
             Cuisine|Kind of food|Style of cooking
         """,
                lambda draw: draw.word(words.LANGUAGES),
                phrases=_Q("""
                               I like {x} food.|with {x} food|({x} cuisine)
                           """),
            ),
        ),
        _Q("""
             Find a restaurant in {city}|Where can I eat in {city}?|restaurants in {city}
             |Is there a good restaurant in {city}?|I am hungry in {city}, find a restaurant
             |Show places to eat in {city}
         """),
        "name address rating",
        _Q("Find a restaurant.|Where can I eat?"),
    ),
    Kind(
        "book|reserve|find",
        "hotel|hotel_room|room|accommodation|stay",
        "Book a hotel room.|Hotel reservation|Reserves a room in a city",
        (
            _CITY,
            Parameter(
                "nights",
                """
             nights|days|length|num_nights|duration
         """,
                """
             Number of nights|How many nights|Nights
         """,
                _integer(1, 14),
                "integer",
            ),
        ),
        _Q("""
             Book a hotel in {city} for {nights} nights.
             |I need a room in {city} for {nights} nights.|hotel {city} {nights} nights
             |Reserve {nights} nights in {city}.|Find me a hotel in {city}, {nights} nights.
             |We stay {nights} nights in {city}, book it.
         """),
        "hotel price confirmation",
    ),
    Kind(
        "read|open|load|cat|show",
        "file|document|text_file|contents|file_contents",
        "Read a file.|Returns the contents of a file|Opens a document",
        (
            Parameter(
                "path",
                """
             path|file|filename|file_path|name
         """,
                """
             Path of the file|File name|Which file
         """,
                _path,
            ),
        ),
        _Q("""
             Read the file {path}|Show me {path}|What is in the file {path} ?|open {path}
             |Load {path} please|Print the contents of {path}
         """),
        "content size",
        _Q("Read a file.|Open the file."),
    ),
    Kind(
        "fetch|open|get|download|browse",
        "url|page|website|web_page|link|site",
        "Fetch a web page.|Downloads a URL|Opens a link",
        (
            Parameter(
                "link",
                """
             url|link|address|page|uri
         """,
                """
             The URL|Address of the page|Link to open
         """,
                _link,
            ),
        ),
        _Q("""
             Open {link} please|Fetch {link}|What is on the page {link} ?|Download {link}
             |Get me the website {link}|Visit {link} and read it
         """),
        "title status text",
    ),
    Kind(
        "roll|throw|generate|draw|pick",
        "dice|random_number|random|number|lottery_number",
        "Generate a random number.|Random number between two bounds|Rolls a number",
        (
            Parameter(
                "low",
                """
             min|low|minimum|from|lower
         """,
                """
             Smallest value|Lower bound|Minimum
         """,
                _integer(0, 20),
                "integer",
            ),
            Parameter(
                "high",
                """
              max|high|maximum|to|upper
          """,
                """
              Largest value|Upper bound|Maximum
          """,
                _integer(21, 999),
                "integer",
            ),
        ),
        _Q("""
             Give me a random number between {low} and {high}.
             |Pick a random number from {low} to {high}.|random number {low} to {high}
             |Roll a number between {low} and {high}.
             |Draw a random number from {low} up to {high}.
         """),
        "number value",
    ),
    Kind(
        "get|tell|fetch|random",
        "joke|quote|fun_fact|fact_of_the_day|motto|advice",
        "Tells a joke.|Returns a random joke or quote|Something to laugh about",
        (),
        _Q("""
             Tell me a joke.|Make me laugh.|Do you have a joke?|Get me a joke with the tool.
             |I want to hear a joke.
         """),
        "joke text",
    ),
    Kind(
        "list|get|show|fetch",
        "files|tasks|todos|users|devices|calendars|servers|all_items",
        "Lists all items.|Shows everything there is|List of entries, no arguments",
        (),
        _Q("""
             List all items.|Show me everything there is.|What entries are there? List them.
             |Give me the list.
         """),
        "items count",
    ),
    Kind(
        """
        get|check|measure|read
    """,
        """
        air_quality|pollution|aqi|sunrise|tide|temperature_sensor|uv_index|pollen
    """,
        "Air quality of a city.|Pollution index by place|Measures the air",
        (_CITY,),
        _Q("""
             How is the air quality in {city}?|Is the air clean in {city}?|pollution in {city}
             |air quality {city}|Check the air in {city}.|What's the pollution level in {city}?
         """),
        "aqi level pollutant",
    ),
    Kind(
        "subscribe|notify|watch|enable|set",
        "alerts|notifications|updates|newsletter|monitoring",
        "Turn notifications for a topic on or off.|Alert settings|Enables or disables updates",
        (
            Parameter(
                "topic",
                """
             topic|subject|channel|about
         """,
                """
             Topic of the alerts|What about|Channel
         """,
                _item,
            ),
            Parameter(
                "enabled",
                """
              enabled|active|on|subscribe
          """,
                """
              Whether it is on|True to turn on|Active
          """,
                lambda draw: draw.chance(0.5),
                "boolean",
            ),
        ),
        _Q("""
             Set the alerts for {topic} to {enabled}.|Notifications about {topic}: {enabled}
             |alerts {topic} {enabled}|For {topic}, make the updates {enabled}.
         """),
        "status",
    ),
)
