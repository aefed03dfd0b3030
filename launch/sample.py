"""deepspeed [options] launch/sample.py RUN -n 64 --out grid.png"""

from dtrain.interrupt import die_quietly

die_quietly()

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("sample")
