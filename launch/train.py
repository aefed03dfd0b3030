"""deepspeed [options] launch/train.py CONFIG [key.sub=value ...]"""

from dtrain.cli import main

main("train")
