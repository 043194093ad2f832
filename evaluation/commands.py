"""How right a Bash command is, told from its text alone: nothing is ever run.

    template("find . -name '*.c' | xargs -n 5 rm -rf")     # "find -name | xargs -n [ rm -f -r ]"
    nlc2cmd("find . -type f | tail -n 5", "find . -type f -ctime -3 | tail -n 5")           # 0.75

A command is read as utilities with their flags; arguments count for nothing. Words and operators
are the shell's; what a word means to a utility is from its manual: that `-n5` is -n with an
argument, and that `find -exec`, `xargs`, `sudo` and `bash -c` hold commands of their own.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

BASH_SECONDS = 10.0  # after which `bash -n` has not parsed a command

# letters of the flags that take an argument: attached, or the next word
WITH_ARGUMENT = {
    "awk": "Ffv", "bash": "coO", "chmod": "", "column": "cs", "cp": "tS", "cpio": "CEFHIMOR",
    "curl": "AbCcdeFHKmoQrTuUwxXyYz", "cut": "bcdf", "date": "drs", "df": "Btx", "diff": "CFIUWxSX",
    "du": "BdtX", "env": "uCS", "file": "fFmP", "fold": "w", "gawk": "Ffv", "grep": "ABCDdefm",
    "head": "cn", "join": "aeijotv12", "ln": "St",
    "ls": "ITw", "mkdir": "m", "mktemp": "p", "mount": "otLU", "mv": "St", "nice": "n",
    "nl": "bdfhilnsvw", "od": "AjNStw", "paste": "d", "perl": "eEIMmF", "pgrep": "dgGPstuU",
    "ping": "cFIilMmpQsStTwW", "pkill": "gGPstuU", "ps": "Co", "python": "cmQW",
    "python3": "cmQW", "read": "adinNptu", "renice": "ngpu", "rsync": "efTBM", "scp": "cFiloPS",
    "screen": "cehpStT", "sed": "efl", "seq": "fs", "set": "o", "sh": "co", "shuf": "ino",
    "sort": "kSTto", "split": "abClnt", "ssh": "bcDEeFIiLlmOopQRSWw", "stat": "cf", "su": "cs",
    "sudo": "CghpRrTUu", "tail": "cns", "tar": "bCfFgHKLNTVX", "time": "fo", "timeout": "ks",
    "top": "dnpuU", "touch": "drt", "tree": "HILoPT", "uniq": "fsw", "unzip": "dPx", "watch": "n",
    "wget": "aABDeIiloOPQRtTUwX", "xargs": "adEILnPs", "zip": "binPtx",
}  # fmt: skip
# letters whose argument is optional and attached: sed -i.bak
ATTACHED = {"date": "I", "perl": "0il", "sed": "i", "split": "dx", "xargs": "eil"}
# utilities of which -5 is a number, or a signal, whichever it is
NUMBERED = {"diff", "fold", "grep", "head", "kill", "killall", "nice", "pkill", "split", "tail"}
NUMBER = re.compile(r"-(\d+|\$.*|SIG[A-Z]+|[A-Z]{3,})")
MODE = re.compile(r"-[rwxXst]+(,.*)?")  # of chmod, no flags
WHOLE_WORDS = {"convert", "ffmpeg", "gcc", "ifconfig", "ip", "java", "openssl", "route"}
DASHLESS = {"tar", "ps"}  # whose first argument may be flags

# find: its tests and actions without an argument; all others have one
FIND_ALONE = re.compile(
    "-(print0?|delete|prune|empty|depth|ls|follow|mount|xdev|daystart|nouser|nogroup|true|false|"
    "readable|writable|executable|quit|noleaf|warn|nowarn|(no)?ignore_readdir_race|-?help|-?version)"
)
FIND_RUNS = ("-exec", "-execdir", "-ok", "-okdir")
FIND_LOGIC = {"!": "!", "-not": "!", "-o": "-or", "-or": "-or", "-a": "", "-and": "", ",": ","}

# utilities that hold a command, by how many arguments come before it
RUNS = {"command": 0, "env": 0, "exec": 0, "nice": 0, "nohup": 0, "setsid": 0, "strace": 0,
        "ssh": 1, "sudo": 0, "time": 0, "timeout": 1, "watch": 0, "xargs": 0,
        "eval": 0}  # fmt: skip
# utilities that hold one as a flag's argument
HOLDS = dict.fromkeys(("bash", "dash", "ksh", "sh", "su", "zsh"), "-c") | {"rsync": "-e"}
ALIASES = {"egrep": ("grep", ["-E"]), "fgrep": ("grep", ["-F"])}
KNOWN = {*WITH_ARGUMENT, *RUNS, *HOLDS, "cat", "cd", "echo", "find", "kill", "rm", "tr", "wc"}

RESERVED = re.compile("if|then|elif|else|fi|do|done|while|until|esac|[!{}]")
LISTS = ("for", "select", "case", "function")  # whose words are no command
OPERATOR = re.compile(r"\d*(<<<|<<-?|<>|>>|<&|>&|>\||[<>])|&>>?|\|\||&&|;;|\|&|[;|&()\n]")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\[[^]]*\])?\+?=")


class SyntaxFault(ValueError):
    """A text that is no command: a quote or a bracket stands alone."""


@dataclass
class Utility:
    """A utility, its flags in order, and the commands in its arguments."""

    name: str
    flags: list[str] = field(default_factory=list)
    inside: "list[Script]" = field(default_factory=list)

    def all_flags(self) -> set[str]:
        """Its flags and, as the competition counts them, those of all commands inside it."""
        inside = [u for script in self.inside for u in utilities(script)]  # at any depth
        flags = {flag for utility in (self, *inside) for flag in utility.flags}
        return {flag for flag in flags if flag.startswith("-") and flag != "-or"}


Script = list[str | Utility]  # operators and reserved words, and utilities


@dataclass
class Word:
    """A word of the shell: its text without quotes, whether it began with one, what it runs."""

    text: str
    quoted: bool = True
    nested: list[Script] = field(default_factory=list)


# Words to utilities -------------------------------------------------------------------------------


def parse(command: str) -> Script:
    """The utilities of a command, with the operators between them. Raises SyntaxFault."""
    try:
        return Reader(command).script()
    except RecursionError:
        raise SyntaxFault("it is nested too deep") from None


def simple_command(words: list[Word]) -> Script:
    """What stands between two operators: reserved words, assignments, a utility and its words."""
    script: Script = []
    for i, word in enumerate(words):
        if not word.quoted and RESERVED.fullmatch(word.text):
            script.append(word.text)
        elif not word.quoted and word.text in LISTS:
            return [*script, word.text, *bracketed(words[i + 1 :])]
        elif not word.quoted and ASSIGNMENT.match(word.text):
            script += bracketed([word])
        else:
            return script + read_utility(words[i:])
    return script


def bracketed(words: list[Word]) -> Script:
    """The commands inside words that belong to no utility."""
    return [part for word in words for script in word.nested for part in ("$(", *script, ")")]


def read_utility(words: list[Word]) -> Script:
    """The utility that the first word names, with the others; sudo is left out."""
    first, *arguments = words
    name = first.text.rpartition("/")[2].lower()
    if first.nested or not name or "$" in name:  # nobody knows which
        return ["$", *bracketed(words)]
    name, flags = ALIASES.get(name, (name, []))
    utility = Utility(name, [*flags])
    if name == "find":
        read_find(utility, arguments)
    else:
        read_arguments(utility, arguments)
    if utility.name != "sudo":
        return [utility]
    return [part for script in utility.inside for part in script]


def read_arguments(utility: Utility, words: list[Word]):
    """Flags as getopt reads them, and the command that a utility may hold."""
    name, before = utility.name, RUNS.get(utility.name)
    ended, seen, i = False, 0, 0
    while i < len(words):
        word, i = words[i], i + 1
        dashless = name in DASHLESS and i == 1 and word.text.isalpha() and not word.quoted
        if dashless or (word.text[:1] == "-" != word.text and not (ended or word.quoted)):
            utility.inside += word.nested
            if word.text == "--":
                ended = True
            elif name == "chmod" and MODE.fullmatch(word.text):
                continue
            elif read_flags(utility, word.text.lstrip("-") if dashless else word.text[1:]):
                for argument in words[i : i + 1]:
                    holds = argument.quoted and utility.flags[-1] == HOLDS.get(name)
                    utility.inside += [parse(argument.text)] if holds else argument.nested
                i += 1
        elif before is not None and seen >= before and not ASSIGNMENT.match(word.text):
            text = " " in word.text and word.quoted  # one word that is a whole command
            utility.inside.append(parse(word.text) if text else simple_command(words[i - 1 :]))
            return
        else:
            utility.inside += word.nested
            seen += not ASSIGNMENT.match(word.text) or before is None


def read_flags(utility: Utility, text: str) -> bool:
    """Adds the flags of a word without its first dash; whether the next word is an argument."""
    name, flags = utility.name, utility.flags
    if text[:1] == "-" or name in WHOLE_WORDS:
        flags.append("-" + text.partition("=")[0])
        return False
    if name in NUMBERED and NUMBER.fullmatch("-" + text):
        flags.append("-NUMBER")
        return False
    for at, letter in enumerate(text, 1):
        if not (letter.isalnum() or letter in "?@#"):
            return False
        flags.append("-" + letter)
        if letter in ATTACHED.get(name, ""):
            return False
        if letter in WITH_ARGUMENT.get(name, ""):
            return at == len(text)
    return False


def read_find(utility: Utility, words: list[Word]):
    """find's arguments: its flags are words, and -exec holds a command."""
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        utility.inside += word.nested
        if word.text in FIND_LOGIC and (not word.quoted or word.text == "!"):
            utility.flags += filter(None, [FIND_LOGIC[word.text]])
        elif word.quoted or word.text[:1] != "-" or word.text == "-":
            continue
        elif word.text in FIND_RUNS:
            end = next((j for j in range(i, len(words)) if is_end(words, j)), len(words))
            ending = "+" if end < len(words) and words[end].text == "+" else ";"
            utility.flags.append(f"{word.text} {ending}")
            utility.inside.append(simple_command(words[i:end]))
            i = end + 1
        elif re.fullmatch(r"-[EXdsxHLP]+", word.text):
            utility.flags += ["-" + letter for letter in word.text[1:]]
        else:
            utility.flags.append(word.text)
            if not FIND_ALONE.fullmatch(word.text) and i < len(words):
                utility.inside += words[i].nested
                i += 1


def is_end(words: list[Word], i: int) -> bool:
    """Whether a word ends the command of find's -exec."""
    return words[i].text == ";" or (words[i].text == "+" and words[i - 1].text == "{}")


# Text to words ------------------------------------------------------------------------------------


class Reader:
    """Reads a text as the shell does, without running or expanding anything."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def script(self, end: str = "") -> Script:
        """All up to the operator `end`, which is taken as well. Raises SyntaxFault."""
        script: Script = []
        words: list[Word] = []
        while True:
            found = self.token()
            if isinstance(found, Word):
                words.append(found)
            elif ("<" in found or ">" in found) and found:
                target = self.token()
                if not isinstance(target, Word):
                    raise SyntaxFault(f"nothing after {found}")
                words.append(Word("", nested=target.nested))  # the file is an argument
            elif words and words[0].text == "[[" and words[-1].text != "]]" and found:
                continue
            elif found == "(" and self.text[self.at : self.at + 1] == "(":
                self.at -= 1
                self.balanced()  # arithmetic
            else:
                script += simple_command(words)
                words = []
                if found == end:
                    return script
                if found in ("", ")"):
                    raise SyntaxFault(f"{end or found} stands alone")
                if found == "(":
                    script += ["(", *self.script(")"), ")"]
                else:
                    script.append({"\n": ";", "|&": "|"}.get(found, found))

    def token(self) -> Word | str:
        """The next word or operator; "" at the end."""
        text = self.text
        while self.at < len(text) and (
            text[self.at] in " \t\r" or text.startswith("\\\n", self.at)
        ):
            self.at += 2 if text[self.at] == "\\" else 1
        if text[self.at : self.at + 1] == "#":
            end = text.find("\n", self.at)
            self.at = len(text) if end < 0 else end
        if self.at >= len(text):
            return ""
        operator = OPERATOR.match(text, self.at)
        if operator is None or text.startswith(("<(", ">("), self.at):
            return self.word()
        self.at = operator.end()
        return operator[0]

    def word(self) -> Word:
        word = Word("", self.text[self.at] in "'\"\\")
        pieces: list[str] = []  # joined at the end: a text that grows is copied each time
        while c := self.text[self.at : self.at + 1]:
            bracket = self.text[self.at : self.at + 2] in ("<(", ">(")
            if c in " \t\r\n;|&<>()" and not bracket:
                if c != "(" or not ASSIGNMENT.fullmatch("".join(pieces)):
                    break
                while self.text[self.at : self.at + 1] == "(":
                    self.balanced()  # an array
                continue
            self.at += 1
            if c == "\\":
                pieces.append(self.text[self.at : self.at + 1])
                self.at += 1
            elif c == "'":
                pieces.append(self.until("'"))
            elif c == '"':
                pieces += self.double_quoted(word.nested)
            elif c in "$`<>":
                pieces += self.expansion(c, word.nested)
            else:
                pieces.append(c)
        word.text = "".join(pieces)
        return word

    def double_quoted(self, nested: list[Script]) -> Iterator[str]:
        """The text up to the closing quote; the commands in it come to `nested`."""
        while (c := self.next()) != '"':
            if c == "\\":
                c = self.next()
                yield c if c in '$`"\\' else "\\" + c
            elif c in "$`":
                yield from self.expansion(c, nested)
            else:
                yield c

    def expansion(self, c: str, nested: list[Script]) -> Iterator[str]:
        """After $, `, <( or >(: a command, arithmetic, or a variable, whose name stays."""
        after = self.text[self.at : self.at + 1]
        if c == "`":
            inside = []
            while (d := self.next()) != "`":
                after = self.text[self.at : self.at + 1]
                inside.append(self.next() if d == "\\" and after in set("\\`$") else d)
            nested.append(Reader("".join(inside)).script())
        elif after == "(" and self.text[self.at + 1 : self.at + 2] == "(":
            self.balanced()
        elif after == "(":
            self.at += 1
            nested.append(self.script(")"))
        elif c == "$" and after == "{":
            self.at += 1
            yield "$" + self.until("}")
        elif c == "$" and after == "'":
            self.at += 1
            while (d := self.next()) != "'":
                yield self.next() if d == "\\" else d
        else:
            yield c

    def next(self) -> str:
        """One character, which there must be."""
        if self.at >= len(self.text):
            raise SyntaxFault("a quote or bracket stands alone")
        self.at += 1
        return self.text[self.at - 1]

    def until(self, end: str) -> str:
        """What stands before `end`, which is taken as well."""
        start, found = self.at, self.text.find(end, self.at)
        if found < 0:
            raise SyntaxFault(f"{end} stands alone")
        self.at = found + 1
        return self.text[start:found]

    def balanced(self):
        """Takes a bracket that is open here, up to the one that closes it."""
        depth = 0
        while True:
            c = self.next()
            depth += (c == "(") - (c == ")")
            if depth == 0:
                return


# Scores -------------------------------------------------------------------------------------------


def utilities(script: Script) -> list[Utility]:
    """All utilities in the order in which they stand, those in arguments after their own."""
    found = []
    for part in script:
        if isinstance(part, Utility):
            found.append(part)
            found += [u for inside in part.inside for u in utilities(inside)]
    return found


def serialise(script: Script) -> str:
    """A text that is the same for scripts that differ in arguments or in the order of flags."""
    parts = []
    for part in script:
        if isinstance(part, Utility):
            parts += [part.name, *sorted(part.flags)]
            parts += [f"[ {serialise(inside)} ]" for inside in part.inside if inside]
        else:
            parts.append(part)
    return " ".join(parts)


def template(command: str) -> str | None:
    """A command without its arguments, its flags in alphabetical order; None if it is no command.

    Operators, reserved words and commands inside arguments stay, redirections do not.
    """
    try:
        return serialise(parse(command))
    except SyntaxFault:
        return None


def template_match(predicted: str, true: str) -> bool:
    """Whether two commands differ in nothing but arguments and the order of flags."""
    wanted = template(true)
    return predicted == true if wanted is None else template(predicted) == wanted


def exact_match(predicted: str, true: str) -> bool:
    """Whether two commands are the same, however many spaces stand where one does."""
    return predicted.split() == true.split()


def nlc2cmd(predicted: str, true: str) -> float:
    """The score of the NLC2CMD competition (Agarwal et al. 2021, arXiv:2103.02523), -1 to 1.

    Utilities are compared one by one in their order: -1 for each that is not the same or is too
    many or too few, (1 + F) / 2 for the same one, where F = (2 |P and G| - |P or G|) /
    max(|P|, |G|, 1) of the predicted and the true flags, 1 where neither has any; and the mean.
    """
    P, G = utilities_of(predicted), utilities_of(true)
    scores = [-1.0] * abs(len(P) - len(G)) + aligned_scores(P, G)
    return sum(scores) / len(scores) if scores else 0.0


def nlc2cmd_aligned(predicted: str, true: str) -> float:
    """The same, -1 to 1, over the utilities alone that both commands have a place for.

    So the first two of `ls | sort | uniq` are all that counts beside a true `ls | sort`. -1 where
    only one of the two has any.
    """
    P, G = utilities_of(predicted), utilities_of(true)
    scores = aligned_scores(P, G)
    return sum(scores) / len(scores) if scores else 0.0 - bool(P or G)


def aligned_scores(P: Sequence[Utility], G: Sequence[Utility]) -> list[float]:
    """Of utilities side by side: -1 for different ones, (1 + F) / 2 for the same."""
    return [
        (1 + flag_score(p, g)) / 2 if p.name == g.name else -1.0 for p, g in zip(P, G, strict=False)
    ]


def nlc2cmd_best(
    predicted: Sequence[str], true: str, score: Callable[[str, str], float] = nlc2cmd
) -> float:
    """The competition's score of several answers: the best one's if above 0, else their mean."""
    scores = [score(command, true) for command in predicted]
    return max(scores) if max(scores) > 0 else sum(scores) / len(scores)


def utilities_of(command: str) -> list[Utility]:
    """The utilities of a command; none of what is no command."""
    try:
        return utilities(parse(command))
    except SyntaxFault:
        return []


def looks_like_command(text: str) -> bool:
    """Whether a text begins with a utility that is known here, and has a flag, as prose has not."""
    found = utilities_of(text) if text.lstrip()[:1].islower() else []
    return bool(found) and found[0].name in KNOWN and any(utility.flags for utility in found)


def flag_score(predicted: Utility, true: Utility) -> float:
    """F of `nlc2cmd`."""
    P, G = predicted.all_flags(), true.all_flags()
    return (2 * len(P & G) - len(P | G)) / max(len(P), len(G)) if P or G else 1.0


def has_bash() -> bool:
    """Whether there is one to parse with."""
    return shutil.which("bash") is not None


def bash_parses(command: str) -> bool:
    """Whether `bash -n`, which runs nothing, finds no error. Raises FileNotFoundError without bash.

    In an environment that is empty, so that no start-up file is read.
    """
    bash = shutil.which("bash")
    if bash is None:
        raise FileNotFoundError("bash")
    try:
        done = subprocess.run(  # noqa: S603, parsed alone: -n
            [bash, "--noprofile", "--norc", "-n"],
            input=command.encode("utf-8", "replace"),
            env={},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=BASH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
