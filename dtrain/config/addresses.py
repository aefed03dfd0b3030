"""Whether MLflow could be at an address, by how it is written; nothing is asked of it."""

import os
import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from dtrain.credentials import without_credentials

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
TAKE = "take http://HOST:PORT for a server, or sqlite:////FOLDER/mlflow.db"


def problem_of(uri: str) -> str | None:
    """What is wrong with `tracking.uri`, and what to write, free of credentials; None where it may work."""
    shown = without_credentials(uri)
    scheme = urlsplit(uri).scheme.lower()
    if uri == "databricks" or scheme == "databricks":
        return None
    if scheme in ("http", "https"):
        return None if _has_host(uri) else f"{shown!r} names no host; {TAKE}"
    if scheme.split("+")[0] in DATABASES:
        return _problem_of_database(uri, shown, scheme)
    if host := re.match(r"(//)?([\w.\-]+:\d+)(/|$)", uri):
        return f"{shown!r} has no scheme; is it http://{host[2]}?"
    if scheme in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return None
        return f"{shown!r} is a folder to MLflow, which keeps no runs in folders any more; {TAKE}"
    if any(plugin.name == scheme for plugin in entry_points(group="mlflow.tracking_store")):
        return None
    return f"{shown!r} has the scheme {scheme!r}, which neither MLflow nor a plugin of it installed here knows; {TAKE}"


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        return False


def _problem_of_database(uri: str, shown: str, scheme: str) -> str | None:
    if scheme == "sqlite":
        place = uri.removeprefix("sqlite:///")
        if place == uri or place in ("", ":memory:"):
            return f"{shown!r} names no file; write sqlite:////FOLDER/mlflow.db, with four slashes before the folder"
        return None
    return None if "://" in uri else f"{shown!r} is not written as {scheme}://HOST/NAME"
