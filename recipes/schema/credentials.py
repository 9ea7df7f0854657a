"""Removes passwords, tokens and signatures from URLs in everything that is stored or shown.

    without_credentials("GET https://me:pw@host/a.jsonl?id=3&token=abc failed")
    -> "GET https://host/a.jsonl?id=3&token=*** failed"

The result does not depend on the signature, so data prepared with an older signature is recognised.
"""

import re
from typing import Any

_URL = re.compile(r"\w[\w+.-]*://[^\s'\"<>|]+")
_USER = re.compile(r"^(\w[\w+.-]*://)[^/?#]*@")
_SECRET_NAME = re.compile(
    r"token|key|sig|secret|pass|pwd|auth|cred|jwt|session|sas|^x-(amz|goog|ms)-|^(expires|se|st|sv|sp|sr|spr|code)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|CREDENTIALS?|APIKEY|(?:API|ACCESS|PRIVATE|AUTH|SECRET)_?KEY)(?:$|_)",
    re.IGNORECASE,
)
_OPAQUE_VALUE = re.compile(r"[\w+/=.%~-]{24,}")
"""A value too long and random to be typed. It may be a key under any name."""
_MASK = "***"


def without_credentials(text: str) -> str:
    """A text without the credentials of its URLs. A text without URLs is not changed."""
    return _URL.sub(lambda found: _clean(found[0]), text) if "://" in text else text


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable is a secret, by its name or by a URL in its value."""
    return bool(_SECRET_VARIABLE.search(name)) or without_credentials(value) != value


def mapping_without_credentials(value: Any) -> Any:
    """Plain values without the credentials of URLs in their texts."""
    if isinstance(value, dict):
        return {key: mapping_without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapping_without_credentials(inner) for inner in value]
    return without_credentials(value) if isinstance(value, str) else value


def with_credentials(name: str, given: str) -> str:
    """The name to open a file by: `name` with the credentials of `given`, the URL that the user wrote.

    Names of other hosts are not changed, so that credentials are sent only to the host they are for.
    """
    if "://" not in given or without_credentials(given) == given:
        return name
    if name == without_credentials(given):
        return given
    user = _USER.match(given)
    place, _, query = given.partition("?")
    if _host(name) != _host(_USER.sub(r"\1", place)):
        return name
    if user:
        name = user[0] + name[len(user[1]) :]
    name, _, shown = name.partition("?")
    return f"{name}?{query}" if query and shown in ("", without_credentials(given).partition("?")[2]) else name


def _host(url: str) -> tuple[str, str]:
    """(protocol; host, bucket or first folder)."""
    scheme, _, rest = url.partition("://")
    return scheme, rest.lstrip("/").split("/")[0].split("?")[0]


def _clean(url: str) -> str:
    url = _USER.sub(r"\1", url)
    place, mark, query = url.partition("?")
    if not mark:
        return url
    query, hash_mark, fragment = query.partition("#")
    fields = [field.partition("=") for field in query.split("&")]
    cleaned = "&".join(
        f"{name}={_MASK}" if is_value and (_SECRET_NAME.search(name) or _OPAQUE_VALUE.fullmatch(value)) else
        _MASK if not is_value and _OPAQUE_VALUE.fullmatch(name) else f"{name}{is_value}{value}"
        for name, is_value, value in fields
    )  # fmt: skip
    return f"{place}?{cleaned}{hash_mark}{fragment}"
