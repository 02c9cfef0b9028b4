"""Metadata of the package; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXAMPLES = ["torchvision", "scikit-learn", "torchmetrics", "matplotlib", "tyro"]
PEERS = [  # what the benchmarks compare with
    "ivon-opt", "curvlinops-for-pytorch", "backpack-for-pytorch", "asdfghjkl",  # the last is asdl
    "laplace-torch", "mlxtend", "pytorch-optimizer", "schedulefree",
]
TEST = [  # which runs the examples too
    "pytest", "pytest-xdist", "hypothesis", "curvlinops-for-pytorch", *EXAMPLES,
]

setup(
    name="pyrocurv",
    version="0.1.0",
    description="Curvature of neural networks for Pyro: structured Gaussian posteriors, "
    "natural-gradient variational inference, Laplace and second-order optimizers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The pyrocurv authors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["pyrocurv*"]),
    package_data={"pyrocurv": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    install_requires=["torch>=2.6", "pyro-ppl>=1.9.1"],
    extras_require={
        "examples": EXAMPLES,
        "peers": PEERS,
        "test": TEST,
        "dev": ["ruff", "mypy", *TEST],
    },
)
