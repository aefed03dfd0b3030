"""deepspeed [options] eval/evaluate.py RUN [-n 50000 ...]"""

from dtrain.cli import main

main("evaluate")
