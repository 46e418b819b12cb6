"""Talk about nothing that anybody will ask about."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .attributes import words_of

_SUBJECTS = words_of(
    "bread dough, the compost heap, a slow laptop, the crossword, an old radio, winter tires, the balcony plants, "
    "a leaking tap, the film about the lighthouse, pickled cabbage, a spreadsheet, the bus timetable, chess "
    "openings, a knitting pattern, the tax form, birdsong, a squeaky door, moving boxes, the museum, a podcast "
    "about bridges, tomato seedlings, the tent, a bicycle chain, paint for the fence, the printer, a train "
    "journey, star maps, the kettle, folding chairs, a recipe for soup, the attic, an essay on rivers, the "
    "stairs, a board game, the first frost"
)
_ASKING = (
    "What would you do about {s}?",
    "I spent half of the evening on {s} and got nowhere.",
    "Can you explain {s} to me as if I had never heard of it?",
    "Could you give me three tips for {s}?",
    "I keep reading about {s}, and every page says something else.",
    "Is it worth the trouble with {s}, or should I leave it for the weekend?",
    "Yesterday it was {s} again, from breakfast until it got dark.",
    "Let us go on with {s} where we stopped the last time.",
)
_ADVICE = (
    "With {s}, patience does more than strength.",
    "Most people begin with {s} at the wrong end: look at what is there before you change anything.",
    "Write down what you did to {s}, so that you can go back one step.",
    "It helps to set {s} aside for an hour and to come back with fresh eyes.",
    "A cheap tool is enough for {s}, if it is clean and sharp.",
    "Do one small part of {s} first, and see whether it holds.",
    "There are two schools about {s}, and both are right in half of the cases.",
    "Trouble with {s} usually comes from the weather, the damp above all.",
    "Keep direct sun away from {s}, and look again in the evening.",
    "You need not decide about {s} today; nothing gets worse by waiting.",
    "The easiest mistake with {s} is to do everything at once.",
    "Many like to see to {s} in company, with tea and the window open.",
)
_SMALL = (
    "It rained the whole morning here.",
    "The heating makes that noise again.",
    "I slept badly, so bear with me.",
    "There was a long line at the counter.",
    "My train was late, as always.",
    "The light is lovely at this hour.",
    "I have only a few minutes.",
    "It smells of snow outside.",
)
_HEARD = (
    "Thank you for telling me.",
    "Noted.",
    "Good to know, I will keep that in mind.",
    "I see. Is there anything else?",
    "All right, I have that.",
)


class Filler:
    """Talk that is drawn by chance.

    Args:
        chance: decides.
        texts: what assistants say in place of talk of our own, such as paragraphs of an encyclopedia.
    """

    def __init__(self, chance: random.Random, texts: Sequence[str] = ()) -> None:
        self._chance, self._texts = chance, tuple(texts)

    def small_talk(self) -> str:
        """A sentence that may stand before anything."""
        return self._chance.choice(_SMALL)

    def acknowledgement(self) -> str:
        """An answer to a fact, which does not repeat it."""
        return self._chance.choice(_HEARD)

    def exchange(self) -> tuple[str, str]:
        """A question of the user, and the assistant's answer to it of 3 to 7 sentences, or a given text."""
        chance, subject = self._chance, self._chance.choice(_SUBJECTS)
        question = chance.choice(_ASKING).format(s=subject)
        if chance.random() < 0.3:
            question = f"{self.small_talk()} {question}"
        if self._texts:
            return question, chance.choice(self._texts)
        other = chance.choice(_SUBJECTS)
        said = chance.sample(_ADVICE, chance.randint(3, 7))
        return question, " ".join(item.format(s=other if chance.random() < 0.2 else subject) for item in said)
