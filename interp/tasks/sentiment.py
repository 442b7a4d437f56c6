"""Sentiment contrast pairs: what is to be steered is known, and can be measured in the next token.

Pairs differ in one adjective only: "{who} thought the {thing} was {positive | negative}". Held-out prompts share
neither people, things nor sentence with them and end in "Overall the experience was", so that the propensity

    m = log P(good, great or amazing) - log P(bad, terrible or disappointing)

is read at the next token. `NEUTRAL` texts have no sentiment: what steering does there is damage.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product

from interp.core.errors import InterpError

WHO = ("She", "He", "The critic", "My friend", "Everyone")
THINGS = ("film", "meal", "hotel", "book")
ADJECTIVES = (
    ("wonderful", "horrible"),
    ("excellent", "awful"),
    ("lovely", "dreadful"),
    ("fantastic", "miserable"),
)

POSITIVE_WORDS = ("good", "great", "amazing")
NEGATIVE_WORDS = ("bad", "terrible", "disappointing")

OPENINGS = (
    "We went to the museum on Sunday",
    "I took the train to the coast",
    "They opened the new store downtown",
    "Our class visited the factory",
    "I signed up for the course",
    "We ate at the place near the station",
    "They stayed at a cabin in the hills",
    "I watched the match with my cousins",
)
MIDDLES = (
    "and spent the afternoon there.",
    "and came back in the evening.",
    "and told the others about it.",
)
QUESTION = "Overall the experience was"


@dataclass(frozen=True, kw_only=True)
class ContrastPairs:
    """Pairs to make a direction from, and prompts to measure it on."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    prompts: tuple[str, ...]
    """Held out: none of their words of interest is in the pairs."""
    words_for: tuple[str, ...]
    """Next words that count as the behaviour."""
    words_against: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or len(self.positive) != len(self.negative):
            raise InterpError(
                f"contrast pairs need as many positive texts as negative ones, got {len(self.positive)} "
                f"and {len(self.negative)}"
            )
        if len(self.prompts) < 4:
            raise InterpError(
                f"at least 4 held-out prompts are needed (2 to choose on, 2 to report), got {len(self.prompts)}"
            )


def sentiment_pairs(n_pairs: int = 40, n_prompts: int = 24) -> ContrastPairs:
    """Up to 40 pairs and 24 held-out prompts, always in the same order."""
    people_and_things = list(product(range(len(WHO)), range(len(THINGS))))
    cells = [
        (WHO[i], THINGS[j], ADJECTIVES[(i + j + 2 * lap) % len(ADJECTIVES)])
        for lap in range(2)
        for i, j in people_and_things
    ]
    prompts = [f"{opening} {middle} {QUESTION}" for middle, opening in product(MIDDLES, OPENINGS)]
    if not 2 <= n_pairs <= len(cells) or not 4 <= n_prompts <= len(prompts):
        raise InterpError(
            f"n_pairs={n_pairs} must be 2 to {len(cells)}, n_prompts={n_prompts} must be 4 to {len(prompts)}"
        )
    chosen = list(islice(cells, n_pairs))
    return ContrastPairs(
        positive=tuple(f"{who} thought the {thing} was {pair[0]}" for who, thing, pair in chosen),
        negative=tuple(f"{who} thought the {thing} was {pair[1]}" for who, thing, pair in chosen),
        prompts=tuple(prompts[:n_prompts]),
        words_for=POSITIVE_WORDS,
        words_against=NEGATIVE_WORDS,
    )
