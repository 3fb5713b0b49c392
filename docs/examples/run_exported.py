#!/usr/bin/env python3
"""Run a file that tools/export.py made. Needs numpy and either torch or onnxruntime, and Pillow for
photos; neither Detectron2 nor this plugin.

python run_exported.py model.onnx photo.jpg
python run_exported.py model.pt2 --save maps.npz         # a random image

model.onnx.json, beside the file, says what the pixels must be and what comes out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Callable

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def load_torch(path: Path, info: dict) -> Callable[[np.ndarray], list[np.ndarray]]:
    import torch

    if info["torchvision"]:
        import torchvision  # noqa: F401  (its operators: NMS, ROIAlign, deformable convolution)
    script = path.suffix == ".ts"
    model = torch.jit.load(str(path)) if script else torch.export.load(path).module()

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            given = model(torch.from_numpy(image))
        return [y.numpy() for y in (given.values() if isinstance(given, dict) else given)]

    return run


def load_onnx(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def read_photo(path: Path, info: dict) -> Image.Image:
    """A photo as training read it: upright, with 0 to 255 for more than 8 bits, in its channels."""
    from PIL import Image, ImageOps

    picture, rule = Image.open(path), info.get("deep_images", "percentile")
    is_gray = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
    if not is_gray and rule == "percentile" and ";16" in str(picture.tile):
        raise SystemExit(f"{path}: Pillow reads 8 of its 16 bits per colour: convert it to 8 bits")
    picture = ImageOps.exif_transpose(picture)
    if is_gray:
        values = np.asarray(picture).astype(np.float64)
        valid = np.isfinite(values)
        low, high = (0, 1) if picture.mode == "F" else (0, 65535)
        if picture.mode == "I" and path.suffix.lower() in (".tif", ".tiff"):
            low, high = -(2**31), 2**31 - 1
        if rule == "percentile":
            low, high = np.percentile(values[valid], (0.1, 99.9))
            if low == high:
                low, high = values[valid].min(), values[valid].max()
        scaled = np.clip((np.where(valid, values, low) - low) / (high - low or 1), 0, 1)
        picture = Image.fromarray(np.rint(scaled * 255).astype(np.uint8))
    return picture.convert("RGB" if info["format"] == "BGR" else info["format"])


def read_pixels(path: Path | None, info: dict) -> np.ndarray:
    """A photo, or a random image: (C, H, W), from 0 to 255, channels as the model wants them."""
    fixed = info["fixed_size"]
    if path is None:
        size = fixed or (max(320, info["smallest_side"]), max(416, info["smallest_side"]))
        pixels = np.random.default_rng(0).uniform(0, 255, (*size, len(info["mean"])))
    else:
        picture = read_photo(path, info)
        if fixed:
            picture = picture.resize((fixed[1], fixed[0]))
        pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
        pixels = pixels[:, :, :: -1 if info["format"] == "BGR" else 1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def prepare(pixels: np.ndarray, info: dict) -> np.ndarray:
    """What the model takes. A detector does all of this by itself."""
    if not info["normalised"]:
        return pixels
    mean, std = (np.array(info[key], np.float32)[:, None, None] for key in ("mean", "std"))
    image = (pixels - mean) / std
    unit = np.lcm(max(info["size_divisibility"], 1), info["step"])
    height, width = image.shape[1:]
    if not info["fixed_size"]:  # zeros below and to the right, as Detectron2 pads
        least = info["smallest_side"]
        padding = [(0, -max(side, least) % unit + max(least - side, 0)) for side in (height, width)]
        image = np.pad(image, [(0, 0), *padding])
    return np.repeat(image[None], max(info["batch"], 1), axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the exported file: .ts, .pt2 or .onnx")
    parser.add_argument("image", type=Path, nargs="?", help="default: a random one")
    parser.add_argument("--save", type=Path, metavar="NPZ", help="input and outputs, as numpy has")
    args = parser.parse_args()
    info = json.loads(args.model.with_name(args.model.name + ".json").read_text())
    run = load_onnx(args.model) if args.model.suffix == ".onnx" else load_torch(args.model, info)
    image = prepare(read_pixels(args.image, info), info)
    outputs = dict(zip(info["outputs"], run(image)))
    for name, y in outputs.items():
        print(f"{name}: {y.shape}" + (f", from {y.min():.4g} to {y.max():.4g}" if y.size else ""))
    if args.save:
        np.savez(args.save, image=image, **outputs)


if __name__ == "__main__":
    main()
