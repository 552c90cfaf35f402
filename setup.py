"""Installs the four folders as tenko.launch, tenko.nmt, tenko.compression and tenko.comm; recipes and slurm as data."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
FOLDERS = ("launch", "nmt", "compression", "comm", "recipes", "slurm")

setup(
    name="tenko",
    version="0.1.0",
    description="English-Czech translation Transformers: trained over thin wires, shipped thin on disk",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "nmt/embedded/ATTRIBUTIONS.md", "nmt/embedded/licenses/*"],
    python_requires=">=3.11,<3.13",
    packages=[f"tenko.{folder}" for folder in FOLDERS],
    package_dir={f"tenko.{folder}": folder for folder in FOLDERS},
    package_data={
        "tenko.nmt": ["py.typed", "embedded/*", "embedded/licenses/*", "models/*/*"],
        "tenko.recipes": ["*.yaml"],
        "tenko.slurm": ["*.sbatch"],
        "tenko.launch": ["py.typed"],
        "tenko.compression": ["py.typed"],
        "tenko.comm": ["py.typed"],
    },
    install_requires=[
        "torch>=2.9",
        "ve-fairseq==0.12.3",
        "accelerate>=1.10",
        "ctranslate2>=4.8",
        "sentencepiece>=0.2",
        "sacrebleu>=2.5",
        "safetensors>=0.5",
        "faiss-cpu>=1.12",
        "numba>=0.61",
        "numpy>=2",
        "pyyaml>=6",
        "typer>=0.16",
        "rich>=13",
        "matplotlib>=3.9",
        "zstandard>=0.23",
    ],
    extras_require={
        "trackers": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.28"],  # 95 MB: not with TensorBoard
        "gpu": ["triton>=3.5"],  # the quantizer's kernels; torch's CUDA builds bring it along
        "mpi": ["mpi4py>=4.1", "openmpi>=5.0"],  # parameter servers on ranks of their own
        "deepspeed": ["deepspeed>=0.19.8"],
        "dev": [
            "setuptools>=77",
            "psutil>=5",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "ruff>=0.12",
            "mypy>=1.16",
            "types-PyYAML",
            "pytorch-lightning>=2.6.4",  # not `lightning`: two of its releases were an attacker's
        ],
    },
    entry_points={"console_scripts": ["tenko = tenko.launch.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
