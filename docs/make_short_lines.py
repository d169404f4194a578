"""Breaks the prose of markdown pages into one sentence or clause per line: `python docs/make_short_lines.py PAGE...`

Changes show line by line in a diff. Only line breaks change; tables, headings, code and comments stay as they are.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

MOST = 160  # letters of a line, where there is a place to break it
_ABBREVIATION = re.compile(r"\b(?:Fig|Figs|Eq|al|vs|No|e\.g|i\.e|cf|St|approx)\.$")
_AS_IT_IS = ("|", "#", "!", "<", ":::", ">")
_BREAKS = (  # where a clause may end, and how much an uneven cut is preferred to this one
    (r"; ", 0),
    (r": ", 40),
    (r", (?=(?:and|but|so|which|or|as|with|where|while|since|if|because)\b)", 50),
    (r", ", 120),
    (r" · ", 120),
)


def short_lines(text: str) -> str:
    """The page with shorter lines."""
    out: list[str] = []
    paragraph: list[str] = []
    first = rest = ""  # what stands before the first line of the paragraph, and before the others
    is_code = False
    for line in [*text.split("\n"), ""]:
        item = re.match(r"(\s*)([-*]|\d+\.) (.*)", line)
        is_fence = line.lstrip().startswith("```")
        ends = is_code or is_fence or item or not line.strip() or line.startswith(_AS_IT_IS)
        if ends and paragraph:
            lines = _sentences(" ".join(paragraph))
            out += [(rest if n else first) + each for n, each in enumerate(lines)]
            paragraph = []
        if item and not is_code:
            first, paragraph = f"{item[1]}{item[2]} ", [item[3]]
            rest = " " * len(first)
        elif ends:
            out.append(line)
            is_code ^= is_fence
        else:
            if not paragraph:
                first = rest = line[: len(line) - len(line.lstrip())]
                if len(first) >= 4 and out and not out[-1].strip().startswith(("-", "*")):  # code without a fence
                    out.append(line)
                    continue
            paragraph.append(line.strip())
    return "\n".join(out[:-1])


def _sentences(text: str) -> list[str]:
    hidden: list[str] = []

    def hide(found: re.Match[str]) -> str:
        hidden.append(found[0])
        return f"\0{len(hidden) - 1}\0"

    def show(part: str) -> str:
        return re.sub(r"\0(\d+)\0", lambda found: hidden[int(found[1])], part)

    text = re.sub(r"\]\([^)]*\)", hide, re.sub(r"`+[^`]*`+", hide, text))
    parts, start = [], 0
    for found in re.finditer(r"[.?!](?:\*\*|[\"”'])?\s+(?=[A-Z0-9\0\[*“\"])", text):
        before = text[start : found.end()]
        is_open = before.count("(") > before.count(")")
        if not is_open and not _ABBREVIATION.search(text[: found.start() + 1]) and len(show(before)) > 20:
            parts.append(before.rstrip())
            start = found.end()
    lines: list[str] = []
    for part in [*parts, text[start:].strip()]:
        for each in _clauses(part, show):
            if lines and _is_markup(each):
                lines[-1] += f" {each}"
            else:
                lines.append(each)
    return [show(line) for line in lines]


def _clauses(sentence: str, show: Callable[[str], str]) -> list[str]:
    if len(show(sentence)) <= MOST:
        return [sentence]
    cuts = []
    for pattern, handicap in _BREAKS:
        for found in re.finditer(pattern, sentence):
            before, after = sentence[: found.end()].rstrip(), sentence[found.end() :]
            sizes = len(show(before)), len(show(after))
            if before.count("(") == before.count(")") and min(sizes) > 24 and not _is_markup(after):
                cuts.append((abs(sizes[0] - sizes[1]) + handicap, before, after))
        if cuts and pattern == "; ":
            break
    if not cuts:
        return [sentence]
    _, before, after = min(cuts)
    return [*_clauses(before, show), *_clauses(after, show)]


def _is_markup(line: str) -> bool:
    """Whether markdown would take the line for an item, a heading or the like."""
    return re.match(r"(?:[-+*>#|]\s|\\?\||\d+[.)]\s|#)", line) is not None


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(short_lines(page.read_text()))
