"""A PEP 517 build backend that repacks the pure-Python part of `sal-detectron2` as `detectron2`.

The published wheel is tagged for CPython 3.10 because it carries one compiled binary (`_C`), and it
asks for `numpy<2`. Everything else in it is Python that runs on any version, so this backend
downloads that wheel by its sha256, drops the binary, and writes the rest into a `py3-none-any`
wheel with the requirements of pyproject.toml.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

SOURCE = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
PROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())["project"]
DIST_INFO = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"


def _download(folder: str) -> Path:
    """Fetch the published wheel for CPython 3.10, whatever Python runs this, and check its hash."""
    requirement = Path(folder, "source.txt")
    requirement.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
    command += ["--no-cache-dir"]
    subprocess.run([*command, "--dest", folder, "--requirement", str(requirement)], check=True)
    return next(Path(folder).glob("*.whl"))


def _metadata(license_name: str) -> str:
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {PROJECT['name']}",
        f"Version: {PROJECT['version']}",
        f"Summary: {PROJECT['description']}",
        f"Requires-Python: {PROJECT['requires-python']}",
        f"License-File: {license_name}",
        *(f"Requires-Dist: {requirement}" for requirement in PROJECT["dependencies"]),
    ]
    return "\n".join(lines) + "\n"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """PEP 517 hook: write the repacked wheel into `wheel_directory` and return its file name."""
    name = f"{PROJECT['name']}-{PROJECT['version']}-py3-none-any.whl"
    record: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(_download(folder)) as source,
        zipfile.ZipFile(os.path.join(wheel_directory, name), "w", zipfile.ZIP_DEFLATED) as target,
    ):

        def write(path: str, data: bytes) -> None:
            target.writestr(
                zipfile.ZipInfo(path, (2024, 11, 29, 0, 0, 0)), data, zipfile.ZIP_DEFLATED
            )
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}")

        for path in source.namelist():
            if ".dist-info/" not in path and not path.endswith((".so", "/")):
                write(path, source.read(path))
            elif path.endswith("/LICENSE"):
                write(f"{DIST_INFO}/LICENSE", source.read(path))
        write(f"{DIST_INFO}/METADATA", _metadata("LICENSE").encode())
        wheel = (
            "Wheel-Version: 1.0\nGenerator: fpn-plugin\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        write(f"{DIST_INFO}/WHEEL", wheel.encode())
        record.append(f"{DIST_INFO}/RECORD,,")
        target.writestr(f"{DIST_INFO}/RECORD", "\n".join(record) + "\n")
    return name


def build_sdist(sdist_directory, config_settings=None) -> str:
    """PEP 517 hook: there is no source distribution, the folder itself is what pip installs."""
    raise RuntimeError("detectron2_wheel is installed from its folder; it has no sdist")
