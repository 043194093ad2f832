"""Argument slots: what a prompt and its answer share, as numbered placeholders of a few types.

    slots = Slots("Find all *.log files larger than 10M in /var")
    slots.prompt  # Find all *<E1> files larger than <N1>M in <P1>
    slots.hide("find /var -name '*.log' -size +10M")  # find <P1> -name '*<E1>' -size +<N1>M
    slots.show("find <P1> -type f -size +<N1>M")  # find /var -type f -size +10M

Which file, which number or which text is meant says little of what is asked, and a model cannot
spell those that it has not seen. So they are taken out of the prompt, found there by their form
alone, and out of its completion wherever that has the same; after generating they are put back. It
is the template and argument filling of NL2Bash (Lin et al., 2018), around the model.

A placeholder is one character of a private-use area, which <E1> stands for here; `readable` writes
it so. Where a text has such a character itself, that one is escaped, and so each text comes back as
it was: show(hide(text)) == text. Standard library only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

VERSION = 1  # goes into the fingerprint of the data: raise it when other arguments are found
MAX_SLOTS = 8  # of a type in a prompt; those that come after them stay as they are

TYPES = {  # what stands for a placeholder whose type the prompt has none of
    "D": "1 day ago",  # a date or a time
    "H": "localhost",  # a host, its address, user@host
    "N": "1",  # a number, without its unit
    "V": "var",  # the name of a variable, without its $
    "P": ".",  # a path
    "F": "file",  # the name of a file
    "E": ".txt",  # its extension
    "W": "name",  # a word that is a name, as by its quotes
    "Q": "text",  # anything else in quotes
}
FIRST = 0xE110  # placeholders are MAX_SLOTS characters from here for each type, in TYPES' order
PLACEHOLDERS = "".join(chr(FIRST + i) for i in range(MAX_SLOTS * len(TYPES)))
# a reserved character of a text is ESCAPE and two of 16 digits
ESCAPE, DIGITS = "\ue100", "\ue1a0-\ue1af"
RESERVED = re.compile(f"[{ESCAPE}-{DIGITS[-1]}]")
MARKS = re.compile(f"{ESCAPE}([{DIGITS}])([{DIGITS}])|{RESERVED.pattern}")
UNFINISHED = re.compile(f"{ESCAPE}[{DIGITS}]?\\Z")  # of which more may come

# Finding ------------------------------------------------------------------------------------------

QUOTED = re.compile(
    r"""(?<![\w'"`\\])(?:"([^"\n]{1,80})"|'([^'\n]{1,80})'|`([^`'\n]{1,80})['`])(?!\w)"""
)
TOKEN = re.compile(r"[^\s\"'`()<>|,;]+")
NAME = r"[\w.+%-]*\w"
GLOB = re.compile(r"[\w.~#@%+?-]*\*[\w.~#@%+*?-]*")
BRACES = r"\$\{\w+\}"
STEP = r"[\w.*${}-]+"  # of a path
# by the whole of a token, the first that fits; the argument is the first group. No text may fit a
# form in several ways: trying all of them would take for ever
FORMS = [
    (kind, re.compile(form))
    for kind, form in (
        ("D", r"(\d{4}-\d\d?-\d\d?(?:T?\d\d?:\d\d(?::\d\d)?)?|\d\d?:\d\d(?::\d\d)?)"),
        ("D", r"(\d\d?/\d\d?/\d{2,4})"),
        ("H", rf"(\d{{1,3}}(?:\.\d{{1,3}}){{3}}|{NAME}@{NAME})"),
        ("H", r"((?:[\w-]+\.)+(?:com|org|net|edu|local))"),
        ("N", r"[-+]?(\d+(?:\.\d+)?)(?:[kKMGTcbBwdhmsx%]|[kKMG]i?[bB])?"),
        ("V", r"\$(\w+)"),
        ("V", r"\$\{(\w+)\}"),
        ("P", rf"((?:~\w*|\.\.?|\$\w+|{BRACES})?/\S*[^\s.:]|[\w.*-]+/(?:{STEP}(?:/{STEP})*/?)?)"),
        ("F", r"([\w-][\w.+-]*\.[A-Za-z]\w*)"),
        ("E", r"(\.\w[\w.-]*)"),
        # dir1, MAX_SIZE, myFile
        ("W", r"([A-Za-z]+[_-]?\d\w*|[^\W_]*_\w+|[a-z]+[A-Z]\w*|[A-Z][a-z]+[A-Z]\w*)"),
    )
]
# what has the form of an argument and is none: tools, and words with a stroke between them
WORDS = (
    r"(?:and|or|files?|dir\w*|folders?|regular|normal|new|missing|names?|paths?|dates?|times?"
    r"|read|write|execute|users?|groups?|owners?|created|modified|devices?|partitions?)"
)
PLAIN = re.compile(rf"(?i)e\.g|i\.e|md5\w*|sha\d+\w*|bzip2|utf-?\d+|ipv\d|{WORDS}(?:/{WORDS})+")
# a bare word is a name after one of these, unless it goes on with the sentence
CALLED = re.compile(r"(?i)\b(?:named|called|user|group|username|hostname)\s+\Z")
NO_NAME = re.compile(
    r"(?i)a|an|the|and|or|not|if|it|all|same|like|but|of|on|in|is|are|to|that|with|by|as|at|for"
    r"|from|only|can|has|have|does|after|who|files?|ids?|names?|folder|director(?:y|ies)|home"
    r"|permissions?|write|read|execute|bit|owner|ownership|others?|groups?|users?|accounts?"
    r"|session|belonging|exactly|specified|defined"
)


def find_arguments(text: str) -> Iterator[tuple[int, int, str]]:
    """Where each argument of a prompt begins and ends, and its type, in order."""
    at = 0
    for quoted in QUOTED.finditer(text):
        yield from find_bare(text, at, quoted.start())
        start, end = quoted.span(quoted.lastindex or 0)
        content = text[start:end]
        found = list(find_in_token(text, start, end))
        if not found and re.fullmatch(NAME, content):
            found = [(start, end, "W")]
        elif not found and re.search(r"\w", content):  # a lone comma stands in too many places
            found = [(start, end, "Q")]
        yield from found
        at = quoted.end()
    yield from find_bare(text, at, len(text))


def find_bare(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """The same of a stretch without quotes."""
    for token in TOKEN.finditer(text, start, end):
        word = token[0].rstrip(".:?!")
        first, last = token.start(), token.start() + len(word)
        if PLAIN.fullmatch(word):
            continue
        found = list(find_in_token(text, first, last))
        called = CALLED.search(text, max(0, first - 20), first) is not None
        if not found and called and re.fullmatch(NAME, word) and not NO_NAME.fullmatch(word):
            found = [(first, last, "W")]
        yield from found


def find_in_token(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """The argument that a token is, or those between the asterisks of a pattern."""
    token = text[start:end]
    if GLOB.fullmatch(token):
        for part in re.finditer(r"[^*?]*\w[^*?]*", token):
            is_extension = re.fullmatch(r"\.\w[\w.-]*", part[0])
            yield start + part.start(), start + part.end(), "E" if is_extension else "W"
        return
    for kind, form in FORMS:
        if found := form.fullmatch(token):
            yield start + found.start(1), start + found.end(1), kind
            return


# Replacing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """An argument of a prompt."""

    kind: str
    value: str  # escaped

    def pattern(self) -> str:
        """What finds it in a completion: not in the middle of a word, nor as an option's name."""
        before = after = ""
        if self.kind in ("N", "D"):  # -n5 and 0644 have numbers, $1, 2>&1 and md5 have none
            before = r"(?:(?<![\w$&.])|(?<=\s-[a-zA-Z])|(?<=[\s,=]0)|(?<=\.\.))"
            after = r"(?![\d>]|\.\d)"
        else:
            if re.match(r"\w", self.value):
                before = r"(?<!\w)(?<!\s-)(?<!\s--)"
            if re.search(r"\w\Z", self.value):
                after = r"(?!\w)"
        return f"{before}{re.escape(self.value)}{after}"


class Slots:
    """The arguments of one prompt, and the prompt without them.

    With on = False there are none, and texts stay as they are.
    """

    def __init__(self, prompt: str, on: bool = True):
        self.on, self.prompt = on, prompt
        self.by_placeholder: dict[str, Slot] = {}
        self.placeholders: dict[str, str] = {}  # of each value
        if on:
            self.prompt = self.take_out(escape(prompt))
        longest_first = sorted(self.by_placeholder.values(), key=lambda slot: -len(slot.value))
        self.pattern = re.compile("|".join(slot.pattern() for slot in longest_first))

    def take_out(self, text: str) -> str:
        parts, at = [], 0
        for start, end, kind in find_arguments(text):
            value = text[start:end]
            if value not in self.placeholders:
                number = sum(slot.kind == kind for slot in self.by_placeholder.values())
                if number == MAX_SLOTS:
                    continue
                placeholder = chr(FIRST + MAX_SLOTS * list(TYPES).index(kind) + number)
                self.placeholders[value] = placeholder
                self.by_placeholder[placeholder] = Slot(kind, value)
            parts += text[at:start], self.placeholders[value]
            at = end
        return "".join(parts) + text[at:]

    def hide(self, completion: str) -> str:
        """A completion with placeholders for what stands in the prompt as well."""
        if not self.on:
            return completion
        text = escape(completion)
        if not self.by_placeholder:  # an empty pattern would match everywhere
            return text
        return self.pattern.sub(lambda found: self.placeholders[found[0]], text)

    def show(self, text: str) -> str:
        """A text with the arguments put back in place of their placeholders.

        A placeholder that the prompt has not is shown as its last argument of the same type, or
        as what TYPES has for it: no placeholder is ever seen.
        """
        return MARKS.sub(self.shown, text) if self.on else text

    def shown(self, mark: re.Match[str]) -> str:
        if mark[0] not in PLACEHOLDERS:
            return unescape(mark[0])
        slot = self.by_placeholder.get(mark[0])
        if slot is None:
            kind = kind_of(mark[0])
            alike = [slot for slot in self.by_placeholder.values() if slot.kind == kind]
            if not alike:
                return TYPES[kind]
            slot = alike[-1]
        return unescape(slot.value)

    def lacks(self, text: str) -> bool:
        """Whether a text has a placeholder for which the prompt has no argument."""
        marks = {mark[0] for mark in MARKS.finditer(text)} if self.on else set()
        return not marks.isdisjoint(set(PLACEHOLDERS) - self.by_placeholder.keys())


def hidden(pair: tuple[str, str]) -> tuple[str, str]:
    """A prompt and its completion, both with placeholders."""
    prompt, completion = pair
    slots = Slots(prompt)
    return slots.prompt, slots.hide(completion)


def kind_of(placeholder: str) -> str:
    """The type of a placeholder, a letter of TYPES."""
    return list(TYPES)[(ord(placeholder) - FIRST) // MAX_SLOTS]


def readable(text: str) -> str:
    """A text with <P1> and the like for its placeholders, for people."""

    def name(mark: re.Match[str]) -> str:
        if mark[0] not in PLACEHOLDERS:
            return unescape(mark[0])
        return f"<{kind_of(mark[0])}{(ord(mark[0]) - FIRST) % MAX_SLOTS + 1}>"

    return MARKS.sub(name, text)


def escape(text: str) -> str:
    """A text in which no character is a placeholder."""

    def digits(found: re.Match[str]) -> str:
        high, low = divmod(ord(found[0]) - ord(ESCAPE), 16)
        return f"{ESCAPE}{chr(ord(DIGITS[0]) + high)}{chr(ord(DIGITS[0]) + low)}"

    return RESERVED.sub(digits, text)


def unescape(text: str) -> str:
    """What `escape` was given; U+FFFD for what it cannot have written, placeholders included."""

    def character(mark: re.Match[str]) -> str:
        if not mark[1]:
            return "\ufffd"
        high, low = (ord(digit) - ord(DIGITS[0]) for digit in mark.groups())
        found = chr(ord(ESCAPE) + 16 * high + low)
        return found if RESERVED.fullmatch(found) else "\ufffd"

    return MARKS.sub(character, text)
