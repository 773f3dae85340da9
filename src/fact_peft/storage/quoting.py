"""Names that somebody else wrote, quoted for where they go: a terminal, Markdown, Python."""


def for_terminal(text: str) -> str:
    """`text` with what does not print, such as line breaks and escape sequences, written as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
