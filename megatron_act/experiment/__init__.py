"""Experiments: arms of equal compute from one YAML, run with torchrun or Slurm, gathered into intervals and a page.

``parse.load_experiment(path)`` -> ``runner.run_arms(experiment, output, layout)`` -> ``report.write_report(output)``;
``tools/compare.py`` is these three calls. ``plan`` decides which runs it takes, ``comparisons`` what may be said.
"""
