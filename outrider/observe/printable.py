"""Text of models and servers made safe for a terminal."""

# C0 and C1 control characters but tab and newline; the C0 ones have pictures of their own in Unicode.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: "␡"} | dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")


def printable(text: str) -> str:
    """``text`` with control characters made visible: a sampled escape sequence must not steer the terminal."""
    return text.translate(_PICTURES)
