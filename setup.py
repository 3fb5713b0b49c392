#!/usr/bin/env python3
"""Package metadata: version ranges and extras. Exact versions with hashes are in
requirements.txt."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
# Folders of the checkout that the package has inside of itself when it is installed
SHIPPED = {"fpn_plugin.configs": "configs", "fpn_plugin.datasets": "datasets"}

EXTRAS = {
    # before, a ResNet with grad_checkpointing lacks gradients above frozen stages
    "timm": ["timm>=1.0.31,<2"],
    # Evaluators; the panoptic one needs panopticapi, which is not on PyPI, as its error says
    "lvis": ["lvis>=0.5.3"],
    "cityscapes": ["cityscapesscripts>=2.2"],
    "fast_eval": ["faster-coco-eval>=1.8,<2"],  # TEST.FAST_COCO_EVAL
    "slurm": ["submitit>=1.5.4,<2"],  # fpn study --launcher slurm
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],  # fpn export to ONNX
}
# fpn export to OpenVINO, which reads ONNX; nncf quantises
EXTRAS["deploy"] = [*EXTRAS["export"], "openvino>=2026.0", "nncf>=3.0"]
# Either of them, and none in the place of the other: `import fpn_plugin` says so where both lack
EXTRAS["opencv"] = ["opencv-python>=4.8"]
EXTRAS["headless"] = ["opencv-python-headless>=4.8"]
EXTRAS["docs"] = [  # make docs
    f"{package}; python_version >= '3.11'" for package in ("sphinx>=8.2", "myst-parser>=5", "furo")
]
# The packages that pyramids are compared with (tests/parity). mmdet refuses a newer mmcv, and runs
# without its compiled operators.
EXTRAS["parity"] = [
    "effdet>=0.4.1",
    "transformers>=5",
    "mmcv-lite==2.1.0",
    "mmdet==3.3.0",
    "mmyolo==0.6.0",
    "mmsegmentation==1.2.2",
    "feneck==0.0.1",
    "libreyolo==1.2.0",  # the only one that has DAMO-YOLO
]
EXTRAS["dev"] = [
    *EXTRAS["parity"],
    *EXTRAS["timm"],
    *EXTRAS["fast_eval"],
    *EXTRAS["deploy"],
    *EXTRAS["slurm"],
    *EXTRAS["docs"],
    *EXTRAS["opencv"],
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "black>=25,<27",
    "isort>=6",
    "flake8>=7",
    "mypy>=1.15",
    "types-PyYAML",
]


class WholeCheckout(sdist):
    """A source distribution with all that a checkout has: tests, pages and tools too."""

    def make_distribution(self) -> None:
        for folder in (".ci", "docs", "tests", "tools"):
            self.filelist.graft(folder)
        for pattern in ("*.md", "*.txt", "*.cff", "LICENSE", "Makefile", ".flake8", ".gitignore"):
            self.filelist.include(pattern)
        self.filelist.include("datasets/*.md")
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()


setup(
    name="fpn_plugin",
    version=runpy.run_path(str(HERE / "fpn_plugin" / "version.py"))["__version__"],
    description="Feature pyramids for Detectron2: topology, fusion and backbone by config",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fpn_plugin", "fpn_plugin.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "fpn_plugin": ["py.typed", "report/*.html"],
        "fpn_plugin.configs": ["**/*.yaml", "**/*.py"],
    },
    entry_points={"console_scripts": ["fpn = fpn_plugin.cli.main:main"]},
    cmdclass={"sdist": WholeCheckout},
    # Detectron2 is not listed: it is not on PyPI under its own name, and the build that is
    # already installed must be kept. Nor is OpenCV, which comes in four packages that overwrite
    # each other's files. Without them, `import fpn_plugin` says what to install.
    # The lower bounds are what `make test-oldest` installs and tests.
    install_requires=[
        "torch>=2.4",  # fpn_plugin/compat.py says what the oldest lack
        "torchvision>=0.19",
        "fvcore>=0.1.5.post20221221",  # MultiStepParamScheduler without num_updates
        "omegaconf>=2.1",  # study files
        "Jinja2>=3",  # reports' pages
        "pycocotools>=2.0.7",
        "numpy>=1.24",
        "Pillow>=10.1",  # TIFFs are turned once
        "PyYAML>=6",
        "setuptools>=65,<81",  # detectron2.model_zoo imports pkg_resources, which later ones lack
        "matplotlib>=3.7",
        "tabulate>=0.9",
        "tqdm>=4.60",
    ],
    extras_require=EXTRAS,
)
