"""Text that is Unicode: what Python calls a string may hold half of a character, which nothing can encode."""


def check_unicode(text: str, what: str) -> None:
    """Refuse a text with lone surrogates, as broken JSON and undecoded bytes leave them.

    Args:
        what: what the message begins with, such as `"Document 3: its text"`.

    Raises:
        ValueError: naming the first of them and its place.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        cause = "a byte that was not decoded" if 0xDC80 <= code <= 0xDCFF else "half of a character"
        raise ValueError(
            f"{what} is not Unicode: U+{code:04X} at {error.start} is {cause}; lone surrogates cannot be encoded."
        ) from error
