"""deepspeed [options] launch/train.py CONFIG [key.sub=value ...]"""

from dtrain.interrupt import die_quietly

die_quietly()

from dtrain.cli import main

main("train")
