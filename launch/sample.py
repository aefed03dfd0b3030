"""deepspeed [options] launch/sample.py RUN -n 64 --out grid.png"""

from dtrain.cli import main

main("sample")
