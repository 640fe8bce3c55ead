"""Experiments: arms of equal compute from one YAML, run with torchrun, gathered into figures and one page.

``load_experiment(path)`` -> ``run_arms(experiment, output, layout)`` -> ``write_report(output)``;
``tools/compare.py`` is these three calls.
"""
