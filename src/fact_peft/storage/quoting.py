"""Names that somebody else wrote, quoted for where they go: a terminal, Markdown, Python."""

import re


def for_terminal(text: str) -> str:
    """`text` with what does not print, such as line breaks and escape sequences, written as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def for_markdown(text: str) -> str:
    """`text` as words of a paragraph, heading or table cell, which mean nothing to Markdown or HTML."""
    text = re.sub(r"[\\`*_{}\[\]()#+!|~$^=:@\"']", r"\\\g<0>", for_terminal(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_code(text: str) -> str:
    """`text` as a code span of Markdown, in which nothing else has a meaning."""
    text = for_terminal(text)
    if not text.strip():
        text = f'"{text}"'  # an empty span is none
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text[0] == "`" or text[-1] == "`" or text[0] == text[-1] == " " else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def for_python(text: str) -> str:
    """`text` as a string literal of Python, on one line."""
    return '"' + "".join(f"\\{c}" if c in '"\\' else for_terminal(c) for c in text) + '"'
