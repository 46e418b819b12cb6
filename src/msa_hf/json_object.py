"""The type of JSON objects whose fields nobody has checked yet."""

from typing import Any

JsonObject = dict[str, Any]
