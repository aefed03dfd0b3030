"""deepspeed [options] eval/compare.py RUN RUN [...] [--steps 1,2,4,8] [...]"""

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("compare")
