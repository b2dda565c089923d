"""What nobody may read in a record: secrets of the environment, and those that stand in addresses."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|API_?KEY|ACCESS_?KEY|KEY|KEY_ID|SAS|PAT)$|^AWS_(?!.*REGION|.*PROFILE)",
    re.IGNORECASE,
)
SHORTEST = 8  # characters of a value that is looked for: shorter ones are words
ADDRESS = re.compile(r"(\w:/{1,2})[^/\s@'\"]+(?=@)")  # https://user:password@host; as a path it has one slash
PARAMETER = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:token|secret|password|signature|credential|api_?key|access_?key)|sig|key)=)[^&\s'\"#]+",
    re.IGNORECASE,
)
KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)


def secrets() -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted((value for value in found if not value.startswith("/")), key=len, reverse=True)  # a file with a key


def scrub(text: str) -> str:
    """The text with every secret hidden."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    if ":/" in text or "&" in text or "?" in text:
        text = PARAMETER.sub(rf"\1{HIDDEN}", ADDRESS.sub(rf"\1{HIDDEN}", text))
    return KNOWN.sub(HIDDEN, text)


def scrubbed(value: Any) -> Any:
    """Plain values with every secret in their texts hidden."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {scrubbed(key): scrubbed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item) for item in value]
    return value
