"""Packaging: five flat modules and the console script `sftrl`."""

from setuptools import setup

setup(
    name="sftrl",
    version="0.1.0",
    description="SFT Memorizes, RL Generalizes: a minimal, from-scratch PyTorch implementation",
    license="MIT",
    python_requires=">=3.11",
    py_modules=["sftrl", "envs", "ppo", "sft", "evaluate"],
    install_requires=["torch>=2.11", "transformers>=5.17", "safetensors", "pillow>=10.1", "numpy", "tqdm"],
    extras_require={"plot": ["matplotlib"], "test": ["pytest"]},
    entry_points={"console_scripts": ["sftrl=sftrl:main"]},
)
