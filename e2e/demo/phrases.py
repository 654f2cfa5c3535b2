# ruff: noqa: E501  # phrases stand side by side, a line each would be a book
"""The words of the demo's task, in two disjoint halves: KNOWN phrasings are trained on, NEW ones are only ever asked.

A phrasing is a frame such as `"the {p} in {r} {s}"`; `[a|b]` in a frame stands for one of its alternatives. Both
halves talk about the same things in the same jargon (product nouns, the cue word of a symptom, "urgent", "by"): a
model that starts from random weights can learn how such words are combined, never what a word means that it has not seen.
"""

from dataclasses import dataclass

# Each product by its names; the first is the label.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "printer": ("printer", "laser printer", "label printer", "printing machine"),
    "laptop": ("laptop", "notebook", "macbook", "thinkpad"),
    "monitor": ("monitor", "display", "second screen", "desktop screen"),
    "phone": ("phone", "desk phone", "handset", "smartphone"),
    "projector": ("projector", "beamer", "ceiling projector"),
    "scanner": ("scanner", "document scanner", "barcode scanner"),
    "headset": ("headset", "headphones", "earphones"),
    "keyboard": ("keyboard", "wireless keyboard", "numpad"),
    "tablet": ("tablet", "ipad", "drawing tablet"),
    "camera": ("camera", "webcam", "conference camera"),
    "router": ("router", "access point", "network switch"),
    "server": ("server", "file server", "nas", "rack server"),
}

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Anna", "Ben", "Chloe", "Dmitri", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jakub", "Kira", "Liam", "Maya", "Noor", "Olga", "Priya")


@dataclass(frozen=True)
class Phrases:
    """One half. Frames hold {p} product, {s} symptom, {c} cue, {r} room, {d} day, {name}, {n} a number that means nothing."""

    openers: tuple[str, ...]
    leads: tuple[str, ...]  # before any sentence
    tails: tuple[str, ...]  # after a symptom
    closers: tuple[str, ...]
    noise: tuple[str, ...]
    problems: tuple[str, ...]  # {p} {s}
    problems_with_room: tuple[str, ...]  # {p} {s} {r}
    symptoms: dict[str, tuple[str, ...]]  # team -> verb phrases after the product
    causes: tuple[str, ...]  # verb phrases that leave it to one word of CUES, {c}, whose case it is
    severities: dict[str, tuple[str, ...]]  # label -> sentences
    rooms: tuple[str, ...]  # {r}
    dues: tuple[str, ...]  # {d}


KNOWN = Phrases(
    openers=(
        "hi", "hello", "hey", "hi there", "hello there", "good [morning|afternoon|evening]", "dear [support|helpdesk|IT] team",
        "hi team", "hello support", "hi, {name} here", "hello, this is {name}", "{name} speaking", "hey folks",
        "sorry to [bother|trouble|disturb] you", "i need some help", "help please", "quick one", "a new ticket for you",
        "i am writing about a problem", "we have a problem", "it's me again",
    ),
    leads=(
        "honestly", "to be honest", "as i said", "as far as i know", "by the way", "and", "also", "so", "just", "oh", "ok", "please note", "fyi", "one more thing",
        "to be clear", "for the record", "in short", "long story short", "if you ask me", "for us", "from my side", "sorry but", "hm", "anyway",
        "in my opinion", "according to {name}", "like last time", "good to know", "in case it helps", "before i forget",
    ),
    tails=(
        "again", "again and again", "now", "all day", "once more", "every time", "every day", "for no reason", "without any warning", "as always", "sometimes",
        "since last week", "since the weekend", "after the move", "after lunch", "all of a sudden", "a lot", "on some days", "for a while now", "when i use it",
        "when {name} uses it", "and i do not know why", "which is annoying", "like the last one", "or so it looks", "if i see it right",
    ),
    closers=(
        "thanks", "thank you", "many thanks", "thanks a lot", "thanks in advance", "cheers", "best regards, {name}", "regards, {name}",
        "kind regards", "best, {name}", "thx", "let me know", "please advise", "please help", "hope to hear from you",
        "looking forward to your answer", "have a nice day", "thank you very much", "sincerely, {name}", "yours, {name}",
    ),
    noise=(
        "my extension is {n}", "ext. {n}", "the old ticket was #{n}", "ref {n}", "i already [called|emailed|asked] {name} about it",
        "i tried to restart it", "we tried [twice|three times|everything]", "nothing helped so far", "it worked fine [before|last week|until now]",
        "{name} had the same [thing|trouble] before", "my manager {name} is asking about it", "i am new here",
        "it is about [two|three|five] years old", "the serial number is {n}", "you can call me on {n}", "i did not touch anything",
        "no idea what happened", "my colleague {name} saw it too", "asset tag {n}", "i work [part time|from here|with {name}]",
    ),
    problems=(
        "the {p} {s}", "my {p} {s}", "our {p} {s}", "{p} {s}", "this {p} {s}", "that {p} {s}", "{name}'s {p} {s}", "the [new|old] {p} {s}",
        "it seems that the {p} {s}", "it looks like my {p} {s}", "i think our {p} {s}", "since [yesterday|this morning|last night] the {p} {s}",
        "just noticed that the {p} {s}", "the problem is that my {p} {s}", "for some reason our {p} {s}", "i have to report that the {p} {s}",
        "as of today the {p} {s}", "apparently the {p} {s}", "{name} says the {p} {s}", "unfortunately my {p} {s}", "again the {p} {s}",
        "please note that our {p} {s}", "there is an issue, the {p} {s}", "problem with the {p}: it {s}", "about my {p}, it {s}",
        "i use the {p} every day and now it {s}", "you gave me a {p} and it {s}", "after the weekend the {p} {s}",
        "every time i use it the {p} {s}", "subject: {p} {s}",
    ),
    problems_with_room=(
        "the {p} in {r} {s}", "our {p} in {r} {s}", "in {r} the {p} {s}", "the {p} at {r} {s}", "{r}: the {p} {s}", "the {p} of {r} {s}",
        "in {r} there is a {p} that {s}", "i am in {r} and my {p} {s}", "we sit in {r} and our {p} {s}", "the [new|old] {p} in {r} {s}",
        "someone in {r} told me that the {p} {s}", "here in {r} the {p} {s}", "the {p} from {r} {s}", "since [yesterday|this morning] the {p} in {r} {s}",
        "it seems the {p} in {r} {s}", "{p} in {r} {s}", "when i came to {r} the {p} {s}", "at {r} our {p} {s}",
    ),
    symptoms={
        "hardware": (
            "is broken", "is completely broken", "won't turn on", "does not turn on", "makes a loud noise", "makes a strange noise",
            "has a crack", "is cracked", "fell down and is damaged", "got damaged", "smells burnt", "has a loose cable", "has a dead battery",
            "needs a spare part", "has a stuck button", "was dropped", "is jammed", "keeps getting jammed",
        ),
        "software": (
            "crashes", "keeps crashing", "freezes", "freezes all the time", "shows an error message", "gives an error code", "needs an update",
            "failed to update", "lost its license", "says the license expired", "needs a new driver", "has the wrong driver", "wants to install something",
            "cannot install the app", "has a bug", "asks for a reboot again and again", "lost its settings", "resets its settings",
        ),
        "network": (
            "is offline", "goes offline", "has no wifi", "drops the wifi", "cannot connect", "does not connect", "loses the connection", "has a slow connection",
            "is not on the vpn", "cannot reach the vpn", "gets no ip address", "has no internet", "has very slow internet", "cannot be pinged",
            "is unreachable", "has no signal", "has a weak signal", "times out",
        ),
        "facilities": (
            "has no power socket", "needs a power socket", "is too hot because of the heating", "stands next to the heating", "gets wet from the ceiling",
            "is under a leaking ceiling", "has to be moved to another desk", "needs a bigger desk", "is locked in the cabinet", "does not fit the cabinet",
            "is in the dark as the light is out", "is blinded by the light", "must be mounted on the wall", "fell off the wall", "is covered in dust",
            "collects dust", "stands in the cold from the window", "is too close to the window",
        ),
        "billing": (
            "was charged twice", "was charged to the wrong account", "has a wrong invoice", "is missing on the invoice", "should be refunded",
            "needs a refund", "was never paid", "has not been paid yet", "is on the wrong cost center", "needs another cost center",
            "came with a wrong price", "has a higher price than agreed", "still has an open order", "was not in the order", "needs a quote",
            "was sent without a quote", "was delivered without a receipt", "needs a receipt",
        ),
    },
    causes=(
        "has trouble with the {c}", "has an issue with the {c}", "gives me trouble because of the {c}", "does not work, it is the {c}", "has something wrong with the {c}",
        "is unusable because of the {c}", "needs someone to look at the {c}", "annoys everybody with the {c}", "has a problem, the {c} i think", "is not ok, see the {c}",
        "makes problems, the {c} for example", "[stopped|failed], must be the {c}", "was fine until the {c}", "is [bad|strange] when it comes to the {c}",
        "cannot be used, check the {c}", "has no proper {c}", "got a bad {c}", "came with the wrong {c}",
    ),
    severities={
        "critical": (
            "[this|it|that] is critical", "it is [absolutely|very|really] critical", "we consider this critical", "critical issue", "critical [here|for us|for everyone]",
            "priority: critical", "this is an emergency", "it's an emergency", "treat it as an emergency", "[big|huge|clear] emergency", "emergency!",
            "nobody can work", "because of this nobody can work", "right now nobody can work", "everything is down", "production is down",
            "production is down because of it", "we are [completely|totally] blocked", "the whole floor is blocked", "[my team|everyone|our work] is blocked",
        ),
        "high": (
            "[this|it|that] is urgent", "quite urgent", "urgent please", "please treat it as urgent", "[an|one more|another] urgent case", "urgent [here|today|for us]",
            "as soon as possible please", "asap", "asap please", "i need this asap", "we need it as soon as possible", "high priority", "priority: high",
            "please give it a high priority", "this has high priority for us", "set the priority to high", "it is very important", "this is really important for us",
            "important!", "important [case|matter|request]", "[quite|so] important",
        ),
        "normal": (
            "", "", "", "", "", "", "", "normal priority", "priority: normal", "set the priority to normal", "this is a normal request", "just a normal ticket",
            "a normal case", "please handle it in the usual way", "the usual priority is fine", "the usual [thing|procedure]", "it is a regular request",
            "regular priority", "[just the|a] regular procedure", "take it as a regular case",
        ),
        "low": (
            "no rush", "there is no rush", "absolutely no rush", "no rush at all", "no hurry", "there is no hurry at all", "we are not in a hurry", "take your time",
            "please take your time", "take all the time you need", "whenever you have time", "do it whenever you can", "whenever it suits you", "low priority",
            "this is low priority", "priority: low", "set the priority to low", "it is only a minor thing", "just a minor issue", "a minor one", "minor [case|matter|problem]",
            "it can wait", "this can wait", "it can wait [a while|until you are free|for now]",
        ),
    },
    rooms=(
        "i am in {r}", "we are in {r}", "it is in {r}", "you find it in {r}", "it stands in {r}", "the place is {r}", "location: {r}", "it's located in {r}",
        "please come to {r}", "come to {r} please", "my office is {r}", "i sit in {r}", "we sit in {r}", "this is about {r}", "you can find me in {r}",
        "where: {r}", "that is in {r}", "the device is in {r}", "bring a new one to {r}", "you can pick it up in {r}",
    ),
    dues=(
        "please fix it by {d}", "fix it by {d} please", "we need it by {d}", "i need it by {d}", "it has to work by {d}", "the deadline is {d}", "deadline {d}",
        "deadline: {d}", "due {d}", "it is due {d}", "please be done by {d}", "must be solved by {d}", "can you do it by {d}?", "could you fix this by {d}?",
        "the latest date is {d}", "not later than {d}", "we have a meeting and need it by {d}", "it should be ready by {d}", "please send someone by {d}",
        "until {d} please", "we can manage until {d}", "i am away after that so do it by {d}",
    ),
)

NEW = Phrases(
    openers=(
        "greetings", "hola", "good day to you", "evening all", "dear colleagues", "to whom it may concern", "{name} again", "me again, {name}",
        "knock knock", "got a minute?", "excuse me", "not sure if this is the right address",
    ),
    leads=(
        "truth be told", "mind you", "needless to say", "word has it", "small note", "listen", "alright", "as a reminder", "between us", "strangely enough",
        "{name} thinks", "on another note",
    ),
    tails=(
        "yet again", "ever since i got here", "day and night", "beyond belief", "quite often", "at random", "whenever i look at it", "to my surprise",
        "much to the joy of {name}", "once in a while",
    ),
    closers=(
        "ta", "much appreciated", "i owe you one", "talk soon, {name}", "warmly, {name}", "all the best", "appreciate the effort", "bye", "take care, {name}",
        "grateful for any help", "over and out", "waiting for a reply",
    ),
    noise=(
        "reach me at {n}", "internal number {n}", "previous case {n}", "inventory no. {n}", "{name} from the other department noticed it first",
        "i switched it off and on again", "we have been through this before", "the manual did not help", "i have only been here for a month",
        "it was a gift from {name}", "maybe {name} knows more", "i swear it was fine an hour ago",
    ),
    problems=(
        "we are facing this: the {p} {s}", "could someone look at the {p}, it {s}", "so the {p} {s}", "well, my {p} {s}", "turns out our {p} {s}",
        "not happy: the {p} {s}", "heads up, the {p} {s}", "i wanted to let you know the {p} {s}", "today i saw how the {p} {s}", "a {p} of ours {s}",
        "believe it or not, the {p} {s}", "regarding the {p}: it {s}", "guess what, my {p} {s}", "it so happens that this {p} {s}",
    ),
    problems_with_room=(
        "over in {r} the {p} {s}", "the {p} standing in {r} {s}", "users in {r} complain the {p} {s}", "greetings from {r}, our {p} {s}",
        "went to {r} and saw the {p} {s}", "up in {r} my {p} {s}", "the one {p} we have in {r} {s}", "report from {r}: {p} {s}",
    ),
    symptoms={
        "hardware": (
            "seems broken", "looks broken to me", "refuses to turn on", "is full of cracks and damaged", "started to make noise", "arrived damaged",
            "has a button that is stuck", "got jammed again", "has a burnt smell", "needs another battery",
        ),
        "software": (
            "crashed again", "crashed on me", "just freezes", "throws an error", "got stuck in the update", "complains about its license", "wants a driver",
            "is full of bugs, with an error each time", "refuses to install anything", "forgot its settings",
        ),
        "network": (
            "went offline", "keeps going offline", "lost the wifi", "refuses to connect", "has a bad connection", "hates the vpn", "is without internet",
            "shows a signal that is weak", "was unreachable all day", "is waiting for an ip address",
        ),
        "facilities": (
            "has no free power socket near it", "suffers from the heating", "has water from the ceiling on it", "wants a different desk", "is stuck behind the cabinet",
            "needs more light", "hangs loose on the wall", "is full of dust", "stands too bright by the window", "sits on a shaky desk",
        ),
        "billing": (
            "got charged two times", "shows up twice on the invoice", "deserves a refund", "has been paid by the wrong cost center", "has the wrong price",
            "is not what we had in the order", "came without any invoice", "is waiting for a quote", "has no receipt", "was charged although we sent it back",
        ),
    },
    causes=(
        "is a pain, the {c} i guess", "acts up due to the {c}", "keeps me busy with the {c}", "gets on our nerves, {c} again", "drives us mad with its {c}",
        "is no good, somebody should see to the {c}", "would be lovely without the {c}", "is in a sad state, {c} and all",
    ),
    severities={
        "critical": (
            "i would call it critical", "critical for the business", "a real emergency", "sorry, but nobody here can work", "the entire production is down",
            "we are all blocked by this", "consider us blocked", "everything here is down",
        ),
        "high": (
            "kind of urgent", "urgent!!", "that one is urgent for me", "asap if you can", "do it asap", "the priority is high", "rather important",
            "an important one", "as soon as possible would be great",
        ),
        "normal": ("", "", "", "", "nothing special, normal priority", "as usual", "treat it like a regular ticket", "a normal one"),
        "low": (
            "really no rush here", "we are in no hurry", "you can take your time", "when you have time, whenever that is", "the priority is low", "minor stuff",
            "rather minor", "sure, it can wait", "that can wait a bit",
        ),
    },
    rooms=(
        "look for me in {r}", "room in question: {r}", "we moved to {r}", "everything happens in {r}", "address: {r}", "the scene is {r}", "visit us in {r}",
        "drop by in {r}", "i can be found in {r}", "head over to {r}",
    ),
    dues=(
        "would be great to have it by {d}", "let's say by {d}", "has to be over by {d}", "our deadline would be {d}", "make sure it works by {d}",
        "by {d}, if that is possible", "the boss wants it by {d}", "is {d} as a deadline ok?", "everything must run by {d}", "we can live with it until {d}",
        "solved by {d} would be perfect",
    ),
)

# What a case may be about, in a word or two, by team.
CUES: dict[str, tuple[str, ...]] = {
    "hardware": ("battery", "crack", "power button", "loud noise", "cable", "paper jam", "spare part", "burnt smell", "damage"),
    "software": ("update", "license", "driver", "error message", "app", "settings", "reboot", "bug", "crash"),
    "network": ("wifi", "vpn", "internet", "connection", "ip address", "signal", "slow internet", "offline mode"),
    "facilities": ("power socket", "heating", "ceiling", "desk", "cabinet", "light", "wall", "dust", "window"),
    "billing": ("invoice", "refund", "cost center", "price", "order", "quote", "receipt", "payment"),
    "security": ("theft", "phishing mail", "virus", "hacker", "strange login", "leaked password", "ransom note"),
}

# The label that the teacher never sees: it comes with the fine-tune.
SECURITY_KNOWN = (
    "was stolen", "has been stolen", "got stolen last night", "was stolen from my bag", "got a phishing mail", "shows a phishing page", "opened a phishing link",
    "has a virus", "caught a virus", "is infected with a virus", "was hacked", "has been hacked", "got hacked overnight", "shows a login from abroad",
    "reports a strange login", "had a login that was not me", "leaked a password", "shows my password to everyone", "has a password on a sticky note",
    "is encrypted by ransomware", "asks for ransom money", "shows a ransom note",
)
SECURITY_NEW = (
    "is gone, surely stolen", "seems to be stolen", "is full of phishing", "sent phishing to {name}", "probably has a virus", "fell victim to a virus",
    "looks hacked to me", "was surely hacked", "had an unknown login", "keeps a password in plain sight", "wants a ransom from us",
)
