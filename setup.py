"""Packaging of fmkernels. pyproject.toml holds tool settings, constraints.txt versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DOCS = ["furo>=2025.12", "myst-parser>=5", "sphinx>=9"]

setup(
    name="fmkernels",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "fmkernels/__init__.py").read_text())[1],
    description="Fused losses and augmentations for semi-supervised 3D detection in PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["fmkernels", "fmkernels.*"]),
    package_data={"fmkernels": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numba>=0.61", "numpy>=1.26"],
    extras_require={
        "train": [
            "SimpleITK>=2.3",
            "matplotlib>=3.8",
            "scipy>=1.12",
            "tensorboard>=2.16",
            "tqdm>=4.66",
        ],
        "monai": ["monai>=1.6", "torchvision>=0.26"],
        "compare": ["kornia>=0.8", "monai>=1.6", "timm>=1.0", "torchvision>=0.26"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            "hypothesis>=6.100",
            "monai>=1.6",
            "mypy>=2.4",
            "pytest>=8.2",
            "pytest-benchmark>=5.1",
            "pytest-cov>=5",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            'triton>=3.6; platform_system == "Linux"',
        ],
    },
    entry_points={"console_scripts": ["fmkernels=fmkernels.focalmix.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
