"""The command that chaos runs."""

from importlib.metadata import entry_points

(DTRAIN,) = entry_points(group="console_scripts", name="dtrain")
