"""Where what must be the same on every device is tried."""

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
