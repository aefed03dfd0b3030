"""deepspeed [options] launch/train.py CONFIG [key.sub=value ...]"""

from dtrain.interrupt import die_quietly

die_quietly()

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("train")
