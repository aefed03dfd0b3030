"""deepspeed [options] launch/encode.py SHARDS DEST --first-stage SOURCE --size 256"""

from dtrain.interrupt import die_quietly

die_quietly()

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("encode")
