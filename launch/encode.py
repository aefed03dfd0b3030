"""deepspeed [options] launch/encode.py SHARDS DEST --first-stage SOURCE --size 256"""

from dtrain.interrupt import die_quietly

die_quietly()

from dtrain.cli import main

main("encode")
