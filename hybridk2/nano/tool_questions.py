"""Composed ways to ask for a tool: a beginning, a topic or an action, an end.

A kind of tool lists whole questions; its topics and actions multiply them here.
"""

from hybridk2.nano.phrasing import alternatives
from hybridk2.nano.tool_kinds import Kind
from hybridk2.nano.words import Draw

_ASK = alternatives("""
What is|Tell me|Show me|Get|Find|Give me|I need|I want|I would like to know|Look up|Fetch|Check
|Report|Return|Please find|Could you get me|Do you know|Let me see|Retrieve|Query|What would be
|I am looking for|Kindly provide|Let me have|Read out|Please tell me|Bring me|Can I have|We need
|Any idea what is|Search for|Determine|Request|Ask for|List|Print|I wonder about|What about|Say
|I have to know|Help me with|Could you check|Use the tool for|Use the tool to get
|Call the tool for|I am curious about|Inform me about|Can you find|Would you look up|Please check
|Now
""")
_DO = alternatives("""
Please|Can you|Could you|I want you to|Would you|Go ahead and|Kindly|I would like you to|Now|Just
|You should|Next,|Use the tool to|Use a tool and|Call the tool to|Will you|I need you to|Ok,|Hey,
|Do me a favor and|Be so kind and|Let us|It is time to|Then|Maybe|Quickly|Try to|Help me to|Do
""")
_ENDS = (
    "", "", "", ".", ".", "?", "?", " please.", " now.", " with the tool.", ", please", "!",
    " using the tool.", " for me.", " for me?", ", thanks.", " with a tool.", " by tool.",
)  # fmt: skip

_COMPOSED_SHARE = 0.4


def question_template(draw: Draw, kind: Kind) -> str:
    """A question for this kind of tool, whole from its table or composed, with slots to fill."""
    topics, actions = kind.topics, kind.actions
    if not (topics or actions) or not draw.chance(_COMPOSED_SHARE):
        return draw.phrasing(kind.questions)

    def compose() -> str:
        if topics and (not actions or draw.chance(0.6)):
            return f"{draw.choice(_ASK)} {draw.choice(topics)}{draw.choice(_ENDS)}"
        return f"{draw.choice(_DO)} {draw.choice(actions)}{draw.choice(_ENDS)}"

    return draw.fresh(compose)
