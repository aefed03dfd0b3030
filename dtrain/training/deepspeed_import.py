"""Import DeepSpeed quickly and quietly; everything that needs it imports it from here.

    from dtrain.training.deepspeed_import import deepspeed

Three costs are avoided: importing mlflow (2 s, for a monitor not used here), probing which native ops could be built,
and its shared-memory CPU collective, which leaves 69 MB a rank in /dev/shm for ever.
"""

import logging
import os
import sys
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "WARNING")

_absent = object()
_mlflow = sys.modules.get("mlflow", _absent)
if _mlflow is _absent:
    sys.modules["mlflow"] = None  # makes `import mlflow` raise ImportError, which DeepSpeed handles
try:
    import deepspeed
finally:
    if _mlflow is _absent:
        del sys.modules["mlflow"]

warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
deepspeed.ops.__compatible_ops__ = {}
_logger = logging.getLogger("DeepSpeed")
_logger.setLevel(logging.WARNING)
_logger.addFilter(lambda record: "Skipping step" not in record.getMessage())  # we say it, with the reason and once

__all__ = ["deepspeed"]
