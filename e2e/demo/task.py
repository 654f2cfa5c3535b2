"""The demo's task: messy messages to a help desk -> one strict JSON ticket. Standard library only, all of it by seed.

    "hey folks, our beamer in room atlas keeps crashing, asap please!! need it by next friday"
    {"product":"projector","severity":"high","team":"software","room":"Atlas","due":"fri"}

Every message has one right ticket, so accuracy is the share of answers equal to it, character by character.
"""

import json
import random
import re
from dataclasses import dataclass

from demo.phrases import CUES, KNOWN, NAMES, NEW, PRODUCTS, SECURITY_KNOWN, SECURITY_NEW, WEEKDAYS, Phrases

FIELDS = ("product", "severity", "team", "room", "due")
TEAMS = (*KNOWN.symptoms, "security")
NEW_TEAM = "security"
ROOMS = ("Atlas", "Birch", "Cedar", "Delta", "Ember", "Fjord", "Grove", "Haven", "Iris", "Jade", "Koala", "Lotus")
DAYS = {"today": ("today", "tonight"), "tomorrow": ("tomorrow", "tomorrow morning", "tomorrow noon")}
TERSE = 0.5  # share of messages without greeting, thanks and chatter

_CHOICE = re.compile(r"\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Example:
    """A message and its right ticket, as the JSON text that is wanted."""

    text: str
    answer: str

    def messages(self) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]}


@dataclass(frozen=True)
class Sizes:
    """Examples in each set."""

    train: int = 16000
    prompts: int = 3000
    heldout: int = 200  # of known phrasings, and as many of new ones
    tune: int = 1200  # of the new label; as many old ones stand beside them
    gate: int = 200


def ticket(product: str, severity: str, team: str, room: str | None, due: str | None) -> str:
    """The one right spelling of a ticket: fields in order, no spaces."""
    return json.dumps(dict(zip(FIELDS, (product, severity, team, room, due), strict=True)), separators=(",", ":"))


def parse(answer: str) -> dict[str, str | None] | None:
    """The ticket in an answer, or None if it is not exactly one JSON object of the five fields."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(value, dict) or tuple(value) != FIELDS:
        return None
    return value if all(item is None or isinstance(item, str) for item in value.values()) else None


class Writer:
    """Writes messages of one half of the phrasings, with its own random stream."""

    def __init__(self, phrases: Phrases, seed: str) -> None:
        self.phrases = phrases
        self.random = random.Random(seed)

    def example(self, *, security: bool = False) -> Example:
        """One example; `security`: of the label that the teacher never sees."""
        rng, phrases = self.random, self.phrases
        product = rng.choice(list(PRODUCTS))
        severity = rng.choice(list(phrases.severities))
        team = NEW_TEAM if security else rng.choice(list(phrases.symptoms))
        symptoms = phrases.symptoms | {NEW_TEAM: SECURITY_KNOWN if phrases is KNOWN else SECURITY_NEW}
        terse = rng.random() < TERSE
        if rng.random() < 0.5:
            symptom = rng.choice(symptoms[team])
        else:
            symptom = rng.choice(phrases.causes).replace("{c}", rng.choice(CUES[team]))
        if not terse and rng.random() < 0.4:
            symptom += " " + rng.choice(phrases.tails)
        slots = {"p": rng.choice(PRODUCTS[product]), "s": symptom}
        room, slots["r"] = self._room() if rng.random() < (0.6 if terse else 0.9) else (None, "")
        due, slots["d"] = self._due() if rng.random() < (0.4 if terse else 0.9) else (None, "")

        parts = []
        if room and rng.random() < 0.5:
            parts.append(self._fill(rng.choice(phrases.problems_with_room), slots))
        else:
            parts.append(self._fill(rng.choice(phrases.problems), slots))
            if room:
                parts.append(self._fill(rng.choice(phrases.rooms), slots))
        if how := rng.choice(phrases.severities[severity]):
            parts.append(self._fill(how, slots))
        if due:
            parts.append(self._fill(rng.choice(phrases.dues), slots))
        if not terse and rng.random() < 0.4:
            parts.append(self._fill(rng.choice(phrases.noise), slots))
        if not terse:
            parts = [self._lead(slots) + part if rng.random() < 0.25 else part for part in parts]
        rng.shuffle(parts)
        if not terse and rng.random() < 0.7:
            parts.insert(0, self._fill(rng.choice(phrases.openers), slots))
        if not terse and rng.random() < 0.6:
            parts.append(self._fill(rng.choice(phrases.closers), slots))
        return Example(self._mess_up(parts), ticket(product, severity, team, room, due))

    def _fill(self, frame: str, slots: dict[str, str]) -> str:
        text = frame.replace("{s}", slots["s"])  # a symptom may hold slots itself
        text = _CHOICE.sub(lambda found: self.random.choice(found[1].split("|")), text)
        for slot in ("p", "r", "d"):
            text = text.replace("{" + slot + "}", slots[slot])
        while "{name}" in text:
            text = text.replace("{name}", self.random.choice(NAMES), 1)
        return text.replace("{n}", str(self.random.randrange(50000, 100000)))

    def _lead(self, slots: dict[str, str]) -> str:
        return self._fill(self.random.choice(self.phrases.leads), slots) + self.random.choice((", ", " "))

    def _room(self) -> tuple[str, str]:
        """A room as the ticket wants it, and as people write it."""
        room = self.random.choice(ROOMS)
        name = room if self.random.random() < 0.7 else room.lower()
        return room, self.random.choice(("{}", "{}", "room {}", "room {}", "the {} room", "rm {}")).format(name)

    def _due(self) -> tuple[str, str]:
        """A due day as the ticket wants it (today, tomorrow, a weekday), and as people write it."""
        rng = self.random
        if rng.random() < 0.25:
            day = rng.choice(("today", "tomorrow"))
            return day, rng.choice(DAYS[day])
        weekday = rng.choice(WEEKDAYS)
        return weekday[:3].lower(), rng.choice((weekday, weekday, f"next {weekday}", f"this {weekday}", weekday[:3]))

    def _mess_up(self, parts: list[str]) -> str:
        """Join sentences as people type them: casing, punctuation, and now and then a slip of the finger."""
        rng = self.random
        style = rng.random()
        if style < 0.5:
            parts = [part[0].upper() + part[1:] for part in parts]
        ends = rng.choice(((". ",), (". ", "! "), (", ",), (" - ",), ("\n",), ("... ",), (". ", "\n")))
        text = "".join(part + (" " if part[-1] in "?!" else rng.choice(ends)) for part in parts).rstrip(" ,-\n")
        if style > 0.8:
            text = text.lower()
        words = text.split(" ")
        if rng.random() < 0.35:
            at = rng.randrange(len(words))
            words[at] = self._slip(words[at])
        return " ".join(words)

    def _slip(self, word: str) -> str:
        """Swap, drop or double one inner letter; short words and anything with digits stay as they are."""
        if len(word) < 6 or not word.isalpha():
            return word
        at = self.random.randrange(1, len(word) - 2)
        return self.random.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
            )
        )


@dataclass(frozen=True)
class Sets:
    """All sets; no message of `known`, `new`, `security_*` or `gate` occurs in a set that is trained on."""

    train: list[Example]  # teaches the teacher
    prompts: list[str]  # the teacher answers these for the student
    gate: list[Example]  # known phrasings: the quality gates
    known: list[Example]  # held out: phrasings as in training
    new: list[Example]  # held out: phrasings that training never saw
    tune: list[Example]  # the new label, with old examples beside it
    security_known: list[Example]  # held out: the new label
    security_new: list[Example]


def key(text: str) -> str:
    """What makes two messages the same: letters and digits alone."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def make_sets(seed: int = 7, sizes: Sizes = Sizes()) -> Sets:
    """All sets by seed. Held-out messages are drawn first; whatever meets one of them later is dropped."""
    taken: set[str] = set()

    def draw(writer: Writer, count: int, *, security: bool = False) -> list[Example]:
        found: list[Example] = []
        while len(found) < count:
            example = writer.example(security=security)
            if key(example.text) not in taken:
                taken.add(key(example.text))
                found.append(example)
        return found

    known, new = Writer(KNOWN, f"{seed}/held-out"), Writer(NEW, f"{seed}/new")
    heldout = draw(known, sizes.heldout)
    heldout_new = draw(new, sizes.heldout)
    security_known = draw(known, sizes.heldout // 2, security=True)
    security_new = draw(new, sizes.heldout // 2, security=True)
    gate = draw(Writer(KNOWN, f"{seed}/gate"), sizes.gate)
    train = draw(Writer(KNOWN, f"{seed}/train"), sizes.train)
    prompts = [example.text for example in draw(Writer(KNOWN, f"{seed}/prompts"), sizes.prompts)]
    tuner = Writer(KNOWN, f"{seed}/tune")
    tune = draw(tuner, sizes.tune, security=True) + draw(tuner, sizes.tune)
    random.Random(f"{seed}/order").shuffle(tune)
    return Sets(train, prompts, gate, heldout, heldout_new, tune, security_known, security_new)
