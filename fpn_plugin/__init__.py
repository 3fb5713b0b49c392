"""Feature pyramids for Detectron2. Importing this package registers everything with Detectron2."""

import builtins
import importlib.util
import os
import warnings

# Before torch is imported: its OpenMP workers otherwise spin while they wait, which starves a busy
# machine, and the profiler that memory is measured with writes a greeting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# What Detectron2 uses, and torch and setuptools announce to remove, is said at each import: here,
# and in the processes that this one starts, which import Detectron2 first.
_ANNOUNCED = (
    "ignore::FutureWarning:torch.jit._script",
    "ignore::UserWarning:detectron2.model_zoo.model_zoo",
    "ignore::FutureWarning:detectron2.engine.defaults",
    "ignore:torch.meshgrid:UserWarning:torch.functional",
)
for _filter in _ANNOUNCED:
    _action, _message, _category, _module = _filter.split(":")
    warnings.filterwarnings("ignore", _message, getattr(builtins, _category), _module)
os.environ["PYTHONWARNINGS"] = ",".join(
    filter(None, dict.fromkeys([*os.environ.get("PYTHONWARNINGS", "").split(","), *_ANNOUNCED]))
)

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

if importlib.util.find_spec("cv2") is None:
    raise ImportError(
        "fpn_plugin needs OpenCV: pip install 'opencv-python>=4.8', or opencv-python-headless where"
        " there is no display"
    )

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
