"""Records of entities as running text, in sentences of the templates."""

from collections.abc import Iterator, Sequence

import numpy as np

from .hashing import Integers, derive_key, random_below, random_true
from .templates import ATTRIBUTES, LEADS, PRONOUNS, after_lead, with_pronouns
from .world import MOST, Statement

_ALSO_NAMED = 0.25  # of the sentences that need not name the entity
_MANY = 1 << 20  # a draw below it, modulo a small number, is as good as uniform

# [kind][pronoun][does the sentence name the entity][attribute] -> (sentence, the same after a lead) of each template
_SENTENCES = [
    [
        [
            [
                [(text := with_pronouns(template, pronoun), after_lead(text)) for template in alternatives]
                for alternatives in side
            ]
            for side in ([a.unnamed for a in attributes], [a.named for a in attributes])
        ]
        for pronoun in PRONOUNS
    ]
    for attributes in ATTRIBUTES
]


def write_records(
    kinds: Integers, subjects: Sequence[str], records: Sequence[Sequence[Statement]], numbers: Integers, key: int
) -> Iterator[str]:
    """One text for each record.

    Args:
        kinds: [n] of the entities.
        subjects: their names as they stand in a sentence.
        records: what is stated of them, two facts at least and `MOST` at most.
        numbers: [n] another number gives other sentences.
        key: another key gives other sentences to all of them.
    """
    if not len(records):
        return
    slots, counts = np.arange(MOST), np.array([len(statements) for statements in records])
    sentences = numbers[:, None] * MOST + slots
    # The first and the last sentence name the entity, one between them does, and some of the others.
    last = counts[:, None] - 1
    between = 1 + random_below(derive_key(key, "between"), numbers[:, None], last - 1)
    named = (slots == 0) | (slots == between) | (slots == last)
    named |= random_true(derive_key(key, "also named"), sentences, _ALSO_NAMED)
    for kind, pronoun, subject, statements, naming, choices in zip(
        kinds.tolist(),
        random_below(derive_key(key, "pronoun"), numbers, len(PRONOUNS)).tolist(),
        subjects,
        records,
        named.tolist(),
        random_below(derive_key(key, "sentence"), sentences, _MANY).tolist(),
        strict=True,
    ):
        templates, opening, text = _SENTENCES[kind][pronoun], subject[0].upper() + subject[1:], []
        for (attribute, value), names, choice in zip(statements, naming, choices, strict=False):
            choice, start = divmod(choice, 3 * len(LEADS))  # one in three sentences has a lead
            alternatives = templates[names][attribute]
            plain, led = alternatives[choice % len(alternatives)]
            sentence = LEADS[start] + led if start < len(LEADS) else plain
            article = "an" if value[0] in "aeiou" else "a"
            text.append(sentence.format(N=opening, n=subject, v=value, a=f"{article} {value}"))
        yield " ".join(text)
