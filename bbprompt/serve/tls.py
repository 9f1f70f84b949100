"""Certificate and key of a server, read before the model is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from bbprompt.errors import UsageError

__all__ = ["tls_context"]


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What answers over TLS; None without both files.

    Args:
        certificate: PEM file with the certificate, and those that it rests on behind it.
        key: PEM file with its private key, not encrypted.

    Raises:
        UsageError: One of them is missing, cannot be read or is no such file, or they do not belong together.
    """
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if certificate is None or key is None:
        return None
    _read("--tls-cert", certificate)
    _read("--tls-key", key)
    try:  # alone, for what fails below does not say which file it was
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError as error:
        raise UsageError(f"--tls-cert {certificate}: no certificate in PEM form ({_reason(error)})") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, lambda: _refuse(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"--tls-key {key}: not the key of --tls-cert {certificate}") from error
        if error.reason in _WEAK:
            raise UsageError(f"--tls-cert {certificate}: too weak to be used ({_reason(error)})") from error
        raise UsageError(f"--tls-key {key}: no private key in PEM form ({_reason(error)})") from error
    return context


_WEAK = ("CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL", "EE_KEY_TOO_SMALL")


def _read(flag: str, file: Path) -> None:
    try:
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as error:
        raise UsageError(f"{flag} {file}: {error.strerror}") from error


def _refuse(key: Path) -> str:
    """Instead of a question at the terminal, where nobody may sit."""
    raise UsageError(f"--tls-key {key}: it is encrypted; write it without a passphrase (openssl pkey -in {key} -out …)")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").lower().replace("_", " ")
