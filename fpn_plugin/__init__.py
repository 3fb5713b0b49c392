"""Feature pyramids for Detectron2. Importing this package registers everything with Detectron2."""

import os

# Before torch is imported: its OpenMP workers otherwise spin while they wait, which starves a busy
# machine, and the profiler that memory is measured with writes a greeting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fpn_plugin needs Detectron2, which is not on PyPI under its own name. In a"
        " checkout of fpn_plugin, `make setup`"
        " installs a pinned build into .venv; for your own environment, follow"
        " Detectron2's installation guide, or run"
        " `pip install ./tools/detectron2_wheel` in the checkout (pure Python, no compiler needed)."
    ) from error

from fpn_plugin.config import add_fpn_config, resolve_config, validate_config  # noqa: E402
from fpn_plugin.data import register_all  # noqa: E402
from fpn_plugin.modeling import fcos  # noqa: E402, F401  (registers FCOS)
from fpn_plugin.modeling.backbone import PyramidBackbone, build_pyramid_backbone  # noqa: E402
from fpn_plugin.modeling.python_config import put_pyramid  # noqa: E402
from fpn_plugin.pyramid.pyramid import Pyramid  # noqa: E402
from fpn_plugin.version import __version__  # noqa: E402

__all__ = [
    "Pyramid",
    "PyramidBackbone",
    "__version__",
    "add_fpn_config",
    "build_pyramid_backbone",
    "put_pyramid",
    "resolve_config",
    "validate_config",
]

register_all()
