"""deepspeed [options] eval/sweep.py RUN --steps 5,10,20,50 --eta 0,0.5,1 [...]"""

from dtrain.cli import main

main("sweep")
