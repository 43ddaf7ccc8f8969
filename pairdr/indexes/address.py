"""URLs of databases, as people write them. A password in one is never shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from pairdr.errors import UsageError

NAME = "pairdr"
"""What is loaded is named so where a URL says nothing."""
FORMS = "postgresql://USER@HOST/DATABASE?name=NAME, milvus://HOST:19530/NAME or milvus-lite:///PATH/FILE.db?name=NAME"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_NAMES = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SECRETS = ("password", "sslpassword", "passfile")


@dataclass(frozen=True)
class Address:
    """Where vectors are loaded.

    Attributes:
        scheme: postgresql, milvus or milvus-lite.
        target: what the engine's client takes: a URL of libpq, of gRPC, or a file. It may hold a password.
        token: "user:password" for Milvus, a token alone, or "".
        name: of what is loaded.
        shown: the URL without its password.
        secrets: passwords in it, as they are written and as they are meant.
    """

    scheme: str
    target: str
    token: str
    name: str
    shown: str
    secrets: tuple[str, ...] = ()

    def hide(self, text: str) -> str:
        """Return a text without the passwords of this URL."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def __repr__(self) -> str:
        return f"Address({self.shown})"


def is_url(place: str | Path) -> bool:
    """Return whether this is the URL of something, and no path."""
    return isinstance(place, str) and _URL.match(place) is not None


def read_address(url: str) -> Address:
    """Read a URL.

    Raises:
        UsageError: one of another form.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "milvus":
            _ = parts.port
    except ValueError as error:
        raise UsageError("This URL cannot be read.", remedy=f"Write {FORMS}.") from error
    if "@" in parts.path + parts.query + parts.fragment:  # what stands before it may be half a password
        raise UsageError(
            "This URL cannot be read: there is an @ after its host.",
            remedy="Write / ? # @ : within a password as %2F %3F %23 %40 %3A.",
        )
    readers = {
        "postgresql": _read_postgres,
        "postgres": _read_postgres,
        "milvus": _read_milvus,
        "milvus-lite": _read_lite,
    }
    if parts.scheme not in readers:
        raise UsageError(f"{parts.scheme}:// is no database that is known here.", remedy=f"Write {FORMS}.")
    found = readers[parts.scheme](parts)
    if not _NAMES.fullmatch(found.name) or "__" in found.name:
        raise UsageError(
            f"{found.name!r} is no name for what is loaded.",
            path=found.shown,
            remedy="Use 1 to 32 of a-z, 0-9 and single _, a letter first.",
        )
    return found


def _read_postgres(parts: SplitResult) -> Address:
    options = _read_options(parts)
    name = options.pop("name", NAME)
    kept = {key: value for key, value in options.items() if key not in _SECRETS} | {"name": name}
    # Put together by hand: urllib drops the // of a URL without a host, and writes a space as +, which libpq keeps.
    target = f"postgresql://{parts.netloc}{parts.path}?{urlencode(options, quote_via=quote)}"
    shown = f"postgresql://{_hide(parts)}{parts.path}?{urlencode(kept, quote_via=quote, safe='/')}"
    secrets = [options[key] for key in _SECRETS if key in options]
    return Address("postgresql", target, "", name, shown, _list_secrets(parts, *secrets))


def _read_milvus(parts: SplitResult) -> Address:
    options = _read_options(parts)
    secure = options.pop("secure", "false")
    name = parts.path.strip("/") or NAME
    shown = f"milvus://{_hide(parts)}/{name}"
    if not parts.hostname or options or secure not in ("true", "false"):
        raise UsageError("This URL cannot be read.", path=shown, remedy="Write milvus://HOST:19530/NAME?secure=true.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    target = f"{'https' if secure == 'true' else 'http'}://{host}:{parts.port or 19530}"
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    token = f"{user}:{password}" if user else password
    return Address("milvus", target, token, name, shown, _list_secrets(parts))


def _read_lite(parts: SplitResult) -> Address:
    options = _read_options(parts)
    name, path = options.pop("name", NAME), unquote(parts.path)
    if parts.netloc or options or not path.endswith(".db"):
        raise UsageError(
            "This URL cannot be read.",
            path=f"milvus-lite://{quote(path)}",
            remedy="Write milvus-lite:///PATH/FILE.db?name=NAME, with three slashes and .db.",
        )
    return Address("milvus-lite", path, "", name, f"milvus-lite://{quote(path)}?name={name}")


def _read_options(parts: SplitResult) -> dict[str, str]:
    """Return the parameters of a URL. A + is a plus, as libpq has it, and no space."""
    return dict(parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True))


def _hide(parts: SplitResult) -> str:
    """Return user, host and port."""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.username}@{host}" if parts.username else host


def _list_secrets(parts: SplitResult, *others: str) -> tuple[str, ...]:
    found = [parts.password or "", unquote(parts.password or ""), *others, *map(quote, others)]
    return tuple(dict.fromkeys(secret for secret in found if secret))
