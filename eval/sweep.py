"""deepspeed [options] eval/sweep.py RUN --steps 5,10,20,50 --eta 0,0.5,1 [...]"""

from dtrain.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this file, too
    main("sweep")
