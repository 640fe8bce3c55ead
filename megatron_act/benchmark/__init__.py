"""What ``tools/benchmark_kernels.py`` is made of; its figures become the README's tables (``readme.py``).

timing.py       microseconds of a launch: CUDA graph replays, events, or the clock of a CPU
baselines.py    the plain torch formula of an activation, eager and compiled
competitors.py  the same functions of other libraries, where they are installed
cases.py        activations, shapes, operations and the bytes they must move
table.py        the run: every case, one row for each operation
mlp.py          the two matmuls around an activation
fp8_ways.py fp8_rows.py    results in FP8: who makes them how, a row for each recipe and direction
fp8_mlp.py fp8_report.py   fc1, activation, fc2 under FP8, next to Transformer Engine's MLP; both parts' pages
header.py       the machine, the versions and the command
report.py       JSON, CSV, Markdown        picture.py   the roofline
"""
