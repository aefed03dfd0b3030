"""deepspeed [options] eval/evaluate.py RUN [-n 50000 ...]"""

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("evaluate")
