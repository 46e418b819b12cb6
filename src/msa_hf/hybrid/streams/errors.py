"""The errors of event streams."""

from __future__ import annotations


class StreamError(Exception):
    """A stream could not be read. The message names cause and remedy."""


class StreamUnavailable(StreamError, ConnectionError):
    """A server that did not answer in time. What was not acknowledged will be delivered again."""


class BadEvent(StreamError, ValueError):
    """A message that is no event, or one that no bank can take; the message is the reason."""
