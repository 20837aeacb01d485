"""Composed ways to ask for a tool: a beginning, a topic or an action, an end.

`tool_kinds.KINDS` holds whole questions; this table multiplies them. Keyed by a kind's first noun.
"""

from hybridk2.nano.phrasing import alternatives
from hybridk2.nano.tool_kinds import KINDS, Kind
from hybridk2.nano.words import Draw

_Q = alternatives

_ASK = _Q("""
What is|Tell me|Show me|Get|Find|Give me|I need|I want|I would like to know|Look up|Fetch|Check
|Report|Return|Please find|Could you get me|Do you know|Let me see|Retrieve|Query|What would be
|I am looking for|Kindly provide|Let me have|Read out|Please tell me|Bring me|Can I have|We need
|Any idea what is|Search for|Determine|Request|Ask for|List|Print|I wonder about|What about|Say
|I have to know|Help me with|Could you check|Use the tool for|Use the tool to get
|Call the tool for|I am curious about|Inform me about|Can you find|Would you look up|Please check
|Now
""")
_DO = _Q("""
Please|Can you|Could you|I want you to|Would you|Go ahead and|Kindly|I would like you to|Now|Just
|You should|Next,|Use the tool to|Use a tool and|Call the tool to|Will you|I need you to|Ok,|Hey,
|Do me a favor and|Be so kind and|Let us|It is time to|Then|Maybe|Quickly|Try to|Help me to|Do
""")
_ENDS = (
    "", "", "", ".", ".", "?", "?", " please.", " now.", " with the tool.", ", please", "!",
    " using the tool.", " for me.", " for me?", ", thanks.", " with a tool.", " by tool.",
)  # fmt: skip

_TOPICS = {
    "weather": _Q("""
        the weather in {city}|the weather for {city}|the forecast for {city}|{city}'s weather
        |the temperature in {city}|weather conditions in {city}|the {city} weather
        |the weather of {city}|the weather report for {city}|the weather at {city}
    """),
    "time": _Q("""
        the time in {city}|the current time in {city}|{city} time|{city}'s local time
        |the local time for {city}|the time of day in {city}|what time it is in {city}
        |the hour in {city}
    """),
    "stock_price": _Q("""the stock price of {symbol}|the price of {symbol}|the {symbol} stock price
        |a quote for {symbol}|the share price of {symbol}|{symbol}'s price|the {symbol} quote
        |the market price of {symbol}|the value of {symbol} shares|what {symbol} trades at"""),
    "company_info": _Q("""
        information on {company}|the company profile of {company}|company data for {company}
        |{company}'s headquarters|the CEO of {company}|the revenue of {company}
        |details on the company {company}
    """),
    "text": _Q("""
        the translation of '{text}' to {language}|'{text}' in {language}|"{text}" in {language}
        |the {language} translation of "{text}"|the {language} for "{text}"
        |"{text}" translated into {language}|a {language} translation of '{text}'
    """),
    "currency": _Q("""{amount} {source} in {target}|the value of {amount} {source} in {target}
        |the conversion of {amount} {source} to {target}|how much {amount} {source} is in {target}
        |the worth of {amount} {source} in {target}"""),
    "exchange_rate": _Q("""
        the exchange rate from {source} to {target}|the {source} {target} rate
        |the rate of {source} to {target}|the {source} to {target} rate
        |the exchange rate {source}/{target}|the exchange rate between {source} and {target}
        |how {source} exchanges to {target}
    """),
    "web": _Q("""pages on {query}|web results for {query}|information about {query} on the web
        |search results for {query}|something online about {query}|web pages about {query}"""),
    "distance": _Q("""the distance from {start} to {end}|the distance between {start} and {end}
        |how far it is from {start} to {end}|the kilometers from {start} to {end}
        |the way from {start} to {end}"""),
    "flights": _Q("""
        flights from {start} to {end}|a flight from {start} to {end}
        |connections from {start} to {end}|plane tickets from {start} to {end}
        |a flight to {end} from {start}|flights to {end} from {start}
    """),
    "news": _Q("""
        news about {topic}|the latest news on {topic}|headlines about {topic}|the news on {topic}
        |the newest articles about {topic}|what is new about {topic}
    """),
    "population": _Q("""
        the population of {country}|the capital of {country}|facts about {country}
        |country information on {country}|the area of {country}|how many people live in {country}
    """),
    "word": _Q("""
        the definition of {word}|the meaning of {word}|what {word} means
        |the dictionary entry for {word}|the meaning of the word {word}|a definition for '{word}'
    """),
    "recipe": _Q("""a recipe for {dish}|recipes with {dish}|a dish with {dish}|how to cook {dish}
        |a good {dish} recipe|ideas for cooking {dish}"""),
    "movie": _Q("""
        information about the movie {film}|the director of the film {film}
        |the year of the movie {film}|details on the film {film}|the rating of the movie {film}
    """),
    "user": _Q("""user {number}|the user with id {number}|account {number}|customer number {number}
        |the profile of user {number}|the record of customer {number}"""),
    "package": _Q("""
        the status of order {order}|where package {order} is|the location of parcel {order}
        |the delivery {order}|tracking for {order}|the state of shipment {order}
    """),
    "expression": _Q("""
        {formula}|the result of {formula}|the value of {formula}|what {formula} makes
    """),
    "unit": _Q("""
        {amount} {source} in {target}|the length of {amount} {source} in {target}
        |the conversion of {amount} {source} to {target}|how many {target} {amount} {source} are
    """),
    "restaurants": _Q("""a restaurant in {city}|places to eat in {city}|restaurants in {city}
        |a good place to eat in {city}|where to eat in {city}|a cafe in {city}"""),
    "hotel": _Q("""
        a hotel in {city} for {nights} nights|a room in {city} for {nights} nights
        |{nights} nights in {city}
    """),
    "file": _Q("""
        the file {path}|the contents of {path}|what is in {path}|the text of the file {path}
    """),
    "url": _Q("the page {link}|the website {link}|what is at {link}|the contents of {link}"),
    "dice": _Q("""a random number between {low} and {high}|a random number from {low} to {high}
        |some number between {low} and {high}"""),
    "joke": _Q("a joke|something funny|a good joke|one joke|a funny joke"),
    "files": _Q("all items|the list of all entries|the whole list|every item|a list of everything"),
    "air_quality": _Q("""the air quality in {city}|the pollution in {city}|the air quality of {city}
        |how clean the air is in {city}|{city}'s air quality|the state of the air in {city}"""),
}
_ACTIONS = {
    "weather": _Q("""
        check the weather in {city}|look up the weather for {city}|get the weather in {city}
    """),
    "text": _Q("""
        translate '{text}' to {language}|translate "{text}" into {language}
        |put '{text}' into {language}
    """),
    "currency": _Q("convert {amount} {source} to {target}|change {amount} {source} into {target}"),
    "web": _Q("""
        search the web for {query}|look up {query} online|google {query}
        |find {query} on the internet
    """),
    "flights": _Q("book a flight from {start} to {end}|find flights from {start} to {end}"),
    "message": _Q("""
        send a message to {person}: {message}|text {person}: {message}|tell {person} "{message}"
        |send {person} the text '{message}'|write {person} a message: {message}
        |message {person} "{message}"
    """),
    "email": _Q("""
        send an email to {address} about {subject}|email {address} with subject '{subject}'
        |write to {address}, subject {subject}|mail {address} about "{subject}"
    """),
    "music": _Q("""
        play {song}|play the song {song}|put on {song}|start the track {song}|play me {song}
        |queue {song}
    """),
    "timer": _Q("""
        set a timer for {minutes} minutes|start a {minutes} minute timer
        |set a {minutes} minutes timer|count down {minutes} minutes|time {minutes} minutes
        |start a countdown of {minutes} minutes
    """),
    "reminder": _Q("""remind me at {moment} to {event}|set a reminder at {moment}: {event}
        |add an event at {moment}: {event}|create a reminder '{event}' for {moment}"""),
    "light": _Q("""
        turn the {room} light {state}|switch {state} the light in the {room}
        |turn {state} the lights in the {room}|switch the {room} lights {state}
        |put the light in the {room} {state}
    """),
    "user": _Q("""
        look up user {number}|load the account {number}|get user {number}
        |find the customer {number}
    """),
    "package": _Q("""
        track order {order}|track my package {order}|follow the parcel {order}
        |check on order {order}
    """),
    "expression": _Q("calculate {formula}|compute {formula}|work out {formula}|evaluate {formula}"),
    "unit": _Q("convert {amount} {source} to {target}|change {amount} {source} into {target}"),
    "hotel": _Q("""
        book a hotel in {city} for {nights} nights|reserve a room in {city}, {nights} nights
    """),
    "file": _Q("read the file {path}|open {path}|show {path}|load the file {path}"),
    "url": _Q("open {link}|fetch {link}|visit {link}|download {link}|read the page {link}"),
    "dice": _Q("pick a number between {low} and {high}|roll a number from {low} to {high}"),
    "joke": _Q("tell a joke|tell me a joke|make me laugh"),
    "files": _Q("list everything|list all items|show all entries"),
    "alerts": _Q("""
        set the alerts for {topic} to {enabled}|make the notifications about {topic} {enabled}
        |switch updates on {topic} to {enabled}|set {topic} alerts {enabled}
    """),
}
_COMPOSED_SHARE = 0.4
_KEYS = {kind.questions: alternatives(kind.nouns)[0] for kind in KINDS}


def question_template(draw: Draw, kind: Kind) -> str:
    """A question for this kind of tool, whole from its table or composed, with slots to fill."""
    key = _KEYS.get(kind.questions, "")  # a made-up kind may share a noun, not the questions
    topics, actions = _TOPICS.get(key, ()), _ACTIONS.get(key, ())
    if not (topics or actions) or not draw.chance(_COMPOSED_SHARE):
        return draw.phrasing(kind.questions)

    def compose() -> str:
        if topics and (not actions or draw.chance(0.6)):
            return f"{draw.choice(_ASK)} {draw.choice(topics)}{draw.choice(_ENDS)}"
        return f"{draw.choice(_DO)} {draw.choice(actions)}{draw.choice(_ENDS)}"

    return draw.fresh(compose)
