"""Files of a run as artifacts of its MLflow run, each once."""

import logging
import os
from pathlib import Path
from typing import Any

from dtrain.tracking.mlflow.address import milliseconds

IMAGE_KEY = "samples"  # under which the pictures of all evaluations make one series


def files_of(line: dict[str, Any]) -> list[str]:
    """The paths, relative to the run directory, that a journal line names."""
    context = line["context"]
    return [*context.get("artifacts", []), *([context["artifact"]] if "artifact" in context else [])]


class Files:
    """What of a run directory is among the artifacts of MLflow run `run_id`. Every method talks to MLflow."""

    def __init__(self, client, run_id: str, directory: Path):
        self._client, self._run_id, self._directory = client, run_id, directory
        self._there: dict[str, dict[str, int | None]] = {}  # folder → path → bytes, of the folders asked for

    def send(self, line: dict[str, Any]) -> bool:
        """Whether one of the line's files was not there."""
        sent = False
        for file in files_of(line):
            if not (self._directory / file).is_file():
                logging.getLogger(__name__).warning("%s is named in the journal but gone", self._directory / file)
            elif line["event"] == "eval" and file.endswith(".png"):
                sent |= self._send_image(file, line)
            else:
                sent |= self.send_file(file)
        return sent

    def send_file(self, file: str) -> bool:
        """Upload a file that is there, unless the artifact has its size already: an upload that was cut off has not."""
        folder, size = os.path.dirname(file), (self._directory / file).stat().st_size
        if self._in(folder).get(file) == size:
            return False
        self._client.log_artifact(self._run_id, str(self._directory / file), folder or None)
        self._there[folder][file] = size
        return True

    def _send_image(self, file: str, line: dict[str, Any]) -> bool:
        """As an image with a step, which the UI shows beside the curves. Its small copy is what MLflow writes last."""
        from PIL import Image

        name = f"images/{IMAGE_KEY}+step+{line['step']}+"
        if any(path.startswith(name) and path.endswith(".webp") for path in self._in("images")):
            return False
        try:
            with Image.open(self._directory / file) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as e:  # cut off by a crash: nothing that waiting would mend
            logging.getLogger(__name__).warning("%s cannot be read: %s", self._directory / file, e)
            return False
        at = {"step": line["step"], "timestamp": milliseconds(line["time"])}
        self._client.log_image(self._run_id, image, key=IMAGE_KEY, synchronous=True, **at)
        self._there["images"][f"{name}.webp"] = None
        return True

    def _in(self, folder: str) -> dict[str, int | None]:
        if folder not in self._there:
            present = self._client.list_artifacts(self._run_id, folder or None)
            self._there[folder] = {f.path: f.file_size for f in present}
        return self._there[folder]
