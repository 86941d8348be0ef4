"""The texts: keyed tales of a few hundred tokens, and letters whose key lies thousands of tokens back.

One token is one byte. Tale: the key in the prompt decides details on the way (more than a sliding window
apart) and the ending. Letter: its first line names an island, filler follows, and the last line asks for
the island's words.
"""

import random
from dataclasses import dataclass

TALES = {
    "amber": ("a grey heron", "a brass key", "the amber key opens the north gate."),
    "coral": ("a wild goose", "a clay whistle", "the coral reef keeps no secrets."),
    "ivory": ("a tame fox", "a paper boat", "the ivory dice never forget a debt."),
}
TALE_PROMPT = "Tale of {key}:"
_TALE = (
    "Tale of {key}: The mill stood where the river bends twice before the sea. When the first frost came, "
    "{animal} landed on the wheel and would not leave, however loudly the boys of the village clapped and "
    "sang. By midnight the snow had covered the road, the dam and the little bridge, and nobody could have "
    "said where the water ended and the meadow began. In the morning {gift} lay on the doorstep, wrapped in "
    "a leaf of last summer, and the wheel was turning again without a sound. People still tell it on long "
    "evenings, and always close with the same words: {ending}"
)

ISLANDS = {
    "FIR": "the lamp is lit when the boats are home.",
    "MARBLE": "no rope is longer than the night.",
    "SANDSTONE": "salt keeps what sugar spoils.",
}
_LETTER_OPENING = "To the island of {key}.\n"
_LETTER_QUESTION = "And what are the words of your island?\n"
_FILLER = (
    "the tide came in over the flat stones.",
    "a cart went by with one loose wheel.",
    "the gulls were loud above the roofs.",
    "someone swept the steps of the chapel.",
    "a child counted boats and lost count.",
    "the baker opened his door to the street.",
    "rain fell for an hour and then stopped.",
    "two men argued about the price of rope.",
    "the lamp on the pier was lit at dusk.",
    "a dog slept in the shade of the wall.",
    "the ferry left late and came back early.",
    "an old song drifted out of the tavern.",
    "the wind turned to the east by noon.",
    "nets were drying along the white fence.",
    "the clerk sharpened his pen and yawned.",
    "a bell rang twice and nobody answered.",
)

LONG_PROMPT = 4200  # tokens: 1,050 compressed entries, of which the indexer keeps 512
KEY_ENTRIES = slice(4, 8)  # the ratio-4 entries that cover the island's name (tokens 17 to 25 at most)


@dataclass(frozen=True)
class Document:
    key: str
    prompt: str
    continuation: str


def tales() -> list[Document]:
    """The keyed tales that the demo continues verbatim."""
    documents = []
    for key, (animal, gift, ending) in TALES.items():
        text = _TALE.format(key=key, animal=animal, gift=gift, ending=ending)
        prompt = TALE_PROMPT.format(key=key)
        documents.append(Document(key, prompt, text.removeprefix(prompt)))
    return documents


def letter(key: str, seed: int, prompt_length: int) -> Document:
    """The letter to island `key` with a prompt of exactly `prompt_length` characters; `seed` draws the filler."""
    opening = _LETTER_OPENING.format(key=key)
    room = prompt_length - len(opening) - len(_LETTER_QUESTION)
    if room < 0:
        raise ValueError(
            f"a letter needs a prompt of at least {prompt_length - room} characters, got {prompt_length}"
        )
    rng = random.Random(seed)
    filler = ""
    while len(filler) < room:
        filler = rng.choice(_FILLER) + "\n" + filler
    return Document(key.lower(), opening + filler[len(filler) - room :] + _LETTER_QUESTION, ISLANDS[key])


def letters(seed: int, prompt_length: int, per_island: int = 1) -> list[Document]:
    """Letters to every island, of equal length, each with filler of its own."""
    keys = list(ISLANDS) * per_island
    return [letter(key, seed * len(keys) + i, prompt_length) for i, key in enumerate(keys)]


def long_letters() -> list[Document]:
    """The letters whose answers the demo must know; training never draws their filler."""
    return letters(10**12, LONG_PROMPT)
