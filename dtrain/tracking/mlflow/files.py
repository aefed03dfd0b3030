"""Files of a run as artifacts of its MLflow run, each once."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from dtrain.files import read_bytes, within
from dtrain.terminal import printable
from dtrain.tracking.mlflow.address import milliseconds
from dtrain.tracking.mlflow.keys import FORMER_IMAGE_KEY, image_key

LARGEST = 1 << 30  # bytes of a file that is compared with what is there
_FOREIGN = "is named in the journal and no file of the run: not sent"
SMALL = 512  # pixels of an image's longer side, below which it is enlarged


def files_of(line: dict[str, Any]) -> list[str]:
    """The paths, relative to the run directory, that a journal line names."""
    context = line["context"]
    return [*context.get("artifacts", []), *([context["artifact"]] if "artifact" in context else [])]


class Files:
    """What of a run directory is among the artifacts of MLflow run `run_id`. Every method talks to MLflow."""

    def __init__(self, client, run_id: str, directory: Path):
        self._client, self._run_id, self._directory = client, run_id, directory
        self._compared: set[str] = set()
        self._there: dict[str, dict[str, int | None]] = {}  # folder → path → bytes, of the folders asked for

    def send(self, line: dict[str, Any]) -> bool:
        """Whether one of the line's files was not there."""
        sent = False
        for file in files_of(line):
            if within(self._directory, file) is None:
                gone = os.path.normpath(f"/{file}") == f"/{file}" and not os.path.lexists(self._directory / file)
                problem = "is named in the journal but gone" if gone else _FOREIGN
                logging.getLogger(__name__).warning("%s %s", printable(file), problem)
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

    def send_changed(self, file: str) -> bool:
        """Upload a small file that may change, once a connection, unless the artifact has its bytes already."""
        if file in self._compared:
            return False
        path, folder = self._directory / file, os.path.dirname(file)
        same = self._in(folder).get(file) == path.stat().st_size
        if same:
            with tempfile.TemporaryDirectory() as place:
                there = Path(self._client.download_artifacts(self._run_id, file, place))
                same = there.read_bytes() == read_bytes(path, LARGEST, follow=False)
        if not same:
            self._client.log_artifact(self._run_id, str(path), folder or None)
        self._compared.add(file)
        return not same

    def _send_image(self, file: str, line: dict[str, Any]) -> bool:
        """As an image with a step, which the UI shows beside the curves."""
        former = any(path.startswith(f"images/{FORMER_IMAGE_KEY}+step+") for path in self._in("images"))
        return self._log_image(file, FORMER_IMAGE_KEY if former else image_key(line), line)

    def send_last_image(self, line: dict[str, Any]) -> bool:
        """The picture of a finished run's newest evaluation once more, under a key of its own.

        A card of several steps opens on step 0, where there is no picture; one of a single step shows it.
        """
        file = line["context"].get("artifact", "")
        if not file.endswith(".png") or within(self._directory, file) is None:
            return False
        return self._log_image(file, image_key(line, f"newest at step {line['step']}"), line)

    def _log_image(self, file: str, key: str, line: dict[str, Any]) -> bool:
        """Unless it is there: MLflow writes the small copy of an image last."""
        from PIL import Image

        name = f"images/{key.replace('/', '~')}+step+{line['step']}+"
        if any(path.startswith(name) and path.endswith(".webp") for path in self._in("images")):
            return False
        try:
            with Image.open(self._directory / file) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            # Cut off by a crash, or a bomb: nothing that waiting would mend.
            logging.getLogger(__name__).warning("%s cannot be read: %s", self._directory / file, e)
            return False
        # The UI shows an image at its own size at most: one of 8 × 8 digits would be a stamp.
        scale = max(1, SMALL // max(image.size))
        image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
        at = {"step": line["step"], "timestamp": milliseconds(line["time"])}
        self._client.log_image(self._run_id, image, key=key, synchronous=True, **at)
        self._there["images"][f"{name}.webp"] = None
        return True

    def _in(self, folder: str) -> dict[str, int | None]:
        if folder not in self._there:
            present = self._client.list_artifacts(self._run_id, folder or None)
            self._there[folder] = {f.path: f.file_size for f in present}
        return self._there[folder]
