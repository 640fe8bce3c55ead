"""FineWeb-Edu to Megatron's token files, and the sample that ships with the project.

Importing this package loads nothing but `pathlib`; the parts are imported by name:
`megatron_act.data.preprocess.preprocess` and `megatron_act.data.bpe.train_bpe`.
"""

from pathlib import Path


def sample_path() -> Path:
    """The packaged sample: 6,400 English Wikipedia lead paragraphs in FineWeb-Edu's schema (3.3 MB of text).

    CC BY-SA 4.0; the authors and changes are in `wiki_leads.ATTRIBUTION.md` beside it.
    """
    return Path(__file__).with_name("wiki_leads.parquet")
