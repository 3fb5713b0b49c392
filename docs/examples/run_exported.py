#!/usr/bin/env python3
"""Run a file that `fpn export` made. Needs numpy and one of torch, onnxruntime and openvino, and
Pillow (10.1 or newer) for photos; neither Detectron2 nor this plugin.

python run_exported.py model.onnx photo.jpg                  # a detector: names, scores, a picture
python run_exported.py model.onnx photo.jpg --score 0.3 --output seen.png --overwrite
python run_exported.py model.xml photo.jpg                   # OpenVINO's, with model.bin beside it
python run_exported.py model.pt2 --save maps.npz             # on a random image

model.onnx.json, beside the file, says what the pixels must be and what comes out. Of a detector the
results are those of Detectron2's DefaultPredictor: the photo is resized as in training's tests, and
boxes and masks are those of the photo as it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np

Outputs = dict[str, np.ndarray]


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


def load_openvino(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import openvino

    core = openvino.Core()
    model, where = core.read_model(path), ["fpn_plugin", "inference_precision"]
    # what is not in 8-bit integers: f32, or bf16 on a CPU that has it
    precision = model.get_rt_info(where).astype(str) if model.has_rt_info(where) else "f32"
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        print("this CPU has no bfloat16: computed in float32", file=sys.stderr)
        precision = "f32"
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})

    def run(image: np.ndarray) -> list[np.ndarray]:
        results = compiled([image], share_outputs=True)  # no copies: valid until the next call
        return [results[output] for output in compiled.outputs]

    return run


def load(path: Path, info: dict) -> Callable[[np.ndarray], list[np.ndarray]]:
    if path.suffix == ".xml":
        return load_openvino(path)
    return load_onnx(path) if path.suffix == ".onnx" else load_torch(path, info)


def read_photo(path: Path, info: dict) -> Any:
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
    if info["format"] not in ("BGR", "RGB", "L"):
        raise SystemExit(f"the model's pixels are {info['format']!r}; only BGR, RGB and L are read")
    return picture.convert("L" if info["format"] == "L" else "RGB")


def network_size(width: int, height: int, info: dict) -> tuple[int, int]:
    """What Detectron2's ResizeShortestEdge makes of a photo's width and height; then smaller if
    the file takes one size only and that is smaller."""
    new_width, new_height, least = float(width), float(height), info.get("min_size_test")
    if least is None:
        print("The JSON has no min_size_test (an older export): not resized", file=sys.stderr)
    if least:
        scale = least * 1.0 / min(width, height)
        new_width, new_height = scale * width, scale * height
        if height < width:
            new_height = least * 1.0
        else:
            new_width = least * 1.0
        if max(new_width, new_height) > info["max_size_test"]:
            scale = info["max_size_test"] * 1.0 / max(new_width, new_height)
            new_width, new_height = new_width * scale, new_height * scale
    size = int(new_width + 0.5), int(new_height + 0.5)
    if info["fixed_size"]:
        room = min(info["fixed_size"][1] / size[0], info["fixed_size"][0] / size[1])
        if room < 1:
            smaller = max(int(size[0] * room), 1), max(int(size[1] * room), 1)
            text = (
                "the file takes {0[1]}x{0[0]} only: resized to {1[0]}x{1[1]}, not to {2[0]}x{2[1]}"
            )
            print(text.format(info["fixed_size"], smaller, size), file=sys.stderr)
            size = smaller
    return size


def to_pixels(picture: Any, info: dict) -> np.ndarray:
    """(C, H, W), from 0 to 255, in the model's channel order."""
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    pixels = pixels[:, :, :: -1 if info["format"] == "BGR" else 1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def random_pixels(info: dict) -> np.ndarray:
    least = info["smallest_side"]
    size = info["fixed_size"] or (max(320, least), max(416, least))
    return np.random.default_rng(0).uniform(0, 255, (len(info["mean"]), *size)).astype(np.float32)


def prepare(pixels: np.ndarray, info: dict) -> np.ndarray:
    """What the model takes. A detector does all of this by itself."""
    if not info["normalised"]:
        return pixels
    mean, std = (np.array(info[key], np.float32)[:, None, None] for key in ("mean", "std"))
    image = (pixels - mean) / std
    unit = np.lcm(max(info["size_divisibility"], 1), info["step"])
    sides = [max(side, info["smallest_side"], info["square_size"]) for side in image.shape[1:]]
    sides = info["fixed_size"] or [side + -side % unit for side in sides]
    # zeros below and to the right, as Detectron2 pads
    padding = [(0, wanted - side) for wanted, side in zip(sides, image.shape[1:])]
    image = np.pad(image, [(0, 0), *padding])
    return np.repeat(image[None], max(info["batch"], 1), axis=0)


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A box's mask (M, M) in the photo (H, W), interpolated as Detectron2 does: bilinear, with the
    middles of pixels half a pixel from their corners, and zeros around."""
    weights = []
    for start, end, side, count in zip(box[:2], box[2:], (width, height), mask.shape[::-1]):
        middles = np.arange(side, dtype=np.float32) + 0.5
        places = (middles - start) / (end - start) * count - 0.5
        weights.append(np.maximum(1 - np.abs(places[:, None] - np.arange(count)), 0))
    across, down = weights
    return down @ mask @ across.T


def to_photo(
    outputs: Outputs, seen: tuple[int, int], photo: tuple[int, int], info: dict
) -> Outputs:
    """A detector's outputs in pixels of the photo, as Detectron2's detector_postprocess makes them.

    Args:
        seen: height and width that the detector saw the photo at.
        photo: height and width of the photo.
    """
    height, width = photo
    scale = np.array([width / seen[1], height / seen[0]] * 2, np.float32)
    boxes = np.clip(outputs["pred_boxes"] * scale, 0, np.array([width, height] * 2, np.float32))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    outputs = {name: y[kept] for name, y in {**outputs, "pred_boxes": boxes}.items()}
    if "pred_masks" in outputs:
        pairs = zip(outputs["pred_masks"][:, 0], outputs["pred_boxes"])
        limit = info.get("mask_threshold", 0.5)
        masks = [paste(mask, box, height, width) >= limit for mask, box in pairs]
        outputs["pred_masks"] = np.array(masks, bool).reshape(-1, height, width)
    if "pred_keypoints" in outputs:
        outputs["pred_keypoints"] = outputs["pred_keypoints"] * np.append(scale[:2], [1, 1])[:3]
    return outputs


def names_of(outputs: Outputs, info: dict) -> list[str]:
    names = dict(enumerate(info.get("classes", ())))
    return [names.get(int(index), f"class {index}") for index in outputs["pred_classes"]]


def draw(picture: Any, outputs: Outputs, names: list[str]) -> Any:
    """The photo with its objects, names and scores; a small photo is enlarged for the texts."""
    from PIL import Image, ImageDraw, ImageFont

    colours = ("#ffd400", "#ff4fa3", "#00d5ff", "#ff7a1a", "#a4ff3c", "#b98cff")
    zoom = -(-800 // max(picture.size)) if max(picture.size) < 800 else 1
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.convert("RGB").resize(size)
    line = max(round(max(size) / 500), 2)
    font = ImageFont.load_default(max(size) // 65)
    objects = [(i, colours[int(c) % len(colours)]) for i, c in enumerate(outputs["pred_classes"])]
    if "pred_masks" in outputs:
        for i, colour in objects:
            inside = Image.fromarray(outputs["pred_masks"][i].astype(np.uint8) * 100)
            inside = inside.resize(size, Image.NEAREST)
            picture.paste(Image.new("RGB", size, colour), mask=inside)
    canvas = ImageDraw.Draw(picture)
    boxes = outputs["pred_boxes"] * zoom
    for i, colour in objects:
        canvas.rectangle(boxes[i].tolist(), outline=colour, width=line)
        for x, y, *_ in outputs["pred_keypoints"][i] * zoom if "pred_keypoints" in outputs else ():
            canvas.ellipse((x - line, y - line, x + line, y + line), fill=colour)
    taken: list[tuple[float, ...]] = []
    for i, colour in objects:  # the best first; a text that would cover another one is left out
        text = f"{names[i]} {100 * outputs['scores'][i]:.0f}%"
        x = max(min(boxes[i][0], size[0] - canvas.textlength(text, font=font)), 0)
        place = (float(x), max(float(boxes[i][1]) - font.size - 2 * line, 0.0))  # above the box
        box = canvas.textbbox(place, text, font=font)
        over = [box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken]
        if not any(over):
            taken.append(box)
            canvas.rectangle(box, fill=colour)
            canvas.text(place, text, fill="black", font=font)
    return picture


def detect(run: Callable, photo: Path | None, info: dict) -> tuple[Outputs, np.ndarray, Any]:
    """The outputs (of a detector: on the photo), the network's input, and the photo."""
    picture = read_photo(photo, info) if photo else None
    if picture is None:
        pixels = random_pixels(info)
    else:
        from PIL import Image

        size = network_size(picture.width, picture.height, info)
        resized = picture if size == picture.size else picture.resize(size, Image.BILINEAR)
        pixels = to_pixels(resized, info)
    image = prepare(pixels, info)
    outputs = dict(zip(info["outputs"], run(image)))
    if "pred_boxes" in outputs:
        shape = pixels.shape[1:] if picture is None else (picture.height, picture.width)
        outputs = to_photo(outputs, pixels.shape[1:], shape, info)
    return outputs, image, picture


def report(outputs: Outputs, names: list[str], score: float) -> None:
    """Print the detections with this score or more."""
    shown = int((outputs["scores"] >= score).sum())
    best = f"; the highest is {outputs['scores'].max():.3f}" if len(names) and not shown else ""
    print(f"{len(names)} detections, {shown} with score >= {score:g}{best}")
    for name, value, box in zip(names, outputs["scores"], outputs["pred_boxes"]):
        if value >= score:
            print(f"{name:20} {value:.3f}  " + " ".join(f"{x:7.1f}" for x in box))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path, help="the exported file: .ts, .pt2, .onnx or .xml")
    add("image", type=Path, nargs="?", help="default: a random one")
    add("--score", type=float, default=0.5, help="of a detector: the lowest that is shown (0.5)")
    text = "of a detector: the picture with names and scores (default: IMAGE_detections.png here)"
    add("--output", type=Path, metavar="PNG", help=text)
    add("--overwrite", action="store_true", help="replace a picture that is there")
    add("--save", type=Path, metavar="NPZ", help="input and outputs, as numpy has")
    args = parser.parse_args()
    info = json.loads(args.model.with_name(args.model.name + ".json").read_text())
    output = args.output or Path(f"{args.image.stem}_detections.png" if args.image else "")
    draws = info["what"] == "detector" and args.image is not None
    if draws and output.exists() and not args.overwrite:
        raise SystemExit(f"--output: {output} exists; give --overwrite or another name")
    outputs, image, picture = detect(load(args.model, info), args.image, info)
    if info["what"] == "detector":
        report(outputs, names_of(outputs, info), args.score)
    else:
        for name, y in outputs.items():
            print(f"{name}: {y.shape}, from {y.min():.4g} to {y.max():.4g}")
    if draws:
        shown = {name: y[outputs["scores"] >= args.score] for name, y in outputs.items()}
        draw(picture, shown, names_of(shown, info)).save(output)
        print(output)
    if args.save:
        np.savez(args.save, image=image, **outputs)


if __name__ == "__main__":
    main()
